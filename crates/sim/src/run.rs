//! One run from its scenario to what came of it.

use std::fmt;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use link::Stats;
use link::limits::{BREAKER_PAUSE_MAX, DIAL_MAX, PATIENCE_GUEST, REDIAL_MAX};
use link::policy::PathId;
use planner::{Planner, Standing};

use crate::content::Content;
use crate::event::NodeIx;
use crate::net::RackBytes;
use crate::node::Node;
use crate::scenario::{Faults, Scale, Scenario};
use crate::world::World;

/// Events of one run, per node and chunk: far more than any run needs; a run that goes round in a circle
/// without moving the clock ends here.
const EVENTS_PER_FETCH_MAX: u64 = 2_000;

/// Leases after the last fault in which the hierarchy comes to rest.
const LEASES_TO_SETTLE: u32 = 5;

/// A run that broke a promise.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The seed of the scenario.
    pub seed: u64,
    /// Virtual time since the beginning.
    pub at: Duration,
    /// Which promise, and by whom.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {} at {:.3} s: {}", self.seed, self.at.as_secs_f64(), self.what)
    }
}

/// What a node or guest took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Times(Vec<Duration>);

impl Times {
    /// The time that this part of all did not exceed; zero if there are none.
    pub fn quantile(&self, part: f64) -> Duration {
        let rank = (self.0.len() as f64 * part).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }

    fn of(times: impl Iterator<Item = Duration>) -> Times {
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        Times(times)
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Events that happened.
    pub events: u64,
    /// Virtual time from the moment that nodes may begin until each relay had the whole boot set.
    pub complete: Times,
    /// The same until each guest had read all it reads.
    pub booted: Times,
    /// The longest wait of each guest for one read.
    pub stalls: Times,
    /// Virtual time from the last fault until all were done.
    pub healed: Duration,
    /// Bytes that left the origin.
    pub origin_bytes: u64,
    /// The most bytes that left a relay.
    pub relay_bytes_max: u64,
    /// The most bytes that passed a rack's link in one direction.
    pub rack_bytes_max: u64,
    /// Chunks sent to all nodes for each that a node kept.
    pub sent_per_kept: f64,
    /// Fetches that were asked of a second parent while the first had them.
    pub hedges: u64,
    /// Steps from the origin to the deepest node.
    pub depth: u32,
}

/// Runs a scenario.
///
/// # Errors
/// The first promise that was broken.
pub fn run(scenario: &Scenario) -> Result<Outcome, Failure> {
    let content = Rc::new(Content::new(scenario.chunks, scenario.seed));
    let mut world = World::new(scenario.clone(), content);
    let result = drive(&mut world);
    result.map_err(|what| Failure { seed: scenario.seed, at: world.queue.now(), what })
}

fn drive(world: &mut World) -> Result<Outcome, String> {
    let scenario = world.scenario.clone();
    let faults_over = world.faults_end.max(scenario.stream_at).max(scenario.start_within);
    let deadline = faults_over + scenario.patience();
    let fetches =
        u64::from(scenario.nodes) * u64::from(scenario.chunks + 100) * u64::from(scenario.guests + 1);
    let events_max = EVENTS_PER_FETCH_MAX * (fetches + 10_000);
    let look_every = u64::from(scenario.nodes);
    loop {
        if !world.step() {
            return Err("nothing happens any more".to_owned());
        }
        if let Some(what) = world.checks.violation.take() {
            return Err(what);
        }
        if world.events >= events_max {
            return Err(format!("{events_max} events and no end"));
        }
        let now = world.queue.now();
        if world.events.is_multiple_of(look_every) || now > deadline {
            let unfinished = world.unfinished();
            if unfinished.is_none() && now >= faults_over {
                break;
            }
            if let Some(what) = unfinished
                && now > deadline
            {
                return Err(format!(
                    "{:.1} s after the last fault {what}",
                    scenario.patience().as_secs_f64()
                ));
            }
        }
    }
    let outcome = world.outcome(world.queue.now() - faults_over);
    world.check_counters(&outcome)?;
    match scenario.scale {
        Scale::Checked => settle(world)?,
        Scale::Measured => world.check_plan(),
    }
    world.checks.violation.take().map_or(Ok(outcome), Err)
}

/// Lets the hierarchy come to rest and looks at it. A loss can be noticed late, on a link that was idle; who is
/// suspected for it gets no new children for a lease, so that an origin may have them until then.
fn settle(world: &mut World) -> Result<(), String> {
    let rest = world.queue.now() + world.scenario.lease * LEASES_TO_SETTLE;
    let latest = rest + world.scenario.lease * LEASES_TO_SETTLE;
    let is_suspect = |world: &World| {
        let nodes = world.volt.planner.iter().flat_map(Planner::nodes);
        nodes.into_iter().any(|node| node.standing == Standing::Suspect)
    };
    while (world.queue.now() < rest || (world.queue.now() < latest && is_suspect(world))) && world.step() {
        if let Some(what) = world.checks.violation.take() {
            return Err(what);
        }
    }
    if let Some(planner) = &world.volt.planner {
        world.checks.settled(planner, &world.content.image);
    }
    Ok(())
}

impl Scenario {
    /// How long after the last fault all must be done: what the detectors of failures take at worst one after
    /// the other, and the transfer at a rate that even a hierarchy that is still healing reaches.
    pub fn patience(&self) -> Duration {
        let detect = self.lease * 4 + PATIENCE_GUEST + BREAKER_PAUSE_MAX + DIAL_MAX + REDIAL_MAX;
        let rack = if self.racks > 0 { f64::from(self.nodes) * self.gbits / self.rack_gbits } else { 1.0 };
        let transfer = self.wire_limit().mul_f64(4.0 * rack.max(4.0));
        // A guest reads at most twice as many chunks as there are, and thinks 20 ms at most before each.
        let guests = Duration::from_millis(100) * 2 * self.chunks * self.guests.min(1);
        detect + transfer + guests
    }
}

impl World {
    /// Who is not done yet.
    fn unfinished(&self) -> Option<String> {
        let relays = || self.nodes.iter().skip(1);
        if self.scenario.profile
            && let Some(node) = relays().find(|node| node.complete_at.is_none())
        {
            let (have, all) = (node.resident.count(), self.content.len());
            return Some(format!("{} has {have} chunks of {all}; {}", node.name, self.plight(node)));
        }
        let waits = |node: &Node| node.guests.iter().any(|guest| guest.done_at.is_none());
        let node = relays().find(|node| waits(node))?;
        Some(format!("a guest of {} still waits; {}", node.name, self.plight(node)))
    }

