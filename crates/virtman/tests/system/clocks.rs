//! Wall clocks that jump, of nodes and of Volt: nothing but dates depends on them.

use std::fs;

use crate::cluster::Cluster;
use crate::tools::{assert_same, make_raw, qemu_io};

/// Volt, an origin `o` and the node `n` below it with a VM `v`. Volt and `n` have clocks that can be set.
fn cluster() -> Cluster {
    let mut cluster = Cluster::start();
    cluster.kill_volt();
    for daemon in ["volt", "n"] {
        cluster.set_clock(daemon, "+0");
    }
    cluster.start_volt(&[]);
    cluster.add_node("o", &[]);
    cluster.add_node("n", &[]);
    let source = cluster.path("source");
    make_raw(&source, 24, 17);
    cluster.share(&["o", "n"], "disk:1", &source);
    cluster.ok(&["--node", "n", "create", "v", "--image", "disk:1"]);
    fs::copy(&source, cluster.path("expected")).unwrap();
    cluster
}

/// Writes the same to the VM's disk and to what is expected of it, and compares all.
fn write_and_compare(cluster: &Cluster, number: usize) {
    let commands = [&*format!("write -P {} {} 100k", number + 1, number * 300_001), "flush"];
    let expected = cluster.path("expected");
    for disk in [&cluster.disk("n", "v"), expected.to_str().unwrap()] {
        qemu_io(disk, &commands);
    }
    assert_same(&cluster.disk("n", "v"), &expected);
}

#[test]
fn clocks_that_jump_cost_no_lease_no_token_and_no_answer() {
    let mut cluster = cluster();
    let jumps = [
        ("+0", "+200d"),
        ("+90d", "-20h"),
        ("-20h", "-20h"),
        ("-20h", "+90d"),
        ("+20h", "+20h"),
        ("+0", "+0"),
    ];
    for (number, (volt, node)) in jumps.into_iter().enumerate() {
        cluster.set_clock("volt", volt);
        cluster.set_clock("n", node);
        write_and_compare(&cluster, number);
        let name = format!("s{number}");
        cluster.ok(&["snapshot", "v", &name]);
        cluster.ok(&["snapshot", "list", "v"]);
        cluster.ok(&["clone", "v", "--to", "o", "--name", &format!("c{number}")]);
        assert_same(&cluster.disk("o", &format!("c{number}")), &cluster.path("expected"));
        // What Volt certifies is valid from a day before its own time on.
        if !volt.ends_with('d') {
            cluster.add_node(&format!("j{number}"), &[]);
        }
        for up in ["o", "n"] {
            assert_eq!(
                cluster.node_state(up).as_deref(),
                Some("up"),
                "{up}, with Volt at {volt}, n at {node}"
            );
        }
    }
    for name in ["volt", "n"] {
        let log = cluster.log(name);
        for bad in ["panicked", "node_lost", "node_expired", "volt_lost"] {
            assert!(!log.contains(bad), "{name} says '{bad}':\n{log}");
        }
    }
}

#[test]
fn clocks_of_a_node_that_starts_long_ago_keep_it_from_volt_but_not_from_its_disks() {
    let mut cluster = cluster();
    write_and_compare(&cluster, 0);
    cluster.kill_node("n");
    cluster.set_clock("n", "@1971-01-01 00:00:00");
    cluster.restart_node("n");
    write_and_compare(&cluster, 1);
    assert!(cluster.run_at("n", &["snapshot", "v", "s"]).status.success());
    let said = cluster.run_at("n", &["create", "w", "--image", "disk:1"]);
    assert!(said.status.success(), "an attached image needs no Volt");
    cluster.set_clock("n", "+0");
    cluster.wait_up("n");
    write_and_compare(&cluster, 2);
    assert!(!cluster.log("n").contains("panicked"), "{}", cluster.log("n"));
}
