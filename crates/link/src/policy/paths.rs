//! All parents of a node as its requests see them, and the budgets that the requests share.
//!
//! Consistency: each parent is known by a [`PathId`] that is never used again, so that events of one that left
//! are ignored. Nothing here waits or fails.
//!
//! Three grades of doubt keep a dead parent from costing each read anew, and a slow one from being abandoned:
//! - *late*: an answer to a guest takes longer than this parent's recent ones; one more parent is asked, within
//!   the budget of hedges;
//! - *silent*: not one byte came since a late request was asked, not even a pong: new requests prefer others,
//!   until a byte comes. After [`SILENT_AFTER`] everything that was asked there is asked elsewhere too;
//! - *open* [`CircuitBreaker`]: it lives, and others deliver what it was asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::Priority;
use block::limits::CHUNK_BYTES;

use super::choice::Load;
use super::{
    CircuitBreaker, HedgeBudget, Latency, LinkState, Multipath, Service, Standing, Strike, TokenBucket,
};
use crate::limits::{
    BACKGROUND_BURST_CHUNKS, DIAL_PATIENCE, LAST_RESORT_BURST, LAST_RESORT_FOR_GUESTS,
    LAST_RESORT_PER_SECOND, LATE_FOR_LAST_RESORT, SILENT_AFTER,
};
use crate::stats::Stats;

/// A parent of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(u64);

/// What an administrator may choose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settings {
    /// Which of several good parents is asked.
    pub multipath: Multipath,
    /// What background fetches may take, in bytes per second; [`None`] is not a bound.
    pub background_bytes_per_second: Option<u64>,
}

/// All parents of a node. See the module's documentation.
#[derive(Debug)]
pub struct Paths {
    multipath: Multipath,
    paths: BTreeMap<PathId, Path>,
    last_id: u64,
    /// Counts choices.
    turn: u64,
    hedges: HedgeBudget,
    last_resort: TokenBucket,
    background: Option<TokenBucket>,
    stats: Arc<Stats>,
}

#[derive(Debug)]
struct Path {
    link: LinkState,
    breaker: CircuitBreaker,
    latency: Latency,
    service: Service,
    in_flight: usize,
    /// When the oldest of a series of requests in flight was asked.
    busy_since: Duration,
    /// When the last byte came.
    heard_at: Duration,
    /// When the last chunk came.
    delivered_at: Duration,
    /// When the last strike was given. Requests that were in flight then tell of the same pause, not of another.
    struck_at: Duration,
    silence: Silence,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Silence {
    /// Something came since the last late request was asked.
    No,
    /// Nothing came, not even a pong.
    Since(Duration),
}

/// What a coordinator should think of a parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is not connected.
    Down,
    /// It is connected, and others have to deliver what it is asked for.
    Beaten,
    /// It is good, or in doubt.
    Fair,
}

/// Whether a parent should get a new request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Grade {
    Good,
    /// It may be frozen, and the time to be sure is not over.
    Doubtful,
    /// It is frozen, or others deliver what it should.
    Bad,
    /// Its connection is down.
    Down,
}

impl Paths {
    /// No parents yet. `stats` counts what is decided here.
    pub fn new(settings: Settings, stats: Arc<Stats>) -> Paths {
        // At least one byte per second: a rate of nothing would wait for ever.
        let background = settings
            .background_bytes_per_second
            .map(|bytes| TokenBucket::new(BACKGROUND_BURST_CHUNKS, bytes.max(1) as f64 / CHUNK_BYTES as f64));
        Paths {
            multipath: settings.multipath,
            paths: BTreeMap::new(),
            last_id: 0,
            turn: 0,
            hedges: HedgeBudget::default(),
            last_resort: TokenBucket::new(LAST_RESORT_BURST, LAST_RESORT_PER_SECOND),
            background,
            stats,
        }
    }

