//! The network in virtual time: hosts with full-duplex links, racks with uplinks, and the flows between hosts.
//!
//! The model. A message passes a row of pipes: the sender's link out, between racks the one's uplink and the
//! other's downlink, the receiver's link in. A pipe has a rate and passes messages one after the other; the
//! pipes of a row work at the same time, as switches do, so that a message takes its time on the slowest pipe
//! plus one latency. What wants to leave a host takes turns, one message (at most a chunk) a flow, as TCP
//! flows under fair queueing do; small messages go ahead of other flows, as sparse flows do there. A flow has
//! at most [`WINDOW_BYTES`] on the way, and one message while the way is crowded ([`BACKLOG_MAX`]), so that a
//! receiver's slow link holds its senders back; and it takes at most [`UNSENT_BYTES`] that have not left. Processors are pipes as well, at both ends: one flow is one
//! task, and a host has [`CORES`].
//!
//! Not here: packets, loss and congestion control. A link that is cut delivers what was on the way when it is
//! whole again, as TCP's repetitions do.

use std::collections::VecDeque;
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use bytes::Buf;
use link::Outgoing;

use crate::event::{Event, FlowId, NodeIx};
use crate::event_queue::EventQueue;

/// Bytes of one flow on the way: the bandwidth-delay product of 25 Gbit/s and 160 µs, and eight chunks.
pub(crate) const WINDOW_BYTES: usize = 8 * CHUNK_BYTES;

/// How far a pipe may be behind until each flow through it has one message on the way instead: what the buffers
/// of switches hold at most, and what congestion control keeps of it.
const BACKLOG_MAX: Duration = Duration::from_millis(20);

/// Bytes that a flow takes before earlier ones have left: the socket option of the real link.
pub(crate) const UNSENT_BYTES: usize = 128 * 1024;

/// Messages up to this many bytes overtake other flows: requests and signs of life, no chunks.
const SPARSE_BYTES: usize = 8 * 1024;

/// Bytes that Ethernet, IP, TCP and TLS add to 1000 bytes of a message, at frames of 1500 bytes.
const OVERHEAD_PER_MILLE: usize = 55;

/// Processor time of the sender for a chunk: a third of what a chunk over TLS costs both ends together, as
/// `cargo xtask bench link` measures it (1000 ms/GiB, that is 61 µs a chunk).
pub(crate) const SEND_CPU: Duration = Duration::from_micros(22);

/// The same for the receiver, who also hashes.
pub(crate) const RECEIVE_CPU: Duration = Duration::from_micros(39);

/// Cores of a host that work on links.
pub(crate) const CORES: u32 = 8;

/// Something that passes bytes one after the other.
#[derive(Debug, Clone)]
struct Pipe {
    nanos_per_byte: f64,
    free: Duration,
    bytes: u64,
}

impl Pipe {
    fn new(bytes_per_second: f64) -> Pipe {
        Pipe { nanos_per_byte: 1e9 / bytes_per_second, free: Duration::ZERO, bytes: 0 }
    }

    /// Passes a message whose first byte is there at `from`; says when its first byte begins to pass and when
    /// the last has passed.
    fn pass(&mut self, from: Duration, bytes: usize) -> (Duration, Duration) {
        let begin = self.free.max(from);
        self.free = begin + Duration::from_nanos((bytes as f64 * self.nanos_per_byte) as u64);
        self.bytes += bytes as u64;
        (begin, self.free)
    }
}

#[derive(Debug)]
struct Host {
    rack: Option<usize>,
    bytes_per_second: f64,
    out: Pipe,
    into: Pipe,
    cpu_free: Duration,
    /// Flows whose turn to send comes, in this order.
    ring: VecDeque<FlowId>,
    sending: bool,
    cut_until: Duration,
}

#[derive(Debug)]
struct Rack {
    up: Pipe,
    down: Pipe,
    cut_until: Duration,
}

#[derive(Debug)]
struct Message {
    bytes: Outgoing,
    wire_bytes: usize,
    /// When the sender's processor is done with it.
    made_at: Duration,
}

