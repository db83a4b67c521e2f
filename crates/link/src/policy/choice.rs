//! Which of several good parents gets the next request. The names are those of the kernel's multipath targets.
//!
//! A relay that is asked for a chunk that it does not have fetches it from its own parents. So every choice is
//! right, but only the planned one keeps each uplink at the share that the hierarchy's plan gave it; the others
//! are for hierarchies whose alternates have uplinks to spare.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// How a parent is chosen among the good ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Multipath {
    /// The best ranked.
    #[default]
    Planned,
    /// One after the other.
    RoundRobin,
    /// The one that will be done soonest, by its requests in flight and its recent time for each.
    ServiceTime,
    /// The one with the fewest requests in flight.
    QueueLength,
}

const NAMES: [(Multipath, &str); 4] = [
    (Multipath::Planned, "planned"),
    (Multipath::RoundRobin, "round-robin"),
    (Multipath::ServiceTime, "service-time"),
    (Multipath::QueueLength, "queue-length"),
];

impl fmt::Display for Multipath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(multipath, _)| multipath == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

/// No such choice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is none of planned, round-robin, service-time and queue-length")]
pub struct UnknownMultipath(String);

impl FromStr for Multipath {
    type Err = UnknownMultipath;

    fn from_str(text: &str) -> Result<Multipath, UnknownMultipath> {
        let found = NAMES.iter().find(|(_, name)| *name == text);
        found.map(|(multipath, _)| *multipath).ok_or_else(|| UnknownMultipath(text.to_owned()))
    }
}

/// What is known of a good parent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// Requests in flight.
    pub(super) in_flight: usize,
    /// Recent time for each.
    pub(super) service: Duration,
}

impl Multipath {
    /// The index of the parent to ask among `loads`, best ranked first; [`None`] if there are none. Ties go to
    /// the better rank. `turn` counts requests.
    pub(super) fn choose(self, loads: &[Load], turn: u64) -> Option<usize> {
        let wait =
            |load: &Load| load.service.saturating_mul(u32::try_from(load.in_flight + 1).unwrap_or(u32::MAX));
        let ranks = 0..loads.len();
        match self {
            Multipath::Planned => ranks.min(),
            Multipath::RoundRobin => usize::try_from(turn.checked_rem(loads.len() as u64)?).ok(),
            Multipath::ServiceTime => ranks.min_by_key(|&rank| wait(&loads[rank])),
            Multipath::QueueLength => ranks.min_by_key(|&rank| loads[rank].in_flight),
        }
    }
}

/// How long a parent takes for each of its requests: the time between answers while it has some.
#[derive(Debug, Clone, Copy, Default)]
pub struct Service {
    mean: Duration,
    answered_at: Duration,
}

impl Service {
    /// An answer came to what was asked at `asked_at`.
    pub fn answered(&mut self, asked_at: Duration, now: Duration) {
        let took = now.saturating_sub(asked_at.max(self.answered_at));
        self.mean = if self.mean.is_zero() { took } else { (self.mean * 7 + took) / 8 };
        self.answered_at = now;
    }

    /// The mean time. It fades while the parent answers nothing, so that one that was slow is tried again; 0 if
    /// nothing was measured, so that it is tried at all.
    pub fn mean(&self, now: Duration) -> Duration {
        let idle = now.saturating_sub(self.answered_at).as_secs();
        self.mean / u32::try_from(idle + 1).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn loads(loads: &[(usize, u32)]) -> Vec<Load> {
        loads.iter().map(|&(in_flight, millis)| Load { in_flight, service: MS * millis }).collect()
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for (multipath, name) in NAMES {
            assert_eq!((multipath.to_string(), name.parse()), (name.to_owned(), Ok(multipath)));
        }
        assert!("random".parse::<Multipath>().is_err());
    }

    #[test]
    fn each_choice_keeps_its_promise() {
        let parents = loads(&[(4, 1), (2, 5), (3, 1)]);
        assert_eq!(Multipath::Planned.choose(&parents, 7), Some(0));
        assert_eq!(Multipath::QueueLength.choose(&parents, 7), Some(1));
        assert_eq!(Multipath::ServiceTime.choose(&parents, 7), Some(2));
        let turns: Vec<_> = (0..4).map(|turn| Multipath::RoundRobin.choose(&parents, turn)).collect();
        assert_eq!(turns, [Some(0), Some(1), Some(2), Some(0)]);
        assert!(NAMES.iter().all(|(multipath, _)| multipath.choose(&[], 7).is_none()));
        let equal = loads(&[(1, 1), (1, 1)]);
        assert_eq!(Multipath::QueueLength.choose(&equal, 0), Some(0), "the better rank");
    }

    #[test]
    fn the_time_of_each_request_is_that_between_answers() {
        let mut service = Service::default();
        assert_eq!(service.mean(MS), Duration::ZERO);
        // Ten are asked at once, and one is answered each millisecond.
        (1..=10).for_each(|n| service.answered(Duration::ZERO, MS * n));
        assert_eq!(service.mean(MS * 10), MS);
        assert!(service.mean(MS * 10_000) < MS / 5, "it fades");
    }
}
