//! A cluster of real processes on loopback: one Volt, some nodes, and the command line to drive them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde_json::Value;
use tempfile::TempDir;
use testkit::ports::Port;

use crate::tools::{Background, both, tool, wait_for};

/// How long a daemon may take to be ready: it takes milliseconds, but the machine may be busy.
const START_LIMIT: Duration = Duration::from_secs(120);

/// How long any command may take unless its test says otherwise.
const COMMAND_TIMEOUT_SECONDS: &str = "600";

/// What lets a daemon's wall clock jump while it runs, and leaves its monotonic clock alone.
const CLOCK_LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// A cluster that ends with its value.
pub(crate) struct Cluster {
    /// In this order: what is mounted in the directory goes first.
    mounts: Vec<Mount>,
    dir: TempDir,
    volt_port: Port,
    volt: Option<Child>,
    nodes: BTreeMap<String, Node>,
}

/// A file system that a test mounted.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily, so that nothing that still has a file open keeps it.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

struct Node {
    process: Option<Child>,
    port: Port,
    options: Vec<String>,
}

impl Cluster {
    /// Volt alone.
    pub(crate) fn start() -> Cluster {
        Cluster::start_with(&[])
    }

    /// Volt alone, with further options.
    pub(crate) fn start_with(options: &[&str]) -> Cluster {
        let dir = tempfile::Builder::new().prefix("vm-").tempdir().unwrap();
        let volt_port = Port::reserve();
        let mut cluster = Cluster { mounts: Vec::new(), dir, volt_port, volt: None, nodes: BTreeMap::new() };
        cluster.ok(&["volt", "init", "--address", cluster.volt_address()]);
        cluster.start_volt(options);
        cluster
    }

    /// Volt, which plans one binary tree whatever the number of nodes, and these nodes, each up.
    pub(crate) fn with_nodes(names: &[&str]) -> Cluster {
        let mut cluster = Cluster::start_with(&["--stripes", "1", "--fan-out", "2"]);
        for name in names {
            cluster.add_node(name, &[]);
        }
        cluster
    }

    /// Volt and nodes that share an image, each below the one named before it: as many levels as nodes.
    pub(crate) fn chain(names: &[&str], image: &str, file: &Path) -> Cluster {
        let mut cluster = Cluster::start_with(&["--fan-out", "1"]);
        for name in names {
            cluster.add_node(name, &[]);
        }
        cluster.share(names, image, file);
        cluster
    }

    /// Makes the first node the origin of `file` under `image` and lets the others attach it, in this
    /// order: unless Volt was told otherwise, a binary tree below the origin's one child.
    pub(crate) fn share(&self, names: &[&str], image: &str, file: &Path) {
        self.ok(&["--node", names[0], "image", "add", image, file.to_str().unwrap()]);
        for name in &names[1..] {
            self.ok(&["--node", name, "image", "attach", image]);
        }
    }

    /// A directory for the test's own files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The directory of a node.
    pub(crate) fn node_dir(&self, name: &str) -> PathBuf {
        self.path(name)
    }

    /// Gives a node that is to be added a file system of its own of `mib` MiB for its directory.
    pub(crate) fn put_on_small_disk(&mut self, name: &str, mib: usize) {
        let dir = self.node_dir(name);
        fs::create_dir(&dir).unwrap();
        let size = format!("size={mib}m,mode=700");
        tool("mount", "mount", &["-t", "tmpfs", "-o", &size, "vm-small", dir.to_str().unwrap()]);
        self.mounts.push(Mount(dir));
    }

    /// Sets the wall clock of a daemon, a node or `volt`, to `time`, such as `+2d` or `@2001-01-01 00:00:00`: at once if
    /// it was started with a clock of its own, else from its next start on.
    pub(crate) fn set_clock(&self, daemon: &str, time: &str) {
        assert!(Path::new(CLOCK_LIBRARY).exists(), "install the Debian package faketime: {CLOCK_LIBRARY}");
        // By a rename: it is read all the time.
        let new = self.path(&format!("{daemon}.clock.new"));
        fs::write(&new, format!("{time}\n")).unwrap();
        fs::rename(new, self.clock(daemon)).unwrap();
    }

    fn clock(&self, daemon: &str) -> PathBuf {
        self.path(&format!("{daemon}.clock"))
    }

    /// The number of a node's process.
    pub(crate) fn node_pid(&self, name: &str) -> u32 {
        self.nodes[name].process.as_ref().expect("it runs").id()
    }

