//! What goes wrong: a plan of faults, drawn from the seed, and how each begins and ends.
//!
//! Every fault ends by the moment at which the plan is over, except deaths: who died or left then comes back,
//! so that liveness can be asked of all. Lies stay known: who lied keeps its bans and its blame.

use std::time::Duration;

use rand::Rng;
use rand::seq::IndexedRandom;

use crate::coordinator::ToVolt;
use crate::event::{End, Event, NodeIx, Side};
use crate::node::{Honesty, Intent, Power, Wire};
use crate::world::World;

/// Something that goes wrong, or is put right.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fault {
    /// A process is killed, or its host loses power.
    Dies(NodeIx, Power),
    /// A node starts again, with an empty cache, as after the loss of its disk.
    Starts(NodeIx),
    /// A node leaves in peace.
    Leaves(NodeIx),
    /// A node asks for leave, and goes when it is given.
    Retires(NodeIx),
    /// A process stops, while its kernel holds its connections.
    Freezes(NodeIx, Duration),
    /// A host's link is cut; its connections outlive that.
    Cut(NodeIx, Duration),
    /// A rack's link is cut.
    RackCut(usize, Duration),
    /// A host's link has this part of its rate.
    Throttled(NodeIx, f64),
    /// All connections of a node are reset.
    Reset(NodeIx),
    /// A node sends wrong chunks.
    Lies(NodeIx),
    /// It stops doing so.
    LiesNoMore(NodeIx),
    VoltDies,
    VoltStarts,
}

/// How long the origin is gone.
const ORIGIN_GONE: Duration = Duration::from_secs(5);

/// Faults of one plan.
const FAULTS_MAX: usize = 24;

impl World {
    /// Draws the plan of this run and writes it down.
    pub(crate) fn draw_faults(&mut self) {
        let end = Duration::from_millis(self.random.random_range(500..8_000));
        let count = self.random.random_range(1..=FAULTS_MAX);
        for _ in 0..count {
            let begin = end.mul_f64(self.random.random_range(0.0..1.0));
            let length = (end - begin).mul_f64(self.random.random_range(0.0..1.0));
            self.draw_fault(begin, length);
        }
        self.faults_end = self.faults.iter().map(|(at, _)| *at).max().unwrap_or_default().max(end);
        self.faults.sort_by_key(|(at, _)| *at);
        for (ix, (at, _)) in self.faults.iter().enumerate() {
            self.queue.at(*at, Event::Fault(ix));
        }
    }

    fn draw_fault(&mut self, begin: Duration, length: Duration) {
        let node = NodeIx(self.random.random_range(1..=self.scenario.nodes));
        let any = NodeIx(self.random.random_range(0..=self.scenario.nodes));
        let off = *[Power::Off, Power::Lost].choose(&mut self.random).expect("there are two");
        let until = begin + length;
        let plan = match self.random.random_range(0..11) {
            0..=2 => vec![(begin, Fault::Dies(node, off)), (until, Fault::Starts(node))],
            // Decided by what was drawn already, so that all other faults of a seed stay as they are.
            3 if begin.subsec_nanos().is_multiple_of(2) => {
                vec![(begin, Fault::Retires(node)), (until, Fault::Starts(node))]
            }
            3 => vec![(begin, Fault::Leaves(node)), (until, Fault::Starts(node))],
            4 => vec![(begin, Fault::Freezes(any, length))],
            5 => vec![(begin, Fault::Cut(any, length))],
            6 if self.scenario.racks > 0 => {
                let rack = self.random.random_range(0..self.scenario.racks as usize);
                vec![(begin, Fault::RackCut(rack, length))]
            }
            6 => vec![(begin, Fault::Reset(any))],
            7 => vec![(begin, Fault::Throttled(any, 0.01)), (until, Fault::Throttled(any, 1.0))],
            8 => vec![(begin, Fault::VoltDies), (until, Fault::VoltStarts)],
            9 => {
                let origin = NodeIx(0);
                vec![(begin, Fault::Dies(origin, Power::Off)), (begin + ORIGIN_GONE, Fault::Starts(origin))]
            }
            _ => vec![(begin, Fault::Lies(node)), (until, Fault::LiesNoMore(node))],
        };
        self.faults.extend(plan);
    }

    /// A fault of the plan begins or ends.
    pub(crate) fn fault(&mut self, at: usize) {
        let now = self.queue.now();
        match self.faults[at].1 {
            Fault::Dies(node, power) => self.kill(node, power),
            Fault::Leaves(node) => {
                self.tell_volt(node, ToVolt::Detach);
                self.kill(node, Power::Off);
            }
            Fault::Retires(node) => {
                if self.nodes[node.at()].is_on() {
                    self.nodes[node.at()].intent = Intent::Leave;
                    self.tell_volt(node, ToVolt::Leave);
                }
            }
            Fault::Starts(node) => {
                if self.nodes[node.at()].intent == Intent::Leave {
                    self.nodes[node.at()].intent = Intent::Stay;
                    self.attaches_again(node);
                }
                if !self.nodes[node.at()].is_on() {
                    self.nodes[node.at()].frozen_until = now;
                    self.start_node(node, Duration::ZERO);
                }
            }
            Fault::Freezes(node, length) => {
                let node = &mut self.nodes[node.at()];
                node.frozen_until = node.frozen_until.max(now + length);
            }
            Fault::Cut(node, length) => self.net.cut(node, now + length),
            Fault::RackCut(rack, length) => self.net.cut_rack(rack, now + length),
            Fault::Throttled(node, part) => self.net.throttle(node, part),
            Fault::Reset(node) => self.reset(node),
            Fault::Lies(node) => {
                let node = &mut self.nodes[node.at()];
                node.honesty = Honesty::Liar;
                self.checks.expect_lies(&node.name);
            }
            Fault::LiesNoMore(node) => self.nodes[node.at()].honesty = Honesty::Honest,
            Fault::VoltDies => {
                if self.volt.planner.is_some() {
                    self.kill_volt();
                }
            }
            Fault::VoltStarts => {
                if self.volt.planner.is_none() {
                    self.start_volt();
                }
            }
        }
    }

    /// Ends a node's process, and its host's network if it loses power.
    pub(crate) fn kill(&mut self, ix: NodeIx, power: Power) {
        if !self.nodes[ix.at()].is_on() {
            return;
        }
        self.process_gone(ix, power);
        let ends = self.ends_of(ix);
        // First, so that nothing that the ends take along makes the dead node ask others.
        self.nodes[ix.at()].die(power);
        for end in ends {
            match power {
                Power::Lost => self.drop_end(end),
                Power::Off | Power::On => self.hang_up(end),
            }
        }
    }

    /// Both ends of all of a node's links see them end.
    fn reset(&mut self, ix: NodeIx) {
        for end in self.ends_of(ix) {
            self.queue.after(Duration::ZERO, Event::Ends(end));
            self.queue.after(self.net.latency(), Event::Ends(end.other()));
        }
    }

    /// The ends of links that a node holds.
    fn ends_of(&self, ix: NodeIx) -> Vec<End> {
        let node = &self.nodes[ix.at()];
        let up = node.uplinks.values().filter_map(|uplink| match uplink.wire {
            Wire::Open(link) => Some(End { link, side: Side::Client }),
            _ => None,
        });
        let down = node.downlinks.iter().map(|&link| End { link, side: Side::Server });
        up.chain(down).collect()
    }
}
