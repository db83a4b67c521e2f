//! Who reads: a node's streamer of the boot profile, and its guests.

use std::rc::Rc;
use std::time::Duration;

use block::Priority;

use crate::content::ChunkIx;
use crate::event::{Event, NodeEvent, NodeIx};
use crate::fetch::{Got, stripe_of};
use crate::node::Waiter;
use crate::world::World;

/// Chunks that the streamer has in flight per stripe, as the daemon has.
const STREAM_WINDOW: usize = 16;

/// What a read takes that finds its chunk: a request over a local socket and a copy.
const LOCAL_READ: Duration = Duration::from_micros(50);

/// Streams the boot profile in its order, each stripe on its own, so that a slow one holds up no other.
#[derive(Debug)]
pub(crate) struct Streamer {
    stripes: Vec<Line>,
}

#[derive(Debug, Default)]
struct Line {
    order: Vec<ChunkIx>,
    next: usize,
    in_flight: usize,
}

/// A read of a guest: how long it thinks before, and what it wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Read {
    pub(crate) think: Duration,
    pub(crate) chunk: ChunkIx,
}

/// A guest that reads one chunk after the other.
#[derive(Debug)]
pub(crate) struct Guest {
    reads: Rc<[Read]>,
    at: usize,
    asked_at: Duration,
    pub(crate) stalled: Duration,
    pub(crate) longest_stall: Duration,
    pub(crate) done_at: Option<Duration>,
}

/// What a guest takes for its reads when every chunk is there.
pub(crate) fn warm(reads: &[Read]) -> Duration {
    reads.iter().map(|read| read.think + LOCAL_READ).sum()
}

impl Guest {
    pub(crate) fn new(reads: Rc<[Read]>) -> Guest {
        let zero = Duration::ZERO;
        Guest { reads, at: 0, asked_at: zero, stalled: zero, longest_stall: zero, done_at: None }
    }
}

impl World {
    /// The node begins to stream, over the stripes that it has.
    pub(crate) fn streams(&mut self, ix: NodeIx) {
        if !self.scenario.profile {
            return;
        }
        let node = &mut self.nodes[ix.at()];
        let count = node.routes.len().max(1);
        let mut stripes: Vec<Line> = (0..count).map(|_| Line::default()).collect();
        for chunk in (0..).take(self.content.len()).map(ChunkIx) {
            stripes[stripe_of(self.content.hash(chunk).prefix(), count)].order.push(chunk);
        }
        node.streamer = Some(Streamer { stripes });
        (0..count).for_each(|stripe| self.stream_on(ix, stripe));
    }

    /// Fills the window of a stripe.
    fn stream_on(&mut self, ix: NodeIx, stripe: usize) {
        loop {
            let node = &mut self.nodes[ix.at()];
            let Some(streamer) = node.streamer.as_mut() else { return };
            let line = &mut streamer.stripes[stripe];
            let Some(&chunk) = line.order.get(line.next).filter(|_| line.in_flight < STREAM_WINDOW) else {
                return;
            };
            line.next += 1;
            if !node.resident.contains(chunk) {
                line.in_flight += 1;
                self.fetch(ix, chunk, Priority::Profile, Waiter::Profile(stripe));
            }
        }
    }

    pub(crate) fn profile_got(&mut self, ix: NodeIx, stripe: usize) {
        if let Some(streamer) = self.nodes[ix.at()].streamer.as_mut() {
            streamer.stripes[stripe].in_flight -= 1;
            self.stream_on(ix, stripe);
        }
    }

    pub(crate) fn guest_reads(&mut self, ix: NodeIx, at: usize) {
        let now = self.queue.now();
        let guest = &mut self.nodes[ix.at()].guests[at];
        guest.asked_at = now;
        let chunk = guest.reads[guest.at].chunk;
        if self.fetch(ix, chunk, Priority::Guest, Waiter::Guest(at)) == Got::Here {
            self.guest_got(ix, at);
        }
    }

    /// The guest has what it asked for, and thinks about the next.
    pub(crate) fn guest_got(&mut self, ix: NodeIx, at: usize) {
        let now = self.queue.now();
        let incarnation = self.incarnation(ix);
        let guest = &mut self.nodes[ix.at()].guests[at];
        let stall = now - guest.asked_at;
        guest.stalled += stall;
        guest.longest_stall = guest.longest_stall.max(stall);
        guest.at += 1;
        match guest.reads.get(guest.at) {
            Some(read) => {
                let wait = LOCAL_READ + read.think;
                self.queue.after(wait, Event::Node(incarnation, NodeEvent::GuestReads(at)));
            }
            None => guest.done_at = Some(now + LOCAL_READ),
        }
    }
}
