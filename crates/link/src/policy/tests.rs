//! Requests over paths, with time in hand.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::Priority;
use proptest::prelude::*;

use super::*;
use crate::limits::{
    ATTEMPTS_MAX, BREAKER_STRIKES_MAX, DIAL_PATIENCE, HEDGES_BURST, HEDGES_PER_SECOND, HEDGES_PERCENT,
    LAST_RESORT_BURST, LAST_RESORT_FOR_GUESTS, LAST_RESORT_PER_SECOND, LATE_FOR_LAST_RESORT, LATE_MIN,
    LATE_UNMEASURED, NOT_HERE_ROUNDS_MAX, PATIENCE_GUEST, PATIENCE_OTHERS, ROUND_WAIT_MAX, SILENT_AFTER,
};
use crate::stats::Stats;
use crate::wire::LackReason;

const MS: Duration = Duration::from_millis(1);
const START: Duration = Duration::from_secs(1);

/// A node with some parents that are up, the last one an origin.
struct Node {
    paths: Paths,
    ranked: Vec<PathId>,
    stats: Arc<Stats>,
    now: Duration,
}

impl Node {
    fn new(parents: usize) -> Node {
        Node::with(parents, Settings::default())
    }

    fn with(parents: usize, settings: Settings) -> Node {
        let stats = Arc::<Stats>::default();
        let mut paths = Paths::new(settings, stats.clone());
        let ranked: Vec<PathId> = (0..parents).map(|salt| paths.add(LinkState::new(salt as u64))).collect();
        ranked.iter().for_each(|id| paths.greeted(*id, START));
        Node { paths, ranked, stats, now: START }
    }

    fn decide(&mut self, request: &mut RequestPolicy) -> Decision {
        request.decide(&mut self.paths, &self.ranked, self.now)
    }

    /// The rank that is asked now, by a hedge or not.
    fn asks(&mut self, request: &mut RequestPolicy) -> usize {
        match self.decide(request) {
            Decision::Ask { path } | Decision::Hedge { path } => self.rank(path),
            other => panic!("{other:?}"),
        }
    }

    fn rank(&self, path: PathId) -> usize {
        self.ranked.iter().position(|other| *other == path).unwrap()
    }

    fn waits(&mut self, request: &mut RequestPolicy) -> Duration {
        match self.decide(request) {
            Decision::Wait { until } if until > self.now => until,
            other => panic!("{other:?} at {:?}", self.now),
        }
    }

    /// Asks rank `by` for a chunk, which comes after that time.
    fn fetch(&mut self, by: usize, after: Duration) {
        let mut request = RequestPolicy::new(Priority::Guest);
        assert_eq!(self.asks(&mut request), by);
        self.now += after;
        request.answered(&mut self.paths, self.ranked[by], self.now);
    }

    /// A guest's request to rank 0, which is late, is hedged with rank 1, which answers. Rank 0 sends pongs.
    fn lose_to_hedge(&mut self) {
        let mut request = RequestPolicy::new(Priority::Guest);
        assert_eq!(self.asks(&mut request), 0);
        while let Decision::Wait { until } = self.decide(&mut request) {
            self.now = until;
            self.paths.heard(self.ranked[0], self.now);
        }
        self.now += MS;
        request.answered(&mut self.paths, self.ranked[1], self.now);
    }

    fn stat(&self, name: &str) -> u64 {
        self.stats.each().find(|(other, _)| *other == name).unwrap().1
    }
}

#[test]
fn each_parent_is_asked_once_a_round_the_planned_first_and_the_last_resort_last() {
    let mut node = Node::new(3);
    let mut request = RequestPolicy::new(Priority::Guest);
    for _ in 0..3 {
        for rank in 0..3 {
            assert_eq!(node.asks(&mut request), rank);
            request.lost(&mut node.paths, node.ranked[rank]);
        }
        node.now = node.waits(&mut request);
    }
}

