//! Checksums of the blocks of a chunk, so that a part of it can be compared with what was verified as a whole.
//!
//! CRC-32C (Castagnoli; RFC 3720, appendix B.4): a processor computes it about as fast as it copies, and it finds every
//! burst of up to 32 bits and all but one in 2^32 of other damages. It is not a defence against anybody who *wants* wrong
//! bytes to pass; who can write to a cache medium is root on this node.

use block::limits::{BLOCK_BYTES, CHUNK_BYTES};

/// Blocks in a chunk.
pub(super) const BLOCKS: usize = CHUNK_BYTES / BLOCK_BYTES;

/// One checksum for each block of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sums(pub(super) [u32; BLOCKS]);

impl Sums {
    /// The checksums of a whole chunk.
    pub(super) fn of(chunk: &[u8]) -> Sums {
        let mut sums = [0; BLOCKS];
        for (sum, block) in sums.iter_mut().zip(chunk.chunks(BLOCK_BYTES)) {
            *sum = sum_of(block);
        }
        Sums(sums)
    }
}

/// The checksum of one block.
pub(super) fn sum_of(block: &[u8]) -> u32 {
    crc32c::crc32c(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_has_its_own_checksum() {
        let mut chunk = vec![0; CHUNK_BYTES];
        let before = Sums::of(&chunk);
        chunk[3 * BLOCK_BYTES + 7] ^= 1;
        let differ: Vec<usize> = (0..BLOCKS).filter(|&at| Sums::of(&chunk).0[at] != before.0[at]).collect();
        assert_eq!(differ, [3]);
    }
}
