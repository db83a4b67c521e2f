//! Why a guest stands still that is meant to run, since when, and what has yet to be done so that it goes on.
//!
//! One such record belongs to each VM's process. Whoever cannot let a guest go on requests a [`Recovery`] here;
//! [`Qemu::supervise`](super::Qemu::supervise) tries again until that succeeds, and whoever shows the VM shows
//! [`Standstill`]. So no guest stands still silently.
//!
//! - *Consistency:* a recovery is done by whoever has the VM's turn to decide whether the guest runs, and who looks
//!   whether it is still due once it has. A migration takes over what is due: it knows whether the guest is to run
//!   afterwards.
//! - *Crash:* a later daemon requests [`Recovery::EndMigration`] at its first look, and [`Recovery::Thaw`] if the file
//!   that [`VmFiles::frozen`](super::spec::VmFiles::frozen) names is there.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::Notify;

/// A guest that stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standstill {
    /// Why.
    pub cause: Cause,
    /// Since when, as far as this daemon knows.
    pub since: SystemTime,
}

/// Why a guest stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// Its disk has no room for what it writes.
    NoRoom,
    /// A migration is in the way that cannot be cancelled; with the reason.
    MigrationNotEnded(String),
    /// QEMU refuses to let it go on; with QEMU's reason.
    NotResumed(String),
    /// Its file systems were frozen for a snapshot, and its agent does not thaw them; with the reason.
    NotThawed(String),
    /// It is in this state of QEMU's, which VirtMan did not bring about.
    Halted(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::NoRoom => write!(f, "there is no room for what it writes to its disk"),
            Cause::MigrationNotEnded(reason) => write!(f, "its migration cannot be cancelled: {reason}"),
            Cause::NotResumed(reason) => write!(f, "QEMU does not let it go on: {reason}"),
            Cause::NotThawed(reason) => {
                write!(f, "its file systems may still be frozen for a snapshot: {reason}")
            }
            Cause::Halted(state) => write!(f, "QEMU says '{state}'"),
        }
    }
}

impl Cause {
    /// Whether it is the same but for its reason.
    fn is_of_kind(&self, other: &Cause) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// What has yet to be done so that a guest goes on, in the order in which it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Recovery {
    /// A migration that nobody drives any more has to end, and the guest to go on.
    EndMigration,
    /// The guest has to go on.
    Resume,
    /// Its file systems have to be thawed.
    Thaw,
}

impl Recovery {
    pub(crate) const ALL: [Recovery; 3] = [Recovery::EndMigration, Recovery::Resume, Recovery::Thaw];

    fn cause(self, reason: String) -> Cause {
        match self {
            Recovery::EndMigration => Cause::MigrationNotEnded(reason),
            Recovery::Resume => Cause::NotResumed(reason),
            Recovery::Thaw => Cause::NotThawed(reason),
        }
    }
}

/// What is known and due at present.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    known: Mutex<Known>,
    /// A recovery was requested.
    requested: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// For each recovery that is due: the standstill, once it failed.
    due: [Option<Option<Standstill>>; Recovery::ALL.len()],
    /// What QEMU's state says.
    seen: Option<Standstill>,
}

impl Standing {
    /// Why the guest stands still, if it does.
    pub(crate) fn standstill(&self) -> Option<Standstill> {
        let known = self.known();
        known.due.iter().flatten().flatten().next().or(known.seen.as_ref()).cloned()
    }

    /// Makes a recovery due; with the reason if it was tried already and failed.
    pub(crate) fn request(&self, recovery: Recovery, reason: Option<String>) {
        {
            let mut known = self.known();
            let noted = known.due[recovery as usize].get_or_insert_default();
            if let Some(reason) = reason {
                note(noted, recovery.cause(reason));
            }
        }
        self.requested.notify_one();
    }

    /// Notes that a recovery failed. `true` if that is the first time.
    pub(crate) fn failed(&self, recovery: Recovery, reason: String) -> bool {
        match &mut self.known().due[recovery as usize] {
            Some(noted) => note(noted, recovery.cause(reason)),
            // Somebody else did it meanwhile.
            None => false,
        }
    }

    /// Notes that a recovery is done, or that the caller takes it over. `true` if it was due.
    pub(crate) fn finish(&self, recovery: Recovery) -> bool {
        self.known().due[recovery as usize].take().is_some()
    }

    pub(crate) fn is_due(&self, recovery: Recovery) -> bool {
        self.known().due[recovery as usize].is_some()
    }

    pub(crate) fn is_any_due(&self) -> bool {
        self.known().due.iter().any(Option::is_some)
    }

    /// Waits until a recovery is requested, or was since the last such wait.
    pub(crate) async fn requested(&self) {
        self.requested.notified().await;
    }

    /// Notes what QEMU's state says.
    pub(crate) fn see(&self, cause: Option<Cause>) {
        let seen = &mut self.known().seen;
        match cause {
            Some(cause) => _ = note(seen, cause),
            None => *seen = None,
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Notes a cause; its beginning stays that of the first of its kind. `true` if there was none of its kind.
fn note(noted: &mut Option<Standstill>, cause: Cause) -> bool {
    match noted {
        Some(before) if before.cause.is_of_kind(&cause) => {
            before.cause = cause;
            false
        }
        _ => {
            *noted = Some(Standstill { cause, since: SystemTime::now() });
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_shows_once_it_failed_and_until_it_is_done() {
        let standing = Standing::default();
        standing.request(Recovery::EndMigration, None);
        assert!(standing.is_any_due() && standing.standstill().is_none(), "nothing failed so far");
        assert!(standing.failed(Recovery::EndMigration, "busy".to_owned()));
        let first = standing.standstill().unwrap();
        assert!(!standing.failed(Recovery::EndMigration, "still busy".to_owned()));
        let second = standing.standstill().unwrap();
        assert_eq!(second.cause, Cause::MigrationNotEnded("still busy".to_owned()));
        assert_eq!(second.since, first.since, "it stands still since the first time");
        assert!(standing.finish(Recovery::EndMigration));
        assert_eq!(standing.standstill(), None);
        assert!(!standing.failed(Recovery::EndMigration, "late".to_owned()), "it is not due any more");
        assert_eq!(standing.standstill(), None);
    }

    #[test]
    fn what_is_due_goes_before_what_is_seen() {
        let standing = Standing::default();
        standing.see(Some(Cause::Halted("paused".to_owned())));
        standing.request(Recovery::Resume, Some("not finalized".to_owned()));
        assert_eq!(standing.standstill().unwrap().cause, Cause::NotResumed("not finalized".to_owned()));
        standing.finish(Recovery::Resume);
        assert_eq!(standing.standstill().unwrap().cause, Cause::Halted("paused".to_owned()));
        standing.see(None);
        assert_eq!(standing.standstill(), None);
    }
}
