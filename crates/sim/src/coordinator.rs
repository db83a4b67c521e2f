//! Volt's daemon in virtual time, over the real [`Planner`]: what nodes tell it, and what it pushes to them.
//!
//! A node calls, registers, attaches with the placement that it has, and then beats. Messages between a node and
//! Volt keep their order and take a delay. A run of Volt that dies forgets the plan, as the daemon does; the
//! next one hears of it from the nodes, and of quarantines from its durable record.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use block::{ChunkHash, NodeName};
use planner::{Action, Millis, Placement, Planner, Role, Settings, Shaping};
use rand::Rng;

use crate::event::{Event, Incarnation, NodeEvent, NodeIx};
use crate::node::{Intent, Power, Session};
use crate::scenario::{Bug, Scale, Scenario, fixed};
use crate::world::World;

/// What a node tells Volt.
#[derive(Debug)]
pub(crate) enum ToVolt {
    /// It registers, and attaches the image.
    Hello {
        current: Option<Placement>,
    },
    Heartbeat,
    Lost {
        parent: NodeIx,
    },
    Blame {
        liar: NodeIx,
        chunk: ChunkHash,
    },
    /// It leaves in peace.
    Detach,
    /// It asks for leave.
    Leave,
    /// Its connection ended, which its host says.
    Gone,
}

/// What Volt tells a node.
enum FromVolt {
    Place(Placement),
    /// It may go.
    Released,
    /// It is not known.
    Unknown,
}

/// Heartbeats per lease, as nodes send them.
const BEATS_PER_LEASE: u32 = 3;

/// Looks at the clock per lease, as the daemon takes them.
const TICKS_PER_LEASE: u32 = 4;

/// How long a node serves on what it has left. Less than the daemon's, and still more than any message takes to a child.
const DEPARTS_FOR: Duration = Duration::from_secs(1);

/// How long a node waits before it calls Volt again.
const CALL_AGAIN: Duration = Duration::from_millis(500);

/// Volt, or what is left of it while it is down.
pub(crate) struct Coordinator {
    settings: Settings,
    pub(crate) planner: Option<Planner>,
    /// Counts runs.
    pub(crate) run: u32,
    connected: BTreeMap<NodeIx, Incarnation>,
    quarantined: BTreeSet<NodeName>,
    /// When it is done with what it was told.
    free_at: Duration,
}

impl Coordinator {
    pub(crate) fn new(scenario: &Scenario) -> Coordinator {
        let lease = Millis(scenario.lease.as_millis() as u64);
        let shaping = match (scenario.bug, scenario.shaping) {
            (Some(Bug::CrowdedParents), Shaping::Fixed(shape)) => fixed(shape.fan_out() * 2, shape.stripes()),
            (_, shaping) => shaping,
        };
        Coordinator {
            settings: Settings { lease, shaping },
            planner: None,
            run: 0,
            connected: BTreeMap::new(),
            quarantined: BTreeSet::new(),
            free_at: Duration::ZERO,
        }
    }
}

impl World {
    pub(crate) fn start_volt(&mut self) {
        let now = self.queue.now();
        self.volt.planner = Some(Planner::new(self.volt.settings));
        self.volt.free_at = now;
        for node in self.volt.quarantined.clone() {
            self.plan(planner::Event::Quarantine { node });
        }
        self.queue.after(self.scenario.lease / TICKS_PER_LEASE, Event::VoltTicks(self.volt.run));
    }

    pub(crate) fn kill_volt(&mut self) {
        let run = self.volt.run;
        self.volt.planner = None;
        self.volt.run += 1;
        self.volt.connected.clear();
        // Those whose call is still on its way as well.
        for ix in (0..self.nodes.len() as u32).map(NodeIx) {
            if self.nodes[ix.at()].session == Session::On(run) {
                let incarnation = self.incarnation(ix);
                self.queue.after(self.net.latency(), Event::Node(incarnation, NodeEvent::VoltLost(run)));
            }
        }
    }

