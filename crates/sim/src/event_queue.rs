//! What is going to happen, and when: a heap of events and the virtual clock that it moves.
//!
//! Invariants: time never goes back; events of one moment come in the order in which they were written down,
//! so that a run is a function of its seed alone.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

#[derive(Debug)]
struct Entry<E> {
    at: Duration,
    seq: u64,
    event: E,
}

impl<E> PartialEq for Entry<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl<E> Eq for Entry<E> {}

impl<E> PartialOrd for Entry<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for Entry<E> {
    /// The earliest is the greatest, because the heap gives the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

/// The events to come. See the module's documentation.
#[derive(Debug)]
pub(crate) struct EventQueue<E> {
    now: Duration,
    seq: u64,
    heap: BinaryHeap<Entry<E>>,
}

impl<E> EventQueue<E> {
    pub(crate) fn new() -> EventQueue<E> {
        EventQueue { now: Duration::ZERO, seq: 0, heap: BinaryHeap::new() }
    }

    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    /// Writes an event down. What is due already happens now, after all else of this moment.
    pub(crate) fn at(&mut self, at: Duration, event: E) {
        self.seq += 1;
        self.heap.push(Entry { at: at.max(self.now), seq: self.seq, event });
    }

    pub(crate) fn after(&mut self, wait: Duration, event: E) {
        self.at(self.now + wait, event);
    }

    /// Moves the clock to the next event and takes it out.
    pub(crate) fn next(&mut self) -> Option<E> {
        let entry = self.heap.pop()?;
        self.now = entry.at;
        Some(entry.event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_those_of_one_moment_in_their_order() {
        let mut queue = EventQueue::new();
        for (ms, name) in [(2, 'c'), (1, 'a'), (2, 'd'), (1, 'b')] {
            queue.at(Duration::from_millis(ms), name);
        }
        assert_eq!(queue.next(), Some('a'));
        queue.at(Duration::ZERO, 'x');
        let rest: String = std::iter::from_fn(|| queue.next()).collect();
        assert_eq!(rest, "bxcd");
        assert_eq!(queue.now(), Duration::from_millis(2));
    }
}
