//! One request's way through the ranked parents of its stripe.
//!
//! It asks each parent once a round, the next at once after a failure. While the last one it asked is late
//! (guests), or silent, another is asked as well; the first chunk wins. Between rounds it waits, longer each
//! time, or until a parent comes back or the plan changes.
//!
//! Invariants: no parent has the request twice at once; each `Ask` and `Hedge` ends in exactly one of
//! [`answered`](RequestPolicy::answered), [`not_found`](RequestPolicy::not_found), [`lost`](RequestPolicy::lost), a `Withdraw`,
//! or the end of the request.

use std::time::Duration;

use block::{Backoff, Priority};

use super::paths::{Grade, PathId, Paths};
use crate::limits::{
    ATTEMPTS_MAX, NOT_HERE_ROUNDS_MAX, PATIENCE_GUEST, PATIENCE_MAX, PATIENCE_OTHERS, ROUND_WAIT_MAX,
    ROUND_WAIT_MIN,
};
use crate::wire::LackReason;

/// What to do for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Ask this parent, and decide again.
    Ask {
        /// The parent.
        path: PathId,
    },
    /// Ask this parent too while the others have the request, and decide again.
    Hedge {
        /// The parent.
        path: PathId,
    },
    /// Withdraw the request from this parent, and decide again: it lives but does not answer.
    Withdraw {
        /// The parent.
        path: PathId,
    },
    /// Decide again then, or once a parent answers, is lost or back, or the plan changes.
    Wait {
        /// When.
        until: Duration,
    },
    /// Every ranked parent said time and again that the chunk is not to be had.
    GiveUp,
}

/// One request's way through the ranked parents of its stripe. See the module's documentation.
#[derive(Debug)]
pub struct RequestPolicy {
    priority: Priority,
    phase: Phase,
    round: u32,
    /// Where the request is now, the newest last; at most [`ATTEMPTS_MAX`].
    attempts: Vec<Attempt>,
    /// Parents whose answer in this round was none. As long as a ranked list: a handful.
    failed: Vec<PathId>,
    /// How many of them said `NotHere`.
    not_here: usize,
    /// Rounds in a row in which all ranked parents did.
    hopeless_rounds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Has not taken from the budgets yet.
    New,
    Asking,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    path: PathId,
    asked_at: Duration,
    kind: Kind,
    lateness: Lateness,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    First,
    Hedge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lateness {
    No,
    /// Known to the parent's path.
    Told,
}

/// Which parents a pick may fall on.
#[derive(Clone, Copy)]
struct Pick {
    worst: Grade,
    last_resort: LastResort,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LastResort {
    No,
    Yes,
}

impl RequestPolicy {
    /// A request that nobody was asked yet.
    pub fn new(priority: Priority) -> RequestPolicy {
        RequestPolicy {
            priority,
            phase: Phase::New,
            round: 0,
            attempts: Vec::new(),
            failed: Vec::new(),
            not_here: 0,
            hopeless_rounds: 0,
        }
    }

    /// Decides, given the parents of the stripe, the planned one first and the last resort last.
    pub fn decide(&mut self, paths: &mut Paths, ranked: &[PathId], now: Duration) -> Decision {
        if self.phase == Phase::New {
            if self.priority == Priority::Background
                && let Err(until) = paths.take_background(now)
            {
                paths.count(|stats| &stats.throttled);
                return Decision::Wait { until };
            }
            if self.priority == Priority::Guest {
                paths.requested();
            }
            self.phase = Phase::Asking;
        }
        let tired = |attempt: &Attempt| now >= attempt.asked_at + self.patience();
        if let Some(at) = self.attempts.iter().position(tired) {
            let Attempt { path, asked_at, .. } = self.attempts.remove(at);
            self.failed.push(path);
            paths.count(|stats| &stats.failovers);
            paths.beaten(path, self.priority, asked_at, now);
            return Decision::Withdraw { path };
        }
        match self.attempts.last().copied() {
            None => self.ask(paths, ranked, now),
            Some(newest) => self.hedge(newest, paths, ranked, now),
        }
    }

