//! A cluster in a storm's network: Volt, an origin and nodes, each a real daemon on a host of its own.
//!
//! Nodes can be killed, started again and joined while others work, so a site is shared and each node has one
//! lock, around its process. A site's hosts, processes and files go with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use block::ImageId;
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::super::Outcome;
use super::super::http::Api;
use super::super::process::{Daemon, Virtman, output, spawn_until_ready};
use super::network::{Host, Network, Place, Rate};
use super::ours::blocking;
use super::{IMAGE, Plan};

/// Where Volt listens on its host, and nodes on theirs.
const VOLT_PORT: u16 = 7410;
const NODE_PORT: u16 = 7420;

/// Nodes that start at a time: more would only wait for the processor.
const STARTS: usize = 4;

/// How long Volt asks for reports after it started, before it plans freely: its lease of 3 s, and a tick.
const VOLT_LEARNS: Duration = Duration::from_secs(4);

/// How long a node may take to say whom it fetches from: whoever asks is about to kill that one.
const CHILD_ANSWER_TIME_MAX: Duration = Duration::from_millis(200);

/// A running cluster.
pub(super) struct Site {
    dir: PathBuf,
    virtman: Virtman,
    plan: Plan,
    volt: Server,
    pub(super) origin: Arc<Node>,
    nodes: Mutex<Vec<Arc<Node>>>,
    /// Nodes that have a host, joined or not.
    plugged: AtomicUsize,
    // Last: hosts go when nothing runs on them any more.
    pub(super) network: Arc<Network>,
}

/// One daemon, and how it is started.
struct Server {
    host: Host,
    /// Where it keeps its files.
    dir: PathBuf,
    log: Option<PathBuf>,
    process: Mutex<Process>,
}

/// A daemon's process, and what those before it took.
#[derive(Default)]
struct Process {
    daemon: Option<Daemon>,
    cpu_seconds_before: f64,
}

/// A node of the cluster.
pub(super) struct Node {
    pub(super) name: String,
    /// Whether it was killed for good.
    pub(super) gone: watch::Sender<bool>,
    server: Server,
}

impl Site {
    /// Starts everything, each node joined, and adds `image` at the origin. `dir` must be new.
    pub(super) fn start(virtman: &Virtman, dir: &Path, plan: &Plan, image: &Path) -> Outcome<Site> {
        fs::create_dir_all(dir.join("home")).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let network = Arc::new(Network::new(plan.racks, plan.uplink())?);
        let volt = Server::new("volt", dir.join("home"), network.add("volt", Place::Core, None)?, plan)?;
        let address = format!("{}:{VOLT_PORT}", volt.host.address);
        output(home_command(virtman.command(), dir).args(["volt", "init", "--address", &address]))?;
        let origin = Node::new("origin", dir, network.add("origin", Place::Core, Some(plan.rate))?, plan)?;
        let site = Site {
            dir: dir.to_owned(),
            virtman: Virtman::at(virtman.path()),
            plan: plan.clone(),
            volt,
            origin: Arc::new(origin),
            nodes: Mutex::default(),
            plugged: AtomicUsize::new(0),
            network,
        };
        site.start_volt()?;
        let volt_started = Instant::now();
        site.join(&site.origin)?;
        let add = ["image", "add", IMAGE];
        output(site.command_at(&site.origin).args(add).arg(image))?;
        let nodes: Vec<Arc<Node>> = (0..plan.nodes).map(|_| site.plug_in()).collect::<Outcome<_>>()?;
        for some in nodes.chunks(STARTS) {
            std::thread::scope(|scope| {
                let joins: Vec<_> = some.iter().map(|node| scope.spawn(|| site.join(node))).collect();
                joins.into_iter().try_for_each(|join| join.join().expect("joining does not panic"))
            })?;
        }
        site.lock_nodes().extend(nodes);
        // A storm meets a Volt that runs, and not one that has just started.
        std::thread::sleep(VOLT_LEARNS.saturating_sub(volt_started.elapsed()));
        Ok(site)
    }

    /// The nodes, the origin aside.
    pub(super) fn nodes(&self) -> Vec<Arc<Node>> {
        self.lock_nodes().clone()
    }

    /// Joins a node that was plugged in after the start; may be tried again while Volt is away.
    pub(super) fn join_late(&self, node: &Arc<Node>) -> Outcome {
        self.join(node)?;
        self.lock_nodes().push(Arc::clone(node));
        Ok(())
    }

