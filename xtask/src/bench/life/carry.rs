//! What a clone on another node moves, against what its VM wrote, and how soon it is of use.
//!
//! The image's origin is a third node, and both nodes have none of the image's chunks, so that each chunk that the
//! clone reads crosses the network: what a VM wrote in part, its node completes from the image first. Bytes on the wire
//! are those that the VM's node sent, their heads and encryption included; stored ones are the room that layers take.

use std::time::{Duration, Instant};

use block::Disk;
use rand::rngs::SmallRng;
use rand::seq::index::sample;
use rand::{RngCore, SeedableRng};

use super::super::Outcome;
use super::super::data::{self, Filling};
use super::Life;
use super::figures::{Figures, Sheet};
use super::load::open;
use super::site::Site;

/// Size of the disks in bytes.
const DISK_BYTES: u64 = 1 << 30;

/// How long a clone may take until it needs nobody but its image.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(120);

/// What a VM writes: random bytes, which nothing compresses, at so many different places.
struct Pattern {
    name: &'static str,
    write_bytes: usize,
    writes: usize,
    order: Order,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Sequential,
    Random,
}

const PATTERNS: [Pattern; 3] = [
    Pattern {
        name: "64 MiB one behind the other",
        write_bytes: 1 << 20,
        writes: 64,
        order: Order::Sequential,
    },
    Pattern {
        name: "64 KiB at 1,024 random places",
        write_bytes: 64 << 10,
        writes: 1024,
        order: Order::Random,
    },
    Pattern {
        name: "4 KiB at 4,096 random places",
        write_bytes: 4 << 10,
        writes: 4096,
        order: Order::Random,
    },
];

/// What one clone gave.
#[derive(Default)]
struct Figured {
    wire: Vec<f64>,
    stored: Vec<f64>,
    open_ms: Vec<f64>,
    read_ms: Vec<f64>,
    settled_ms: Vec<f64>,
}

pub(super) fn run(life: &Life) -> Outcome<Sheet> {
    let begun = Instant::now();
    let file = life.dir.path().join("carry.img");
    data::make(&file, DISK_BYTES, Filling::Random)?;
    let mut rows = Vec::new();
    for pattern in &PATTERNS {
        life.note(&format!("carry: {}", pattern.name));
        let mut all = Figured::default();
        for round in 0..life.rounds {
            clone_one(life, &file, pattern, u64::from(round), &mut all)?;
        }
        let Figured { wire, stored, open_ms, read_ms, settled_ms } = all;
        let cells = [wire, stored, open_ms, read_ms, settled_ms].map(Figures::of);
        rows.push((pattern.name.to_owned(), cells.into()));
    }
    Ok(Sheet {
        title: "A clone on another node".to_owned(),
        notes: vec![
            format!(
                "{} clones each, of disks of {} MiB; times from the command's start",
                life.rounds,
                DISK_BYTES >> 20
            ),
            "p50 / max; bytes are multiples of what the VM wrote".to_owned(),
        ],
        columns: vec![
            "bytes on the wire",
            "bytes stored",
            "can be opened, ms",
            "first read, ms",
            "needs only its image, ms",
        ],
        rows,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Everything is new each time, so that no cache knows the chunks.
fn clone_one(
    life: &Life,
    file: &std::path::Path,
    pattern: &Pattern,
    seed: u64,
    all: &mut Figured,
) -> Outcome {
    let site = Site::start(&life.virtman, life.dir.path(), &["o", "a", "b"])?;
    site.share(&["o", "a", "b"], "disk:1", file)?;
    site.run(&["--node", "a", "create", "v", "--image", "disk:1"])?;
    let place = life.runtime.block_on(write(&site.disk("a", "v"), pattern, seed))?;
    let written = (pattern.write_bytes * pattern.writes) as f64;
    let (sent, stored) = (site.sent_bytes("a")?, site.layer_bytes("b")?);

    let begun = Instant::now();
    let millis = || begun.elapsed().as_secs_f64() * 1e3;
    site.run(&["clone", "v", "--to", "b", "--name", "w"])?;
    all.open_ms.push(millis());
    life.runtime.block_on(read(&site.disk("b", "w"), place))?;
    all.read_ms.push(millis());
    site.wait_settled("b", "disk:1", SETTLE_TIME_MAX)?;
    all.settled_ms.push(millis());
    site.wait_at_rest("b", SETTLE_TIME_MAX)?;
    all.wire.push((site.sent_bytes("a")? - sent) as f64 / written);
    all.stored.push((site.layer_bytes("b")? - stored) as f64 / written);
    Ok(())
}

/// Writes what the pattern says, and gives one of the places.
async fn write(uri: &str, pattern: &Pattern, seed: u64) -> Outcome<u64> {
    let disk = open(uri).await?;
    let mut random = SmallRng::seed_from_u64(seed);
    let places = DISK_BYTES as usize / pattern.write_bytes;
    let chosen: Vec<usize> = match pattern.order {
        Order::Sequential => (0..pattern.writes).collect(),
        Order::Random => sample(&mut random, places, pattern.writes).into_vec(),
    };
    let mut bytes = vec![0; pattern.write_bytes];
    let mut last = 0;
    for place in chosen {
        random.fill_bytes(&mut bytes);
        last = (place * pattern.write_bytes) as u64;
        disk.write(last, &bytes).await.map_err(|e| format!("a write failed: {e}"))?;
    }
    disk.flush().await.map_err(|e| format!("a flush failed: {e}"))?;
    Ok(last)
}

async fn read(uri: &str, at: u64) -> Outcome {
    let disk = open(uri).await?;
    disk.read(at, &mut [0; 4096]).await.map_err(|e| format!("a read failed: {e}"))
}
