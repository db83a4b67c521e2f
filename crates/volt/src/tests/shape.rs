//! What the trees look like, and what nodes are told.

use super::*;

#[test]
fn a_newcomer_gets_the_shallowest_free_place() {
    let cluster = Cluster::grown(2, 1, 6);
    let expected = ["n001<o", "n002<o", "n003<n001", "n004<n002", "n005<n001", "n006<n002", "o<-"];
    assert_eq!(cluster.drawn(), expected);
}

#[test]
fn joins_alone_keep_the_tree_as_shallow_as_it_can_be() {
    for fan_out in [1, 2, 3, 8] {
        let mut cluster = Cluster::grown(fan_out, 1, 0);
        let (mut depth, mut width, mut free) = (0, 1, 0);
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
    let cluster = Cluster::grown(2, 1, 14);
    assert_eq!(cluster.peers("o"), [""; 0]);
    assert_eq!(cluster.peers("n001"), ["o"]);
    assert_eq!(cluster.peers("n002"), ["o", "n001"]);
    assert_eq!(cluster.parent("n007").as_deref(), Some("n003"));
    assert_eq!(cluster.peers("n007"), ["n003", "n001", "n005", "o"]);
}

#[test]
fn among_equally_shallow_places_the_nearest_is_taken() {
    let mut cluster = Cluster::grown(2, 1, 0);
    for (node, location) in [("a", "z1/r1"), ("b", "z2/r2")] {
        cluster.up(node, location);
        cluster.attach(node, Role::Relay, None);
    }
    for (node, location, parent) in
        [("c", "z2/r9", "b"), ("d", "z2/r2/h1", "b"), ("e", "z1/r1", "a"), ("f", "z9", "a")]
    {
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
    assert_eq!(cluster.drawn(), ["n001<o", "n002<p", "n003<o", "n004<p", "o<-", "p<-"]);
    assert_eq!(cluster.peers("n001"), ["o", "p"], "the other origin is the alternate");
}

#[test]
fn an_inner_node_of_one_stripe_is_a_leaf_in_the_others() {
    for stripes in [2, 3, 4] {
        let cluster = Cluster::grown(4, stripes, 100);
        cluster.planner.check();
        assert!(cluster.depth() <= 5, "100 relays, 4 children each, the leaves below: {}", cluster.depth());
        for stripe in 0..stripes as usize {
            let nodes = cluster.stripe(stripe);
            assert_eq!(nodes.len(), 101);
            let below_origin = nodes.iter().filter(|node| node.parent == Some(name("o"))).count();
            assert_eq!(below_origin, 4, "the origin serves no more than its fan-out");
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
    assert_eq!(cluster.depth(), 6);
    for number in (1..=64).step_by(3) {
        cluster.down(&relay(number));
    }
    for number in 65..=100 {
        cluster.join(&relay(number), Role::Relay);
    }
    cluster.planner.check();
    assert_eq!(cluster.depth(), 6, "deaths do not deepen the trees");
}

#[test]
fn stripes_without_slack_become_shallow_again_after_many_deaths() {
    let mut cluster = Cluster::grown(2, 2, 400);
    assert_eq!(cluster.depth(), 8);
    // Every tenth: all of them are inner nodes of the same stripe.
    for number in (1..=400).step_by(10) {
        cluster.apply_unchecked(Event::NodeDown { node: name(&relay(number)) });
    }
    assert!(cluster.depth() > 9, "{}", cluster.depth());
    for _ in 0..100 {
        cluster.pass(Millis(1));
    }
    assert!(cluster.depth() <= 9, "{}", cluster.depth());
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
    assert_eq!(cluster.depth(), 1);
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
    assert_eq!(cluster.depth(), 13);
    for number in (1..=10_000).step_by(10) {
        cluster.apply_unchecked(Event::NodeDown { node: name(&relay(number)) });
    }
    assert_eq!(cluster.depth(), 13, "deaths do not deepen the tree");
    cluster.planner.check();
    assert_eq!(cluster.stripe(0).len(), 9_001);
}