    /// A new parent.
    pub fn add(&mut self, link: LinkState) -> PathId {
        self.last_id += 1;
        let path = Path {
            link,
            breaker: CircuitBreaker::default(),
            latency: Latency::default(),
            service: Service::default(),
            in_flight: 0,
            busy_since: Duration::ZERO,
            heard_at: Duration::ZERO,
            delivered_at: Duration::ZERO,
            struck_at: Duration::ZERO,
            silence: Silence::No,
        };
        self.paths.insert(PathId(self.last_id), path);
        PathId(self.last_id)
    }

    /// A parent that no plan names any more.
    pub fn remove(&mut self, id: PathId) {
        self.paths.remove(&id);
    }

    /// Whether requests may go over its connection.
    pub fn standing(&self, id: PathId) -> Standing {
        self.paths.get(&id).map_or(Standing::Down, |path| path.link.standing())
    }

    /// What a coordinator should think of it.
    pub fn verdict(&self, id: PathId) -> Verdict {
        match self.paths.get(&id) {
            Some(path) if path.link.is_up() && path.breaker.is_beaten() => Verdict::Beaten,
            Some(path) if path.link.is_up() => Verdict::Fair,
            _ => Verdict::Down,
        }
    }

    /// When it may be dialed.
    pub fn dial_at(&self, id: PathId) -> Duration {
        self.paths.get(&id).map_or(Duration::ZERO, |path| path.link.dial_at())
    }

    /// Requests in flight there.
    pub fn in_flight(&self, id: PathId) -> usize {
        self.paths.get(&id).map_or(0, |path| path.in_flight)
    }

