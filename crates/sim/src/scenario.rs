//! What a run is about: a cluster, its network, who reads what, and whether things go wrong. All of it follows
//! from the seed, or from what a figure wants.

use std::rc::Rc;
use std::time::Duration;

use block::NodeName;
use planner::{Location, Role, Shape, Shaping};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::client::{Guest, Read};
use crate::content::ChunkIx;
use crate::event::{Event, NodeEvent, NodeIx};
use crate::net::RackLink;
use crate::node::{Honesty, Node, Power};
use crate::world::World;

/// Bytes per second of a link of that many Gbit/s.
pub(crate) fn gbit(rate: f64) -> f64 {
    rate * 1e9 / 8.0
}

/// Whether every step is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    Checked,
    /// Too many nodes to look at the whole plan after every event.
    Measured,
}

/// Whether things go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// All works.
    None,
    /// Whatever the seed says, until a moment that it says too.
    Random,
}

/// A bug that a test plants, to see that the checkers find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// The planner gives a node twice the children that it may have.
    CrowdedParents,
    /// A relay passes wrong chunks on, and nobody expects it to.
    WrongChunks,
    /// A node keeps what it was sent without looking at it.
    Credulous,
    /// A guest is not told that its chunk is there.
    ForgottenGuest,
}

/// A run. See the module's documentation.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// What all chance in the run comes from.
    pub seed: u64,
    /// Relays; one origin comes on top.
    pub nodes: u32,
    /// Chunks of the boot set.
    pub chunks: u32,
    /// Rate of a node's link in Gbit/s, in each direction.
    pub gbits: f64,
    /// Racks that the nodes stand in, in turn; 0 for nodes that do not know where they stand.
    pub racks: u32,
    /// Rate of a rack's link in Gbit/s, in each direction.
    pub rack_gbits: f64,
    /// How the hierarchy gets its shape.
    pub shaping: Shaping,
    /// Guests on each relay.
    pub guests: u32,
    /// Whether the boot profile is streamed.
    pub profile: bool,
    /// Whether things go wrong.
    pub faults: Faults,
    /// A bug that must be found.
    pub bug: Option<Bug>,
    pub(crate) scale: Scale,
    pub(crate) latency: Duration,
    pub(crate) lease: Duration,
    pub(crate) volt_delay_max: Duration,
    /// What Volt's processor takes for one message of a node.
    pub(crate) volt_cpu: Duration,
    /// Nodes begin to stream, and guests to boot, no earlier.
    pub(crate) stream_at: Duration,
    /// The time within which all relays start.
    pub(crate) start_within: Duration,
    /// What every guest reads; random if absent.
    pub(crate) trace: Option<Rc<[Read]>>,
}

impl Scenario {
    /// The scenario of a seed.
    pub fn random(seed: u64) -> Scenario {
        let mut random = StdRng::seed_from_u64(seed);
        let shapes = [(2, 1), (2, 2), (3, 2), (4, 4), (8, 4)];
        let shaping = match random.random_range(0..shapes.len() + 2) {
            at if at < shapes.len() => fixed(shapes[at].0, shapes[at].1),
            _ => Shaping::Auto,
        };
        let racks = if random.random_bool(0.5) { 0 } else { random.random_range(2..=4) };
        let gbits = [0.1, 1.0, 10.0][random.random_range(0..3)];
        Scenario {
            seed,
            nodes: random.random_range(2..=40),
            chunks: random.random_range(16..=128),
            gbits,
            racks,
            rack_gbits: gbits * [1.0, 2.0, 8.0][random.random_range(0..3)],
            shaping,
            guests: random.random_range(0..=3),
            profile: random.random_bool(0.8),
            faults: if random.random_bool(0.9) { Faults::Random } else { Faults::None },
            bug: None,
            scale: Scale::Checked,
            latency: Duration::from_micros(random.random_range(20..=1000)),
            lease: Duration::from_secs(3),
            volt_delay_max: Duration::from_millis(random.random_range(0..=50)),
            volt_cpu: Duration::from_micros(100),
            stream_at: Duration::ZERO,
            start_within: Duration::from_millis(random.random_range(0..=2000)),
            trace: None,
        }
    }

