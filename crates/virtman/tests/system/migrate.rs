//! VMs that move from node to node, and what happens when one of the nodes dies on the way.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::Value;
use testkit::counting_guest::boot_disk;

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::guests::assert_no_disk_errors;
use crate::tools::{STEP_LIMIT, assert_same, guest_image, make_raw, qemu_io, tool, wait_for};

/// Nodes `o`, `a` and `b` that share the image `counter:1`, whose guests count.
fn cluster() -> Cluster {
    let cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let image = cluster.path("counter");
    fs::write(&image, boot_disk(4 << 20)).unwrap();
    cluster.share(&["o", "a", "b"], "counter:1", &image);
    cluster
}

/// Boots the VM `count-1` on node `a`.
fn boot(cluster: &Cluster) {
    let ready = "console:00000010";
    let args = ["--name", "count", "--nodes", "a", "--memory", "16M", "--ready", ready, "--timeout", "240s"];
    cluster.ok(&[&["boot", "--image", "counter:1"][..], &args].concat());
}

/// What the guest printed on a node since its hypervisor started there.
fn console(cluster: &Cluster, node: &str) -> String {
    let path = cluster.node_dir(node).join("vms/count-1/console.log");
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Checks that these parts of a console show each number once and in order, and nothing else. Gives the last one.
fn assert_counted(parts: &[String]) -> u64 {
    let text = parts.concat();
    let (whole, _) = text.rsplit_once('\n').expect("the guest printed");
    for (index, line) in whole.lines().enumerate() {
        assert_eq!(line, format!("{:08x}", index + 1), "line {index} of {parts:?}");
    }
    whole.lines().count() as u64
}

/// Waits until the guest has counted on since now at a node.
fn counts_on(cluster: &Cluster, node: &str) {
    let before = console(cluster, node).lines().count();
    wait_for("the guest counts on", STEP_LIMIT, || {
        (console(cluster, node).lines().count() > before + 3).then_some(())
    });
}

fn vm(cluster: &Cluster, name: &str) -> Value {
    let vms = cluster.json(&["list"]);
    let found: Vec<&Value> = vms.as_array().unwrap().iter().filter(|vm| vm["name"] == name).collect();
    assert_eq!(found.len(), 1, "the VM is on one node: {vms}");
    found[0].clone()
}

#[test]
fn a_running_vm_moves_back_and_forth_and_misses_nothing() {
    let cluster = cluster();
    boot(&cluster);
    let mut parts = Vec::new();
    for round in 0..10 {
        let (from, to) = if round % 2 == 0 { ("a", "b") } else { ("b", "a") };
        // The VM's files go with it; what its console printed is kept by another name.
        let kept = cluster.path(&format!("console-{round}"));
        fs::hard_link(cluster.node_dir(from).join("vms/count-1/console.log"), &kept).unwrap();
        let moved = cluster.json(&["migrate", "count-1", "--to", to]);
        assert!(moved["memory_bytes"].as_u64().unwrap() > 0, "{moved}");
        assert_eq!(vm(&cluster, "count-1")["node"], to);
        counts_on(&cluster, to);
        parts.push(fs::read_to_string(&kept).unwrap());
    }
    parts.push(console(&cluster, "a"));
    assert_counted(&parts);
    cluster.ok(&["destroy", "count-1"]);
}

#[test]
fn a_disk_without_a_guest_moves_and_can_be_read_at_once() {
    let mut cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let source = cluster.path("source");
    make_raw(&source, 24, 3);
    cluster.share(&["o", "a"], "disk:1", &source);
    cluster.ok(&["--node", "a", "create", "v", "--image", "disk:1"]);
    let writes = ["write -P 1 3000 200k", "write -z 7M 3M", "write -P 2 20M 1M"];
    qemu_io(&cluster.disk("a", "v"), &writes);
    qemu_io(source.to_str().unwrap(), &[]);
    let expected = cluster.path("expected");
    fs::copy(&source, &expected).unwrap();
    qemu_io(expected.to_str().unwrap(), &writes);
    cluster.ok(&["migrate", "v", "--to", "b"]);
    assert_eq!(vm(&cluster, "v")["node"], "b");
    assert!(!cluster.node_dir("a").join("vms/v").exists(), "nothing of it is left");
    assert_same(&cluster.disk("b", "v"), &expected);
    wait_passed(&cluster, "b");
    cluster.kill_node("a");
    cluster.kill_node("b");
    cluster.restart_node("b");
    assert_same(&cluster.disk("b", "v"), &expected);
    cluster.restart_node("a");
    let said = cluster.refused(&["migrate", "v", "--to", "b"]);
    assert!(said.contains("'v' is on node b already"), "{said}");
}

/// Waits until a node keeps no layer any more, as [`wait_passed`] does.
fn wait_no_layers(cluster: &Cluster, node: &str) {
    wait_for(&format!("nothing is left on {node}"), 2 * STEP_LIMIT, || {
        fs::read_dir(cluster.node_dir(node).join("layers")).unwrap().next().is_none().then_some(())
    });
}

/// Bytes that a node's layers take.
fn layer_bytes(cluster: &Cluster, node: &str) -> u64 {
    let layers = fs::read_dir(cluster.node_dir(node).join("layers")).unwrap();
    let files = layers.flat_map(|layer| fs::read_dir(layer.unwrap().path()).unwrap());
    files.map(|file| file.unwrap().metadata().unwrap().blocks() * 512).sum()
}

/// Waits until a node fetches no image but the VM's own: all that came with the VM has settled.
fn wait_settled(cluster: &Cluster, node: &str) {
    wait_for("all of it is on the node", STEP_LIMIT, || {
        let images = cluster.json(&["--node", node, "image", "list"]);
        let fetched = images.as_array().unwrap().iter().filter(|image| image["role"] == "relay");
        (fetched.count() == 1).then_some(())
    });
}

/// Waits until a node has no image but the VM's own: what it carried to others is there. That is seen after half a minute.
fn wait_passed(cluster: &Cluster, node: &str) {
    wait_for("only the VM's image is on the node", 2 * STEP_LIMIT, || {
        (cluster.json(&["--node", node, "image", "list"]).as_array().unwrap().len() == 1).then_some(())
    });
}

#[test]
fn snapshots_move_with_their_vm_and_each_byte_of_them_once() {
    let mut cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let source = cluster.path("source");
    make_raw(&source, 48, 3);
    cluster.share(&["o", "a", "b"], "disk:1", &source);
    cluster.ok(&["--node", "a", "create", "v", "--image", "disk:1"]);
    cluster.ok(&["snapshot", "v", "new"]);
    // One upon the other, and one beside the last: whoever goes back to a snapshot begins a branch there.
    let steps = [
        ("one", "new", "write -P 1 0 16M"),
        ("two", "one", "write -P 2 16M 8M"),
        ("three", "two", "write -z 30M 1M"),
        ("beside", "two", "write -P 3 7000 300k"),
    ];
    let mut states = vec![("new", cluster.path("new"))];
    fs::copy(&source, &states[0].1).unwrap();
    for (name, after, write) in steps {
        if states.last().unwrap().0 != after {
            cluster.ok(&["snapshot", "revert", "v", after]);
        }
        qemu_io(&cluster.disk("a", "v"), &[write]);
        cluster.ok(&["snapshot", "v", name]);
        let state = cluster.path(name);
        fs::copy(&states.iter().find(|(known, _)| *known == after).unwrap().1, &state).unwrap();
        qemu_io(state.to_str().unwrap(), &[write]);
        states.push((name, state));
    }
    let last = cluster.path("last");
    fs::copy(&states.last().unwrap().1, &last).unwrap();
    for disk in [cluster.disk("a", "v"), last.to_str().unwrap().to_owned()] {
        qemu_io(&disk, &["write -P 4 40M 100k"]);
    }
    let told = |snapshot: &Value| (snapshot["name"].clone(), snapshot["created_unix_ms"].clone());
    let list = |cluster: &Cluster| -> Vec<_> {
        cluster.json(&["snapshot", "list", "v"]).as_array().unwrap().iter().map(told).collect()
    };
    let (known, bytes) = (list(&cluster), layer_bytes(&cluster, "a"));

    // There, and on its way back before all of it is there.
    for to in ["b", "a", "b"] {
        cluster.ok(&["migrate", "v", "--to", to]);
        assert_eq!(list(&cluster), known);
        assert_same(&cluster.disk(to, "v"), &last);
    }
    wait_settled(&cluster, "b");
    cluster.kill_node("a");
    cluster.kill_node("b");
    cluster.restart_node("b");
    cluster.wait_up("b");
    assert_same(&cluster.disk("b", "v"), &last);
    cluster.restart_node("a");
    cluster.wait_up("a");
    for (name, state) in &states {
        cluster.ok(&["snapshot", "revert", "v", name]);
        assert_same(&cluster.disk("b", "v"), state);
    }

    // What the snapshots have in common comes, and is kept, once.
    cluster.ok(&["migrate", "v", "--to", "a"]);
    wait_passed(&cluster, "a");
    let moved = layer_bytes(&cluster, "a");
    assert!(moved <= bytes + bytes / 10, "{moved} bytes, and {bytes} before they were moved");
    for (name, state) in &states {
        cluster.ok(&["snapshot", "revert", "v", name]);
        assert_same(&cluster.disk("a", "v"), state);
        cluster.ok(&["snapshot", "delete", "v", name]);
    }
    cluster.ok(&["destroy", "v"]);
    ["a", "b"].iter().for_each(|node| wait_no_layers(&cluster, node));
}

/// It comes back while the node that it left first still has what it carried, and under other names.
#[test]
fn a_disk_that_comes_back_at_once_leaves_no_image_behind() {
    let cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let source = cluster.path("source");
    make_raw(&source, 24, 3);
    cluster.share(&["o", "a", "b"], "disk:1", &source);
    cluster.ok(&["--node", "a", "create", "v", "--image", "disk:1"]);
    qemu_io(&cluster.disk("a", "v"), &["write -P 1 0 1M"]);
    cluster.ok(&["snapshot", "v", "old"]);
    qemu_io(&cluster.disk("a", "v"), &["write -P 2 4M 1M"]);
    cluster.ok(&["migrate", "v", "--to", "b"]);
    wait_settled(&cluster, "b");
    cluster.ok(&["migrate", "v", "--to", "a"]);
    ["a", "b"].iter().for_each(|node| wait_passed(&cluster, node));
    qemu_io(&cluster.disk("a", "v"), &["read -P 1 0 1M", "read -P 2 4M 1M"]);
}

/// Steps at which the node dies that a VM leaves, and those at which the one dies that it goes to.
#[cfg(feature = "faults")]
const SOURCE_STEPS: [&str; 8] =
    ["carried", "received", "paused", "disk sent", "memory sent", "promised", "given up", "taken"];
#[cfg(feature = "faults")]
const TARGET_STEPS: [&str; 5] = ["receiving", "promising", "has promised", "taking", "has taken"];

/// Needs the feature `faults`, which `scripts/test` sets.
#[cfg(feature = "faults")]
#[test]
fn a_vm_is_on_one_node_whichever_dies_at_whatever_step() {
    let mut cluster = cluster();
    boot(&cluster);
    cluster.ok(&["snapshot", "count-1", "kept"]);
    let steps =
        SOURCE_STEPS.iter().map(|step| (step, true)).chain(TARGET_STEPS.iter().map(|step| (step, false)));
    for (step, source_dies) in steps {
        let from = vm(&cluster, "count-1")["node"].as_str().unwrap().to_owned();
        let to = if from == "a" { "b" } else { "a" };
        let dies = if source_dies { &*from } else { to };
        fs::write(cluster.node_dir(dies).join("die-at"), step).unwrap();
        // It succeeds if the other node has it by then.
        let said = cluster.run(&["migrate", "count-1", "--to", to]);
        assert!(!cluster.node_dir(dies).join("die-at").exists(), "{step} was not reached: {said:?}");
        cluster.kill_node(dies);
        cluster.restart_node(dies);
        cluster.wait_up(dies);
        let node = wait_for(&format!("{step}: the VM is on one node, and on no other"), STEP_LIMIT, || {
            let vms = cluster.json(&["list"]);
            let [vm] = vms.as_array()?.as_slice() else { return None };
            let node = vm["node"].as_str()?;
            let other = if node == "a" { "b" } else { "a" };
            let left = cluster.node_dir(other).join("vms/count-1").exists();
            (vm["state"] == "running" && !left).then(|| node.to_owned())
        });
        counts_on(&cluster, &node);
        assert_eq!(cluster.json(&["snapshot", "list", "count-1"])[0]["name"], "kept", "{step}");
        let printed = console(&cluster, &node);
        assert!(!printed.contains("lost") && !printed.contains("error"), "{step}: {printed}");
        // Up to the moment at which it is given up in writing it stays; from then on it is the other's.
        let moved = ["given up", "taken", "taking", "has taken"].contains(step);
        assert_eq!(node == *to, moved, "{step}: it is on {node}, and was to go from {from} to {to}");
    }
}

/// Writes files of noise with their checksums, each flushed, until there is `/run/stop`; says how many in `/run/beat`,
/// which is replaced as a whole, so that nobody reads it half written.
const WRITER: &str = "mkdir -p /root/noise; n=0; while [ ! -e /run/stop ]; do n=$((n + 1)); \
    head -c 200000 /dev/urandom >/root/noise/$((n % 100)); cd /root/noise; sha256sum $((n % 100)) >/root/noise/$((n % 100)).sum; \
    sync; echo $n >/run/beat.new; mv /run/beat.new /run/beat; done";

/// Waits until the writer has written on.
fn writes_on(agent: &mut Agent) {
    let beat =
        |agent: &mut Agent| agent.run("cat /run/beat 2>/dev/null || echo 0").trim().parse::<u64>().unwrap();
    let before = beat(agent);
    wait_for("the guest writes on", STEP_LIMIT, || (beat(agent) > before).then_some(()));
}

#[test]
fn debian_moves_ten_times_while_it_writes() {
    let cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let file = guest_image();
    cluster.share(&["o", "a", "b"], "debian:12", &file);
    let kernel = file.with_extension("vmlinuz");
    let initrd = file.with_extension("initrd");
    let [kernel, initrd] = [&kernel, &initrd].map(|path| path.to_str().unwrap());
    let append =
        "root=/dev/vda2 ro console=ttyS0 quiet systemd.show_status=0 mitigations=off random.trust_cpu=on";
    cluster.ok(&[
        "boot",
        "--image",
        "debian:12",
        "--name",
        "d",
        "--nodes",
        "a",
        "--memory",
        "256M",
        "--timeout",
        "540s",
        "--kernel",
        kernel,
        "--initrd",
        initrd,
        "--append",
        append,
    ]);
    let mut agent = Agent::of(&cluster, "a", "d-1");
    let boot_id = agent.run("cat /proc/sys/kernel/random/boot_id");
    agent.start(WRITER);
    let mut at = "a";
    for round in 0..10 {
        writes_on(&mut agent);
        drop(agent);
        if round < 2 {
            cluster.ok(&["snapshot", "d-1", &format!("s{round}"), "--quiesce"]);
        }
        at = if at == "a" { "b" } else { "a" };
        let moved = cluster.json(&["migrate", "d-1", "--to", at]);
        println!(
            "moved: stood still for {} ms of {} ms; {} rounds, {} bytes of the disk, {} of memory",
            moved["pause_ms"], moved["total_ms"], moved["rounds"], moved["disk_bytes"], moved["memory_bytes"]
        );
        agent = Agent::of(&cluster, at, "d-1");
    }
    writes_on(&mut agent);
    agent.run("touch /run/stop");
    assert_eq!(agent.run("cat /proc/sys/kernel/random/boot_id"), boot_id, "it never booted anew");
    // From the disk, not from memory.
    agent.run("sync; echo 3 >/proc/sys/vm/drop_caches; cd /root/noise; for sum in *.sum; do sha256sum -c --quiet $sum || exit 1; done");
    assert_no_disk_errors(&cluster, at, "d-1", &mut agent);
    cluster.ok(&["stop", "d-1"]);
    check_file_system(&cluster, at);
    for snapshot in ["s0", "s1"] {
        cluster.ok(&["snapshot", "revert", "d-1", snapshot]);
        check_file_system(&cluster, at);
    }
}

/// Checks the root file system of Debian's disk on a node.
fn check_file_system(cluster: &Cluster, node: &str) {
    let image = cluster.path("disk.raw");
    tool("libnbd-bin", "nbdcopy", &[&cluster.disk(node, "d-1"), image.to_str().unwrap()]);
    let check = format!("{}?offset=68157440", image.display());
    tool("e2fsprogs", "e2fsck", &["-fn", &check]);
}
