//! How long a snapshot holds up whoever writes: by what the node says of itself, and as the client sees it.
//!
//! The peer is `qemu-storage-daemon` with an external qcow2 snapshot (`blockdev-snapshot-sync`) of a qcow2 disk, which
//! also makes the disk durable before. Both have an image of the same bytes below, both hear of the snapshot over a
//! socket that is open already, and the same client writes to both. Disks are new, so that writes go to blocks that
//! nobody wrote before.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::super::Outcome;
use super::super::data::{self, Filling};
use super::super::http::Api;
use super::super::process::{Daemon, output, settle_disks, wait_for};
use super::Life;
use super::figures::{Figures, Sheet};
use super::load::{Pace, Write, Writer};
use super::site::Site;

/// Size of the disks in bytes.
const DISK_BYTES: u64 = 1 << 30;

/// Layers below the one that is written to, when the first snapshot of a disk is taken.
const BELOW: [usize; 3] = [0, 8, 32];

/// What is written meanwhile.
const PACES: [Pace; 3] = [Pace::Idle, Pace::PerSecond(1000), Pace::Full];

/// Snapshots of one disk: each leaves one more layer.
const SNAPSHOTS: usize = 10;

/// From one snapshot to the next, and from the client's start to the first.
const INTERVAL: Duration = Duration::from_millis(100);

/// How long the peer may take until it listens.
const START_TIME_MAX: Duration = Duration::from_secs(10);

/// What all disks of one kind gave.
#[derive(Default)]
struct Taken {
    /// From the request to the answer.
    requests_ms: Vec<f64>,
    /// As the node says, if it does.
    pauses_ms: Vec<f64>,
    /// The longest write of each snapshot that was under way between request and answer.
    longest_ms: Vec<f64>,
    /// All writes that were not.
    others_ms: Vec<f64>,
}

pub(super) fn run(life: &Life) -> Outcome<Sheet> {
    let begun = Instant::now();
    let file = life.dir.path().join("pause.img");
    data::make(&file, DISK_BYTES, Filling::Sparse(16))?;
    let site = Site::start(&life.virtman, life.dir.path(), &["o"])?;
    site.share(&["o"], "disk:1", &file)?;
    let mut rows = Vec::new();
    for pace in PACES {
        for below in BELOW {
            life.note(&format!("pause: {}, {below} layers below", pace.name()));
            let (mut ours, mut peer) = (Taken::default(), Taken::default());
            for round in 0..life.rounds {
                settle_disks()?;
                let mut disk = OurDisk::make(&site, &format!("v{round}"), below)?;
                take_all(&life.runtime, &mut disk, pace, &mut ours)?;
                settle_disks()?;
                let mut disk = PeerDisk::make(life.dir.path(), &file, below)?;
                take_all(&life.runtime, &mut disk, pace, &mut peer)?;
            }
            let name = format!("{}; {below} layers", pace.name());
            rows.push((format!("{name}: VirtMan"), ours.cells()));
            rows.push((format!("{name}: qemu-storage-daemon"), peer.cells()));
        }
    }
    Ok(Sheet {
        title: "Pause of a snapshot, ms".to_owned(),
        notes: vec![
            format!(
                "{} disks each, with {SNAPSHOTS} snapshots each, {INTERVAL:?} apart; the layers are those below at the first one",
                life.rounds
            ),
            "peer: blockdev-snapshot-sync of a qcow2 disk by qemu-storage-daemon".to_owned(),
            "p50 / p99 / max".to_owned(),
        ],
        columns: vec!["pause", "longest write meanwhile", "request", "other writes"],
        rows,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

impl Taken {
    fn cells(self) -> Vec<Option<Figures>> {
        [self.pauses_ms, self.longest_ms, self.requests_ms, self.others_ms].map(Figures::of).into()
    }

    fn add(&mut self, writes: &[Write], requests: &[(Instant, Instant)]) {
        for &(from, to) in requests {
            self.requests_ms.push((to - from).as_secs_f64() * 1e3);
            let longest = writes.iter().filter(|write| write.was_within(from, to)).map(Write::millis);
            self.longest_ms.extend(longest.reduce(f64::max));
        }
        let is_other = |write: &&Write| !requests.iter().any(|&(from, to)| write.was_within(from, to));
        self.others_ms.extend(writes.iter().filter(is_other).map(Write::millis));
    }
}

/// A disk of which snapshots can be taken.
trait Snapshots {
    fn uri(&self) -> String;

    /// Takes one; the pause that it says, in milliseconds.
    fn take(&mut self) -> Outcome<Option<f64>>;
}

fn take_all(runtime: &Runtime, disk: &mut dyn Snapshots, pace: Pace, taken: &mut Taken) -> Outcome {
    let writer = Writer::start(runtime, &disk.uri(), pace)?;
    let mut requests = Vec::new();
    for _ in 0..SNAPSHOTS {
        std::thread::sleep(INTERVAL);
        let from = Instant::now();
        taken.pauses_ms.extend(disk.take()?);
        requests.push((from, Instant::now()));
    }
    std::thread::sleep(INTERVAL);
    taken.add(&writer.stop()?, &requests);
    Ok(())
}

/// A VM's disk; it goes with its value.
struct OurDisk<'a> {
    site: &'a Site<'a>,
    api: Api,
    vm: String,
    number: usize,
}

impl<'a> OurDisk<'a> {
    fn make(site: &'a Site<'a>, vm: &str, below: usize) -> Outcome<OurDisk<'a>> {
        let mut api = site.api("o")?;
        api.put(&format!("/v1/vms/{vm}"), &json!({ "image": "disk:1" }))?;
        let mut disk = OurDisk { site, api, vm: vm.to_owned(), number: 0 };
        for _ in 0..below {
            disk.take()?;
        }
        Ok(disk)
    }
}

impl Snapshots for OurDisk<'_> {
    fn uri(&self) -> String {
        self.site.disk("o", &self.vm)
    }

    fn take(&mut self) -> Outcome<Option<f64>> {
        self.number += 1;
        let path = format!("/v1/vms/{}/snapshots/s{}", self.vm, self.number);
        let taken = self.api.put(&path, &json!({ "quiesce": false }))?;
        let pause_us = taken["pause_us"].as_f64().ok_or("a snapshot says nothing of its pause")?;
        Ok(Some(pause_us / 1e3))
    }
}

