//! Boot profiles: in which order a booting guest first touched which chunks.
//!
//! - [`BootProfile`]: the order itself, and its file form ([`BootProfile::encode`], `docs/formats/profile.md`).
//! - [`Recorder`]: notes the first touches of one VM while it boots.
//! - [`BootProfile::merged`]: one profile from the records of several boots.
//!
//! Invariants: a profile has 1 to [`PROFILE_CHUNKS_MAX`] chunks, each once, and none that no disk can have. It is a
//! hint: with a wrong one chunks are fetched that nobody reads, and no byte that a guest reads is another.
//! Pure: no clock, no I/O; whoever records decides when a boot is over.

mod file;
mod merge;
mod recorder;

use std::collections::HashSet;

use block::limits::{CHUNK_BYTES, DISK_BYTES_MAX};
use block::{ChunkIndex, Geometry, ImageId};

use crate::RootPage;

pub use file::PROFILE_BYTES_MAX;
pub use recorder::Recorder;

/// Most chunks in a profile: 1 GiB of data. A Debian boot touches 1,700, a Windows boot 9,000; beyond that
/// the guest works and boots no more, and what it reads is no longer common to all guests.
pub const PROFILE_CHUNKS_MAX: usize = 16_384;

/// Chunks of the largest disk: no index in a profile is as high.
const CHUNKS_MAX: u64 = DISK_BYTES_MAX / CHUNK_BYTES as u64;

/// The order in which booting guests first touch the chunks of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootProfile {
    image: ImageId,
    chunks: Box<[ChunkIndex]>,
}

/// What is not a boot profile, or none for this image. The texts are for whoever named the file; to a program
/// all variants mean the same: do not use it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// The bytes are something else.
    #[error("this is not a boot profile: it does not begin with a boot profile's magic")]
    Magic,
    /// A later version of the format.
    #[error("the boot profile has version {0}, but only version {version} is known here: use a newer virtman", version = file::VERSION)]
    Version(u16),
    /// The bytes end too early, go on too long, or are not in the one form that is allowed.
    #[error("the boot profile is damaged: {0}; export it again")]
    Damaged(&'static str),
    /// It names no chunk.
    #[error("the boot profile is empty: it names no chunk")]
    Empty,
    /// It names more chunks than it may.
    #[error("the boot profile names {0} chunks; it may have {PROFILE_CHUNKS_MAX}")]
    TooMany(u64),
    /// It names a chunk twice.
    #[error("the boot profile names chunk {0} twice")]
    Repeated(u64),
    /// It names a chunk that the image, or any image, does not have.
    #[error("the boot profile names chunk {chunk}, but there are {chunks}")]
    Beyond {
        /// The chunk.
        chunk: u64,
        /// How many there are.
        chunks: u64,
    },
    /// It is another image's.
    #[error(
        "the boot profile is one of image {found}, not of image {wanted}: profiles fit the very image that they were recorded on"
    )]
    OtherImage {
        /// The image that the profile belongs to.
        found: ImageId,
        /// The image that it should belong to.
        wanted: ImageId,
    },
}

impl BootProfile {
    /// A profile of these chunks, the one that is touched first at the front.
    ///
    /// # Errors
    /// There are none or too many, one comes twice, or lies beyond every disk.
    pub fn new(image: ImageId, chunks: Vec<ChunkIndex>) -> Result<BootProfile, ProfileError> {
        if chunks.is_empty() {
            return Err(ProfileError::Empty);
        }
        if chunks.len() > PROFILE_CHUNKS_MAX {
            return Err(ProfileError::TooMany(chunks.len() as u64));
        }
        let mut seen = HashSet::with_capacity(chunks.len());
        for &chunk in &chunks {
            if chunk.0 >= CHUNKS_MAX {
                return Err(ProfileError::Beyond { chunk: chunk.0, chunks: CHUNKS_MAX });
            }
            if !seen.insert(chunk) {
                return Err(ProfileError::Repeated(chunk.0));
            }
        }
        Ok(BootProfile { image, chunks: chunks.into() })
    }

    /// The profile of a guest that reads these ranges of its disk, each an offset and a length in bytes, one
    /// after the other. Touches beyond the first [`PROFILE_CHUNKS_MAX`] chunks are left out.
    ///
    /// # Errors
    /// There is no read, or one lies beyond every disk.
    pub fn of_reads(
        image: ImageId,
        reads: impl IntoIterator<Item = (u64, usize)>,
    ) -> Result<BootProfile, ProfileError> {
        let touched = reads.into_iter().flat_map(|(offset, len)| Geometry::split(offset, len));
        let mut seen = HashSet::new();
        let first = touched.map(|(chunk, _, _)| chunk).filter(|chunk| seen.insert(*chunk));
        BootProfile::new(image, first.take(PROFILE_CHUNKS_MAX).collect())
    }

    /// The image that it was recorded on.
    pub fn image(&self) -> ImageId {
        self.image
    }

    /// The chunks in the order of their first touch.
    pub fn chunks(&self) -> &[ChunkIndex] {
        &self.chunks
    }

    /// Checks that this is a profile of the image under `root`.
    ///
    /// # Errors
    /// It is another image's, or names a chunk that the image does not have.
    pub fn must_fit(&self, root: &RootPage) -> Result<(), ProfileError> {
        let wanted = root.id();
        if self.image != wanted {
            return Err(ProfileError::OtherImage { found: self.image, wanted });
        }
        match self.chunks.iter().find(|chunk| chunk.0 >= root.chunk_count()) {
            Some(chunk) => Err(ProfileError::Beyond { chunk: chunk.0, chunks: root.chunk_count() }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
