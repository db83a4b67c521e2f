//! The world: all nodes, links, the network and Volt, and what each event does to them.
//!
//! One owner, one thread. An event changes its subject directly; ends of links that have something to say or
//! to hear because of it stand in a line and are seen to before the next event, so that nothing recurses.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use block::NodeName;
use link::policy::PathId;
use link::wire::RequestId;
use link::{ClientEnd, ServerEnd};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::check::Checks;
use crate::content::{ChunkIx, Content};
use crate::coordinator::Coordinator;
use crate::event::{End, Event, Incarnation, LinkId, NodeEvent, NodeIx, Side};
use crate::event_queue::EventQueue;
use crate::fault::Fault;
use crate::net::Net;
use crate::node::Node;
use crate::scenario::Scenario;

/// One link with both of its ends; an end that is gone is none.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) child_node: NodeIx,
    pub(crate) parent_node: NodeIx,
    /// The child's name for its parent.
    pub(crate) path: PathId,
    pub(crate) client: Option<ClientEnd>,
    pub(crate) server: Option<ServerEnd>,
    /// When the ends' timers go off next.
    timers: [Option<Duration>; 2],
    /// The parent sent a wrong chunk.
    pub(crate) lied: bool,
    /// What the parent's node was asked for and has not answered.
    pub(crate) serving: BTreeMap<RequestId, ChunkIx>,
}

/// Everything. See the module's documentation.
pub(crate) struct World {
    pub(crate) queue: EventQueue<Event>,
    pub(crate) net: Net,
    pub(crate) content: Rc<Content>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) names: BTreeMap<NodeName, NodeIx>,
    pub(crate) links: Vec<Link>,
    pub(crate) volt: Coordinator,
    pub(crate) scenario: Scenario,
    pub(crate) faults: Vec<(Duration, Fault)>,
    /// When the last of them is over.
    pub(crate) faults_end: Duration,
    pub(crate) checks: Checks,
    pub(crate) random: StdRng,
    /// Ends that have something to say or to hear.
    pub(crate) dirty: VecDeque<End>,
    pub(crate) events: u64,
}

impl World {
    /// A world in which nothing has happened.
    pub(crate) fn new(scenario: Scenario, content: Rc<Content>) -> World {
        let mut world = World {
            queue: EventQueue::new(),
            net: Net::new(scenario.latency, scenario.rack_links()),
            nodes: Vec::new(),
            names: BTreeMap::new(),
            links: Vec::new(),
            volt: Coordinator::new(&scenario),
            faults: Vec::new(),
            faults_end: Duration::ZERO,
            checks: Checks::new(&scenario),
            random: StdRng::seed_from_u64(scenario.seed),
            dirty: VecDeque::new(),
            events: 0,
            content,
            scenario,
        };
        world.populate();
        world
    }

    pub(crate) fn incarnation(&self, node: NodeIx) -> Incarnation {
        Incarnation { node, count: self.nodes[node.at()].incarnation }
    }

    /// Lets the next event happen. Says whether there was one.
    pub(crate) fn step(&mut self) -> bool {
        let Some(event) = self.queue.next() else { return false };
        self.events += 1;
        self.apply(event);
        loop {
            for flow in self.net.take_roomy() {
                self.dirty.push_back(flow.writer());
            }
            let Some(end) = self.dirty.pop_front() else { break };
            self.attend(end);
        }
        true
    }

