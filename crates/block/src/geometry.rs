//! Where in an image a byte lies.

use crate::limits::{CHUNK_BYTES, DISK_BYTES_MAX};

/// The position of a chunk in an image, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkIndex(pub u64);

/// The size of a disk, 1 to [`DISK_BYTES_MAX`] bytes, and the arithmetic that follows from it.
///
/// The last chunk of an image whose size is not a multiple of the chunk size is padded with zeroes, so
/// that every chunk has the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
}

impl Geometry {
    /// The geometry of a disk of `size_bytes`; `None` unless that is 1 to [`DISK_BYTES_MAX`].
    pub fn new(size_bytes: u64) -> Option<Geometry> {
        (1..=DISK_BYTES_MAX).contains(&size_bytes).then_some(Geometry { size_bytes })
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// How many chunks cover the disk.
    pub fn chunk_count(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_BYTES as u64)
    }

    /// Whether `len` bytes from `offset` lie on the disk.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size_bytes)
    }

    /// Cuts `len` bytes from `offset` at chunk boundaries: the chunk, the offset in it, and the length.
    /// What lies beyond `u64::MAX` is left out: no disk [contains](Geometry::contains) it.
    pub fn split(offset: u64, len: usize) -> impl Iterator<Item = (ChunkIndex, usize, usize)> {
        let end = offset.saturating_add(len as u64);
        let mut at = offset;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let within = (at % CHUNK_BYTES as u64) as usize;
            let piece = (CHUNK_BYTES - within).min(usize::try_from(end - at).unwrap_or(CHUNK_BYTES));
            let index = ChunkIndex(at / CHUNK_BYTES as u64);
            at += piece as u64;
            Some((index, within, piece))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_pieces_of_a_range_cover_it_without_gap_or_overlap(offset in 0u64..1 << 40, len in 0usize..1 << 20) {
            let mut at = offset;
            for (index, within, piece) in Geometry::split(offset, len) {
                prop_assert_eq!(index.0 * CHUNK_BYTES as u64 + within as u64, at);
                prop_assert!(piece > 0 && within + piece <= CHUNK_BYTES);
                at += piece as u64;
            }
            prop_assert_eq!(at, offset + len as u64);
        }
    }

    #[test]
    fn a_range_that_wraps_around_is_not_on_the_disk() {
        let disk = Geometry::new(10).unwrap();
        assert!(!disk.contains(u64::MAX, 2));
        assert!(disk.contains(10, 0));
        assert!(!disk.contains(10, 1));
    }

    #[test]
    fn a_range_that_wraps_around_is_cut_at_the_end_of_all_offsets() {
        let pieces: Vec<_> = Geometry::split(u64::MAX - 1, 3).collect();
        assert_eq!(pieces, [(ChunkIndex(u64::MAX / CHUNK_BYTES as u64), CHUNK_BYTES - 2, 1)]);
    }

    #[test]
    fn no_disk_is_empty_or_larger_than_the_bound() {
        assert_eq!(Geometry::new(0), None);
        assert_eq!(Geometry::new(DISK_BYTES_MAX).map(|g| g.size_bytes()), Some(DISK_BYTES_MAX));
        assert_eq!(Geometry::new(DISK_BYTES_MAX + 1), None);
    }
}
