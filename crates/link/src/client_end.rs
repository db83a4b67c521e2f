//! The client side of one link: requests in, bytes out; bytes in, verified chunks out.
//!
//! Owns no socket and no clock. The caller moves bytes and hands time in:
//! [`want`](ClientEnd::want), [`cancel`](ClientEnd::cancel), [`raise`](ClientEnd::raise) and
//! [`inbox`](ClientEnd::inbox) + [`heard`](ClientEnd::heard) change the state; afterwards
//! [`poll_event`](ClientEnd::poll_event) and [`poll_transmit`](ClientEnd::poll_transmit) are called until they give
//! nothing, and [`tick`](ClientEnd::tick) at [`deadline`](ClientEnd::deadline).
//!
//! Invariants:
//! - Every request gets exactly one event, `Arrived` or `Lacking`, unless it was cancelled or the link closes.
//! - Whatever leaves here was verified. Hashing takes some 15 µs a chunk and is done in place: handing it to
//!   another thread and back costs as much, and links are spread over threads anyway.
//! - Never more than [`OUTSTANDING_MAX`] requests are on the wire, cancelled ones included until the parent
//!   confirms them, so that parent and child count alike.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use block::{Chunk, ChunkHash, ImageId, NodeName, Priority};
use bytes::{Bytes, BytesMut};

use crate::limits::{
    BATCH_MAX, OUTSTANDING_FOR_GUESTS, OUTSTANDING_MAX, PING_AFTER_BUSY, PING_AFTER_IDLE, QUEUED_MAX,
    SILENCE_MAX_BUSY, SILENCE_MAX_IDLE,
};
use crate::pack;
use crate::session::{Closed, Outgoing, Session};
use crate::stats::ScopedStats;
use crate::wire::{ByeReason, Frame, LackReason, Payload, RequestId};

/// What happened on the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientEvent {
    /// The parent greeted: it is who it should be and speaks our version.
    Ready,
    /// The chunk, verified.
    Arrived {
        /// The request that it answers.
        id: RequestId,
        /// The chunk; in its packed form too if it came so.
        chunk: Chunk,
    },
    /// The parent answered without the chunk.
    Lacking {
        /// The request.
        id: RequestId,
        /// Why.
        reason: LackReason,
    },
    /// The parent sent bytes that are not the chunk. The link is closed; [`ClientEvent::Closed`] follows.
    Liar {
        /// The image that the chunk was asked for of.
        image: ImageId,
        /// The chunk that was asked for.
        chunk: ChunkHash,
    },
    /// The link is over, and with it all requests. The last event.
    Closed(Closed),
}

/// A request was not taken: the queue is full, or its id is in use. Ask another parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the link takes no more requests")]
pub struct Refused;

#[derive(Debug)]
struct Request {
    image: ImageId,
    chunk: ChunkHash,
    priority: Priority,
    state: RequestState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestState {
    /// Not sent yet; the number is its place among those of its priority.
    Queued(u64),
    Sent,
    /// Sent and withdrawn; the parent has yet to confirm.
    Cancelled,
}

/// The client side of one link. See the module's documentation.
#[derive(Debug)]
pub struct ClientEnd {
    session: Session,
    requests: HashMap<RequestId, Request>,
    /// Requests not sent yet, the most urgent and among them the oldest first.
    queue: BTreeMap<(Reverse<Priority>, u64), RequestId>,
    /// Counts requests, to keep their order.
    turn: u64,
    cancels: Vec<RequestId>,
    outstanding: usize,
    events: VecDeque<ClientEvent>,
    /// When the oldest of a series of outstanding requests was sent.
    busy_since: Option<Duration>,
    /// When the last ping was sent, unless something was heard since.
    pinged: Option<Duration>,
    closed_told: bool,
}

impl ClientEnd {
    /// A link that node `own` opens to `parent`. `Hello` and requests may be sent at once.
    pub fn new(own: &NodeName, parent: NodeName, stats: ScopedStats, now: Duration) -> ClientEnd {
        ClientEnd {
            session: Session::new(own, parent, stats, now),
            requests: HashMap::new(),
            queue: BTreeMap::new(),
            turn: 0,
            cancels: Vec::new(),
            outstanding: 0,
            events: VecDeque::new(),
            busy_since: None,
            pinged: None,
            closed_told: false,
        }
    }

