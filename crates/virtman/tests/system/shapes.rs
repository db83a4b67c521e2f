//! The shape of an image's hierarchy, set by hand and chosen by the number of nodes.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, make_raw, wait_for};

const NODES: [&str; 6] = ["o", "a", "b", "c", "d", "e"];

/// How many stripes each relay's parents come in, at present.
fn stripes(cluster: &Cluster) -> BTreeSet<usize> {
    let parents = |node: &&str| {
        let image = cluster.json(&["--node", node, "image", "attach", "disk:1"]);
        image["parents"].as_array().unwrap().len()
    };
    NODES[1..].iter().map(parents).collect()
}

#[test]
fn shapes_are_set_for_one_image_and_given_back_to_volt() {
    let cluster = Cluster::with_nodes(&NODES);
    let source = cluster.path("source");
    make_raw(&source, 6, 31);
    cluster.share(&NODES, "disk:1", &source);
    assert_eq!(stripes(&cluster), BTreeSet::from([1]), "as Volt was told for all images");

    let follow = |wanted: usize| {
        wait_for("all relays have the new shape", STEP_LIMIT, || {
            (stripes(&cluster) == BTreeSet::from([wanted])).then_some(())
        });
    };
    let said = cluster.ok(&["image", "tune", "disk:1", "--stripes", "2", "--fan-out", "3"]);
    assert!(said.starts_with("disk:1: ") && said.contains('2') && said.contains('3'), "{said}");
    follow(2);
    assert_eq!(cluster.json(&["image", "show", "disk:1"])["shaping"], fixed(2, 3));

    let refused = cluster.refused(&["image", "tune", "disk:1", "--stripes", "4", "--fan-out", "2"]);
    assert!(refused.contains('4') && refused.contains('2'), "{refused}");
    let refused = cluster.refused(&["image", "tune", "nope:1", "--auto"]);
    assert!(refused.contains("'nope:1'"), "{refused}");
    assert_eq!(cluster.json(&["image", "show", "disk:1"])["shaping"], fixed(2, 3), "nothing was changed");

    cluster.ok(&["image", "tune", "disk:1", "--auto"]);
    // Five relays are enough for four stripes.
    follow(4);
}

fn fixed(stripes: u32, fan_out: u32) -> Value {
    serde_json::json!({ "fixed": { "stripes": stripes, "fan_out": fan_out } })
}