    pub(crate) fn volt_ticks(&mut self, run: u32) {
        if run == self.volt.run && self.volt.planner.is_some() {
            self.plan(planner::Event::Tick);
            self.queue.after(self.scenario.lease / TICKS_PER_LEASE, Event::VoltTicks(run));
        }
    }

    /// A message reaches Volt.
    pub(crate) fn volt_hears(&mut self, incarnation: Incarnation, run: u32, message: ToVolt) {
        if run != self.volt.run || self.volt.planner.is_none() {
            return;
        }
        let node = &self.nodes[incarnation.node.at()];
        let name = node.name.clone();
        if !matches!(message, ToVolt::Hello { .. })
            && self.volt.connected.get(&incarnation.node) != Some(&incarnation)
        {
            return;
        }
        match message {
            ToVolt::Hello { current } => {
                let (location, role) = (node.location.clone(), node.role);
                self.volt.connected.insert(incarnation.node, incarnation);
                self.plan(planner::Event::NodeUp { node: name.clone(), address: String::new(), location });
                let image = self.content.image;
                self.plan(planner::Event::Attach { node: name, image, role, current });
            }
            ToVolt::Heartbeat => self.plan(planner::Event::Heartbeat { node: name }),
            ToVolt::Lost { parent } => {
                let parent = self.nodes[parent.at()].name.clone();
                self.plan(planner::Event::Lost { by: name, parent });
            }
            ToVolt::Blame { liar, chunk } => {
                let liar = self.nodes[liar.at()].name.clone();
                let image = self.content.image;
                self.plan(planner::Event::Blame { by: name, liar, image, chunk });
            }
            ToVolt::Detach => self.plan(planner::Event::Detach { node: name, image: self.content.image }),
            ToVolt::Leave => self.plan(planner::Event::Leave { node: name, image: self.content.image }),
            ToVolt::Gone => {
                self.volt.connected.remove(&incarnation.node);
                self.plan(planner::Event::NodeDown { node: name });
            }
        }
    }

    /// Lets the planner take note of something, and does what it says.
    fn plan(&mut self, event: planner::Event) {
        let now = self.queue.now();
        let Some(planner) = self.volt.planner.as_mut() else { return };
        self.volt.free_at = self.volt.free_at.max(now) + self.scenario.volt_cpu;
        let actions = planner.apply(Millis(now.as_millis() as u64), event);
        for action in actions {
            match action {
                Action::Place { node, placement, .. } => self.push(&node, FromVolt::Place(placement)),
                Action::Released { node, .. } => self.push(&node, FromVolt::Released),
                Action::Unknown { node } => self.push(&node, FromVolt::Unknown),
                Action::Quarantine { node } => {
                    self.volt.quarantined.insert(node);
                }
                Action::Refuse { node } => self.checks.violated(format!("Volt refuses {node}")),
                Action::Dead { .. } | Action::Suspect { .. } => {}
            }
        }
        if self.scenario.scale == Scale::Checked {
            self.check_plan();
        }
    }

    fn push(&mut self, name: &NodeName, message: FromVolt) {
        let Some(&incarnation) = self.names.get(name).and_then(|node| self.volt.connected.get(node)) else {
            return;
        };
        let at = self.volt.free_at.max(self.queue.now()) + self.delay(incarnation.node);
        let node = &mut self.nodes[incarnation.node.at()];
        node.heard_volt_at = at.max(node.heard_volt_at);
        let event = match message {
            FromVolt::Place(placement) => NodeEvent::Placed(self.volt.run, Box::new(placement)),
            FromVolt::Released => NodeEvent::Released(self.volt.run),
            FromVolt::Unknown => NodeEvent::VoltLost(self.volt.run),
        };
        self.queue.at(node.heard_volt_at, Event::Node(incarnation, event));
    }

    /// What a message between a node and Volt takes now.
    fn delay(&mut self, node: NodeIx) -> Duration {
        let now = self.queue.now();
        let jitter = self.random.random_range(0.0..=1.0);
        let blocked = self.net.outside_blocked_until(node).saturating_sub(now);
        blocked + self.net.latency() + self.scenario.volt_delay_max.mul_f64(jitter)
    }
}

