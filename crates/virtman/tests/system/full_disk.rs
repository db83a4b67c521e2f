//! Nodes whose file system is full: guests wait or are told, everybody else is refused, nothing is half-made, and all
//! goes on once there is room.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::guests::assert_no_disk_errors;
use crate::tools::{
    Background, STEP_LIMIT, assert_same, both, guest_image, make_raw, qemu_io, tool_output, wait_for,
};

/// How long a guest may take to boot, and to do what takes seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

const IMAGE: &str = "debian:12";

/// A file that takes all the room there is on a node's file system, or all but some.
struct Ballast(PathBuf);

impl Ballast {
    fn leave(cluster: &Cluster, bytes: u64) -> Ballast {
        let path = cluster.node_dir("n").join("ballast");
        let mut file = File::create(&path).unwrap();
        let piece = vec![1; 4096];
        while file.write_all(&piece).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len - bytes).unwrap();
        Ballast(path)
    }

    fn remove(self) {
        fs::remove_file(self.0).unwrap();
    }
}

/// What a node has made, by name.
fn made(cluster: &Cluster) -> Vec<PathBuf> {
    let dirs = ["vms", "layers", "images", "disks", "attached"].map(|dir| cluster.node_dir("n").join(dir));
    let mut made: Vec<PathBuf> =
        dirs.iter().flat_map(|dir| fs::read_dir(dir).unwrap()).map(|entry| entry.unwrap().path()).collect();
    made.sort();
    made
}

#[test]
fn full_disk_everything_is_refused_by_name_and_nothing_is_left_half_made() {
    let mut cluster = Cluster::start();
    cluster.put_on_small_disk("n", 32);
    cluster.add_node("n", &[]);
    let (source, expected) = (cluster.path("source"), cluster.path("expected"));
    make_raw(&source, 48, 23);
    fs::copy(&source, &expected).unwrap();
    cluster.ok(&["--node", "n", "image", "add", "disk:1", source.to_str().unwrap()]);
    cluster.ok(&["--node", "n", "create", "v", "--image", "disk:1"]);
    let disk = cluster.disk("n", "v");
    let write = |disk: &str, at: &str| qemu_io(disk, &[&format!("write -P 7 {at} 2M"), "flush"]);
    let expect = |at: &str| write(expected.to_str().unwrap(), at);
    write(&disk, "1M");
    expect("1M");
    cluster.ok(&["snapshot", "v", "one"]);
    write(&disk, "10M");
    expect("10M");
    let before = made(&cluster);

    let ballast = Ballast::leave(&cluster, 0);
    let cannot_write = || {
        let said = tool_output("qemu-utils", "qemu-io", &["-f", "raw", "-c", "write -P 9 20M 1M", &disk]);
        assert!(both(&said).contains("No space left on device"), "{}", both(&said));
    };
    cannot_write();
    let refusals: [&[&str]; 5] = [
        &["--node", "n", "create", "w", "--image", "disk:1"],
        &["snapshot", "v", "two"],
        &["clone", "v", "--name", "w"],
        &["commit", "v", "--as", "disk:2"],
        &["snapshot", "delete", "v", "one"],
    ];
    for refused in refusals {
        let said = cluster.refused(refused);
        assert!(said.contains("No space left on device"), "{refused:?}: {said}");
        assert_eq!(made(&cluster), before, "{refused:?}");
    }
    assert_same(&disk, &expected);
    cluster.kill_node("n");
    cluster.restart_node("n");
    assert_eq!(made(&cluster), before);
    cannot_write();
    assert_same(&disk, &expected);

    ballast.remove();
    write(&disk, "20M");
    expect("20M");
    cluster.ok(&["snapshot", "v", "two"]);
    cluster.ok(&["clone", "v", "--name", "w"]);
    assert_same(&cluster.disk("n", "w"), &expected);
    // What takes room away gives it back on a full disk, too.
    let ballast = Ballast::leave(&cluster, 0);
    cluster.ok(&["destroy", "w"]);
    cluster.kill_node("n");
    cluster.restart_node("n");
    assert_same(&disk, &expected);
    cluster.ok(&["destroy", "v"]);
    ballast.remove();
    assert_eq!(fs::read_dir(cluster.node_dir("n").join("layers")).unwrap().count(), 0);
}

