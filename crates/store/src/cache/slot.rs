//! One place for a chunk, as it is known in memory: 40 bytes that are read without a lock.
//!
//! A slot works as a seqlock. Who fills it holds its shard's lock while it empties the slot, which
//! begins a new generation; who reads it looks at the state before and after, and takes the bytes only
//! if both are the same generation of the wanted chunk. Only the use count may change in between.

use std::sync::atomic::{AtomicU64, Ordering, fence};

use block::ChunkHash;

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing, or something that is just being written.
    Empty,
    /// What the directory said at the start, or what is just being read from the device; to be verified as a whole before
    /// it is used.
    Unverified,
    /// A chunk that was verified, and of which nothing had to be read from the device since.
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

/// The state of a slot at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen(u64);

impl Seen {
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

    fn same_filling(self, other: Seen) -> bool {
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
}

fn words(hash: &ChunkHash) -> [u64; 4] {
    let mut out = [0; 4];
    for (word, bytes) in out.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        *word = u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    }
    out
}

impl Slot {
    pub(super) fn see(&self) -> Seen {
        Seen(self.state.load(Ordering::Acquire))
    }

    /// The state, if the slot holds this chunk.
    pub(super) fn see_chunk(&self, hash: &ChunkHash) -> Option<Seen> {
        let seen = self.see();
        (seen.stage() != Stage::Empty && self.holds(hash)).then_some(seen)
    }

    fn holds(&self, hash: &ChunkHash) -> bool {
        words(hash).iter().zip(&self.hash).all(|(word, own)| own.load(Ordering::Relaxed) == *word)
    }

    /// Whether what was read since `seen` was what the slot held then, all the time.
    pub(super) fn is_still(&self, seen: Seen) -> bool {
        fence(Ordering::Acquire);
        seen.same_filling(Seen(self.state.load(Ordering::Relaxed)))
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

    /// Names the chunk that the empty slot now holds. Under the shard's lock.
    pub(super) fn fill(&self, hash: &ChunkHash, stage: Stage, epoch: u8) {
        for (own, word) in self.hash.iter().zip(words(hash)) {
            own.store(word, Ordering::Relaxed);
        }
        let generation = self.state.load(Ordering::Relaxed) & GENERATION;
        let state = generation | stage_bits(stage) | u64::from(epoch) << EPOCH_SHIFT;
        self.state.store(state, Ordering::Release);
    }

    /// Notes that the chunk was verified, unless the slot was filled anew since `seen`. Returns what is seen if it was
    /// not.
    pub(super) fn mark_ready(&self, seen: Seen) -> Seen {
        self.set_stage(seen, Stage::Ready)
    }

    /// Notes that the chunk has to be verified again; otherwise like [`Slot::mark_ready`].
    pub(super) fn doubt(&self, seen: Seen) -> Seen {
        self.set_stage(seen, Stage::Unverified)
    }

    fn set_stage(&self, seen: Seen, stage: Stage) -> Seen {
        let changed = |state| state & !STAGE | stage_bits(stage);
        self.update(seen, changed);
        Seen(changed(seen.0))
    }

    /// Counts a use, at most one per epoch: the many small reads of one sequential pass are one use.
    pub(super) fn count_use(&self, seen: Seen, epoch: u8) {
        let epoch = u64::from(epoch) << EPOCH_SHIFT;
        if seen.0 & EPOCH == epoch {
            return;
        }
        self.update(seen, |state| {
            let uses = (Seen(state).uses() + 1).min(USES_MAX);
            state & !(USES | EPOCH) | uses << USES_SHIFT | epoch
        });
    }

    pub(super) fn uses(&self) -> u64 {
        self.see().uses()
    }

    /// Sets the uses to `uses`. Under the shard's lock.
    pub(super) fn set_uses(&self, uses: u64) {
        self.update(self.see(), |state| state & !USES | uses << USES_SHIFT);
    }

    /// Changes the state for as long as the slot holds what it held at `seen`.
    fn update(&self, seen: Seen, change: impl Fn(u64) -> u64) {
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |state| {
            seen.same_filling(Seen(state)).then(|| change(state))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(byte: u8) -> ChunkHash {
        ChunkHash::from_bytes([byte; 32])
    }

    #[test]
    fn a_slot_that_was_filled_anew_is_noticed_even_with_the_same_chunk() {
        let slot = Slot::default();
        slot.fill(&hash(1), Stage::Ready, 0);
        let seen = slot.see_chunk(&hash(1)).unwrap();
        slot.count_use(seen, 1);
        assert!(slot.is_still(seen), "a use changes nothing");
        slot.empty();
        assert!(!slot.is_still(seen));
        slot.fill(&hash(1), Stage::Ready, 0);
        assert!(!slot.is_still(seen));
        slot.count_use(seen, 2);
        assert_eq!(slot.uses(), 0, "a use of what is gone does not count");
        assert!(slot.see_chunk(&hash(2)).is_none());
    }

    #[test]
    fn a_chunk_in_doubt_is_ready_again_for_whoever_verified_it() {
        let slot = Slot::default();
        slot.fill(&hash(1), Stage::Ready, 0);
        let before = slot.see();
        let (one, other) = (slot.doubt(before), slot.doubt(before));
        assert!(!slot.is_still(before), "who read a part meanwhile does not trust it");
        assert!(slot.is_still(one) && slot.is_still(other));
        slot.mark_ready(one);
        assert_eq!(slot.see().stage(), Stage::Ready);
        slot.empty();
        slot.fill(&hash(2), Stage::Ready, 0);
        let late = slot.doubt(before);
        assert!(!slot.is_still(late), "it was filled anew");
        assert_eq!(slot.see().stage(), Stage::Ready);
    }

    #[test]
    fn uses_count_once_per_epoch_up_to_the_bound() {
        let slot = Slot::default();
        slot.fill(&hash(1), Stage::Ready, 0);
        for _ in 0..10 {
            slot.count_use(slot.see(), 0);
        }
        assert_eq!(slot.uses(), 0, "uses in the epoch of arrival belong to it");
        for epoch in 1..10 {
            slot.count_use(slot.see(), epoch);
            slot.count_use(slot.see(), epoch);
            assert_eq!(slot.uses(), u64::from(epoch).min(USES_MAX));
        }
        assert_eq!(slot.see().stage(), Stage::Ready);
    }

    #[test]
    fn a_slot_takes_forty_bytes() {
        assert_eq!(size_of::<Slot>(), 40);
    }
}
