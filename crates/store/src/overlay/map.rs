//! Which blocks of an overlay are its own, in memory.
//!
//! One bit per block, in pages that exist only where a block was ever allocated, so that a huge and
//! mostly untouched disk costs next to nothing. Bits only ever go from 0 to 1 and reading takes no lock.
//!
//! Consistency: a bit is set after the block's bytes are in the data file and the bit in the
//! [unsynced map](super::unsynced_map)'s file, and together with the note that it is not durable yet. So whoever sees a
//! bit set and flushes also makes that bit durable.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::unsynced_map::UnsyncedMap;

/// Words in one page: 4 KiB of memory for 128 MiB of disk, and 16 bytes while nothing there is allocated.
const PAGE_WORDS: u64 = 512;

/// Blocks in one word.
pub(super) const WORD_BLOCKS: u64 = 64;

/// Blocks in one page.
const PAGE_BLOCKS: u64 = PAGE_WORDS * WORD_BLOCKS;

type Page = Box<[AtomicU64; PAGE_WORDS as usize]>;

/// Where the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In the base below; the overlay never wrote this block.
    Base,
    /// In the overlay's data file.
    Own,
}

/// 64 neighbouring blocks: the unit in which allocations are made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word {
    /// Number of the word: its first block, divided by 64.
    pub(super) index: u64,
    /// One bit per block, the first block in the lowest bit.
    pub(super) bits: u64,
}

pub(super) struct BlockMap {
    blocks: u64,
    pages: Box<[OnceLock<Page>]>,
    /// Words with bits that are not durable yet.
    pending: Mutex<BTreeSet<u64>>,
    allocated_blocks: AtomicU64,
    live_words: AtomicU64,
}

impl BlockMap {
    /// A map of `blocks` blocks that are all in the base.
    pub(super) fn new(blocks: u64) -> BlockMap {
        let pages = blocks.div_ceil(PAGE_BLOCKS);
        BlockMap {
            blocks,
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            pending: Mutex::default(),
            allocated_blocks: AtomicU64::new(0),
            live_words: AtomicU64::new(0),
        }
    }

    /// The place of block `range.start`, and how many blocks of the range from there share it.
    pub(super) fn run(&self, range: Range<u64>) -> (Place, u64) {
        let own = self.is_own(range.start);
        let mut at = range.start;
        while at < range.end {
            let word = self.word(at / WORD_BLOCKS);
            let differing = if own { !word } else { word } >> (at % WORD_BLOCKS);
            if differing != 0 {
                at += u64::from(differing.trailing_zeros());
                break;
            }
            at = (at / WORD_BLOCKS + 1) * WORD_BLOCKS;
        }
        let place = if own { Place::Own } else { Place::Base };
        (place, at.min(range.end) - range.start)
    }

    pub(super) fn is_own(&self, block: u64) -> bool {
        self.word(block / WORD_BLOCKS) >> (block % WORD_BLOCKS) & 1 == 1
    }