    fn apply(&mut self, event: Event) {
        let now = self.queue.now();
        // What is meant for a frozen node happens when it thaws.
        let subject = match &event {
            Event::Node(incarnation, _) => Some(incarnation.node),
            Event::Arrives(flow) => Some(self.owner(flow.hearer())),
            Event::Timer(end) => Some(self.owner(*end)),
            _ => None,
        };
        if let Some(until) = subject.map(|node| self.nodes[node.at()].frozen_until)
            && until > now
        {
            return self.queue.at(until, event);
        }
        match event {
            Event::SentOut(node) => self.net.sent_out(&mut self.queue, node),
            Event::Arrives(flow) => {
                if let Some(bytes) = self.net.arrive(&mut self.queue, flow) {
                    self.hear(flow.hearer(), bytes);
                }
            }
            Event::Ends(end) => self.stream_ended(end),
            Event::Timer(end) => self.timer(end),
            Event::Fault(at) => self.fault(at),
            Event::VoltHears(incarnation, run, message) => self.volt_hears(incarnation, run, message),
            Event::VoltTicks(run) => self.volt_ticks(run),
            Event::Node(incarnation, event) => {
                if self.incarnation(incarnation.node) == incarnation {
                    self.apply_to_node(incarnation.node, event);
                }
            }
        }
    }

    fn apply_to_node(&mut self, node: NodeIx, event: NodeEvent) {
        match event {
            NodeEvent::Dials(path) => self.dials(node, path),
            NodeEvent::Dialed(path) => self.dialed(node, path),
            NodeEvent::DialsLate(path) => self.dials_late(node, path),
            NodeEvent::DialFails(path) => self.uplink_failed(node, path),
            NodeEvent::Decides(chunk, seq) => self.decides(node, chunk, seq),
            NodeEvent::GuestReads(guest) => self.guest_reads(node, guest),
            NodeEvent::Streams => self.streams(node),
            NodeEvent::Calls => self.calls_volt(node),
            NodeEvent::Beats(run) => self.beats(node, run),
            NodeEvent::Placed(run, placement) => self.placed(node, run, *placement),
            NodeEvent::Released(run) => self.released(node, run),
            NodeEvent::Departs => self.departs(node),
            NodeEvent::VoltLost(run) => self.volt_lost(node, run),
        }
    }

    fn owner(&self, end: End) -> NodeIx {
        let link = &self.links[end.link.at()];
        match end.side {
            Side::Client => link.child_node,
            Side::Server => link.parent_node,
        }
    }

    pub(crate) fn open_link(
        &mut self,
        child_node: NodeIx,
        path: PathId,
        parent_node: NodeIx,
        client: ClientEnd,
        server: ServerEnd,
    ) -> LinkId {
        let link = LinkId(u32::try_from(self.links.len()).expect("a run opens fewer links than that"));
        self.links.push(Link {
            child_node,
            parent_node,
            path,
            client: Some(client),
            server: Some(server),
            timers: [None; 2],
            lied: false,
            serving: BTreeMap::new(),
        });
        self.net.open(child_node, parent_node);
        self.net.open(parent_node, child_node);
        self.nodes[parent_node.at()].downlinks.push(link);
        for side in [Side::Client, Side::Server] {
            self.dirty.push_back(End { link, side });
        }
        link
    }
}

/// What both ends of links have in common.
impl World {
    /// Bytes reach an end.
    fn hear(&mut self, end: End, bytes: link::Outgoing) {
        use bytes::{Buf, BufMut};
        let now = self.queue.now();
        let link = &mut self.links[end.link.at()];
        let inbox = match end.side {
            Side::Client => link.client.as_mut().map(ClientEnd::inbox),
            Side::Server => link.server.as_mut().map(ServerEnd::inbox),
        };
        let Some(inbox) = inbox else { return };
        if inbox.is_empty() {
            // No room of an earlier chunk is kept: ten thousand nodes have many links.
            *inbox = bytes::BytesMut::with_capacity(bytes.remaining());
        }
        inbox.put(bytes);
        match end.side {
            Side::Client => {
                if let Some(client) = link.client.as_mut() {
                    client.heard(now);
                }
                let (node, path) = (link.child_node, link.path);
                self.nodes[node.at()].paths.heard(path, now);
            }
            Side::Server => {
                if let Some(server) = link.server.as_mut() {
                    server.heard(now);
                }
            }
        }
        self.dirty.push_back(end);
    }

