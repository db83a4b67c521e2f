//! Local reads and writes through iSCSI: a VM's disk and an image volume of a node against `tgtd`, which serves
//! a raw file with the same bytes; and what an honest initiator has left beside hostile ones.
//!
//! Fairness: both listen on loopback, both work through the page cache, which holds all bytes before anything
//! is timed, and neither makes a write durable before it is asked to. The clients are foreign: `iscsi-perf`
//! reads, `qemu-img bench` writes.

mod hostile;

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use self::hostile::{Flood, Hostiles};
use super::cluster::{Cluster, free_address};
use super::data::{self, Filling};
use super::process::{Daemon, output, wait_for, warm};
use super::report::{Bar, Better, Rounds, Row, Sample, Spread, Table};
use super::{Bench, Outcome};

/// Size of the disks in bytes.
const DISK_BYTES: u64 = 512 << 20;

/// How long one measurement of reads takes.
const SECONDS: u32 = 2;

/// How long the peer may take until it listens.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// With many commands under way we are to be half as fast again as the peer, with one not slower.
const BAR_DEEP: Bar = Bar::RatioMin(1.5);
const BAR_SINGLE: Bar = Bar::RatioMin(1.0);

const PEER_TARGET: &str = "iqn.2026-11.bench:peer";

/// Size and order of the commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// 4 KiB at random places.
    Random,
    /// 1 MiB one behind the other.
    Sequential,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// One kind of load: so many commands at a time.
#[derive(Debug, Clone, Copy)]
struct Load {
    access: Access,
    shape: Shape,
    depth: u32,
}

/// A logical unit, and the process that serves it.
struct Server<'a> {
    daemon: &'a Daemon,
    url: &'a str,
}

pub(super) fn run(bench: &Bench) -> Outcome<Vec<Table>> {
    bench.note("iscsi: preparing an image of 512 MiB");
    let file = bench.dir.path().join("iscsi.img");
    data::make(&file, DISK_BYTES, Filling::Random)?;
    let cluster = Cluster::start_with(bench, &["--iscsi-listen", "127.0.0.1:0"])?;
    cluster.add_image("image", &file)?;
    cluster.create("vm", "image")?;
    let volume = export(&cluster, "image:latest")?;
    let disk = export(&cluster, "vm")?;
    let node = cluster.node()?;
    let (volume, disk) = (Server { daemon: node, url: &volume }, Server { daemon: node, url: &disk });
    // Fetches every chunk into the cache group.
    let sequential = Load { access: Access::Read, shape: Shape::Sequential, depth: 4 };
    sequential.run(&volume)?;
    let peer = Peer::serve(bench, &file)?;

    let mut rows = Vec::new();
    for load in loads(Access::Read) {
        rows.push(compare(bench, "image volume", load, &volume, &peer)?);
    }
    // From here on both hold bytes of their own in every block.
    for server in [&disk, &peer.server()] {
        Load { access: Access::Write, ..sequential }.run(server)?;
    }
    for load in [Access::Read, Access::Write].into_iter().flat_map(loads) {
        rows.push(compare(bench, "written VM disk", load, &disk, &peer)?);
    }
    drop(peer);
    let against_tgt = Table {
        title: "Local reads and writes through iSCSI",
        notes: vec![
            format!("peer: tgtd with a raw file, as it is without options; disks of {} MiB", DISK_BYTES >> 20),
            "reads by iscsi-perf, writes by qemu-img bench, whose places are scattered and the same each time"
                .to_owned(),
            "CPU of the serving process: us per command of 4 KiB, ms per GiB of sequential access".to_owned(),
        ],
        cost_unit: "us or ms",
        rows,
    };
    Ok(vec![against_tgt, beside_hostiles(bench, &disk)?])
}