#[test]
fn waits_between_rounds_grow_to_their_bound_and_never_end_in_an_error() {
    let mut node = Node::new(3);
    node.ranked.clone().into_iter().for_each(|id| node.paths.failed(id, START));
    let mut request = RequestPolicy::new(Priority::Guest);
    let mut last = Duration::ZERO;
    for _ in 0..100 {
        let wait = node.waits(&mut request) - node.now;
        assert!(wait >= last && wait <= ROUND_WAIT_MAX);
        last = wait;
    }
    assert_eq!(last, ROUND_WAIT_MAX);
    node.ranked.clear();
    node.waits(&mut request);
}

fn round_of(node: &mut Node, request: &mut RequestPolicy, reasons: [LackReason; 3]) -> Decision {
    for reason in reasons {
        let rank = node.asks(request);
        request.not_found(&mut node.paths, node.ranked[rank], reason, node.now);
    }
    node.decide(request)
}

#[test]
fn only_rounds_in_which_all_say_not_here_end_a_request() {
    use LackReason::{NotHere, Unreachable};
    let (mut node, mut request) = (Node::new(3), RequestPolicy::new(Priority::Guest));
    for reasons in [[NotHere, NotHere, Unreachable], [NotHere; 3]] {
        for _ in 1..NOT_HERE_ROUNDS_MAX {
            assert!(matches!(round_of(&mut node, &mut request, reasons), Decision::Wait { .. }));
        }
    }
    assert_eq!(round_of(&mut node, &mut request, [NotHere; 3]), Decision::GiveUp);
}

#[test]
fn a_guests_request_is_hedged_when_it_is_late_for_this_parent() {
    let mut node = Node::new(3);
    let mut request = RequestPolicy::new(Priority::Guest);
    assert_eq!(node.asks(&mut request), 0);
    assert_eq!(node.waits(&mut request), START + LATE_UNMEASURED, "nothing is measured yet");
    request.answered(&mut node.paths, node.ranked[0], START + MS);
    (0..20).for_each(|_| node.fetch(0, MS));
    let (mut request, asked_at) = (RequestPolicy::new(Priority::Guest), node.now);
    assert_eq!(node.asks(&mut request), 0);
    assert_eq!(node.waits(&mut request), asked_at + LATE_MIN);
    node.now = asked_at + LATE_MIN;
    assert_eq!(node.decide(&mut request), Decision::Hedge { path: node.ranked[1] });
    request.answered(&mut node.paths, node.ranked[1], node.now);
    assert_eq!((node.stat("hedges"), node.stat("hedge_wins"), node.stat("late_fetches")), (1, 1, 1));
    assert!(node.ranked.iter().all(|id| node.paths.in_flight(*id) == 0));
}

#[test]
fn others_are_asked_elsewhere_only_when_the_parent_says_nothing_at_all() {
    let mut node = Node::new(3);
    let mut request = RequestPolicy::new(Priority::Profile);
    assert_eq!(node.asks(&mut request), 0);
    for _ in 0..100 {
        node.now = node.waits(&mut request) - MS;
        node.paths.heard(node.ranked[0], node.now);
    }
    let silent_at = node.waits(&mut request);
    assert_eq!(silent_at, node.now + SILENT_AFTER);
    node.now = silent_at;
    assert_eq!(node.asks(&mut request), 1);
    assert_eq!(node.stat("hedges"), 0, "that took nothing from guests");
}

#[test]
fn what_nobody_waits_for_goes_to_the_last_resort_only_once_the_parent_is_given_up() {
    let mut node = Node::new(2);
    let mut request = RequestPolicy::new(Priority::Profile);
    assert_eq!(node.asks(&mut request), 0);
    node.now = node.waits(&mut request);
    assert!(node.waits(&mut request) >= START + PATIENCE_OTHERS, "silence alone moves nothing");
    request.lost(&mut node.paths, node.ranked[0]);
    node.paths.failed(node.ranked[0], node.now);
    assert_eq!(node.asks(&mut request), 1);
}

