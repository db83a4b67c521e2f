//! Layers of VMs' disks: snapshots, going back, and what a daemon that is killed leaves of them. Judged by qemu-io.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, make_raw, qemu_io, wait_for};

const MIB: usize = 24;

/// A node `o` with the image `disk:1`, and a VM `v` on it.
fn cluster() -> Cluster {
    let cluster = Cluster::with_nodes(&["o"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 5);
    cluster.ok(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    cluster.ok(&["--node", "o", "create", "v", "--image", "disk:1"]);
    cluster
}

/// How many layers a VM's disk has.
fn layers(cluster: &Cluster, vm: &str) -> u64 {
    let vms = cluster.json(&["list"]);
    let vm = vms.as_array().unwrap().iter().find(|line| line["name"] == vm).expect("the VM is listed");
    vm["layers"].as_u64().unwrap()
}

/// How many layers there are on the node.
fn layer_dirs(cluster: &Cluster) -> usize {
    fs::read_dir(cluster.node_dir("o").join("layers")).unwrap().count()
}

fn layer_names(cluster: &Cluster) -> BTreeSet<OsString> {
    let dirs = fs::read_dir(cluster.node_dir("o").join("layers")).unwrap();
    dirs.map(|dir| dir.unwrap().file_name()).collect()
}

#[test]
fn snapshots_keep_what_was_and_merge_when_they_are_given_up() {
    let mut cluster = cluster();
    let disk = cluster.disk("o", "v");
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        qemu_io(&disk, &[&format!("write -P {} {} 100k", number + 1, number * 70_000), "flush"]);
        let taken = cluster.json(&["snapshot", "v", name]);
        assert!(taken["pause_us"].as_u64().unwrap() > 0, "{taken}");
        assert!(taken["private_bytes"].as_u64().unwrap() >= 100 << 10, "{taken}");
    }
    qemu_io(&disk, &["write -P 9 0 20M"]);
    assert_eq!(layers(&cluster, "v"), 4);
    let said = cluster.refused(&["snapshot", "v", "two"]);
    assert!(said.contains("'v' has a snapshot 'two' already"), "{said}");
    let listed = cluster.ok(&["snapshot", "list", "v"]);
    assert!(listed.contains("one") && listed.contains("three"), "{listed}");

    cluster.ok(&["snapshot", "revert", "v", "two"]);
    let two = ["read -P 1 0 70000", "read -P 2 70000 102400"];
    qemu_io(&disk, &two);
    cluster.kill_node("o");
    cluster.restart_node("o");
    qemu_io(&disk, &two);
    cluster.ok(&["snapshot", "revert", "v", "three"]);
    qemu_io(&disk, &["read -P 1 0 70000", "read -P 2 70000 70000", "read -P 3 140000 102400"]);
    cluster.ok(&["snapshot", "revert", "v", "one"]);
    qemu_io(&disk, &["read -P 1 0 102400", "write -P 7 5000 100"]);

    cluster.ok(&["snapshot", "delete", "v", "three", "two"]);
    wait_for("what nobody needs is gone", STEP_LIMIT, || (layer_dirs(&cluster) == 2).then_some(()));
    cluster.ok(&["snapshot", "delete", "v", "one"]);
    wait_for("the layers are merged", STEP_LIMIT, || (layer_dirs(&cluster) == 1).then_some(()));
    let merged = ["read -P 1 0 5000", "read -P 7 5000 100", "read -P 1 5100 97300"];
    qemu_io(&disk, &merged);
    cluster.kill_node("o");
    cluster.restart_node("o");
    assert_eq!(layers(&cluster, "v"), 1);
    qemu_io(&disk, &merged);
    let said = cluster.refused(&["snapshot", "revert", "v", "one"]);
    assert!(said.contains("'v' has no snapshot 'one'") && said.contains("snapshot list v"), "{said}");
    cluster.ok(&["destroy", "v"]);
    assert_eq!(layer_dirs(&cluster), 0);
}

#[test]
fn a_layer_that_holds_much_takes_over_the_little_above_it_and_is_the_snapshot() {
    let mut cluster = cluster();
    cluster.ok(&["--node", "o", "create", "w", "--image", "disk:1", "--size", "200M"]);
    let disk = cluster.disk("o", "w");
    let before = layer_names(&cluster);
    qemu_io(&disk, &["write -P 1 0 100M"]);
    cluster.ok(&["snapshot", "w", "much"]);
    qemu_io(&disk, &["write -P 2 1M 64k", "write -z -u 2M 64k", "write -P 2 150M 64k"]);
    cluster.ok(&["snapshot", "w", "little"]);
    qemu_io(&disk, &["write -P 3 1M 4k", "flush"]);
    // That of 'little', and the top.
    let made = &layer_names(&cluster) - &before;
    assert_eq!(made.len(), 2);
    let reads =
        ["read -P 1 0 1M", "read -P 3 1M 4k", "read -P 2 1028k 60k", "read -P 0 2M 64k", "read -P 1 3M 97M"];
    let reads = [&reads[..], &["read -P 2 150M 64k", "read -P 0 151M 1M"]].concat();

    cluster.ok(&["snapshot", "delete", "w", "much"]);
    wait_for("the layers are merged", STEP_LIMIT, || (layers(&cluster, "w") == 2).then_some(()));
    qemu_io(&disk, &reads);
    let gone = &(&before | &made) - &layer_names(&cluster);
    assert_eq!(gone.len(), 1);
    assert!(made.is_superset(&gone), "that of 'little' is gone, and what was that of 'much' is 'little' now");
    cluster.kill_node("o");
    cluster.restart_node("o");
    qemu_io(&disk, &reads);
    cluster.ok(&["snapshot", "revert", "w", "little"]);
    qemu_io(&disk, &["read -P 2 1M 64k", "read -P 0 2M 64k", "read -P 1 3M 97M", "read -P 2 150M 64k"]);
    cluster.ok(&["snapshot", "delete", "w", "little"]);
    qemu_io(&disk, &["read -P 2 1M 64k", "write -P 4 0 64k", "flush"]);
    cluster.kill_node("o");
    cluster.restart_node("o");
    assert_eq!(layers(&cluster, "w"), 2, "100 MiB are not copied for the sake of one layer less");
    qemu_io(&disk, &["read -P 4 0 64k", "read -P 1 64k 960k", "read -P 2 1M 64k"]);
    cluster.ok(&["destroy", "w"]);
    assert_eq!(layer_names(&cluster).len(), 1, "that of 'v'");
}

#[test]
fn what_a_killed_daemon_answered_is_there_without_a_flush() {
    let mut cluster = cluster();
    let disk = cluster.disk("o", "v");
    let expected = cluster.path("expected");
    fs::copy(cluster.path("source"), &expected).unwrap();
    for round in 1..=3u64 {
        // qemu-io flushes when it closes a disk, so it is killed before the daemon is: `abort` ends it at once.
        let write = format!("write -P {round} {} 300k", round * 1_000_001);
        let args =
            ["-f", "raw", "-t", "writeback", "-c", &write, "-c", "discard 9M 1M", "-c", "abort", &disk];
        crate::tools::tool_output("qemu-utils", "qemu-io", &args);
        qemu_io(expected.to_str().unwrap(), &[&write, "write -z 9M 1M"]);
        cluster.kill_node("o");
        cluster.restart_node("o");
        assert_same(&disk, &expected);
        cluster.ok(&["snapshot", "v", &format!("s{round}")]);
    }
}