#[derive(Debug)]
struct Flow {
    from: NodeIx,
    to: NodeIx,
    open: bool,
    waiting: VecDeque<Message>,
    waiting_bytes: usize,
    in_ring: bool,
    flying: VecDeque<Message>,
    flying_bytes: usize,
    last_arrival: Duration,
    sender_free: Duration,
    receiver_free: Duration,
}

/// How a rack hangs on the rest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RackLink {
    /// Bytes per second in each direction.
    pub(crate) bytes_per_second: f64,
}

/// Bytes that passed a rack's link so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RackBytes {
    pub(crate) up: u64,
    pub(crate) down: u64,
}

/// The network. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Net {
    latency: Duration,
    hosts: Vec<Host>,
    racks: Vec<Rack>,
    flows: Vec<Flow>,
    /// Flows that have room since they were last asked for.
    roomy: Vec<FlowId>,
}

impl Net {
    /// A network in which a byte takes `latency` from host to host.
    pub(crate) fn new(latency: Duration, racks: impl IntoIterator<Item = RackLink>) -> Net {
        let rack = |link: RackLink| Rack {
            up: Pipe::new(link.bytes_per_second),
            down: Pipe::new(link.bytes_per_second),
            cut_until: Duration::ZERO,
        };
        Net {
            latency,
            hosts: Vec::new(),
            racks: racks.into_iter().map(rack).collect(),
            flows: Vec::new(),
            roomy: Vec::new(),
        }
    }

    pub(crate) fn add_host(&mut self, rack: Option<usize>, bytes_per_second: f64) -> NodeIx {
        self.hosts.push(Host {
            rack,
            bytes_per_second,
            out: Pipe::new(bytes_per_second),
            into: Pipe::new(bytes_per_second),
            cpu_free: Duration::ZERO,
            ring: VecDeque::new(),
            sending: false,
            cut_until: Duration::ZERO,
        });
        NodeIx(u32::try_from(self.hosts.len() - 1).expect("fewer hosts than planners take"))
    }

    pub(crate) fn latency(&self) -> Duration {
        self.latency
    }

    /// Opens a flow. Ids count from 0 without a gap.
    pub(crate) fn open(&mut self, from: NodeIx, to: NodeIx) -> FlowId {
        self.flows.push(Flow {
            from,
            to,
            open: true,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            in_ring: false,
            flying: VecDeque::new(),
            flying_bytes: 0,
            last_arrival: Duration::ZERO,
            sender_free: Duration::ZERO,
            receiver_free: Duration::ZERO,
        });
        FlowId(u32::try_from(self.flows.len() - 1).expect("a run opens fewer flows than that"))
    }

    /// Forgets a flow and all that is in it.
    pub(crate) fn close(&mut self, flow: FlowId) {
        let flow = &mut self.flows[flow.at()];
        flow.open = false;
        flow.waiting = VecDeque::new();
        flow.flying = VecDeque::new();
    }

    /// Whether the flow takes another message.
    pub(crate) fn has_room(&self, flow: FlowId) -> bool {
        let flow = &self.flows[flow.at()];
        flow.open && flow.waiting_bytes < UNSENT_BYTES
    }

    /// Bytes that wait to leave, for the checker.
    pub(crate) fn waiting_bytes(&self, flow: FlowId) -> usize {
        self.flows[flow.at()].waiting_bytes
    }

    /// Puts a message on a flow.
    pub(crate) fn write(&mut self, queue: &mut EventQueue<Event>, id: FlowId, bytes: Outgoing) {
        let payload_bytes = bytes.remaining();
        let wire_bytes = payload_bytes + payload_bytes * OVERHEAD_PER_MILLE / 1000;
        let flow = &mut self.flows[id.at()];
        if !flow.open {
            return;
        }
        let made_at = {
            let host = &mut self.hosts[flow.from.at()];
            let now = queue.now();
            host.work(&mut flow.sender_free, now, now, share(SEND_CPU, payload_bytes))
        };
        let message = Message { bytes, wire_bytes, made_at };
        if flow.waiting.is_empty() && payload_bytes <= SPARSE_BYTES {
            return self.launch(queue, id, message);
        }
        flow.waiting_bytes += wire_bytes;
        flow.waiting.push_back(message);
        let from = flow.from;
        self.line_up(id, queue.now());
        self.send(queue, from);
    }

