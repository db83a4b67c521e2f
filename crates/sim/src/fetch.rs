//! Fetches of one node: who waits joins one flight, and the flight's [`RequestPolicy`] leads it from parent to parent.
//!
//! This is what `store` and `link::Fetcher` do in the daemon, over the same decisions: a more urgent waiter
//! begins anew with its urgency, the last waiter to leave withdraws the request, and a change of
//! plan takes effect on what is under way.

use block::{Chunk, Priority};
use link::Reply;
use link::policy::{Decision, PathId, RequestPolicy};
use link::wire::{LackReason, Payload, RequestId};

use crate::content::ChunkIx;
use crate::event::{Event, LinkId, NodeEvent, NodeIx};
use crate::node::{Flight, Honesty, Stage, Waiter};
use crate::scenario::Bug;
use crate::world::World;

/// Whether a chunk was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Got {
    Here,
    /// The waiter is told when it is.
    Later,
}

impl World {
    /// Gets a chunk for somebody.
    pub(crate) fn fetch(&mut self, ix: NodeIx, chunk: ChunkIx, priority: Priority, waiter: Waiter) -> Got {
        let node = &mut self.nodes[ix.at()];
        if node.resident.contains(chunk) {
            return Got::Here;
        }
        if let Some(flight) = node.flights.get_mut(&chunk) {
            flight.waiters.push((waiter, priority));
            if priority > flight.priority {
                self.restart(ix, chunk, priority);
            }
            return Got::Later;
        }
        node.guest_requests += u64::from(priority == Priority::Guest);
        let stage = node.admit(chunk, priority);
        node.seq += 1;
        let flight = Flight {
            priority,
            waiters: vec![(waiter, priority)],
            policy: RequestPolicy::new(priority),
            stage,
            asks: Vec::new(),
            withdrawn: Vec::new(),
            seq: node.seq,
        };
        node.flights.insert(chunk, flight);
        self.seek(ix, chunk);
        Got::Later
    }

    /// A waiter became more urgent.
    pub(crate) fn raise(&mut self, ix: NodeIx, chunk: ChunkIx, waiter: Waiter, priority: Priority) {
        let Some(flight) = self.nodes[ix.at()].flights.get_mut(&chunk) else { return };
        if let Some(entry) = flight.waiters.iter_mut().find(|(other, _)| *other == waiter) {
            entry.1 = entry.1.max(priority);
        }
        if priority > flight.priority {
            self.restart(ix, chunk, priority);
        }
    }

    /// A waiter does not want the chunk any more.
    pub(crate) fn leave(&mut self, ix: NodeIx, chunk: ChunkIx, waiter: Waiter) {
        let Some(flight) = self.nodes[ix.at()].flights.get_mut(&chunk) else { return };
        flight.waiters.retain(|(other, _)| *other != waiter);
        if flight.waiters.is_empty() {
            self.end_flight(ix, chunk);
        }
    }

    /// Begins anew, with another urgency. A parent that is asked again keeps the request, raised: the chunk may
    /// be on its way.
    fn restart(&mut self, ix: NodeIx, chunk: ChunkIx, priority: Priority) {
        let node = &mut self.nodes[ix.at()];
        let Some(mut flight) = node.flights.remove(&chunk) else { return };
        flight.policy.end(&mut node.paths);
        self.release(ix, chunk, flight.priority, flight.stage);
        let node = &mut self.nodes[ix.at()];
        node.guest_requests += u64::from(priority == Priority::Guest);
        let stage = node.admit(chunk, priority);
        node.seq += 1;
        flight.withdrawn = std::mem::take(&mut flight.asks);
        let flight =
            Flight { priority, policy: RequestPolicy::new(priority), stage, seq: node.seq, ..flight };
        node.flights.insert(chunk, flight);
        self.seek(ix, chunk);
        let flight = self.nodes[ix.at()].flights.get_mut(&chunk);
        for (path, request) in flight.map(|flight| std::mem::take(&mut flight.withdrawn)).unwrap_or_default()
        {
            self.withdraw(ix, path, request);
        }
    }

    /// Takes a flight out, and its requests back from whoever has them.
    fn end_flight(&mut self, ix: NodeIx, chunk: ChunkIx) -> Option<Flight> {
        let node = &mut self.nodes[ix.at()];
        let mut flight = node.flights.remove(&chunk)?;
        std::mem::replace(&mut flight.policy, RequestPolicy::new(flight.priority)).end(&mut node.paths);
        for (path, request) in std::mem::take(&mut flight.asks) {
            self.withdraw(ix, path, request);
        }
        self.release(ix, chunk, flight.priority, flight.stage);
        Some(flight)
    }

    fn release(&mut self, ix: NodeIx, chunk: ChunkIx, priority: Priority, stage: Stage) {
        if let Some(next) = self.nodes[ix.at()].release(chunk, priority, stage) {
            self.seek(ix, next);
        }
    }

