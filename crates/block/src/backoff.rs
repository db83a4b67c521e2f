//! Pauses between attempts, each twice as long as the one before.

use std::time::Duration;

/// Exponential backoff between a first and a longest pause. It knows no clock: whoever waits does that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    /// Pauses that were given since the beginning or the last success.
    given: u32,
    /// Whether the first attempt after a success is made at once.
    at_once: bool,
}

impl Backoff {
    /// Begins with a pause of `first`, and goes up to `max`.
    pub const fn new(first: Duration, max: Duration) -> Backoff {
        Backoff { first, max, given: 0, at_once: false }
    }

    /// The same, but that the first attempt is made without a pause.
    pub const fn at_once(first: Duration, max: Duration) -> Backoff {
        Backoff { at_once: true, ..Backoff::new(first, max) }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let given = self.given;
        self.given = given.saturating_add(1);
        match given.checked_sub(u32::from(self.at_once)) {
            Some(doublings) => Backoff::after(self.first, self.max, doublings),
            None => Duration::ZERO,
        }
    }

    /// An attempt succeeded: the next pause is the first again.
    pub fn reset(&mut self) {
        self.given = 0;
    }

    /// Whether no pause was given since the beginning or the last success.
    pub fn is_fresh(&self) -> bool {
        self.given == 0
    }

    /// The pause after so many doublings, for those who count failures themselves.
    pub fn after(first: Duration, max: Duration, doublings: u32) -> Duration {
        first.saturating_mul(1 << doublings.min(31)).min(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_millis(100);

    fn pauses(backoff: &mut Backoff, count: usize) -> Vec<u64> {
        (0..count).map(|_| u64::try_from(backoff.pause().as_millis()).unwrap()).collect()
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new(FIRST, MAX);
        assert_eq!(pauses(&mut backoff, 5), [20, 40, 80, 100, 100]);
        backoff.reset();
        assert_eq!(pauses(&mut backoff, 2), [20, 40]);
    }

    #[test]
    fn the_first_attempt_may_be_made_at_once() {
        let mut backoff = Backoff::at_once(FIRST, MAX);
        assert!(backoff.is_fresh());
        assert_eq!(pauses(&mut backoff, 4), [0, 20, 40, 80]);
        assert!(!backoff.is_fresh());
    }

    #[test]
    fn no_number_of_failures_overflows() {
        assert_eq!(Backoff::after(FIRST, MAX, u32::MAX), MAX);
        assert_eq!(Backoff::after(Duration::MAX, Duration::MAX, 7), Duration::MAX);
    }
}
