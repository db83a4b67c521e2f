//! A part of the cache's index: which slot holds which chunk, and which slot is given away next.
//!
//! Eviction is S3-FIFO. A new chunk enters a short queue, *probation*, and moves to the long one, *main*,
//! only if it was used again; what leaves probation unused is remembered as a *ghost*, and enters main
//! directly if it comes back soon. So a scan (a backup, a virus checker, a verify run) passes through
//! a tenth of the cache and leaves the rest alone. SIEVE is simpler but has no such defence; LRU needs
//! a lock and a list operation per hit, where this needs at most one atomic addition.
//!
//! One pass over a chunk is many small reads, and they must count as one use: uses count once per
//! *epoch*, a number of arrivals that is short against the time that a chunk spends in probation.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::ChunkHash;

use super::medium::Medium;
use super::set::{MediumSet, SlotId};
use super::singleflight::SingleFlight;
use super::sums::Sums;
use super::table::Table;

/// Probation's share of the slots is one in this many.
const PROBATION_SHARE: usize = 10;

/// Epochs per turnover of all slots: six while a chunk is on probation.
const EPOCHS_PER_TURNOVER: usize = 64;

/// Uses that take a chunk from probation to main. One may be the tail of the pass that brought it.
const USES_FOR_MAIN: u64 = 2;

#[derive(Default)]
pub(super) struct Shard {
    epoch: AtomicU8,
    /// Reads that this shard answered; here, so that the cores do not share one counter.
    pub(super) hits: AtomicU64,
    index: Mutex<Index>,
}

/// What a shard's lock protects.
pub(super) struct Index {
    /// The media that slots are meant on.
    media: Arc<MediumSet>,
    table: Table,
    pub(super) flights: HashMap<ChunkHash, Arc<SingleFlight>>,
    free: Vec<SlotId>,
    probation: VecDeque<SlotId>,
    main: VecDeque<SlotId>,
    /// Fingerprints of chunks that left probation unused. Each place keeps the last that fell to it.
    ghosts: Box<[u32]>,
    arrivals: usize,
    /// How many slots this shard owns.
    capacity: usize,
}

impl Default for Index {
    fn default() -> Index {
        Index {
            media: Arc::default(),
            table: Table::new(),
            flights: HashMap::new(),
            free: Vec::new(),
            probation: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: Box::default(),
            arrivals: 0,
            capacity: 0,
        }
    }
}

/// A slot to be filled.
pub(super) struct Reserved {
    pub(super) medium: Arc<Medium>,
    pub(super) id: SlotId,
    /// How many chunks had to go for it.
    pub(super) evicted: u64,
}

impl Shard {
    pub(super) fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn epoch(&self) -> u8 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Enters a chunk that a slot now holds; `false` if its medium is not used any more.
    pub(super) fn enter(&self, medium: &Medium, id: SlotId, hash: &ChunkHash, sums: &Sums) -> bool {
        let mut index = self.lock();
        index.flights.remove(hash);
        if !medium.is_usable() {
            index.forfeit();
            return false;
        }
        let epoch = index.arrive(self);
        index.link(id, hash, Some(sums), epoch);
        if index.forget_ghost(hash.prefix()) {
            index.main.push_back(id);
        } else {
            index.probation.push_back(id);
        }
        true
    }
}

impl Index {
    /// How many slots are in circulation here, if nothing is on its way; checked in two ways.
    #[cfg(test)]
    pub(super) fn slots_settled(&self) -> usize {
        assert!(self.flights.is_empty(), "something is on its way");
        let queued = self.probation.len() + self.main.len();
        assert_eq!(self.table.len(), queued, "each chunk stands in one queue");
        assert_eq!(self.free.len() + queued, self.capacity, "each slot is free or in one queue");
        self.capacity
    }

    /// The media that slots are meant on.
    pub(super) fn media(&self) -> &MediumSet {
        &self.media
    }

    /// Changes the media. No slot may be known of a medium that is not in the new set.
    pub(super) fn set_media(&mut self, media: Arc<MediumSet>) {
        self.media = media;
    }

    /// The slot that holds the chunk.
    pub(super) fn find(&self, hash: &ChunkHash) -> Option<SlotId> {
        self.table.find(hash.prefix(), |id| self.media.slot(id).version_of(hash).is_some())
    }

    /// Takes over an empty slot.
    pub(super) fn add_free(&mut self, id: SlotId) {
        self.capacity += 1;
        self.free.push(id);
    }

    /// Takes over a slot with what the directory says is in it; `false` if another slot has it already, or is
    /// about to.
    pub(super) fn add_found(&mut self, id: SlotId, hash: &ChunkHash) -> bool {
        if self.find(hash).is_some() || self.flights.contains_key(hash) {
            return false;
        }
        self.capacity += 1;
        self.link(id, hash, None, 0);
        // In which order they came is not known; they have all stood the test of time.
        self.main.push_back(id);
        true
    }

    /// To be called once all slots are known, and again when that changes.
    pub(super) fn set_out(&mut self) {
        self.ghosts = vec![0; self.capacity.next_power_of_two()].into();
    }

    /// Gives back a slot that is in no queue.
    pub(super) fn release(&mut self, medium: &Medium, id: SlotId) {
        if medium.is_usable() {
            self.free.push(id);
        } else {
            self.forfeit();
        }
    }

    /// Takes a slot out of circulation for good: its medium is not used any more.
    fn forfeit(&mut self) {
        self.capacity = self.capacity.saturating_sub(1);
    }

