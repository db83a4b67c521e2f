//! Whether a connected parent answers: takes one out that does not, and lets it back when it does.
//!
//! A parent gets a strike for each request that another had to answer because it was late, unless it delivered
//! something meanwhile: that one is slow, not dead. Some strikes in a row open the breaker, and requests go
//! elsewhere. After a pause one real request goes there again: a chunk closes the breaker, another strike opens
//! it for twice the time. Since a probe that is never decided is followed by the next after the same pause,
//! no parent is forgotten.

use std::time::Duration;

use crate::limits::{BREAKER_OPENINGS_MAX, BREAKER_PAUSE_MAX, BREAKER_PAUSE_MIN, BREAKER_STRIKES_MAX};

/// What a strike did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// It was counted.
    Counted,
    /// It opened the breaker, or opened it again.
    Opened,
}

/// Whether one parent answers. See the module's documentation.
#[derive(Debug, Default)]
pub struct CircuitBreaker {
    state: BreakerState,
    /// In a row, while closed.
    strikes: u32,
    /// Since the last chunk.
    openings: u32,
}

#[derive(Debug, Clone, Copy, Default)]
enum BreakerState {
    #[default]
    Closed,
    Open {
        probe_at: Duration,
    },
    /// A probe is out. Should it vanish, the next may go then.
    Probing {
        next_at: Duration,
    },
}

impl CircuitBreaker {
    /// Whether a request may go there at `now`.
    pub fn allows(&self, now: Duration) -> bool {
        match self.state {
            BreakerState::Closed => true,
            BreakerState::Open { probe_at: at } | BreakerState::Probing { next_at: at } => now >= at,
        }
    }

    /// A request went there; if the breaker is open and the pause over, it is the probe.
    pub fn asked(&mut self, now: Duration) {
        if !matches!(self.state, BreakerState::Closed) && self.allows(now) {
            self.state = BreakerState::Probing { next_at: now + self.pause() };
        }
    }

    /// Whether it opened so often without a chunk between that somebody should know.
    pub fn is_beaten(&self) -> bool {
        self.openings >= BREAKER_OPENINGS_MAX
    }

    /// It delivered a chunk, or is connected anew.
    pub fn delivered(&mut self) {
        *self = CircuitBreaker::default();
    }

    /// It was late, and another delivered instead. While it is open, only the probe's strike counts: those of
    /// older requests say nothing new.
    pub fn strike(&mut self, now: Duration) -> Strike {
        self.strikes = self.strikes.saturating_add(1);
        let opens = match self.state {
            BreakerState::Closed => self.strikes >= BREAKER_STRIKES_MAX,
            BreakerState::Open { .. } => false,
            BreakerState::Probing { .. } => true,
        };
        if !opens {
            return Strike::Counted;
        }
        self.openings = self.openings.saturating_add(1);
        self.state = BreakerState::Open { probe_at: now + self.pause() };
        Strike::Opened
    }

    fn pause(&self) -> Duration {
        let doublings = self.openings.saturating_sub(1).min(16);
        BREAKER_PAUSE_MIN.saturating_mul(1 << doublings).min(BREAKER_PAUSE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn opened() -> CircuitBreaker {
        let mut breaker = CircuitBreaker::default();
        for strike in 1..=BREAKER_STRIKES_MAX {
            assert!(breaker.allows(SECOND));
            let expected = if strike < BREAKER_STRIKES_MAX { Strike::Counted } else { Strike::Opened };
            assert_eq!(breaker.strike(SECOND), expected);
        }
        breaker
    }

    #[test]
    fn strikes_in_a_row_open_it_and_a_chunk_between_them_does_not() {
        assert!(!opened().allows(SECOND));
        let mut breaker = CircuitBreaker::default();
        for _ in 0..100 {
            assert_eq!(breaker.strike(SECOND), Strike::Counted);
            breaker.delivered();
        }
        assert!(breaker.allows(SECOND));
    }

    #[test]
    fn one_probe_after_each_pause_decides() {
        let mut breaker = opened();
        let due = SECOND + BREAKER_PAUSE_MIN;
        assert!(breaker.allows(due));
        breaker.asked(due);
        assert!(!breaker.allows(due), "one probe at a time");
        assert_eq!(breaker.strike(due), Strike::Opened);
        assert!(!breaker.allows(due + BREAKER_PAUSE_MIN), "the second pause is longer");
        assert!(breaker.allows(due + BREAKER_PAUSE_MIN * 2));
        breaker.asked(due + BREAKER_PAUSE_MIN * 2);
        breaker.delivered();
        assert!(breaker.allows(due + BREAKER_PAUSE_MIN * 2), "closed");
    }

    #[test]
    fn it_always_probes_again_however_often_probes_fail_or_vanish() {
        let (mut breaker, mut now) = (opened(), SECOND);
        for round in 0..100 {
            now += BREAKER_PAUSE_MAX;
            assert!(breaker.allows(now), "round {round}");
            breaker.asked(now);
            if round % 2 == 0 {
                breaker.strike(now);
            }
        }
    }
}
