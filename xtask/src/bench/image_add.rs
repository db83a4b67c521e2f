//! Adding an image against reading its file and against hashing it.
//!
//! What is timed is the whole command of each, from its start to its end; `virtman image add` includes the
//! request to the node, the manifest on disk and the entry in Volt's catalog.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::cluster::Cluster;
use super::data::{self, Filling};
use super::process::{output, settle_disks, warm};
use super::report::{Better, Rounds, Row, Sample, Table};
use super::{Bench, Outcome};

/// Size of the images in bytes.
const IMAGE_BYTES: u64 = 2 << 30;

pub(super) fn run(bench: &Bench) -> Outcome<Table> {
    let cluster = Cluster::start(bench)?;
    let file = bench.dir.path().join("add.img");
    let mut rows = Vec::new();
    for (name, filling) in [("full image", Filling::Random), ("sparse image", Filling::Sparse(16))] {
        bench.note(&format!("image-add: {name} of 2 GiB"));
        data::make(&file, IMAGE_BYTES, filling)?;
        warm(&file)?;
        for peer in [["cat"], ["b3sum"]] {
            rows.push(compare(bench, &cluster, name, &file, peer[0])?);
        }
    }
    std::fs::remove_file(&file).map_err(|e| format!("cannot remove {}: {e}", file.display()))?;
    Ok(Table {
        title: "Adding a raw image that is in the page cache",
        notes: vec![
            "'cat FILE > /dev/null' reads and does nothing else; b3sum hashes with all cores".to_owned(),
            "the sparse image has data in one of 16 pieces of 4 MiB; GB of virtual size".to_owned(),
        ],
        cost_unit: "-",
        rows,
    })
}

fn compare(bench: &Bench, cluster: &Cluster<'_>, name: &str, file: &Path, peer: &str) -> Outcome<Row> {
    let ours = || {
        settle_disks()?;
        let sample = timed(cluster.virtman().args(["image", "add", "image"]).arg(file))?;
        output(cluster.virtman().args(["image", "remove", "image"]))?;
        Ok(sample)
    };
    let peer_runs = || {
        settle_disks()?;
        timed(Command::new(peer).arg(file))
    };
    let rounds = Rounds::take(bench.rounds, ours, peer_runs)?;
    Ok(rounds.row(format!("{name}: virtman image add / {peer}"), "GB/s", Better::More))
}

/// Runs a command with its output thrown away, and tells how many GB of image it went through in a second.
fn timed(command: &mut Command) -> Outcome<Sample> {
    let name = command.get_program().to_string_lossy().into_owned();
    let null = File::options().write(true).open("/dev/null").map_err(|e| format!("/dev/null: {e}"))?;
    command.stdin(Stdio::null()).stdout(null).stderr(Stdio::null());
    let begin = Instant::now();
    let status = command.status().map_err(|e| format!("cannot run {name}: {e}"))?;
    let seconds = begin.elapsed().as_secs_f64();
    if !status.success() {
        return Err(format!("{name} failed ({status})"));
    }
    Ok(Sample { value: IMAGE_BYTES as f64 / 1e9 / seconds, cost: None })
}