    /// Joins a node and waits until Volt has it. It has a cache of 2 GiB if `options` name none.
    pub(crate) fn add_node(&mut self, name: &str, options: &[&str]) {
        let token = self.ok(&["volt", "token"]);
        let mut options: Vec<String> = options.iter().map(ToString::to_string).collect();
        if !options.iter().any(|option| option == "--cache") {
            let cache = self.path(&format!("{name}.cache"));
            options.extend(["--cache".to_owned(), format!("{}=2G", cache.display())]);
        }
        let mut join =
            vec!["--join".to_owned(), token.trim().to_owned(), "--name".to_owned(), name.to_owned()];
        join.extend(options.iter().cloned());
        let port = Port::reserve();
        let process = self.spawn_node(name, port.address(), &join);
        self.nodes.insert(name.to_owned(), Node { process: Some(process), port, options });
        self.wait_up(name);
    }

    /// Ends a node's daemon as a power cut would: no signal handler runs.
    pub(crate) fn kill_node(&mut self, name: &str) {
        end(self.nodes.get_mut(name).expect("a node of the test").process.take());
    }

    /// Starts a killed node again, at its address, and waits until its API answers.
    pub(crate) fn restart_node(&mut self, name: &str) {
        let node = &self.nodes[name];
        let process = self.spawn_node(name, node.port.address(), &node.options);
        self.nodes.get_mut(name).expect("a node of the test").process = Some(process);
        wait_for(&format!("node {name} answers again"), START_LIMIT, || {
            let output = self.run_at(name, &["list"]);
            output.status.success().then_some(())
        });
    }

    /// Waits until Volt counts a node as up.
    pub(crate) fn wait_up(&self, name: &str) {
        wait_for(&format!("node {name} is up"), START_LIMIT, || {
            (self.node_state(name).as_deref() == Some("up")).then_some(())
        });
    }

    /// What Volt thinks of a node: `up`, `down` or `quarantined`.
    pub(crate) fn node_state(&self, name: &str) -> Option<String> {
        let output = self.run(&["--json", "status"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        let nodes = status["nodes"].as_array()?;
        let node = nodes.iter().find(|node| node["node"] == name)?;
        node["state"].as_str().map(str::to_owned)
    }

    /// What a node says of itself.
    pub(crate) fn node_status(&self, name: &str) -> Value {
        let status = self.json(&["status"]);
        let nodes = status["nodes"].as_array().expect("nodes");
        let node = nodes.iter().find(|node| node["node"] == name).expect("the node joined");
        assert!(node["now"].is_object(), "node {name} does not answer: {node}");
        node["now"].clone()
    }

    /// Ends Volt as a power cut would.
    pub(crate) fn kill_volt(&mut self) {
        end(self.volt.take());
    }

    /// Starts Volt, and waits until it answers.
    pub(crate) fn start_volt(&mut self, options: &[&str]) {
        let mut command = self.command(&["volt", "--listen", self.volt_address()]);
        self.volt = Some(self.spawn(command.args(options), "volt"));
        wait_for("Volt answers", START_LIMIT, || self.run(&["status"]).status.success().then_some(()));
    }

    /// The parent of each node in the hierarchy of `image`; the origin has none.
    pub(crate) fn parents(&self, image: &str) -> BTreeMap<String, Option<String>> {
        let trees = self.json(&["tree", image]);
        let stripe = trees[0]["stripes"][0].as_array().cloned().unwrap_or_default();
        let text = |value: &Value| value.as_str().map(str::to_owned);
        stripe.iter().map(|at| (text(&at["node"]).expect("a name"), text(&at["parent"]))).collect()
    }

    /// How many steps below the origin a node is.
    pub(crate) fn depth(&self, image: &str, node: &str) -> usize {
        let parents = self.parents(image);
        let up = |name: &String| parents.get(name).cloned().flatten();
        std::iter::successors(up(&node.to_owned()), up).count()
    }

    /// Runs a command to its end, whatever comes of it.
    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.bounded(args).output().expect("timeout runs")
    }

    /// Runs a command of the node `name` as somebody on its host would.
    pub(crate) fn run_at(&self, name: &str, args: &[&str]) -> Output {
        let dir = self.node_dir(name);
        let mut all = vec!["--dir", dir.to_str().unwrap()];
        all.extend(args);
        self.run(&all)
    }

    /// Runs a command that must succeed, and returns its standard output.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "virtman {args:?} failed:\n{}", both(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command that must fail, and returns what it says.
    pub(crate) fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "virtman {args:?} should fail, but printed:\n{}", both(&output));
        assert!(output.stdout.is_empty(), "a failure belongs on standard error: {}", both(&output));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Starts a command that runs beside the test. What it prints is kept under `name`.
    pub(crate) fn begin(&self, name: &str, args: &[&str]) -> Background {
        Background::start(self.command(args), &self.path(name))
    }

