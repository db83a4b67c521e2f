//! One chunk on its way here, and all who wait for it.
//!
//! A flight is a task. It asks upstream with the highest priority that anybody waiting has: when that
//! rises it withdraws its request, by dropping the future, and asks again. When nobody waits any more it
//! withdraws the request and ends, so nothing has to stop it: it lives exactly as long as its waiters
//! and, after its chunk came, until the chunk is stored.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Chunk, FetchError, Priority};
use tokio::sync::{Notify, watch};

const PRIORITIES: [Priority; 3] = [Priority::Background, Priority::Profile, Priority::Guest];

pub(super) type Answer = Result<Chunk, FetchError>;

pub(super) struct SingleFlight {
    /// How many wait, by priority.
    waiting: Mutex<[u32; PRIORITIES.len()]>,
    waiting_changed: Notify,
    answer: watch::Sender<Option<Answer>>,
    /// Which upstream is asked. Only compared, never followed.
    upstream: usize,
}

/// One who waits. Dropping it is giving up.
pub(super) struct Waiter {
    flight: Arc<SingleFlight>,
    priority: Priority,
    answer: watch::Receiver<Option<Answer>>,
}

impl SingleFlight {
    pub(super) fn new(upstream: usize) -> SingleFlight {
        SingleFlight {
            waiting: Mutex::default(),
            waiting_changed: Notify::new(),
            answer: watch::Sender::new(None),
            upstream,
        }
    }

    /// Joins those who wait. To be called under the lock of the shard that the flight is found in.
    pub(super) fn join(self: &Arc<Self>, priority: Priority) -> Waiter {
        self.waiting()[priority as usize] += 1;
        self.waiting_changed.notify_waiters();
        Waiter { flight: Arc::clone(self), priority, answer: self.answer.subscribe() }
    }

    /// The chunk, if it came already.
    pub(super) fn arrived(&self) -> Option<Chunk> {
        self.answer.borrow().clone()?.ok()
    }

    pub(super) fn is_answered(&self) -> bool {
        self.answer.borrow().is_some()
    }

    /// The highest priority of those who wait; `None` if nobody does.
    pub(super) fn wanted(&self) -> Option<Priority> {
        let waiting = self.waiting();
        PRIORITIES.into_iter().rev().find(|&priority| waiting[priority as usize] > 0)
    }

    /// Waits until somebody more urgent than `priority` waits, or nobody at all.
    pub(super) async fn is_raised_or_left(&self, priority: Priority) {
        loop {
            let mut changed = pin!(self.waiting_changed.notified());
            changed.as_mut().enable();
            if self.wanted().is_none_or(|wanted| wanted > priority) {
                return;
            }
            changed.await;
        }
    }

    /// Tells everybody who waits.
    pub(super) fn answer(&self, answer: Answer) {
        self.answer.send_replace(Some(answer));
    }

    fn waiting(&self) -> MutexGuard<'_, [u32; PRIORITIES.len()]> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiter {
    /// Whether the flight asks an upstream other than this one.
    pub(super) fn is_elsewhere(&self, upstream: usize) -> bool {
        self.flight.upstream != upstream
    }

    /// Waits for the answer.
    pub(super) async fn answer(&mut self) -> Answer {
        let answered = self.answer.wait_for(Option::is_some).await;
        let answer = answered.ok().and_then(|answer| answer.clone());
        answer.expect("the flight, which sends the answer, is held here")
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.flight.waiting()[self.priority as usize] -= 1;
        self.flight.waiting_changed.notify_waiters();
    }
}