#[test]
fn a_frozen_parent_costs_one_delay_and_not_one_for_each_read() {
    let mut node = Node::new(3);
    (0..20).for_each(|_| node.fetch(0, MS));
    let mut request = RequestPolicy::new(Priority::Guest);
    assert_eq!(node.asks(&mut request), 0);
    node.now = node.waits(&mut request);
    assert_eq!(node.asks(&mut request), 1);
    request.answered(&mut node.paths, node.ranked[1], node.now);
    (0..100).for_each(|_| node.fetch(1, MS * 10));
    node.paths.heard(node.ranked[0], node.now);
    node.fetch(0, MS);
}

#[test]
fn a_frozen_parent_before_the_last_resort_alone_is_left_when_it_is_surely_silent() {
    let mut node = Node::new(2);
    (0..20).for_each(|_| node.fetch(0, MS));
    let (mut request, asked_at) = (RequestPolicy::new(Priority::Guest), node.now);
    assert_eq!(node.asks(&mut request), 0);
    node.now = node.waits(&mut request);
    assert_eq!(node.waits(&mut request), asked_at + LATE_FOR_LAST_RESORT);
    node.now = asked_at + LATE_FOR_LAST_RESORT;
    assert_eq!(node.asks(&mut request), 1);
    node.now = asked_at + SILENT_AFTER;
    node.fetch(1, MS);
}

#[test]
fn a_parent_that_lives_and_always_loses_is_taken_out_and_probed() {
    let mut node = Node::new(3);
    for _ in 0..BREAKER_STRIKES_MAX {
        node.lose_to_hedge();
    }
    assert_eq!(node.stat("breaker_openings"), 1);
    node.fetch(1, MS);
    node.now += crate::limits::BREAKER_PAUSE_MIN;
    let mut probe = RequestPolicy::new(Priority::Guest);
    assert_eq!(node.asks(&mut probe), 0, "the pause is over");
    node.fetch(1, MS);
    probe.answered(&mut node.paths, node.ranked[0], node.now);
    node.fetch(0, MS);
}

#[test]
fn requests_that_one_pause_delays_together_are_one_strike() {
    let mut node = Node::new(3);
    let mut requests: Vec<RequestPolicy> =
        (0..3 * BREAKER_STRIKES_MAX).map(|_| RequestPolicy::new(Priority::Guest)).collect();
    for request in &mut requests {
        assert_eq!(node.asks(request), 0);
    }
    node.now += LATE_UNMEASURED;
    for request in &mut requests {
        assert_eq!(node.asks(request), 1);
    }
    node.now = START + PATIENCE_GUEST - MS;
    for request in &mut requests {
        request.answered(&mut node.paths, node.ranked[1], node.now);
    }
    assert_eq!(node.stat("breaker_openings"), 0);
}

#[test]
fn a_parent_that_delivers_other_chunks_is_slow_and_not_dead() {
    let mut node = Node::new(3);
    for _ in 0..10 * BREAKER_STRIKES_MAX {
        let mut other = RequestPolicy::new(Priority::Profile);
        node.asks(&mut other);
        other.answered(&mut node.paths, node.ranked[0], node.now);
        let mut request = RequestPolicy::new(Priority::Guest);
        assert_eq!(node.asks(&mut request), 0);
        node.now = node.waits(&mut request);
        let mut other = RequestPolicy::new(Priority::Profile);
        node.asks(&mut other);
        other.answered(&mut node.paths, node.ranked[0], node.now);
        node.now += PATIENCE_GUEST - MS;
        let _ = node.decide(&mut request);
        request.answered(&mut node.paths, node.ranked[1], node.now);
    }
    assert_eq!(node.stat("breaker_openings"), 0);
}

