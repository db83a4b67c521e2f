//! What people use today, in the same network, under the same guests.
//!
//! | baseline | who serves whom |
//! |---|---|
//! | nbdkit star | each VM reads from `nbdkit file` at the origin |
//! | qemu-nbd star | the same with `qemu-nbd`, read-only and shared |
//! | nbdkit cache tree | each node runs `nbdkit --filter=cache nbd` below another's, two children each; its VMs read from it |
//! | qemu copy-on-read star | each node runs `qemu-storage-daemon` with a local copy-on-read qcow2 over the origin's `nbdkit file` |
//! | copy first | each node copies the image (as qcow2, so without its holes) by HTTP, then its VMs read it through `qemu-nbd` |
//!
//! All of these serve VMs read-only: what a VM writes stays with it and costs nothing, which favours them.
//! So does that they need no TLS and check nothing. Files lie on the same tmpfs as VirtMan's.

use std::fmt;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::BoxFuture;
use nbd::client::{Client, Options, Retry};
use nbd::{BoxStream, Dial};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, mpsc, oneshot, watch};

use super::super::Outcome;
use super::super::process::{Daemon, output, wait_for};
use super::crowd::{self, Cast, Progress, Seat};
use super::figures::{Percentiles, Run};
use super::network::{Host, Network};
use super::ours::blocking;
use super::plan::{Boot, Plan};
use super::watch as look;

/// Where servers listen on their hosts.
const NBD_PORT: u16 = 10809;
const HTTP_PORT: u16 = 8080;

/// Children of a node in the tree of caches: as in a binary tree of VirtMan's.
const TREE_FAN_OUT: usize = 2;

/// How long a server may take until it listens.
const START_TIME_MAX: Duration = Duration::from_secs(30);

/// Longer than any run: a star makes its VMs wait for minutes.
const SILENCE_MAX: Duration = Duration::from_secs(24 * 3600);

/// A way to bring an image to many nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Baseline {
    NbdkitStar,
    QemuNbdStar,
    CacheTree,
    CopyOnRead,
    CopyFirst,
}

pub(super) const ALL: [Baseline; 5] = [
    Baseline::NbdkitStar,
    Baseline::QemuNbdStar,
    Baseline::CacheTree,
    Baseline::CopyOnRead,
    Baseline::CopyFirst,
];

impl fmt::Display for Baseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Baseline::NbdkitStar => "nbdkit star",
            Baseline::QemuNbdStar => "qemu-nbd star",
            Baseline::CacheTree => "nbdkit cache tree",
            Baseline::CopyOnRead => "qemu copy-on-read star",
            Baseline::CopyFirst => "copy first",
        })
    }
}

/// A host on which VMs run, and where they find their disk.
struct Desk {
    host: Host,
    place: Disks,
    /// Copies the image and serves it, for those that copy first; once, when the first VM wants it.
    copy: Option<Copy>,
    copied: OnceCell<()>,
    servers: Mutex<Vec<Daemon>>,
    gone: watch::Sender<bool>,
}

/// Where the disk of a desk's VMs is served.
enum Disks {
    /// At this address, as seen from the desk's host.
    Tcp(SocketAddr),
    /// At a socket that any process reaches.
    Unix(PathBuf),
}

/// What must be copied from where to where.
struct Copy {
    url: String,
    file: PathBuf,
}

impl Seat for Desk {
    fn name(&self) -> &str {
        &self.host.name
    }

    fn open<'a>(&'a self, _vm: &'a str) -> BoxFuture<'a, Outcome<Client>> {
        Box::pin(async move {
            self.copied.get_or_try_init(|| self.copy_and_serve()).await?;
            let options = Options { retry: Retry::Forever, silence_max: SILENCE_MAX, ..Options::default() };
            Client::connect(self.dial(), "", options).await.map_err(|e| e.to_string())
        })
    }

    fn gone(&self) -> watch::Receiver<bool> {
        self.gone.subscribe()
    }
}

impl Desk {
    async fn copy_and_serve(&self) -> Outcome {
        let (Some(copy), Disks::Unix(socket)) = (&self.copy, &self.place) else { return Ok(()) };
        let mut command = self.host.command("curl");
        command.args(["--silent", "--show-error", "--fail", "--output"]).arg(&copy.file).arg(&copy.url);
        let mut curl = tokio::process::Command::from(command);
        // A run that is over ends it.
        let status = curl.kill_on_drop(true).status().await.map_err(|e| format!("cannot run curl: {e}"))?;
        if !status.success() {
            return Err(format!("curl on {} ended with {status}", self.host.name));
        }
        let mut command = Command::new("qemu-nbd");
        command.args(["--read-only", "--persistent", "--shared=0", "--format=qcow2"]);
        command.arg(format!("--socket={}", socket.display())).arg(&copy.file);
        let (server, socket) = (Daemon::spawn(&mut command)?, socket.clone());
        self.servers.lock().expect("no holder of this lock panics").push(server);
        blocking(move || wait_for_socket(&socket)).await
    }

