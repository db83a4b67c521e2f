//! Real guests: Debian from one qcow2, over a hierarchy of three levels below its origin.
//!
//! A guest costs about 25 seconds of a processor to boot without KVM, so each test proves many things in
//! one cluster.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, guest_image, tool, wait_for};

/// The image of all guests, and where it is kept. Its VMs are `debian-1`, `debian-2` and so on.
const IMAGE: &str = "debian:12";

/// Who hangs below whom: `o` is the origin, `c` is three levels below it.
const CHAIN: [&str; 4] = ["o", "a", "b", "c"];

/// How long guests may take to boot, in seconds: on an idle machine four take a minute.
const BOOT_SECONDS: u64 = 540;

/// The same for the command that boots them, with time to end by itself.
const BOOT_LIMIT: Duration = Duration::from_secs(BOOT_SECONDS + 60);

/// Chunks that a booting guest's node has fetched when its parent is killed: the guest is well under way,
/// and has the larger part still before it.
const CHUNKS_BEFORE_THE_KILL: u64 = 300;

#[test]
fn guests_boot_write_and_find_their_files_again() {
    let file = guest_image();
    let sum = sha256(&file);
    let cluster = Cluster::chain(&CHAIN, IMAGE, &file);
    assert_eq!(CHAIN.map(|node| cluster.depth(IMAGE, node)), [0, 1, 2, 3]);

    // Four guests on three nodes: the one that is named first gets the fourth.
    let guests = [("debian-1", "c"), ("debian-2", "a"), ("debian-3", "b"), ("debian-4", "c")];
    let options = ["--count", "4", "--nodes", "c,a,b"];
    let first = boot(&cluster, &options);
    assert_vms(&first, &guests);
    let image_bytes = fs::metadata(&file).unwrap().len();
    let sent_bytes = first["origin_sent_bytes"].as_u64().unwrap();
    assert!((1..image_bytes).contains(&sent_bytes), "{first}");
    for node in ["a", "b", "c"] {
        let fetched = line(&first, "nodes", "node", node)["fetched_chunks"].as_u64().unwrap();
        // The guests are not idle after their prompt.
        assert!((1..=counter(&cluster, node, "links", "received_chunks")).contains(&fetched), "{first}");
    }

    let before = guests.map(|(vm, node)| {
        let mut agent = Agent::of(&cluster, node, vm);
        assert_knows_its_name(&mut agent, vm);
        agent.run("hostname >/root/name; head -c 1000000 /dev/urandom >/root/noise; sync");
        (agent.run(CHECKSUMS), agent.run(BOOT_ID))
    });
    let sums = before.each_ref().map(|(sums, _)| sums);
    assert!((1..sums.len()).all(|i| !sums[..i].contains(&sums[i])), "each wrote its own: {sums:?}");

    // Two ways to lose a guest: its plug is pulled, or its hypervisor dies.
    cluster.ok(&["stop", "--now", "debian-1", "debian-2"]);
    let killed = ["debian-3", "debian-4"].map(|vm| vm_pid(&cluster, vm).to_string());
    tool("procps", "kill", &["-9", &killed[0], &killed[1]]);
    for (vm, _) in guests {
        wait_for(&format!("{vm} is known to have ended"), STEP_LIMIT, || {
            (vm_line(&cluster, vm)["state"] == "stopped").then_some(())
        });
    }

    assert_vms(&boot(&cluster, &options), &guests);
    for ((vm, node), (sums, boot_id)) in guests.iter().zip(&before) {
        let mut agent = Agent::of(&cluster, node, vm);
        assert_ne!(agent.run(BOOT_ID), *boot_id, "{vm} has booted again");
        assert_eq!(agent.run(CHECKSUMS), *sums, "{vm} finds what it wrote");
        assert_knows_its_name(&mut agent, vm);
        assert_no_disk_errors(&cluster, node, vm, &mut agent);
    }
    let pids = guests.map(|(vm, _)| vm_pid(&cluster, vm));
    assert_vms(&boot(&cluster, &options), &guests);
    assert_eq!(guests.map(|(vm, _)| vm_pid(&cluster, vm)), pids, "guests that run are left alone");

    for node in ["a", "b", "c"] {
        assert_each_chunk_was_fetched_once(&cluster, node);
    }
    let verified = cluster.json(&["--node", "o", "image", "verify", IMAGE]);
    assert!(verified["chunks"].as_u64().unwrap() > 0, "{verified}");
    assert_eq!(verified["wrong_chunks"], 0, "{verified}");
    assert_eq!(sha256(&file), sum, "the image is what it was");
}