/// The nodes' side.
impl World {
    pub(crate) fn calls_volt(&mut self, ix: NodeIx) {
        let incarnation = self.incarnation(ix);
        if self.volt.planner.is_none() {
            return self.queue.after(CALL_AGAIN, Event::Node(incarnation, NodeEvent::Calls));
        }
        let run = self.volt.run;
        let node = &mut self.nodes[ix.at()];
        node.session = Session::On(run);
        let current = node.placement.clone().filter(|_| node.role == Role::Relay);
        self.tell_volt(ix, ToVolt::Hello { current });
        self.queue
            .after(self.scenario.lease / BEATS_PER_LEASE, Event::Node(incarnation, NodeEvent::Beats(run)));
    }

    /// Sends a message to Volt; without a session it is lost, as the daemon's reports are.
    pub(crate) fn tell_volt(&mut self, ix: NodeIx, message: ToVolt) {
        let Session::On(run) = self.nodes[ix.at()].session else { return };
        let at = self.queue.now() + self.delay(ix);
        let incarnation = self.incarnation(ix);
        let node = &mut self.nodes[ix.at()];
        node.heard_by_volt_at = at.max(node.heard_by_volt_at);
        self.queue.at(node.heard_by_volt_at, Event::VoltHears(incarnation, run, message));
    }

    pub(crate) fn beats(&mut self, ix: NodeIx, run: u32) {
        if self.nodes[ix.at()].session == Session::On(run) {
            self.tell_volt(ix, ToVolt::Heartbeat);
            let incarnation = self.incarnation(ix);
            self.queue.after(
                self.scenario.lease / BEATS_PER_LEASE,
                Event::Node(incarnation, NodeEvent::Beats(run)),
            );
        }
    }

    pub(crate) fn placed(&mut self, ix: NodeIx, run: u32, placement: Placement) {
        if self.nodes[ix.at()].session != Session::On(run) {
            return;
        }
        let is_usable = !placement.stripes.is_empty();
        self.place(ix, placement);
        let node = &mut self.nodes[ix.at()];
        if is_usable && node.began_at.is_none() {
            let at = self.scenario.stream_at.max(self.queue.now());
            node.began_at = Some(at);
            let incarnation = self.incarnation(ix);
            self.queue.at(at, Event::Node(incarnation, NodeEvent::Streams));
        }
    }

    /// The node has no place in the hierarchy any more: its process ends, unless it has come to want to stay.
    pub(crate) fn released(&mut self, ix: NodeIx, run: u32) {
        let node = &self.nodes[ix.at()];
        if node.session != Session::On(run) {
            return;
        }
        match node.intent {
            Intent::Leave => {
                let incarnation = self.incarnation(ix);
                self.queue.after(DEPARTS_FOR, Event::Node(incarnation, NodeEvent::Departs));
            }
            Intent::Stay => self.attaches_again(ix),
        }
    }

    /// What the node served on to late children is over.
    pub(crate) fn departs(&mut self, ix: NodeIx) {
        match self.nodes[ix.at()].intent {
            Intent::Leave => self.kill(ix, Power::Off),
            Intent::Stay => self.attaches_again(ix),
        }
    }

    /// The node says that it has the image, and stays.
    pub(crate) fn attaches_again(&mut self, ix: NodeIx) {
        let current = self.nodes[ix.at()].placement.clone();
        self.tell_volt(ix, ToVolt::Hello { current });
    }

    pub(crate) fn volt_lost(&mut self, ix: NodeIx, run: u32) {
        if self.nodes[ix.at()].session == Session::On(run) {
            self.nodes[ix.at()].session = Session::Off;
            let incarnation = self.incarnation(ix);
            self.queue.after(CALL_AGAIN, Event::Node(incarnation, NodeEvent::Calls));
        }
    }

    /// Volt hears that a process is gone, if the host can still say so.
    pub(crate) fn process_gone(&mut self, ix: NodeIx, power: Power) {
        if power == Power::Off {
            self.tell_volt(ix, ToVolt::Gone);
        }
    }
}