/// An honest initiator alone, which stands as the peer here, and beside hostile ones.
fn beside_hostiles(bench: &Bench, disk: &Server<'_>) -> Outcome<Table> {
    let address = address_of(disk.url)?;
    let target = disk.url.split('/').nth(3).unwrap_or_default();
    let load = |depth| Load { access: Access::Read, shape: Shape::Random, depth };
    let mut rows = Vec::new();
    let mut memory = Vec::new();
    for depth in [1, 32] {
        let what = format!("{} beside silent hostile sessions", load(depth).name());
        bench.note(&what);
        let beside = || {
            let _hostiles = Hostiles::connect(address, target)?;
            let sample = load(depth).run(disk)?;
            memory.push(disk.daemon.memory()?.resident_mib);
            Ok(sample)
        };
        let rounds = Rounds::take(bench.rounds, beside, || load(depth).run(disk))?;
        rows.push(rounds.row(what, "1000/s", Better::More));
    }
    let what = format!("{} beside connections that come as fast as they can", load(32).name());
    bench.note(&what);
    let beside = || {
        let _flood = Flood::begin(address);
        load(32).run(disk)
    };
    let rounds = Rounds::take(bench.rounds, beside, || load(32).run(disk))?;
    rows.push(rounds.row(what, "1000/s", Better::More));
    rows.push(Row::alone("resident memory of the node meanwhile", "MiB", Spread::of(memory)));
    Ok(Table {
        title: "An honest initiator beside hostile ones",
        notes: vec![
            format!("peer: the same initiator alone; hostile: {}", hostile::WHAT),
            "CPU of the node: us per command of the honest initiator".to_owned(),
        ],
        cost_unit: "us",
        rows,
    })
}

fn loads(access: Access) -> impl Iterator<Item = Load> {
    let shapes = [Shape::Random, Shape::Sequential].into_iter();
    shapes.flat_map(move |shape| [1, 32].map(|depth| Load { access, shape, depth }))
}

fn compare(bench: &Bench, name: &str, load: Load, ours: &Server<'_>, peer: &Peer) -> Outcome<Row> {
    let what = format!("{name}: {}", load.name());
    bench.note(&what);
    let rounds = Rounds::take(bench.rounds, || load.run(ours), || load.run(&peer.server()))?;
    let bar = if load.depth > 1 { BAR_DEEP } else { BAR_SINGLE };
    Ok(rounds.row(what, load.unit(), Better::More).with_bar(bar))
}

/// Exports a disk or an image to everybody; the address of its unit.
fn export(cluster: &Cluster<'_>, name: &str) -> Outcome<String> {
    output(cluster.virtman().args(["export", "add", name, "--anyone"]))?;
    let listed = output(cluster.virtman().args(["export", "list", "--json"]))?;
    let listed: serde_json::Value =
        serde_json::from_str(&listed).map_err(|e| format!("the list of exports: {e}"))?;
    let exports = listed.as_array().cloned().unwrap_or_default();
    let ours = exports.iter().find(|export| export["protocol"] == "iscsi" && export["name"] == name);
    let address = ours.and_then(|export| export["addresses"][0].as_str().map(str::to_owned));
    address.ok_or_else(|| format!("the node does not export '{name}' over iSCSI"))
}

/// The portal in `iscsi://HOST:PORT/TARGET/LUN`.
fn address_of(url: &str) -> Outcome<SocketAddr> {
    let address = url.strip_prefix("iscsi://").and_then(|rest| rest.split('/').next()?.parse().ok());
    address.ok_or_else(|| format!("'{url}' has no address"))
}

impl Load {
    /// The unit of the figures.
    fn unit(&self) -> &'static str {
        match self.shape {
            Shape::Random => "1000/s",
            Shape::Sequential => "MiB/s",
        }
    }

    /// For people.
    fn name(&self) -> String {
        let access = if self.access == Access::Read { "read" } else { "write" };
        let shape = if self.shape == Shape::Random { "4 KiB random" } else { "1 MiB sequential" };
        format!("{shape} {access}, depth {}", self.depth)
    }

    /// Puts the load on a server. The cost is the server's processor time in microseconds per command of
    /// 4 KiB, or in milliseconds per GiB of sequential access.
    fn run(&self, server: &Server<'_>) -> Outcome<Sample> {
        let before = server.daemon.cpu_seconds()?;
        let (rate, count) = match self.access {
            Access::Read => self.read(server.url)?,
            Access::Write => self.write(server.url)?,
        };
        let cpu_seconds = server.daemon.cpu_seconds()? - before;
        Ok(match self.shape {
            Shape::Random => Sample { value: rate / 1e3, cost: Some(cpu_seconds * 1e6 / count) },
            Shape::Sequential => Sample { value: rate, cost: Some(cpu_seconds * 1e3 * 1024.0 / count) },
        })
    }

    /// Commands per second, and how many there were.
    fn read(&self, url: &str) -> Outcome<(f64, f64)> {
        let mut command = Command::new("iscsi-perf");
        let blocks = if self.shape == Shape::Random { "8" } else { "2048" };
        command.args(["-m", &self.depth.to_string(), "-b", blocks, "-t", &SECONDS.to_string()]);
        if self.shape == Shape::Random {
            command.arg("-r");
        }
        let rate = average(&output(command.arg(url))?)?;
        Ok((rate, rate * f64::from(SECONDS)))
    }

    /// The same.
    fn write(&self, url: &str) -> Outcome<(f64, f64)> {
        // Far apart, and never at the same place twice in a run: a prime number of blocks.
        const STEP_BYTES: u64 = 17_257 * 4096;
        let (bytes, step, count) = match (self.shape, self.depth) {
            (Shape::Random, 1) => ("4096", STEP_BYTES, 20_000),
            (Shape::Random, _) => ("4096", STEP_BYTES, 100_000),
            (Shape::Sequential, _) => ("1048576", 1 << 20, 2_000),
        };
        let mut command = Command::new("qemu-img");
        command.args(["bench", "-w", "-f", "raw", "-t", "none", "-s", bytes, "-S", &step.to_string()]);
        command.args(["-d", &self.depth.to_string(), "-c", &count.to_string()]);
        let seconds = seconds(&output(command.arg(url))?)?;
        Ok((f64::from(count) / seconds, f64::from(count)))
    }
}

