//! Images that nobody uses any more: when they go, and that nobody below notices.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, make_raw, qemu_io, wait_for};

const MIB: usize = 48;

/// Volt and these nodes, which keep nothing warm, in a chain; the first is the origin of `disk:1` and `disk:2`.
fn cluster(names: &[&str], lease: &str) -> Cluster {
    let mut cluster = Cluster::start_with(&["--fan-out", "1", "--lease", lease]);
    for name in names {
        cluster.add_node(name, &["--keep-warm", "0s"]);
    }
    for (number, image) in ["disk:1", "disk:2"].into_iter().enumerate() {
        let source = cluster.path(&format!("source{}", number + 1));
        make_raw(&source, MIB, number as u64 + 21);
        cluster.ok(&["--node", names[0], "image", "add", image, source.to_str().unwrap()]);
    }
    cluster
}

fn create(cluster: &Cluster, node: &str, vm: &str, image: &str) {
    cluster.ok(&["--node", node, "create", vm, "--image", image]);
}

/// What a node says of an image, if it has it attached.
fn image(cluster: &Cluster, node: &str, name: &str) -> Option<Value> {
    // As on a host without credentials: it asks the node alone.
    let home = cluster.path("nobody");
    let output = cluster.run_at(node, &["--home", home.to_str().unwrap(), "--json", "image", "list"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let images: Value = serde_json::from_slice(&output.stdout).unwrap();
    let named = |image: &&Value| image["names"].as_array().unwrap().iter().any(|known| known == name);
    images.as_array().unwrap().iter().find(named).cloned()
}

fn wait_gone(cluster: &Cluster, node: &str, name: &str) {
    wait_for(&format!("{name} is detached from {node}"), STEP_LIMIT, || {
        image(cluster, node, name).is_none().then_some(())
    });
}

fn links(cluster: &Cluster, node: &str, counter: &str) -> u64 {
    cluster.node_status(node)["links"][counter].as_u64().unwrap()
}

/// Lets whoever looks for unused images look at those of a node: one that it has to detach is gone.
fn let_look(cluster: &Cluster, node: &str) {
    create(cluster, node, "witness", "disk:2");
    cluster.ok(&["destroy", "witness"]);
    wait_gone(cluster, node, "disk:2");
}

#[test]
fn an_image_goes_with_its_last_vm_but_not_from_its_origin_nor_if_it_was_attached_by_hand() {
    let cluster = cluster(&["o", "n", "h"], "3s");
    create(&cluster, "n", "one", "disk:1");
    create(&cluster, "n", "two", "disk:1");
    create(&cluster, "o", "at-origin", "disk:1");
    cluster.ok(&["--node", "h", "image", "attach", "disk:1"]);
    create(&cluster, "h", "at-hand", "disk:1");

    cluster.ok(&["destroy", "one", "at-origin", "at-hand"]);
    let_look(&cluster, "n");
    let_look(&cluster, "h");
    assert_eq!(image(&cluster, "n", "disk:1").unwrap()["vms"], 1, "one VM is left");
    assert!(image(&cluster, "h", "disk:1").unwrap()["detaches_in_ms"].is_null(), "it was attached by hand");

    cluster.ok(&["destroy", "two"]);
    wait_gone(&cluster, "n", "disk:1");
    assert_eq!(cluster.depth("disk:1", "h"), 1, "who fetched from it has another parent");
    assert!(image(&cluster, "o", "disk:1").unwrap()["detaches_in_ms"].is_null());
    cluster.ok(&["--node", "h", "image", "detach", "disk:1"]);
    assert!(image(&cluster, "h", "disk:1").is_none());
}

#[test]
fn a_vm_that_is_destroyed_alone_leaves_its_image_until_another_is_destroyed() {
    let mut cluster = cluster(&["o", "n"], "3s");
    create(&cluster, "n", "vm", "disk:1");
    cluster.ok(&["destroy", "--instance-only", "vm"]);
    assert_eq!(cluster.json(&["list"]), serde_json::json!([]));
    let_look(&cluster, "n");
    assert!(image(&cluster, "n", "disk:1").unwrap()["detaches_in_ms"].is_null());
    cluster.kill_node("n");
    cluster.restart_node("n");
    cluster.wait_up("n");
    let_look(&cluster, "n");
    assert!(image(&cluster, "n", "disk:1").is_some(), "that is remembered");

    create(&cluster, "n", "vm", "disk:1");
    cluster.ok(&["destroy", "vm"]);
    wait_gone(&cluster, "n", "disk:1");
}

#[test]
fn a_vm_that_is_created_in_time_finds_the_image_warm() {
    let mut cluster = Cluster::with_nodes(&["o"]);
    cluster.add_node("n", &["--keep-warm", "1h"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 5);
    cluster.ok(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    create(&cluster, "n", "vm", "disk:1");
    assert_same(&cluster.disk("n", "vm"), &source);
    let goes_in = || image(&cluster, "n", "disk:1").unwrap()["detaches_in_ms"].as_u64();
    assert_eq!(goes_in(), None);
    cluster.ok(&["destroy", "vm"]);
    let left = wait_for("the node has looked", STEP_LIMIT, goes_in);
    assert!(left <= 3_600_000, "{left}");
    let table = cluster.ok(&["image", "list", "--node", "n"]);
    assert!(table.contains("DETACHES") && table.contains(" in ") && table.contains(" min "), "{table}");

    let fetched = links(&cluster, "n", "received_chunks");
    create(&cluster, "n", "vm", "disk:1");
    assert_eq!(goes_in(), None, "it is used again");
    assert_same(&cluster.disk("n", "vm"), &source);
    assert_eq!(links(&cluster, "n", "received_chunks"), fetched);
}

#[test]
fn while_volt_is_away_nothing_goes_and_a_restart_changes_nothing_about_that() {
    let mut cluster = cluster(&["o", "n"], "3s");
    create(&cluster, "n", "vm", "disk:1");
    cluster.kill_volt();
    wait_for("the node has lost Volt", STEP_LIMIT, || cluster.log("n").contains("volt_lost").then_some(()));
    let destroy = cluster.run_at("n", &["destroy", "vm"]);
    assert!(destroy.status.success(), "{}", String::from_utf8_lossy(&destroy.stderr));
    let due = |cluster: &Cluster| {
        let left = image(cluster, "n", "disk:1").expect("it stays attached")["detaches_in_ms"].as_u64();
        (left == Some(0)).then_some(())
    };
    wait_for("the image is due", STEP_LIMIT, || due(&cluster));
    cluster.kill_node("n");
    cluster.restart_node("n");
    wait_for("the image is due again", STEP_LIMIT, || due(&cluster));
    cluster.start_volt(&["--fan-out", "1"]);
    wait_gone(&cluster, "n", "disk:1");
}

#[test]
fn an_image_that_somebody_has_open_stays_as_long() {
    let cluster = cluster(&["o", "n"], "3s");
    create(&cluster, "n", "vm", "disk:1");
    let mut command = std::process::Command::new("qemu-io");
    command.args(["-r", "-f", "raw", &cluster.volume("n", "disk+1")]);
    let mut reader = crate::tools::Background::start(command, &cluster.path("reader"));
    reader.say("read 0 64k\n");
    wait_for("the image is open", STEP_LIMIT, || reader.printed().contains("65536/65536").then_some(()));
    cluster.ok(&["destroy", "vm"]);
    let_look(&cluster, "n");
    assert!(image(&cluster, "n", "disk:1").is_some());
    let said = cluster.refused(&["--node", "n", "image", "detach", "disk:1"]);
    assert!(said.contains("open over NBD"), "it is not detached by hand either: {said}");
    // It takes one command at a time.
    reader.say("read 3M 64k\n");
    wait_for("it reads on", STEP_LIMIT, || {
        (reader.printed().matches("65536/65536").count() == 2).then_some(())
    });
    reader.say("quit\n");
    reader.finish(STEP_LIMIT);
    wait_gone(&cluster, "n", "disk:1");
}

#[test]
fn who_is_created_while_the_image_goes_has_a_right_disk() {
    let cluster = cluster(&["o", "n"], "3s");
    let source = cluster.path("source1");
    for round in 0..25 {
        // The same name: so the disk is another each time.
        create(&cluster, "n", "vm", "disk:1");
        qemu_io(&cluster.disk("n", "vm"), &["write -P 7 0 64k", "read -P 7 0 64k"]);
        let attached = image(&cluster, "n", "disk:1").expect("what a VM stands on is attached");
        assert_eq!(attached["vms"], 1, "in round {round}");
        cluster.ok(&["destroy", "vm"]);
    }
    create(&cluster, "n", "vm", "disk:1");
    assert_same(&cluster.disk("n", "vm"), &source);
}

/// How the node in the middle of a chain gives up the image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Goes {
    Unused,
    ByHand,
}

/// The lowest of three reads on, chunk by chunk, while the middle one goes.
fn middle_goes(goes: Goes) {
    let cluster = cluster(&["o", "m", "l"], "3s");
    match goes {
        Goes::Unused => create(&cluster, "m", "middle", "disk:1"),
        Goes::ByHand => drop(cluster.ok(&["--node", "m", "image", "attach", "disk:1"])),
    }
    create(&cluster, "l", "low", "disk:1");
    assert_eq!(cluster.depth("disk:1", "l"), 2);
    let disk = cluster.disk("l", "low");
    // Every third MiB is data. Some is left until the middle is gone for sure.
    let offsets: Vec<String> = (0..MIB)
        .step_by(3)
        .flat_map(|mib| (0..16).map(move |at| format!("read {} 64k", (mib << 20) + (at << 16))))
        .collect();
    let (early, late) = offsets.split_at(offsets.len() * 7 / 8);
    let (read, gone) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for offset in early {
                qemu_io(&disk, &[offset]);
                read.fetch_add(1, Ordering::Relaxed);
            }
            while !gone.load(Ordering::Relaxed) {
                qemu_io(&disk, &[&early[0]]);
            }
        });
        // Also if it fails: the reader must end.
        let _end = Set(&gone);
        wait_for("the guest reads", STEP_LIMIT, || (read.load(Ordering::Relaxed) > 4).then_some(()));
        match goes {
            Goes::Unused => cluster.ok(&["destroy", "middle"]),
            Goes::ByHand => cluster.ok(&["--node", "m", "image", "detach", "disk:1"]),
        };
        wait_gone(&cluster, "m", "disk:1");
        assert_eq!(cluster.depth("disk:1", "l"), 1);
    });
    let by_origin = links(&cluster, "o", "sent_chunks");
    for offset in late {
        qemu_io(&disk, &[offset]);
    }
    assert!(links(&cluster, "o", "sent_chunks") >= by_origin + late.len() as u64, "the origin serves now");
    assert_same(&disk, &cluster.path("source1"));
    assert_eq!(links(&cluster, "l", "last_resort_fetches"), 0);
    assert_eq!(links(&cluster, "l", "lies"), 0);
}

struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn nobody_below_notices_that_an_unused_image_goes() {
    middle_goes(Goes::Unused);
}

#[test]
fn nobody_below_notices_that_an_image_is_detached_by_hand() {
    middle_goes(Goes::ByHand);
}

#[test]
fn when_all_destroy_their_vms_the_hierarchy_goes_from_the_leaf_up() {
    // Within a lease: whoever asks first waits for the others.
    let cluster = cluster(&["o", "a", "b", "c"], "15s");
    for node in ["a", "b", "c"] {
        create(&cluster, node, &format!("vm-{node}"), "disk:1");
    }
    assert_eq!(cluster.depth("disk:1", "c"), 3);
    assert_same(&cluster.disk("c", "vm-c"), &cluster.path("source1"));
    cluster.ok(&["destroy", "vm-a", "vm-b", "vm-c"]);
    for node in ["a", "b", "c"] {
        wait_gone(&cluster, node, "disk:1");
        assert_eq!(links(&cluster, node, "failovers"), 0, "{node}");
        assert_eq!(links(&cluster, node, "last_resort_fetches"), 0, "{node}");
        assert!(!cluster.log(node).contains("parents_changed"), "nobody moves: {}", cluster.log(node));
    }
    let log = cluster.log("volt");
    let left: Vec<usize> = ["c", "b", "a"]
        .iter()
        .map(|node| {
            log.find(&format!("image_left node={node} ")).unwrap_or_else(|| panic!("{node} left: {log}"))
        })
        .collect();
    assert!(left.is_sorted(), "{log}");
}
