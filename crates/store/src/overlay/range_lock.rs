//! Who may change which blocks: a first-come, first-served lock on ranges.
//!
//! Every change of an overlay locks all blocks that it touches, so that two partial writes to one
//! block do not lose each other, and a hole that is still being punched on the blocking pool for a
//! future that was dropped cannot destroy a later write: the guard travels with the work. Reads need
//! none.
//!
//! All of a change's blocks are locked at once and in one queue, so there is no deadlock and no
//! starvation. Bound: one entry per change in flight, which the exports bound.

use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

#[derive(Default)]
pub(super) struct RangeLock {
    queue: Mutex<Queue>,
    released: Notify,
}

#[derive(Default)]
struct Queue {
    next_id: u64,
    /// In order of arrival. A lock holds if no earlier one overlaps it.
    entries: Vec<(u64, Range<u64>)>,
}

/// The right to change a range of blocks, until it is dropped.
pub(super) struct RangeGuard {
    lock: Arc<RangeLock>,
    id: u64,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl RangeLock {
    /// Locks `blocks` if nobody else holds or wants any of them.
    pub(super) fn try_lock(self: &Arc<Self>, blocks: Range<u64>) -> Option<RangeGuard> {
        let mut queue = self.queue();
        let free = queue.entries.iter().all(|(_, other)| !overlap(other, &blocks));
        free.then(|| self.enter(&mut queue, blocks))
    }

    /// Locks `blocks`, waiting for those who came before.
    pub(super) async fn lock(self: &Arc<Self>, blocks: Range<u64>) -> RangeGuard {
        let guard = self.enter(&mut self.queue(), blocks);
        loop {
            let mut released = pin!(self.released.notified());
            released.as_mut().enable();
            if self.holds(guard.id) {
                return guard;
            }
            released.await;
        }
    }

    fn enter(self: &Arc<Self>, queue: &mut Queue, blocks: Range<u64>) -> RangeGuard {
        let id = queue.next_id;
        queue.next_id += 1;
        queue.entries.push((id, blocks));
        RangeGuard { lock: Arc::clone(self), id }
    }

    fn holds(&self, id: u64) -> bool {
        let queue = self.queue();
        let at = queue.entries.iter().position(|(other, _)| *other == id).expect("it was entered");
        let (earlier, rest) = queue.entries.split_at(at);
        earlier.iter().all(|(_, other)| !overlap(other, &rest[0].1))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        self.lock.queue().entries.retain(|(id, _)| *id != self.id);
        self.lock.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn overlapping_locks_are_granted_in_order_and_others_at_once() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.try_lock(0..10).unwrap();
        let mut second = Box::pin(lock.lock(5..20));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(lock.try_lock(15..16).is_none(), "nobody overtakes who waits");
        assert!(lock.try_lock(20..21).is_some());
        drop(first);
        let second = second.await;
        assert!(lock.try_lock(0..5).is_some());
        assert!(lock.try_lock(4..6).is_none());
        drop(second);
        assert!(lock.try_lock(0..20).is_some());
    }

    #[tokio::test]
    async fn a_waiter_that_gives_up_is_in_nobodys_way() {
        let lock = Arc::new(RangeLock::default());
        let first = lock.try_lock(0..10).unwrap();
        let mut second = Box::pin(lock.lock(5..20));
        assert!(second.as_mut().now_or_never().is_none());
        drop(second);
        drop(first);
        assert!(lock.try_lock(0..20).is_some());
    }
}
