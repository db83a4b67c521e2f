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

use super::{CacheGroup, SlotId};

/// Chunks of one class that wait for their medium: 32 MiB, half a second of a slow disk or a pause of a busy one. What is
/// not stored for want of room has to be fetched again.
const STORES_MAX: u32 = 512;

/// The right to have one more chunk waiting for its medium.
pub(super) struct Admission {
    _permit: OwnedSemaphorePermit,
}

/// A chunk on its way to its slot.
pub(super) struct Store {
    pub(super) id: SlotId,
    pub(super) chunk: Chunk,
    pub(super) admission: Admission,
}

pub(super) struct Writer {
    for_guests: Arc<Semaphore>,
    for_prefetch: Arc<Semaphore>,
    queues: Box<[Mutex<Queue>]>,
}

#[derive(Default)]
struct Queue {
    stores: VecDeque<Store>,
    /// A job is at work and will look into the queue again before it ends.
    is_attended: bool,
}

impl Writer {
    pub(super) fn new(media: usize) -> Writer {
        let semaphore = || Arc::new(Semaphore::new(STORES_MAX as usize));
        Writer {
            for_guests: semaphore(),
            for_prefetch: semaphore(),
            queues: (0..media).map(|_| Mutex::default()).collect(),
        }
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

    /// Puts a chunk on its way.
    pub(super) fn push(&self, group: &Arc<CacheGroup>, store: Store) {
        let medium = store.id.medium();
        let mut queue = self.queue(medium);
        queue.stores.push_back(store);
        if !std::mem::replace(&mut queue.is_attended, true) {
            let group = Arc::clone(group);
            tokio::task::spawn_blocking(move || group.writer.work(&group, medium));
        }
    }

    fn work(&self, group: &CacheGroup, medium: usize) {
        loop {
            let store = {
                let mut queue = self.queue(medium);
                match queue.stores.pop_front() {
                    Some(store) => store,
                    None => {
                        queue.is_attended = false;
                        return;
                    }
                }
            };
            group.store(store.id, &store.chunk);
            drop(store.admission);
        }
    }

    fn queue(&self, medium: usize) -> MutexGuard<'_, Queue> {
        self.queues[medium].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
