//! One place for a chunk, as it is known in memory: 104 bytes that are read without a lock.
//!
//! A slot works as a seqlock. Who fills it holds its shard's lock while it empties the slot, which
//! begins a new generation; who reads it looks at the state before and after, and takes the bytes only
//! if both are the same generation of the wanted chunk. Only the use count may change in between.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use block::ChunkHash;
use block::limits::BLOCK_BYTES;

use super::sums::{BLOCKS, Sums, sum_of};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing, or something that is just being written.
    Empty,
    /// What the directory said at the start; to be verified as a whole before it is used.
    Unverified,
    /// A chunk that was verified. The checksums of its blocks are known, so that parts of it can be read.
    Ready,
}

const GENERATION: u64 = 0xffff_ffff;
const STAGE_SHIFT: u32 = 32;
const USES_SHIFT: u32 = 34;
const EPOCH_SHIFT: u32 = 36;
const STAGE: u64 = 3 << STAGE_SHIFT;
const USES: u64 = 3 << USES_SHIFT;
const EPOCH: u64 = 0xff << EPOCH_SHIFT;

/// Most uses that a slot remembers.
pub(super) const USES_MAX: u64 = 3;

/// The state of a slot at one moment: which chunk it held, for whoever reads it and looks again afterwards.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotVersion(u64);

impl SlotVersion {
    pub(super) fn stage(self) -> Stage {
        match self.0 >> STAGE_SHIFT & 3 {
            1 => Stage::Unverified,
            2 => Stage::Ready,
            _ => Stage::Empty,
        }
    }

    fn uses(self) -> u64 {
        (self.0 & USES) >> USES_SHIFT
    }

    fn same_filling(self, other: SlotVersion) -> bool {
        let fixed = !(USES | EPOCH);
        self.0 & fixed == other.0 & fixed
    }
}

fn stage_bits(stage: Stage) -> u64 {
    let bits = match stage {
        Stage::Empty => 0,
        Stage::Unverified => 1,
        Stage::Ready => 2,
    };
    bits << STAGE_SHIFT
}

#[derive(Default)]
pub(super) struct Slot {
    /// Generation, stage, uses and the epoch of the last counted use.
    state: AtomicU64,
    hash: [AtomicU64; 4],
    /// Of a chunk that is ready.
    sums: [AtomicU32; BLOCKS],
}

fn words(hash: &ChunkHash) -> [u64; 4] {
    let mut out = [0; 4];
    for (word, bytes) in out.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        *word = u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    }
    out
}

impl Slot {
    pub(super) fn version(&self) -> SlotVersion {
        SlotVersion(self.state.load(Ordering::Acquire))
    }

    /// The state, if the slot holds this chunk.
    pub(super) fn version_of(&self, hash: &ChunkHash) -> Option<SlotVersion> {
        let version = self.version();
        (version.stage() != Stage::Empty && self.holds(hash)).then_some(version)
    }

    fn holds(&self, hash: &ChunkHash) -> bool {
        words(hash).iter().zip(&self.hash).all(|(word, own)| own.load(Ordering::Relaxed) == *word)
    }

    /// Whether what was read since `version` was what the slot held then, all the time.
    pub(super) fn is_still(&self, version: SlotVersion) -> bool {
        fence(Ordering::Acquire);
        version.same_filling(SlotVersion(self.state.load(Ordering::Relaxed)))
    }

    /// The leading bytes of the chunk's name. Only for slots in a shard's table, under its lock.
    pub(super) fn prefix(&self) -> u64 {
        self.hash[0].load(Ordering::Relaxed)
    }

    /// Forgets the chunk and begins a new generation. Under the shard's lock.
    pub(super) fn empty(&self) {
        let generation = (self.state.load(Ordering::Relaxed) + 1) & GENERATION;
        self.state.store(generation | stage_bits(Stage::Empty), Ordering::Relaxed);
        fence(Ordering::Release);
    }

    /// Names the chunk that the empty slot now holds, ready if its checksums are known. Under the shard's lock.
    pub(super) fn fill(&self, hash: &ChunkHash, sums: Option<&Sums>, epoch: u8) {
        for (own, word) in self.hash.iter().zip(words(hash)) {
            own.store(word, Ordering::Relaxed);
        }
        let stage = match sums {
            Some(sums) => {
                self.set_sums(sums);
                Stage::Ready
            }
            None => Stage::Unverified,
        };
        let generation = self.state.load(Ordering::Relaxed) & GENERATION;
        let state = generation | stage_bits(stage) | u64::from(epoch) << EPOCH_SHIFT;
        self.state.store(state, Ordering::Release);
    }

    fn set_sums(&self, sums: &Sums) {
        for (own, sum) in self.sums.iter().zip(sums.0) {
            own.store(sum, Ordering::Relaxed);
        }
    }

    /// Whether these whole blocks, from the chunk's block `first` on, are as they were when the chunk was verified. Only
    /// for one that is ready, and to be believed only if the slot [is still](Slot::is_still) what it was before.
    pub(super) fn has_blocks(&self, first: usize, bytes: &[u8]) -> bool {
        let mut blocks = bytes.chunks(BLOCK_BYTES).zip(&self.sums[first..]);
        blocks.all(|(block, sum)| sum_of(block) == sum.load(Ordering::Relaxed))
    }