    fn lock_nodes(&self) -> MutexGuard<'_, Vec<Arc<Node>>> {
        self.nodes.lock().expect("no holder of this lock panics")
    }

    /// Plugs a host for one more node in, on which nothing runs yet.
    pub(super) fn plug_in(&self) -> Outcome<Arc<Node>> {
        let number = self.plugged.fetch_add(1, Ordering::Relaxed);
        let name = format!("n{number}");
        let place = self.plan.place(number);
        let host = self.network.add(&name, place, Some(self.plan.rate))?;
        Node::new(&name, &self.dir, host, &self.plan).map(Arc::new)
    }

    /// Starts a node for the first time, with a token of its own.
    fn join(&self, node: &Node) -> Outcome {
        let token = output(
            home_command(self.volt.host.command(self.virtman.path()), &self.dir).args(["volt", "token"]),
        )?;
        self.start_node(node, &["--join", token.trim(), "--name", &node.name])
    }

    /// Starts a node that joined before.
    pub(super) fn restart(&self, node: &Node) -> Outcome {
        self.start_node(node, &[])
    }

    fn start_node(&self, node: &Node, args: &[&str]) -> Outcome {
        let server = &node.server;
        let mut command = server.host.command(self.virtman.path());
        command.arg("--dir").arg(&server.dir).arg("compute");
        command.args(["--listen", &format!("{}:{NODE_PORT}", server.host.address)]);
        let cache = format!("{}={}M", server.dir.join("chunks").display(), self.plan.cache_mib());
        command.args(["--cache", &cache]);
        if let Place::Rack(rack) = server.host.place {
            command.args(["--location", &format!("zone/rack{rack}/{}", node.name)]);
        } else if self.plan.racks > 0 {
            command.args(["--location", &format!("zone/core/{}", node.name)]);
        }
        server.start(command.args(args))
    }

    /// Starts Volt, for the first time or again.
    pub(super) fn start_volt(&self) -> Outcome {
        let address = format!("{}:{VOLT_PORT}", self.volt.host.address);
        let mut command = home_command(self.volt.host.command(self.virtman.path()), &self.dir);
        command.args(["volt", "--listen", &address]).args(self.plan.shape.options());
        self.volt.start(&mut command)
    }

    pub(super) fn kill_volt(&self) -> Outcome {
        self.volt.kill()
    }

    /// A command of the program, as somebody on a node's host would give it.
    fn command_at(&self, node: &Node) -> Command {
        let mut command = home_command(node.host().command(self.virtman.path()), &self.dir);
        command.arg("--dir").arg(&node.server.dir);
        command
    }

    /// The image's id.
    pub(super) fn image_id(&self) -> Outcome<ImageId> {
        let image = self.origin.image()?.unwrap_or_default();
        let id = image["id"].as_str().and_then(|id| id.parse().ok());
        id.ok_or_else(|| format!("the origin does not tell the image's id: {image}"))
    }

    /// Lets Volt keep a boot profile that lies in a file.
    pub(super) fn import_profile(&self, file: &Path) -> Outcome {
        let mut command = self.command_at(&self.origin);
        output(command.args(["image", "profile", "import", IMAGE]).arg(file)).map(drop)
    }

    /// The rate of each node's link.
    pub(super) fn rate(&self) -> Rate {
        self.plan.rate
    }

    /// The nodes whose first parent of some stripe is `parent`, as they say themselves.
    pub(super) fn children(&self, parent: &str) -> BTreeSet<String> {
        let fetches_from = |node: &Arc<Node>| {
            // One that does not answer, dead or stopped, is not a witness.
            let api = Api::connect_for(&node.socket(), CHILD_ANSWER_TIME_MAX);
            let Ok(Some(image)) = api.and_then(|mut api| image_of(&mut api)) else { return false };
            let stripes = image["parents"].as_array().cloned().unwrap_or_default();
            stripes.iter().any(|ranked| ranked[0] == parent)
        };
        self.nodes().iter().filter(|node| fetches_from(node)).map(|node| node.name.clone()).collect()
    }

    /// Processor time of all daemons so far, in seconds.
    pub(super) fn cpu_seconds(&self) -> Outcome<f64> {
        let nodes = self.nodes();
        let servers = nodes.iter().map(|node| &node.server).chain([&self.volt, &self.origin.server]);
        servers.map(Server::cpu_seconds).sum()
    }
}