    /// Nobody has the request.
    fn ask(&mut self, paths: &mut Paths, ranked: &[PathId], now: Duration) -> Decision {
        let mut throttled = None;
        for pick in [
            Pick { worst: Grade::Good, last_resort: LastResort::No },
            // One that may be frozen is still better than the last resort: it can be hedged.
            Pick { worst: Grade::Doubtful, last_resort: LastResort::No },
            Pick { worst: Grade::Bad, last_resort: LastResort::Yes },
            Pick { worst: Grade::Bad, last_resort: LastResort::No },
        ] {
            let Some(path) = self.pick(pick, paths, ranked, now) else { continue };
            if pick.last_resort == LastResort::Yes {
                if let Err(until) = paths.take_last_resort(self.priority, now) {
                    throttled = Some(until);
                    continue;
                }
                paths.count(|stats| &stats.last_resort_fetches);
            }
            self.begin(path, Kind::First, paths, now);
            return Decision::Ask { path };
        }
        if let Some(until) = throttled {
            paths.count(|stats| &stats.throttled);
            return Decision::Wait { until };
        }
        self.end_round(ranked, now)
    }

    /// Somebody has the request: whether to ask one more.
    fn hedge(&mut self, newest: Attempt, paths: &mut Paths, ranked: &[PathId], now: Duration) -> Decision {
        let tired_at =
            self.attempts.iter().map(|attempt| attempt.asked_at).min().unwrap_or(now) + self.patience();
        let silent_at = paths.silent_at(newest.path, newest.asked_at);
        let late_at = match self.priority {
            Priority::Guest => paths.late_at(newest.path, newest.asked_at),
            Priority::Profile | Priority::Background => silent_at,
        };
        if now < late_at.min(silent_at) {
            return Decision::Wait { until: late_at.min(silent_at).min(tired_at) };
        }
        if newest.lateness == Lateness::No {
            if let Some(newest) = self.attempts.last_mut() {
                newest.lateness = Lateness::Told;
            }
            match self.priority {
                Priority::Guest => paths.late(newest.path, newest.asked_at),
                Priority::Profile | Priority::Background => paths.silent(newest.path, newest.asked_at),
            }
        }
        let after = self.reinforce(newest, silent_at, paths, ranked, now);
        after.unwrap_or_else(|until| Decision::Wait { until: until.min(tired_at) })
    }

    /// Asks one more if there is one and the budgets allow; else says when they may.
    fn reinforce(
        &mut self,
        newest: Attempt,
        silent_at: Duration,
        paths: &mut Paths,
        ranked: &[PathId],
        now: Duration,
    ) -> Result<Decision, Duration> {
        // Looked at again when more is known; an answer comes before, or the patience ends.
        let never = now + PATIENCE_MAX;
        if self.attempts.len() >= ATTEMPTS_MAX {
            return Err(never);
        }
        let good = Pick { worst: Grade::Good, last_resort: LastResort::No };
        let last = Pick { worst: Grade::Good, last_resort: LastResort::Yes };
        let (path, last_resort) = match self.pick(good, paths, ranked, now) {
            Some(path) => (path, LastResort::No),
            // What nobody waits for stays with a silent parent until its link is given up: when a storm begins,
            // lost packets look like silence, on all nodes at once.
            None if self.priority != Priority::Guest => return Err(never),
            None => (self.pick(last, paths, ranked, now).ok_or(never)?, LastResort::Yes),
        };
        let silent = now >= silent_at;
        if last_resort == LastResort::Yes {
            let earliest = paths.last_resort_at(newest.path, newest.asked_at);
            if now < earliest && !silent {
                return Err(earliest.min(silent_at));
            }
        }
        // What a silent parent has is moved, not hedged: it will hardly cost anything twice.
        if !silent {
            paths.take_hedge(now).map_err(|until| until.min(silent_at))?;
        }
        if last_resort == LastResort::Yes {
            if let Err(until) = paths.take_last_resort(self.priority, now) {
                paths.count(|stats| &stats.throttled);
                return Err(until);
            }
            paths.count(|stats| &stats.last_resort_fetches);
        }
        paths.count(if silent { |stats| &stats.failovers } else { |stats| &stats.hedges });
        self.begin(path, Kind::Hedge, paths, now);
        Ok(Decision::Hedge { path })
    }

    fn begin(&mut self, path: PathId, kind: Kind, paths: &mut Paths, now: Duration) {
        paths.asked(path, now);
        self.attempts.push(Attempt { path, asked_at: now, kind, lateness: Lateness::No });
    }

