//! Volt restarts and knows nothing; nodes restart and come back.

use super::*;

/// Lets every node of `old` register and attach at an empty planner, in the order that `rank` gives.
fn report<K: Ord>(old: &Cluster, rank: impl Fn(&NodeName) -> K) -> (Cluster, Vec<Action>) {
    let shape = old.planner.tree(&image(1)).unwrap().shape;
    let mut fresh = Cluster::new(shape.fan_out(), shape.stripes());
    let roles: BTreeMap<NodeName, Role> =
        old.stripe(0).into_iter().map(|node| (node.node, node.role)).collect();
    let mut nodes: Vec<&NodeName> = roles.keys().collect();
    nodes.sort_by_key(|node| rank(node));
    let mut actions = Vec::new();
    for node in nodes {
        let current = old.told[&(node.clone(), image(1))].clone();
        fresh.up(node.as_str(), "");
        actions.extend(fresh.attach(node.as_str(), roles[node], Some(current)));
        fresh.planner.check();
    }
    (fresh, actions)
}

#[test]
fn after_a_restart_of_volt_the_hierarchy_is_what_it_was_and_nobody_is_disturbed() {
    for (fan_out, stripes) in [(2, 1), (4, 2), (2, 2), (4, 4)] {
        let mut old = Cluster::grown(fan_out, stripes, 40);
        for number in [3, 7, 20] {
            old.down(&relay(number));
        }
        // Whatever leaf can be promoted has been.
        while !old.pass(Millis(1)).is_empty() {}
        for turn in 0..6 {
            let scattered = |node: &NodeName| ChunkHash::of(format!("{turn}{node}").as_bytes());
            let (mut fresh, mut actions) = report(&old, scattered);
            actions.extend(fresh.pass(LEASE));
            for stripe in 0..stripes as usize {
                let (is, was) = (fresh.stripe(stripe), old.stripe(stripe));
                let changed: Vec<_> = is.iter().filter(|node| !was.contains(node)).collect();
                assert!(changed.is_empty(), "{fan_out}/{stripes}, turn {turn}: {changed:?}");
            }
            assert_eq!(actions, [], "fan-out {fan_out}, {stripes} stripes, turn {turn}");
        }
    }
}

#[test]
fn a_place_is_kept_for_a_lease_while_the_parent_has_not_reported() {
    let mut cluster = Cluster::new(2, 1);
    cluster.join("o", Role::Origin);
    cluster.up("x", "");
    assert_eq!(cluster.attach("x", Role::Relay, Some(listed(&["late", "o"]))), []);
    let actions = cluster.pass(Millis(LEASE.0 - 1));
    assert_eq!(actions, [], "it keeps what it has");
    cluster.pass(Millis(1));
    assert_eq!(cluster.parent("x").as_deref(), Some("o"), "the parent never came");
    assert_eq!(cluster.peers("x"), ["o"]);
}

#[test]
fn after_the_time_to_learn_nobody_waits() {
    let mut cluster = Cluster::grown(2, 1, 0);
    cluster.up("x", "");
    cluster.attach("x", Role::Relay, Some(listed(&["late", "o"])));
    assert_eq!(cluster.peers("x"), ["o"]);
}

#[test]
fn circles_in_reports_are_broken() {
    let mut cluster = Cluster::new(2, 1);
    cluster.join("o", Role::Origin);
    for (node, parent) in [("x", "y"), ("y", "z"), ("z", "x"), ("s", "s")] {
        cluster.up(node, "");
        cluster.attach(node, Role::Relay, Some(listed(&[parent])));
        cluster.planner.check();
    }
    for node in ["x", "y", "z", "s"] {
        let mut at = node.to_owned();
        for _ in 0..4 {
            at = cluster.parent(&at).unwrap_or(at);
        }
        assert_eq!(at, "o", "{node} has a way to the origin");
    }
    cluster.pass(LEASE);
}

#[test]
fn reports_of_too_many_children_or_of_another_shape_do_not_overload_anyone() {
    let mut cluster = Cluster::new(2, 1);
    cluster.join("o", Role::Origin);
    for number in 1..=5 {
        cluster.up(&relay(number), "");
        cluster.attach(&relay(number), Role::Relay, Some(listed(&["o"])));
        cluster.planner.check();
    }
    cluster.pass(LEASE);
    let below = cluster.stripe(0).into_iter().filter(|node| node.parent == Some(name("o"))).count();
    assert_eq!(below, 1);
    cluster.up("odd", "");
    let odd = Placement { stripes: vec![Vec::new(); 500] };
    cluster.attach("odd", Role::Relay, Some(odd));
    cluster.planner.check();
    assert_eq!(cluster.told[&(name("odd"), image(1))].stripes.len(), 1);
}

#[test]
fn a_node_that_restarts_keeps_its_place_and_its_children() {
    let mut cluster = Cluster::grown(2, 1, 6);
    let before = cluster.drawn();
    let current = cluster.told[&(name("n001"), image(1))].clone();
    cluster.up("n001", "");
    assert_eq!(cluster.attach("n001", Role::Relay, Some(current.clone())), []);
    assert_eq!(cluster.drawn(), before);
    let actions = cluster.attach("n001", Role::Relay, None);
    assert_eq!(actions, [Action::Place { node: name("n001"), image: image(1), placement: current }]);
    cluster.pass(LEASE);
    assert_eq!(cluster.drawn(), before);
}

#[test]
fn a_node_that_comes_back_elsewhere_is_announced_to_those_that_list_it() {
    let mut cluster = Cluster::grown(2, 1, 6);
    let moved = |node: &str| Event::NodeUp {
        node: name(node),
        address: "elsewhere:1".to_owned(),
        location: Location::default(),
    };
    let actions = cluster.apply(moved("n001"));
    assert_eq!(placed(&actions), ["n002", "n003", "n004", "n005", "n006"]);
    let mut cluster = Cluster::grown(2, 1, 30);
    let actions = cluster.apply(moved("o"));
    assert_eq!(placed(&actions), (1..=30).map(relay).collect::<Vec<_>>(), "the last resort of all");
}

#[test]
fn a_node_that_comes_back_without_the_image_is_detached_after_a_lease() {
    let mut cluster = Cluster::grown(2, 1, 6);
    cluster.up("n001", "");
    cluster.pass(Millis(LEASE.0 - 1));
    assert!(cluster.drawn().contains(&"n001<o".to_owned()));
    cluster.pass(Millis(1));
    assert!(cluster.drawn().iter().all(|line| !line.contains("n001")), "{:?}", cluster.drawn());
    assert!(cluster.planner.node(&name("n001")).is_some());
}
