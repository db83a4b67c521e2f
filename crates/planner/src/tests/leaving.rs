//! Nodes that have no use for the image any more.

use super::*;

fn leave(cluster: &mut Cluster, node: &str) -> Vec<Action> {
    cluster.apply(Event::Leave { node: name(node), image: image(1) })
}

/// Whom the actions release, in order.
fn released(actions: &[Action]) -> Vec<String> {
    let node = |action: &Action| match action {
        Action::Released { node, .. } => Some(node.to_string()),
        _ => None,
    };
    actions.iter().filter_map(node).collect()
}

#[test]
fn a_leaf_is_released_at_once_and_nobody_moves() {
    let mut cluster = Cluster::grown(2, 1, 7);
    let actions = leave(&mut cluster, "n007");
    assert_eq!(released(&actions), ["n007"]);
    assert!(!cluster.drawn().iter().any(|edge| edge.starts_with("n007")));
    let moved: Vec<String> = placed(&actions);
    assert!(moved.is_empty(), "nobody had it in its list: {moved:?}");
    assert_eq!(released(&leave(&mut cluster, "n007")), ["n007"], "a word that was lost is said again");
}

#[test]
fn a_parent_waits_for_its_children_and_goes_with_the_last() {
    let mut cluster = Cluster::grown(1, 1, 3);
    assert_eq!(cluster.drawn(), ["n001<o", "n002<n001", "n003<n002", "o<-"]);
    assert_eq!(leave(&mut cluster, "n001"), []);
    assert_eq!(leave(&mut cluster, "n002"), []);
    let actions = leave(&mut cluster, "n003");
    assert_eq!(released(&actions), ["n003", "n002", "n001"], "from the leaf up");
    assert_eq!(placed(&actions), [""; 0], "and nobody gets another parent");
    assert_eq!(cluster.drawn(), ["o<-"]);
}

#[test]
fn a_parent_whose_children_stay_is_released_after_a_lease_and_they_have_others_by_then() {
    let mut cluster = Cluster::grown(1, 1, 3);
    assert_eq!(leave(&mut cluster, "n002"), []);
    cluster.pass(Millis(LEASE.0 - 1));
    assert_eq!(cluster.parent("n003").as_deref(), Some("n002"));
    let actions = cluster.pass(Millis(1));
    assert_eq!(released(&actions), ["n002"]);
    assert_eq!(placed(&actions), ["n003"]);
    assert_eq!(cluster.peers("n003"), ["n001", "o"]);
}

#[test]
fn asking_again_does_not_buy_time() {
    let mut cluster = Cluster::grown(1, 1, 2);
    leave(&mut cluster, "n001");
    cluster.pass(Millis(LEASE.0 - 1));
    leave(&mut cluster, "n001");
    assert_eq!(released(&cluster.pass(Millis(1))), ["n001"]);
}

#[test]
fn who_leaves_gets_no_new_children_and_who_stays_after_all_does() {
    let mut cluster = Cluster::grown(2, 1, 2);
    assert_eq!(cluster.drawn(), ["n001<o", "n002<n001", "o<-"]);
    leave(&mut cluster, "n001");
    cluster.join("n003", Role::Relay);
    assert_eq!(cluster.parent("n003").as_deref(), Some("n002"), "a deeper place, but one that lasts");
    let current = cluster.told[&(name("n001"), image(1))].clone();
    cluster.attach("n001", Role::Relay, Some(current));
    cluster.join("n004", Role::Relay);
    assert_eq!(cluster.parent("n004").as_deref(), Some("n001"));
    assert_eq!(released(&cluster.pass(LEASE)), [""; 0]);
}

#[test]
fn the_death_of_the_last_child_releases_its_parent() {
    let mut cluster = Cluster::grown(1, 1, 2);
    leave(&mut cluster, "n001");
    assert_eq!(released(&cluster.down("n002")), ["n001"]);
}

#[test]
fn another_shape_and_another_standing_do_not_forget_who_leaves() {
    let mut cluster = Cluster::grown(1, 1, 3);
    leave(&mut cluster, "n002");
    let shaping = Some(Shape::new(2, 1).unwrap().into());
    cluster.apply(Event::Tune { image: image(1), shaping });
    assert_eq!(cluster.drawn(), ["n001<o", "n002<n001", "n003<n001", "o<-"]);
    assert_eq!(released(&cluster.pass(Millis(1))), ["n002"], "it has no children any more");
}

#[test]
fn while_nodes_report_nobody_seems_childless() {
    let mut cluster = Cluster::new(1, 1);
    cluster.join("o", Role::Origin);
    cluster.up("n001", "");
    cluster.attach("n001", Role::Relay, Some(listed(&["o"])));
    assert_eq!(leave(&mut cluster, "n001"), []);
    cluster.up("n002", "");
    cluster.attach("n002", Role::Relay, Some(listed(&["n001", "o"])));
    assert_eq!(cluster.parent("n002").as_deref(), Some("n001"));
}

#[test]
fn an_origin_does_not_leave_and_a_stranger_has_to_register() {
    let mut cluster = Cluster::grown(2, 1, 1);
    assert_eq!(leave(&mut cluster, "o"), []);
    assert_eq!(released(&cluster.pass(LEASE)), [""; 0]);
    assert_eq!(leave(&mut cluster, "n009"), [Action::Unknown { node: name("n009") }]);
}

#[test]
fn when_all_leave_in_any_order_nobody_goes_before_who_stays_below_and_nobody_waits_for_time() {
    for stripes in [1, 2, 4] {
        let mut cluster = Cluster::grown(4, stripes, 62);
        let mut gone = 0;
        // Every second one first, so that those who stay are above and below.
        for node in (1..=62).step_by(2).chain((2..=62).step_by(2)) {
            let before = children_of_all(&cluster);
            let actions = leave(&mut cluster, &relay(node));
            let went = released(&actions);
            for child in went.iter().filter_map(|node| before.get(node)).flatten() {
                assert!(went.contains(child), "{child} stays below one that is released: {went:?}");
            }
            assert_eq!(placed(&actions).iter().filter(|node| went.contains(node)).count(), 0);
            gone += went.len();
        }
        assert_eq!(gone, 62, "with {stripes} stripes");
        assert_eq!(cluster.drawn(), ["o<-"]);
    }
}

/// Per parent, whoever fetches from it in some stripe.
fn children_of_all(cluster: &Cluster) -> BTreeMap<String, Vec<String>> {
    let mut children: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let stripes = cluster.planner.tree(&image(1)).map(|tree| tree.stripes).unwrap_or_default();
    for at in stripes.into_iter().flatten() {
        if let Some(parent) = at.parent {
            children.entry(parent.to_string()).or_default().push(at.node.to_string());
        }
    }
    children
}
