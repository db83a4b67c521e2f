//! Whether a medium can be relied on.
//!
//! A medium begins healthy. It *fails* for good after [`FAILURES_MAX`] failures, and *leaves* when it is removed;
//! neither is ever undone: what is added again is a new [`Medium`](super::medium::Medium). So whoever holds a medium
//! and sees that it is usable while he holds a shard's lock knows that its slots in that shard are still in use.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// How many reads and writes may fail, or bring wrong bytes, before the medium is given up: enough to live with a bad
/// sector here and there, few enough that a dead disk stalls only a handful of guests' reads.
pub(super) const FAILURES_MAX: u32 = 16;

/// What a medium of a cache group is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MediumState {
    /// It is used.
    Healthy,
    /// It failed too often and is not used any more.
    Failed,
    /// It was removed and is not used any more, but reads of it are still on their way.
    Leaving,
}

const HEALTHY: u8 = 0;
const FAILED: u8 = 1;
const LEAVING: u8 = 2;

/// The health of one medium.
#[derive(Default)]
pub(super) struct Health {
    state: AtomicU8,
    failures: AtomicU32,
    is_full: AtomicBool,
    /// What went wrong last.
    reason: Mutex<Option<String>>,
}

impl Health {
    pub(super) fn state(&self) -> MediumState {
        match self.state.load(Ordering::Relaxed) {
            HEALTHY => MediumState::Healthy,
            FAILED => MediumState::Failed,
            _ => MediumState::Leaving,
        }
    }

    /// Whether the medium may be read and written.
    pub(super) fn is_usable(&self) -> bool {
        self.state.load(Ordering::Relaxed) == HEALTHY
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    pub(super) fn reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The medium was removed.
    pub(super) fn leave(&self) {
        self.state.store(LEAVING, Ordering::Relaxed);
    }

    /// Counts an error. A full file system is none: what is cached there can still be read. A medium that ends before its
    /// end has failed at once: if it became longer again there would be holes where chunks were.
    pub(super) fn note_error(&self, medium: &str, error: &io::Error) {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                if !self.is_full.swap(true, Ordering::Relaxed) {
                    tracing::warn!(medium, "medium_full: no space left; it stays smaller than was asked for");
                    self.set_reason(&error.to_string());
                }
            }
            io::ErrorKind::UnexpectedEof => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                self.fail(medium, "it was cut short while it was in use");
            }
            _ => self.count(medium, &error.to_string()),
        }
    }

    /// Counts a chunk that was whole when it was here last and is not what it was.
    pub(super) fn note_wrong_chunk(&self, medium: &str) {
        self.count(medium, "it gave other bytes than were written to it");
    }

    fn count(&self, medium: &str, reason: &str) {
        tracing::debug!(medium, reason, "a cache medium failed");
        if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES_MAX {
            self.fail(medium, reason);
        } else {
            self.set_reason(reason);
        }
    }

    fn fail(&self, medium: &str, reason: &str) {
        // The reason first: who sees that the medium failed finds it.
        self.set_reason(reason);
        if self.state.compare_exchange(HEALTHY, FAILED, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            tracing::warn!(medium, reason, "medium_failed: it is no longer used");
        }
    }

    /// What goes wrong after the medium failed does not change why it did.
    fn set_reason(&self, reason: &str) {
        if !self.is_usable() {
            return;
        }
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(times: u32) -> Health {
        let health = Health::default();
        (0..times).for_each(|_| health.note_error("test", &io::Error::other("for a test")));
        health
    }

    #[test]
    fn errors_and_wrong_chunks_add_up_until_the_medium_has_failed() {
        let health = failed(FAILURES_MAX - 1);
        assert_eq!(health.state(), MediumState::Healthy);
        health.note_wrong_chunk("test");
        assert_eq!((health.state(), health.failures()), (MediumState::Failed, FAILURES_MAX));
        assert!(health.reason().unwrap().contains("other bytes"), "{:?}", health.reason());
    }

    #[test]
    fn a_medium_that_was_cut_short_has_failed_at_once_and_for_this_reason() {
        let health = Health::default();
        health.note_error("test", &io::ErrorKind::UnexpectedEof.into());
        assert_eq!(health.state(), MediumState::Failed);
        (0..FAILURES_MAX).for_each(|_| health.note_wrong_chunk("test"));
        assert!(health.reason().unwrap().contains("cut short"), "{:?}", health.reason());
    }

    #[test]
    fn a_full_file_system_is_no_failure_but_is_told() {
        let health = Health::default();
        for _ in 0..2 * FAILURES_MAX {
            health.note_error("test", &io::ErrorKind::StorageFull.into());
        }
        assert_eq!((health.state(), health.failures()), (MediumState::Healthy, 0));
        assert!(health.reason().is_some());
    }

    #[test]
    fn a_medium_that_leaves_does_not_come_back_by_failing() {
        let health = failed(FAILURES_MAX - 1);
        health.leave();
        health.note_wrong_chunk("test");
        assert_eq!(health.state(), MediumState::Leaving);
    }
}
