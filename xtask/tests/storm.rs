//! Small storms of the real program: whether every byte is right while daemons die, whether each node fetches
//! each chunk once, and whether a runner that is killed leaves anything behind.
//!
//! Network namespaces need root: without it these tests say so and do nothing. The program is the one that lies beside the
//! tests if it is made of what the sources are now, or else is built there, unless `VIRTMAN_PROGRAM` names another.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long what was killed may take to disappear: it takes milliseconds, but the machine may be busy.
const END_LIMIT: Duration = Duration::from_secs(120);

/// The variable of the environment that tells a storm's processes from all others.
const MARK: &str = "VIRTMAN_STORM_MARK";

/// One storm of this process at a time: each takes what processors there are.
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
    let program = Path::new(env!("CARGO_BIN_EXE_xtask")).with_file_name("virtman");
    // Cargo would replace a program that was built with other features, and other tests may be running that one.
    if !is_up_to_date(&program) {
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--locked", "--quiet", "--package", "virtman"]);
        let status = command.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo runs");
        assert!(status.success(), "the program could not be built");
    }
    program
}

/// Whether a program is newer than all that Cargo made it of, which stands beside it in the form of a rule of `make`.
fn is_up_to_date(program: &Path) -> bool {
    let built = |path: &Path| fs::metadata(path).and_then(|file| file.modified());
    let (Ok(rule), Ok(time)) = (fs::read_to_string(program.with_extension("d")), built(program)) else {
        return false;
    };
    let Some((_, sources)) = rule.split_once(": ") else { return false };
    let sources = sources.replace("\\ ", "\0");
    let mut sources = sources.split_whitespace().map(|source| source.replace('\0', " "));
    sources.all(|source| built(Path::new(&source)).is_ok_and(|changed| changed <= time))
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

/// A machine of the storm's own, as far as a storm might leave anything on it: its mounts, its network devices and its
/// `/run`. What other programs do on the real one does not show there. It goes with its value, and with its test.
struct Machine {
    /// Keeps the namespaces until its standard input ends.
    keeper: Child,
}

impl Machine {
    fn new() -> Machine {
        // The real machine's mounts are cut off. Those of the new one are shared, as systemd has them, so that what the
        // storm mounts without a namespace of its own shows.
        // The directory is where `mount` keeps its notes on each machine.
        const SETTLE: &str = "mount -t tmpfs tmpfs /run && mkdir /run/mount && mount --make-rshared / \
            && echo settled && exec cat";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "--propagation", "private", "--", "sh", "-c", SETTLE]);
        let mut keeper = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare runs");
        let mut line = String::new();
        let stdout = keeper.stdout.as_mut().expect("it was asked for");
        BufReader::new(stdout).read_line(&mut line).expect("the keeper speaks");
        assert_eq!(line, "settled\n", "the namespaces are made");
        Machine { keeper }
    }

    /// A file that tells of it.
    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.keeper.id().to_string()).join(name)
    }

    /// The same command on it, in the same process.
    fn command(&self, command: &Command) -> Command {
        let mut there = Command::new("nsenter");
        there.arg(format!("--mount={}", self.proc("ns/mnt").display()));
        there.arg(format!("--net={}", self.proc("ns/net").display()));
        there.arg("--").arg(command.get_program()).args(command.get_args());
        there
    }

    /// All that a kernel keeps for a storm outside of its processes: mounts, each with its number, network devices, and
    /// what lies in `/run`, where the names of network namespaces are, too.
    fn traces(&self) -> BTreeSet<String> {
        let read = |name| fs::read_to_string(self.proc(name)).expect("the kernel tells it");
        let mounts = read("mountinfo");
        let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mounts = mounts.map(|fields| format!("mount {} at {}", fields[0], fields[4]));
        let devices = read("net/dev");
        let devices = devices.lines().filter_map(|line| line.split_once(':'));
        let devices = devices.map(|(name, _)| format!("device {}", name.trim()));
        let files = entries(&self.proc("root/run"));
        let files = files.iter().map(|path| format!("file {}", path.display()));
        mounts.chain(devices).chain(files).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn entries(dir: &Path) -> BTreeSet<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// A namespace of a process.
fn namespace(pid: u32, kind: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok()
}

/// The processes of one storm: those that have a mark in the environment that they began with, and all that run in the
/// namespace of processes that the storm has for itself.
struct Storm {
    mark: String,
    /// Held open once it is known, so that no other namespace gets its number.
    processes: Option<(File, PathBuf)>,
}

impl Storm {
    fn marked() -> Storm {
        let unique = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("the kernel makes names");
        Storm { mark: unique.trim().to_owned(), processes: None }
    }

    fn is_marked(&self, pid: u32) -> bool {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let mark = format!("{MARK}={}", self.mark);
        environment.split(|&byte| byte == 0).any(|variable| variable == mark.as_bytes())
    }

    fn pids(&self) -> Vec<u32> {
        let all = entries(Path::new("/proc"));
        let pids = all.into_iter().filter_map(|path| path.file_name()?.to_str()?.parse().ok());
        let own = self.processes.as_ref().map(|(_, name)| name);
        let is_inside = |pid| own.is_some() && namespace(pid, "pid").as_ref() == own;
        // One that has ended and is not waited for yet has no network any more.
        let is_alive = |pid| namespace(pid, "net").is_some();
        pids.filter(|&pid| (self.is_marked(pid) || is_inside(pid)) && is_alive(pid)).collect()
    }

    /// How many run in a network namespace that is not the machine's. From here on all that run in the storm's namespace of
    /// processes are known to be its.
    fn count_inside(&mut self, machine: &Machine) -> usize {
        let outside = fs::read_link(machine.proc("ns/net")).ok();
        let of_test = namespace(std::process::id(), "pid");
        let inside: Vec<u32> =
            self.pids().into_iter().filter(|&pid| namespace(pid, "net") != outside).collect();
        let own = inside.iter().find(|&&pid| namespace(pid, "pid") != of_test);
        self.processes = own.and_then(|&pid| {
            let held = File::open(format!("/proc/{pid}/ns/pid")).ok()?;
            Some((held, namespace(pid, "pid")?))
        });
        inside.len()
    }
}

#[test]
fn a_runner_that_is_killed_in_mid_storm_leaves_nothing_behind() {
    let Some(_alone) = alone() else { return };
    let (machine, mut of_storm) = (Machine::new(), Storm::marked());
    let before = machine.traces();
    let mut runner = machine
        .command(&storm(&["--nodes", "3", "--vms", "2", "--think", "1", "--shape", "1x2"]))
        .env(MARK, &of_storm.mark)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the runner runs");
    let lines = BufReader::new(runner.stderr.take().expect("it was asked for")).lines();
    let is_stormy = lines.map_while(Result::ok).any(|line| line.ends_with(": cold"));
    assert!(is_stormy, "the storm never began");
    // The inner runner, Volt, the origin and three nodes.
    let inside = of_storm.count_inside(&machine);
    assert!(inside >= 6, "only {inside} of {:?} run in namespaces of the storm's", of_storm.pids());

    runner.kill().unwrap();
    runner.wait().unwrap();
    let killed = Instant::now();
    while !of_storm.pids().is_empty() {
        assert!(killed.elapsed() < END_LIMIT, "these outlive their runner: {:?}", of_storm.pids());
        std::thread::yield_now();
    }
    // Of the mounts that the machine was born with, other programs may remove some meanwhile.
    let after = machine.traces();
    let left: Vec<&String> = after.difference(&before).collect();
    assert!(left.is_empty(), "it leaves {left:?}");
}
