//! Racks: what crosses their uplinks, and how deep the trees get.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A cluster of an origin at `origin`, and relays that come to the racks in turn.
fn racked(fan_out: u32, stripes: u32, racks: usize, relays: usize, origin: &str) -> Cluster {
    let mut cluster = Cluster::new(fan_out, stripes);
    cluster.apply(Event::Tick);
    cluster.pass(LEASE);
    cluster.up("o", origin);
    cluster.attach("o", Role::Origin, None);
    for number in 1..=relays {
        join_rack(&mut cluster, number, racks);
    }
    cluster
}

fn join_rack(cluster: &mut Cluster, number: usize, racks: usize) {
    cluster.up(&relay(number), &format!("z/r{}", number % racks));
    cluster.attach(&relay(number), Role::Relay, None);
}

/// What crosses the uplink of a rack: how often each stripe comes in, and how many stripes go out.
#[derive(Debug, Clone, Default, PartialEq)]
struct Uplink {
    into: Vec<usize>,
    out: usize,
}

fn uplinks(cluster: &Cluster) -> BTreeMap<String, Uplink> {
    let racks: BTreeMap<NodeName, String> =
        cluster.planner.nodes().map(|view| (view.node, view.location.to_string())).collect();
    let stripes = cluster.planner.tree(&image(1)).unwrap().stripes;
    let none = Uplink { into: vec![0; stripes.len()], out: 0 };
    let mut found: BTreeMap<String, Uplink> =
        racks.values().map(|rack| (rack.clone(), none.clone())).collect();
    for (stripe, nodes) in stripes.iter().enumerate() {
        for node in nodes {
            let Some(parent) = &node.parent else { continue };
            let (from, to) = (&racks[parent], &racks[&node.node]);
            if from != to {
                found.get_mut(to).unwrap().into[stripe] += 1;
                found.get_mut(from).unwrap().out += 1;
            }
        }
    }
    found
}

/// Panics unless each chunk crosses each uplink once in each direction, and leaves the origin once.
fn check_uplinks(cluster: &Cluster, origin: &str, label: &str) {
    let tree = cluster.planner.tree(&image(1)).unwrap();
    for (rack, uplink) in uplinks(cluster) {
        let into = usize::from(rack != origin);
        assert_eq!(uplink.into, vec![into; tree.stripes.len()], "{label}: into {rack}");
        // One stripe cannot be passed on to less than one other rack, and that would be a chain.
        let out_max = tree.stripes.len().max(2).min(tree.shape.fan_out() as usize);
        assert!(uplink.out <= out_max, "{label}: {} out of {rack}", uplink.out);
    }
    for stripe in &tree.stripes {
        let sent = stripe.iter().filter(|node| node.parent == Some(name("o"))).count();
        assert_eq!(sent, 1, "{label}: the origin sends each chunk once");
    }
}

/// The least depth that a tree of so many nodes can have.
fn depth_min(nodes: usize, fan_out: u32) -> u32 {
    let mut width = 1;
    let mut room = 0;
    let mut depth = 0;
    while room < nodes {
        room += width;
        width *= fan_out as usize;
        depth += 1;
    }
    depth
}

#[test]
fn a_chunk_crosses_the_uplink_of_each_rack_once_in_each_direction() {
    for (fan_out, stripes) in [(2, 1), (2, 2), (4, 2), (4, 4), (8, 8)] {
        for (racks, relays) in [(4, 100), (5, 63), (30, 200), (100, 260)] {
            for origin in ["", "z/r0", "z/own"] {
                let mut cluster = racked(fan_out, stripes, racks, relays, origin);
                for _ in 0..3 {
                    cluster.pass(Millis(1));
                }
                let label =
                    format!("{fan_out}/{stripes}, {racks} racks, {relays} relays, origin at '{origin}'");
                check_uplinks(&cluster, origin, &label);
                let least = depth_min(racks, stripes.max(2)) + depth_min(relays / racks, fan_out);
                let depth = cluster.depth();
                // A rack of fewer nodes than stripes has no node for each, and so a longer way through.
                let few = relays / racks < stripes as usize;
                assert!(few || depth <= 3 * least, "{label}: depth {depth}, {least} at least");
            }
        }
    }
}

#[test]
fn nothing_moves_any_more_after_a_few_ticks() {
    for (fan_out, stripes, racks, relays) in [(4, 4, 4, 100), (2, 2, 30, 200), (8, 8, 3, 70), (4, 4, 1, 101)]
    {
        let mut cluster = racked(fan_out, stripes, racks, relays, "");
        let moves: Vec<usize> = (0..12).map(|_| placed(&cluster.pass(Millis(1))).len()).collect();
        assert_eq!(moves.last(), Some(&0), "{fan_out}/{stripes}, {racks} racks: {moves:?}");
    }
}

