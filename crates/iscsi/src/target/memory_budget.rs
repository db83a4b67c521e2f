//! The memory of sessions: what each holds, and what all of them together may hold.
//!
//! Every session may hold [`RESERVED_BYTES`] whatever the others do, so that it always makes progress; what it
//! holds beyond comes out of [`SHARED_BYTES_MAX`]. Of that nobody gets more than is left for the others, so that
//! few sessions get much, many get little, and a late one gets as much as those before it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffers::Output;
use crate::limits::{
    EARLY_BYTES_MAX, EARLY_BYTES_RESERVED, IN_FLIGHT_BYTES_MAX, RESERVED_BYTES, SHARED_BYTES_MAX,
    UNSENT_BYTES_RESERVED,
};

/// The bytes that all sessions of a server hold beyond what is reserved for each.
#[derive(Debug, Default)]
pub(super) struct Budget {
    used: AtomicUsize,
}

impl Budget {
    /// What is taken.
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// What one session holds. What it shares is given back when it is dropped.
pub(super) struct SessionMemory {
    budget: Arc<Budget>,
    /// Of transfers that have begun.
    begun: usize,
    /// Of unsolicited data of commands that have not begun.
    early: usize,
    /// Of what is to be sent.
    queued: usize,
    /// Of empty buffers.
    spare: usize,
    /// What is taken from the budget.
    shared: usize,
}

impl SessionMemory {
    pub(super) fn new(budget: Arc<Budget>) -> SessionMemory {
        SessionMemory { budget, begun: 0, early: 0, queued: 0, spare: 0, shared: 0 }
    }

    fn own(&self) -> usize {
        self.begun + self.early + self.queued + self.spare
    }

    /// Whether no transfer has begun that has not ended.
    pub(super) fn is_idle(&self) -> bool {
        self.begun == 0
    }

    /// What it would have to take from the budget to hold so much more, and what it would have of it then.
    fn needs(&self, bytes: usize) -> (usize, usize) {
        let beyond = (self.own() + bytes).saturating_sub(RESERVED_BYTES);
        (beyond.saturating_sub(self.shared), beyond)
    }

    /// Takes from the budget what is needed to hold so much more; whether that was there.
    fn take(&mut self, bytes: usize) -> bool {
        let (more, beyond) = self.needs(bytes);
        let taken = |used: usize| (used + more + beyond <= SHARED_BYTES_MAX).then_some(used + more);
        let may =
            more == 0 || self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok();
        if may {
            self.shared += more;
        }
        may
    }

    /// Whether it is below its bounds, and would still be with so much more to send.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let (more, beyond) = self.needs(bytes);
        self.is_below_max(bytes) && (more == 0 || self.budget.used() + more + beyond <= SHARED_BYTES_MAX)
    }

    fn is_below_max(&self, bytes: usize) -> bool {
        self.begun + self.queued + bytes <= IN_FLIGHT_BYTES_MAX
    }

    /// Whether more may be taken from an initiator that has `queued` bytes of replies to take itself.
    pub(super) fn takes_input(&self, queued: usize) -> bool {
        queued < UNSENT_BYTES_RESERVED || self.has_room(UNSENT_BYTES_RESERVED)
    }

    /// Books unsolicited data of a command, if there is room for it.
    pub(super) fn try_early(&mut self, bytes: usize) -> bool {
        let early = self.early + bytes;
        if early > EARLY_BYTES_RESERVED && (early > EARLY_BYTES_MAX || !self.take(bytes)) {
            return false;
        }
        self.early = early;
        self.settle();
        true
    }

    /// Books a transfer that begins, if there is room for it; `early` bytes of it were booked before. The only
    /// one of a session may be longer than the bound of all of them.
    pub(super) fn try_begin(&mut self, bytes: usize, early: usize) -> bool {
        let more = bytes.saturating_sub(early);
        let may = more == 0 || ((self.is_idle() || self.is_below_max(more)) && self.take(more));
        if may {
            self.begin(bytes, early);
        }
        may
    }

