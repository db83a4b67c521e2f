//! Which parent is asked next, and when a failed one is tried again. Pure: events and time in, decisions
//! out, so that the daemon and a simulator run the same code. Time is a [`Duration`] since any fixed moment.
//!
//! - A [`Circuit`] is one parent as a node sees it: may requests go there, and when is it dialed again?
//! - A [`Hunt`] is one request's way through the ranked parents of its stripe, round after round.
//!
//! Retries: a hunt asks each usable parent once a round, best first, at once after a failure; between rounds
//! it waits, longer each time, or until a parent comes back or the plan changes. It ends with the chunk, or
//! when every ranked parent said for several rounds that the chunk is not to be had: since the last resort is
//! an origin, waiting longer would help nobody. Whatever else fails, the reader waits.

use std::time::Duration;

use block::{NodeName, Priority};

use crate::limits::{
    BAN, NOT_HERE_ROUNDS_MAX, PATIENCE_GUEST, PATIENCE_MAX, PATIENCE_OTHERS, REDIAL_MAX, REDIAL_MIN,
    ROUND_WAIT_MAX, ROUND_WAIT_MIN,
};
use crate::wire::LackReason;

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
pub struct Circuit {
    state: CircuitState,
    /// Failures since it last delivered a chunk.
    failures: u32,
    /// Spreads the redials of many children over time.
    salt: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CircuitState {
    Fresh,
    Up,
    Down { dial_at: Duration },
    Banned { until: Duration },
}

impl Circuit {
    /// A parent that was not dialed yet. `salt` differs from child to child, so that they do not all come back
    /// to a restarted parent at one moment.
    pub fn new(salt: u64) -> Circuit {
        Circuit { state: CircuitState::Fresh, failures: 0, salt }
    }

    /// A parent that lied before.
    pub fn banned(salt: u64, until: Duration) -> Circuit {
        Circuit { state: CircuitState::Banned { until }, ..Circuit::new(salt) }
    }

    /// Whether requests may go there.
    pub fn standing(&self) -> Standing {
        match self.state {
            CircuitState::Fresh | CircuitState::Up => Standing::Usable,
            CircuitState::Down { .. } | CircuitState::Banned { .. } => Standing::Down,
        }
    }

    /// When it may be dialed.
    pub fn dial_at(&self) -> Duration {
        match self.state {
            CircuitState::Fresh | CircuitState::Up => Duration::ZERO,
            CircuitState::Down { dial_at } => dial_at,
            CircuitState::Banned { until } => until,
        }
    }

    /// It greeted.
    pub fn up(&mut self) {
        self.state = CircuitState::Up;
    }

    /// It delivered a chunk: its next failure counts as the first.
    pub fn delivered(&mut self) {
        self.failures = 0;
    }

    /// The first dial takes long: requests should not wait for it. The dial itself goes on.
    pub fn late(&mut self, now: Duration) {
        if self.state == CircuitState::Fresh {
            self.state = CircuitState::Down { dial_at: now };
        }
    }

    /// The dial failed, or the link was lost.
    pub fn failed(&mut self, now: Duration) {
        let wait = REDIAL_MIN.saturating_mul(1 << self.failures.min(16)).min(REDIAL_MAX);
        // Between 75 and 100 percent of the wait, different each time.
        let part = self.salt.rotate_left(self.failures.wrapping_mul(7)) % 256;
        let wait = wait - wait * u32::try_from(part).expect("less than 256") / 1024;
        self.failures = self.failures.saturating_add(1);
        self.state = CircuitState::Down { dial_at: now + wait };
    }

    /// It sent a wrong chunk. Returns until when it is banned.
    pub fn lied(&mut self, now: Duration) -> Duration {
        let until = now + BAN;
        self.state = CircuitState::Banned { until };
        until
    }
}

/// What to do for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Ask the parent of this rank, and give it that long. Longer means that it lives but does not answer.
    Ask {
        /// Position in the ranked list.
        rank: usize,
        /// How long to wait for the answer while the link lives.
        patience: Duration,
    },
    /// No parent is left in this round. Decide again then, or once a parent is back or the plan changed.
    Wait {
        /// When.
        until: Duration,
    },
    /// Every ranked parent said time and again that the chunk is not to be had.
    GiveUp,
}

