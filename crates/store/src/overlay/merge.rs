//! Merging two layers: the upper takes over what it so far reads from its base, or the base what the upper holds.
//!
//! Nobody sees a difference: a block of the upper reads the same before and after, and nobody else may read the base if
//! that is the one that changes. So this may go on under a guest, may be given up anywhere, and concerns frozen
//! overlays as well.

use std::ops::Range;
use std::sync::Arc;

use block::DiskError;

use super::map::{Place, WORD_BLOCKS};
use super::{BLOCK, Overlay, RangeGuard, touched};

/// Bytes that are taken over at a time: long enough for a disk, and for so short a time a guest's write to them
/// waits.
const PIECE_BYTES: u64 = 256 * 1024;

impl Overlay {
    /// The ranges of bytes that the overlay holds itself, in order and apart from each other.
    pub fn own_ranges(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for word in self.map.all() {
            let first = word.index * WORD_BLOCKS;
            for bit in (0..WORD_BLOCKS).filter(|bit| word.bits >> bit & 1 == 1) {
                let start = (first + bit) * BLOCK;
                let end = (start + BLOCK).min(self.geometry.size_bytes());
                match ranges.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => ranges.push(start..end),
                }
            }
        }
        ranges
    }

    /// Makes all blocks that `range` touches the overlay's own, as they read now (QEMU's *block-stream*). Says how
    /// many bytes it took over. They are durable after a flush.
    pub async fn stream_from_base(&self, range: Range<u64>) -> Result<u64, DiskError> {
        self.check(range.start, range.end - range.start)?;
        let mut streamed = 0;
        for (_, piece) in self.pieces(range).filter(|(place, _)| *place == Place::Base) {
            streamed += self.stream_piece(piece).await?;
        }
        Ok(streamed)
    }

    /// All blocks that `range` touches, in pieces that each lie in one place, as far as is known when it is its turn.
    fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = (Place, Range<u64>)> {
        let end = self.geometry.size_bytes().min(range.end.next_multiple_of(BLOCK));
        let mut at = range.start / BLOCK * BLOCK;
        std::iter::from_fn(move || {
            let left = end.checked_sub(at).filter(|left| *left > 0)?;
            let (place, len) = self.run(at, left.min(PIECE_BYTES));
            let piece = at..at + len;
            at = piece.end;
            Some((place, piece))
        })
    }

    /// Takes over what `upper` holds itself of `range` (QEMU's *block-commit*), which then reads the same here. `upper`
    /// must be frozen, durable and of the same size, stand on this overlay, and be all that does: what it holds hides
    /// what changes here. Says how many bytes it took over. They are durable after a flush.
    pub async fn commit_from(&self, upper: &Overlay, range: Range<u64>) -> Result<u64, DiskError> {
        self.check(range.start, range.end - range.start)?;
        let mut committed = 0;
        for (place, piece) in upper.pieces(range).filter(|(place, _)| *place == Place::Own) {
            let len = piece.end - piece.start;
            let guard = Arc::new(self.range_lock.lock(touched(piece.start, len)).await);
            let mut bytes = vec![0; len as usize];
            upper.read_run(place, piece.start, &mut bytes).await?;
            self.keep(&guard, piece.start / BLOCK, &bytes).await?;
            committed += len;
        }
        Ok(committed)
    }

    /// What [`Overlay::stream_from_base`] does for whole blocks, of which a guest may have written some meanwhile.
    async fn stream_piece(&self, piece: Range<u64>) -> Result<u64, DiskError> {
        let guard = Arc::new(self.range_lock.lock(touched(piece.start, piece.end - piece.start)).await);
        let mut streamed = 0;
        let mut at = piece.start;
        while at < piece.end {
            let (place, len) = self.run(at, piece.end - at);
            if place == Place::Base {
                let mut bytes = vec![0; len as usize];
                self.read_run(Place::Base, at, &mut bytes).await?;
                self.keep(&guard, at / BLOCK, &bytes).await?;
                streamed += len;
            }
            at += len;
        }
        Ok(streamed)
    }

    /// Writes blocks from `first` on, those of zeroes as holes.
    async fn keep(&self, guard: &Arc<RangeGuard>, first: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let is_zero = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
        let blocks: Vec<&[u8]> = bytes.chunks(BLOCK as usize).collect();
        let mut at = 0;
        for alike in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let blocks = first + at..first + at + alike.len() as u64;
            if is_zero(&alike[0]) {
                self.punch_own(Arc::clone(guard), blocks.clone(), blocks.end).await?;
            } else {
                let from = (at * BLOCK) as usize;
                let to = bytes.len().min(from + alike.len() * BLOCK as usize);
                self.put(guard, blocks.start, &bytes[from..to])?;
            }
            at += alike.len() as u64;
        }
        Ok(())
    }
}
