//! How others reach a session: what they put, and how they learn that it was done.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, Semaphore, oneshot};

use crate::scsi::{Aborting, Era};

/// Why a session has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Eviction {
    /// The same initiator port logged in again, or the target was reset: at once.
    Replaced,
    /// The target is gone: the initiator is told.
    Removed,
}

/// Dropped when aborted commands have ended.
pub(super) type Promise = oneshot::Sender<()>;

/// What others have to say to a session.
#[derive(Default)]
pub(super) struct Mail {
    pub(super) eviction: Option<Eviction>,
    /// Units whose commands have to be aborted, as far as they began before an era, and whoever waits for it.
    pub(super) aborts: BTreeMap<usize, (Era, Vec<Promise>)>,
}

/// Where it is put. Its size is bounded by the number of units, and of those who wait.
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    pub(super) arrived: Notify,
    /// Closed when the session has ended.
    ended: Semaphore,
}

impl Mailbox {
    pub(super) fn new() -> Mailbox {
        Mailbox { mail: Mutex::default(), arrived: Notify::new(), ended: Semaphore::new(0) }
    }

    fn put(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner));
        self.arrived.notify_one();
    }

    /// Takes all mail.
    pub(super) fn take(&self) -> Mail {
        std::mem::take(&mut *self.mail.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn evict(&self, eviction: Eviction) {
        self.put(|mail| mail.eviction = Some(eviction));
    }

    /// Has the commands at a unit aborted that began before `era`.
    pub(super) fn abort(&self, lun: usize, era: Era) -> Aborting {
        let (promise, kept) = oneshot::channel();
        if !self.ended.is_closed() {
            self.put(|mail| {
                let (before, promises) = mail.aborts.entry(lun).or_default();
                *before = era.max(*before);
                promises.push(promise);
            });
        }
        Box::pin(async move {
            // Nothing is ever sent: the promise is kept by dropping it, which a session that ends does too.
            let _ = kept.await;
        })
    }

    /// Says that the session has ended, to whoever waits for that or for anything else of it.
    pub(super) fn close(&self) {
        self.ended.close();
        drop(self.take());
    }

    pub(super) async fn has_ended(&self) {
        // There are no permits: it answers when the semaphore is closed.
        let _ = self.ended.acquire().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_waits_for_a_session_that_ends_is_answered() {
        let mailbox = Mailbox::new();
        let before = mailbox.abort(0, Era::default());
        mailbox.close();
        before.await;
        mailbox.abort(0, Era::default()).await;
        mailbox.has_ended().await;
    }
}