/// One request's way through the ranked parents of its stripe.
#[derive(Debug)]
pub struct Hunt {
    priority: Priority,
    round: u32,
    /// Asked in this round. As long as a ranked list: a handful.
    asked: Vec<NodeName>,
    /// How many of them said `NotHere`.
    not_here: usize,
    /// Rounds in a row in which all ranked parents did.
    hopeless_rounds: u32,
}

impl Hunt {
    /// A request that nobody was asked yet.
    pub fn new(priority: Priority) -> Hunt {
        Hunt { priority, round: 0, asked: Vec::new(), not_here: 0, hopeless_rounds: 0 }
    }

    /// Decides, given the ranked parents of the stripe, the best first.
    pub fn decide<'a>(
        &mut self,
        ranked: impl ExactSizeIterator<Item = (&'a NodeName, Standing)>,
        now: Duration,
    ) -> Decision {
        let parents = ranked.len();
        for (rank, (node, standing)) in ranked.enumerate() {
            if standing == Standing::Usable && !self.asked.contains(node) {
                self.asked.push(node.clone());
                return Decision::Ask { rank, patience: self.patience() };
            }
        }
        self.hopeless_rounds =
            if parents > 0 && self.not_here >= parents { self.hopeless_rounds + 1 } else { 0 };
        if self.hopeless_rounds >= NOT_HERE_ROUNDS_MAX {
            return Decision::GiveUp;
        }
        let wait = ROUND_WAIT_MIN.saturating_mul(1 << self.round.min(16)).min(ROUND_WAIT_MAX);
        self.next_round();
        Decision::Wait { until: now + wait }
    }

    fn patience(&self) -> Duration {
        let first = if self.priority == Priority::Guest { PATIENCE_GUEST } else { PATIENCE_OTHERS };
        first.saturating_mul(1 << self.round.min(16)).min(PATIENCE_MAX)
    }

    fn next_round(&mut self) {
        self.round = self.round.saturating_add(1);
        self.asked.clear();
        self.not_here = 0;
    }

    /// The parent that was asked last has no chunk. Other failures need no telling.
    pub fn lacked(&mut self, reason: LackReason) {
        if reason == LackReason::NotHere {
            self.not_here += 1;
        }
    }

