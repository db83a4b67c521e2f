//! Small storms of the real program: whether every byte is right while daemons die, whether each node fetches
//! each chunk once, and whether a runner that is killed leaves anything behind.
//!
//! Network namespaces need root: without it these tests say so and do nothing. The program is built as the
//! tests are, beside them, unless `VIRTMAN_PROGRAM` names another.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long what was killed may take to disappear: it takes milliseconds, but the machine may be busy.
const END_LIMIT: Duration = Duration::from_secs(30);

/// One storm at a time: each is meant to have the machine.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> Option<MutexGuard<'static, ()>> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not tested: a storm makes network namespaces, which needs root");
        return None;
    }
    Some(ALONE.lock().unwrap_or_else(PoisonError::into_inner))
}

fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("VIRTMAN_PROGRAM") {
        return path.into();
    }
    let runner = Path::new(env!("CARGO_BIN_EXE_xtask"));
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--locked", "--quiet", "--package", "virtman"]);
    let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
    assert!(status.success(), "the program could not be built");
    runner.with_file_name("virtman")
}

fn storm(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(["bench", "storm", "--image-mib", "64", "--reads", "600", "--program"]).arg(program());
    command.args(args).stdin(Stdio::null());
    command
}

/// The runs of a storm that must succeed, from its JSON.
fn runs(args: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().expect("a directory for the figures");
    let file = dir.path().join("figures");
    let output = storm(args).arg("--json").arg(&file).output().expect("the runner runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
    let bytes = fs::read(&file).expect("the runner writes its figures");
    let figures: Value = serde_json::from_slice(&bytes).expect("figures are JSON");
    let runs = figures["runs"].as_array().expect("runs").clone();
    for run in &runs {
        assert_eq!(run["errors"], 0, "{run}");
        assert_eq!(run["wrong_reads"], 0, "{run}");
        assert_eq!(run["vms_unfinished"], 0, "{run}");
    }
    runs
}

/// A chunk may come twice only where a second parent was asked for it.
fn assert_fetched_once(run: &Value) {
    let count = |name: &str| run[name].as_u64().unwrap_or_else(|| panic!("no count {name}: {run}"));
    let (again, second) = (count("refetched_chunks"), count("second_fetches"));
    assert!(again <= second, "{again} chunks came again, but only {second} were asked of a second parent");
}

#[test]
fn each_node_fetches_each_chunk_once_and_the_origin_sends_each_about_once() {
    let Some(_alone) = alone() else { return };
    let runs = runs(&["--nodes", "4", "--vms", "3", "--think", "0", "--shape", "1x2,2x2"]);
    assert_eq!(runs.len(), 4, "two shapes, each cold and warm");
    for pair in runs.chunks(2) {
        let (cold, warm) = (&pair[0], &pair[1]);
        assert!(cold["fetches_per_chunk"].as_f64().expect("a cold node fetches") >= 1.0);
        assert_fetched_once(cold);
        let sent = cold["origin_sent_ratio"].as_f64().expect("the origin counts");
        assert!(
            (0.99..1.15).contains(&sent),
            "the origin sent {sent} of what a boot reads: {}",
            cold["name"]
        );
        let again = warm["origin_sent_ratio"].as_f64().expect("the origin counts");
        assert!(again < 0.05, "warm VMs fetched {again} of a boot again");
    }
}

#[test]
fn no_read_fails_and_no_byte_is_wrong_while_daemons_die_and_links_fail() {
    let Some(_alone) = alone() else { return };
    let runs = runs(&["--nodes", "6", "--vms", "2", "--think", "0.05", "--churn", "--seed", "1"]);
    assert_fetched_once(&runs[0]);
    let churn = &runs[0]["churn"];
    let events = churn["events"].as_array().expect("events");
    for what in ["is killed", "is back", "joined", "Volt is killed", "origin is killed", "stops", "is cut"] {
        let happened =
            events.iter().any(|event| event["what"].as_str().is_some_and(|text| text.contains(what)));
        assert!(happened, "'{what}' did not happen: {churn}");
    }
    // Two on the node that stays dead, unless they were done before.
    let given_up = runs[0]["vms_given_up"].as_u64().expect("a count");
    assert!(given_up <= 2, "{given_up} VMs were given up");
    let sent = runs[0]["origin_wire_ratio"].as_f64().expect("the network counts");
    assert!(sent < 6.0, "the origin sent {sent} boots to 6 nodes: they did not help each other");
}

/// What a kernel keeps for a storm outside of its processes.
#[derive(Debug, PartialEq)]
struct Traces {
    mounts: String,
    devices: BTreeSet<PathBuf>,
    namespaces: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
}

fn entries(dir: &str) -> BTreeSet<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

impl Traces {
    fn look() -> Traces {
        Traces {
            mounts: fs::read_to_string("/proc/self/mounts").expect("the kernel tells its mounts"),
            devices: entries("/sys/class/net"),
            namespaces: entries("/run/netns"),
            files: entries("/run/s"),
        }
    }
}

/// The network namespace of each process that can be looked at.
fn networks() -> Vec<(u32, PathBuf)> {
    let pids = entries("/proc").into_iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, fs::read_link(format!("/proc/{pid}/ns/net")).ok()?))).collect()
}

#[test]
fn a_runner_that_is_killed_in_mid_storm_leaves_nothing_behind() {
    let Some(_alone) = alone() else { return };
    let before = Traces::look();
    let known: BTreeSet<PathBuf> = networks().into_iter().map(|(_, network)| network).collect();
    let mut runner = storm(&["--nodes", "3", "--vms", "2", "--think", "1", "--shape", "1x2"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner runs");
    let lines = BufReader::new(runner.stderr.take().expect("it was asked for")).lines();
    let is_stormy = lines.map_while(Result::ok).any(|line| line.ends_with(": cold"));
    assert!(is_stormy, "the storm never began");
    let of_storm = || -> Vec<u32> {
        networks().into_iter().filter(|(_, network)| !known.contains(network)).map(|(pid, _)| pid).collect()
    };
    // The inner runner, Volt, the origin and three nodes.
    assert!(of_storm().len() >= 6, "only {:?} run in namespaces of the storm's", of_storm());

    runner.kill().unwrap();
    runner.wait().unwrap();
    let killed = Instant::now();
    while !of_storm().is_empty() {
        assert!(killed.elapsed() < END_LIMIT, "these outlive their runner: {:?}", of_storm());
        std::thread::yield_now();
    }
    assert_eq!(Traces::look(), before);
}