    /// Does what the policy of a fetch decides, until it decides to wait.
    pub(crate) fn seek(&mut self, ix: NodeIx, chunk: ChunkIx) {
        let now = self.queue.now();
        let hash = self.content.hash(chunk);
        loop {
            let node = &mut self.nodes[ix.at()];
            let Some(flight) = node.flights.get_mut(&chunk) else { return };
            if flight.stage == Stage::InLine {
                return;
            }
            let ranked: &[PathId] = match node.routes.len() {
                0 => &[],
                stripes => &node.routes[stripe_of(hash.prefix(), stripes)],
            };
            match flight.policy.decide(&mut node.paths, ranked, now) {
                Decision::Ask { path } | Decision::Hedge { path } => self.ask(ix, chunk, path),
                Decision::Withdraw { path } => {
                    if let Some(at) = flight.asks.iter().position(|(asked, _)| *asked == path) {
                        let (_, request) = flight.asks.remove(at);
                        self.withdraw(ix, path, request);
                    }
                }
                Decision::Wait { until } => {
                    node.seq += 1;
                    flight.seq = node.seq;
                    let seq = flight.seq;
                    let incarnation = self.incarnation(ix);
                    return self.queue.at(until, Event::Node(incarnation, NodeEvent::Decides(chunk, seq)));
                }
                Decision::GiveUp => return self.give_up(ix, chunk),
            }
        }
    }

    /// A decision is due.
    pub(crate) fn decides(&mut self, ix: NodeIx, chunk: ChunkIx, seq: u64) {
        if self.nodes[ix.at()].flights.get(&chunk).is_some_and(|flight| flight.seq == seq) {
            self.seek(ix, chunk);
        }
    }

    /// A parent that was asked for a chunk will not answer, or did so without it.
    pub(crate) fn failed(&mut self, ix: NodeIx, chunk: ChunkIx, path: PathId, reason: Option<LackReason>) {
        let now = self.queue.now();
        let node = &mut self.nodes[ix.at()];
        let Some(flight) = node.flights.get_mut(&chunk) else { return };
        flight.asks.retain(|(asked, _)| *asked != path);
        match reason {
            Some(reason) => flight.policy.not_found(&mut node.paths, path, reason, now),
            None => flight.policy.lost(&mut node.paths, path),
        }
        self.seek(ix, chunk);
    }

    /// Nobody has the chunk: the waiters are told. Never so while there is an origin.
    fn give_up(&mut self, ix: NodeIx, chunk: ChunkIx) {
        let Some(flight) = self.end_flight(ix, chunk) else { return };
        for (waiter, _) in flight.waiters {
            match waiter {
                Waiter::Child(link, id) => self.answer(link, id, Reply::Lack(LackReason::NotHere)),
                Waiter::Guest(_) | Waiter::Profile(_) => {
                    self.checks.violated(format!(
                        "{} was refused chunk {}",
                        self.nodes[ix.at()].name,
                        chunk.0
                    ));
                }
            }
        }
    }

    /// A verified chunk came over a link: it is kept, and whoever waits is told.
    pub(crate) fn arrived(&mut self, ix: NodeIx, path: PathId, chunk: &Chunk) {
        let now = self.queue.now();
        let Some(place) = self.content.find(&chunk.hash()) else {
            return self.checks.violated(format!("{:?} is not a chunk of the image", chunk.hash()));
        };
        let node = &mut self.nodes[ix.at()];
        let kept = match self.scenario.bug {
            Some(Bug::Credulous) => self.content.flipped(place),
            _ => chunk.bytes().clone(),
        };
        self.checks.stored(&self.content, &node.name, place, &kept);
        let Some(mut flight) = node.flights.remove(&place) else {
            return self.checks.violated(format!("{} got chunk {} that it did not want", node.name, place.0));
        };
        node.resident.insert(place);
        let mut policy = std::mem::replace(&mut flight.policy, RequestPolicy::new(flight.priority));
        policy.answered(&mut node.paths, path, now);
        for (asked, request) in flight.asks {
            if asked != path {
                self.withdraw(ix, asked, request);
            }
        }
        self.release(ix, place, flight.priority, flight.stage);
        for (waiter, _) in flight.waiters {
            match waiter {
                Waiter::Guest(_) if self.scenario.bug == Some(Bug::ForgottenGuest) => {}
                Waiter::Guest(guest) => self.guest_got(ix, guest),
                Waiter::Profile(stripe) => self.profile_got(ix, stripe),
                Waiter::Child(link, id) => self.serve_chunk(ix, link, id, place),
            }
        }
        let node = &mut self.nodes[ix.at()];
        if node.resident.count() == self.content.len() {
            node.complete_at.get_or_insert(now);
        }
    }

    /// Answers a child with a chunk that is here.
    pub(crate) fn serve_chunk(&mut self, ix: NodeIx, link: LinkId, id: RequestId, chunk: ChunkIx) {
        let bytes = match self.nodes[ix.at()].honesty {
            Honesty::Honest => self.content.bytes(chunk).clone(),
            Honesty::Liar => self.content.flipped(chunk),
        };
        self.answer(link, id, Reply::Have(Payload::Raw(bytes)));
    }
}

/// The stripe of a chunk with that hash prefix.
pub(crate) fn stripe_of(prefix: u64, stripes: usize) -> usize {
    usize::try_from(prefix % stripes as u64).expect("less than a length")
}
