//! Latencies by the hundred thousand in little room.

use std::time::Duration;

/// Parts into which each doubling is cut: a bucket is at most a sixteenth wide.
const PARTS: u64 = 16;

/// Buckets up to 2^40 microseconds, which is twelve days.
const BUCKETS: usize = 40 * PARTS as usize;

/// How often which latency came, to a sixteenth.
#[derive(Debug, Clone)]
pub(super) struct Histogram {
    counts: Vec<u64>,
}

impl Histogram {
    pub(super) fn new() -> Histogram {
        Histogram { counts: vec![0; BUCKETS] }
    }

    pub(super) fn add(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.counts[bucket(micros).min(BUCKETS - 1)] += 1;
    }

    pub(super) fn merge(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// The latency that `percent` of all do not exceed, in milliseconds, rounded up to its bucket's end.
    pub(super) fn percentile_ms(&self, percent: f64) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let wanted = (total as f64 * percent / 100.0).ceil() as u64;
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted.max(1)
        });
        found.map_or(0.0, |bucket| end(bucket) as f64 / 1e3)
    }
}

/// Values below [`PARTS`] have a bucket each; above, each doubling has so many.
fn bucket(micros: u64) -> usize {
    if micros < PARTS {
        return micros as usize;
    }
    let shift = micros.ilog2() - PARTS.ilog2();
    (u64::from(shift) * PARTS + (micros >> shift)) as usize
}

/// The first value behind a bucket, in microseconds.
fn end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < PARTS {
        return bucket + 1;
    }
    let shift = bucket / PARTS - 1;
    (bucket - shift * PARTS + 1) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_lies_in_a_bucket_that_is_at_most_a_sixteenth_wide() {
        for micros in (0..5000).chain([1 << 20, (1 << 20) + 7, (1 << 33) - 1]) {
            let (at, end) = (bucket(micros), end(bucket(micros)));
            assert!(micros < end && end <= micros + micros / PARTS + 1, "{micros}: bucket {at}, end {end}");
        }
    }

    #[test]
    fn percentiles_are_those_of_all_merged_latencies() {
        let (mut a, mut b) = (Histogram::new(), Histogram::new());
        (0..98).for_each(|_| a.add(Duration::from_micros(10)));
        (0..2).for_each(|_| b.add(Duration::from_millis(200)));
        a.merge(&b);
        assert_eq!(a.percentile_ms(50.0), 0.011);
        let p99 = a.percentile_ms(99.0);
        assert!((200.0..=213.0).contains(&p99), "{p99}");
        assert_eq!(Histogram::new().percentile_ms(99.0), 0.0);
    }
}