    /// Drops a chunk; its slot is free at once. Searches the queues, which is cheap against the read of the
    /// whole chunk that showed that it is wrong.
    pub(super) fn drop_chunk(&mut self, id: SlotId) {
        self.unlink(id);
        for queue in [&mut self.probation, &mut self.main] {
            if let Some(at) = queue.iter().position(|&other| other == id) {
                queue.remove(at);
            }
        }
        let medium = Arc::clone(self.media.medium(id));
        self.release(&medium, id);
    }

    /// Forgets slots of a medium that is not used any more, at most `most` of them, and says how many. Slots that are
    /// just being filled are [forgotten](Shard::enter) when they are full.
    pub(super) fn purge(&mut self, number: usize, most: usize) -> usize {
        let mut emptied = 0;
        let mut taken = Vec::new();
        let mut stays = |id: &SlotId| {
            let goes = id.medium() == number && emptied < most;
            emptied += usize::from(goes);
            !goes
        };
        self.free.retain(&mut stays);
        for queue in [&mut self.probation, &mut self.main] {
            queue.retain(|id| {
                let stays = stays(id);
                if !stays {
                    taken.push(*id);
                }
                stays
            });
        }
        taken.into_iter().for_each(|id| self.unlink(id));
        self.capacity = self.capacity.saturating_sub(emptied);
        emptied
    }

    /// Enters a chunk under the slot that holds it.
    fn link(&mut self, id: SlotId, hash: &ChunkHash, sums: Option<&Sums>, epoch: u8) {
        let media = &self.media;
        media.slot(id).fill(hash, sums, epoch);
        media.medium(id).count_filled();
        self.table.insert(hash.prefix(), id, |id| media.slot(id).prefix());
    }

    /// Empties a slot that is in neither queue any more.
    fn unlink(&mut self, id: SlotId) {
        let media = &self.media;
        let slot = media.slot(id);
        self.table.remove(slot.prefix(), id, |id| media.slot(id).prefix());
        slot.empty();
        media.medium(id).count_emptied();
    }

    /// A slot for a new chunk, emptied: a free one or that of the chunk which is needed least. `None` if
    /// there is no slot on a medium that works.
    pub(super) fn reserve(&mut self) -> Option<Reserved> {
        let mut evicted = 0;
        // A slot on a medium that is not used any more is taken out of circulation as it comes by, so this ends.
        loop {
            let id = match self.free.pop() {
                Some(id) => id,
                None => {
                    let id = self.choose()?;
                    self.unlink(id);
                    evicted += 1;
                    id
                }
            };
            let medium = self.media.medium(id);
            if medium.is_usable() {
                return Some(Reserved { medium: Arc::clone(medium), id, evicted });
            }
            self.forfeit();
        }
    }

    /// A slot for a chunk of another shard, to which it belongs from now on.
    pub(super) fn cede(&mut self) -> Option<Reserved> {
        let reserved = self.reserve()?;
        self.forfeit();
        Some(reserved)
    }

    /// The same, if there is a free one.
    pub(super) fn cede_free(&mut self) -> Option<Reserved> {
        if self.free.is_empty() { None } else { self.cede() }
    }

    /// Takes over a slot that another shard ceded. If its medium leaves meanwhile that is noticed when it is filled.
    pub(super) fn adopt(&mut self) {
        self.capacity += 1;
    }

    /// Takes the slot that is needed least out of its queue. Ends, because each turn of main uses up one
    /// of the few uses that a slot remembers.
    fn choose(&mut self) -> Option<SlotId> {
        loop {
            let is_probation_full = self.probation.len() * PROBATION_SHARE > self.capacity;
            if is_probation_full || self.main.is_empty() {
                let id = self.probation.pop_front()?;
                let slot = self.media.slot(id);
                if slot.uses() < USES_FOR_MAIN {
                    let prefix = slot.prefix();
                    self.remember_ghost(prefix);
                    return Some(id);
                }
                slot.set_uses(0);
                self.main.push_back(id);
            } else {
                let id = self.main.pop_front()?;
                let slot = self.media.slot(id);
                let uses = slot.uses();
                if uses == 0 {
                    return Some(id);
                }
                slot.set_uses(uses - 1);
                self.main.push_back(id);
            }
        }
    }

    /// Counts an arrival and says in which epoch it is.
    fn arrive(&mut self, shard: &Shard) -> u8 {
        self.arrivals += 1;
        let epoch = self.arrivals / (self.capacity / EPOCHS_PER_TURNOVER).max(1);
        // Eight bits of it: a use that is lost every 256 epochs does no harm.
        let epoch = (epoch & 0xff) as u8;
        shard.epoch.store(epoch, Ordering::Relaxed);
        epoch
    }

    fn ghost_place(&self, prefix: u64) -> Option<(usize, u32)> {
        let mask = self.ghosts.len().checked_sub(1)?;
        // Bits that neither the shard nor, mostly, the position in the table were chosen by.
        Some(((prefix >> 16) as usize & mask, (prefix >> 32) as u32 | 1))
    }

    fn remember_ghost(&mut self, prefix: u64) {
        if let Some((place, print)) = self.ghost_place(prefix) {
            self.ghosts[place] = print;
        }
    }

    /// Whether the chunk was a ghost; it is none any more.
    fn forget_ghost(&mut self, prefix: u64) -> bool {
        match self.ghost_place(prefix) {
            Some((place, print)) if self.ghosts[place] == print => {
                self.ghosts[place] = 0;
                true
            }
            _ => false,
        }
    }
}