    /// Gives a flow its place in the ring, if it has something to send and may.
    fn line_up(&mut self, id: FlowId, now: Duration) {
        let flow = &self.flows[id.at()];
        let window = if self.backlog(flow, now) > BACKLOG_MAX { 1 } else { WINDOW_BYTES };
        let flow = &mut self.flows[id.at()];
        if !flow.in_ring && !flow.waiting.is_empty() && flow.flying_bytes < window {
            flow.in_ring = true;
            self.hosts[flow.from.at()].ring.push_back(id);
        }
    }

    /// How far the pipes after the sender's own are behind. What is sent in one moment passes them in order.
    fn backlog(&self, flow: &Flow, now: Duration) -> Duration {
        let (from, to) = (&self.hosts[flow.from.at()], &self.hosts[flow.to.at()]);
        let rack =
            |rack: Option<usize>, pipe: fn(&Rack) -> &Pipe| rack.map(|rack| pipe(&self.racks[rack]).free);
        let racks = if from.rack == to.rack {
            None
        } else {
            rack(from.rack, |rack| &rack.up).max(rack(to.rack, |rack| &rack.down))
        };
        to.into.free.max(racks.unwrap_or_default()).saturating_sub(now)
    }

    /// Lets the host send its next message, unless it is sending.
    fn send(&mut self, queue: &mut EventQueue<Event>, ix: NodeIx) {
        let host = &mut self.hosts[ix.at()];
        if host.sending {
            return;
        }
        while let Some(id) = host.ring.pop_front() {
            let flow = &mut self.flows[id.at()];
            flow.in_ring = false;
            let Some(message) = flow.waiting.pop_front() else { continue };
            flow.waiting_bytes -= message.wire_bytes;
            host.sending = true;
            self.launch(queue, id, message);
            queue.at(self.hosts[ix.at()].out.free, Event::SentOut(ix));
            self.line_up(id, queue.now());
            self.roomy.push(id);
            return;
        }
    }

    /// The host's link out is free again.
    pub(crate) fn sent_out(&mut self, queue: &mut EventQueue<Event>, ix: NodeIx) {
        self.hosts[ix.at()].sending = false;
        self.send(queue, ix);
    }

    /// Sends a message along its pipes.
    fn launch(&mut self, queue: &mut EventQueue<Event>, id: FlowId, message: Message) {
        let flow = &mut self.flows[id.at()];
        let (from, to) = (flow.from.at(), flow.to.at());
        let bytes = message.wire_bytes;
        let (begin, end) = self.hosts[from].out.pass(queue.now(), bytes);
        let first = begin + self.latency;
        let mut last = end.max(message.made_at) + self.latency;
        let (a, b) = (self.hosts[from].rack, self.hosts[to].rack);
        if a != b {
            if let Some(a) = a {
                last = last.max(self.racks[a].up.pass(first, bytes).1);
            }
            if let Some(b) = b {
                last = last.max(self.racks[b].down.pass(first, bytes).1);
            }
        }
        let host = &mut self.hosts[to];
        last = last.max(host.into.pass(first, bytes).1).max(flow.last_arrival);
        let cost = share(RECEIVE_CPU, bytes);
        flow.last_arrival = host.work(&mut flow.receiver_free, queue.now(), last, cost);
        flow.flying_bytes += bytes;
        flow.flying.push_back(message);
        queue.at(flow.last_arrival, Event::Arrives(id));
    }

