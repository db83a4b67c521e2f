//! Prefetching a whole image into the cache, so that its node needs no parent any more.
//!
//! Asked for with `image attach --fill`. It begins when the node attaches the image, or starts again with it, and
//! takes what the budget of background fetches leaves it; guests and boot profiles overtake it everywhere.
//!
//! Consistency: none to keep; what guests read does not depend on it. Retries: chunks that cannot be had are tried
//! again in the next pass. Cancellation: dropping a [`Prefetch`] ends it. Crash: what was fetched is in the cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{ChunkIndex, Priority};
use planner::Role;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::profile::FetchPath;
use control::api::compute::NodeFill;

/// Chunks that are gone through at a time: of a disk of any size no more than so many numbers are in memory.
const PIECE_CHUNKS: u64 = 4096;

/// Pause between two passes over an image of which something could not be had.
const PASS_PAUSE: Duration = Duration::from_secs(30);

/// One image that is being filled, or is full.
pub(crate) struct Prefetch {
    chunks: u64,
    resident: Arc<AtomicU64>,
    _stop: DropGuard,
}

impl Prefetch {
    /// Begins to fill. To be called within a runtime.
    pub(super) fn begin(path: FetchPath) -> Prefetch {
        let chunks = path.volume.root().chunk_count();
        let resident = Arc::new(AtomicU64::new(0));
        let stop = CancellationToken::new();
        let (here, stopped) = (Arc::clone(&resident), stop.clone());
        tokio::spawn(async move { stopped.run_until_cancelled(prefetch(path, chunks, &here)).await });
        Prefetch { chunks, resident, _stop: stop.drop_guard() }
    }

    /// How far it is.
    pub(super) fn describe(&self) -> NodeFill {
        NodeFill { chunks: self.chunks, resident: self.resident.load(Ordering::Relaxed) }
    }
}

async fn prefetch(path: FetchPath, chunks: u64, resident: &AtomicU64) {
    loop {
        if (path.role)() == Role::Origin {
            resident.store(chunks, Ordering::Relaxed);
            return;
        }
        resident.store(0, Ordering::Relaxed);
        let here = || {
            resident.fetch_add(1, Ordering::Relaxed);
        };
        let mut failed = 0;
        for first in (0..chunks).step_by(PIECE_CHUNKS as usize) {
            let piece: Vec<ChunkIndex> = (first..chunks.min(first + PIECE_CHUNKS)).map(ChunkIndex).collect();
            failed += path.stream(&piece, Priority::Background, here).await;
        }
        let image = path.volume.id().short();
        if failed == 0 {
            tracing::info!(image, chunks, "image_prefetched");
            return;
        }
        tracing::info!(image, failed, "prefetch_incomplete: some chunks cannot be had yet");
        tokio::time::sleep(PASS_PAUSE).await;
    }
}
