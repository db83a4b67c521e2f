//! How fast one parent answers guests, and from when on an answer is late: the smoothed mean and four deviations,
//! as in the retransmission timer of TCP (RFC 6298 §2).

use std::time::Duration;

use crate::limits::{LATE_MAX, LATE_MIN, LATE_UNMEASURED};

/// The recent latency of one parent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Latency {
    measured: Option<Measured>,
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    mean: Duration,
    deviation: Duration,
}

impl Latency {
    /// An answer came after that time.
    pub fn answered(&mut self, after: Duration) {
        self.measured = Some(match self.measured {
            None => Measured { mean: after, deviation: after / 2 },
            Some(Measured { mean, deviation }) => Measured {
                mean: (mean * 7 + after) / 8,
                deviation: (deviation * 3 + mean.abs_diff(after)) / 4,
            },
        });
    }

    /// No answer came within that time, and none will: counts if it is longer than usual. Without this, a
    /// parent whose slow answers are always beaten by another's would look fast.
    pub fn unanswered(&mut self, within: Duration) {
        if self.measured.is_none_or(|measured| within > measured.mean) {
            self.answered(within);
        }
    }

    /// How long after it was asked an answer is late.
    pub fn late_after(&self) -> Duration {
        match self.measured {
            None => LATE_UNMEASURED,
            Some(Measured { mean, deviation }) => (mean + deviation * 4).clamp(LATE_MIN, LATE_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn lateness_follows_the_answers_between_its_bounds() {
        let mut latency = Latency::default();
        assert_eq!(latency.late_after(), LATE_UNMEASURED);
        (0..100).for_each(|_| latency.answered(MS));
        assert_eq!(latency.late_after(), LATE_MIN);
        (0..100).for_each(|_| latency.answered(100 * MS));
        assert!((100 * MS..110 * MS).contains(&latency.late_after()), "{:?}", latency.late_after());
        (0..100).for_each(|_| latency.answered(Duration::from_secs(100)));
        assert_eq!(latency.late_after(), LATE_MAX);
    }

    #[test]
    fn varying_answers_are_late_later_than_steady_ones() {
        let (mut steady, mut varying) = (Latency::default(), Latency::default());
        for n in 0..100 {
            steady.answered(50 * MS);
            varying.answered(if n % 2 == 0 { 10 * MS } else { 90 * MS });
        }
        assert!(varying.late_after() > steady.late_after() * 2);
    }

    #[test]
    fn answers_that_were_beaten_count_only_if_they_were_slow() {
        let mut latency = Latency::default();
        (0..100).for_each(|_| latency.answered(50 * MS));
        let before = latency.late_after();
        latency.unanswered(MS);
        assert_eq!(latency.late_after(), before);
        latency.unanswered(200 * MS);
        assert!(latency.late_after() > before);
    }
}
