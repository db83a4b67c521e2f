//! Notes which chunks one VM touches, and in which order.
//!
//! Consistency: each chunk is noted once, in the order in which the touches were noted; touches at the same
//! moment from several threads have no order. Cost: a closed recorder costs one relaxed load; an open one a
//! lookup in a table of 128 KiB, without lock or allocation. The table is a set of fixed size rather than a
//! bitmap of the disk, which would take 128 MiB for the largest.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use block::{ChunkIndex, Geometry};

use super::{CHUNKS_MAX, PROFILE_CHUNKS_MAX};

/// Places of the set: twice what it ever holds, so that a search is short.
const PLACES: usize = 2 * PROFILE_CHUNKS_MAX;

/// Touches that may be noted at one moment, each by a thread: what the set may hold beyond a full profile.
const AT_ONCE_MAX: usize = PROFILE_CHUNKS_MAX / 2;

/// Notes the first touches of one VM.
pub struct Recorder {
    open: AtomicBool,
    /// Chunks as their index + 1, found by hashing; 0 is vacant.
    seen: Box<[AtomicU32]>,
    /// The same numbers in the order of their coming.
    order: Box<[AtomicU32]>,
    noted: AtomicUsize,
}

impl Recorder {
    /// A recorder that is open and has noted nothing. It takes 192 KiB.
    pub fn new() -> Recorder {
        let vacant = |places: usize| (0..places).map(|_| AtomicU32::new(0)).collect();
        Recorder {
            open: AtomicBool::new(true),
            seen: vacant(PLACES),
            order: vacant(PROFILE_CHUNKS_MAX),
            noted: AtomicUsize::new(0),
        }
    }

    /// Notes that `len` bytes from `offset` are read. A recorder that is full closes.
    pub fn note(&self, offset: u64, len: usize) {
        for (chunk, _, _) in Geometry::split(offset, len) {
            if !self.is_open() {
                return;
            }
            self.note_chunk(chunk);
        }
    }

    fn note_chunk(&self, chunk: ChunkIndex) {
        if chunk.0 >= CHUNKS_MAX || !self.is_new(chunk.0 as u32 + 1) {
            return;
        }
        let place = self.noted.fetch_add(1, Ordering::Relaxed);
        match self.order.get(place) {
            Some(cell) => cell.store(chunk.0 as u32 + 1, Ordering::Relaxed),
            None => self.close(),
        }
    }

    /// Enters a number into the set; whether it was not there. No number is entered beyond the bound, so
    /// that a search always ends at a vacant place.
    fn is_new(&self, number: u32) -> bool {
        if self.noted.load(Ordering::Relaxed) >= PROFILE_CHUNKS_MAX + AT_ONCE_MAX {
            return false;
        }
        // Fibonacci hashing spreads the runs of neighbours that guests read.
        let mut place = (number.wrapping_mul(0x9e37_79b9) >> (32 - PLACES.trailing_zeros())) as usize;
        loop {
            let entered = self.seen[place].compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
            match entered {
                Ok(_) => return true,
                Err(there) if there == number => return false,
                Err(_) => place = (place + 1) % PLACES,
            }
        }
    }

    /// How many chunks were noted so far.
    pub fn noted(&self) -> usize {
        self.noted.load(Ordering::Relaxed).min(PROFILE_CHUNKS_MAX)
    }

    /// Whether touches are still noted.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Notes nothing from now on.
    pub fn close(&self) {
        self.open.store(false, Ordering::Relaxed);
    }

    /// What was noted so far, in order. A touch that is being noted at this moment may be missing.
    pub fn chunks(&self) -> Vec<ChunkIndex> {
        let noted = self.order[..self.noted()].iter().map(|cell| cell.load(Ordering::Relaxed));
        noted.filter_map(|number| number.checked_sub(1)).map(|index| ChunkIndex(index.into())).collect()
    }
}

impl Default for Recorder {
    fn default() -> Recorder {
        Recorder::new()
    }
}
