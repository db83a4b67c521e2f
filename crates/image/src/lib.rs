//! Images: the Merkle manifest, the import of foreign formats, and verified reading.
//!
//! - [`RootPage`]: the few bytes that name and size a whole image; its hash is the [`ImageId`](block::ImageId).
//! - [`ImageVolume`]: an image as a read-only [`Disk`](block::Disk) over any [`ChunkSource`](block::ChunkSource).
//! - [`import`]: reads a raw, qcow2, vmdk or vhdx file once and leaves a manifest beside it.
//! - [`OriginImage`]: serves the chunks of an imported image from that file, as a `ChunkSource`.
//!
//! Invariants:
//! - Whoever knows the `ImageId` can trust every byte: the root page names the pages, the pages name the chunks.
//! - Equal content has one id, whatever format it came in and however it was stored there.
//! - Nothing that a file, a peer or a header says is followed out of the directories that the caller allows.
//! - This crate knows no network and no coordinator.

pub mod fuzz;
mod manifest;
mod page_cache;
mod volume;

pub use manifest::{ManifestError, ROOT_PAGE_BYTES_MAX, RootPage};
pub use volume::ImageVolume;
