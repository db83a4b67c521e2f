//! How soon a node far below the origin can read: an attach at the end of a chain.

use std::fs;
use std::path::Path;
use std::time::Instant;

use block::Disk;
use nbd::client::{Client, Options};
use serde::Serialize;

use super::super::Outcome;
use super::super::process::Virtman;
use super::content::{CHUNK, word};
use super::network::Rate;
use super::ours::blocking;
use super::plan::{Boot, Plan, Profile};
use super::site::Site;

/// Steps between the last node and the origin.
const DEPTH: usize = 7;

/// Eight links of this speed are what the machine carries. At a storm's 90 Mbit/s a chunk alone takes 6 ms a
/// step, and links would be measured instead of programs.
const CHAIN_RATE: Rate = Rate { mbit: 375.0 };

/// How long an attach may take until the first chunk, in milliseconds.
const ATTACH_MS_MAX: f64 = 50.0;

/// The last attach of the chain, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Attach {
    depth: usize,
    /// From the request until its answer.
    answered_ms: f64,
    /// From the request until a chunk that no node had yet was read.
    first_chunk_ms: f64,
}

/// Attaches node after node, each below the one before. What counts is the last.
pub(super) async fn measure(
    virtman: &Virtman,
    files: &Path,
    plan: &Plan,
    image: &Path,
    boot: &Boot,
) -> Outcome<Attach> {
    let plan = Plan { nodes: DEPTH, racks: 0, rate: CHAIN_RATE, profile: Profile::None, ..plan.clone() };
    let dir = files.join("chain");
    let site = Site::start(virtman, &dir, &plan, image)?;
    let mut measured = Attach { depth: 0, answered_ms: 0.0, first_chunk_ms: 0.0 };
    for (depth, node) in site.nodes().into_iter().enumerate() {
        let begin = Instant::now();
        let attaching = node.clone();
        let answer = blocking(move || attaching.attach()).await?;
        let answered_ms = begin.elapsed().as_secs_f64() * 1e3;
        let uri = answer["export"].as_str().unwrap_or_default();
        let uri = uri.parse().map_err(|e| format!("the volume of {}: {e}", node.name))?;
        let client = Client::connect_uri(&uri, Options::default()).await.map_err(|e| e.to_string())?;
        let chunk = boot.chunks[depth % boot.chunks.len()];
        let mut buf = [0; 4096];
        client.read(chunk * CHUNK, &mut buf).await.map_err(|e| e.to_string())?;
        let first_chunk_ms = begin.elapsed().as_secs_f64() * 1e3;
        measured = Attach { depth: depth + 1, answered_ms, first_chunk_ms };
        if buf[..8] != word(plan.seed, chunk * CHUNK / 8).to_le_bytes() {
            return Err(format!("node {} reads wrong bytes", node.name));
        }
    }
    drop(site);
    fs::remove_dir_all(&dir).map_err(|e| format!("cannot remove {}: {e}", dir.display()))?;
    Ok(measured)
}

impl Attach {
    /// For people.
    pub(super) fn print(&self) {
        let verdict = if self.first_chunk_ms <= ATTACH_MS_MAX { "holds" } else { "does NOT hold" };
        println!(
            "attach at depth {} (links of {} Mbit/s): answered after {:.1} ms, first chunk, through all nodes above, after {:.1} ms (at most {ATTACH_MS_MAX} ms: {verdict})",
            self.depth, CHAIN_RATE.mbit, self.answered_ms, self.first_chunk_ms
        );
    }
}