    /// What a node waits for, for whoever looks into a failure.
    fn plight(&self, node: &Node) -> String {
        let peer = |path: &PathId| match node.uplinks.get(path) {
            Some(uplink) => {
                let standing = node.paths.standing(*path);
                format!("{} ({:?}, {standing:?})", self.nodes[uplink.parent.at()].name, uplink.wire)
            }
            None => "a parent without an uplink".to_owned(),
        };
        let routes: Vec<Vec<String>> =
            node.routes.iter().map(|ranked| ranked.iter().map(peer).collect()).collect();
        format!("{:?}, {:?}, {} fetches, parents {routes:?}", node.power, node.session, node.flights.len())
    }

    fn relays(&self) -> impl Iterator<Item = NodeIx> {
        (1..=self.scenario.nodes).map(NodeIx)
    }

    pub(crate) fn check_plan(&mut self) {
        if let Some(planner) = &self.volt.planner {
            self.checks.planned(planner, &self.content.image);
        }
    }

    fn outcome(&self, healed: Duration) -> Outcome {
        let from = self.scenario.stream_at;
        let relays = || self.nodes.iter().skip(1);
        let guests = || relays().flat_map(|node| &node.guests);
        let total = |counter: fn(&Stats) -> &AtomicU64| -> u64 {
            self.nodes.iter().map(|node| counter(&node.stats).load(Ordering::Relaxed)).sum()
        };
        let kept: usize = relays().map(|node| node.resident.count()).sum();
        let tree = self.volt.planner.as_ref().and_then(|planner| planner.tree(&self.content.image));
        let depths = tree.iter().flat_map(|tree| &tree.stripes).flatten().map(|row| row.depth);
        let rack_most = |rack: RackBytes| rack.up.max(rack.down);
        Outcome {
            events: self.events,
            complete: Times::of(relays().filter_map(|n| n.complete_at).map(|at| at.saturating_sub(from))),
            booted: Times::of(guests().filter_map(|g| g.done_at).map(|at| at.saturating_sub(from))),
            stalls: Times::of(guests().map(|guest| guest.longest_stall)),
            healed,
            origin_bytes: self.net.bytes_out(NodeIx(0)),
            relay_bytes_max: self.relays().map(|node| self.net.bytes_out(node)).max().unwrap_or_default(),
            rack_bytes_max: self.net.rack_bytes().map(rack_most).max().unwrap_or_default(),
            sent_per_kept: total(|s| &s.chunks_sent) as f64 / kept.max(1) as f64,
            hedges: total(|s| &s.hedges),
            depth: depths.max().unwrap_or_default(),
        }
    }

    /// What must be so of the counters.
    fn check_counters(&mut self, outcome: &Outcome) -> Result<(), String> {
        let seconds = self.queue.now().as_secs_f64();
        for node in &self.nodes {
            self.checks.hedged(node, node.stats.hedges.load(Ordering::Relaxed), seconds);
        }
        if self.scenario.faults == Faults::None {
            let count = |counter: fn(&Stats) -> &AtomicU64| -> u64 {
                self.nodes.iter().map(|node| counter(&node.stats).load(Ordering::Relaxed)).sum()
            };
            let kept: usize = self.nodes.iter().skip(1).map(|node| node.resident.count()).sum();
            let excused = outcome.hedges + count(|s| &s.failovers) + count(|s| &s.cancels_sent);
            let sent = count(|s| &s.chunks_sent);
            if sent > kept as u64 + excused {
                return Err(format!(
                    "{sent} chunks were sent for {kept} that were kept, {excused} with reason"
                ));
            }
        }
        self.checks.violation.take().map_or(Ok(()), Err)
    }
}
