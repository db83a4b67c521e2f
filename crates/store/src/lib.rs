//! Everything that must survive a crash: media, the cache group and overlays.
//!
//! - [`Media`]: the one seam to storage. [`FileMedia`] is a file or block device, [`MemoryMedia`] is for
//!   tests and simulation, [`faulty::FaultyMedia`] loses, tears and refuses what is written to it.
//! - [`CacheGroup`]: a node's chunk cache over several media, a [`ChunkSource`](block::ChunkSource) over
//!   any other.
//! - [`Overlay`]: a private, durable, writable [`Disk`](block::Disk) over a read-only one: a layer.
//! - [`durable`]: small files that are replaced as a whole.
//! - [`Chain`]: a VM's layers as the one disk that it sees, while layers are frozen and put on top.
//!
//! Invariants:
//! - No protocol is known here: nobody in this crate opens a socket or knows what a VM is.
//! - No buffer of a caller is ever seen by another thread, so a future may be dropped at any await.
//! - Opening, creating and removing block the calling thread; everything else is asynchronous, also adding media to
//!   a cache group and removing them.

mod asyncio;
mod cache;
mod chain;
pub mod durable;
pub mod faulty;
mod media;
mod overlay;

pub use cache::{CacheError, CacheGroup, CacheStats, MediaSpec, MediumState, MediumStatus};
pub use chain::{Chain, Frozen, SyncRecord};
pub use media::{FileMedia, Media, MemoryMedia, start_sync};
pub use overlay::{BootId, Freezing, NewOverlay, Overlay, OverlayError, OverlayMedia, OverlayStats};