#[test]
fn when_all_parents_are_slow_hedging_fades() {
    let mut node = Node::new(3);
    let requests = 2000;
    for _ in 0..requests {
        let mut request = RequestPolicy::new(Priority::Guest);
        let mut asked = vec![node.asks(&mut request)];
        let done = node.now + MS * 400;
        while node.now < done {
            match node.decide(&mut request) {
                Decision::Wait { until } => node.now = until.min(done),
                Decision::Ask { path } | Decision::Hedge { path } => asked.push(node.rank(path)),
                other => panic!("{other:?}"),
            }
            node.ranked.iter().for_each(|id| node.paths.heard(*id, node.now));
        }
        request.answered(&mut node.paths, node.ranked[asked[0]], node.now);
    }
    assert!(node.stat("hedges") <= requests / 20, "{} hedges of {requests}", node.stat("hedges"));
    assert_eq!(node.stat("breaker_openings"), 0);
}

#[test]
fn a_stampede_to_the_last_resort_is_throttled_guests_come_first_and_all_come_in_the_end() {
    let mut node = Node::new(2);
    node.paths.failed(node.ranked[0], START);
    let others = LAST_RESORT_BURST - LAST_RESORT_FOR_GUESTS;
    let mut waiting = Vec::new();
    let mut count = |node: &mut Node, priority| {
        let mut asked = 0;
        for _ in 0..100 {
            let mut request = RequestPolicy::new(priority);
            match node.decide(&mut request) {
                Decision::Ask { .. } => asked += 1,
                Decision::Wait { .. } => waiting.push(request),
                other => panic!("{other:?}"),
            }
        }
        f64::from(asked)
    };
    assert_eq!(count(&mut node, Priority::Background), others);
    assert_eq!(count(&mut node, Priority::Guest), LAST_RESORT_FOR_GUESTS);
    let mut rounds = 0.0;
    while !waiting.is_empty() {
        node.now += Duration::from_secs(1);
        rounds += 1.0;
        waiting.retain_mut(|request| matches!(node.decide(request), Decision::Wait { .. }));
    }
    assert!(rounds <= 200.0 / LAST_RESORT_FOR_GUESTS.min(LAST_RESORT_PER_SECOND) + 1.0, "{rounds} s");
}

#[test]
fn an_origin_that_is_the_planned_parent_is_not_throttled() {
    let mut node = Node::new(1);
    let requests = (0..1000).filter(|_| node.asks(&mut RequestPolicy::new(Priority::Background)) == 0);
    assert_eq!(requests.count(), 1000);
    assert_eq!(node.stat("last_resort_fetches"), 0);
}

#[test]
fn background_fetches_keep_to_their_rate_and_others_do_not_care() {
    let rate = 100 * block::limits::CHUNK_BYTES as u64;
    let mut node = Node::with(2, Settings { background_bytes_per_second: Some(rate), ..Settings::default() });
    let mut asked = 0;
    for _ in 0..100 {
        let mut request = RequestPolicy::new(Priority::Background);
        while let Decision::Wait { until } = node.decide(&mut request) {
            node.now = until;
        }
        asked += 1;
        request.answered(&mut node.paths, node.ranked[0], node.now);
        assert_eq!(node.asks(&mut RequestPolicy::new(Priority::Guest)), 0);
    }
    let seconds = (node.now - START).as_secs_f64();
    assert!(f64::from(asked) <= 100.0 * seconds + 10.0, "{asked} in {seconds} s");
}

#[test]
fn a_parent_that_is_dialed_is_hedged_with_the_last_resort_only_when_that_takes_long() {
    let mut node = Node::new(2);
    let fresh = node.paths.add(LinkState::new(7));
    node.ranked[0] = fresh;
    let mut request = RequestPolicy::new(Priority::Guest);
    assert_eq!(node.asks(&mut request), 0);
    node.now = node.waits(&mut request);
    assert_eq!(node.waits(&mut request), START + DIAL_PATIENCE);
}

