//! Counters of links, for export. Plain atomics: nothing is decided by them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! stats {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// What one link, or all links of a node together, did so far.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[$doc])* pub $name: AtomicU64),+ }

        impl Stats {
            /// Every counter with its name, for an exporter.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name.load(Ordering::Relaxed))),+].into_iter()
            }
        }
    };
}

stats! {
    /// Chunks sent to children.
    chunks_sent,
    /// Verified chunks that came from parents and were taken by those who wanted them.
    chunks_received,
    /// Chunks that came from parents when nobody wanted them any more.
    chunks_in_vain,
    /// Bytes of the chunks sent, unpacked.
    raw_bytes_sent,
    /// Bytes of the chunks received, unpacked.
    raw_bytes_received,
    /// Bytes of all frames sent.
    wire_bytes_sent,
    /// Bytes of all frames received.
    wire_bytes_received,
    /// Requests sent to parents.
    wants_sent,
    /// Requests that came from children.
    wants_received,
    /// Requests answered without a chunk, cancelled ones aside.
    lacks_sent,
    /// Requests that a parent answered without a chunk, cancelled ones aside.
    lacks_received,
    /// Requests withdrawn from parents.
    cancels_sent,
    /// Requests that children withdrew.
    cancels_received,
    /// Requests that were given up on one parent to be asked of another: after a loss, a refusal, long silence
    /// or a change of plan.
    failovers,
    /// Requests that were asked of another parent too, because an answer to a guest was late.
    hedges,
    /// Those in which the other parent was first.
    hedge_wins,
    /// Answers to guests that were late, hedged or not.
    late_fetches,
    /// Parents that were taken out because they were late time and again.
    breaker_openings,
    /// Requests to the last resort that were not planned to go there.
    last_resort_fetches,
    /// Requests that waited for a budget: of the last resort, or of background fetches.
    throttled,
    /// Wrong chunks that parents sent.
    lies,
    /// Connections tried.
    dials,
    /// Established connections that were lost.
    losses,
    /// Reports that found no room.
    reports_dropped,
}

/// Where one link counts: its own counters and the node's.
#[derive(Debug, Clone, Default)]
pub struct ScopedStats {
    /// The counters of this link alone.
    pub link: Arc<Stats>,
    /// The counters of all links together.
    pub total: Arc<Stats>,
}

impl ScopedStats {
    /// Fresh counters for one link under the node's `total`.
    pub fn under(total: &Arc<Stats>) -> ScopedStats {
        ScopedStats { link: Arc::default(), total: total.clone() }
    }

    pub(crate) fn add(&self, counter: fn(&Stats) -> &AtomicU64, n: usize) {
        for stats in [&self.link, &self.total] {
            counter(stats).fetch_add(n as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_link_counts_is_in_the_total_too() {
        let total = Arc::new(Stats::default());
        let (a, b) = (ScopedStats::under(&total), ScopedStats::under(&total));
        a.add(|s| &s.lies, 2);
        b.add(|s| &s.lies, 3);
        let value = |stats: &Stats| stats.each().find(|(name, _)| *name == "lies").map(|(_, n)| n);
        assert_eq!((value(&a.link), value(&b.link), value(&total)), (Some(2), Some(3), Some(5)));
    }
}
