//! What the trees look like, and what nodes are told.

use super::*;

#[test]
fn a_newcomer_gets_the_shallowest_free_place() {
    let cluster = Cluster::grown(2, 1, 6);
    let expected = ["n001<o", "n002<n001", "n003<n001", "n004<n002", "n005<n003", "n006<n002", "o<-"];
    assert_eq!(cluster.drawn(), expected);
}

#[test]
fn joins_alone_keep_the_tree_as_shallow_as_it_can_be() {
    for fan_out in [1, 2, 3, 8] {
        let mut cluster = Cluster::grown(fan_out, 1, 0);
        // The origin has one child, and each of the others as many as it may.
        let (mut depth, mut width, mut free) = (1, 1, 1);
        for number in 1..=60 {
            if free == 0 {
                (depth, width) = (depth + 1, width * fan_out);
                free = width;
            }
            free -= 1;
            cluster.join(&relay(number), Role::Relay);
            assert_eq!(cluster.depth(), depth, "{number} relays with a fan-out of {fan_out}");
        }
    }
}

#[test]
fn a_node_is_told_its_parent_its_grandparent_an_uncle_and_the_origin() {
    let cluster = Cluster::grown(2, 1, 15);
    assert_eq!(cluster.peers("o"), [""; 0]);
    assert_eq!(cluster.peers("n001"), ["o"]);
    assert_eq!(cluster.peers("n002"), ["n001", "o"]);
    assert_eq!(cluster.peers("n003"), ["n001", "n002", "o"], "an elder sibling where there is no uncle");
    assert_eq!(cluster.parent("n008").as_deref(), Some("n004"));
    assert_eq!(cluster.peers("n008"), ["n004", "n002", "n006", "o"]);
}

#[test]
fn the_children_of_one_node_do_not_all_turn_to_the_same_uncle() {
    let cluster = Cluster::grown(8, 1, 73);
    let nodes = cluster.stripe(0);
    let children = |of: &NodeName| nodes.iter().filter(|n| n.parent.as_ref() == Some(of)).count();
    let full: Vec<&TreeNode> =
        nodes.iter().filter(|node| node.depth == 2 && children(&node.node) == 8).collect();
    assert_eq!(full.len(), 8);
    for parent in full {
        let below = nodes.iter().filter(|node| node.parent.as_ref() == Some(&parent.node));
        let uncles: Vec<String> = below.map(|node| cluster.peers(node.node.as_str())[2].clone()).collect();
        let busiest = uncles.iter().map(|uncle| uncles.iter().filter(|other| *other == uncle).count()).max();
        assert!(busiest <= Some(4), "{uncles:?}");
    }
}

#[test]
fn among_equally_shallow_places_the_nearest_zone_is_taken() {
    let mut cluster = Cluster::grown(2, 1, 0);
    for (node, location, parent) in [
        ("a", "z1/r1", "o"),
        ("b", "z2/r2", "a"),
        ("c", "z3/r3", "a"),
        ("d", "z3/r4", "c"),
        ("e", "z2/r5", "b"),
        ("f", "z3/r6", "c"),
    ] {
        cluster.up(node, location);
        cluster.attach(node, Role::Relay, None);
        assert_eq!(cluster.parent(node).as_deref(), Some(parent), "{node}");
    }
}

#[test]
fn several_origins_share_the_children() {
    let mut cluster = Cluster::grown(2, 1, 0);
    cluster.join("p", Role::Origin);
    for number in 1..=4 {
        cluster.join(&relay(number), Role::Relay);
    }
    assert_eq!(cluster.drawn(), ["n001<o", "n002<p", "n003<n001", "n004<n002", "o<-", "p<-"]);
    assert_eq!(cluster.peers("n001"), ["o", "p"], "the other origin is the alternate");
}

#[test]
fn an_inner_node_of_one_stripe_is_a_leaf_in_the_others() {
    for stripes in [2, 3, 4] {
        let cluster = Cluster::grown(4, stripes, 100);
        cluster.planner.check();
        assert!(cluster.depth() <= 6, "100 relays, 4 children each, the leaves below: {}", cluster.depth());
        for stripe in 0..stripes as usize {
            let nodes = cluster.stripe(stripe);
            assert_eq!(nodes.len(), 101);
            let below_origin = nodes.iter().filter(|node| node.parent == Some(name("o"))).count();
            assert_eq!(below_origin, 1, "the origin sends each chunk once");
        }
        let inner: usize = (0..stripes as usize)
            .map(|stripe| {
                let nodes = cluster.stripe(stripe);
                let parents: std::collections::BTreeSet<_> = nodes.iter().flat_map(|n| &n.parent).collect();
                parents.len() - 1
            })
            .sum();
        assert!(inner <= 100, "{inner} inner places for 100 relays");
    }
}

#[test]
fn stripes_that_use_every_uplink_still_find_places() {
    // With as many stripes as children there is no slack but that of the origin.
    let mut cluster = Cluster::grown(2, 2, 64);
    cluster.planner.check();
    assert_eq!(cluster.depth(), 7);
    for number in (1..=64).step_by(3) {
        cluster.down(&relay(number));
    }
    for number in 65..=100 {
        cluster.join(&relay(number), Role::Relay);
    }
    cluster.planner.check();
    for _ in 0..10 {
        cluster.pass(Millis(1));
    }
    assert_eq!(cluster.depth(), 7, "deaths do not deepen the trees for long");
}