    /// Asks for a chunk. `id` must not be in use.
    pub fn want(
        &mut self,
        id: RequestId,
        image: ImageId,
        chunk: ChunkHash,
        priority: Priority,
    ) -> Result<(), Refused> {
        let full = self.queue.len() >= QUEUED_MAX;
        if full || self.session.closed().is_some() || self.requests.contains_key(&id) {
            return Err(Refused);
        }
        self.turn += 1;
        self.queue.insert((Reverse(priority), self.turn), id);
        self.requests.insert(id, Request { image, chunk, priority, state: RequestState::Queued(self.turn) });
        Ok(())
    }

    /// Withdraws a request: no event comes for it any more. Unknown ids are ignored.
    pub fn cancel(&mut self, id: RequestId) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        match request.state {
            RequestState::Queued(turn) => {
                self.queue.remove(&(Reverse(request.priority), turn));
                self.requests.remove(&id);
            }
            RequestState::Sent => {
                request.state = RequestState::Cancelled;
                self.cancels.push(id);
            }
            RequestState::Cancelled => {}
        }
    }

    /// Makes a request more urgent. Unknown ids and lower priorities are ignored.
    pub fn raise(&mut self, id: RequestId, priority: Priority) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if priority <= request.priority {
            return;
        }
        match request.state {
            RequestState::Queued(turn) => {
                self.queue.remove(&(Reverse(request.priority), turn));
                self.queue.insert((Reverse(priority), turn), id);
            }
            RequestState::Sent => self.session.send(&Frame::Raise { priority, ids: vec![id] }),
            RequestState::Cancelled => return,
        }
        request.priority = priority;
    }

    /// Where bytes from the stream go. Call [`ClientEnd::heard`] after adding some.
    pub fn inbox(&mut self) -> &mut BytesMut {
        self.session.inbox()
    }

    /// Bytes were added to the inbox at `now`.
    pub fn heard(&mut self, now: Duration) {
        self.session.heard(now);
        self.pinged = None;
    }

    /// Both in one, with a copy: for tests, simulation and fuzzing.
    pub fn feed(&mut self, bytes: &[u8], now: Duration) {
        self.inbox().extend_from_slice(bytes);
        self.heard(now);
    }

    /// The stream ended or broke.
    pub fn ended(&mut self) {
        self.session.ended();
    }

    /// How the link ended, if it did.
    pub fn closed(&self) -> Option<Closed> {
        self.session.closed()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<ClientEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            match self.session.next_frame() {
                Some(frame) => self.apply(frame),
                None => break,
            }
        }
        let closed = self.session.closed()?;
        (!std::mem::replace(&mut self.closed_told, true)).then_some(ClientEvent::Closed(closed))
    }

    fn apply(&mut self, frame: Frame) {
        match frame {
            Frame::Hello(_) => self.events.push_back(ClientEvent::Ready),
            Frame::Have { id, payload } => self.have(id, payload),
            Frame::Lack { id, reason } => match self.answered(id) {
                Some(Request { state: RequestState::Cancelled, .. }) => {}
                Some(_) if reason == LackReason::Cancelled => {
                    self.session.close(ByeReason::Protocol, "confirms a cancellation that was not asked for");
                }
                Some(_) => {
                    self.session.stats.add(|s| &s.lacks_received, 1);
                    self.events.push_back(ClientEvent::Lacking { id, reason });
                }
                None => {}
            },
            _ => self.session.close(ByeReason::Protocol, "a frame that parents do not send"),
        }
    }

    fn have(&mut self, id: RequestId, payload: Payload) {
        let Some(request) = self.answered(id) else { return };
        if request.state == RequestState::Cancelled {
            self.session.stats.add(|s| &s.chunks_in_vain, 1);
            return;
        }
        let Some(chunk) = verified(request.chunk, payload) else {
            self.session.stats.add(|s| &s.lies, 1);
            self.session.close(ByeReason::Lied, "sent a wrong chunk");
            self.events.push_back(ClientEvent::Liar { image: request.image, chunk: request.chunk });
            return;
        };
        self.events.push_back(ClientEvent::Arrived { id, chunk });
    }

    /// Takes the request that the parent answers out; closes the link if it was never sent.
    fn answered(&mut self, id: RequestId) -> Option<Request> {
        match self.requests.get(&id) {
            Some(Request { state: RequestState::Sent | RequestState::Cancelled, .. }) => {}
            _ => {
                self.session.close(ByeReason::Protocol, "answers what was not asked");
                return None;
            }
        }
        self.outstanding -= 1;
        if self.outstanding == 0 {
            self.busy_since = None;
        }
        self.cancels.retain(|cancel| *cancel != id);
        self.requests.remove(&id)
    }

    /// The next bytes for the stream, with everything in them that may be sent at `now`: what is queued at
    /// the moment travels together, and nothing is held back for more.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<Outgoing> {
        if self.session.closed().is_none() {
            for ids in std::mem::take(&mut self.cancels).chunks(BATCH_MAX) {
                self.session.stats.add(|s| &s.cancels_sent, ids.len());
                self.session.send(&Frame::Cancel { ids: ids.to_vec() });
            }
            while let Some(frame) = self.next_want(now) {
                self.session.send(&frame);
            }
        }
        self.session.outgoing(Bytes::new())
    }

    /// The most urgent requests for which there is a slot, as far as they fit one frame.
    fn next_want(&mut self, now: Duration) -> Option<Frame> {
        let mut batch: Option<(ImageId, Priority)> = None;
        let mut wants = Vec::new();
        while wants.len() < BATCH_MAX {
            let Some((&key @ (Reverse(priority), _), &id)) = self.queue.first_key_value() else { break };
            let request = self.requests.get_mut(&id).expect("what is queued is known");
            let reserved = if priority == Priority::Guest { 0 } else { OUTSTANDING_FOR_GUESTS };
            let fits = *batch.get_or_insert((request.image, priority)) == (request.image, priority);
            if !fits || self.outstanding >= OUTSTANDING_MAX - reserved {
                break;
            }
            request.state = RequestState::Sent;
            wants.push((id, request.chunk));
            self.outstanding += 1;
            self.queue.remove(&key);
        }
        if wants.is_empty() {
            return None;
        }
        self.busy_since.get_or_insert(now);
        self.session.stats.add(|s| &s.wants_sent, wants.len());
        let (image, priority) = batch?;
        Some(Frame::Want { image, priority, wants })
    }

    /// When [`ClientEnd::tick`] must be called, if nothing else happens before.
    pub fn deadline(&self) -> Duration {
        let (ping_after, silence_max) = self.patience();
        if self.pinged.is_some() { self.quiet_since() + silence_max } else { self.quiet_since() + ping_after }
    }

    /// Pings a silent parent, and gives it up when the ping does not help.
    pub fn tick(&mut self, now: Duration) {
        if self.session.closed().is_some() {
            return;
        }
        let (ping_after, silence_max) = self.patience();
        let quiet = now.saturating_sub(self.quiet_since());
        if quiet >= silence_max {
            self.session.close(ByeReason::Silent, "silent for too long");
        } else if quiet >= ping_after && self.pinged.is_none() {
            self.pinged = Some(now);
            self.session.send(&Frame::Ping { nonce: u64::from(now.subsec_nanos()) });
        }
    }

    fn patience(&self) -> (Duration, Duration) {
        match self.busy_since {
            Some(_) => (PING_AFTER_BUSY, SILENCE_MAX_BUSY),
            None => (PING_AFTER_IDLE, SILENCE_MAX_IDLE),
        }
    }

    /// Silence before a request is not held against the parent.
    fn quiet_since(&self) -> Duration {
        self.session.heard_at().max(self.busy_since.unwrap_or_default())
    }
}

fn verified(hash: ChunkHash, payload: Payload) -> Option<Chunk> {
    match payload {
        Payload::Raw(bytes) => Chunk::verify(hash, bytes).ok(),
        // A copy, because the chunk may be kept and the packed form is a small part of a read buffer.
        Payload::Zstd(packed) => {
            Chunk::verify_packed(hash, Bytes::copy_from_slice(&packed), pack::unpack).ok()
        }
    }
}