#[test]
fn a_guest_boots_on_when_its_parent_is_killed_and_its_own_daemon_restarts() {
    let file = guest_image();
    let mut cluster = Cluster::chain(&CHAIN, IMAGE, &file);
    let (vm, node, parent) = ("debian-1", "c", "b");
    assert_eq!(cluster.parents(IMAGE)[node].as_deref(), Some(parent));

    // The kernel comes from beside the image here, and prints all that it has to say.
    let [kernel, initrd] = ["vmlinuz", "initrd"].map(|kind| file.with_extension(kind));
    let boot_args = boot_args(&[
        "--nodes",
        node,
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--append",
        "root=/dev/vda2 ro console=ttyS0",
    ]);
    let boot_args: Vec<&str> = boot_args.iter().map(String::as_str).collect();
    let mut boot = cluster.begin("boot", &boot_args);
    let fetched = || counter(&cluster, node, "cache", "fetched_chunks");
    let fetched_before = wait_for("the guest is on its way", BOOT_LIMIT, || {
        boot.assert_running();
        Some(fetched()).filter(|&chunks| chunks >= CHUNKS_BEFORE_THE_KILL)
    });
    cluster.kill_node(parent);
    assert!(!console(&cluster, node, vm).contains("login:"), "the parent was killed too late");
    let report: Value = serde_json::from_str(&boot.finish(BOOT_LIMIT)).unwrap();
    assert_vms(&report, &[(vm, node)]);
    let fetched_after = counter(&cluster, node, "cache", "fetched_chunks");
    assert!(fetched_after > fetched_before, "the guest needed no parent: {fetched_after}");
    wait_for("Volt has given the node another parent", STEP_LIMIT, || {
        let parents = cluster.parents(IMAGE);
        parents.get(node).cloned().flatten().filter(|now| now != parent)
    });
    let mut agent = Agent::of(&cluster, node, vm);
    assert_no_disk_errors(&cluster, node, vm, &mut agent);

    // A number stands in /run/beat, which is memory, once it is durable on the disk. The file is replaced as a
    // whole, so that nobody reads it half written.
    agent.start(
        "n=1; while echo $n >>/root/beats && sync /root/beats; do \
         echo $n >/run/beat.new; mv /run/beat.new /run/beat; n=$((n+1)); done; echo failed >/run/beat",
    );
    let pid = vm_pid(&cluster, vm);
    wait_for_beat(&mut agent, 3);
    cluster.kill_node(node);
    cluster.restart_node(node);
    let beat = agent.run("cat /run/beat").trim().parse().expect("no write has failed");
    // The first of these may have begun before the restart; the second has not.
    wait_for_beat(&mut agent, beat + 2);
    let durable = agent.run("echo 3 >/proc/sys/vm/drop_caches; head -n -1 /root/beats");
    assert!(durable.lines().count() as u64 > beat, "{durable}");
    assert!(durable.lines().zip(1u64..).all(|(line, n)| line == n.to_string()), "{durable}");
    assert_no_disk_errors(&cluster, node, vm, &mut agent);

    let adopted = vm_line(&cluster, vm);
    assert_eq!((&adopted["state"], adopted["pid"].as_u64()), (&Value::from("running"), Some(pid)));
    let mut terminal = cluster.begin("console", &["console", vm]);
    terminal.say("\n");
    wait_for("the guest answers on its console", STEP_LIMIT, || {
        terminal.printed().contains("debian-1 login:").then_some(())
    });
    drop(terminal);
    // The daemon can end a guest that it did not start.
    cluster.ok(&["stop", "--now", vm]);
    assert_eq!(vm_line(&cluster, vm)["state"], "stopped");
}

/// Prints what the files that a guest wrote sum up to.
const CHECKSUMS: &str = "sha256sum /root/name /root/noise";

/// Prints what is different at each boot.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// The command that boots guests of the image until they ask for a login.
fn boot_args(options: &[&str]) -> Vec<String> {
    let timeout = format!("{BOOT_SECONDS}s");
    let mut args =
        vec!["--json", "boot", "--image", IMAGE, "--ready", "console:login:", "--timeout", &timeout];
    args.extend(options);
    args.into_iter().map(str::to_owned).collect()
}

/// Boots guests and returns the report.
fn boot(cluster: &Cluster, options: &[&str]) -> Value {
    let args = boot_args(options);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let report = cluster.begin("boot", &args).finish(BOOT_LIMIT);
    serde_json::from_str(&report).unwrap_or_else(|e| panic!("no report ({e}): {report}"))
}