    /// Takes the events of an end and sends what it has to say.
    fn attend(&mut self, end: End) {
        let now = self.queue.now();
        match end.side {
            Side::Client => {
                while let Some(event) =
                    self.links[end.link.at()].client.as_mut().and_then(ClientEnd::poll_event)
                {
                    self.client_event(end.link, event);
                }
            }
            Side::Server => self.attend_server(end),
        }
        let flow = end.flow();
        while self.net.has_room(flow) {
            let link = &mut self.links[end.link.at()];
            let out = match end.side {
                Side::Client => link.client.as_mut().and_then(|client| client.poll_transmit(now)),
                Side::Server => link.server.as_mut().and_then(ServerEnd::poll_transmit),
            };
            let Some(out) = out else { break };
            self.net.write(&mut self.queue, flow, out);
            if end.side == Side::Server {
                // Sending an answer frees its place for another request.
                self.attend_server(end);
            }
        }
        self.checks.queued(self.net.waiting_bytes(flow));
        let link = &self.links[end.link.at()];
        let is_over = match end.side {
            Side::Client => link.client.as_ref().is_some_and(|client| client.closed().is_some()),
            Side::Server => link.server.as_ref().is_some_and(|server| server.closed().is_some()),
        };
        if is_over { self.hang_up(end) } else { self.set_timer(end) }
    }

    fn attend_server(&mut self, end: End) {
        while let Some(event) = self.links[end.link.at()].server.as_mut().and_then(ServerEnd::poll_event) {
            self.server_event(end.link, &event);
        }
    }

    fn set_timer(&mut self, end: End) {
        let link = &mut self.links[end.link.at()];
        let deadline = match end.side {
            Side::Client => link.client.as_ref().map(ClientEnd::deadline),
            Side::Server => link.server.as_ref().map(ServerEnd::deadline),
        };
        let Some(deadline) = deadline else { return };
        let timer = &mut link.timers[end.side as usize];
        if timer.is_none_or(|set| deadline < set) {
            *timer = Some(deadline);
            self.queue.at(deadline, Event::Timer(end));
        }
    }

    fn timer(&mut self, end: End) {
        let now = self.queue.now();
        let link = &mut self.links[end.link.at()];
        if link.timers[end.side as usize].is_none_or(|set| set > now) {
            return;
        }
        link.timers[end.side as usize] = None;
        match end.side {
            Side::Client => {
                link.client.as_mut().filter(|client| client.deadline() <= now).map(|client| client.tick(now))
            }
            Side::Server => {
                link.server.as_mut().filter(|server| server.deadline() <= now).map(|server| server.tick(now))
            }
        };
        self.attend(end);
    }

    /// The other end closed the stream.
    fn stream_ended(&mut self, end: End) {
        let link = &mut self.links[end.link.at()];
        match end.side {
            Side::Client => link.client.as_mut().map(ClientEnd::ended),
            Side::Server => link.server.as_mut().map(ServerEnd::ended),
        };
        self.attend(end);
    }

    /// An end goes; the other one notices after what was said, unless this host is gone.
    pub(crate) fn hang_up(&mut self, end: End) {
        self.drop_end(end);
        let at = self.net.end_of(end.flow(), self.queue.now());
        self.queue.at(at, Event::Ends(end.other()));
    }

    /// An end is gone without a word.
    pub(crate) fn drop_end(&mut self, end: End) {
        let link = &mut self.links[end.link.at()];
        match end.side {
            Side::Client => link.client = None,
            Side::Server => {
                link.server = None;
                let (node, child) = (link.parent_node, end.link);
                let serving = std::mem::take(&mut link.serving);
                self.nodes[node.at()].downlinks.retain(|other| *other != child);
                for (id, chunk) in serving {
                    self.leave(node, chunk, crate::node::Waiter::Child(child, id));
                }
            }
        }
        // What was sent to it is lost.
        self.net.close(end.other().flow());
    }
}