    fn dial(&self) -> Dial {
        match &self.place {
            Disks::Unix(path) => {
                let path = path.clone();
                Arc::new(move || {
                    let path = path.clone();
                    Box::pin(async move { Ok(Box::new(UnixStream::connect(path).await?) as BoxStream) })
                })
            }
            Disks::Tcp(address) => {
                let (address, namespace) = (*address, self.host.namespace());
                Arc::new(move || {
                    let namespace = namespace.clone();
                    Box::pin(async move {
                        let (done, connected) = oneshot::channel();
                        // A thread of its own: the namespace is the thread's, and is not to be passed on.
                        std::thread::spawn(move || done.send(connect_from(&namespace, address)));
                        let stream = connected.await.map_err(std::io::Error::other)??;
                        Ok(Box::new(tokio::net::TcpStream::from_std(stream)?) as BoxStream)
                    })
                })
            }
        }
    }
}

/// Connects from another network namespace. The calling thread stays in it.
fn connect_from(namespace: &str, address: SocketAddr) -> std::io::Result<TcpStream> {
    let file = File::open(namespace)?;
    move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))?;
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn wait_for_socket(path: &Path) -> Outcome {
    let connected = || std::os::unix::net::UnixStream::connect(path).ok();
    wait_for(&path.display().to_string(), START_TIME_MAX, connected).map(drop)
}

fn wait_for_port(host: &Host, address: SocketAddr) -> Outcome {
    let namespace = host.namespace();
    // Each try in a thread that ends in the other namespace.
    let connected = || {
        std::thread::spawn({
            let namespace = namespace.clone();
            move || connect_from(&namespace, address)
        })
    };
    wait_for(&format!("{address}"), START_TIME_MAX, || connected().join().ok()?.ok()).map(drop)
}

