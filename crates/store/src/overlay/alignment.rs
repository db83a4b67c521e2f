//! Splitting a byte range at block boundaries.

use std::ops::Range;

use block::limits::BLOCK_BYTES;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// A block of which a range covers only a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) block: u64,
    /// The covered bytes, within the block.
    pub(super) within: Range<usize>,
    /// Where these bytes are in the caller's range.
    pub(super) at: usize,
}

/// A byte range as at most one partly covered block at either end and whole blocks between.
///
/// The last block of a disk whose size is not a multiple of the block size is whole when it is covered up
/// to the end of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AlignedSplit {
    pub(super) edges: [Option<Edge>; 2],
    pub(super) whole: Range<u64>,
}

impl AlignedSplit {
    /// Splits `len` bytes from `offset` on a disk of `size_bytes`, where they lie and are not none.
    pub(super) fn new(offset: u64, len: u64, size_bytes: u64) -> AlignedSplit {
        let end = offset + len;
        let first_whole = offset.div_ceil(BLOCK);
        let end_whole = if end == size_bytes { end.div_ceil(BLOCK) } else { end / BLOCK };
        if first_whole > end_whole {
            // Within one block.
            let start = offset - end_whole * BLOCK;
            let edge = Edge { block: end_whole, within: start as usize..(start + len) as usize, at: 0 };
            return AlignedSplit { edges: [Some(edge), None], whole: end_whole..end_whole };
        }
        let start = offset / BLOCK * BLOCK;
        let head = (offset < first_whole * BLOCK).then(|| Edge {
            block: offset / BLOCK,
            // On the disk's last block, the range may end before the block does.
            within: (offset - start) as usize..BLOCK.min(end - start) as usize,
            at: 0,
        });
        let tail = (end > end_whole * BLOCK).then(|| Edge {
            block: end_whole,
            within: 0..(end - end_whole * BLOCK) as usize,
            at: (end_whole * BLOCK - offset) as usize,
        });
        AlignedSplit { edges: [head, tail], whole: first_whole..end_whole }
    }

    /// Where the whole blocks begin in the caller's range.
    pub(super) fn whole_at(&self, offset: u64) -> usize {
        (self.whole.start * BLOCK).saturating_sub(offset) as usize
    }
}

/// All blocks that `len` bytes from `offset` touch.
pub(super) fn touched(offset: u64, len: u64) -> Range<u64> {
    offset / BLOCK..(offset + len).div_ceil(BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_parts_of_a_split_cover_the_range_once(size in 1u64..20_000, a in 0u64..20_000, b in 0u64..20_000) {
            let (start, end) = (a.min(b) % size, (a.max(b) % size + 1).max(a.min(b) % size + 1));
            let split = AlignedSplit::new(start, end - start, size);
            let mut covered = vec![0; size.next_multiple_of(BLOCK) as usize];
            for edge in split.edges.iter().flatten() {
                prop_assert!(!edge.within.is_empty() && edge.within.len() < BLOCK_BYTES);
                let from = edge.block as usize * BLOCK_BYTES + edge.within.start;
                prop_assert_eq!(from, start as usize + edge.at);
                prop_assert!(from + edge.within.len() <= end as usize);
                covered[from..from + edge.within.len()].iter_mut().for_each(|n| *n += 1);
            }
            let whole = (split.whole.start * BLOCK) as usize..(split.whole.end * BLOCK) as usize;
            if !whole.is_empty() {
                prop_assert_eq!(whole.start, start as usize + split.whole_at(start));
            }
            covered[whole].iter_mut().for_each(|n| *n += 1);
            for (at, &times) in covered[..size as usize].iter().enumerate() {
                prop_assert_eq!(times == 1, (start..end).contains(&(at as u64)), "byte {} of {}", at, size);
            }
        }
    }
}