    /// Notes that the chunk was verified, unless the slot is not at `version` any more. Returns the version that
    /// it has if it is. Under the shard's lock, so that nobody fills the slot meanwhile.
    pub(super) fn mark_ready(&self, version: SlotVersion, sums: &Sums) -> SlotVersion {
        let changed = |state| state & !STAGE | stage_bits(Stage::Ready);
        if self.is_still(version) {
            self.set_sums(sums);
            self.update(version, changed);
        }
        SlotVersion(changed(version.0))
    }

    /// Counts a use, at most one per epoch: the many small reads of one sequential pass are one use.
    pub(super) fn count_use(&self, version: SlotVersion, epoch: u8) {
        let epoch = u64::from(epoch) << EPOCH_SHIFT;
        if version.0 & EPOCH == epoch {
            return;
        }
        self.update(version, |state| {
            let uses = (SlotVersion(state).uses() + 1).min(USES_MAX);
            state & !(USES | EPOCH) | uses << USES_SHIFT | epoch
        });
    }

    pub(super) fn uses(&self) -> u64 {
        self.version().uses()
    }

    /// Sets the uses to `uses`. Under the shard's lock.
    pub(super) fn set_uses(&self, uses: u64) {
        self.update(self.version(), |state| state & !USES | uses << USES_SHIFT);
    }

    /// Changes the state for as long as the slot holds what it held at `version`.
    fn update(&self, version: SlotVersion, change: impl Fn(u64) -> u64) {
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |state| {
            version.same_filling(SlotVersion(state)).then(|| change(state))
        });
    }
}

#[cfg(test)]
mod tests {
    use block::limits::CHUNK_BYTES;

    use super::*;

    fn hash(byte: u8) -> ChunkHash {
        ChunkHash::from_bytes([byte; 32])
    }

    /// The checksums of a chunk of such bytes.
    fn sums(byte: u8) -> Sums {
        Sums::of(&[byte; CHUNK_BYTES])
    }

    #[test]
    fn a_slot_that_was_filled_anew_is_noticed_even_with_the_same_chunk() {
        let slot = Slot::default();
        slot.fill(&hash(1), Some(&sums(1)), 0);
        let version = slot.version_of(&hash(1)).unwrap();
        slot.count_use(version, 1);
        assert!(slot.is_still(version), "a use changes nothing");
        slot.empty();
        assert!(!slot.is_still(version));
        slot.fill(&hash(1), Some(&sums(1)), 0);
        assert!(!slot.is_still(version));
        slot.count_use(version, 2);
        assert_eq!(slot.uses(), 0, "a use of what is gone does not count");
        assert!(slot.version_of(&hash(2)).is_none());
    }

    #[test]
    fn a_chunk_that_was_verified_is_ready_and_not_if_it_is_another_by_then() {
        let slot = Slot::default();
        slot.fill(&hash(1), None, 0);
        let before = slot.version();
        assert_eq!(before.stage(), Stage::Unverified);
        assert!(slot.is_still(slot.mark_ready(before, &sums(1))));
        assert_eq!(slot.version().stage(), Stage::Ready);
        slot.empty();
        slot.fill(&hash(2), None, 0);
        let late = slot.mark_ready(before, &sums(1));
        assert!(!slot.is_still(late));
        assert_eq!(slot.version().stage(), Stage::Unverified);
        slot.mark_ready(slot.version(), &sums(2));
        assert!(slot.has_blocks(0, &[2; CHUNK_BYTES]), "it has its own checksums");
    }

    #[test]
    fn a_part_is_compared_block_by_block() {
        let slot = Slot::default();
        let mut bytes: Vec<u8> = (0..CHUNK_BYTES).map(|at| (at / 1000) as u8).collect();
        slot.fill(&hash(1), Some(&Sums::of(&bytes)), 0);
        let of = |first: usize, count: usize| first * BLOCK_BYTES..(first + count) * BLOCK_BYTES;
        assert!(slot.has_blocks(0, &bytes) && slot.has_blocks(15, &bytes[of(15, 1)]));
        assert!(slot.has_blocks(3, &bytes[of(3, 4)]));
        assert!(!slot.has_blocks(4, &bytes[of(3, 4)]), "at another's place");
        bytes[5 * BLOCK_BYTES] ^= 0x80;
        assert!(!slot.has_blocks(3, &bytes[of(3, 4)]) && slot.has_blocks(6, &bytes[of(6, 10)]));
    }

    #[test]
    fn uses_count_once_per_epoch_up_to_the_bound() {
        let slot = Slot::default();
        slot.fill(&hash(1), Some(&sums(1)), 0);
        for _ in 0..10 {
            slot.count_use(slot.version(), 0);
        }
        assert_eq!(slot.uses(), 0, "uses in the epoch of arrival belong to it");
        for epoch in 1..10 {
            slot.count_use(slot.version(), epoch);
            slot.count_use(slot.version(), epoch);
            assert_eq!(slot.uses(), u64::from(epoch).min(USES_MAX));
        }
        assert_eq!(slot.version().stage(), Stage::Ready);
    }

    #[test]
    fn a_slot_takes_104_bytes() {
        assert_eq!(size_of::<Slot>(), 104);
    }
}