/// Lets `cast` boot by this means, from files in `files`.
pub(super) async fn run(
    baseline: Baseline,
    plan: &Plan,
    boot: &Boot,
    cast: &Cast,
    files: &Path,
    image: &Path,
) -> Outcome<Run> {
    let dir = files.join("baseline");
    fs::create_dir_all(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let network = Arc::new(Network::new(plan.racks, plan.uplink())?);
    let origin = network.add("origin", super::network::Place::Core, Some(plan.rate))?;
    let served = match baseline {
        Baseline::CopyFirst => compact(image, &dir)?,
        _ => image.to_owned(),
    };
    let server = serve(baseline, &origin, &served)?;
    let mut desks: Vec<Arc<Desk>> = Vec::new();
    for number in 0..plan.nodes {
        let host = network.add(&format!("n{number}"), plan.place(number), Some(plan.rate))?;
        let parent = match number.checked_sub(TREE_FAN_OUT) {
            Some(below) => &desks[below / TREE_FAN_OUT].host,
            None => &origin,
        };
        desks.push(Arc::new(furnish(baseline, host, &origin, parent, &dir, &served)?));
    }

    let progress = Arc::new(Progress::new());
    let hosts = desks.iter().map(|desk| desk.host.clone()).collect();
    let watcher = look::watch(Arc::clone(&network), origin.clone(), hosts, Arc::clone(&progress));
    let before = network.traffic(&origin);
    let (_, nobody_arrives) = mpsc::channel(1);
    let stories = crowd::run(cast, desks.clone(), nobody_arrives, &progress).await?;
    let end = progress.begin.elapsed();
    let sent = (network.traffic(&origin) - before).sent;
    let points = watcher.end().await;

    let mut run = Run::of_stories(baseline.to_string(), plan.nodes, &stories, end.as_secs_f64());
    run.points = points;
    run.origin_wire_ratio = sent as f64 / boot.bytes() as f64;
    run.note_part_done(&cast.script.trace, &progress);
    let complete = progress.complete.lock().expect("no holder of this lock panics").clone();
    if complete.len() == desks.len() {
        run.boot_set_seconds = Percentiles::of(complete.values().map(Duration::as_secs_f64));
        run.boot_set_ratio = run.boot_set_seconds.map(|p| p.scaled(1.0 / plan.bound_seconds(boot)));
    }
    if baseline == Baseline::CopyFirst && run.part_done.is_some() {
        // Nothing is read before all is copied: the part of the copying tells more.
        let bytes = fs::metadata(&served).map_err(|e| format!("{}: {e}", served.display()))?.len();
        run.part_done = Some((sent as f64 / (bytes * plan.nodes as u64) as f64).min(1.0));
    }
    drop((desks, server));
    drop(network);
    fs::remove_dir_all(&dir).map_err(|e| format!("cannot remove {}: {e}", dir.display()))?;
    Ok(run)
}

/// The image without its holes.
fn compact(image: &Path, dir: &Path) -> Outcome<PathBuf> {
    let file = dir.join("image.qcow2");
    output(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(image).arg(&file))?;
    Ok(file)
}

/// The server at the origin.
fn serve(baseline: Baseline, origin: &Host, file: &Path) -> Outcome<Daemon> {
    let address = origin.address.to_string();
    let (mut command, port) = match baseline {
        Baseline::QemuNbdStar => {
            let mut command = origin.command("qemu-nbd");
            command.args(["--read-only", "--persistent", "--shared=0", "--format=raw"]);
            command.arg(format!("--bind={address}")).arg(format!("--port={NBD_PORT}")).arg(file);
            (command, NBD_PORT)
        }
        Baseline::CopyFirst => {
            let mut command = origin.command("python3");
            command.args(["-m", "http.server", "--bind", &address, "--directory"]);
            command.arg(file.parent().unwrap_or(file)).arg(HTTP_PORT.to_string());
            (command, HTTP_PORT)
        }
        Baseline::NbdkitStar | Baseline::CacheTree | Baseline::CopyOnRead => {
            let mut command = nbdkit(origin);
            command.arg("file").arg(file);
            (command, NBD_PORT)
        }
    };
    let server = Daemon::spawn(&mut command)?;
    wait_for_port(origin, SocketAddr::from((origin.address, port)))?;
    Ok(server)
}

/// `nbdkit` on a host, read-only; what it serves is to be said behind it.
fn nbdkit(host: &Host) -> Command {
    let mut command = host.command("nbdkit");
    command.args(["--foreground", "--readonly", "--ipaddr"]).arg(host.address.to_string());
    command.arg("--port").arg(NBD_PORT.to_string());
    command
}

/// What runs on a node, and where its VMs find their disk.
fn furnish(
    baseline: Baseline,
    host: Host,
    origin: &Host,
    parent: &Host,
    dir: &Path,
    served: &Path,
) -> Outcome<Desk> {
    let own = dir.join(&host.name);
    fs::create_dir_all(&own).map_err(|e| format!("cannot make {}: {e}", own.display()))?;
    let socket = own.join("disk.sock");
    let mut servers = Vec::new();
    let mut copy = None;
    let place = match baseline {
        Baseline::NbdkitStar | Baseline::QemuNbdStar => Disks::Tcp((origin.address, NBD_PORT).into()),
        Baseline::CacheTree => {
            let mut command = nbdkit(&host);
            command.env("TMPDIR", &own).args(["--filter=cache", "nbd", "shared=true"]);
            command.arg(format!("hostname={}", parent.address)).arg(format!("port={NBD_PORT}"));
            command.args(["cache-min-block-size=64K", "cache-on-read=true"]);
            servers.push(Daemon::spawn(&mut command)?);
            let address = (host.address, NBD_PORT).into();
            wait_for_port(&host, address)?;
            Disks::Tcp(address)
        }
        Baseline::CopyOnRead => {
            servers.push(copy_on_read(&host, origin, &own, &socket, served)?);
            Disks::Unix(socket)
        }
        Baseline::CopyFirst => {
            let name = served.file_name().unwrap_or_default().to_string_lossy();
            let url = format!("http://{}:{HTTP_PORT}/{name}", origin.address);
            copy = Some(Copy { url, file: own.join("image.qcow2") });
            Disks::Unix(socket)
        }
    };
    Ok(Desk {
        host,
        place,
        copy,
        copied: OnceCell::new(),
        servers: Mutex::new(servers),
        gone: watch::Sender::new(false),
    })
}

/// A `qemu-storage-daemon` that keeps what it read from the origin in a local qcow2.
fn copy_on_read(host: &Host, origin: &Host, dir: &Path, socket: &Path, image: &Path) -> Outcome<Daemon> {
    let local = dir.join("local.qcow2");
    let size = fs::metadata(image).map_err(|e| format!("{}: {e}", image.display()))?.len();
    output(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&local).arg(size.to_string()))?;
    let mut command = host.command("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=nbd,node-name=remote,read-only=on,server.type=inet,server.host={},server.port={NBD_PORT}",
        origin.address
    ));
    command.arg("--blockdev").arg(format!(
        "driver=qcow2,node-name=local,file.driver=file,file.filename={},backing=remote",
        local.display()
    ));
    command.args(["--blockdev", "driver=copy-on-read,node-name=disk,file=local"]);
    command
        .arg("--nbd-server")
        .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    command.args(["--export", "type=nbd,id=disk,node-name=disk,name=,writable=off"]);
    let daemon = Daemon::spawn(&mut command)?;
    wait_for_socket(socket)?;
    Ok(daemon)
}