    /// Marks blocks as the overlay's own, here and in `unsynced`. Their bytes are in the data file. After an error
    /// some of them are.
    pub(super) fn allocate(&self, unsynced: &UnsyncedMap, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / PAGE_BLOCKS + 1) * PAGE_BLOCKS);
            if self.run(at..end) != (Place::Own, end - at) {
                self.allocate_in_page(unsynced, at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    fn allocate_in_page(&self, unsynced: &UnsyncedMap, range: Range<u64>) -> io::Result<()> {
        let words = range.start / WORD_BLOCKS..range.end.div_ceil(WORD_BLOCKS);
        let added = |index: u64| {
            let (start, end) =
                (range.start.max(index * WORD_BLOCKS), range.end.min((index + 1) * WORD_BLOCKS));
            mask(start % WORD_BLOCKS, end - start)
        };
        let mut pending = self.pending();
        let mut bytes = [[0; 8]; PAGE_WORDS as usize];
        for (index, bytes) in words.clone().zip(&mut bytes) {
            *bytes = (self.word(index) | added(index)).to_le_bytes();
        }
        let count = (words.end - words.start) as usize;
        unsynced.write(words.start, bytes[..count].as_flattened())?;
        for index in words {
            let bits = added(index);
            if self.word(index) & bits != bits {
                self.set(Word { index, bits });
                pending.insert(index);
            }
        }
        Ok(())
    }

    /// Takes over a word that a killed process left; it is not durable yet. `false` if it does not lie on the
    /// disk.
    pub(super) fn restore_unsynced(&self, word: Word) -> bool {
        let mut pending = self.pending();
        let is_new = self.word(word.index) & word.bits != word.bits;
        let fits = self.restore(word);
        if fits && is_new {
            pending.insert(word.index);
        }
        fits
    }

    /// Takes over a durable word; `false` if it does not lie on the disk.
    pub(super) fn restore(&self, word: Word) -> bool {
        let Some(first) = word.index.checked_mul(WORD_BLOCKS).filter(|&first| first < self.blocks) else {
            return false;
        };
        if word.bits & !mask(0, (self.blocks - first).min(WORD_BLOCKS)) != 0 {
            return false;
        }
        self.set(word);
        true
    }

    /// The words that are not durable yet, as they are now. They count as durable from here on; if
    /// making them so fails, give them [back](BlockMap::give_back).
    pub(super) fn take_pending(&self) -> Vec<Word> {
        let mut pending = self.pending();
        let words = pending.iter().map(|&index| Word { index, bits: self.word(index) }).collect();
        pending.clear();
        words
    }

    /// Makes words pending again.
    pub(super) fn give_back(&self, words: &[Word]) {
        self.pending().extend(words.iter().map(|word| word.index));
    }

    pub(super) fn has_pending(&self) -> bool {
        !self.pending().is_empty()
    }

    /// All words with a bit set.
    pub(super) fn all(&self) -> Vec<Word> {
        let pages = self.pages.iter().enumerate().filter_map(|(at, page)| Some((at as u64, page.get()?)));
        pages
            .flat_map(|(at, page)| (at * PAGE_WORDS..).zip(page.iter()))
            .map(|(index, bits)| Word { index, bits: bits.load(Ordering::Acquire) })
            .filter(|word| word.bits != 0)
            .collect()
    }

    pub(super) fn allocated_blocks(&self) -> u64 {
        self.allocated_blocks.load(Ordering::Relaxed)
    }

    /// How many words have a bit set.
    pub(super) fn live_words(&self) -> u64 {
        self.live_words.load(Ordering::Relaxed)
    }

    fn pending(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, index: u64) -> u64 {
        let page = self.pages.get((index / PAGE_WORDS) as usize).and_then(OnceLock::get);
        page.map_or(0, |page| page[(index % PAGE_WORDS) as usize].load(Ordering::Acquire))
    }

    fn set(&self, word: Word) {
        let page = self.pages[(word.index / PAGE_WORDS) as usize]
            .get_or_init(|| Box::new([const { AtomicU64::new(0) }; PAGE_WORDS as usize]));
        let before = page[(word.index % PAGE_WORDS) as usize].fetch_or(word.bits, Ordering::AcqRel);
        let added = u64::from((word.bits & !before).count_ones());
        self.allocated_blocks.fetch_add(added, Ordering::Relaxed);
        if before == 0 && added > 0 {
            self.live_words.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `len` bits from bit `first`; together at most 64.
fn mask(first: u64, len: u64) -> u64 {
    if len >= WORD_BLOCKS { u64::MAX } else { ((1 << len) - 1) << first }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::MemoryMedia;
    use crate::overlay::BootId;
    use proptest::prelude::*;

    const BOOT: BootId = BootId([1; 16]);

    /// More than a page.
    const BLOCKS: u64 = 40_000;

    proptest! {
        #[test]
        fn runs_and_counts_agree_with_a_plain_set(ranges in prop::collection::vec((0..BLOCKS, 1u64..3000), 0..20)) {
            let map = BlockMap::new(BLOCKS);
            let media = Arc::new(MemoryMedia::default());
            let unsynced = UnsyncedMap::create(Arc::clone(&media) as _, BOOT).unwrap();
            let mut plain = BTreeSet::new();
            for (first, len) in ranges {
                let end = (first + len).min(BLOCKS);
                map.allocate(&unsynced, first..end).unwrap();
                plain.extend(first..end);
            }
            let mut at = 0;
            while at < BLOCKS {
                let (place, len) = map.run(at..BLOCKS);
                prop_assert!(len > 0);
                for block in at..at + len {
                    prop_assert_eq!(place == Place::Own, plain.contains(&block), "block {}", block);
                }
                at += len;
            }
            prop_assert_eq!(map.allocated_blocks(), plain.len() as u64);
            prop_assert_eq!(map.live_words(), map.all().len() as u64);
            let pending = map.take_pending();
            prop_assert_eq!(&pending, &map.all());
            let again = BlockMap::new(BLOCKS);
            prop_assert!(pending.into_iter().all(|word| again.restore(word)));
            prop_assert_eq!(again.all(), map.all());
            let killed = BlockMap::new(BLOCKS);
            let opened = UnsyncedMap::open(media, BOOT, || {}, |word| killed.restore_unsynced(word)).unwrap();
            prop_assert!(opened.is_ok());
            prop_assert_eq!(killed.take_pending(), map.all());
        }
    }

    #[test]
    fn words_beyond_the_disk_are_refused() {
        let map = BlockMap::new(100);
        assert!(map.restore(Word { index: 1, bits: mask(0, 36) }));
        assert!(!map.restore(Word { index: 1, bits: 1 << 36 }));
        assert!(!map.restore(Word { index: 2, bits: 1 }));
        assert!(!map.restore(Word { index: u64::MAX, bits: 1 }));
    }
}