/// Checks that a report has these VMs, each ready on its node.
fn assert_vms(report: &Value, guests: &[(&str, &str)]) {
    assert_eq!(report["vms"].as_array().map(Vec::len), Some(guests.len()), "{report}");
    for (vm, node) in guests {
        let line = line(report, "vms", "vm", vm);
        assert_eq!((line["node"].as_str(), &line["error"]), (Some(*node), &Value::Null), "{line}");
        let [disk, first_read, ready] = ["disk_ms", "first_read_ms", "ready_ms"].map(|ms| line[ms].as_u64());
        assert!(disk.is_some() && first_read.is_some() && first_read < ready, "{line}");
    }
}

/// Checks that all that was ever fetched over a link is in the cache, and hardly anything came in vain.
fn assert_each_chunk_was_fetched_once(cluster: &Cluster, node: &str) {
    let status = cluster.node_status(node);
    let cache = &status["cache"];
    assert!(cache["resident_chunks"].as_u64().unwrap() > 0, "{node}: {status}");
    assert_eq!(cache["fetched_chunks"], cache["resident_chunks"], "{node}: {status}");
    assert_eq!(status["links"]["received_chunks"], cache["resident_chunks"], "{node}: {status}");
    // A child that waits too long on a busy machine asks another, and what it asked for here may be on its way.
    let [vain, resident] = [&status["links"]["vain_chunks"], &cache["resident_chunks"]].map(Value::as_u64);
    assert!(vain.unwrap() * 10 <= resident.unwrap(), "{node}: {status}");
    for lost in ["evicted_chunks", "dropped_chunks", "unstored_chunks"] {
        assert_eq!(cache[lost], 0, "{node}: {status}");
    }
}

/// The seed names the guest; cloud-init may still be at it when the login prompt is there.
fn assert_knows_its_name(agent: &mut Agent, vm: &str) {
    wait_for(&format!("{vm} knows its name"), STEP_LIMIT, || {
        (agent.run("hostname").trim() == vm).then_some(())
    });
}

/// Neither the guest's kernel nor its console has seen a disk fail.
pub(crate) fn assert_no_disk_errors(cluster: &Cluster, node: &str, vm: &str, agent: &mut Agent) {
    let kernel = agent.run("dmesg");
    assert!(kernel.contains("EXT4-fs (vda2): mounted"), "the kernel's log is whole: {kernel}");
    for text in [kernel, console(cluster, node, vm)] {
        let bad = |line: &&str| {
            let line = line.to_lowercase();
            ["i/o error", "ext4-fs error", "remounting filesystem", "hung_task"]
                .iter()
                .any(|sign| line.contains(sign))
        };
        assert_eq!(text.lines().find(bad), None, "{vm}");
    }
}

/// Waits until the guest has made its `n`th write durable.
fn wait_for_beat(agent: &mut Agent, n: u64) {
    wait_for(&format!("write {n} is durable"), STEP_LIMIT, || {
        let text = agent.run("cat /run/beat 2>/dev/null || echo 0");
        let beat: u64 = text.trim().parse().unwrap_or_else(|_| panic!("a write in the guest: {text}"));
        (beat >= n).then_some(())
    });
}

fn console(cluster: &Cluster, node: &str, vm: &str) -> String {
    let log = cluster.node_dir(node).join("vms").join(vm).join("console.log");
    String::from_utf8_lossy(&fs::read(log).unwrap()).into_owned()
}

fn counter(cluster: &Cluster, node: &str, part: &str, name: &str) -> u64 {
    cluster.node_status(node)[part][name].as_u64().expect("a counter")
}

pub(crate) fn vm_line(cluster: &Cluster, vm: &str) -> Value {
    let vms = cluster.json(&["list"]);
    vms.as_array().unwrap().iter().find(|line| line["name"] == vm).expect("the VM is listed").clone()
}

fn vm_pid(cluster: &Cluster, vm: &str) -> u64 {
    vm_line(cluster, vm)["pid"].as_u64().expect("it runs")
}

/// The element of a report's list in which `key` is `name`.
fn line<'a>(report: &'a Value, list: &str, key: &str, name: &str) -> &'a Value {
    let lines = report[list].as_array().expect("a list");
    lines.iter().find(|line| line[key] == name).unwrap_or_else(|| panic!("no {name} in {report}"))
}

fn sha256(file: &Path) -> String {
    tool("coreutils", "sha256sum", &[file.to_str().unwrap()])
}