    /// It greeted on a new connection.
    pub fn greeted(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| {
            path.link.up();
            path.breaker = CircuitBreaker::default();
            path.heard(now);
        });
    }

    /// Any byte came from it.
    pub fn heard(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| path.heard(now));
    }

    /// Its first dial takes long: requests should not wait for it. The dial itself goes on.
    pub fn dials_late(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| path.link.late(now));
    }

    /// The dial failed, or the connection was lost. Tell the requests that asked there as well.
    pub fn failed(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| path.link.failed(now));
    }

    /// It sent a wrong chunk; the connection is over. Returns until when it is banned.
    pub fn lied(&mut self, id: PathId, now: Duration) -> Duration {
        self.change(id, |path| path.link.lied(now)).unwrap_or(now)
    }

    fn change<T>(&mut self, id: PathId, change: impl FnOnce(&mut Path) -> T) -> Option<T> {
        self.paths.get_mut(&id).map(change)
    }

    pub(super) fn count(&self, counter: fn(&Stats) -> &AtomicU64) {
        counter(&self.stats).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn grade(&self, id: PathId, now: Duration) -> Grade {
        let Some(path) = self.paths.get(&id) else { return Grade::Down };
        match path.silence {
            _ if path.link.standing() == Standing::Down => Grade::Down,
            _ if !path.breaker.allows(now) => Grade::Bad,
            Silence::Since(since) if now >= since + SILENT_AFTER => Grade::Bad,
            Silence::Since(_) => Grade::Doubtful,
            Silence::No => Grade::Good,
        }
    }

    /// Chooses among equally good parents, the best ranked first.
    pub(super) fn choose(&mut self, good: &[PathId], now: Duration) -> Option<PathId> {
        let loads: Vec<Load> = good
            .iter()
            .filter_map(|id| self.paths.get(id))
            .map(|path| Load { in_flight: path.in_flight, service: path.service.mean(now) })
            .collect();
        self.turn += 1;
        self.multipath.choose(&loads, self.turn).and_then(|rank| good.get(rank).copied())
    }

    /// When a guest's request that was asked of it at `asked_at` is late.
    pub(super) fn late_at(&self, id: PathId, asked_at: Duration) -> Duration {
        asked_at + self.paths.get(&id).map(|path| path.latency.late_after()).unwrap_or_default()
    }

    /// When what was asked of it at `asked_at` must be asked elsewhere, if nothing is heard until then.
    pub(super) fn silent_at(&self, id: PathId, asked_at: Duration) -> Duration {
        match self.paths.get(&id) {
            // It is being dialed, and has nothing to say before.
            Some(path) if !path.link.is_up() => asked_at + DIAL_PATIENCE,
            Some(path) => path.heard_at.max(path.busy_since).max(asked_at) + SILENT_AFTER,
            None => asked_at,
        }
    }

    /// When a guest's request that was asked of it at `asked_at` may be hedged with the last resort. A busy host
    /// that takes long to connect must not become load on the origin.
    pub(super) fn last_resort_at(&self, id: PathId, asked_at: Duration) -> Duration {
        let connected = self.paths.get(&id).is_some_and(|path| path.link.is_up());
        if connected { asked_at + LATE_FOR_LAST_RESORT } else { self.silent_at(id, asked_at) }
    }

    /// A guest's request that was asked at `asked_at` is late.
    pub(super) fn late(&mut self, id: PathId, asked_at: Duration) {
        self.count(|stats| &stats.late_fetches);
        self.change(id, |path| path.doubt(asked_at));
    }

    /// Something that was asked at `asked_at` was not answered for so long that others are asked.
    pub(super) fn silent(&mut self, id: PathId, asked_at: Duration) {
        self.change(id, |path| path.doubt(asked_at));
    }

    pub(super) fn take_hedge(&mut self, now: Duration) -> Result<(), Duration> {
        self.hedges.take(now)
    }

    pub(super) fn take_last_resort(&mut self, priority: Priority, now: Duration) -> Result<(), Duration> {
        let keep = if priority == Priority::Guest { 0.0 } else { LAST_RESORT_FOR_GUESTS };
        self.last_resort.take(1.0, keep, now)
    }

    /// What a background fetch needs before it asks anybody.
    pub(super) fn take_background(&mut self, now: Duration) -> Result<(), Duration> {
        self.background.as_mut().map_or(Ok(()), |bucket| bucket.take(1.0, 0.0, now))
    }

    /// A guest's request begins.
    pub(super) fn requested(&mut self) {
        self.hedges.requested();
    }

    pub(super) fn asked(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| {
            if path.in_flight == 0 {
                path.busy_since = now;
            }
            path.in_flight += 1;
            path.breaker.asked(now);
        });
    }

    /// A chunk came.
    pub(super) fn answered(&mut self, id: PathId, priority: Priority, asked_at: Duration, now: Duration) {
        self.change(id, |path| {
            path.ended();
            path.heard(now);
            path.delivered_at = now;
            path.breaker.delivered();
            path.link.delivered();
            path.service.answered(asked_at, now);
            if priority == Priority::Guest {
                path.latency.answered(now.saturating_sub(asked_at));
            }
        });
    }

    /// An answer without a chunk came.
    pub(super) fn not_found(&mut self, id: PathId, now: Duration) {
        self.change(id, |path| {
            path.ended();
            path.heard(now);
        });
    }

    /// The request ended there without an answer: the connection was lost, or the request withdrawn.
    pub(super) fn dropped(&mut self, id: PathId) {
        self.change(id, Path::ended);
    }

    /// A request was withdrawn because another parent answered it, or because the patience is over. If it was
    /// late, and nothing else came meanwhile, that is a strike.
    pub(super) fn beaten(&mut self, id: PathId, priority: Priority, asked_at: Duration, now: Duration) {
        let Some(path) = self.paths.get_mut(&id) else { return };
        path.ended();
        let after = now.saturating_sub(asked_at);
        let late = priority == Priority::Guest && after >= path.latency.late_after();
        if priority == Priority::Guest {
            path.latency.unanswered(after);
        }
        if !late || path.delivered_at.max(path.struck_at) > asked_at {
            return;
        }
        path.struck_at = now;
        if path.breaker.strike(now) == Strike::Opened {
            self.count(|stats| &stats.breaker_openings);
        }
    }
}

impl Path {
    fn heard(&mut self, now: Duration) {
        self.heard_at = now;
        self.silence = Silence::No;
    }

    /// Something that was asked at `asked_at` takes long.
    fn doubt(&mut self, asked_at: Duration) {
        if self.silence == Silence::No && self.heard_at <= asked_at {
            self.silence = Silence::Since(asked_at);
        }
    }

    fn ended(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }
}
