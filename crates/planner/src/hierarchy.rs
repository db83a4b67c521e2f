//! The hierarchy of one image: which of its nodes is whose child in each stripe.
//!
//! All nodes that do not say where they stand count as one rack. There is a [`Plan`] of each rack,
//! and one of the racks among each other, which have the same rules. In the plan of a rack what is
//! outside is a root, so that it has one child per stripe, the rack's *gateway*: a chunk comes into the rack
//! once. And racks that hang below this one are guests in it: each takes the place of a child, so that no
//! more goes out of a rack than comes in. An origin is a root of its own rack, and makes this a root among
//! the racks.
//!
//! Invariants, after [`Hierarchy::settle`]:
//! - A node has at most `fan_out` children, in all stripes together. An origin has one per stripe, and more
//!   only while no other place is to be had.
//! - A relay has children in one stripe only, its home, but for the few [loans](plan).
//! - While there is an origin that is not quarantined, each relay hangs below one, except those whose
//!   parent is still expected to report after a restart of Volt.
//! - Who is quarantined has no children. Who is suspect, or about to leave, gets no new ones.
//! - A death does not deepen the tree where a stand-in is to be had: a leaf of the same rack, or a child with
//!   room, takes the place of the dead node with all its children, and every subtree stays in one piece.
//!
//! What a node is told (its [`Placement`]) is derived from the trees by [`Hierarchy::flush`]; see
//! [`Hierarchy::peers`] for why nodes never wait for each other in a circle. During adoption after a
//! restart a node's own report stands in for it: it is *held*, and told nothing, until it is moved or the
//! time to report is over.

mod adopt;
#[cfg(test)]
mod check;
mod leave;
mod peers;
mod place;
mod plan;
mod racks;

use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};

use self::plan::{Kind, Plan};
use self::racks::Rack;
use crate::forest::Key;
use crate::location::Scope;
use crate::membership::Membership;
use crate::{Action, Millis, Placement, Role, Shape, Standing};

/// Peers per stripe in a report that can be one of our own placements.
const PEERS_MAX: usize = 8;

/// How much what nodes report weighs against the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nodes report where they hang. A parent that nobody has heard of yet will report soon, and what
    /// looks like room is not.
    Learning,
    /// All that are there have reported.
    Planning,
}

#[derive(Debug)]
struct Seat {
    role: Role,
    rack: Key,
    /// What the node knows of its placement.
    told: Option<Placement>,
    /// Whether what the node reported stands, whatever the trees say.
    held: bool,
    /// A node that registered again must attach again until then.
    confirm_by: Option<Millis>,
    /// A node that has no use for the image goes when it has no children, and then at the latest.
    leave_by: Option<Millis>,
}

/// The hierarchy of one image.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    image: ImageId,
    shape: Shape,
    seats: BTreeMap<Key, Seat>,
    /// Whose seats are origins'.
    origins: BTreeSet<Key>,
    /// The racks among each other.
    world: Plan,
    racks: BTreeMap<Key, Rack>,
    by_scope: BTreeMap<Scope, Key>,
    racks_ever: u64,
    has_reports: bool,
    /// Racks in which something may be without a place.
    unsettled: BTreeSet<Key>,
    /// Whether some rack may be without a place among the others.
    world_unsettled: bool,
    /// Racks in which something moved.
    stirred: BTreeSet<Key>,
    /// By the name of the expected parent: who waits for it in which stripe.
    awaited: BTreeMap<NodeName, BTreeSet<(usize, Key)>>,
    /// Racks that may have another origin above them, per stripe.
    retopped: BTreeSet<(usize, Key)>,
    /// Whose list of peers may have changed, and in which stripe.
    changed: BTreeSet<(Key, usize)>,
    /// Who must be told its placement unless it knows that, whatever changed.
    asked: BTreeSet<Key>,
}

