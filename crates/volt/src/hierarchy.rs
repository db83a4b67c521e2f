//! The hierarchy of one image: which of its nodes is whose child in each stripe.
//!
//! Invariants, after [`Hierarchy::settle`]:
//! - A node has at most `fan_out` children per stripe. Only an origin may have more, and only while no
//!   other place is to be had.
//! - A relay has children in one stripe only, its *home*; in the others it is a leaf.
//! - While there is an origin that is not quarantined, each relay hangs below one, except those whose
//!   parent is still expected to report after a restart of Volt.
//! - Who is quarantined has no children. Who is suspect gets no new ones.
//! - A death does not deepen the tree where a stand-in is to be had: a leaf, or a child with room, takes
//!   the place of the dead node with all its children, and every subtree stays in one piece.
//!
//! What a node is told (its [`Placement`]) is derived from the trees by [`Hierarchy::flush`]; see
//! [`Hierarchy::peers`] for why nodes never wait for each other in a circle. During adoption after a
//! restart a node's own report stands in for it: it is *held*, and told nothing, until it is moved or the
//! time to report is over.

#[cfg(test)]
mod check;
mod peers;
mod place;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};

use crate::forest::{Forest, Key, Root};
use crate::roster::Roster;
use crate::{Action, Millis, Placement, Role, Shape, Standing, Tree, TreeNode};

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
    /// The stripe in which a relay may have children.
    home: usize,
    /// What the node knows of its placement.
    told: Option<Placement>,
    /// Whether what the node reported stands, whatever the trees say.
    held: bool,
    /// A node that registered again must attach again until then.
    confirm_by: Option<Millis>,
}

/// The hierarchy of one image.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    image: ImageId,
    shape: Shape,
    forests: Vec<Forest>,
    seats: BTreeMap<Key, Seat>,
    /// How many of the seats are origins'.
    origins: usize,
    /// By the name of the expected parent: who waits for it in which stripe.
    awaited: BTreeMap<NodeName, BTreeSet<(usize, Key)>>,
    /// Who must be told its placement even if nothing moved.
    asked: BTreeSet<Key>,
}

