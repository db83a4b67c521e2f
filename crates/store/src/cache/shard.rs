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

use super::flight::Flight;
use super::slot::Stage;
use super::table::Table;
use super::{MediumSet, SlotId};

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
    table: Table,
    pub(super) flights: HashMap<ChunkHash, Arc<Flight>>,
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

    /// Enters a chunk that a slot now holds.
    pub(super) fn enter(&self, media: &MediumSet, id: SlotId, hash: &ChunkHash) {
        let mut index = self.lock();
        let epoch = index.arrive(self);
        media.slot(id).fill(hash, Stage::Ready, epoch);
        index.table.insert(hash.prefix(), id, |id| media.slot(id).prefix());
        if index.forget_ghost(hash.prefix()) {
            index.main.push_back(id);
        } else {
            index.probation.push_back(id);
        }
        index.flights.remove(hash);
    }
}

impl Index {
    pub(super) fn resident(&self) -> usize {
        self.table.len()
    }

    /// The slot that holds the chunk.
    pub(super) fn find(&self, media: &MediumSet, hash: &ChunkHash) -> Option<SlotId> {
        self.table.find(hash.prefix(), |id| media.slot(id).see_chunk(hash).is_some())
    }

    /// Takes over an empty slot.
    pub(super) fn add_free(&mut self, id: SlotId) {
        self.capacity += 1;
        self.free.push(id);
    }

    /// Takes over a slot with what the directory says is in it; `false` if another slot has it already.
    pub(super) fn add_found(&mut self, media: &MediumSet, id: SlotId, hash: &ChunkHash) -> bool {
        if self.find(media, hash).is_some() {
            return false;
        }
        self.capacity += 1;
        media.slot(id).fill(hash, Stage::Unverified, 0);
        self.table.insert(hash.prefix(), id, |id| media.slot(id).prefix());
        // In which order they came is not known; they have all stood the test of time.
        self.main.push_back(id);
        true
    }

    /// To be called once all slots are known.
    pub(super) fn set_out(&mut self) {
        self.ghosts = vec![0; self.capacity.next_power_of_two()].into();
    }

    /// Gives back a slot that could not be filled.
    pub(super) fn release(&mut self, id: SlotId) {
        self.free.push(id);
    }

    /// Drops a chunk; its slot is free at once. Searches the queues, which is cheap against the read of the
    /// whole chunk that showed that it is wrong.
    pub(super) fn drop_chunk(&mut self, media: &MediumSet, id: SlotId) {
        self.unlink(media, id);
        for queue in [&mut self.probation, &mut self.main] {
            if let Some(at) = queue.iter().position(|&other| other == id) {
                queue.remove(at);
            }
        }
        self.free.push(id);
    }

    /// Empties a slot that is in neither queue any more.
    fn unlink(&mut self, media: &MediumSet, id: SlotId) {
        let slot = media.slot(id);
        self.table.remove(slot.prefix(), id, |id| media.slot(id).prefix());
        slot.empty();
    }

    /// A slot for a new chunk, emptied: a free one or that of the chunk which is needed least. `None` if
    /// there is no slot on a medium that works.
    pub(super) fn reserve(&mut self, media: &MediumSet) -> Option<Reserved> {
        let mut evicted = 0;
        // A slot on a failed medium is taken out of circulation as it comes by, so this ends.
        loop {
            let id = match self.free.pop() {
                Some(id) => id,
                None => {
                    let id = self.choose(media)?;
                    self.unlink(media, id);
                    evicted += 1;
                    id
                }
            };
            if !media.is_failed(id) {
                return Some(Reserved { id, evicted });
            }
            self.capacity = self.capacity.saturating_sub(1);
        }
    }

    /// Takes the slot that is needed least out of its queue. Ends, because each turn of main uses up one
    /// of the few uses that a slot remembers.
    fn choose(&mut self, media: &MediumSet) -> Option<SlotId> {
        loop {
            let is_probation_full = self.probation.len() * PROBATION_SHARE > self.capacity;
            if is_probation_full || self.main.is_empty() {
                let id = self.probation.pop_front()?;
                let slot = media.slot(id);
                if slot.uses() < USES_FOR_MAIN {
                    self.remember_ghost(slot.prefix());
                    return Some(id);
                }
                slot.set_uses(0);
                self.main.push_back(id);
            } else {
                let id = self.main.pop_front()?;
                let slot = media.slot(id);
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
