//! Volt and several nodes on loopback, as a user would start them, with guests on them.
//!
//! Guests outlive their daemons by design, so whoever drops a site also ends those that its nodes started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::super::Outcome;
use super::super::cluster::free_address;
use super::super::http::Api;
use super::super::process::{Daemon, Virtman, output, spawn_until_ready, wait_for};

/// Room for cached chunks on each node: more than any of these benchmarks fetches.
const CACHE_SIZE: &str = "2G";

/// Longer than any answer takes; what takes minutes is asked by the command line.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(120);

/// How long Volt may take to hear of a node that is ready.
const JOIN_TIME_MAX: Duration = Duration::from_secs(30);

/// A cluster that ends with its value.
pub(super) struct Site<'a> {
    virtman: &'a Virtman,
    // Dropped before the directory that they write to.
    nodes: Vec<(&'static str, Daemon)>,
    _volt: Daemon,
    home: TempDir,
}

impl<'a> Site<'a> {
    /// Starts Volt and nodes of these names, and waits until all are up. They form one binary tree.
    pub(super) fn start(virtman: &'a Virtman, dir: &Path, names: &[&'static str]) -> Outcome<Site<'a>> {
        let home = tempfile::Builder::new().prefix("").rand_bytes(2).tempdir_in(dir);
        let home = home.map_err(|e| format!("cannot make a directory for a cluster: {e}"))?;
        let address = free_address()?;
        let command = || in_home(virtman, home.path());
        output(command().args(["volt", "init", "--address", &address]))?;
        let mut volt = command();
        volt.args(["volt", "--listen", &address, "--stripes", "1", "--fan-out", "2"]);
        let (volt, _) = spawn_until_ready(home.path(), quiet(&mut volt))?;
        let mut site = Site { virtman, nodes: Vec::new(), _volt: volt, home };
        for name in names {
            site.add_node(name)?;
        }
        Ok(site)
    }

    fn add_node(&mut self, name: &'static str) -> Outcome {
        let token = output(self.command().args(["volt", "token"]))?;
        let dir = self.node_dir(name);
        let cache = format!("{}={CACHE_SIZE}", self.home.path().join(format!("{name}.chunks")).display());
        let mut command = self.command();
        command.arg("--dir").arg(&dir);
        command.args(["compute", "--listen", "127.0.0.1:0", "--cache", &cache]);
        command.args(["--join", token.trim(), "--name", name]);
        let (daemon, _) = spawn_until_ready(self.home.path(), quiet(&mut command))?;
        self.nodes.push((name, daemon));
        wait_for(&format!("node {name}"), JOIN_TIME_MAX, || {
            let status = self.json(&["status"]).ok()?;
            let node = status["nodes"].as_array()?.iter().find(|node| node["node"] == name)?;
            (node["state"] == "up").then_some(())
        })
    }

    /// Makes the first node the origin of an image, and lets the others attach it.
    pub(super) fn share(&self, names: &[&str], image: &str, file: &Path) -> Outcome {
        let (origin, others) = names.split_first().ok_or("an image needs a node")?;
        output(self.command().args(["--node", origin, "image", "add", image]).arg(file))?;
        for node in others {
            self.run(&["--node", node, "image", "attach", image])?;
        }
        Ok(())
    }

    /// A command of the program about this cluster.
    pub(super) fn command(&self) -> Command {
        in_home(self.virtman, self.home.path())
    }

    /// Runs a command to its end.
    pub(super) fn run(&self, args: &[&str]) -> Outcome<String> {
        output(self.command().args(args))
    }

    /// The same; what it prints is JSON.
    pub(super) fn json(&self, args: &[&str]) -> Outcome<Value> {
        let text = output(self.command().arg("--json").args(args))?;
        serde_json::from_str(&text).map_err(|e| format!("virtman {args:?} printed no JSON: {e}"))
    }

    /// A connection to a node.
    pub(super) fn api(&self, node: &str) -> Outcome<Api> {
        Api::connect_for(&self.node_dir(node).join("api.sock"), ANSWER_TIME_MAX)
    }

    /// The daemon of a node.
    pub(super) fn daemon(&self, node: &str) -> Outcome<&Daemon> {
        let found = self.nodes.iter().find(|(name, _)| *name == node);
        found.map(|(_, daemon)| daemon).ok_or_else(|| format!("there is no node {node}"))
    }

    /// The directory of a node.
    pub(super) fn node_dir(&self, node: &str) -> PathBuf {
        self.home.path().join(node)
    }

    /// The directory of a VM on a node.
    pub(super) fn vm_dir(&self, node: &str, vm: &str) -> PathBuf {
        self.node_dir(node).join("vms").join(vm)
    }

    /// The NBD URI of a VM's disk on a node.
    pub(super) fn disk(&self, node: &str, vm: &str) -> String {
        format!("nbd+unix:///{vm}?socket={}/disks/{vm}.sock", self.node_dir(node).display())
    }

    /// Bytes that a node has sent on its links so far, their heads included.
    pub(super) fn sent_bytes(&self, node: &str) -> Outcome<u64> {
        let status = self.api(node)?.get("/v1/status")?;
        status["links"]["sent_wire_bytes"].as_u64().ok_or_else(|| format!("node {node} counts no bytes"))
    }

    /// Room that the layers on a node take on its file system.
    pub(super) fn layer_bytes(&self, node: &str) -> Outcome<u64> {
        let dir = self.node_dir(node).join("layers");
        let text = output(Command::new("du").args(["-s", "-B1"]).arg(&dir))?;
        let bytes = text.split_whitespace().next().and_then(|bytes| bytes.parse().ok());
        bytes.ok_or_else(|| format!("du says nothing of {}", dir.display()))
    }

    /// Waits until a node has no image attached but `image`, so that its clones have all of their own.
    pub(super) fn wait_settled(&self, node: &str, image: &str, limit: Duration) -> Outcome {
        let mut api = self.api(node)?;
        wait_for("what a clone has of its own", limit, || {
            let images = api.get("/v1/images").ok()?;
            let only_own = |listed: &Value| listed["names"][0] == image;
            images.as_array()?.iter().all(only_own).then_some(())
        })
    }

    /// Waits until a node's layers take as much room as half a second before, so that none is being merged.
    pub(super) fn wait_at_rest(&self, node: &str, limit: Duration) -> Outcome {
        wait_for("layers at rest", limit, || {
            let before = self.layer_bytes(node).ok()?;
            std::thread::sleep(Duration::from_millis(500));
            (self.layer_bytes(node).ok()? == before).then_some(())
        })
    }

    /// Ends the guests of all nodes, in the hardest way.
    fn end_guests(&self) {
        for (name, _) in &self.nodes {
            let vms = fs::read_dir(self.node_dir(name).join("vms")).into_iter().flatten().flatten();
            for pid in vms.filter_map(|vm| guest_of(&vm.path())) {
                // It may have ended meanwhile.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        self.end_guests();
    }
}

/// The hypervisor of the VM in `dir`, if it runs. A number that was given to another process is not taken for it.
fn guest_of(dir: &Path) -> Option<Pid> {
    let pidfile = dir.join("qemu.pid");
    let pid: i32 = fs::read_to_string(&pidfile).ok()?.trim().parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let is_it = String::from_utf8_lossy(&command).contains(&*pidfile.to_string_lossy());
    Pid::from_raw(pid).filter(|_| is_it)
}

fn in_home(virtman: &Virtman, home: &Path) -> Command {
    let mut command = virtman.command();
    command.arg("--home").arg(home).env_remove("VIRTMAN_NODE_DIR");
    command
}

/// What daemons print goes nowhere.
fn quiet(command: &mut Command) -> &mut Command {
    command.stdout(Stdio::null()).stderr(Stdio::null())
}