    fn pick(&self, pick: Pick, paths: &mut Paths, ranked: &[PathId], now: Duration) -> Option<PathId> {
        // A stripe's only parent is the planned one, be it an origin or not.
        let (regular, last_resort) = match ranked {
            [planned] => (std::slice::from_ref(planned), None),
            [regular @ .., last] => (regular, Some(last)),
            [] => return None,
        };
        let among = match pick.last_resort {
            LastResort::No => regular,
            LastResort::Yes => last_resort.map(std::slice::from_ref)?,
        };
        let fits = |id: &PathId| !self.has_asked(*id) && paths.grade(*id, now) <= pick.worst;
        let fitting: Vec<PathId> = among.iter().copied().filter(fits).collect();
        paths.choose(&fitting, now)
    }

    fn has_asked(&self, path: PathId) -> bool {
        self.failed.contains(&path) || self.attempts.iter().any(|attempt| attempt.path == path)
    }

    fn end_round(&mut self, ranked: &[PathId], now: Duration) -> Decision {
        let hopeless = !ranked.is_empty() && self.not_here >= ranked.len();
        self.hopeless_rounds = if hopeless { self.hopeless_rounds + 1 } else { 0 };
        if self.hopeless_rounds >= NOT_HERE_ROUNDS_MAX {
            return Decision::GiveUp;
        }
        let wait = Backoff::after(ROUND_WAIT_MIN, ROUND_WAIT_MAX, self.round);
        self.round = self.round.saturating_add(1);
        self.failed.clear();
        self.not_here = 0;
        Decision::Wait { until: now + wait }
    }

    fn patience(&self) -> Duration {
        let first = if self.priority == Priority::Guest { PATIENCE_GUEST } else { PATIENCE_OTHERS };
        Backoff::after(first, PATIENCE_MAX, self.round)
    }

    /// The chunk came from `path`. The request is over; it is to be withdrawn from all others.
    pub fn answered(&mut self, paths: &mut Paths, path: PathId, now: Duration) {
        for Attempt { path: asked, asked_at, kind, .. } in std::mem::take(&mut self.attempts) {
            if asked != path {
                paths.beaten(asked, self.priority, asked_at, now);
                continue;
            }
            paths.answered(asked, self.priority, asked_at, now);
            if kind == Kind::Hedge {
                paths.count(|stats| &stats.hedge_wins);
            }
        }
    }

    /// `path` answered that it has no chunk.
    pub fn not_found(&mut self, paths: &mut Paths, path: PathId, reason: LackReason, now: Duration) {
        if self.remove(path) {
            paths.not_found(path, now);
            paths.count(|stats| &stats.failovers);
            self.failed.push(path);
            self.not_here += usize::from(reason == LackReason::NotHere);
        }
    }

    /// The connection to `path` was lost, or takes no more requests.
    pub fn lost(&mut self, paths: &mut Paths, path: PathId) {
        if self.remove(path) {
            paths.dropped(path);
            paths.count(|stats| &stats.failovers);
            self.failed.push(path);
        }
    }

    /// The plan changed: whoever was asked before may be asked again, for its place may be another. Parents that
    /// stay keep the request. Returns those from which it is to be withdrawn.
    pub fn replanned(&mut self, paths: &mut Paths, ranked: &[PathId]) -> Vec<PathId> {
        let (kept, left): (Vec<Attempt>, Vec<Attempt>) =
            self.attempts.drain(..).partition(|attempt| ranked.contains(&attempt.path));
        *self = RequestPolicy { attempts: kept, phase: self.phase, ..RequestPolicy::new(self.priority) };
        for attempt in &left {
            paths.dropped(attempt.path);
            paths.count(|stats| &stats.failovers);
        }
        left.into_iter().map(|attempt| attempt.path).collect()
    }

    /// Nobody waits for the chunk any more; the request is to be withdrawn from all.
    pub fn end(&mut self, paths: &mut Paths) {
        self.attempts.drain(..).for_each(|attempt| paths.dropped(attempt.path));
    }

    fn remove(&mut self, path: PathId) -> bool {
        let before = self.attempts.len();
        self.attempts.retain(|attempt| attempt.path != path);
        self.attempts.len() < before
    }
}