    /// Takes what has arrived. [`None`] if the flow is closed, or cut: then it arrives later.
    pub(crate) fn arrive(&mut self, queue: &mut EventQueue<Event>, id: FlowId) -> Option<Outgoing> {
        let flow = &self.flows[id.at()];
        let blocked_until = self.blocked_until(flow.from, flow.to);
        if blocked_until > queue.now() {
            queue.at(blocked_until, Event::Arrives(id));
            return None;
        }
        let flow = &mut self.flows[id.at()];
        let message = flow.flying.pop_front()?;
        flow.flying_bytes -= message.wire_bytes;
        let from = flow.from;
        self.line_up(id, queue.now());
        self.send(queue, from);
        Some(message.bytes)
    }

    /// When the other end learns that this flow's writer hung up: after what is on the way.
    pub(crate) fn end_of(&self, id: FlowId, now: Duration) -> Duration {
        let flow = &self.flows[id.at()];
        flow.last_arrival.max(now + self.latency)
    }

    /// Flows that have got room since the last call.
    pub(crate) fn take_roomy(&mut self) -> Vec<FlowId> {
        std::mem::take(&mut self.roomy)
    }

    /// Until when nothing passes between two hosts.
    pub(crate) fn blocked_until(&self, a: NodeIx, b: NodeIx) -> Duration {
        let (host_a, host_b) = (&self.hosts[a.at()], &self.hosts[b.at()]);
        let hosts = host_a.cut_until.max(host_b.cut_until);
        if host_a.rack == host_b.rack {
            return hosts;
        }
        let rack = |host: &Host| host.rack.map_or(Duration::ZERO, |rack| self.racks[rack].cut_until);
        hosts.max(rack(host_a)).max(rack(host_b))
    }

    /// Until when nothing passes between a host and the coordinator, which stands outside all racks.
    pub(crate) fn outside_blocked_until(&self, ix: NodeIx) -> Duration {
        let host = &self.hosts[ix.at()];
        host.rack.map_or(Duration::ZERO, |rack| self.racks[rack].cut_until).max(host.cut_until)
    }

    /// Cuts a host off until then.
    pub(crate) fn cut(&mut self, ix: NodeIx, until: Duration) {
        let host = &mut self.hosts[ix.at()];
        host.cut_until = host.cut_until.max(until);
    }

    /// Cuts a rack off until then.
    pub(crate) fn cut_rack(&mut self, rack: usize, until: Duration) {
        let rack = &mut self.racks[rack];
        rack.cut_until = rack.cut_until.max(until);
    }

    /// Sets a host's link to a part of its rate, in both directions.
    pub(crate) fn throttle(&mut self, ix: NodeIx, part: f64) {
        let host = &mut self.hosts[ix.at()];
        let nanos_per_byte = 1e9 / (host.bytes_per_second * part);
        host.out.nanos_per_byte = nanos_per_byte;
        host.into.nanos_per_byte = nanos_per_byte;
    }

    /// Bytes that left a host.
    pub(crate) fn bytes_out(&self, ix: NodeIx) -> u64 {
        self.hosts[ix.at()].out.bytes
    }

    /// What passed the racks' links.
    pub(crate) fn rack_bytes(&self) -> impl Iterator<Item = RackBytes> {
        self.racks.iter().map(|rack| RackBytes { up: rack.up.bytes, down: rack.down.bytes })
    }
}

/// The part of a chunk's cost that `bytes` cost.
fn share(cost: Duration, bytes: usize) -> Duration {
    let nanos = cost.as_nanos() as usize * bytes / CHUNK_BYTES;
    Duration::from_nanos(nanos as u64)
}

impl Host {
    /// Work that is known at `now` and begins at `from` or later, on one task, of which the host runs as many at
    /// once as it has cores; says when it is done.
    fn work(&mut self, task_free: &mut Duration, now: Duration, from: Duration, cost: Duration) -> Duration {
        // What the cores are behind with counts from now: work of the future must not keep them from today's.
        self.cpu_free = self.cpu_free.max(now) + cost / CORES;
        let behind = self.cpu_free - now;
        *task_free = from.max(*task_free) + cost;
        (*task_free).max(from + behind)
    }
}