#[test]
fn stripes_without_slack_become_shallow_again_after_many_deaths() {
    let mut cluster = Cluster::grown(2, 2, 400);
    assert_eq!(cluster.depth(), 9);
    // Every tenth: all of them are inner nodes of the same stripe.
    for number in (1..=400).step_by(10) {
        cluster.apply_unchecked(Event::NodeDown { node: name(&relay(number)) });
    }
    assert!(cluster.depth() > 10, "{}", cluster.depth());
    for _ in 0..100 {
        cluster.pass(Millis(1));
    }
    assert!(cluster.depth() <= 10, "{}", cluster.depth());
}

#[test]
fn tuning_reshapes_the_image_and_no_other() {
    let mut cluster = Cluster::grown(2, 1, 12);
    let other = image(2);
    for (node, role) in [("o", Role::Origin), ("n001", Role::Relay)] {
        cluster.apply(Event::Attach { node: name(node), image: other, role, current: None });
    }
    let before = cluster.planner.tree(&other);
    let shape = Shape::new(12, 2).unwrap();
    cluster.apply(Event::Tune { image: image(1), shaping: Some(shape.into()) });
    assert_eq!(cluster.planner.tree(&image(1)).unwrap().shape, shape);
    assert_eq!(cluster.depth(), 2);
    assert_eq!(cluster.planner.tree(&other), before);
}

#[test]
fn shapes_that_make_no_hierarchy_are_refused() {
    for (fan_out, stripes) in [(0, 1), (2, 0), (2, 3), (65, 1), (64, 17)] {
        assert!(Shape::new(fan_out, stripes).is_err(), "fan-out {fan_out}, {stripes} stripes");
    }
    assert_eq!(Shape::new(2, 1), Ok(Shape::BINARY));
}

#[test]
fn ten_thousand_nodes_join_and_a_thousand_die() {
    let mut cluster = Cluster::grown(2, 1, 10_000);
    assert_eq!(cluster.depth(), 14);
    for number in (1..=10_000).step_by(10) {
        cluster.apply_unchecked(Event::NodeDown { node: name(&relay(number)) });
    }
    assert_eq!(cluster.depth(), 14, "deaths do not deepen the tree");
    cluster.planner.check();
    assert_eq!(cluster.stripe(0).len(), 9_001);
}

/// A cluster whose planner chooses the shape.
fn automatic() -> Cluster {
    let settings = Settings { lease: LEASE, shaping: Shaping::Auto };
    Cluster { planner: Planner::new(settings), now: Millis(0), told: BTreeMap::new() }
}

fn stripes(cluster: &Cluster) -> u32 {
    cluster.planner.tree(&image(1)).unwrap().shape.stripes()
}

#[test]
fn the_shape_grows_with_few_relays_and_shrinks_only_when_half_of_them_are_gone() {
    let mut cluster = automatic();
    cluster.apply(Event::Tick);
    cluster.pass(LEASE);
    cluster.join("o", Role::Origin);
    let grown: Vec<u32> = (1..=5)
        .map(|number| {
            cluster.join(&relay(number), Role::Relay);
            cluster.planner.check();
            stripes(&cluster)
        })
        .collect();
    assert_eq!(grown, [1, 2, 2, 4, 4]);
    let shrunk: Vec<u32> = (1..=4)
        .map(|number| {
            cluster.down(&relay(number));
            cluster.pass(Millis(1));
            stripes(&cluster)
        })
        .collect();
    assert_eq!(shrunk, [4, 4, 4, 1]);
}

#[test]
fn a_shape_that_is_tuned_stays_until_that_is_taken_back() {
    let mut cluster = automatic();
    cluster.join("o", Role::Origin);
    let shape = Shape::new(3, 3).unwrap();
    cluster.apply(Event::Tune { image: image(1), shaping: Some(shape.into()) });
    for number in 1..=6 {
        cluster.join(&relay(number), Role::Relay);
    }
    cluster.pass(LEASE);
    assert_eq!(stripes(&cluster), 3);
    cluster.apply(Event::Tune { image: image(1), shaping: None });
    assert_eq!(stripes(&cluster), 4);
}

#[test]
fn a_restarted_volt_keeps_the_shape_that_nodes_report() {
    let mut old = automatic();
    old.apply(Event::Tick);
    old.pass(LEASE);
    old.join("o", Role::Origin);
    for number in 1..=12 {
        old.join(&relay(number), Role::Relay);
    }
    while !old.pass(Millis(1)).is_empty() {}
    let mut fresh = automatic();
    // The first to come cannot say how many stripes there were.
    fresh.join("o", Role::Origin);
    let mut told = Vec::new();
    for number in 1..=12 {
        let current = old.told[&(name(&relay(number)), image(1))].clone();
        fresh.up(&relay(number), "");
        told.extend(placed(&fresh.attach(&relay(number), Role::Relay, Some(current))));
        fresh.planner.check();
    }
    told.extend(placed(&fresh.pass(LEASE)));
    told.retain(|node| node != "o");
    assert_eq!(told, [""; 0]);
    assert_eq!(fresh.planner.tree(&image(1)), old.planner.tree(&image(1)));
}

#[test]
fn a_report_in_a_shape_that_would_not_be_chosen_is_kept_while_nodes_report() {
    let mut cluster = automatic();
    cluster.join("o", Role::Origin);
    for number in 1..=6 {
        cluster.up(&relay(number), "");
        let above = if number == 1 { "o".to_owned() } else { relay(number / 2) };
        assert_eq!(cluster.attach(&relay(number), Role::Relay, Some(listed(&[&above, "o"]))), []);
    }
    assert_eq!(stripes(&cluster), 1);
    cluster.pass(LEASE);
    assert_eq!(stripes(&cluster), 4);
}
