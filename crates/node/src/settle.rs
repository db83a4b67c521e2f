//! Lets clones stand on their own image, in the background.
//!
//! A layer on a derived image takes over the chunks in which that differs from the image that the clones are to
//! stand on, or from an older snapshot of the same disk; then it stands on the latter, and the derived image is given
//! up here. Until then whatever is missing is read from the derived image, by way of the hierarchy.
//!
//! Consistency: what the disks read never changes; see [`store::Overlay::stream_from_base`]. Retries: for ever, with a pause.
//! Cancellation: may be dropped anywhere; what was taken over is kept. Crash: it begins anew, and passes over what
//! was taken over and flushed.

use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{ChunkIndex, Disk, Priority};
use image::Difference;

use super::layers::{Settle, Stands};
use super::node::Node;

/// Pause after something could not be had: somebody has to mend something first.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Chunks that are fetched before they are taken over: enough to keep all parents busy.
const PIECE_CHUNKS: u64 = 256;

/// Settles what is to be settled until dropped.
pub(super) async fn run(node: &Node) {
    loop {
        let changed = node.vms.layers.settles.notified();
        let Some(settle) = tokio::task::block_in_place(|| node.vms.layers.next_settle()) else {
            // Or one could not be opened.
            let _ = tokio::time::timeout(RETRY_PAUSE, changed).await;
            continue;
        };
        match settle_one(node, &settle).await {
            Ok((stands, bytes)) => {
                if stands == Stands::Anew {
                    tracing::info!(layer = %settle.layer.id(), image = %settle.base.id.short(), bytes, "a clone has all of its own");
                }
                node.images.look.notify_one();
            }
            Err(reason) => {
                tracing::warn!(layer = %settle.layer.id(), reason, "a clone cannot get all of its own yet");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// Takes over what differs, unless the layer is removed meanwhile; says how many bytes that were.
async fn settle_one(node: &Node, settle: &Settle) -> Result<(Stands, u64), String> {
    let Settle { layer, image, base, .. } = settle;
    let size_bytes = image.root.size_bytes();
    let mut bytes = 0;
    let mut difference = Difference::new(&base.volume, &image.volume);
    while let Some(range) = difference.next().await.map_err(|e| e.to_string())? {
        for first in (range.start.0..range.end.0).step_by(PIECE_CHUNKS as usize) {
            let chunks: Vec<ChunkIndex> =
                (first..range.end.0.min(first + PIECE_CHUNKS)).map(ChunkIndex).collect();
            let failed = image.way().stream(&chunks, Priority::Background, || {}).await;
            if failed > 0 {
                return Err(format!("{failed} chunks of image {} cannot be had", image.id.short()));
            }
            let end = (first + chunks.len() as u64) * CHUNK_BYTES as u64;
            let piece = first * CHUNK_BYTES as u64..end.min(size_bytes);
            bytes += layer.overlay().stream_from_base(piece).await.map_err(|e| e.to_string())?;
        }
    }
    layer.flush().await.map_err(|e| e.to_string())?;
    Ok((node.vms.layers.settled(settle)?, bytes))
}