    /// Bytes of the boot set over the rate of a link: no scheme is faster.
    pub(crate) fn wire_limit(&self) -> Duration {
        let bytes = f64::from(self.chunks) * block::limits::CHUNK_BYTES as f64;
        Duration::from_secs_f64(bytes / gbit(self.gbits))
    }

    pub(crate) fn rack_links(&self) -> Vec<RackLink> {
        (0..self.racks).map(|_| RackLink { bytes_per_second: gbit(self.rack_gbits) }).collect()
    }
}

pub(crate) fn fixed(fan_out: u32, stripes: u32) -> Shaping {
    Shaping::Fixed(Shape::new(fan_out, stripes).expect("the shapes that are written here are possible"))
}

impl World {
    /// Puts the nodes there, and writes down when they start.
    pub(crate) fn populate(&mut self) {
        let scenario = self.scenario.clone();
        self.start_volt();
        for ix in 0..=scenario.nodes {
            let (name, role) = match ix {
                0 => ("origin".to_owned(), Role::Origin),
                _ => (format!("n{ix}"), Role::Relay),
            };
            let rack = (scenario.racks > 0).then(|| ix % scenario.racks.max(1));
            let location = rack.map_or(String::new(), |rack| format!("z/r{rack}/{name}"));
            let location: Location = location.parse().expect("labels of letters and digits");
            let name: NodeName = name.parse().expect("letters and digits");
            self.net.add_host(rack.map(|rack| rack as usize), gbit(scenario.gbits));
            self.names.insert(name.clone(), NodeIx(ix));
            self.nodes.push(Node::new(name, location, role, self.content.len()));
        }
        for ix in (0..=scenario.nodes).map(NodeIx) {
            let wait = if ix.0 == 0 { 0.0 } else { self.random.random_range(0.0..=1.0) };
            self.start_node(ix, scenario.start_within.mul_f64(wait));
        }
        if scenario.bug == Some(Bug::WrongChunks) {
            self.nodes.iter_mut().skip(1).for_each(|node| node.honesty = Honesty::Liar);
        }
        if scenario.faults == Faults::Random {
            self.draw_faults();
        }
    }

    /// Starts a node after a while, with its guests.
    pub(crate) fn start_node(&mut self, ix: NodeIx, wait: Duration) {
        let node = &mut self.nodes[ix.at()];
        node.power = Power::On;
        let role = node.role;
        let incarnation = self.incarnation(ix);
        self.queue.after(wait, Event::Node(incarnation, NodeEvent::Calls));
        if role == Role::Origin {
            return;
        }
        for guest in 0..self.scenario.guests as usize {
            let reads = self.reads();
            let first = reads[0].think;
            self.nodes[ix.at()].guests.push(Guest::new(reads));
            let at = (self.queue.now() + wait).max(self.scenario.stream_at) + first;
            self.queue.at(at, Event::Node(incarnation, NodeEvent::GuestReads(guest)));
        }
    }

    /// What a guest reads: the trace, or some of the boot set, forward with jumps, as boots do.
    fn reads(&mut self) -> Rc<[Read]> {
        if let Some(trace) = &self.scenario.trace {
            return trace.clone();
        }
        let chunks = self.scenario.chunks;
        let count = self.random.random_range(1..=2 * chunks);
        let mut at = 0;
        let mut read = || {
            at = if self.random.random_bool(0.2) {
                self.random.random_range(0..chunks)
            } else {
                (at + 1) % chunks
            };
            let think = Duration::from_micros(self.random.random_range(0..=20_000));
            Read { think, chunk: ChunkIx(at) }
        };
        (0..count).map(|_| read()).collect()
    }
}
