//! Death, loss and blame.

use super::*;

#[test]
fn a_child_with_room_takes_the_place_of_a_dead_parent_and_nobody_else_moves() {
    let mut cluster = Cluster::grown(2, 1, 6);
    let actions = cluster.down("n002");
    assert_eq!(actions[0], Action::Dead { node: name("n002") });
    assert_eq!(cluster.drawn(), ["n001<o", "n003<n001", "n004<n001", "n005<n003", "n006<n004", "o<-"]);
    assert_eq!(cluster.peers("n004"), ["n001", "n003", "o"]);
    assert_eq!(cluster.peers("n006"), ["n004", "n001", "n003", "o"]);
}

#[test]
fn the_deepest_leaf_stands_in_where_all_children_are_full() {
    let mut cluster = Cluster::grown(2, 1, 15);
    let children = |cluster: &Cluster, of: &str| -> Vec<String> {
        let nodes = cluster.stripe(0).into_iter().filter(|node| node.parent == Some(name(of)));
        nodes.map(|node| node.node.to_string()).collect()
    };
    assert_eq!(children(&cluster, "n002"), ["n004", "n006"]);
    cluster.down("n002");
    assert_eq!(children(&cluster, "n015"), ["n004", "n006"], "the subtrees stay in one piece");
    assert_eq!(children(&cluster, "n001"), ["n003", "n015"]);
    assert_eq!(cluster.depth(), 4);
}

#[test]
fn a_death_tells_only_those_whose_placement_changed() {
    let mut cluster = Cluster::grown(2, 1, 62);
    let before = cluster.told.clone();
    let actions = cluster.down("n010");
    let changed = |(key, placement): (&(NodeName, ImageId), &Placement)| {
        (before[key] != *placement).then(|| key.0.to_string())
    };
    assert_eq!(placed(&actions), cluster.told.iter().filter_map(changed).collect::<Vec<_>>());
    assert!(placed(&actions).len() <= 10, "a small neighbourhood: {:?}", placed(&actions));
}

#[test]
fn a_lease_runs_out_only_without_a_heartbeat() {
    let mut cluster = Cluster::grown(2, 1, 2);
    cluster.now = cluster.now + Millis(LEASE.0 - 1);
    cluster.apply(Event::Heartbeat { node: name("n001") });
    cluster.apply(Event::Heartbeat { node: name("o") });
    assert!(cluster.apply(Event::Tick).is_empty());
    cluster.now = cluster.now + Millis(1);
    assert_eq!(cluster.apply(Event::Tick)[0], Action::Dead { node: name("n002") });
    assert_eq!(cluster.drawn(), ["n001<o", "o<-"]);
    assert_eq!(
        cluster.apply(Event::Heartbeat { node: name("n002") }),
        [Action::Unknown { node: name("n002") }]
    );
}

#[test]
fn a_child_that_lost_its_parent_is_placed_elsewhere_with_its_children() {
    let mut cluster = Cluster::grown(2, 1, 15);
    cluster.lost("n004", "n002");
    let parent = cluster.parent("n004").unwrap();
    assert_ne!(parent, "n002");
    assert_eq!(cluster.parent("n008").as_deref(), Some("n004"));
    assert!(!cluster.peers("n004").contains(&"n002".to_owned()));
    assert_eq!(cluster.parent("n006").as_deref(), Some("n002"), "the others keep their parent");
    assert_eq!(cluster.standing("n002"), Standing::Good);
    assert_eq!(cluster.depth(), 6, "its subtree went to the bottom");
    cluster.pass(LEASE);
    assert_eq!(cluster.depth(), 5, "leaves are promoted to where there is room");
}

#[test]
fn a_lost_alternate_is_listed_again_after_a_lease() {
    let mut cluster = Cluster::grown(2, 1, 0);
    cluster.join("p", Role::Origin);
    cluster.join("n001", Role::Relay);
    assert_eq!(cluster.peers("n001"), ["o", "p"]);
    cluster.lost("n001", "p");
    assert_eq!(cluster.peers("n001"), ["o"]);
    cluster.pass(Millis(LEASE.0 - 1));
    assert_eq!(cluster.peers("n001"), ["o"]);
    cluster.pass(Millis(1));
    assert_eq!(cluster.peers("n001"), ["o", "p"]);
}

