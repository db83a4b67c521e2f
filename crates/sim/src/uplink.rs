//! A node's connections to its parents: dialed when needed, kept while a plan names them, dialed again.
//!
//! What `link::Uplinks` does in the daemon, over the same [`ClientEnd`] and [`LinkState`]. Connections take two
//! round trips (TCP, TLS 1.3); a host that is on refuses calls to a process that is not; one that is off
//! says nothing.

use block::Priority;
use link::limits::{DIAL_MAX, DIAL_PATIENCE};
use link::policy::{LinkState, PathId, Standing};
use link::wire::RequestId;
use link::{ClientEnd, ClientEvent, Refused, ScopedStats, ServerEnd};
use planner::Placement;

use crate::content::ChunkIx;
use crate::coordinator::ToVolt;
use crate::event::{End, Event, LinkId, NodeEvent, NodeIx, Side};
use crate::node::{Node, Power, Uplink, Wire};
use crate::world::{Link, World};

/// Round trips of one way until a dialed parent can be asked: TCP's and TLS's.
const DIAL_LEGS: u32 = 4;

impl World {
    /// A plan takes effect: fetches that wait for a parent that left their stripe go to the new ones.
    pub(crate) fn place(&mut self, ix: NodeIx, placement: Placement) {
        let routes: Vec<Vec<PathId>> = placement
            .stripes
            .iter()
            .map(|peers| {
                let mut ranked: Vec<PathId> = Vec::new();
                for peer in peers {
                    let Some(&parent) = self.names.get(&peer.node) else { continue };
                    let path = self.uplink(ix, parent);
                    if !ranked.contains(&path) {
                        ranked.push(path);
                    }
                }
                ranked
            })
            .collect();
        let node = &mut self.nodes[ix.at()];
        node.routes = routes;
        node.placement = Some(placement);
        let named: Vec<PathId> = node.routes.concat();
        let best: Vec<PathId> = node.routes.iter().filter_map(|ranked| ranked.first().copied()).collect();
        best.into_iter().for_each(|path| self.warm(ix, path));
        let node = &mut self.nodes[ix.at()];
        let gone: Vec<PathId> = node.uplinks.keys().filter(|path| !named.contains(path)).copied().collect();
        self.replan(ix);
        for path in gone {
            let node = &mut self.nodes[ix.at()];
            node.paths.remove(path);
            if let Some(Uplink { wire: Wire::Open(link), .. }) = node.uplinks.remove(&path) {
                self.hang_up(End { link, side: Side::Client });
            }
        }
    }

    fn replan(&mut self, ix: NodeIx) {
        let chunks: Vec<ChunkIx> = self.nodes[ix.at()].flights.keys().copied().collect();
        for chunk in chunks {
            let node = &mut self.nodes[ix.at()];
            let Some(flight) = node.flights.get_mut(&chunk) else { continue };
            let ranked: &[PathId] = match node.routes.len() {
                0 => &[],
                n => &node.routes[crate::fetch::stripe_of(self.content.hash(chunk).prefix(), n)],
            };
            let left = flight.policy.replanned(&mut node.paths, ranked);
            let asks = std::mem::take(&mut flight.asks).into_iter();
            let (withdrawn, kept): (Vec<_>, Vec<_>) = asks.partition(|(path, _)| left.contains(path));
            flight.asks = kept;
            for (path, request) in withdrawn {
                self.withdraw(ix, path, request);
            }
            self.seek(ix, chunk);
        }
    }