#[test]
fn a_rack_mate_takes_over_from_a_gateway_that_dies() {
    let mut cluster = racked(4, 4, 4, 100, "");
    for _ in 0..3 {
        let racks: BTreeMap<NodeName, Location> =
            cluster.planner.nodes().map(|view| (view.node, view.location)).collect();
        let gateways: BTreeSet<NodeName> = cluster
            .planner
            .tree(&image(1))
            .unwrap()
            .stripes
            .into_iter()
            .flatten()
            .filter(|node| node.parent.as_ref().is_some_and(|parent| racks[parent] != racks[&node.node]))
            .map(|node| node.node)
            .collect();
        assert!(gateways.len() >= 4, "{gateways:?}");
        for gateway in gateways {
            cluster.down(gateway.as_str());
            let broken = |uplink: &Uplink| uplink.into.iter().any(|&count| count > 1);
            let broken: Vec<String> =
                uplinks(&cluster).into_iter().filter(|(_, u)| broken(u)).map(|(rack, _)| rack).collect();
            assert!(broken.is_empty(), "{gateway} died: {broken:?}");
        }
        cluster.pass(Millis(1));
        check_uplinks(&cluster, "", "after deaths");
    }
}

#[test]
fn a_node_that_lost_its_parent_in_another_rack_gets_another_one() {
    let mut cluster = racked(4, 4, 4, 40, "");
    let racks: BTreeMap<NodeName, Location> =
        cluster.planner.nodes().map(|view| (view.node, view.location)).collect();
    let far = |node: &TreeNode| {
        let parent = node.parent.as_ref()?;
        (parent.as_str() != "o" && racks[parent] != racks[&node.node])
            .then(|| (node.node.to_string(), parent.to_string()))
    };
    let (child, parent) = cluster.stripe(0).iter().find_map(far).unwrap();
    cluster.lost(&child, &parent);
    assert_ne!(cluster.parent(&child), Some(parent.clone()));
    assert!(!cluster.peers(&child).contains(&parent));
    check_uplinks(&cluster, "", "after a loss");
}

#[test]
fn after_a_restart_of_volt_racks_are_what_they_were() {
    let mut old = racked(4, 4, 5, 60, "z/r0");
    while !old.pass(Millis(1)).is_empty() {}
    let mut fresh = Cluster::new(4, 4);
    let nodes: Vec<(NodeName, Location)> =
        old.planner.nodes().map(|view| (view.node, view.location)).collect();
    let mut actions = Vec::new();
    for (node, location) in nodes {
        let role = if node.as_str() == "o" { Role::Origin } else { Role::Relay };
        fresh.up(node.as_str(), location.as_str());
        let current = old.told[&(node.clone(), image(1))].clone();
        actions.extend(fresh.attach(node.as_str(), role, Some(current)));
        fresh.planner.check();
    }
    actions.extend(fresh.pass(LEASE));
    assert_eq!(placed(&actions), [""; 0]);
    assert_eq!(fresh.planner.tree(&image(1)), old.planner.tree(&image(1)));
}

/// What may happen to a cluster of four racks.
#[derive(Debug, Clone)]
enum Step {
    Join(usize),
    Die(usize),
    Lose(usize),
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..80usize).prop_map(Step::Join),
        3 => (0..80usize).prop_map(Step::Die),
        1 => (0..80usize).prop_map(Step::Lose),
        1 => Just(Step::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_and_goes_racks_settle_to_one_way_in(
        steps in prop::collection::vec(step(), 1..80),
        shape in prop::sample::select(vec![(2, 2), (4, 4), (4, 2)]),
    ) {
        let (fan_out, stripes) = shape;
        let mut cluster = racked(fan_out, stripes, 4, 24, "");
        for step in steps {
            match step {
                Step::Join(number) => {
                    if cluster.planner.node(&name(&relay(number))).is_none() {
                        join_rack(&mut cluster, number, 4);
                        cluster.planner.check();
                    }
                }
                Step::Die(number) => drop(cluster.down(&relay(number))),
                Step::Lose(number) => {
                    let node = relay(number);
                    let told = cluster.told.get(&(name(&node), image(1)));
                    if let Some(parent) = told.and_then(|told| told.stripes[0].first().cloned()) {
                        cluster.lost(&node, parent.node.as_str());
                    }
                }
                Step::Tick => drop(cluster.pass(Millis(1))),
            }
        }
        // Whoever lost somebody is believed for a lease.
        cluster.pass(LEASE);
        for _ in 0..10 {
            cluster.pass(Millis(1));
        }
        for (rack, uplink) in uplinks(&cluster) {
            let nodes = cluster.planner.nodes().filter(|view| view.location.to_string() == rack).count();
            if nodes >= stripes as usize && !rack.is_empty() {
                prop_assert_eq!(&uplink.into, &vec![1; stripes as usize], "{}", rack);
            }
            prop_assert!(rack.is_empty() || uplink.out <= fan_out as usize, "{} {:?}", rack, uplink);
        }
    }
}

#[test]
fn a_rack_that_its_last_relay_left_may_be_one_too_many_below_a_root() {
    let mut cluster = Cluster::new(2, 1);
    cluster.join("n", Role::Relay);
    cluster.apply(Event::Quarantine { node: name("o") });
    cluster.apply(Event::Quarantine { node: name("n") });
    cluster.join("o", Role::Origin);
    cluster.up("n", "z");
    cluster.up("o", "z");
    cluster.join("m", Role::Relay);
    cluster.apply(Event::Lost { by: name("n"), parent: name("m") });
    // Its rack has nobody any more who would avoid the relay in the other.
    cluster.now = LEASE;
    cluster.up("n", "z/r");
    cluster.planner.check();
    cluster.pass(Millis(1));
}
