//! What layers cost: a disk whose bytes lie below many layers, against one with a single layer of the same bytes.
//!
//! All bytes lie in the lowest layer, which is the worst case for a read: it looks through all others first. Writes go
//! to blocks that the topmost layer does not have, as they do after a snapshot. Both sides are made anew each round.

use std::time::Instant;

use serde_json::json;

use super::super::Outcome;
use super::super::data::{self, Filling};
use super::super::fio::{Access, Load, Server, Shape, Until};
use super::super::process::settle_disks;
use super::super::report::{Better, Rounds, Row, Sample, Table};
use super::Life;
use super::site::Site;

/// Size of the disks in bytes.
const DISK_BYTES: u64 = 256 << 20;

/// Layers of the disks that are compared with one of a single layer.
const LAYERS: [usize; 3] = [8, 32, 64];

/// How long one measurement takes.
const SECONDS: u32 = 1;

/// What is done with each disk, in this order.
const LOADS: [(Access, u32); 4] =
    [(Access::Read, 1), (Access::Read, 32), (Access::Write, 1), (Access::Write, 32)];

pub(super) fn run(life: &Life) -> Outcome<Table> {
    let begun = Instant::now();
    let file = life.dir.path().join("depth.img");
    data::make(&file, DISK_BYTES, Filling::Sparse(16))?;
    let site = Site::start(&life.virtman, life.dir.path(), &["o"])?;
    site.share(&["o"], "disk:1", &file)?;
    let mut rows: Vec<Row> = Vec::new();
    for layers in LAYERS {
        life.note(&format!("depth: {layers} layers"));
        let (mut deep, mut flat) = (Vec::new(), Vec::new());
        for round in 0..life.rounds {
            // Who begins changes every round.
            if round % 2 == 0 {
                deep.push(measure(&site, layers)?);
                flat.push(measure(&site, 1)?);
            } else {
                flat.push(measure(&site, 1)?);
                deep.push(measure(&site, layers)?);
            }
        }
        for (at, (access, depth)) in LOADS.into_iter().enumerate() {
            let load = load(access, depth);
            let side = |all: &[Vec<Sample>]| all.iter().map(|samples| samples[at]).collect();
            let name = format!("{layers} layers: {}", load.name());
            rows.push(Rounds::of(side(&deep), side(&flat)).row(name, load.unit(), Better::More));
        }
    }
    Ok(Table {
        title: "Reads and writes through many layers",
        notes: vec![
            format!(
                "disks of {} MiB, all bytes in the lowest layer; peer: VirtMan with one layer",
                DISK_BYTES >> 20
            ),
            "writes are the first ones to their blocks in the topmost layer; in the single layer they are not".to_owned(),
            format!("took {:.0} s", begun.elapsed().as_secs_f64()),
        ],
        cost_unit: "us",
        rows,
    })
}

fn load(access: Access, depth: u32) -> Load {
    let until = match access {
        Access::Read => Until::Seconds(SECONDS),
        Access::Write | Access::WriteFlushed => Until::OnceOrSeconds(SECONDS),
    };
    Load { access, shape: Shape::Random { depth }, until }
}

/// All loads on a new disk of so many layers.
fn measure(site: &Site<'_>, layers: usize) -> Outcome<Vec<Sample>> {
    let mut api = site.api("o")?;
    api.put("/v1/vms/v", &json!({ "image": "disk:1" }))?;
    let uri = site.disk("o", "v");
    let server = Server { daemon: site.daemon("o")?, uri: &uri };
    let fill = Load { access: Access::Write, shape: Shape::Sequential, until: Until::OnceOrSeconds(600) };
    fill.run(&server)?;
    for number in 1..layers {
        api.put(&format!("/v1/vms/v/snapshots/s{number}"), &json!({}))?;
    }
    settle_disks()?;
    let samples = LOADS.iter().map(|&(access, depth)| load(access, depth).run(&server)).collect();
    api.delete("/v1/vms/v")?;
    samples
}
