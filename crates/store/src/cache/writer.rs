//! Putting arrived chunks on their medium, after those who waited have them.
//!
//! One job on the blocking pool per medium at a time: cache fills are exactly the writes that the kernel
//! throttles, so they must not stall the threads that serve guests, and a job per chunk would cost as
//! much as hashing it.
//!
//! Bound: [`STORES_MAX`] chunks for each of two classes, so that prefetching cannot take the room from
//! guests. When it is full, prefetches *wait* with their answer, which slows the prefetch down to the
//! speed of the medium; a guest is never made to wait: its chunk is answered and not stored.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Chunk, Priority};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::CacheGroup;
use super::medium::Medium;
use super::set::SlotId;

/// Chunks of one class that wait for their medium: 32 MiB, half a second of a slow disk or a pause of a busy one. What is
/// not stored for want of room has to be fetched again.
const STORES_MAX: u32 = 512;

/// The right to have one more chunk waiting for its medium.
pub(super) struct Admission {
    _permit: OwnedSemaphorePermit,
}

/// A chunk on its way to its slot.
pub(super) struct Store {
    pub(super) medium: Arc<Medium>,
    pub(super) id: SlotId,
    pub(super) chunk: Chunk,
    pub(super) _admission: Admission,
}

pub(super) struct Writer {
    for_guests: Arc<Semaphore>,
    for_prefetch: Arc<Semaphore>,
}

/// The chunks on their way to one medium.
#[derive(Default)]
pub(super) struct Queue(Mutex<Stores>);

#[derive(Default)]
struct Stores {
    waiting: VecDeque<Store>,
    /// A job is at work and will look into the queue again before it ends.
    is_attended: bool,
}

impl Writer {
    pub(super) fn new() -> Writer {
        let semaphore = || Arc::new(Semaphore::new(STORES_MAX as usize));
        Writer { for_guests: semaphore(), for_prefetch: semaphore() }
    }

    fn class(&self, priority: Priority) -> &Arc<Semaphore> {
        match priority {
            Priority::Guest => &self.for_guests,
            Priority::Profile | Priority::Background => &self.for_prefetch,
        }
    }

    /// Admission at once, if there is room.
    pub(super) fn try_admit(&self, priority: Priority) -> Option<Admission> {
        let permit = Arc::clone(self.class(priority)).try_acquire_owned().ok()?;
        Some(Admission { _permit: permit })
    }

    /// Admission when there is room.
    pub(super) async fn admit(&self, priority: Priority) -> Option<Admission> {
        let permit = Arc::clone(self.class(priority)).acquire_owned().await.ok()?;
        Some(Admission { _permit: permit })
    }

    /// Waits until nothing is on its way.
    pub(super) async fn settled(&self) {
        for class in [&self.for_guests, &self.for_prefetch] {
            // Nobody closes the semaphores; if it were so, nothing could be on its way.
            drop(class.acquire_many(STORES_MAX).await);
        }
    }
}

impl Queue {
    /// Puts a chunk on its way to its medium, which this is the queue of.
    pub(super) fn push(&self, group: &Arc<CacheGroup>, store: Store) {
        let medium = Arc::clone(&store.medium);
        let mut stores = self.stores();
        stores.waiting.push_back(store);
        if !std::mem::replace(&mut stores.is_attended, true) {
            let group = Arc::clone(group);
            tokio::task::spawn_blocking(move || medium.queue.work(&group));
        }
    }

    fn work(&self, group: &CacheGroup) {
        while let Some(store) = self.next() {
            group.store(&store);
        }
    }

    /// The next chunk; if there is none the job that asks has ended.
    fn next(&self) -> Option<Store> {
        let mut stores = self.stores();
        let next = stores.waiting.pop_front();
        stores.is_attended = next.is_some();
        next
    }

    fn stores(&self) -> MutexGuard<'_, Stores> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
