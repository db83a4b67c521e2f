//! What one node holds: its chunks, its fetches, its parents, its guests.
//!
//! The cache group is a set of chunks and a table of fetches that everybody who wants the same chunk joins,
//! as in `store`; nothing is ever evicted, because a boot set fits any cache.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use block::{NodeName, Priority};
use link::Stats;
use link::policy::{PathId, Paths, RequestPolicy, in_flight_max};
use link::wire::RequestId;
use planner::{Location, Placement, Role};

use crate::client::{Guest, Streamer};
use crate::content::{ChunkIx, ChunkSet};
use crate::event::{LinkId, NodeIx};

/// Who waits for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    Guest(usize),
    /// The boot profile's streamer, in this stripe.
    Profile(usize),
    Child(LinkId, RequestId),
}

/// A fetch that is under way.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) priority: Priority,
    pub(crate) waiters: Vec<(Waiter, Priority)>,
    pub(crate) policy: RequestPolicy,
    pub(crate) stage: Stage,
    /// Whom it was asked of, and as what.
    pub(crate) asks: Vec<(PathId, RequestId)>,
    /// Requests of an earlier policy that parents still have, while a new one begins.
    pub(crate) withdrawn: Vec<(PathId, RequestId)>,
    /// Counts decisions, so that a timer of an earlier one is void.
    pub(crate) seq: u64,
}

/// Whether a fetch has one of its node's places in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    InLine,
    InFlight,
}

/// The connection to one parent.
#[derive(Debug)]
pub(crate) struct Uplink {
    pub(crate) parent: NodeIx,
    pub(crate) wire: Wire,
    pub(crate) last_id: u32,
    /// What was asked there, by request; the priority is for those that wait for the dial.
    pub(crate) requests: BTreeMap<RequestId, (ChunkIx, Priority)>,
    /// Whether Volt was told that the parent is lost.
    pub(crate) lost: bool,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    /// Nobody needs it yet.
    Idle,
    /// Requests wait, while the first dial takes no longer than [`link::limits::DIAL_PATIENCE`].
    Dialing {
        since: Duration,
    },
    Open(LinkId),
    /// Waits to be dialed again.
    Down,
}

/// Whether a node has Volt's ear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    Off,
    /// With that run of Volt.
    On(u32),
}

/// Whether a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Power {
    On,
    /// Its process ended; its host says so to whoever calls.
    Off,
    /// Its host is gone too: nobody says anything.
    Lost,
}

/// Whether a node wants to go in the order that hurts no child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Intent {
    Stay,
    Leave,
}

/// Whether a node sends the chunks that it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Honesty {
    Honest,
    /// It flips a bit in each.
    Liar,
}

/// One node. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) location: Location,
    pub(crate) role: Role,
    pub(crate) power: Power,
    pub(crate) incarnation: u32,
    pub(crate) frozen_until: Duration,
    pub(crate) honesty: Honesty,
    pub(crate) intent: Intent,
    pub(crate) resident: ChunkSet,
    pub(crate) flights: BTreeMap<ChunkIx, Flight>,
    /// By urgency: fetches in flight, and those that wait for a place.
    pub(crate) in_flight: BTreeMap<Priority, usize>,
    pub(crate) in_line: BTreeMap<Priority, VecDeque<ChunkIx>>,
    pub(crate) seq: u64,
    pub(crate) stats: Arc<Stats>,
    pub(crate) paths: Paths,
    pub(crate) uplinks: BTreeMap<PathId, Uplink>,
    /// Per stripe the ranked parents.
    pub(crate) routes: Vec<Vec<PathId>>,
    pub(crate) placement: Option<Placement>,
    /// Links to its children.
    pub(crate) downlinks: Vec<LinkId>,
    pub(crate) bans: BTreeMap<NodeIx, Duration>,
    pub(crate) streamer: Option<Streamer>,
    pub(crate) guests: Vec<Guest>,
    /// Fetches that began because a guest waits.
    pub(crate) guest_requests: u64,
    pub(crate) session: Session,
    /// When the last message to and from Volt arrives: they keep their order.
    pub(crate) heard_by_volt_at: Duration,
    pub(crate) heard_volt_at: Duration,
    /// When it began to stream, and when it had the whole boot set.
    pub(crate) began_at: Option<Duration>,
    pub(crate) complete_at: Option<Duration>,
}

impl Node {
    pub(crate) fn new(name: NodeName, location: Location, role: Role, chunks: usize) -> Node {
        let stats = Arc::new(Stats::default());
        Node {
            name,
            location,
            role,
            power: Power::Off,
            incarnation: 0,
            frozen_until: Duration::ZERO,
            honesty: Honesty::Honest,
            intent: Intent::Stay,
            resident: if role == Role::Origin { ChunkSet::full(chunks) } else { ChunkSet::empty(chunks) },
            flights: BTreeMap::new(),
            in_flight: BTreeMap::new(),
            in_line: BTreeMap::new(),
            seq: 0,
            paths: Paths::new(link::policy::Settings::default(), stats.clone()),
            stats,
            uplinks: BTreeMap::new(),
            routes: Vec::new(),
            placement: None,
            downlinks: Vec::new(),
            bans: BTreeMap::new(),
            streamer: None,
            guests: Vec::new(),
            guest_requests: 0,
            session: Session::Off,
            heard_by_volt_at: Duration::ZERO,
            heard_volt_at: Duration::ZERO,
            began_at: None,
            complete_at: None,
        }
    }

    /// What does not outlive the process is gone.
    pub(crate) fn die(&mut self, power: Power) {
        self.power = power;
        self.incarnation += 1;
        self.flights = BTreeMap::new();
        self.in_flight = BTreeMap::new();
        self.in_line = BTreeMap::new();
        self.paths = Paths::new(link::policy::Settings::default(), self.stats.clone());
        self.uplinks = BTreeMap::new();
        self.routes = Vec::new();
        self.placement = None;
        self.downlinks = Vec::new();
        self.bans = BTreeMap::new();
        self.streamer = None;
        self.guests = Vec::new();
        self.session = Session::Off;
        self.honesty = Honesty::Honest;
        self.intent = Intent::Stay;
        if self.role == Role::Relay {
            self.resident = ChunkSet::empty(self.resident.len());
            self.began_at = None;
            self.complete_at = None;
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.power == Power::On
    }

    /// Takes a place in flight for a fetch, or a place in the line.
    pub(crate) fn admit(&mut self, chunk: ChunkIx, priority: Priority) -> Stage {
        let in_flight = self.in_flight.entry(priority).or_default();
        if *in_flight < in_flight_max(priority) {
            *in_flight += 1;
            return Stage::InFlight;
        }
        self.in_line.entry(priority).or_default().push_back(chunk);
        Stage::InLine
    }

    /// A fetch leaves its place, which goes to the next in line, if there is one.
    pub(crate) fn release(&mut self, chunk: ChunkIx, priority: Priority, stage: Stage) -> Option<ChunkIx> {
        let line = self.in_line.entry(priority).or_default();
        if stage == Stage::InLine {
            line.retain(|other| *other != chunk);
            return None;
        }
        let next = line.pop_front();
        match next {
            Some(next) => {
                self.flights.get_mut(&next).expect("what is in line is wanted").stage = Stage::InFlight;
            }
            None => *self.in_flight.entry(priority).or_default() -= 1,
        }
        next
    }
}
