//! The seam below an image: where its chunks come from.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;

use crate::{Chunk, ChunkHash, TryIo, WrongChunk};

/// How urgently a chunk is wanted. A more urgent request overtakes a less urgent one everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Nobody waits yet: filling, verifying, copying.
    Background,
    /// A booting guest is likely to ask soon.
    Profile,
    /// A guest waits.
    Guest,
}

/// Why a chunk could not be had. The variants are the caller's next moves.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// This source does not have the chunk and never will: ask another.
    #[error("chunk {0} is not to be had here")]
    NotHere(ChunkHash),
    /// The source cannot be asked just now: ask another, or try again later.
    #[error("the source of chunks cannot be reached: {0}")]
    Unreachable(String),
    /// The source holds or sent other bytes than the chunk's: blame it and ask another.
    #[error(transparent)]
    Wrong(#[from] WrongChunk),
    /// Reading local storage failed: log it and ask another.
    #[error("reading chunk {chunk} failed: {reason}")]
    Storage {
        /// The chunk that could not be read.
        chunk: ChunkHash,
        /// What the operating system or the image format said.
        reason: String,
    },
}

/// Where a source found a chunk the last time: a private note of the source, kept by the reader beside
/// the chunk's hash, so that the next read finds the chunk without a lookup. 0 means nothing is known.
/// A stale or foreign value is harmless: the source checks it.
#[derive(Debug, Default)]
pub struct SlotHint(AtomicU64);

impl SlotHint {
    /// The note, 0 if there is none.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Leaves a note for the next read.
    pub fn set(&self, note: u64) {
        self.0.store(note, Ordering::Relaxed);
    }
}

/// Verified immutable chunks of one image: an origin, a parent's link, a cache group over either.
///
/// Consistency: whatever comes is a [`Chunk`], hence verified. Retries: a source that can ask several
/// places does so itself; an error means that it is out of options. Cancellation: dropping the future
/// withdraws the request. [`ChunkHash::ZERO`] is never asked for; sources may answer it with
/// [`Chunk::zero`].
pub trait ChunkSource: Send + Sync {
    /// Gets a chunk from wherever it is, waiting as long as it takes.
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>>;

    /// Copies `buf.len()` bytes from `offset` within the chunk if that needs no waiting; else the chunk must
    /// be [fetched](ChunkSource::fetch), and what `buf` holds is undefined. Never blocks. `offset + buf.len()` is at most
    /// [`CHUNK_BYTES`](crate::limits::CHUNK_BYTES).
    fn try_read(&self, chunk: &ChunkHash, hint: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        let _ = (chunk, hint, offset, buf);
        TryIo::WouldBlock
    }
}
