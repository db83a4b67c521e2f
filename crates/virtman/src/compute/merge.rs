//! Keeps chains of layers short, in the background.
//!
//! A frozen layer that no snapshot names and on which only one other stands is merged into that: the upper takes
//! over what it lacks of the lower, and then stands on what the lower stood on. Guests notice nothing.
//!
//! Consistency: what the disks read never changes; see [`store::Overlay::pull`]. Retries: for ever, with a pause.
//! Cancellation: may be dropped anywhere; what was taken over is kept. Crash: a merge that was not finished begins
//! anew, and passes over what was taken over and flushed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use block::Disk;

use super::layers::{Layers, Merge, Stands};

/// How long a merge that failed is left alone: somebody has to make room, most likely.
const RETRY_PAUSE: Duration = Duration::from_secs(10);

/// Merges what can be merged until dropped.
pub(super) async fn run(layers: &Layers) {
    let mut failed = BTreeMap::new();
    loop {
        let changed = layers.merges.notified();
        failed.retain(|_, at: &mut Instant| at.elapsed() < RETRY_PAUSE);
        // One that cannot be merged yet is in no other's way.
        let Some(merge) = layers.next_merge(|lower| !failed.contains_key(&lower)) else {
            if failed.is_empty() {
                changed.await;
            } else {
                // Whichever comes first, it is looked again.
                let _ = tokio::time::timeout(RETRY_PAUSE, changed).await;
            }
            continue;
        };
        match merge_one(layers, &merge).await {
            Ok((Stands::Gone, _)) => {}
            Ok((Stands::Anew, bytes)) => {
                tracing::info!(lower = %merge.lower.id(), upper = %merge.upper.id(), bytes, "layers merged");
            }
            Err(reason) => {
                tracing::warn!(lower = %merge.lower.id(), upper = %merge.upper.id(), reason, "layers cannot be merged yet");
                failed.insert(merge.lower.id(), Instant::now());
            }
        }
    }
}

/// Merges one layer into the one above it, unless that is removed meanwhile; says how many bytes that took.
async fn merge_one(layers: &Layers, merge: &Merge) -> Result<(Stands, u64), String> {
    let (lower, upper) = (merge.lower.overlay(), merge.upper.overlay());
    let mut bytes = 0;
    for range in lower.own_ranges() {
        bytes += upper.pull(range).await.map_err(|e| e.to_string())?;
    }
    upper.flush().await.map_err(|e| e.to_string())?;
    Ok((layers.merged(merge)?, bytes))
}