    /// The uplink to a parent, made if there is none.
    fn uplink(&mut self, ix: NodeIx, parent: NodeIx) -> PathId {
        let now = self.queue.now();
        let node = &mut self.nodes[ix.at()];
        if let Some((&path, _)) = node.uplinks.iter().find(|(_, uplink)| uplink.parent == parent) {
            return path;
        }
        let salt = (u64::from(ix.0) << 32 | u64::from(parent.0)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        node.bans.retain(|_, until| *until > now);
        let link_state = match node.bans.get(&parent) {
            Some(until) => LinkState::banned(salt, *until),
            None => LinkState::new(salt),
        };
        let path = node.paths.add(link_state);
        let uplink =
            Uplink { parent, wire: Wire::Idle, last_id: 0, requests: Default::default(), lost: false };
        node.uplinks.insert(path, uplink);
        path
    }

    /// Dials a parent that was not dialed yet.
    fn warm(&mut self, ix: NodeIx, path: PathId) {
        let node = &mut self.nodes[ix.at()];
        let Some(uplink) = node.uplinks.get_mut(&path) else { return };
        if uplink.wire == Wire::Idle {
            uplink.wire = Wire::Down;
            let at = node.paths.dial_at(path);
            let incarnation = self.incarnation(ix);
            self.queue.at(at, Event::Node(incarnation, NodeEvent::Dials(path)));
        }
    }

    /// Calls the parent.
    pub(crate) fn dials(&mut self, ix: NodeIx, path: PathId) {
        let now = self.queue.now();
        let incarnation = self.incarnation(ix);
        let Some(uplink) = self.nodes[ix.at()].uplinks.get_mut(&path) else { return };
        if uplink.wire != Wire::Down {
            return;
        }
        uplink.wire = Wire::Dialing { since: now };
        let parent = uplink.parent;
        let legs = match self.nodes[parent.at()].power {
            Power::Lost => None,
            Power::Off => Some(2),
            Power::On => Some(DIAL_LEGS),
        };
        let reachable_at =
            self.net.blocked_until(ix, parent).max(self.nodes[parent.at()].frozen_until).max(now);
        self.queue.after(DIAL_PATIENCE, Event::Node(incarnation, NodeEvent::DialsLate(path)));
        match legs {
            Some(legs) if reachable_at < now + DIAL_MAX => {
                self.queue.at(
                    reachable_at + self.net.latency() * legs,
                    Event::Node(incarnation, NodeEvent::Dialed(path)),
                );
            }
            _ => self.queue.after(DIAL_MAX, Event::Node(incarnation, NodeEvent::DialFails(path))),
        }
    }

    pub(crate) fn dials_late(&mut self, ix: NodeIx, path: PathId) {
        let now = self.queue.now();
        let node = &mut self.nodes[ix.at()];
        let Some(uplink) = node.uplinks.get(&path) else { return };
        if matches!(uplink.wire, Wire::Dialing { since } if now >= since + DIAL_PATIENCE) {
            node.paths.dials_late(path, now);
            if node.paths.standing(path) == Standing::Down {
                self.fail_requests(ix, path);
            }
        }
    }

    /// The parent answers the call, or its host does.
    pub(crate) fn dialed(&mut self, ix: NodeIx, path: PathId) {
        let now = self.queue.now();
        let Some(uplink) = self.nodes[ix.at()].uplinks.get(&path) else { return };
        let parent = uplink.parent;
        if !matches!(uplink.wire, Wire::Dialing { .. }) {
            return;
        }
        match self.nodes[parent.at()].power {
            Power::On => {}
            Power::Off | Power::Lost => return self.uplink_failed(ix, path),
        }
        let (own, other) = (self.nodes[ix.at()].name.clone(), self.nodes[parent.at()].name.clone());
        let stats = |node: &Node| ScopedStats::under(&node.stats);
        let client = ClientEnd::new(&own, other.clone(), stats(&self.nodes[ix.at()]), now);
        let server = ServerEnd::new(&other, own, stats(&self.nodes[parent.at()]), now);
        let link = self.open_link(ix, path, parent, client, server);
        let uplink = self.nodes[ix.at()].uplinks.get_mut(&path).expect("it was found above");
        uplink.wire = Wire::Open(link);
        let waiting: Vec<_> =
            uplink.requests.iter().map(|(&id, &(chunk, priority))| (id, chunk, priority)).collect();
        for (id, chunk, priority) in waiting {
            if self.want(link, id, chunk, priority).is_err() {
                self.nodes[ix.at()].uplinks.get_mut(&path).map(|uplink| uplink.requests.remove(&id));
                self.failed(ix, chunk, path, None);
            }
        }
    }

    /// The dial failed, or the link was lost: what was asked there is asked elsewhere.
    pub(crate) fn uplink_failed(&mut self, ix: NodeIx, path: PathId) {
        let now = self.queue.now();
        let incarnation = self.incarnation(ix);
        let node = &mut self.nodes[ix.at()];
        let Some(uplink) = node.uplinks.get_mut(&path) else { return };
        uplink.wire = Wire::Down;
        node.paths.failed(path, now);
        let message =
            (!std::mem::replace(&mut uplink.lost, true)).then_some(ToVolt::Lost { parent: uplink.parent });
        self.queue.at(node.paths.dial_at(path), Event::Node(incarnation, NodeEvent::Dials(path)));
        if let Some(message) = message {
            self.tell_volt(ix, message);
        }
        self.fail_requests(ix, path);
    }

    fn fail_requests(&mut self, ix: NodeIx, path: PathId) {
        let Some(uplink) = self.nodes[ix.at()].uplinks.get_mut(&path) else { return };
        for (_, (chunk, _)) in std::mem::take(&mut uplink.requests) {
            self.failed(ix, chunk, path, None);
        }
    }

    /// Asks a parent for a chunk, at once or when its dial is answered.
    pub(crate) fn ask(&mut self, ix: NodeIx, chunk: ChunkIx, path: PathId) {
        self.warm(ix, path);
        let node = &mut self.nodes[ix.at()];
        let flight = node.flights.get_mut(&chunk).expect("who asks has a flight");
        let priority = flight.priority;
        let standing = node.paths.standing(path);
        let uplink = node.uplinks.get_mut(&path).filter(|_| standing == Standing::Usable);
        let Some(uplink) = uplink else { return flight.policy.lost(&mut node.paths, path) };
        if let Some(at) = flight.withdrawn.iter().position(|(asked, _)| *asked == path) {
            let (_, id) = flight.withdrawn.swap_remove(at);
            uplink.requests.insert(id, (chunk, priority));
            flight.asks.push((path, id));
            if let Wire::Open(link) = uplink.wire {
                self.links[link.at()].raise(id, priority);
                self.dirty.push_back(End { link, side: Side::Client });
            }
            return;
        }
        uplink.last_id += 1;
        let id = RequestId(uplink.last_id);
        uplink.requests.insert(id, (chunk, priority));
        flight.asks.push((path, id));
        if let Wire::Open(link) = uplink.wire
            && self.want(link, id, chunk, priority).is_err()
        {
            let node = &mut self.nodes[ix.at()];
            node.uplinks.get_mut(&path).map(|uplink| uplink.requests.remove(&id));
            if let Some(flight) = node.flights.get_mut(&chunk) {
                flight.asks.retain(|(asked, _)| *asked != path);
                flight.policy.lost(&mut node.paths, path);
            }
        }
    }

    fn want(
        &mut self,
        link: LinkId,
        id: RequestId,
        chunk: ChunkIx,
        priority: Priority,
    ) -> Result<(), Refused> {
        let (image, hash) = (self.content.image, self.content.hash(chunk));
        self.dirty.push_back(End { link, side: Side::Client });
        let client = self.links[link.at()].client.as_mut().ok_or(Refused)?;
        client.want(id, image, hash, priority)
    }

    /// Takes a request back.
    pub(crate) fn withdraw(&mut self, ix: NodeIx, path: PathId, request: RequestId) {
        let Some(uplink) = self.nodes[ix.at()].uplinks.get_mut(&path) else { return };
        uplink.requests.remove(&request);
        if let Wire::Open(link) = uplink.wire {
            self.links[link.at()].cancel(request);
            self.dirty.push_back(End { link, side: Side::Client });
        }
    }

    /// Does what an event of a link's client end asks for.
    pub(crate) fn client_event(&mut self, link: LinkId, event: ClientEvent) {
        let now = self.queue.now();
        let &Link { child_node: ix, path, parent_node: parent, .. } = &self.links[link.at()];
        let node = &mut self.nodes[ix.at()];
        let Some(uplink) = node.uplinks.get_mut(&path).filter(|uplink| uplink.wire == Wire::Open(link))
        else {
            return;
        };
        match event {
            ClientEvent::Ready => {
                uplink.lost = false;
                node.paths.greeted(path, now);
                self.parent_is_up(ix);
            }
            ClientEvent::Arrived { id, chunk } => {
                uplink.requests.remove(&id);
                self.arrived(ix, path, &chunk);
            }
            ClientEvent::Lacking { id, reason } => {
                if let Some((chunk, _)) = uplink.requests.remove(&id) {
                    self.failed(ix, chunk, path, Some(reason));
                }
            }
            ClientEvent::Liar { chunk, .. } => {
                let until = node.paths.lied(path, now);
                node.bans.insert(parent, until);
                self.checks.lied(&self.nodes[parent.at()]);
                self.links[link.at()].lied = true;
                self.tell_volt(ix, ToVolt::Blame { liar: parent, chunk });
            }
            ClientEvent::Closed(_) if self.links[link.at()].lied => {
                uplink.wire = Wire::Down;
                let at = node.paths.dial_at(path);
                let incarnation = self.incarnation(ix);
                self.queue.at(at, Event::Node(incarnation, NodeEvent::Dials(path)));
                self.fail_requests(ix, path);
            }
            ClientEvent::Closed(_) => self.uplink_failed(ix, path),
        }
    }

    /// Fetches that nobody has try again.
    fn parent_is_up(&mut self, ix: NodeIx) {
        let flights = self.nodes[ix.at()].flights.iter();
        let idle: Vec<ChunkIx> =
            flights.filter(|(_, f)| f.asks.is_empty()).map(|(&chunk, _)| chunk).collect();
        idle.into_iter().for_each(|chunk| self.seek(ix, chunk));
    }
}

impl Link {
    fn raise(&mut self, request: RequestId, priority: Priority) {
        if let Some(client) = self.client.as_mut() {
            client.raise(request, priority);
        }
    }

    fn cancel(&mut self, request: RequestId) {
        if let Some(client) = self.client.as_mut() {
            client.cancel(request);
        }
    }
}
