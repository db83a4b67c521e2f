//! One parent's connection: may requests go over it, and when is it dialed again?
//!
//! Retries: dials go on for ever, with pauses that double up to a bound and differ from child to child, so that
//! they do not all come back to a restarted parent at one moment.

use std::time::Duration;

use block::Backoff;

use crate::limits::{BAN, REDIAL_MAX, REDIAL_MIN};

/// Whether requests may go to a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is up, or was not dialed yet: requests wait for the dial.
    Usable,
    /// It failed and has not come back, or is banned.
    Down,
}

/// One parent as a node sees it.
#[derive(Debug)]
pub struct LinkState {
    phase: LinkPhase,
    /// Failures since it last delivered a chunk.
    failures: u32,
    /// Spreads the redials of many children over time.
    salt: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LinkPhase {
    Fresh,
    Up,
    Down { dial_at: Duration },
    Banned { until: Duration },
}

impl LinkState {
    /// A parent that was not dialed yet. `salt` differs from child to child, so that they do not all come back
    /// to a restarted parent at one moment.
    pub fn new(salt: u64) -> LinkState {
        LinkState { phase: LinkPhase::Fresh, failures: 0, salt }
    }

    /// A parent that lied before.
    pub fn banned(salt: u64, until: Duration) -> LinkState {
        LinkState { phase: LinkPhase::Banned { until }, ..LinkState::new(salt) }
    }

    /// Whether requests may go there.
    pub fn standing(&self) -> Standing {
        match self.phase {
            LinkPhase::Fresh | LinkPhase::Up => Standing::Usable,
            LinkPhase::Down { .. } | LinkPhase::Banned { .. } => Standing::Down,
        }
    }

    /// Whether it greeted and was not lost since.
    pub fn is_up(&self) -> bool {
        self.phase == LinkPhase::Up
    }

    /// When it may be dialed.
    pub fn dial_at(&self) -> Duration {
        match self.phase {
            LinkPhase::Fresh | LinkPhase::Up => Duration::ZERO,
            LinkPhase::Down { dial_at } => dial_at,
            LinkPhase::Banned { until } => until,
        }
    }

    /// It greeted.
    pub fn up(&mut self) {
        self.phase = LinkPhase::Up;
    }

    /// It delivered a chunk: its next failure counts as the first.
    pub fn delivered(&mut self) {
        self.failures = 0;
    }

    /// The first dial takes long: requests should not wait for it. The dial itself goes on.
    pub fn late(&mut self, now: Duration) {
        if self.phase == LinkPhase::Fresh {
            self.phase = LinkPhase::Down { dial_at: now };
        }
    }

    /// The dial failed, or the link was lost.
    pub fn failed(&mut self, now: Duration) {
        let wait = Backoff::after(REDIAL_MIN, REDIAL_MAX, self.failures);
        // Between 75 and 100 percent of the wait, different each time.
        let part = self.salt.rotate_left(self.failures.wrapping_mul(7)) % 256;
        let wait = wait - wait * u32::try_from(part).expect("less than 256") / 1024;
        self.failures = self.failures.saturating_add(1);
        self.phase = LinkPhase::Down { dial_at: now + wait };
    }

    /// It sent a wrong chunk. Returns until when it is banned.
    pub fn lied(&mut self, now: Duration) -> Duration {
        let until = now + BAN;
        self.phase = LinkPhase::Banned { until };
        until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn redials_back_off_until_a_chunk_came() {
        let mut link = LinkState::new(0x1234_5678_9abc_def0);
        let waits: Vec<Duration> = (0..10)
            .map(|_| {
                link.up();
                link.failed(SECOND);
                link.dial_at() - SECOND
            })
            .collect();
        assert!(waits.windows(2).all(|pair| pair[1] > pair[0] || pair[1] >= REDIAL_MAX * 3 / 4), "{waits:?}");
        assert!(waits.iter().all(|wait| (REDIAL_MIN * 3 / 4..=REDIAL_MAX).contains(wait)), "{waits:?}");
        link.up();
        link.delivered();
        link.failed(SECOND);
        assert!(link.dial_at() - SECOND <= REDIAL_MIN);
    }

    #[test]
    fn a_late_first_dial_and_a_ban_keep_requests_away() {
        let mut link = LinkState::new(0);
        assert_eq!(link.standing(), Standing::Usable);
        link.late(SECOND);
        assert_eq!(link.standing(), Standing::Down);
        link.up();
        link.late(SECOND);
        assert_eq!(link.standing(), Standing::Usable, "a link that is up is not late");
        let until = link.lied(SECOND);
        assert_eq!((link.standing(), link.dial_at()), (Standing::Down, SECOND + BAN));
        assert_eq!(LinkState::banned(0, until).standing(), Standing::Down);
    }
}
