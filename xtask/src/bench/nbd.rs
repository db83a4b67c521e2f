//! Local reads and writes through NBD: a VM's disk and an image volume of a node against
//! `qemu-storage-daemon`, which exports a raw file with the same bytes.
//!
//! Fairness: both listen on a UNIX socket, both work through the page cache, which holds all bytes before
//! anything is timed, and both make writes durable at a flush and not before. The peer's file is opened by
//! the protocol driver alone, without a format on top, which is its fastest form.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::cluster::Cluster;
use super::data::{self, Filling};
use super::fio::{Access, Load, Server, Shape, Until};
use super::process::{Daemon, settle_disks, wait_for, warm};
use super::report::{Bar, Better, Rounds, Row, Table};
use super::{Bench, Outcome};

/// Size of the disks in bytes.
const DISK_BYTES: u64 = 1 << 30;

/// How long one measurement takes.
const SECONDS: u32 = 2;

/// How long the peer may take until it listens.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// Local speed is to be no less than that of a raw file's export.
const BAR: Bar = Bar::RatioMin(1.0);

const SHAPES: [Shape; 3] = [Shape::Random { depth: 1 }, Shape::Random { depth: 32 }, Shape::Sequential];

pub(super) fn run(bench: &Bench) -> Outcome<Vec<Table>> {
    bench.note("nbd: preparing an image of 1 GiB");
    let file = bench.dir.path().join("nbd.img");
    data::make(&file, DISK_BYTES, Filling::Random)?;
    let cluster = Cluster::start(bench)?;
    let volume = cluster.add_image("image", &file)?;
    let node = cluster.node()?;
    let image = Server { daemon: node, uri: &volume };
    // Fetches every chunk into the cache group, and the second time from there.
    for _ in 0..2 {
        load(Access::Read, Shape::Sequential, Until::OnceOrSeconds(600)).run(&image)?;
    }
    let disk_uri = cluster.create("vm", "image")?;
    let disk = Server { daemon: node, uri: &disk_uri };
    let peer = Peer::serve(bench, &file)?;

    let mut rows = Vec::new();
    for (name, ours) in [("image volume", &image), ("new VM disk", &disk)] {
        for shape in SHAPES {
            rows.push(compare(bench, name, load(Access::Read, shape, Until::Seconds(SECONDS)), ours, &peer)?);
        }
    }
    // From here on both hold bytes of their own in every block.
    for server in [&disk, &peer.server()] {
        load(Access::Write, Shape::Sequential, Until::OnceOrSeconds(600)).run(server)?;
    }
    settle_disks()?;
    for access in [Access::Read, Access::Write] {
        for shape in SHAPES {
            let load = load(access, shape, Until::Seconds(SECONDS));
            rows.push(compare(bench, "written VM disk", load, &disk, &peer)?);
        }
    }
    let flushed = load(Access::WriteFlushed, Shape::Random { depth: 1 }, Until::Seconds(SECONDS));
    rows.push(compare(bench, "written VM disk", flushed, &disk, &peer)?);
    drop(peer);
    for shape in [Shape::Random { depth: 1 }, Shape::Random { depth: 32 }, Shape::Sequential] {
        let load = load(Access::Write, shape, Until::OnceOrSeconds(SECONDS));
        rows.push(first_writes(bench, load, &cluster)?);
    }
    Ok(vec![Table {
        title: "Local reads and writes through NBD",
        notes: vec![
            format!(
                "peer: qemu-storage-daemon, driver file, cache.direct=off, cache.no-flush=off, aio=threads; disks of {} MiB",
                DISK_BYTES >> 20
            ),
            "CPU of the serving process: us per request of 4 KiB, ms per GiB of sequential access".to_owned(),
        ],
        cost_unit: "us or ms",
        rows,
    }])
}

fn load(access: Access, shape: Shape, until: Until) -> Load {
    Load { access, shape, until }
}

fn compare(bench: &Bench, name: &str, load: Load, ours: &Server<'_>, peer: &Peer) -> Outcome<Row> {
    let what = format!("{name}: {}", load.name());
    bench.note(&what);
    let run = |server: &Server<'_>| {
        settle_disks()?;
        load.run(server)
    };
    let rounds = Rounds::take(bench.rounds, || run(ours), || run(&peer.server()))?;
    Ok(rounds.row(what, load.unit(), Better::More).with_bar(BAR))
}

/// Writes to blocks that nobody wrote before: each round has a new VM disk and a new, empty file.
fn first_writes(bench: &Bench, load: Load, cluster: &Cluster<'_>) -> Outcome<Row> {
    let what = format!("first write: {}", load.name());
    bench.note(&what);
    let ours = || {
        let uri = cluster.create("fresh", "image")?;
        settle_disks()?;
        let sample = load.run(&Server { daemon: cluster.node()?, uri: &uri })?;
        cluster.destroy("fresh")?;
        Ok(sample)
    };
    let peer = || {
        let file = bench.dir.path().join("fresh.img");
        let made = File::create(&file).and_then(|file| file.set_len(DISK_BYTES));
        made.map_err(|e| format!("cannot make {}: {e}", file.display()))?;
        let peer = Peer::export(bench, file)?;
        settle_disks()?;
        load.run(&peer.server())
    };
    let rounds = Rounds::take(bench.rounds, ours, peer)?;
    Ok(rounds.row(what, load.unit(), Better::More).with_bar(BAR))
}

/// A `qemu-storage-daemon` with one file, which goes with it.
struct Peer {
    daemon: Daemon,
    uri: String,
    file: PathBuf,
}

impl Peer {
    /// Exports a copy of `file`, all of it in memory.
    fn serve(bench: &Bench, file: &Path) -> Outcome<Peer> {
        let copy = bench.dir.path().join("peer.img");
        fs::copy(file, &copy).map_err(|e| format!("cannot copy {}: {e}", file.display()))?;
        warm(&copy)?;
        Peer::export(bench, copy)
    }

    fn export(bench: &Bench, file: PathBuf) -> Outcome<Peer> {
        let socket = bench.dir.path().join("peer.sock");
        // The socket of the peer before.
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("qemu-storage-daemon");
        let name = file.display();
        command.arg("--blockdev").arg(format!(
            "driver=file,node-name=disk,filename={name},cache.direct=off,cache.no-flush=off,aio=threads,discard=unmap"
        ));
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=disk,node-name=disk,name=disk,writable=on"]);
        let daemon = Daemon::spawn(&mut command)?;
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let peer = Peer { daemon, uri, file };
        wait_for("qemu-storage-daemon", START_TIME_MAX, || UnixStream::connect(&socket).ok())?;
        Ok(peer)
    }

    fn server(&self) -> Server<'_> {
        Server { daemon: &self.daemon, uri: &self.uri }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Its room is wanted for the next; whatever is left goes with the directory.
        let _ = fs::remove_file(&self.file);
    }
}
