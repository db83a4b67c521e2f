//! Images: the Merkle manifest, the import of foreign formats, and verified reading.
//!
//! - [`RootPage`]: the few bytes that name and size a whole image; its hash is the [`ImageId`](block::ImageId).
//! - [`ImageVolume`]: an image as a read-only [`Disk`](block::Disk) over any [`ChunkSource`](block::ChunkSource).
//! - [`import()`]: reads a raw, qcow2, vmdk or vhdx file once and leaves a manifest beside it; [`import_remote`]
//!   does so with a disk that lies elsewhere.
//! - [`derive()`]: makes an image of a disk that differs in parts from another one; [`DerivedImage`] serves it.
//! - [`difference()`]: which chunks of one image differ from another's.
//! - [`write_qcow2()`]: a disk as a qcow2 file for other programs; [`Qcow2Layer`]: what such a file has of its own,
//!   and [`take_over()`]: that, written to another disk.
//! - [`BootProfile`]: in which order booting guests first touch the chunks; [`Recorder`] finds it out.
//! - [`OriginImage`]: serves the chunks of an imported image from that file or disk, as a `ChunkSource`.
//!
//! Invariants:
//! - Whoever knows the `ImageId` can trust every byte: the root page names the pages, the pages name the chunks.
//! - Equal content has one id, whatever format it came in and however it was stored there.
//! - Nothing that a file, a peer or a header says is followed out of the directories that the caller allows.
//! - This crate knows no network and no coordinator.

mod derived;
mod difference;
mod error;
mod export;
pub mod fuzz;
mod import;
mod index;
mod layout;
mod manifest;
mod origin;
mod page_cache;
mod pages;
mod pieces;
mod profile;
mod source;
mod stored;
mod take_over;
mod unfinished;
mod verify;
mod volume;

pub use derived::{DeriveRequest, Derived, DerivedDescription, DerivedImage, Kind, derive, kind};
pub use difference::{Difference, difference};
pub use error::ImportError;
pub use export::{BACKING_NAME_MAX, Backing, ExportError, Exported, Qcow2Request, write_qcow2};
pub use import::{ImportProgress, ImportRequest, Imported, RemoteRequest, import, import_remote};
pub use layout::{Keep, Novelty, list, remove, sweep};
pub use manifest::{ManifestError, ROOT_PAGE_BYTES_MAX, RootPage};
pub use origin::{Description, OpenError, OriginImage};
pub use profile::{BootProfile, PROFILE_BYTES_MAX, PROFILE_CHUNKS_MAX, ProfileError, Recorder};
pub use source::{FilePart, Format, LayerExtent, OpenRemote, ParseFormatError, Qcow2Layer, Remotes};
pub use take_over::{TakeOverError, take_over};
pub use verify::{VerifyError, VerifyReport};
pub use volume::ImageVolume;
