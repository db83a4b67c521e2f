//! VMs with several disks: what is done with a VM is done with all of them, at one point.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};
use testkit::counting_guest::boot_disk;

use crate::api::Api;
use crate::cluster::Cluster;
use crate::tools::{Background, STEP_LIMIT, assert_same, make_raw, nbd_writer, qemu_io, wait_for};

/// Nodes `a` and `b`, with the images `system:1` and `data:1`.
fn cluster() -> Cluster {
    let cluster = Cluster::with_nodes(&["a", "b"]);
    fs::write(cluster.path("system"), boot_disk(4 << 20)).unwrap();
    make_raw(&cluster.path("data"), 6, 8);
    for image in ["system", "data"] {
        let file = cluster.path(image);
        cluster.share(&["a", "b"], &format!("{image}:1"), &file);
    }
    cluster
}

/// Creates the VM `v` with three disks on node `a`.
fn create(cluster: &Cluster) -> Value {
    let further = json!([{ "image": "data:1", "size_bytes": 8 << 20 }, { "image": "system:1" }]);
    let body = json!({ "image": "system:1", "further_disks": further });
    Api::connect(cluster, "a").ok("PUT", "/v1/vms/v", &body.to_string())
}

/// The NBD URIs of a VM's disks, and their ids.
fn disks(cluster: &Cluster, vm: &str) -> Vec<(String, String)> {
    let shown = cluster.json(&["show", vm]);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let disks = shown["disks"].as_array().unwrap();
    disks.iter().map(|disk| (text(&disk["nbd"]), text(&disk["id"]))).collect()
}

fn write(disks: &[(String, String)], pattern: usize) {
    for (index, (disk, _)) in disks.iter().enumerate() {
        qemu_io(disk, &[&format!("write -P {} {} 64k", pattern + index, index << 20)]);
    }
}

fn assert_written(disks: &[(String, String)], pattern: usize) {
    for (index, (disk, _)) in disks.iter().enumerate() {
        qemu_io(disk, &[&format!("read -P {} {} 64k", pattern + index, index << 20)]);
    }
}