    /// The same whether there is room or not: the only transfer of a session that has nothing to send, if it is
    /// not longer than [`TRANSFER_BYTES_RESERVED`](crate::limits::TRANSFER_BYTES_RESERVED), is in the reserve.
    pub(super) fn begin(&mut self, bytes: usize, early: usize) {
        self.early -= early;
        self.begun += bytes;
        self.settle();
    }

    /// Takes a transfer off.
    pub(super) fn end(&mut self, bytes: usize) {
        self.begun -= bytes;
        self.settle();
    }

    /// Takes unsolicited data off that no transfer began with.
    pub(super) fn end_early(&mut self, bytes: usize) {
        self.early -= bytes;
        self.settle();
    }

    /// Notes what is to be sent and the empty buffers. Both are bounded elsewhere: by asking here before they
    /// grow, or by taking no input.
    pub(super) fn note_output(&mut self, output: &Output) {
        (self.queued, self.spare) = (output.queued_bytes(), output.spare_bytes());
        self.settle();
    }

    /// Takes from the budget what is beyond the reserve, or gives back what is not.
    fn settle(&mut self) {
        let shared = self.own().saturating_sub(RESERVED_BYTES);
        if shared > self.shared {
            self.budget.used.fetch_add(shared - self.shared, Ordering::Relaxed);
        } else if shared < self.shared {
            self.budget.used.fetch_sub(self.shared - shared, Ordering::Relaxed);
        }
        self.shared = shared;
    }
}

impl Drop for SessionMemory {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.shared, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CONNECTIONS_MAX;

    fn sessions(count: usize) -> Vec<SessionMemory> {
        let budget = Arc::new(Budget::default());
        (0..count).map(|_| SessionMemory::new(Arc::clone(&budget))).collect()
    }

    /// Begins transfers of 1 MiB until there is no room; how many.
    fn fill(session: &mut SessionMemory) -> usize {
        std::iter::from_fn(|| session.try_begin(1 << 20, 0).then_some(())).count()
    }

    #[test]
    fn a_session_alone_has_as_much_as_any_may_have() {
        let mut sessions = sessions(1);
        assert_eq!(fill(&mut sessions[0]), IN_FLIGHT_BYTES_MAX >> 20);
    }

    #[test]
    fn a_late_session_gets_what_is_reserved_and_some_of_what_is_shared() {
        let mut sessions = sessions(40);
        let (last, others) = sessions.split_last_mut().unwrap();
        for session in others.iter_mut() {
            fill(session);
        }
        assert!(fill(last) >= RESERVED_BYTES >> 20);
        // What others give back can be had by it.
        others.iter_mut().for_each(|session| session.end(session.begun));
        last.end(last.begun);
        assert_eq!(fill(last), IN_FLIGHT_BYTES_MAX >> 20);
    }

    #[test]
    fn all_together_never_hold_more_than_was_promised() {
        let mut sessions = sessions(CONNECTIONS_MAX);
        for session in &mut sessions {
            fill(session);
            while session.try_early(64 << 10) {}
        }
        let held: usize = sessions.iter().map(SessionMemory::own).sum();
        assert!(held <= CONNECTIONS_MAX * RESERVED_BYTES + SHARED_BYTES_MAX, "{held}");
        let budget = Arc::clone(&sessions[0].budget);
        drop(sessions);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn unsolicited_data_is_refused_only_beyond_what_is_reserved_for_it() {
        let mut sessions = sessions(CONNECTIONS_MAX);
        sessions.iter_mut().for_each(|session| session.begin(RESERVED_BYTES, 0));
        for session in &mut sessions {
            fill(session);
        }
        for session in &mut sessions {
            assert!(session.try_early(EARLY_BYTES_RESERVED));
        }
        let early: usize = sessions.iter_mut().map(|a| usize::from(a.try_early(1 << 20))).sum();
        assert!(early < CONNECTIONS_MAX);
    }

    #[test]
    fn an_initiator_that_takes_no_replies_is_not_heard_for_long() {
        let mut sessions = sessions(1);
        let session = &mut sessions[0];
        assert!(session.takes_input(0));
        session.queued = IN_FLIGHT_BYTES_MAX;
        assert!(!session.takes_input(IN_FLIGHT_BYTES_MAX));
        // What can be sent at once is no reason to hear nothing.
        assert!(session.takes_input(0));
    }
}