    /// The plan changed: whoever was asked before may be asked again, for its place may be another.
    pub fn replanned(&mut self) {
        *self = Hunt::new(self.priority);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn nodes() -> Vec<NodeName> {
        ["parent", "alternate", "origin"].iter().map(|name| name.parse().unwrap()).collect()
    }

    fn decide(hunt: &mut Hunt, nodes: &[NodeName], down: &[usize], now: Duration) -> Decision {
        let standing = |rank| if down.contains(&rank) { Standing::Down } else { Standing::Usable };
        hunt.decide(nodes.iter().enumerate().map(|(rank, node)| (node, standing(rank))), now)
    }

    fn rank(decision: Decision) -> Option<usize> {
        match decision {
            Decision::Ask { rank, .. } => Some(rank),
            _ => None,
        }
    }

    #[test]
    fn each_usable_parent_is_asked_once_a_round_the_best_first() {
        let (nodes, mut hunt) = (nodes(), Hunt::new(Priority::Guest));
        for _ in 0..3 {
            assert_eq!(rank(decide(&mut hunt, &nodes, &[], SECOND)), Some(0));
            assert_eq!(rank(decide(&mut hunt, &nodes, &[1], SECOND)), Some(2));
            assert_eq!(rank(decide(&mut hunt, &nodes, &[], SECOND)), Some(1));
            assert!(matches!(decide(&mut hunt, &nodes, &[], SECOND), Decision::Wait { .. }));
        }
    }

    #[test]
    fn a_parent_that_comes_back_in_the_middle_of_a_round_is_asked() {
        let (nodes, mut hunt) = (nodes(), Hunt::new(Priority::Guest));
        assert_eq!(rank(decide(&mut hunt, &nodes, &[0], SECOND)), Some(1));
        assert_eq!(rank(decide(&mut hunt, &nodes, &[], SECOND)), Some(0));
    }

    #[test]
    fn waits_between_rounds_grow_to_their_bound_and_never_end_in_an_error() {
        let (nodes, mut hunt) = (nodes(), Hunt::new(Priority::Guest));
        let mut last = Duration::ZERO;
        for _ in 0..100 {
            let Decision::Wait { until } = decide(&mut hunt, &nodes, &[0, 1, 2], SECOND) else {
                panic!("all are down")
            };
            assert!(until - SECOND >= last && until - SECOND <= ROUND_WAIT_MAX);
            last = until - SECOND;
        }
        assert_eq!(last, ROUND_WAIT_MAX);
        assert!(matches!(decide(&mut hunt, &[], &[], SECOND), Decision::Wait { .. }), "no parents at all");
    }

    fn round_of(hunt: &mut Hunt, nodes: &[NodeName], reasons: [LackReason; 3]) -> Decision {
        for reason in reasons {
            assert!(rank(decide(hunt, nodes, &[], SECOND)).is_some());
            hunt.lacked(reason);
        }
        decide(hunt, nodes, &[], SECOND)
    }

    #[test]
    fn only_rounds_in_which_all_say_not_here_end_a_hunt() {
        use LackReason::{NotHere, Unreachable};
        let (nodes, mut hunt) = (nodes(), Hunt::new(Priority::Guest));
        for _ in 1..NOT_HERE_ROUNDS_MAX {
            assert!(matches!(round_of(&mut hunt, &nodes, [NotHere; 3]), Decision::Wait { .. }));
        }
        let mixed = round_of(&mut hunt, &nodes, [NotHere, NotHere, Unreachable]);
        assert!(matches!(mixed, Decision::Wait { .. }), "one that is unreachable may have it");
        for _ in 1..NOT_HERE_ROUNDS_MAX {
            assert!(matches!(round_of(&mut hunt, &nodes, [NotHere; 3]), Decision::Wait { .. }));
        }
        assert_eq!(round_of(&mut hunt, &nodes, [NotHere; 3]), Decision::GiveUp);
    }

    #[test]
    fn patience_is_shorter_for_guests_and_grows_with_the_rounds() {
        let nodes = nodes();
        let patience = |hunt: &mut Hunt| match decide(hunt, &nodes, &[1, 2], SECOND) {
            Decision::Ask { patience, .. } => patience,
            other => panic!("{other:?}"),
        };
        let (mut guest, mut filler) = (Hunt::new(Priority::Guest), Hunt::new(Priority::Background));
        let first = patience(&mut guest);
        assert!(first < patience(&mut filler));
        assert!(matches!(decide(&mut guest, &nodes, &[1, 2], SECOND), Decision::Wait { .. }));
        assert_eq!(patience(&mut guest), first * 2);
    }

    #[test]
    fn redials_back_off_until_a_chunk_came() {
        let mut circuit = Circuit::new(0x1234_5678_9abc_def0);
        let waits: Vec<Duration> = (0..10)
            .map(|_| {
                circuit.up();
                circuit.failed(SECOND);
                circuit.dial_at() - SECOND
            })
            .collect();
        assert!(waits.windows(2).all(|pair| pair[1] > pair[0] || pair[1] >= REDIAL_MAX * 3 / 4), "{waits:?}");
        assert!(waits.iter().all(|wait| (REDIAL_MIN * 3 / 4..=REDIAL_MAX).contains(wait)), "{waits:?}");
        circuit.up();
        circuit.delivered();
        circuit.failed(SECOND);
        assert!(circuit.dial_at() - SECOND <= REDIAL_MIN);
    }

    #[test]
    fn a_late_first_dial_and_a_ban_keep_requests_away() {
        let mut circuit = Circuit::new(0);
        assert_eq!(circuit.standing(), Standing::Usable);
        circuit.late(SECOND);
        assert_eq!(circuit.standing(), Standing::Down);
        circuit.up();
        circuit.late(SECOND);
        assert_eq!(circuit.standing(), Standing::Usable, "a link that is up is not late");
        let until = circuit.lied(SECOND);
        assert_eq!((circuit.standing(), circuit.dial_at()), (Standing::Down, SECOND + BAN));
        assert_eq!(Circuit::banned(0, until).standing(), Standing::Down);
    }
}
