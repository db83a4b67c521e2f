//! The server side of one link: bytes in, wanted chunks out; answers in, bytes out.
//!
//! Owns no socket and no clock; driven like [`ClientEnd`](crate::ClientEnd).
//!
//! Invariants:
//! - Every request is answered exactly once: `Have`, `Lack`, or, after a `Cancel`, `Lack(Cancelled)`.
//! - More urgent requests overtake less urgent ones twice: when the caller is given them, and when their
//!   answers are sent. Equally urgent ones keep their order.
//! - At most [`ACTIVE_MAX`] requests are in the caller's hands or wait to be written, so that a child that
//!   reads slowly holds no more memory than that; some of them only guests may use.
//! - A child that exceeds [`OUTSTANDING_MAX`] is cut off rather than told to wait: both ends count alike, so
//!   only a broken child gets there. Nothing is refused for load: requests wait in the queue, in their order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{ChunkHash, ImageId, NodeName, Priority};
use bytes::{Bytes, BytesMut};

use crate::limits::{ACTIVE_FOR_GUESTS, ACTIVE_MAX, OUTSTANDING_MAX, SILENCE_MAX_PARENT};
use crate::session::{Closed, Outgoing, Session};
use crate::stats::ScopedStats;
use crate::wire::{ByeReason, Frame, LackReason, Payload, RequestId, encode_have_head};

/// What happened on the link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerEvent {
    /// The child greeted: it is who it should be and speaks our version.
    Ready,
    /// Get this chunk and [`answer`](ServerEnd::answer).
    Wanted {
        /// The request.
        id: RequestId,
        /// The image.
        image: ImageId,
        /// The chunk.
        chunk: ChunkHash,
        /// How urgent it is.
        priority: Priority,
    },
    /// A request in the caller's hands became more urgent.
    Raised {
        /// The request.
        id: RequestId,
        /// The new priority.
        priority: Priority,
    },
    /// A request in the caller's hands was withdrawn; an answer would be ignored.
    Cancelled {
        /// The request.
        id: RequestId,
    },
    /// The link is over. The last event.
    Closed(Closed),
}

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The chunk's bytes.
    Have(Payload),
    /// No chunk.
    Lack(LackReason),
}

#[derive(Debug)]
struct Request {
    image: ImageId,
    chunk: ChunkHash,
    priority: Priority,
    state: RequestState,
}

#[derive(Debug)]
enum RequestState {
    /// Waits for a slot; the number is its place in `queue`.
    Queued(u64),
    /// In the caller's hands.
    Active,
    /// Waits to be written; the number is its place in `ready`.
    Ready(u64, Payload),
}

/// The most urgent first, and among them the oldest.
type Line = BTreeMap<(Reverse<Priority>, u64), RequestId>;

/// The server side of one link. See the module's documentation.
#[derive(Debug)]
pub struct ServerEnd {
    session: Session,
    requests: HashMap<RequestId, Request>,
    queue: Line,
    ready: Line,
    /// Counts arrivals in the lines, to keep their order.
    turn: u64,
    /// Requests that are active or ready.
    active: usize,
    events: VecDeque<ServerEvent>,
    closed_told: bool,
}

impl ServerEnd {
    /// A link that `child`, so its certificate says, opened to node `own`.
    pub fn new(own: &NodeName, child: NodeName, stats: ScopedStats, now: Duration) -> ServerEnd {
        ServerEnd {
            session: Session::new(own, child, stats, now),
            requests: HashMap::new(),
            queue: Line::new(),
            ready: Line::new(),
            turn: 0,
            active: 0,
            events: VecDeque::new(),
            closed_told: false,
        }
    }

    /// Where bytes from the stream go. Call [`ServerEnd::heard`] after adding some.
    pub fn inbox(&mut self) -> &mut BytesMut {
        self.session.inbox()
    }

