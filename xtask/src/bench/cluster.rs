//! A cluster of Volt and one node, as a user would start it, in a directory of the benchmark.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::http::Api;
use super::process::{Daemon, output, spawn_until_ready};
use super::{Bench, Outcome};

/// Room for cached chunks: the largest image with a little more.
const CACHE_SIZE: &str = "3G";

/// Volt and a node. Their files go with them.
pub(super) struct Cluster<'a> {
    bench: &'a Bench,
    // Dropped before the directory that they write to.
    node: Option<Daemon>,
    _volt: Daemon,
    home: tempfile::TempDir,
}

impl<'a> Cluster<'a> {
    pub(super) fn start(bench: &'a Bench) -> Outcome<Cluster<'a>> {
        Cluster::start_with(bench, &[])
    }

    /// The same, with further options of the node.
    pub(super) fn start_with(bench: &'a Bench, options: &[&str]) -> Outcome<Cluster<'a>> {
        let home = tempfile::Builder::new().prefix("").rand_bytes(2).tempdir_in(bench.dir.path());
        let home = home.map_err(|e| format!("cannot make a directory for a cluster: {e}"))?;
        let address = free_address()?;
        let virtman = || in_home(bench, home.path());
        output(virtman().args(["volt", "init", "--address", &address]))?;
        let (volt, _) =
            spawn_until_ready(home.path(), quiet(virtman().args(["volt", "--listen", &address])))?;
        let token = output(virtman().args(["volt", "token"]))?;
        let mut cluster = Cluster { bench, node: None, _volt: volt, home };
        cluster.start_node(&[&["--join", token.trim(), "--name", "origin"], options].concat())?;
        Ok(cluster)
    }

    /// A command of the program about this cluster.
    pub(super) fn virtman(&self) -> Command {
        in_home(self.bench, self.home.path())
    }

    /// Starts the node; how long it took until it was ready.
    fn start_node(&mut self, args: &[&str]) -> Outcome<Duration> {
        let cache = format!("{}={CACHE_SIZE}", self.home.path().join("chunks").display());
        let mut command = self.virtman();
        command.args(["compute", "--listen", "127.0.0.1:0", "--cache", &cache]).args(args);
        let (node, took) = spawn_until_ready(self.home.path(), quiet(&mut command))?;
        self.node = Some(node);
        Ok(took)
    }

    /// Stops the node and starts it again; how long it took from its start until it was ready.
    pub(super) fn restart_node(&mut self) -> Outcome<Duration> {
        if let Some(node) = self.node.take() {
            node.stop()?;
        }
        self.start_node(&[])
    }

    /// The node's process.
    pub(super) fn node(&self) -> Outcome<&Daemon> {
        self.node.as_ref().ok_or_else(|| "the node could not be started again".to_owned())
    }

    pub(super) fn api(&self) -> Outcome<Api> {
        Api::connect(&self.home.path().join("node/api.sock"))
    }

    /// Adds an image and gives the NBD URI of its volume.
    pub(super) fn add_image(&self, name: &str, file: &Path) -> Outcome<String> {
        output(self.virtman().args(["image", "add", name]).arg(file))?;
        let images = self.api()?.get("/v1/images")?;
        let images = images.as_array().cloned().unwrap_or_default();
        let image = images.iter().find(|image| image["names"][0] == format!("{name}:latest"));
        let export = image.and_then(|image| image["export"].as_str().map(str::to_owned));
        export.ok_or_else(|| format!("the node does not export image '{name}'"))
    }

    /// Gives a VM its disk and gives the disk's NBD URI.
    pub(super) fn create(&self, vm: &str, image: &str) -> Outcome<String> {
        let uri = output(self.virtman().args(["create", vm, "--image", image]))?;
        Ok(uri.trim().to_owned())
    }

    pub(super) fn destroy(&self, vm: &str) -> Outcome {
        output(self.virtman().args(["destroy", vm])).map(drop)
    }
}

fn in_home(bench: &Bench, home: &Path) -> Command {
    let mut command = bench.virtman.command();
    command.arg("--home").arg(home);
    command
}

/// An address on which nobody listens just now.
pub(super) fn free_address() -> Outcome<String> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener.map(|address| address.to_string()).map_err(|e| format!("there is no free port: {e}"))
}

/// What daemons print goes nowhere.
fn quiet(command: &mut Command) -> &mut Command {
    command.stdout(Stdio::null()).stderr(Stdio::null())
}
