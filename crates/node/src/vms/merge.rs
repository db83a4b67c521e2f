//! Keeps chains of layers short, in the background.
//!
//! A frozen layer that no snapshot names and on which only one other stands is merged with that: one of the two takes
//! over what the other holds, which is then left out and removed. Guests notice nothing. It is the one that holds more
//! that takes over, so that the work is that of the smaller. A layer that takes changes cannot be left out; below it a
//! much larger one stays, at most one for each disk.
//!
//! Consistency: what the disks read never changes; see [`store::Overlay::stream_from_base`] and
//! [`store::Overlay::commit_from`].
//! Retries: for ever, with a pause. Cancellation: may be dropped anywhere; what was taken over is kept. Crash: a merge
//! that was not finished begins anew, or is one of others.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use block::{Disk, VmName};

use super::snapshots::Snapshots;
use crate::layers::Layers;
use crate::layers::merging::{Merge, MergeDirection, Stands, merged_down, merged_up, next_merge};

/// How long a merge that failed is left alone: somebody has to make room, most likely.
const RETRY_PAUSE: Duration = Duration::from_secs(10);

/// Merges what can be merged until dropped.
pub(crate) async fn run(layers: &Layers, snapshots: &Snapshots) {
    let mut failed = BTreeMap::new();
    loop {
        let changed = layers.merges.notified();
        failed.retain(|_, at: &mut Instant| at.elapsed() < RETRY_PAUSE);
        // One that cannot be merged yet is in no other's way.
        let Some(merge) = next_merge(layers, |lower| !failed.contains_key(&lower)) else {
            if failed.is_empty() {
                changed.await;
            } else {
                // Whichever comes first, it is looked again.
                let _ = tokio::time::timeout(RETRY_PAUSE, changed).await;
            }
            continue;
        };
        let (lower, upper, direction) = (merge.lower.id(), merge.upper.id(), merge.direction);
        let merged = match direction {
            MergeDirection::Up => merge_up(layers, &merge).await,
            MergeDirection::Down => {
                let named = snapshots.vm_of(upper);
                // One that is being copied, or from which an image was derived: that may last.
                if !layers.is_held_by(upper, usize::from(named.is_some())) {
                    failed.insert(lower, Instant::now());
                    continue;
                }
                merge_down(layers, snapshots, &merge, named).await
            }
        };
        match merged {
            Ok((Stands::Gone, _)) => {}
            Ok((Stands::Anew, bytes)) => tracing::info!(%lower, %upper, ?direction, bytes, "layers_merged"),
            Err(reason) => {
                tracing::warn!(%lower, %upper, ?direction, reason, "layers_not_merged: it is tried again and again");
                failed.insert(lower, Instant::now());
            }
        }
    }
}

/// Merges a layer into the one above it, unless that is removed meanwhile; says how many bytes that took.
async fn merge_up(layers: &Layers, merge: &Merge) -> Result<(Stands, u64), String> {
    let (lower, upper) = (merge.lower.overlay(), merge.upper.overlay());
    let mut bytes = 0;
    for range in lower.own_ranges() {
        bytes += upper.stream_from_base(range).await.map_err(|e| e.to_string())?;
    }
    upper.flush().await.map_err(|e| e.to_string())?;
    Ok((merged_up(layers, merge)?, bytes))
}

/// Merges a layer into the one below it, unless it is removed meanwhile; says how many bytes that took. Nobody holds it
/// but the VM of which it is a snapshot, if it is one.
async fn merge_down(
    layers: &Layers,
    snapshots: &Snapshots,
    merge: &Merge,
    named: Option<VmName>,
) -> Result<(Stands, u64), String> {
    let (lower, upper) = (merge.lower.overlay(), merge.upper.overlay());
    upper.flush().await.map_err(|e| e.to_string())?;
    let mut bytes = 0;
    for range in upper.own_ranges() {
        bytes += lower.commit_from(upper, range).await.map_err(|e| e.to_string())?;
    }
    lower.flush().await.map_err(|e| e.to_string())?;
    // From here on both read the same, and either may be named.
    if let Some(vm) = named {
        snapshots.replace_layer(&vm, merge.upper.id(), merge.lower.id()).await.map_err(|e| e.to_string())?;
    }
    Ok((merged_down(layers, merge)?, bytes))
}