/// The last average that `iscsi-perf` prints.
fn average(printed: &str) -> Outcome<f64> {
    let last = printed.rsplit("iops average ").next().filter(|rest| rest.len() < printed.len());
    let number = last.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    number.filter(|rate| *rate > 0.0).ok_or_else(|| format!("iscsi-perf reports no rate: {printed}"))
}

/// The time that `qemu-img bench` reports.
fn seconds(printed: &str) -> Outcome<f64> {
    let time = printed.split("completed in ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let seconds = time.and_then(|text| text.parse::<f64>().ok()).filter(|seconds| *seconds > 0.0);
    seconds.ok_or_else(|| format!("qemu-img reports no time: {printed}"))
}

/// A `tgtd` with one file, which goes with it.
struct Peer {
    daemon: Daemon,
    url: String,
    file: PathBuf,
    /// The number of its control socket.
    control: String,
}

impl Peer {
    /// Serves a copy of `file`, all of it in memory.
    fn serve(bench: &Bench, file: &Path) -> Outcome<Peer> {
        let copy = bench.dir.path().join("peer.img");
        fs::copy(file, &copy).map_err(|e| format!("cannot copy {}: {e}", file.display()))?;
        warm(&copy)?;
        let address = free_address()?;
        // Its control socket has a number of its own below 32768, so that no other tgtd is met.
        let port = address.rsplit(':').next().and_then(|port| port.parse::<u32>().ok()).unwrap_or_default();
        let control = (port / 2).to_string();
        let portal = format!("portal={address}");
        let daemon = Daemon::spawn(Command::new("tgtd").args(["-f", "-C", &control, "--iscsi", &portal]))?;
        wait_for("tgtd", START_TIME_MAX, || TcpStream::connect(&address).ok())?;
        let url = format!("iscsi://{address}/{PEER_TARGET}/1");
        let peer = Peer { daemon, url, file: copy, control };
        let copy = peer.file.to_string_lossy().into_owned();
        for args in [
            ["--op", "new", "--mode", "target", "--tid", "1", "-T", PEER_TARGET].as_slice(),
            &["--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", &copy],
            &["--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"],
        ] {
            output(Command::new("tgtadm").args(["-C", &peer.control, "--lld", "iscsi"]).args(args))?;
        }
        Ok(peer)
    }

    fn server(&self) -> Server<'_> {
        Server { daemon: &self.daemon, url: &self.url }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Its room is wanted for the next; whatever is left goes with the directory.
        let _ = fs::remove_file(&self.file);
        // It leaves these when it is ended by a signal.
        for left in ["", ".lock"] {
            let _ = fs::remove_file(format!("/var/run/tgtd/socket.{}{left}", self.control));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_clients_print_is_understood() {
        let printed =
            "lba 1, iops current 5, iops average 6\r\niops average 70589 (275 MB/s)   \r\n\nfinished.\n";
        assert_eq!(average(printed), Ok(70589.0));
        assert!(average("connected").is_err());
        assert_eq!(seconds("Sending 5 write requests\nRun completed in 0.250 seconds.\n"), Ok(0.25));
        assert!(seconds("qemu-img: failed").is_err());
    }

    #[test]
    fn the_portal_is_found_in_an_address() {
        let address = address_of("iscsi://127.0.0.1:3260/iqn.2026-11.x:disk/0");
        assert_eq!(address, Ok(SocketAddr::from(([127, 0, 0, 1], 3260))));
        assert!(address_of("nbd://x").is_err());
    }
}
