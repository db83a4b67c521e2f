//! The nouns of VirtMan and the two seams that everything else meets at.
//!
//! - [`ChunkHash`], [`Chunk`], [`ImageId`], [`ChunkIndex`], [`Geometry`]: what an image is made of.
//! - [`NodeName`], [`VmName`], [`SnapshotName`], [`ImageName`]: names that came from outside and passed the allow-list.
//! - [`DiskId`]: which disk of a VM or a platform it is.
//! - [`ChunkSource`]: verified, immutable chunks. [`Disk`]: a byte-addressed virtual disk.
//! - [`Backoff`]: pauses between attempts.
//! - [`limits`]: every bound that more than one crate must agree on.
//!
//! Invariants:
//! - A [`Chunk`] exists only if its bytes hash to its name. Holding one *is* the proof of verification.
//! - Nothing here knows sockets, files, clocks or an async runtime.

mod backoff;
mod chunk;
mod disk;
mod disk_id;
mod geometry;
pub mod limits;
mod name;
mod source;

pub use backoff::Backoff;
pub use chunk::{Chunk, ChunkHash, ImageId, ParseHashError, WrongChunk};
pub use disk::{Access, Disk, DiskError, Extent, ExtentKind, TryIo};
pub use disk_id::{DiskId, ParseDiskIdError};
pub use futures_util::future::BoxFuture;
pub use geometry::{ChunkIndex, Geometry};
pub use name::{ImageName, NameError, NodeName, SnapshotName, VmName};
pub use source::{ChunkSource, FetchError, Priority, SlotHint};