    /// Bytes were added to the inbox at `now`.
    pub fn heard(&mut self, now: Duration) {
        self.session.heard(now);
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

    /// Whether the child can unpack [`Payload::Zstd`].
    pub fn child_unpacks(&self) -> bool {
        self.session.peer_unpacks()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<ServerEvent> {
        // All that came is looked at before a request is handed out, so that the most urgent is the first.
        while let Some(frame) = self.session.next_frame() {
            self.apply(frame);
        }
        if let Some(event) = self.events.pop_front() {
            return Some(event);
        }
        if let Some(closed) = self.session.closed() {
            return (!std::mem::replace(&mut self.closed_told, true)).then_some(ServerEvent::Closed(closed));
        }
        self.admit()
    }

    /// Hands out the most urgent request if there is a slot for it.
    fn admit(&mut self) -> Option<ServerEvent> {
        let (&key @ (Reverse(priority), _), &id) = self.queue.first_key_value()?;
        let reserved = if priority == Priority::Guest { 0 } else { ACTIVE_FOR_GUESTS };
        if self.active >= ACTIVE_MAX - reserved {
            return None;
        }
        self.queue.remove(&key);
        self.active += 1;
        let request = self.requests.get_mut(&id).expect("what is queued is known");
        request.state = RequestState::Active;
        Some(ServerEvent::Wanted { id, image: request.image, chunk: request.chunk, priority })
    }

    fn apply(&mut self, frame: Frame) {
        match frame {
            Frame::Hello(_) => self.events.push_back(ServerEvent::Ready),
            Frame::Want { image, priority, wants } => {
                self.session.stats.add(|s| &s.wants_received, wants.len());
                for (id, chunk) in wants {
                    self.wanted(id, image, chunk, priority);
                }
            }
            Frame::Raise { priority, ids } => ids.into_iter().for_each(|id| self.raised(id, priority)),
            Frame::Cancel { ids } => ids.into_iter().for_each(|id| self.cancelled(id)),
            _ => self.session.close(ByeReason::Protocol, "a frame that children do not send"),
        }
    }

    fn wanted(&mut self, id: RequestId, image: ImageId, chunk: ChunkHash, priority: Priority) {
        if self.requests.len() >= OUTSTANDING_MAX {
            return self.session.close(ByeReason::Excess, "more requests than allowed");
        }
        if self.requests.contains_key(&id) {
            return self.session.close(ByeReason::Protocol, "two requests of one id");
        }
        self.turn += 1;
        self.queue.insert((Reverse(priority), self.turn), id);
        self.requests.insert(id, Request { image, chunk, priority, state: RequestState::Queued(self.turn) });
    }

    fn raised(&mut self, id: RequestId, priority: Priority) {
        // An answer that crossed the frame on the way leaves nothing to raise.
        let Some(request) = self.requests.get_mut(&id) else { return };
        if priority <= request.priority {
            return;
        }
        let old = Reverse(std::mem::replace(&mut request.priority, priority));
        let (line, turn) = match request.state {
            RequestState::Queued(turn) => (&mut self.queue, turn),
            RequestState::Ready(turn, _) => (&mut self.ready, turn),
            RequestState::Active => return self.events.push_back(ServerEvent::Raised { id, priority }),
        };
        line.remove(&(old, turn));
        line.insert((Reverse(priority), turn), id);
    }

    fn cancelled(&mut self, id: RequestId) {
        let Some(request) = self.requests.remove(&id) else { return };
        match request.state {
            RequestState::Queued(turn) => {
                self.queue.remove(&(Reverse(request.priority), turn));
            }
            RequestState::Active => {
                self.active -= 1;
                self.events.push_back(ServerEvent::Cancelled { id });
            }
            RequestState::Ready(turn, _) => {
                self.active -= 1;
                self.ready.remove(&(Reverse(request.priority), turn));
            }
        }
        self.session.stats.add(|s| &s.cancels_received, 1);
        self.session.send(&Frame::Lack { id, reason: LackReason::Cancelled });
    }

    /// Answers a request. Cancelled ones are ignored. A raw payload must be a whole chunk.
    pub fn answer(&mut self, id: RequestId, reply: Reply) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if !matches!(request.state, RequestState::Active) {
            return;
        }
        match reply {
            Reply::Have(payload) => {
                self.turn += 1;
                request.state = RequestState::Ready(self.turn, payload);
                self.ready.insert((Reverse(request.priority), self.turn), id);
            }
            Reply::Lack(reason) => {
                self.requests.remove(&id);
                self.active -= 1;
                self.session.stats.add(|s| &s.lacks_sent, 1);
                self.session.send(&Frame::Lack { id, reason });
            }
        }
    }

    /// The next bytes for the stream: at most one chunk, so that a more urgent one waits for no more than
    /// that. Sending an answer frees its slot: poll for events again.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        let mut payload_bytes = Bytes::new();
        if self.session.closed().is_none()
            && let Some((_, id)) = self.ready.pop_first()
        {
            self.active -= 1;
            let request = self.requests.remove(&id).expect("what is ready is known");
            let RequestState::Ready(_, payload) = request.state else {
                unreachable!("what is in line is ready")
            };
            encode_have_head(self.session.control(), id, &payload);
            self.session.stats.add(|s| &s.chunks_sent, 1);
            self.session.stats.add(|s| &s.raw_bytes_sent, CHUNK_BYTES);
            payload_bytes = payload.bytes().clone();
        }
        self.session.outgoing(payload_bytes)
    }

    /// When [`ServerEnd::tick`] must be called, if nothing else happens before.
    pub fn deadline(&self) -> Duration {
        self.session.heard_at() + SILENCE_MAX_PARENT
    }

    /// Gives up a child that did not even ping for too long.
    pub fn tick(&mut self, now: Duration) {
        if now >= self.deadline() {
            self.session.close(ByeReason::Silent, "silent for too long");
        }
    }
}