#[test]
fn a_high_subtree_that_lost_its_parent_does_not_double_the_depth() {
    let mut cluster = Cluster::grown(2, 1, 1023);
    assert_eq!(cluster.depth(), 10);
    let actions = cluster.lost("n002", "n001");
    assert_ne!(cluster.parent("n002").as_deref(), Some("n001"));
    assert_eq!(cluster.depth(), 11);
    assert!(placed(&actions).len() < 20, "few are disturbed: {:?}", placed(&actions));
}

#[test]
fn when_one_of_two_origins_dies_the_other_takes_over_with_few_more_levels() {
    let mut cluster = Cluster::grown(2, 1, 0);
    cluster.join("p", Role::Origin);
    for number in 1..=1000 {
        cluster.join(&relay(number), Role::Relay);
    }
    assert_eq!(cluster.depth(), 9);
    cluster.down("o");
    assert!(cluster.depth() <= 11, "{}", cluster.depth());
}

#[test]
fn one_child_does_not_make_a_parent_suspect_but_most_do_for_a_lease() {
    let mut cluster = Cluster::grown(3, 1, 7);
    assert_eq!(cluster.parent("n005").as_deref(), Some("n002"));
    cluster.join("n008", Role::Relay);
    assert_eq!(cluster.parent("n008").as_deref(), Some("n002"));
    cluster.lost("n005", "n002");
    assert_eq!(cluster.standing("n002"), Standing::Good);
    let actions = cluster.lost("n008", "n002");
    assert!(actions.contains(&Action::Suspect { node: name("n002") }), "{actions:?}");
    for number in 11..17 {
        cluster.join(&relay(number), Role::Relay);
        assert_ne!(cluster.parent(&relay(number)).as_deref(), Some("n002"));
    }
    cluster.apply(Event::Heartbeat { node: name("n002") });
    assert_eq!(cluster.standing("n002"), Standing::Suspect, "a heartbeat does not clear it");
    cluster.pass(LEASE);
    assert_eq!(cluster.standing("n002"), Standing::Good);
}

#[test]
fn a_report_about_one_that_the_node_was_never_given_is_ignored() {
    let mut cluster = Cluster::grown(2, 1, 14);
    let before = cluster.drawn();
    assert!(cluster.lost("n001", "n014").is_empty());
    assert!(cluster.blame("n001", "n014").is_empty());
    assert!(cluster.blame("n001", "n001").is_empty());
    assert!(cluster.lost("nobody", "n001").is_empty());
    assert_eq!(cluster.drawn(), before);
}

#[test]
fn the_only_origin_is_kept_as_last_resort_even_by_those_that_lost_it() {
    let mut cluster = Cluster::grown(2, 1, 1);
    assert!(cluster.lost("n001", "o").is_empty());
    assert_eq!(cluster.parent("n001").as_deref(), Some("o"));
    cluster.join("n002", Role::Relay);
    cluster.lost("n002", "o");
    assert_eq!(cluster.parent("n002").as_deref(), Some("n001"));
    assert_eq!(cluster.peers("n002"), ["n001", "o"]);
}

#[test]
fn one_accuser_is_moved_away_and_the_second_quarantines_the_liar() {
    let mut cluster = Cluster::grown(2, 1, 15);
    cluster.blame("n004", "n002");
    assert_eq!(cluster.standing("n002"), Standing::Good);
    assert_ne!(cluster.parent("n004").as_deref(), Some("n002"));
    let actions = cluster.blame("n006", "n002");
    assert!(actions.contains(&Action::Quarantine { node: name("n002") }));
    let serves = |cluster: &Cluster| cluster.stripe(0).iter().any(|n| n.parent == Some(name("n002")));
    assert!(!serves(&cluster));
    assert!(cluster.told.values().flat_map(|p| &p.stripes[0]).all(|peer| peer.node != name("n002")));
}