impl Hierarchy {
    pub(crate) fn new(image: ImageId, shape: Shape) -> Hierarchy {
        Hierarchy {
            image,
            shape,
            seats: BTreeMap::new(),
            origins: BTreeSet::new(),
            world: Plan::new(racks::shape_of_world(shape)),
            racks: BTreeMap::new(),
            by_scope: BTreeMap::new(),
            racks_ever: 0,
            has_reports: false,
            unsettled: BTreeSet::new(),
            world_unsettled: false,
            stirred: BTreeSet::new(),
            awaited: BTreeMap::new(),
            retopped: BTreeSet::new(),
            changed: BTreeSet::new(),
            asked: BTreeSet::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.seats.is_empty()
    }

    /// Gives a node a seat, or confirms the one it has. Places are given by [`Hierarchy::settle`], except
    /// those that the node has already according to `current`.
    pub(crate) fn attach(
        &mut self,
        members: &Membership,
        key: Key,
        role: Role,
        current: Option<Placement>,
        stage: Stage,
    ) {
        let current = current.filter(|placement| {
            placement.stripes.len() == self.stripes()
                && placement.stripes.iter().all(|peers| peers.len() <= PEERS_MAX)
        });
        self.asked.insert(key);
        match self.seats.get_mut(&key) {
            Some(seat) if seat.role == role => {
                seat.confirm_by = None;
                seat.held &= seat.told == current;
                seat.told = current;
                self.stay(members, key);
                return;
            }
            Some(_) => self.detach(members, key),
            None => {}
        }
        self.asked.insert(key);
        let rack = self.rack_for(&members.get(key).location.rack(), stage);
        let seat = Seat { role, rack, told: current.clone(), held: false, confirm_by: None, leave_by: None };
        self.seats.insert(key, seat);
        if role == Role::Origin {
            self.origins.insert(key);
            self.review_all();
        }
        self.plant(members, key);
        if let (Role::Relay, Some(current)) = (role, current) {
            self.adopt(members, key, &current, stage);
        }
        self.welcome(members, key);
    }

    /// Takes a node out; its children get other parents.
    pub(crate) fn detach(&mut self, members: &Membership, key: Key) {
        let Some(seat) = self.seats.remove(&key) else { return };
        if self.origins.remove(&key) {
            self.review_all();
        }
        self.asked.remove(&key);
        self.awaited.values_mut().for_each(|waiting| waiting.retain(|entry| entry.1 != key));
        self.awaited.retain(|_, waiting| !waiting.is_empty());
        self.plan_mut(seat.rack).remove(members, key);
        self.review_rack(members, seat.rack);
    }

    /// A node registered again: it has to attach again until `confirm_by`, its peers must hear of its
    /// address, and it may stand elsewhere.
    pub(crate) fn returned(&mut self, members: &Membership, key: Key, confirm_by: Millis) {
        let Some(seat) = self.seats.get_mut(&key) else { return };
        seat.confirm_by = Some(confirm_by);
        let (role, told) = (seat.role, seat.told.clone());
        if self.racks[&seat.rack].scope != members.get(key).location.rack() {
            self.detach(members, key);
            self.attach(members, key, role, None, Stage::Planning);
            if let Some(seat) = self.seats.get_mut(&key) {
                (seat.told, seat.confirm_by) = (told, Some(confirm_by));
            }
        }
        self.review(key);
        if role == Role::Origin {
            self.review_all();
        }
    }

    /// Who registered again but did not attach again in time.
    pub(crate) fn unconfirmed(&self, now: Millis) -> Vec<Key> {
        let late = |seat: &Seat| seat.confirm_by.is_some_and(|until| until <= now);
        self.seats.iter().filter(|(_, seat)| late(seat)).map(|(&key, _)| key).collect()
    }

    /// Whether the node is told to fetch from `peer`, as parent or as alternate.
    pub(crate) fn lists(&self, key: Key, peer: &NodeName) -> bool {
        let told = self.seats.get(&key).and_then(|seat| seat.told.as_ref());
        told.is_some_and(|told| told.stripes.iter().flatten().any(|listed| listed.node == *peer))
    }

    /// Whether the node is the only origin here that serves.
    pub(crate) fn depends_on(&self, key: Key) -> bool {
        self.serving_origins() == [key]
    }

    /// The node shall no longer be the parent's child.
    pub(crate) fn separate(&mut self, child: Key, parent: Key) {
        for stripe in 0..self.stripes() {
            if self.parent(stripe, child) != Some(parent) {
                continue;
            }
            let rack = self.seats[&child].rack;
            if self.racks[&rack].plan.forest(stripe).parent(child) == Some(parent) {
                self.plan_mut(rack).unhang(stripe, child);
            } else if let Some(host) = self.racks[&rack].hosts[stripe] {
                self.plan_mut(host).unhang(stripe, rack);
            }
        }
        self.review(child);
    }

    /// The node's list of peers may have changed for a reason that is not in the trees.
    pub(crate) fn review(&mut self, key: Key) {
        let Some(rack) = self.seats.get(&key).map(|seat| seat.rack) else { return };
        self.asked.insert(key);
        for stripe in 0..self.stripes() {
            let forest = self.plan_mut(rack).forest_mut(stripe);
            if !forest.contains(key) {
                continue;
            }
            forest.mark_around(key);
            if self.gateway(stripe, rack) == Some(key)
                && let Some(host) = self.racks[&rack].hosts[stripe]
            {
                self.plan_mut(host).forest_mut(stripe).mark_around(rack);
            }
        }
    }

    /// Everybody's list may have changed: it ends with an origin.
    fn review_all(&mut self) {
        self.asked.extend(self.seats.keys());
        for stripe in 0..self.stripes() {
            self.retopped.extend(self.racks.keys().map(|&rack| (stripe, rack)));
        }
    }

    /// The node's standing changed.
    pub(crate) fn reassess(&mut self, members: &Membership, key: Key) {
        let Some(seat) = self.seats.get(&key) else { return };
        let (role, rack, standing) = (seat.role, seat.rack, self.standing(members, key));
        if role == Role::Origin {
            self.review_all();
        }
        if !self.racks[&rack].plan.contains(key) {
            self.plant(members, key);
        } else if role == Role::Origin && standing == Standing::Quarantined {
            self.plan_mut(rack).remove(members, key);
            self.asked.insert(key);
        } else {
            self.plan_mut(rack).set_standing(members, key, standing);
        }
        self.review_rack(members, rack);
    }

    /// Makes the trees a little shallower.
    pub(crate) fn promote(&mut self, members: &Membership) {
        self.world_unsettled = true;
        self.world.promote(members);
        for rack in self.racks.keys().copied().collect::<Vec<_>>() {
            self.plan_mut(rack).promote(members);
        }
    }

    /// The time to report is over: nobody waits any longer, and no report stands against the plan.
    pub(crate) fn stop_waiting(&mut self, members: &Membership) {
        self.awaited.clear();
        for rack in self.racks.keys().copied().collect::<Vec<_>>() {
            self.plan_mut(rack).stop_waiting();
        }
        self.world_unsettled = true;
        self.world.stop_waiting();
        for (&key, seat) in &mut self.seats {
            seat.held = false;
            self.asked.insert(key);
        }
        self.leaving().into_iter().for_each(|key| self.reassess(members, key));
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// How many relays have a seat.
    pub(crate) fn relays(&self) -> usize {
        self.seats.len() - self.origins.len()
    }

    /// How many there will be when this node has a seat in this role.
    pub(crate) fn relays_with(&self, key: Key, role: Role) -> usize {
        let is_relay = self.seats.get(&key).is_some_and(|seat| seat.role == Role::Relay);
        self.relays() - usize::from(is_relay) + usize::from(role == Role::Relay)
    }

    /// Whether some node's report was adopted while nodes reported.
    pub(crate) fn has_reports(&self) -> bool {
        self.has_reports
    }

    /// Plans everything anew if the shape is another one; who was high up comes first.
    pub(crate) fn reshape(&mut self, members: &Membership, shape: Shape) {
        if shape == self.shape {
            return;
        }
        let former = std::mem::replace(self, Hierarchy::new(self.image, shape));
        let mut order: Vec<(u32, Key)> =
            former.seats.keys().map(|&key| (former.depth(0, key), key)).collect();
        order.sort_unstable();
        for (_, key) in order {
            let seat = &former.seats[&key];
            self.attach(members, key, seat.role, None, Stage::Planning);
            if let Some(fresh) = self.seats.get_mut(&key) {
                (fresh.told, fresh.confirm_by) = (seat.told.clone(), seat.confirm_by);
            }
            seat.leave_by.into_iter().for_each(|by| self.leave(members, key, by, Stage::Planning));
            self.settle(members, Stage::Planning);
        }
    }

    /// Tells every node whose placement is not what it was told.
    pub(crate) fn flush(&mut self, members: &Membership, actions: &mut Vec<Action>) {
        self.collect_changes();
        let mut due: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
        for (key, stripe) in std::mem::take(&mut self.changed) {
            due.entry(key).or_default().push(stripe);
        }
        for key in std::mem::take(&mut self.asked) {
            due.insert(key, (0..self.stripes()).collect());
        }
        for (key, stripes) in due {
            let Some(seat) = self.seats.get(&key).filter(|seat| !seat.held) else { continue };
            let is_new = seat.told.as_ref().is_none_or(|told| told.stripes.len() != self.stripes());
            let news = self.news(members, key, seat, &stripes);
            if news.is_empty() && !is_new {
                continue;
            }
            let Some(seat) = self.seats.get_mut(&key) else { continue };
            let placement = seat.told.get_or_insert_default();
            placement.stripes.resize(self.shape.stripes() as usize, Vec::new());
            for (stripe, peers) in news {
                placement.stripes[stripe] = peers;
            }
            let node = members.get(key).name.clone();
            actions.push(Action::Place { node, image: self.image, placement: placement.clone() });
        }
    }

    /// What the node was told last.
    pub(crate) fn told(&self, key: Key) -> Option<&Placement> {
        self.seats.get(&key)?.told.as_ref()
    }

    fn stripes(&self) -> usize {
        self.shape.stripes() as usize
    }

    /// Puts a seated node into its rack, without a parent. A quarantined origin is left out: it serves
    /// nobody and needs nobody.
    fn plant(&mut self, members: &Membership, key: Key) {
        let (role, rack) = (self.seats[&key].role, self.seats[&key].rack);
        let standing = self.standing(members, key);
        let kind = match role {
            Role::Origin if standing == Standing::Quarantined => return self.review_rack(members, rack),
            Role::Origin => Kind::Root,
            Role::Relay => Kind::Relay,
        };
        self.plan_mut(rack).add(key, kind, standing, [Scope::everywhere()].into());
        self.review_rack(members, rack);
    }
}
