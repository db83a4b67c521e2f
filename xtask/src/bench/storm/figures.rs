//! What a run gives: figures from what its VMs met and what the network and the daemons counted.

use std::sync::atomic::Ordering;

use serde::Serialize;

use super::crowd::{Progress, VmStory};
use super::histogram::Histogram;
use super::trace::Trace;
use super::watch::Point;

/// Of many values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Percentiles {
    /// By nearest rank; nothing of nothing.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Percentiles> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let max = *values.last()?;
        let rank = |percent: usize| values[(values.len() * percent).div_ceil(100) - 1];
        Some(Percentiles { p50: rank(50), p99: rank(99), max })
    }

    pub(super) fn scaled(self, factor: f64) -> Percentiles {
        Percentiles { p50: self.p50 * factor, p99: self.p99 * factor, max: self.max * factor }
    }
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Run {
    pub(super) name: String,
    pub(super) nodes: usize,
    pub(super) vms: usize,
    /// VMs that had not finished when the time was up.
    pub(super) vms_unfinished: usize,
    /// VMs whose node was killed for good.
    pub(super) vms_given_up: usize,
    /// From the beginning until the last VM had finished, or the last node had the boot set if there are no VMs.
    pub(super) makespan_seconds: f64,
    /// From the beginning until a VM could open its disk.
    pub(super) opened_seconds: Option<Percentiles>,
    pub(super) finished_seconds: Option<Percentiles>,
    pub(super) read_ms: Latencies,
    /// Per VM: time beyond 100 ms of all its reads.
    pub(super) stalled_seconds: Option<Percentiles>,
    pub(super) longest_read_ms: f64,
    pub(super) errors: u64,
    pub(super) wrong_reads: u64,
    /// The first errors or wrong reads, in words.
    pub(super) complaints: Vec<String>,
    /// Time until a node had the whole boot set.
    pub(super) boot_set_seconds: Option<Percentiles>,
    /// The same against boot bytes / link rate: E.
    pub(super) boot_set_ratio: Option<Percentiles>,
    /// Makespan cold / warm: C. On cold runs that have a warm one.
    pub(super) cold_to_warm: Option<f64>,
    /// What the origin's link carried up / boot bytes: G.
    pub(super) origin_wire_ratio: f64,
    /// What the origin's daemon says that it sent / boot bytes.
    pub(super) origin_sent_ratio: Option<f64>,
    /// The highest of all nodes that were not restarted.
    pub(super) fetches_per_chunk: Option<f64>,
    /// Chunks that came again though they were there, of these nodes together.
    pub(super) refetched_chunks: Option<u64>,
    /// Fetches that these nodes sent to a second parent because the first was late or failed: what may come twice.
    pub(super) second_fetches: Option<u64>,
    /// Per rack: what its uplink carried / boot bytes.
    pub(super) uplinks: Vec<Uplink>,
    pub(super) cpu_seconds: Option<f64>,
    /// Share of all reads that were done when the time was up, if it was.
    pub(super) part_done: Option<f64>,
    pub(super) churn: Option<super::churn::Churn>,
    pub(super) points: Vec<Point>,
}

/// Latencies of all reads of all VMs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Latencies {
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
}

/// A rack's uplink against the boot bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Uplink {
    pub(super) up: f64,
    pub(super) down: f64,
}

/// Complaints that are told: the first ones say what is wrong.
const COMPLAINTS_MAX: usize = 5;

impl Run {
    /// What the VMs alone tell. `end_seconds` is when the run ended.
    pub(super) fn of_stories(name: String, nodes: usize, stories: &[VmStory], end_seconds: f64) -> Run {
        let mut latencies = Histogram::new();
        stories.iter().for_each(|story| latencies.merge(&story.played.latencies));
        let seconds = |value: Option<std::time::Duration>| value.map(|value| value.as_secs_f64());
        let finished = || stories.iter().filter_map(|story| seconds(story.finished));
        Run {
            name,
            nodes,
            vms: stories.len(),
            vms_unfinished: stories.len() - finished().count(),
            vms_given_up: 0,
            makespan_seconds: end_seconds,
            opened_seconds: Percentiles::of(stories.iter().filter_map(|story| seconds(story.opened))),
            finished_seconds: Percentiles::of(finished()),
            read_ms: Latencies {
                p50: latencies.percentile_ms(50.0),
                p99: latencies.percentile_ms(99.0),
                p999: latencies.percentile_ms(99.9),
            },
            stalled_seconds: Percentiles::of(stories.iter().map(|story| story.played.stalled.as_secs_f64())),
            longest_read_ms: stories.iter().map(|s| s.played.longest.as_secs_f64() * 1e3).fold(0.0, f64::max),
            errors: stories.iter().map(|story| story.played.errors).sum(),
            wrong_reads: stories.iter().map(|story| story.played.wrong).sum(),
            complaints: stories
                .iter()
                .filter_map(|story| story.played.complaint.clone())
                .take(COMPLAINTS_MAX)
                .collect(),
            boot_set_seconds: None,
            boot_set_ratio: None,
            cold_to_warm: None,
            origin_wire_ratio: 0.0,
            origin_sent_ratio: None,
            fetches_per_chunk: None,
            refetched_chunks: None,
            second_fetches: None,
            uplinks: Vec::new(),
            cpu_seconds: None,
            part_done: None,
            churn: None,
            points: Vec::new(),
        }
    }

    /// Leaves VMs out of what was to finish whose node is gone for good.
    pub(super) fn give_up(&mut self, stories: &[VmStory], is_gone: impl Fn(&str) -> bool) {
        self.vms_given_up = stories.iter().filter(|s| s.finished.is_none() && is_gone(&s.seat)).count();
        self.vms_unfinished -= self.vms_given_up;
        if self.vms_unfinished == 0
            && let Some(finished) = self.finished_seconds
        {
            self.makespan_seconds = finished.max;
        }
    }

    /// Says how far the VMs came, if some had not finished.
    pub(super) fn note_part_done(&mut self, trace: &Trace, progress: &Progress) {
        if self.vms_unfinished > 0 {
            let done = progress.reads.load(Ordering::Relaxed) as f64;
            self.part_done = Some(done / (trace.reads() * self.vms) as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let found = Percentiles::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!(found, Percentiles { p50: 100.0, p99: 198.0, max: 200.0 });
        assert_eq!(Percentiles::of([3.0]), Some(Percentiles { p50: 3.0, p99: 3.0, max: 3.0 }));
        assert_eq!(Percentiles::of([]), None);
    }
}