    /// Runs a command that must succeed, and returns its JSON.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let text = self.ok(&all);
        serde_json::from_str(&text)
            .unwrap_or_else(|e| panic!("virtman {args:?} printed no JSON ({e}): {text}"))
    }

    /// The NBD URI of a VM's disk.
    pub(crate) fn disk(&self, node: &str, vm: &str) -> String {
        format!("nbd+unix:///{vm}?socket={}/disks/{vm}.sock", self.node_dir(node).display())
    }

    /// The NBD URI of an image as a node sees it. `file` is the image's name with `+` for `:`.
    pub(crate) fn volume(&self, node: &str, file: &str) -> String {
        format!("nbd+unix:///?socket={}/volumes/{file}.sock", self.node_dir(node).display())
    }

    /// Where a node listens for children and administrators.
    pub(crate) fn node_address(&self, name: &str) -> &str {
        self.nodes[name].port.address()
    }

    /// Where Volt listens.
    pub(crate) fn volt_address(&self) -> &str {
        self.volt_port.address()
    }

    /// What a node's daemon logged so far.
    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// A daemon, under the limit of open files that most systems begin with.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -Sn 1024; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_virtman")]);
        command.env("VIRTMAN_HOME", self.dir.path()).env_remove("VIRTMAN_NODE_DIR").args(args);
        command.stdin(Stdio::null());
        command
    }

    fn bounded(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg(COMMAND_TIMEOUT_SECONDS).arg(env!("CARGO_BIN_EXE_virtman")).args(args);
        command.env("VIRTMAN_HOME", self.dir.path()).env_remove("VIRTMAN_NODE_DIR").stdin(Stdio::null());
        command
    }

    fn spawn_node(&self, name: &str, address: &str, options: &[String]) -> Child {
        let dir = self.node_dir(name);
        let mut command = self.command(&["--dir", dir.to_str().unwrap(), "compute", "--listen", address]);
        self.spawn(command.args(options), name)
    }

    fn spawn(&self, command: &mut Command, name: &str) -> Child {
        let log = File::options().create(true).append(true).open(self.path(&format!("{name}.log"))).unwrap();
        let clock = self.clock(name);
        if clock.exists() {
            command.env("LD_PRELOAD", CLOCK_LIBRARY).env("FAKETIME_TIMESTAMP_FILE", clock);
            command
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                .env("NO_FAKE_STAT", "1");
        }
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn();
        child.unwrap_or_else(|e| panic!("{name} cannot be started: {e}"))
    }

    /// Ends the guests, which outlive their daemons by design.
    fn kill_guests(&self) {
        for name in self.nodes.keys() {
            let vms = fs::read_dir(self.node_dir(name).join("vms")).into_iter().flatten().flatten();
            for guest in vms.filter_map(|vm| guest(&vm.path().join("qemu.pid"))) {
                let _ = pidfd_send_signal(guest, Signal::KILL);
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_guests();
        for node in self.nodes.values_mut() {
            end(node.process.take());
        }
        end(self.volt.take());
        if std::thread::panicking() {
            for name in std::iter::once("volt").chain(self.nodes.keys().map(String::as_str)) {
                let log = self.log(name);
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                eprintln!("--- end of the log of {name}");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

fn end(process: Option<Child>) {
    if let Some(mut process) = process {
        let _ = process.kill();
        // What the library for clocks leaves of a process that was killed has its number, which is nobody else's until
        // it has been waited for.
        let _ = waitid(WaitId::Pid(Pid::from_child(&process)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        for file in ["faketime_shm_", "sem.faketime_sem_"] {
            let _ = fs::remove_file(format!("/dev/shm/{file}{}", process.id()));
        }
        let _ = process.wait();
    }
}

/// The process of a guest, if it has not ended.
fn guest(pidfile: &Path) -> Option<OwnedFd> {
    let pid = Pid::from_raw(fs::read_to_string(pidfile).ok()?.trim().parse().ok()?)?;
    // The number may be another process's by now. What is opened here is one process, whatever becomes of its number.
    let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    let command = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    let is_ours = String::from_utf8_lossy(&command).contains(&*pidfile.to_string_lossy());
    is_ours.then_some(process)
}
