//! Which chunk of a stream is fetched next: a queue and a window for each stripe.
//!
//! Each stripe of an image has parents of its own. With one window for all, a slow parent would soon hold every
//! place of it, and the others would idle. Pure: no clock, no I/O.

use std::collections::{HashSet, VecDeque};

use block::ChunkHash;

/// Fetches of one stream that are under way in each stripe: 1 MiB, which fills a link of 1 Gbit/s over 8 ms of
/// round trip, and is little to wait for behind when a guest asks for something else.
pub(super) const WINDOW: usize = 16;

/// The chunks of one stream that were not fetched yet.
pub(super) struct Windows {
    /// Per stripe, in the order of the stream.
    waiting: Vec<VecDeque<ChunkHash>>,
    under_way: HashSet<ChunkHash>,
    /// How many of these are in each stripe.
    places_taken: Vec<usize>,
}

impl Windows {
    /// Windows for so many stripes, at least one.
    pub(super) fn new(stripes: usize) -> Windows {
        let stripes = stripes.max(1);
        Windows {
            waiting: vec![VecDeque::new(); stripes],
            under_way: HashSet::new(),
            places_taken: vec![0; stripes],
        }
    }

    /// Appends a chunk to its stripe's queue.
    pub(super) fn push(&mut self, chunk: ChunkHash) {
        let stripe = self.stripe(&chunk);
        self.waiting[stripe].push_back(chunk);
    }

    /// The next chunk of any stripe that has a place, which it then holds until it is [done](Windows::done).
    pub(super) fn next(&mut self) -> Option<ChunkHash> {
        let stripe = (0..self.waiting.len())
            .find(|&stripe| self.places_taken[stripe] < WINDOW && !self.waiting[stripe].is_empty())?;
        let chunk = self.waiting[stripe].pop_front()?;
        self.places_taken[stripe] += 1;
        self.under_way.insert(chunk);
        Some(chunk)
    }

    /// The chunk's fetch has ended.
    pub(super) fn done(&mut self, chunk: &ChunkHash) {
        if self.under_way.remove(chunk) {
            let stripe = self.stripe(chunk);
            self.places_taken[stripe] -= 1;
        }
    }

    /// The image has so many stripes now. What is under way goes on, in the stripe that it belongs to now.
    pub(super) fn set_stripes(&mut self, stripes: usize) {
        let old = std::mem::replace(self, Windows::new(stripes));
        // Taken in turn, the queues merge into about the order that they were cut from.
        let mut queues = old.waiting;
        while queues.iter().any(|queue| !queue.is_empty()) {
            queues.iter_mut().filter_map(VecDeque::pop_front).for_each(|chunk| self.push(chunk));
        }
        for chunk in old.under_way {
            let stripe = self.stripe(&chunk);
            self.places_taken[stripe] += 1;
            self.under_way.insert(chunk);
        }
    }

    fn stripe(&self, chunk: &ChunkHash) -> usize {
        (chunk.prefix() % self.waiting.len() as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chunk of stripe `n mod S`, whatever S is.
    fn chunk(n: u64) -> ChunkHash {
        let mut bytes = [1; 32];
        bytes[..8].copy_from_slice(&n.to_be_bytes());
        ChunkHash::from_bytes(bytes)
    }

    fn taken(windows: &mut Windows) -> Vec<u64> {
        std::iter::from_fn(|| windows.next()).map(|chunk| chunk.prefix()).collect()
    }

    #[test]
    fn a_stripe_that_stands_still_does_not_hold_up_the_others() {
        let mut windows = Windows::new(2);
        (0..100).for_each(|n| windows.push(chunk(n)));
        let first = taken(&mut windows);
        assert_eq!(first.len(), 2 * WINDOW, "each stripe has a window of its own");
        let mut fetched = Vec::new();
        let mut odd: Vec<u64> = first.into_iter().filter(|n| n % 2 == 1).collect();
        while let Some(n) = odd.pop() {
            fetched.push(n);
            windows.done(&chunk(n));
            odd.extend(taken(&mut windows));
        }
        fetched.sort_unstable();
        assert!(fetched.into_iter().eq((0..100).filter(|n| n % 2 == 1)), "all of the other stripe");
    }

    #[test]
    fn each_chunk_is_given_once_and_in_order_within_its_stripe() {
        let mut windows = Windows::new(3);
        (0..200).for_each(|n| windows.push(chunk(n)));
        let mut given = Vec::new();
        loop {
            let next = taken(&mut windows);
            if next.is_empty() {
                break;
            }
            next.iter().for_each(|n| windows.done(&chunk(*n)));
            given.extend(next);
        }
        for stripe in 0..3 {
            let of_stripe = given.iter().copied().filter(|n| n % 3 == stripe);
            assert!(of_stripe.eq((0..200).filter(|n| n % 3 == stripe)), "stripe {stripe}: {given:?}");
        }
    }

    #[test]
    fn what_is_under_way_keeps_its_place_when_the_stripes_change() {
        let mut windows = Windows::new(1);
        (0..100).for_each(|n| windows.push(chunk(n)));
        assert_eq!(taken(&mut windows).len(), WINDOW);
        windows.set_stripes(2);
        assert_eq!(taken(&mut windows).len(), WINDOW, "half of each window was taken already");
        (0..WINDOW as u64).for_each(|n| windows.done(&chunk(n)));
        assert_eq!(taken(&mut windows).len(), WINDOW);
        windows.set_stripes(0);
        assert_eq!(taken(&mut windows).len(), 0, "more is under way than one window has places");
    }
}