impl Hierarchy {
    pub(crate) fn new(image: ImageId, shape: Shape) -> Hierarchy {
        Hierarchy {
            image,
            shape,
            forests: (0..shape.stripes()).map(|_| Forest::default()).collect(),
            seats: BTreeMap::new(),
            origins: 0,
            awaited: BTreeMap::new(),
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
        roster: &Roster,
        key: Key,
        role: Role,
        current: Option<Placement>,
        stage: Stage,
    ) {
        let current = current.filter(|placement| {
            placement.stripes.len() == self.forests.len()
                && placement.stripes.iter().all(|peers| peers.len() <= PEERS_MAX)
        });
        self.asked.insert(key);
        match self.seats.get_mut(&key) {
            Some(seat) if seat.role == role => {
                seat.confirm_by = None;
                seat.held &= seat.told == current;
                seat.told = current;
                return;
            }
            Some(_) => self.detach(roster, key),
            None => {}
        }
        self.asked.insert(key);
        let home = (0..self.forests.len()).min_by_key(|&stripe| self.forests[stripe].free()).unwrap_or(0);
        let seat = Seat { role, home, told: current.clone(), held: false, confirm_by: None };
        self.seats.insert(key, seat);
        self.origins += usize::from(role == Role::Origin);
        self.plant(roster, key);
        if let (Role::Relay, Some(current)) = (role, current) {
            self.adopt(roster, key, &current, stage);
        }
        self.welcome(roster, key);
    }

    /// Takes a node out; its children get other parents.
    pub(crate) fn detach(&mut self, roster: &Roster, key: Key) {
        for stripe in 0..self.forests.len() {
            if self.forests[stripe].contains(key) {
                self.vacate(roster, stripe, key);
            }
        }
        let seat = self.seats.remove(&key);
        self.origins -= usize::from(seat.is_some_and(|seat| seat.role == Role::Origin));
        self.asked.remove(&key);
    }

    /// A node registered again: it has to attach again until `confirm_by`, its peers must hear of its
    /// address, and it may stand elsewhere.
    pub(crate) fn returned(&mut self, roster: &Roster, key: Key, confirm_by: Millis) {
        let Some(seat) = self.seats.get_mut(&key) else { return };
        seat.confirm_by = Some(confirm_by);
        for forest in self.forests.iter_mut().filter(|forest| forest.contains(key)) {
            forest.set_scopes(key, roster.get(key).scopes.clone());
            forest.mark_around(key);
            if forest.origins().contains(&key) {
                forest.mark_below(key);
            }
        }
    }

    /// Who registered again but did not attach again in time.
    pub(crate) fn unconfirmed(&self, now: Millis) -> Vec<Key> {
        let late = |seat: &Seat| seat.confirm_by.is_some_and(|until| until <= now);
        self.seats.iter().filter(|(_, seat)| late(seat)).map(|(&key, _)| key).collect()
    }

    /// The node's children in all stripes.
    pub(crate) fn children(&self, key: Key) -> impl Iterator<Item = Key> {
        let forests = self.forests.iter().filter(move |forest| forest.contains(key));
        forests.flat_map(move |forest| forest.children(key).iter().copied())
    }

    /// Whether the node is told to fetch from `peer`, as parent or as alternate.
    pub(crate) fn lists(&self, key: Key, peer: &NodeName) -> bool {
        let told = self.seats.get(&key).and_then(|seat| seat.told.as_ref());
        told.is_some_and(|told| told.stripes.iter().flatten().any(|listed| listed.node == *peer))
    }

    /// Whether the node is the only origin here that serves.
    pub(crate) fn depends_on(&self, key: Key) -> bool {
        self.forests.iter().any(|forest| forest.origins().len() == 1 && forest.origins().contains(&key))
    }

    /// The node shall no longer be the parent's child.
    pub(crate) fn part(&mut self, child: Key, parent: Key) {
        for stripe in 0..self.forests.len() {
            let forest = &self.forests[stripe];
            if forest.contains(child) && forest.parent(child) == Some(parent) {
                self.unhang(stripe, child);
            }
        }
        self.review(child);
    }

    /// The node's list of peers may have changed for a reason that is not in the trees.
    pub(crate) fn review(&mut self, key: Key) {
        for forest in self.forests.iter_mut().filter(|forest| forest.contains(key)) {
            forest.mark_around(key);
        }
    }

    /// The node's standing changed.
    pub(crate) fn reassess(&mut self, roster: &Roster, key: Key) {
        let Some(seat) = self.seats.get(&key) else { return };
        let (role, quarantined) = (seat.role, roster.standing(key) == Standing::Quarantined);
        if !self.forests[0].contains(key) {
            return self.plant(roster, key);
        }
        for stripe in 0..self.forests.len() {
            self.forests[stripe].mark_around(key);
            let slots = self.slots(roster, key, stripe);
            if quarantined && (role == Role::Origin || !self.forests[stripe].children(key).is_empty()) {
                self.vacate(roster, stripe, key);
                if role == Role::Relay {
                    let scopes = roster.get(key).scopes.clone();
                    self.forests[stripe].add(key, Root::Orphan, slots, scopes);
                    self.unhold(key);
                }
            } else {
                self.forests[stripe].set_slots(key, slots);
            }
        }
    }

    /// Gives every node a place that lacks one and can have one, and takes children from overloaded
    /// origins where there is room elsewhere.
    pub(crate) fn settle(&mut self, roster: &Roster, stage: Stage) {
        for stripe in 0..self.forests.len() {
            // The youngest first, so that without an origin the newcomer joins those that hold chunks.
            let mut orphans: Vec<Key> = self.forests[stripe].orphans().iter().copied().collect();
            while let Some(orphan) = orphans.pop() {
                let place = self.place_for(roster, stripe, orphan);
                if let Some(idle) = self.idle_above(roster, stripe, orphan, place) {
                    let parent = self.forests[stripe].parent(idle);
                    self.unhang(stripe, idle);
                    parent.into_iter().for_each(|parent| self.hang(stripe, orphan, parent));
                    // It cannot displace anyone in turn.
                    orphans.push(idle);
                } else if let Some(parent) = place {
                    let joint = self.graft(roster, stripe, orphan, parent);
                    self.hang(stripe, orphan, joint.unwrap_or(parent));
                }
            }
            if stage == Stage::Planning {
                let origins: Vec<Key> = self.forests[stripe].origins().iter().copied().collect();
                origins.into_iter().for_each(|origin| self.relieve(roster, stripe, origin));
            }
        }
    }

    /// The time to report is over: nobody waits any longer, and no report stands against the plan.
    pub(crate) fn stop_waiting(&mut self) {
        self.awaited.clear();
        for forest in &mut self.forests {
            let waiting: Vec<Key> = forest.waiting().iter().copied().collect();
            waiting.into_iter().for_each(|key| forest.orphan(key));
        }
        for (&key, seat) in &mut self.seats {
            seat.held = false;
            self.asked.insert(key);
        }
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// How many relays have a seat.
    pub(crate) fn relays(&self) -> usize {
        self.seats.len() - self.origins
    }

    /// Whether some node's report stands for its place.
    pub(crate) fn has_reports(&self) -> bool {
        self.seats.values().any(|seat| seat.held)
    }

    /// Plans everything anew if the shape is another one; who was high up comes first.
    pub(crate) fn reshape(&mut self, roster: &Roster, shape: Shape) {
        if shape == self.shape {
            return;
        }
        let former = std::mem::replace(self, Hierarchy::new(self.image, shape));
        let rank = |key: Key| {
            let forest = &former.forests[0];
            if forest.contains(key) { forest.rank(key) } else { 0 }
        };
        let mut order: Vec<(u32, Key)> = former.seats.keys().map(|&key| (rank(key), key)).collect();
        order.sort_unstable();
        for (_, key) in order {
            let seat = &former.seats[&key];
            self.attach(roster, key, seat.role, None, Stage::Planning);
            if let Some(fresh) = self.seats.get_mut(&key) {
                (fresh.told, fresh.confirm_by) = (seat.told.clone(), seat.confirm_by);
            }
            self.settle(roster, Stage::Planning);
        }
    }

    /// Tells every node whose placement is not what it was told.
    pub(crate) fn flush(&mut self, roster: &Roster, actions: &mut Vec<Action>) {
        let mut due = std::mem::take(&mut self.asked);
        for forest in &mut self.forests {
            due.append(&mut forest.take_changed());
        }
        for key in due {
            let Some(seat) = self.seats.get(&key).filter(|seat| !seat.held) else { continue };
            let placement = self.placement(roster, key, seat);
            if seat.told.as_ref() == Some(&placement) {
                continue;
            }
            let node = roster.get(key).name.clone();
            actions.push(Action::Place { node, image: self.image, placement: placement.clone() });
            if let Some(seat) = self.seats.get_mut(&key) {
                seat.told = Some(placement);
            }
        }
    }

    /// What the node was told last.
    pub(crate) fn told(&self, key: Key) -> Option<&Placement> {
        self.seats.get(&key)?.told.as_ref()
    }

    /// The hierarchy as people see it.
    pub(crate) fn view(&self, roster: &Roster) -> Tree {
        let name = |key: Key| roster.get(key).name.clone();
        let by_name_from_last = |keys: &mut Vec<Key>| keys.sort_by_key(|&key| Reverse(name(key)));
        let stripe_view = |forest: &Forest| {
            let roots = forest.origins().iter().chain(forest.orphans()).chain(forest.waiting());
            let mut ahead: Vec<Key> = roots.copied().collect();
            by_name_from_last(&mut ahead);
            let mut nodes = Vec::new();
            while let Some(key) = ahead.pop() {
                nodes.push(TreeNode {
                    node: name(key),
                    parent: forest.parent(key).map(name),
                    depth: forest.depth(key),
                    role: self.seats[&key].role,
                });
                let mut children: Vec<Key> = forest.children(key).iter().copied().collect();
                by_name_from_last(&mut children);
                ahead.append(&mut children);
            }
            nodes
        };
        Tree { shape: self.shape, stripes: self.forests.iter().map(stripe_view).collect() }
    }
}
