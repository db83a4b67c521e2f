//! What requests may take of a good that they share: tokens that come back with time, hedges that come back with
//! requests, and the number of fetches in flight by urgency.

use std::time::Duration;

use block::Priority;

use crate::limits::{
    FETCHES_BACKGROUND_MAX, FETCHES_GUEST_MAX, FETCHES_PROFILE_MAX, HEDGES_BURST, HEDGES_PER_SECOND,
    HEDGES_PERCENT,
};

/// Fetches of that urgency that a node may have in flight. Three separate budgets: none waits for another's.
pub fn in_flight_max(priority: Priority) -> usize {
    match priority {
        Priority::Guest => FETCHES_GUEST_MAX,
        Priority::Profile => FETCHES_PROFILE_MAX,
        Priority::Background => FETCHES_BACKGROUND_MAX,
    }
}

/// Tokens that come back at a steady rate, up to a bound. Full at first.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    tokens: f64,
    burst: f64,
    per_second: f64,
    at: Duration,
}

impl TokenBucket {
    /// Holds at most `burst` tokens and gets `per_second` of them back. Both are positive.
    pub fn new(burst: f64, per_second: f64) -> TokenBucket {
        TokenBucket { tokens: burst, burst, per_second, at: Duration::ZERO }
    }

    /// Takes `tokens` if `keep` remain then.
    ///
    /// # Errors
    /// When that will be so, if nobody takes any meanwhile. `tokens + keep` must not exceed the burst, else it
    /// never will.
    pub fn take(&mut self, tokens: f64, keep: f64, now: Duration) -> Result<(), Duration> {
        self.refill(now);
        let missing = tokens + keep - self.tokens;
        if missing > 0.0 {
            // A millisecond more than exactly, so that rounding makes nobody wait for the last billionth.
            let wait = Duration::from_secs_f64(missing / self.per_second) + Duration::from_millis(1);
            return Err(now + wait);
        }
        self.tokens -= tokens;
        Ok(())
    }

    /// Gives tokens beside the steady rate.
    pub fn give(&mut self, tokens: f64) {
        self.tokens = (self.tokens + tokens).min(self.burst);
    }

    fn refill(&mut self, now: Duration) {
        let seconds = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.give(seconds * self.per_second);
    }
}

/// How many requests may be asked of two parents at once: a few percent of all. When every parent is slow
/// because the network is full, hedging must fade instead of doubling the load.
#[derive(Debug)]
pub struct HedgeBudget(TokenBucket);

impl Default for HedgeBudget {
    fn default() -> HedgeBudget {
        HedgeBudget(TokenBucket::new(HEDGES_BURST, HEDGES_PER_SECOND))
    }
}

impl HedgeBudget {
    /// A guest's request was made, which earns a part of a hedge.
    pub fn requested(&mut self) {
        self.0.give(HEDGES_PERCENT / 100.0);
    }

    /// Takes one hedge.
    ///
    /// # Errors
    /// When there will be one at the latest.
    pub fn take(&mut self, now: Duration) -> Result<(), Duration> {
        self.0.take(1.0, 0.0, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_more_tokens_leave_than_were_there_and_came_back(
            steps in prop::collection::vec((0_u64..500, 1_u32..8), 1..200),
        ) {
            let mut bucket = TokenBucket::new(16.0, 10.0);
            let (mut now, mut taken) = (Duration::ZERO, 0.0);
            for (millis, tokens) in steps {
                now += Duration::from_millis(millis);
                match bucket.take(f64::from(tokens), 0.0, now) {
                    Ok(()) => taken += f64::from(tokens),
                    Err(then) => {
                        prop_assert!(then > now);
                        prop_assert!(bucket.clone().take(f64::from(tokens), 0.0, then).is_ok());
                    }
                }
                prop_assert!(taken <= 16.0 + now.as_secs_f64() * 10.0 + 1e-6);
            }
        }
    }

    #[test]
    fn what_must_remain_is_left_to_others() {
        let mut bucket = TokenBucket::new(4.0, 1.0);
        assert!((0..2).all(|_| bucket.take(1.0, 2.0, Duration::ZERO).is_ok()));
        assert!(bucket.take(1.0, 2.0, Duration::ZERO).is_err());
        assert!((0..2).all(|_| bucket.take(1.0, 0.0, Duration::ZERO).is_ok()));
        assert!(bucket.take(1.0, 0.0, Duration::ZERO).is_err());
    }

    #[test]
    fn hedges_are_a_few_percent_of_many_requests() {
        let mut budget = HedgeBudget::default();
        let hedges = (0..10_000)
            .filter(|_| {
                budget.requested();
                budget.take(Duration::ZERO).is_ok()
            })
            .count();
        let earned = 10_000.0 * HEDGES_PERCENT / 100.0 + HEDGES_BURST;
        assert!((hedges as f64 - earned).abs() <= 1.0, "{hedges}");
    }
}
