//! Why a guest stands still that is meant to run, since when, and what has yet to be done so that it goes on.
//!
//! One such record belongs to each VM's process. Whoever cannot let a guest go on leaves a [`Debt`] here;
//! [`Qemu::supervise`](super::Qemu::supervise) tries again until it is paid, and whoever shows the VM shows
//! [`Standstill`]. So no guest stands still silently.
//!
//! - *Consistency:* a debt is paid by whoever has the VM's turn to decide whether the guest runs, and looks at it
//!   again once it has. A migration takes the debts over: it knows whether the guest is to run afterwards.
//! - *Crash:* a later daemon owes [`Debt::EndMigration`] from its first look on, and [`Debt::Thaw`] if the file
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
pub(crate) enum Debt {
    /// A migration that nobody drives any more has to end, and the guest to go on.
    EndMigration,
    /// The guest has to go on.
    Resume,
    /// Its file systems have to be thawed.
    Thaw,
}

impl Debt {
    pub(crate) const ALL: [Debt; 3] = [Debt::EndMigration, Debt::Resume, Debt::Thaw];

    fn cause(self, reason: String) -> Cause {
        match self {
            Debt::EndMigration => Cause::MigrationNotEnded(reason),
            Debt::Resume => Cause::NotResumed(reason),
            Debt::Thaw => Cause::NotThawed(reason),
        }
    }
}

/// What is known and owed at present.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    known: Mutex<Known>,
    /// A debt was added.
    owed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// For each debt that there is: the standstill, unless paying it has not been tried yet.
    debts: [Option<Option<Standstill>>; Debt::ALL.len()],
    /// What QEMU's state says.
    seen: Option<Standstill>,
}

impl Standing {
    /// Why the guest stands still, if it does.
    pub(crate) fn standstill(&self) -> Option<Standstill> {
        let known = self.known();
        known.debts.iter().flatten().flatten().next().or(known.seen.as_ref()).cloned()
    }

    /// Notes something that has yet to be done, and why it could not be, if that was tried.
    pub(crate) fn owe(&self, debt: Debt, reason: Option<String>) {
        {
            let mut known = self.known();
            let noted = known.debts[debt as usize].get_or_insert_default();
            if let Some(reason) = reason {
                note(noted, debt.cause(reason));
            }
        }
        self.owed.notify_one();
    }

    /// Notes that a debt could not be paid. `true` if it could not be for the first time.
    pub(crate) fn could_not(&self, debt: Debt, reason: String) -> bool {
        match &mut self.known().debts[debt as usize] {
            Some(noted) => note(noted, debt.cause(reason)),
            // Somebody else paid it meanwhile.
            None => false,
        }
    }

    /// Notes that a debt is paid, or that the caller takes it over. `true` if there was one.
    pub(crate) fn settle(&self, debt: Debt) -> bool {
        self.known().debts[debt as usize].take().is_some()
    }

    pub(crate) fn owes(&self, debt: Debt) -> bool {
        self.known().debts[debt as usize].is_some()
    }

    pub(crate) fn owes_anything(&self) -> bool {
        self.known().debts.iter().any(Option::is_some)
    }

    /// Waits until a debt is added, or was since the last such wait.
    pub(crate) async fn owed(&self) {
        self.owed.notified().await;
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
    fn a_debt_shows_once_it_could_not_be_paid_and_until_it_is() {
        let standing = Standing::default();
        standing.owe(Debt::EndMigration, None);
        assert!(standing.owes_anything() && standing.standstill().is_none(), "nothing failed so far");
        assert!(standing.could_not(Debt::EndMigration, "busy".to_owned()));
        let first = standing.standstill().unwrap();
        assert!(!standing.could_not(Debt::EndMigration, "still busy".to_owned()));
        let second = standing.standstill().unwrap();
        assert_eq!(second.cause, Cause::MigrationNotEnded("still busy".to_owned()));
        assert_eq!(second.since, first.since, "it stands still since the first time");
        assert!(standing.settle(Debt::EndMigration));
        assert_eq!(standing.standstill(), None);
        assert!(!standing.could_not(Debt::EndMigration, "late".to_owned()), "nobody owes it any more");
        assert_eq!(standing.standstill(), None);
    }

    #[test]
    fn what_is_owed_goes_before_what_is_seen() {
        let standing = Standing::default();
        standing.see(Some(Cause::Halted("paused".to_owned())));
        standing.owe(Debt::Resume, Some("not finalized".to_owned()));
        assert_eq!(standing.standstill().unwrap().cause, Cause::NotResumed("not finalized".to_owned()));
        standing.settle(Debt::Resume);
        assert_eq!(standing.standstill().unwrap().cause, Cause::Halted("paused".to_owned()));
        standing.see(None);
        assert_eq!(standing.standstill(), None);
    }
}