#[test]
fn disks_are_snapshotted_cloned_moved_and_destroyed_together() {
    let mut cluster = cluster();
    create(&cluster);
    assert_eq!(create(&cluster)["name"], "v", "creating it again changes nothing");
    let mut api = Api::connect(&cluster, "a");
    let refused = api.refused("PUT", "/v1/vms/v", r#"{ "image": "system:1" }"#);
    assert_eq!(refused["code"], "vm_exists", "{refused}");
    let smaller = r#"{ "image": "system:1", "further_disks": [{ "image": "data:1", "size_bytes": 4096 }] }"#;
    assert_eq!(api.refused("PUT", "/v1/vms/w", smaller)["code"], "disk_too_small");
    assert!(!cluster.node_dir("a").join("vms/w").exists());

    let before = disks(&cluster, "v");
    let listed = api.ok("GET", "/v1/disks", "");
    assert_eq!(listed.as_array().unwrap().len(), 3, "{listed}");
    let second = api.ok("GET", &format!("/v1/disks/{}", before[1].1), "");
    assert_eq!((&second["vm"], &second["size_bytes"]), (&json!("v"), &json!(8 << 20)));
    assert_eq!(api.refused("GET", &format!("/v1/disks/{:032}", 0), "")["code"], "no_such_disk");
    let serials: Vec<&String> = before.iter().map(|(_, id)| id).collect();
    assert!(serials[0] != serials[1] && serials[1] != serials[2]);

    write(&before, 10);
    cluster.ok(&["snapshot", "v", "s"]);
    write(&before, 20);
    cluster.ok(&["clone", "v", "--name", "c"]);
    write(&before, 30);
    let cloned = disks(&cluster, "c");
    assert_written(&cloned, 20);
    let refused = cluster.refused(&["commit", "v", "--as", "mine:1"]);
    assert!(refused.contains("several disks"), "{refused}");

    cluster.kill_node("a");
    cluster.restart_node("a");
    cluster.ok(&["migrate", "v", "--to", "b"]);
    let moved = disks(&cluster, "v");
    assert_eq!(moved.iter().map(|(_, id)| id).collect::<Vec<_>>(), serials);
    assert_written(&moved, 30);
    cluster.ok(&["snapshot", "revert", "v", "s"]);
    assert_written(&moved, 10);
    qemu_io(&moved[1].0, &["read -P 11 1M 64k"]);
    let expected = cluster.path("data");
    qemu_io(expected.to_str().unwrap(), &["write -P 11 1M 64k"]);
    fs::File::options().write(true).open(&expected).unwrap().set_len(8 << 20).unwrap();
    assert_same(&moved[1].0, &expected);

    cluster.kill_node("b");
    cluster.restart_node("b");
    assert_written(&moved, 10);
    cluster.ok(&["destroy", "v", "c"]);
    for node in ["a", "b"] {
        for left in ["vms", "layers", "disks"] {
            wait_for(&format!("no {left} are left on {node}"), STEP_LIMIT, || {
                let left = fs::read_dir(cluster.node_dir(node).join(left)).unwrap().count();
                (left == 0).then_some(())
            });
        }
    }
}

#[test]
fn a_guest_has_all_its_disks_and_takes_them_along() {
    let cluster = cluster();
    create(&cluster);
    let start = json!({ "memory_mib": 16, "cpus": 1, "user_data": null, "kernel": null });
    Api::connect(&cluster, "a").ok("POST", "/v1/vms/v/start", &start.to_string());
    let ids: Vec<String> = disks(&cluster, "v").into_iter().map(|(_, id)| id).collect();
    let counted = |node: &str| {
        let console = cluster.node_dir(node).join("vms/v/console.log");
        fs::read_to_string(console).unwrap_or_default().lines().count()
    };
    wait_for("the guest counts", STEP_LIMIT, || (counted("a") > 3).then_some(()));
    cluster.ok(&["snapshot", "v", "s"]);
    let has_disks = |node: &str| {
        let pid = fs::read_to_string(cluster.node_dir(node).join("vms/v/qemu.pid")).unwrap();
        let command = fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap();
        ids[1..].iter().all(|id| command.contains(&id[..20]))
    };
    assert!(has_disks("a"));
    cluster.ok(&["migrate", "v", "--to", "b"]);
    let before = counted("b");
    wait_for("the guest counts on", STEP_LIMIT, || (counted("b") > before + 3).then_some(()));
    assert!(has_disks("b"));
}

#[test]
fn all_disks_of_a_clone_are_of_one_moment() {
    let cluster = cluster();
    create(&cluster);
    let writing = AtomicBool::new(true);
    let written = AtomicUsize::new(0);
    let mut writers: Vec<Background> = disks(&cluster, "v")
        .iter()
        .map(|(disk, _)| nbd_writer(disk, &cluster.path(&disk_file(disk))))
        .collect();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Each number goes to the next disk once the one before has answered.
            for number in 1..=250 {
                if !writing.load(Ordering::Relaxed) {
                    return;
                }
                for writer in &mut writers {
                    writer.say(&format!("write -P {number} 0 4k\n"));
                    wait_for("a write is answered", STEP_LIMIT, || {
                        (writer.printed().matches("wrote ").count() == number).then_some(())
                    });
                }
                written.store(number, Ordering::Relaxed);
            }
        });
        for clone in 1..=5 {
            let before = written.load(Ordering::Relaxed);
            wait_for("more is written", STEP_LIMIT, || {
                (written.load(Ordering::Relaxed) > before).then_some(())
            });
            cluster.ok(&["clone", "v", "--name", &format!("c{clone}")]);
            let numbers: Vec<u8> =
                disks(&cluster, &format!("c{clone}")).iter().map(|(disk, _)| first_byte(disk)).collect();
            let [first, .., last] = numbers[..] else { panic!("{numbers:?}") };
            assert!(numbers.is_sorted_by(|a, b| a >= b) && first - last <= 1, "{numbers:?}");
            assert!(usize::from(last) >= before, "{numbers:?} after {before}");
        }
        writing.store(false, Ordering::Relaxed);
    });
}

/// A name for what is kept of a disk's writer.
fn disk_file(uri: &str) -> String {
    let socket = Path::new(uri).file_stem().unwrap();
    format!("writer-{}", socket.to_str().unwrap())
}

fn first_byte(disk: &str) -> u8 {
    let dump = qemu_io(disk, &["read -v 0 1"]);
    let line = dump.lines().find_map(|line| line.strip_prefix("00000000:")).expect("qemu-io dumps it");
    u8::from_str_radix(line.split_whitespace().next().unwrap(), 16).unwrap()
}