#[test]
fn the_only_child_is_believed_at_once_even_if_it_lost_the_liar_before() {
    let mut cluster = Cluster::grown(2, 1, 4);
    assert_eq!(cluster.parent("n004").as_deref(), Some("n002"));
    cluster.blame("n004", "n002");
    assert_eq!(cluster.standing("n002"), Standing::Quarantined);

    let mut cluster = Cluster::grown(2, 1, 5);
    cluster.lost("n004", "n002");
    cluster.blame("n004", "n002");
    cluster.pass(LEASE);
    cluster.lost("n004", "n003");
    assert_ne!(cluster.parent("n004").as_deref(), Some("n002"), "blame outlives loss");
}

#[test]
fn quarantine_outlives_restart_and_death_and_ends_with_pardon() {
    let mut cluster = Cluster::grown(2, 1, 2);
    cluster.apply(Event::Quarantine { node: name("n001") });
    cluster.down("n001");
    cluster.join("n001", Role::Relay);
    assert_eq!(cluster.standing("n001"), Standing::Quarantined);
    for number in 3..6 {
        cluster.join(&relay(number), Role::Relay);
        assert_ne!(cluster.parent(&relay(number)).as_deref(), Some("n001"));
    }
    cluster.apply(Event::Pardon { node: name("n001") });
    let serves = |number: usize| {
        cluster.join(&relay(number), Role::Relay);
        cluster.parent(&relay(number)).as_deref() == Some("n001")
    };
    assert!((10..20).any(serves), "it gets children again");
}

#[test]
fn the_only_origin_is_not_quarantined_by_blame_but_one_of_two_is() {
    let mut cluster = Cluster::grown(2, 1, 2);
    cluster.blame("n001", "o");
    cluster.blame("n002", "o");
    assert_eq!(cluster.standing("o"), Standing::Good);
    cluster.join("p", Role::Origin);
    cluster.join("n003", Role::Relay);
    cluster.join("n004", Role::Relay);
    let accuser = cluster.stripe(0).into_iter().find(|node| node.parent == Some(name("o"))).unwrap();
    cluster.blame(accuser.node.as_str(), "o");
    assert_eq!(cluster.standing("o"), Standing::Quarantined);
    assert!(cluster.drawn().iter().all(|line| !line.ends_with("<o") && !line.starts_with("o<")));
    cluster.apply(Event::Pardon { node: name("o") });
    assert!(cluster.drawn().contains(&"o<-".to_owned()));
}

#[test]
fn without_an_origin_relays_stay_attached_and_newcomers_join_them() {
    let mut cluster = Cluster::grown(2, 1, 6);
    let before = cluster.drawn();
    cluster.down("o");
    let mut without = before.clone();
    without.retain(|line| line != "o<-");
    without[0] = "n001<-".to_owned();
    assert_eq!(cluster.drawn(), without);
    assert_eq!(cluster.peers("n001"), [""; 0]);
    cluster.up("far", "z/r");
    cluster.attach("far", Role::Relay, None);
    assert_eq!(cluster.parent("far").as_deref(), Some("n003"));
    cluster.down("far");
    cluster.join("o", Role::Origin);
    assert_eq!(cluster.drawn(), before, "the origin is back, and all is as it was");
}

#[test]
fn a_node_may_change_its_role_both_ways() {
    let mut cluster = Cluster::grown(2, 1, 6);
    cluster.attach("n001", Role::Origin, None);
    cluster.planner.check();
    assert_eq!(cluster.peers("n001"), [""; 0]);
    assert!(cluster.drawn().contains(&"n001<-".to_owned()));
    cluster.attach("o", Role::Relay, None);
    cluster.planner.check();
    assert!(!cluster.drawn().contains(&"o<-".to_owned()));
    assert!(cluster.peers("o").contains(&"n001".to_owned()));
}

#[test]
fn the_last_detach_forgets_the_image() {
    let mut cluster = Cluster::grown(2, 1, 1);
    for node in ["n001", "o"] {
        cluster.apply(Event::Detach { node: name(node), image: image(1) });
    }
    assert_eq!(cluster.planner.images().count(), 0);
    assert_eq!(cluster.planner.tree(&image(1)), None);
    assert_eq!(cluster.planner.nodes().count(), 2);
}
