//! A thousand disks on one node.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::api::Api;
use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, make_raw, qemu_io, wait_for};

const VMS: usize = 1000;

/// Every so many-th VM has a snapshot too.
const SNAPSHOT_EVERY: usize = 4;

/// As many clients at a time.
const CLIENTS: usize = 8;

/// What the daemon may take: 64 MiB, and 1 MiB for each VM. Files apart, which the kernel keeps.
const RSS_MIB_MAX: usize = 64 + VMS;

/// What each layer and each VM's socket may keep open.
const FILES_PER_LAYER: usize = 3;

#[test]
fn many_a_thousand_disks_are_made_restarted_and_destroyed() {
    let mut cluster = Cluster::with_nodes(&["n"]);
    let source = cluster.path("source");
    make_raw(&source, 12, 3);
    cluster.ok(&["--node", "n", "image", "add", "disk:1", source.to_str().unwrap()]);
    let idle = (rss_kib(&cluster), open_files(&cluster));

    each(&cluster, "create", |api, number| {
        api.ok("PUT", &format!("/v1/vms/v{number}"), r#"{"image":"disk:1"}"#);
        if number.is_multiple_of(SNAPSHOT_EVERY) {
            api.ok("PUT", &format!("/v1/vms/v{number}/snapshots/s"), "{}");
        }
    });
    let written = cluster.path("written");
    fs::copy(&source, &written).unwrap();
    let write = ["write -P 7 5M 100k", "flush"];
    qemu_io(written.to_str().unwrap(), &write);
    for vm in ["v0", "v500", "v999"] {
        qemu_io(&cluster.disk("n", vm), &write);
    }
    assert_within_bounds(&cluster, "made", idle);

    cluster.kill_node("n");
    let begun = Instant::now();
    cluster.restart_node("n");
    println!("{VMS} VMs are back after {:?}", begun.elapsed());
    assert_eq!(cluster.json(&["list"]).as_array().unwrap().len(), VMS);
    for vm in ["v0", "v500", "v999"] {
        assert_same(&cluster.disk("n", vm), &written);
    }
    assert_same(&cluster.disk("n", "v1"), &source);
    assert_within_bounds(&cluster, "started again", idle);

    each(&cluster, "destroy", |api, number| drop(api.ok("DELETE", &format!("/v1/vms/v{number}"), "")));
    for left in ["vms", "layers", "disks"] {
        assert_eq!(fs::read_dir(cluster.node_dir("n").join(left)).unwrap().count(), 0, "{left}");
    }
    wait_for("no more files are open than before", STEP_LIMIT, || {
        (open_files(&cluster) <= idle.1 + CLIENTS).then_some(())
    });
}

/// Does something for each VM, by some clients at a time.
fn each(cluster: &Cluster, what: &str, act: impl Fn(&mut Api, usize) + Sync) {
    let begun = Instant::now();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut api = Api::connect(cluster, "n");
                let numbers = std::iter::repeat_with(|| next.fetch_add(1, Ordering::Relaxed));
                numbers.take_while(|&number| number < VMS).for_each(|number| act(&mut api, number));
            });
        }
    });
    println!("{what} {VMS}: {:?}", begun.elapsed());
}

fn assert_within_bounds(cluster: &Cluster, when: &str, idle: (usize, usize)) {
    let (rss, files) = (rss_kib(cluster), open_files(cluster));
    println!("{when}: {} KiB resident ({} idle), {files} open files ({} idle)", rss, idle.0, idle.1);
    assert!(rss <= RSS_MIB_MAX << 10, "{when}: {rss} KiB are resident");
    let layers = VMS + VMS / SNAPSHOT_EVERY;
    let most = idle.1 + layers * FILES_PER_LAYER + VMS + CLIENTS;
    assert!(files <= most, "{when}: {files} files are open, {most} are enough");
}

fn rss_kib(cluster: &Cluster) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", cluster.node_pid("n"))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux says it");
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn open_files(cluster: &Cluster) -> usize {
    fs::read_dir(format!("/proc/{}/fd", cluster.node_pid("n"))).unwrap().count()
}