fn home_command(mut command: Command, dir: &Path) -> Command {
    command.arg("--home").arg(dir.join("home"));
    command
}

impl Server {
    fn new(name: &str, dir: PathBuf, host: Host, plan: &Plan) -> Outcome<Server> {
        fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let log = plan.logs.as_ref().map(|logs| logs.join(format!("{name}.log")));
        Ok(Server { host, dir, log, process: Mutex::default() })
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().expect("no holder of this lock panics")
    }

    fn start(&self, command: &mut Command) -> Outcome {
        match &self.log {
            Some(path) => {
                let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
                let log = File::options().create(true).append(true).open(path).map_err(failed)?;
                command.stdout(log.try_clone().map_err(failed)?).stderr(log);
            }
            None => drop(command.stdout(Stdio::null()).stderr(Stdio::null())),
        }
        let (daemon, _) = spawn_until_ready(&self.dir, command)
            .map_err(|e| format!("{} on host {}: {e}", self.dir.display(), self.host.name))?;
        self.process().daemon = Some(daemon);
        Ok(())
    }

    /// Ends it as a power cut would.
    fn kill(&self) -> Outcome {
        let mut process = self.process();
        if let Some(daemon) = process.daemon.take() {
            process.cpu_seconds_before += daemon.cpu_seconds()?;
        }
        Ok(())
    }

    fn cpu_seconds(&self) -> Outcome<f64> {
        let process = self.process();
        let now = process.daemon.as_ref().map_or(Ok(0.0), Daemon::cpu_seconds)?;
        Ok(process.cpu_seconds_before + now)
    }
}

/// The one image of a node.
fn image_of(api: &mut Api) -> Outcome<Option<Value>> {
    let images = api.get("/v1/images")?;
    Ok(images.as_array().and_then(|images| images.first().cloned()))
}

impl Node {
    fn new(name: &str, dir: &Path, host: Host, plan: &Plan) -> Outcome<Node> {
        let gone = watch::Sender::new(false);
        Ok(Node { name: name.to_owned(), gone, server: Server::new(name, dir.join(name), host, plan)? })
    }

    pub(super) fn host(&self) -> &Host {
        &self.server.host
    }

    fn api(&self) -> Outcome<Api> {
        Api::connect(&self.socket())
    }

    fn socket(&self) -> PathBuf {
        self.server.dir.join("api.sock")
    }

    /// What the node says of itself.
    pub(super) fn status(&self) -> Outcome<Value> {
        self.api()?.get("/v1/status")
    }

    /// What the node says of the image, if it has it attached.
    pub(super) fn image(&self) -> Outcome<Option<Value>> {
        image_of(&mut self.api()?)
    }

    /// Attaches the image, and gives what the node says of it.
    pub(super) fn attach(&self) -> Outcome<Value> {
        self.api()?.put(&format!("/v1/attached/{IMAGE}"), &Value::Null)
    }

    /// Gives a VM its disk, unless it has one, and gives the disk's NBD URI.
    pub(super) async fn create_or_find(&self, vm: &str) -> Outcome<String> {
        let (socket, path) = (self.socket(), format!("/v1/vms/{vm}"));
        let answer = blocking(move || {
            let mut api = Api::connect(&socket)?;
            // One that was created before its node was killed is there already.
            api.put(&path, &json!({ "image": IMAGE })).or_else(|_| Api::connect(&socket)?.get(&path))
        });
        let answer = answer.await?;
        let disk = answer["disk"].as_str().map(str::to_owned);
        disk.ok_or_else(|| format!("node {} gives VM {vm} no disk: {answer}", self.name))
    }

    /// Says that it does not come back.
    pub(super) fn declare_gone(&self) {
        self.gone.send_replace(true);
    }

    pub(super) fn is_gone(&self) -> bool {
        *self.gone.borrow()
    }

    /// Ends the daemon as a power cut would.
    pub(super) fn kill(&self) -> Outcome {
        self.server.kill()
    }

    /// Stops the daemon in its tracks, or lets it go on.
    pub(super) fn signal(&self, signal: Signal) -> Outcome {
        let process = self.server.process();
        let Some(daemon) = &process.daemon else { return Ok(()) };
        kill_process(daemon.pid(), signal).map_err(|e| format!("cannot signal node {}: {e}", self.name))
    }
}