#[test]
fn a_request_is_withdrawn_when_the_patience_is_over_which_grows_with_the_rounds() {
    let mut node = Node::new(1);
    for (priority, first) in [(Priority::Guest, PATIENCE_GUEST), (Priority::Background, PATIENCE_OTHERS)] {
        let mut request = RequestPolicy::new(priority);
        for patience in [first, first * 2] {
            let (path, begin) = (node.ranked[0], node.now);
            assert_eq!(node.asks(&mut request), 0);
            let end = loop {
                node.paths.heard(path, node.now);
                match node.decide(&mut request) {
                    Decision::Wait { until } => node.now = until,
                    Decision::Withdraw { path: from } if from == path => break node.now,
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!(end - begin, patience);
            node.now = node.waits(&mut request);
        }
    }
}

#[test]
fn after_a_change_of_plan_parents_that_stay_keep_the_request_and_others_lose_it() {
    let mut node = Node::new(3);
    let mut request = RequestPolicy::new(Priority::Guest);
    node.asks(&mut request);
    assert_eq!(request.replanned(&mut node.paths, &node.ranked), []);
    node.waits(&mut request);
    let gone = node.ranked.remove(0);
    assert_eq!(request.replanned(&mut node.paths, &node.ranked), [gone]);
    assert_eq!((node.asks(&mut request), node.paths.in_flight(gone)), (0, 0));
}

/// What may happen to a node between two decisions; numbers are reduced to what there is.
#[derive(Debug, Clone)]
enum Event {
    Begin(Priority),
    Pass(u64),
    Answer(usize),
    Lack(usize),
    Fail(usize),
    Greet(usize),
    Hear(usize),
    Replan(usize),
    Leave(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => prop_oneof![Just(Priority::Guest), Just(Priority::Profile), Just(Priority::Background)]
            .prop_map(Event::Begin),
        6 => (0_u64..400).prop_map(Event::Pass),
        4 => any::<usize>().prop_map(Event::Answer),
        1 => any::<usize>().prop_map(Event::Lack),
        1 => any::<usize>().prop_map(Event::Fail),
        2 => any::<usize>().prop_map(Event::Greet),
        2 => any::<usize>().prop_map(Event::Hear),
        1 => any::<usize>().prop_map(Event::Replan),
        1 => any::<usize>().prop_map(Event::Leave),
    ]
}

/// Drives requests and checks what they decide.
struct Cluster {
    node: Node,
    requests: Vec<(RequestPolicy, Vec<PathId>)>,
    all: Vec<PathId>,
    guests: u32,
}

impl Cluster {
    fn settle(&mut self) {
        for (request, asked) in &mut self.requests {
            for step in 0.. {
                assert!(step < 20, "a request must come to rest");
                match self.node.decide(request) {
                    Decision::Ask { path } => {
                        assert!(asked.is_empty(), "the first ask is not a hedge");
                        asked.push(path);
                    }
                    Decision::Hedge { path } => {
                        assert!(!asked.contains(&path), "nobody is asked twice at once");
                        asked.push(path);
                    }
                    Decision::Withdraw { path } => {
                        assert!(asked.contains(&path));
                        asked.retain(|other| *other != path);
                    }
                    Decision::Wait { until } => {
                        assert!(until > self.node.now);
                        break;
                    }
                    Decision::GiveUp => {
                        assert!(asked.is_empty());
                        *request = RequestPolicy::new(Priority::Background);
                    }
                }
                assert!(asked.len() <= ATTEMPTS_MAX);
                assert!(asked.last().is_none_or(|path| self.node.paths.standing(*path) == Standing::Usable));
            }
        }
        let in_flight: usize = self.requests.iter().map(|(_, asked)| asked.len()).sum();
        assert_eq!(self.all.iter().map(|id| self.node.paths.in_flight(*id)).sum::<usize>(), in_flight);
        let seconds = (self.node.now - START).as_secs_f64();
        let earned =
            HEDGES_BURST + f64::from(self.guests) * HEDGES_PERCENT / 100.0 + seconds * HEDGES_PER_SECOND;
        assert!(self.node.stats.hedges.load(Ordering::Relaxed) as f64 <= earned + 1e-6);
    }

    fn apply(&mut self, event: &Event) {
        let now = self.node.now;
        let some = |n: usize, len: usize| (len > 0).then(|| n % len);
        match *event {
            Event::Begin(priority) => {
                self.guests += u32::from(priority == Priority::Guest);
                self.requests.push((RequestPolicy::new(priority), Vec::new()));
            }
            Event::Pass(millis) => self.node.now += MS * u32::try_from(millis).unwrap(),
            Event::Answer(n) => {
                let Some(at) = some(n, self.requests.len()) else { return };
                let Some(which) = some(n / 7, self.requests[at].1.len()) else { return };
                let (mut request, asked) = self.requests.swap_remove(at);
                request.answered(&mut self.node.paths, asked[which], now);
            }
            Event::Lack(n) => {
                let Some(at) = some(n, self.requests.len()) else { return };
                let Some(which) = some(n / 7, self.requests[at].1.len()) else { return };
                let path = self.requests[at].1.remove(which);
                self.requests[at].0.not_found(&mut self.node.paths, path, LackReason::NotHere, now);
            }
            Event::Fail(n) => {
                let id = self.all[n % self.all.len()];
                self.node.paths.failed(id, now);
                for (request, asked) in &mut self.requests {
                    asked.retain(|path| *path != id);
                    request.lost(&mut self.node.paths, id);
                }
            }
            Event::Greet(n) => self.node.paths.greeted(self.all[n % self.all.len()], now),
            Event::Hear(n) => self.node.paths.heard(self.all[n % self.all.len()], now),
            Event::Replan(n) => {
                let mut ranked = self.all.clone();
                ranked.rotate_left(n % self.all.len());
                ranked.truncate(1 + n / 7 % self.all.len());
                for (request, asked) in &mut self.requests {
                    let left = request.replanned(&mut self.node.paths, &ranked);
                    assert!(left.iter().all(|path| asked.contains(path)));
                    asked.retain(|path| !left.contains(path));
                }
                self.node.ranked = ranked;
            }
            Event::Leave(n) => {
                let Some(at) = some(n, self.requests.len()) else { return };
                self.requests.swap_remove(at).0.end(&mut self.node.paths);
            }
        }
    }
}

fn multipath() -> impl Strategy<Value = Multipath> {
    prop_oneof![
        Just(Multipath::Planned),
        Just(Multipath::RoundRobin),
        Just(Multipath::ServiceTime),
        Just(Multipath::QueueLength)
    ]
}

proptest! {
    /// Whatever happens in whatever order: nobody is asked twice at once, hedges keep to their budget, what is
    /// in flight is counted, waits are in the future; and once all parents are well, every request is answered.
    #[test]
    fn whatever_happens_each_request_keeps_the_rules_and_ends_once(
        parents in 1_usize..6,
        multipath in multipath(),
        events in prop::collection::vec(event(), 1..300),
    ) {
        let node = Node::with(parents, Settings { multipath, ..Settings::default() });
        let all = node.ranked.clone();
        let mut cluster = Cluster { node, requests: Vec::new(), all, guests: 0 };
        for event in &events {
            cluster.apply(event);
            cluster.settle();
        }
        for turn in 0.. {
            prop_assert!(turn < 1000, "{} requests are left", cluster.requests.len());
            if cluster.requests.is_empty() {
                break;
            }
            (0..parents).for_each(|n| cluster.apply(&Event::Greet(n)));
            cluster.apply(&Event::Pass(250));
            cluster.settle();
            (0..cluster.requests.len()).rev().for_each(|n| cluster.apply(&Event::Answer(n)));
        }
        prop_assert!(cluster.all.iter().all(|id| cluster.node.paths.in_flight(*id) == 0));
    }
}
