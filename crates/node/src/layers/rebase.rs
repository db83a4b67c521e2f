//! Rebases clones onto their own image, in the background.
//!
//! A layer on a derived image takes over the chunks in which that differs from the image that the clones are to
//! stand on, or from an older snapshot of the same disk; then it is rebased onto the latter, and the derived image is
//! given up here. Until then whatever is missing is read from the derived image, by way of the hierarchy.
//!
//! Consistency: what the disks read never changes; see [`store::Overlay::stream_from_base`]. Retries: for ever, with a
//! pause. Cancellation: may be dropped anywhere; what was taken over is kept. Crash: it begins anew, and passes over what
//! was taken over and flushed.

use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{ChunkIndex, Disk, Priority};
use image::Difference;

use super::Layers;
use super::merging::{Rebase, Stands, next_rebase, rebased};

/// Pause after something could not be had: somebody has to mend something first.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Chunks that are fetched before they are taken over: enough to keep all parents busy.
const PIECE_CHUNKS: u64 = 256;

/// Rebases what is to be rebased until dropped.
pub(crate) async fn run(layers: &Layers) {
    loop {
        let changed = layers.rebases.notified();
        let Some(rebase) = tokio::task::block_in_place(|| next_rebase(layers)) else {
            // Or one could not be opened.
            let _ = tokio::time::timeout(RETRY_PAUSE, changed).await;
            continue;
        };
        match rebase_one(layers, &rebase).await {
            Ok((stands, bytes)) => {
                if stands == Stands::Anew {
                    tracing::info!(layer = %rebase.layer.id(), image = %rebase.base.id.short(), bytes, "layer_rebased");
                }
                layers.images.look.notify_one();
            }
            Err(reason) => {
                tracing::warn!(layer = %rebase.layer.id(), reason, "layer_not_rebased: it is tried again and again");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }
}

/// Takes over what differs, unless the layer is removed meanwhile; says how many bytes that were.
async fn rebase_one(layers: &Layers, rebase: &Rebase) -> Result<(Stands, u64), String> {
    let Rebase { layer, image, base, .. } = rebase;
    let size_bytes = image.root.size_bytes();
    let mut bytes = 0;
    let mut difference = Difference::new(&base.volume, &image.volume);
    while let Some(range) = difference.next().await.map_err(|e| e.to_string())? {
        for first in (range.start.0..range.end.0).step_by(PIECE_CHUNKS as usize) {
            let chunks: Vec<ChunkIndex> =
                (first..range.end.0.min(first + PIECE_CHUNKS)).map(ChunkIndex).collect();
            let failed = image.path().stream(&chunks, Priority::Background, || {}).await;
            if failed > 0 {
                return Err(format!("{failed} chunks of image {} cannot be had", image.id.short()));
            }
            let end = (first + chunks.len() as u64) * CHUNK_BYTES as u64;
            let piece = first * CHUNK_BYTES as u64..end.min(size_bytes);
            bytes += layer.overlay().stream_from_base(piece).await.map_err(|e| e.to_string())?;
        }
    }
    layer.flush().await.map_err(|e| e.to_string())?;
    Ok((rebased(layers, rebase)?, bytes))
}