#[test]
fn full_disk_guests_wait_for_room_or_are_told_as_they_wish() {
    let mut cluster = Cluster::start();
    cluster.put_on_small_disk("n", 256);
    cluster.add_node("n", &[]);
    cluster.ok(&["--node", "n", "image", "add", IMAGE, guest_image().to_str().unwrap()]);
    let waits = begin_boot(&cluster, "waits", &[]);
    begin_boot(&cluster, "told", &["--on-full", "report"]).finish(BOOT_LIMIT);
    waits.finish(BOOT_LIMIT);

    let mut told = Agent::of(&cluster, "n", "told-1");
    // Its file system is to write nothing by itself while the disk is full.
    told.run("mount -o remount,commit=300 / && sync");
    // Behind the last partition.
    const WRITE: &str = "dd if=/dev/zero of=/dev/vda bs=64k seek=49136 count=8 oflag=direct 2>&1; echo";
    let ballast = Ballast::leave(&cluster, 0);
    let said = told.run(WRITE);
    assert!(said.contains("Input/output error") || said.contains("No space left"), "{said}");
    ballast.remove();
    let said = told.run(WRITE);
    assert!(said.contains("8+0 records out"), "{said}");
    told.run("echo still here >/root/file; sync");
    drop(told);
    cluster.ok(&["stop", "--now", "told-1"]);

    let mut agent = Agent::of(&cluster, "n", "waits-1");
    agent.run("sync");
    let ballast = Ballast::leave(&cluster, 8 << 20);
    // 40 MB.
    agent.start("seq 6000000 | head -c 40000000 >/root/seq; sync; echo done >/run/done");
    wait_for("the guest waits for room", STEP_LIMIT, || why_paused(&cluster, "waits-1"));
    drop(agent);
    cluster.kill_node("n");
    cluster.restart_node("n");
    let why = wait_for("the daemon finds a guest that waits", STEP_LIMIT, || why_paused(&cluster, "waits-1"));
    assert!(why.contains("no room"), "{why}");
    assert!(cluster.ok(&["list"]).contains(" paused "), "{}", cluster.ok(&["list"]));
    assert!(cluster.ok(&["show", "waits-1"]).contains(&why), "{}", cluster.ok(&["show", "waits-1"]));
    ballast.remove();
    let mut agent = Agent::of(&cluster, "n", "waits-1");
    wait_for("the guest goes on by itself", STEP_LIMIT, || {
        (agent.run("cat /run/done || true") == "done\n").then_some(())
    });
    assert!(cluster.log("n").contains("guest_resumed: there is room"));
    assert_eq!(why_paused(&cluster, "waits-1"), None);
    agent.run("echo 3 >/proc/sys/vm/drop_caches; seq 6000000 | head -c 40000000 | cmp - /root/seq");
    assert_no_disk_errors(&cluster, "n", "waits-1", &mut agent);
}

/// Why a VM's guest stands still, if it does.
fn why_paused(cluster: &Cluster, vm: &str) -> Option<String> {
    let vms = cluster.json(&["list"]);
    let vm =
        vms.as_array().unwrap().iter().find(|found| found["name"] == vm).expect("the VM is listed").clone();
    vm["paused"]["reason"].as_str().map(str::to_owned)
}

fn begin_boot(cluster: &Cluster, name: &str, options: &[&str]) -> Background {
    let args = ["boot", "--image", IMAGE, "--name", name, "--ready", "console:login:"];
    cluster.begin(name, &[&args[..], options].concat())
}