impl Drop for OurDisk<'_> {
    fn drop(&mut self) {
        // If it cannot be removed, the next one has another name.
        let _ = self.api.delete(&format!("/v1/vms/{}", self.vm));
    }
}

/// A qcow2 disk of `qemu-storage-daemon`; its files go with its value.
struct PeerDisk {
    dir: PathBuf,
    qmp: BufReader<UnixStream>,
    number: usize,
    _daemon: Daemon,
}

impl PeerDisk {
    fn make(dir: &Path, image: &Path, below: usize) -> Outcome<PeerDisk> {
        let dir = dir.join("peer");
        fs::create_dir(&dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let top = dir.join("s0.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(image).arg(&top);
        output(&mut create)?;
        let (socket, qmp) = (dir.join("nbd"), dir.join("qmp"));
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev").arg(format!(
            "driver=qcow2,node-name=s0,discard=unmap,file.driver=file,file.filename={},file.aio=threads",
            top.display()
        ));
        command.arg("--chardev").arg(format!("socket,id=qmp,server=on,wait=off,path={}", qmp.display()));
        command.args(["--monitor", "chardev=qmp"]);
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=disk,node-name=s0,name=disk,writable=on"]);
        let daemon = Daemon::spawn(&mut command)?;
        wait_for("qemu-storage-daemon", START_TIME_MAX, || UnixStream::connect(&socket).ok())?;
        let qmp = UnixStream::connect(&qmp).map_err(|e| format!("{}: {e}", qmp.display()))?;
        let mut disk = PeerDisk { dir, qmp: BufReader::new(qmp), number: 0, _daemon: daemon };
        disk.execute("qmp_capabilities", &json!({}))?;
        for _ in 0..below {
            disk.take()?;
        }
        Ok(disk)
    }

    fn execute(&mut self, command: &str, arguments: &Value) -> Outcome {
        let failed = |e: std::io::Error| format!("{command}: {e}");
        let request = json!({ "execute": command, "arguments": arguments });
        self.qmp.get_mut().write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
        loop {
            let mut line = String::new();
            if self.qmp.read_line(&mut line).map_err(failed)? == 0 {
                return Err(format!("{command}: qemu-storage-daemon has ended"));
            }
            let answer: Value = serde_json::from_str(&line).map_err(|e| format!("{command}: {e}"))?;
            if !answer["error"].is_null() {
                return Err(format!("{command}: {}", answer["error"]["desc"]));
            }
            // All else are events, and the greeting.
            if !answer["return"].is_null() {
                return Ok(());
            }
        }
    }
}

impl Snapshots for PeerDisk {
    fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.dir.join("nbd").display())
    }

    fn take(&mut self) -> Outcome<Option<f64>> {
        let (old, new) = (format!("s{}", self.number), format!("s{}", self.number + 1));
        let arguments = json!({
            "node-name": old,
            "snapshot-node-name": new,
            "snapshot-file": self.dir.join(format!("{new}.qcow2")),
            "format": "qcow2",
        });
        self.execute("blockdev-snapshot-sync", &arguments)?;
        self.number += 1;
        Ok(None)
    }
}

impl Drop for PeerDisk {
    fn drop(&mut self) {
        // Its room is wanted for the next; whatever is left goes with the directory.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
