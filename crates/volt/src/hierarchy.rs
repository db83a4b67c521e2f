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

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};

use crate::forest::{Forest, Key, Root};
use crate::roster::Roster;
use crate::{Action, Millis, Placement, Role, Shape, Standing, Tree, TreeNode};

/// Leaves of one stripe that move up per tick. Few, because each move costs the leaf its connections:
/// depth is worth a little latency, haste is not.
const RISES_PER_TICK_MAX: usize = 8;

/// Candidates that are looked at before a search for a stand-in is given up; those who avoid each other
/// are rare, and giving up only costs depth.
const CANDIDATES_MAX: usize = 16;

/// Levels that a graft must win: less is not worth moving two others.
const GRAFT_GAIN_MIN: u32 = 2;

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
        self.seats.remove(&key);
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

    /// Lets a few of the deepest leaves move up where that wins at least two levels.
    pub(crate) fn rise(&mut self, roster: &Roster) {
        for stripe in 0..self.forests.len() {
            for _ in 0..RISES_PER_TICK_MAX {
                let forest = &self.forests[stripe];
                let Some(leaf) = forest.leaves_upwards().next() else { break };
                let fits = |place: Key| place != leaf && !roster.avoids(leaf, place);
                let Some(place) = forest.best_open(leaf, fits) else { break };
                if forest.rank(place) + 2 >= forest.rank(leaf) {
                    break;
                }
                self.unhang(stripe, leaf);
                self.hang(stripe, leaf, place);
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

    /// Plans everything anew in another shape; who was high up comes first.
    pub(crate) fn reshape(&mut self, roster: &Roster, shape: Shape) {
        let former = std::mem::replace(self, Hierarchy::new(self.image, shape));
        let rank = |key: Key| {
            let forest = &former.forests[0];
            if forest.contains(key) { forest.rank(key) } else { 0 }
        };
        let mut order: Vec<(Key, Seat)> = Vec::new();
        let ranks: BTreeMap<Key, u32> = former.seats.keys().map(|&key| (key, rank(key))).collect();
        order.extend(former.seats);
        order.sort_by_key(|(key, _)| (ranks[key], *key));
        for (key, seat) in order {
            self.attach(roster, key, seat.role, None, Stage::Planning);
            if let Some(fresh) = self.seats.get_mut(&key) {
                (fresh.told, fresh.confirm_by) = (seat.told, seat.confirm_by);
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

/// Placing.
impl Hierarchy {
    /// Children that the node may have in the stripe.
    fn slots(&self, roster: &Roster, key: Key, stripe: usize) -> u32 {
        let seat = &self.seats[&key];
        let serves = seat.role == Role::Origin || seat.home == stripe;
        if serves && roster.standing(key) == Standing::Good { self.shape.fan_out() } else { 0 }
    }

    /// Puts a seated node into the trees, without a parent. A quarantined origin is left out: it serves
    /// nobody and needs nobody.
    fn plant(&mut self, roster: &Roster, key: Key) {
        let root = match self.seats[&key].role {
            Role::Origin if roster.standing(key) == Standing::Quarantined => return,
            Role::Origin => Root::Origin,
            Role::Relay => Root::Orphan,
        };
        for stripe in 0..self.forests.len() {
            let slots = self.slots(roster, key, stripe);
            self.forests[stripe].add(key, root, slots, roster.get(key).scopes.clone());
        }
    }

    /// Hangs a new relay where it says that it hangs, as far as that is legal.
    fn adopt(&mut self, roster: &Roster, key: Key, current: &Placement, stage: Stage) {
        let mut adopted = 0;
        for (stripe, peers) in current.stripes.iter().enumerate() {
            let Some(parent) = peers.first().map(|peer| &peer.node) else { continue };
            let known = roster.key(parent).filter(|&parent| self.seats.contains_key(&parent));
            match known {
                Some(parent) if self.can_hang(roster, stripe, key, parent) => {
                    self.forests[stripe].link(key, parent);
                    adopted += 1;
                }
                None if stage == Stage::Learning && *parent != roster.get(key).name => {
                    self.forests[stripe].await_parent(key);
                    self.awaited.entry(parent.clone()).or_default().insert((stripe, key));
                    adopted += 1;
                }
                _ => {}
            }
        }
        if let Some(seat) = self.seats.get_mut(&key) {
            seat.held = stage == Stage::Learning && adopted == self.forests.len();
        }
    }

    /// Hangs those under a new node that have been waiting for it; those that may not be its children
    /// wait no longer.
    fn welcome(&mut self, roster: &Roster, key: Key) {
        for (stripe, child) in self.awaited.remove(&roster.get(key).name).unwrap_or_default() {
            if self.forests[stripe].contains(key) && self.can_hang(roster, stripe, child, key) {
                self.forests[stripe].link(child, key);
            } else {
                self.forests[stripe].orphan(child);
                self.unhold(child);
            }
        }
    }

    /// Whether the child may hang under this parent, which for that may give up a home where it has no
    /// children.
    fn can_hang(&mut self, roster: &Roster, stripe: usize, child: Key, parent: Key) -> bool {
        let forest = &self.forests[stripe];
        if !forest.contains(parent) || forest.is_within(parent, child) || roster.avoids(child, parent) {
            return false;
        }
        if forest.origins().contains(&parent) {
            // An origin may be overloaded for good reasons; if not, it is relieved later.
            return true;
        }
        if forest.room(parent) == 0 {
            self.move_home(roster, parent, stripe);
        }
        self.forests[stripe].room(parent) > 0
    }

    /// Makes a relay that serves nobody yet an inner node of another stripe, if it is good for that.
    fn move_home(&mut self, roster: &Roster, key: Key, stripe: usize) {
        let Some(seat) = self.seats.get_mut(&key) else { return };
        let home = seat.home;
        if home == stripe || seat.role == Role::Origin || !self.forests[home].children(key).is_empty() {
            return;
        }
        seat.home = stripe;
        for stripe in [home, stripe] {
            let slots = self.slots(roster, key, stripe);
            self.forests[stripe].set_slots(key, slots);
        }
    }

    /// The parent that an orphan shall have: the best open place; or one that opens because a spare node
    /// changes its home; or an origin beyond its fan-out, at last even one that the orphan avoids. Without
    /// any origin an orphan that serves nobody joins one that does, and the others stay as they are: when
    /// the origin is back, all is as it was.
    fn place_for(&mut self, roster: &Roster, stripe: usize, orphan: Key) -> Option<Key> {
        let forest = &self.forests[stripe];
        let fits = |place: Key| place != orphan && !roster.avoids(orphan, place);
        if forest.origins().is_empty() {
            return forest.best_open(orphan, fits).filter(|_| forest.children(orphan).is_empty());
        }
        let rooted = forest.best_open(orphan, fits).filter(|&place| forest.is_rooted(place));
        rooted.or_else(|| self.open_spare(roster, stripe, orphan)).or_else(|| {
            let forest = &self.forests[stripe];
            let load = |&&origin: &&Key| (!fits(origin), forest.children(origin).len(), origin);
            forest.origins().iter().min_by_key(load).copied()
        })
    }

    /// The leaf that has to yield its place to an orphan that serves: one that never will, and hangs
    /// higher than the orphan otherwise would. Else leaves of other stripes would fill the top of the tree,
    /// and with as many stripes as children its depth would grow with the number of nodes.
    fn idle_above(&self, roster: &Roster, stripe: usize, orphan: Key, place: Option<Key>) -> Option<Key> {
        let forest = &self.forests[stripe];
        let place = place?;
        if self.slots(roster, orphan, stripe) == 0 {
            return None;
        }
        let overloaded = forest.room(place) == 0;
        let higher = |idle: &Key| overloaded || forest.rank(*idle) <= forest.rank(place);
        let fits = |idle: &Key| {
            forest.parent(*idle).is_some_and(|parent| {
                self.slots(roster, parent, stripe) > 0
                    && forest.excess(parent) == 0
                    && !roster.avoids(orphan, parent)
            })
        };
        forest.idle_downwards().take(CANDIDATES_MAX).take_while(higher).find(fits)
    }

    /// Where a high subtree is to hang that would double the depth of the tree at the open `place`: a leaf
    /// is put in above a branch of equal height, and takes that branch and the orphan as its children. So
    /// two nodes move besides the orphan, and the tree grows by one level.
    fn graft(&mut self, roster: &Roster, stripe: usize, orphan: Key, place: Key) -> Option<Key> {
        let forest = &self.forests[stripe];
        let up = forest.height(orphan).min(forest.depth(place).saturating_sub(1));
        if up < GRAFT_GAIN_MIN || !forest.is_rooted(place) {
            return None;
        }
        let branch = forest.upwards(place).nth(up as usize)?;
        let above = forest.parent(branch)?;
        if self.slots(roster, above, stripe) == 0 || forest.excess(above) > 0 {
            return None;
        }
        let fits = |leaf: &Key| {
            let avoids = [(*leaf, above), (branch, *leaf), (orphan, *leaf)];
            forest.room(*leaf) >= 2
                && *leaf != branch
                && !avoids.iter().any(|pair| roster.avoids(pair.0, pair.1))
        };
        let joint = forest.spares_upwards(place).take(CANDIDATES_MAX).find(fits)?;
        self.unhang(stripe, joint);
        self.unhang(stripe, branch);
        self.hang(stripe, joint, above);
        self.hang(stripe, branch, joint);
        Some(joint)
    }

    /// Makes this stripe the home of a node from the one with the most room; the children that it has there,
    /// if any, go to its neighbours. It is taken from the bottom, where children are leaves.
    fn open_spare(&mut self, roster: &Roster, stripe: usize, orphan: Key) -> Option<Key> {
        // What is left must hold the children and at least one newcomer.
        let plenty =
            |&other: &usize| other != stripe && self.forests[other].free() > self.shape.fan_out() as usize;
        let richest =
            (0..self.forests.len()).filter(plenty).max_by_key(|&other| self.forests[other].free())?;
        let (forest, rich) = (&self.forests[stripe], &self.forests[richest]);
        let fits = |spare: &Key| {
            *spare != orphan
                && self.seats[spare].role == Role::Relay
                && forest.is_rooted(*spare)
                && rich.is_rooted(*spare)
                && !roster.avoids(orphan, *spare)
        };
        let spare = rich.open_upwards(orphan).take(CANDIDATES_MAX).find(fits)?;
        for child in rich.children(spare).clone() {
            let rich = &self.forests[richest];
            let fits = |place: Key| !rich.is_within(place, spare) && !roster.avoids(child, place);
            let place = rich.best_open(child, fits).filter(|&place| rich.is_rooted(place))?;
            self.unhang(richest, child);
            self.hang(richest, child, place);
        }
        self.move_home(roster, spare, stripe);
        Some(spare)
    }

    /// Moves children of an overloaded origin to where there is room.
    fn relieve(&mut self, roster: &Roster, stripe: usize, origin: Key) {
        for _ in 0..self.forests[stripe].excess(origin) {
            let forest = &self.forests[stripe];
            let Some(place) = forest.best_open(origin, |_| true).filter(|&place| forest.is_rooted(place))
            else {
                return;
            };
            let movable = |child: &&Key| !forest.is_within(place, **child) && !roster.avoids(**child, place);
            let lightest = |child: &&Key| (forest.children(**child).len(), Reverse(**child));
            let children = forest.children(origin).iter();
            let Some(&child) = children.filter(movable).min_by_key(lightest) else { return };
            self.unhang(stripe, child);
            self.hang(stripe, child, place);
        }
    }

    /// Takes a node out of a tree. Its place and its children go to a stand-in: a child that has room for
    /// its siblings, so that nobody else moves, or else the deepest leaf. If there is none, as under an
    /// origin, the children are orphans.
    fn vacate(&mut self, roster: &Roster, stripe: usize, key: Key) {
        if self.forests[stripe].is_waiting(key) {
            self.awaited.values_mut().for_each(|waiting| {
                waiting.remove(&(stripe, key));
            });
            self.awaited.retain(|_, waiting| !waiting.is_empty());
        }
        let stand_in = self.stand_in(roster, stripe, key);
        let parent = self.forests[stripe].parent(key);
        let children: Vec<Key> = self.forests[stripe].children(key).iter().copied().collect();
        children.iter().for_each(|&child| self.unhang(stripe, child));
        self.forests[stripe].unlink(key);
        self.forests[stripe].remove(key);
        let Some(stand_in) = stand_in else { return };
        self.unhang(stripe, stand_in);
        if let Some(parent) = parent {
            self.hang(stripe, stand_in, parent);
        }
        for child in children.into_iter().filter(|&child| child != stand_in) {
            if !roster.avoids(child, stand_in) {
                self.hang(stripe, child, stand_in);
            }
        }
    }

    fn stand_in(&self, roster: &Roster, stripe: usize, key: Key) -> Option<Key> {
        let forest = &self.forests[stripe];
        let children = forest.children(key);
        if children.is_empty() || forest.origins().contains(&key) || forest.is_waiting(key) {
            return None;
        }
        let parent = forest.parent(key);
        let no_room = |parent| self.slots(roster, parent, stripe) == 0 || forest.excess(parent) > 0;
        if parent.is_some_and(no_room) {
            return None;
        }
        let may_follow = |stand_in: Key| parent.is_none_or(|parent| !roster.avoids(stand_in, parent));
        let roomy = |child: &&Key| forest.room(**child) + 1 >= children.len() && may_follow(**child);
        let deepest = || {
            let deeper = |leaf: &Key| forest.rank(*leaf) > forest.rank(key);
            let fits = |leaf: &Key| forest.room(*leaf) >= children.len() && may_follow(*leaf);
            forest.spares_upwards(key).take(CANDIDATES_MAX).take_while(deeper).find(fits)
        };
        children.iter().find(roomy).copied().or_else(deepest)
    }

    fn hang(&mut self, stripe: usize, child: Key, parent: Key) {
        self.unhold(child);
        self.forests[stripe].link(child, parent);
    }

    fn unhang(&mut self, stripe: usize, child: Key) {
        self.unhold(child);
        self.forests[stripe].unlink(child);
    }

    fn unhold(&mut self, key: Key) {
        if let Some(seat) = self.seats.get_mut(&key) {
            seat.held = false;
        }
    }
}

/// What nodes are told.
impl Hierarchy {
    fn placement(&self, roster: &Roster, key: Key, seat: &Seat) -> Placement {
        let peers = |(stripe, forest): (usize, &Forest)| {
            if forest.contains(key) && forest.is_waiting(key) {
                let told = seat.told.as_ref().and_then(|told| told.stripes.get(stripe));
                return told.cloned().unwrap_or_default();
            }
            self.peers(roster, stripe, key).into_iter().map(|peer| roster.peer(peer)).collect()
        };
        Placement { stripes: self.forests.iter().enumerate().map(peers).collect() }
    }

    /// Whom a node fetches from in a stripe, best first: its parent, its grandparent, an uncle (or, where
    /// it has none, an elder sibling), and the origin.
    ///
    /// Each of them is before the node in the order by depth, then name. So whatever peers the nodes
    /// choose from their lists, no request ever comes back to one that waits for its answer.
    fn peers(&self, roster: &Roster, stripe: usize, key: Key) -> Vec<Key> {
        let forest = &self.forests[stripe];
        if !forest.contains(key) {
            return Vec::new();
        }
        let name = |key: Key| &roster.get(key).name;
        let lends = |peer: &Key| roster.standing(*peer) == Standing::Good && !roster.avoids(key, *peer);
        let elder = |siblings: &BTreeSet<Key>| {
            let elders = siblings.iter().copied().filter(|&other| name(other) < name(key)).filter(lends);
            elders.max_by_key(|&other| name(other))
        };
        let Some(parent) = forest.parent(key) else {
            let alone = forest.origins().contains(&key);
            return if alone { Vec::new() } else { elder(forest.orphans()).into_iter().collect() };
        };
        let grandparent = forest.parent(parent);
        let aunts = match grandparent {
            Some(grandparent) => Some(forest.children(grandparent)),
            None => Some(forest.origins()).filter(|origins| origins.contains(&parent)),
        };
        // The next by name in a circle, so that the children of one node are spread over its siblings.
        let uncle = aunts.and_then(|aunts| {
            let others = aunts.iter().copied().filter(|&other| other != parent).filter(lends);
            others.min_by_key(|&other| (name(other) < name(parent), name(other)))
        });
        let origin = forest.upwards(key).last().filter(|root| forest.origins().contains(root));
        let alternates = [grandparent.filter(lends), uncle.or_else(|| elder(forest.children(parent)))];
        let mut peers = vec![parent];
        peers.extend(alternates.into_iter().flatten().filter(|&peer| Some(peer) != origin));
        peers.extend(origin.filter(|&origin| origin != parent));
        peers
    }
}

#[cfg(test)]
impl Hierarchy {
    /// Panics unless the invariants at the head of this file, and those of [`Hierarchy::peers`], hold.
    pub(crate) fn check(&self, roster: &Roster, stage: Stage) {
        for (stripe, forest) in self.forests.iter().enumerate() {
            forest.check();
            let waiting: BTreeSet<Key> = self
                .awaited
                .values()
                .flatten()
                .filter(|entry| entry.0 == stripe)
                .map(|entry| entry.1)
                .collect();
            assert_eq!(forest.waiting(), &waiting, "who waits is awaited");
            for (&key, seat) in &self.seats {
                self.check_place(roster, stage, stripe, key, seat);
            }
        }
        for (&key, seat) in self.seats.iter().filter(|(_, seat)| !seat.held) {
            let name = &roster.get(key).name;
            let placement = self.placement(roster, key, seat);
            assert_eq!(seat.told.as_ref(), Some(&placement), "{name} was told its placement");
        }
    }

    fn check_place(&self, roster: &Roster, stage: Stage, stripe: usize, key: Key, seat: &Seat) {
        let forest = &self.forests[stripe];
        let name = &roster.get(key).name;
        let quarantined = roster.standing(key) == Standing::Quarantined;
        if seat.role == Role::Origin && quarantined {
            assert!(!forest.contains(key), "{name} is a quarantined origin in the tree");
            return;
        }
        let children = forest.children(key);
        assert_eq!(forest.origins().contains(&key), seat.role == Role::Origin, "{name} is a root or not");
        if seat.role == Role::Relay {
            assert!(children.len() <= self.shape.fan_out() as usize, "{name} has too many children");
            assert!(seat.home == stripe || children.is_empty(), "{name} serves in two stripes");
            assert!(!quarantined || children.is_empty(), "{name} serves in quarantine");
        }
        if forest.excess(key) > 0 && stage == Stage::Planning {
            let open = forest.best_open(key, |_| true).filter(|&place| forest.is_rooted(place));
            let movable = |place: Key| {
                let mut ways = children.iter().filter(|&&c| !forest.is_within(place, c));
                ways.any(|&child| !roster.avoids(child, place))
            };
            assert!(!open.is_some_and(movable), "{name} is overloaded for no reason");
        }
        let top = forest.upwards(key).last().unwrap();
        if !forest.origins().is_empty() {
            assert!(forest.is_rooted(key) || forest.is_waiting(top), "{name} has no way to an origin");
        }
        if seat.held || forest.is_waiting(key) {
            return;
        }
        let peers = self.peers(roster, stripe, key);
        for (at, &peer) in peers.iter().enumerate() {
            let order = |key: Key| (forest.rank(key), &roster.get(key).name);
            assert!(order(peer) < order(key), "{name} lists one that is not before it");
            assert!(!peers[..at].contains(&peer), "{name} lists one twice");
            assert_ne!(roster.standing(peer), Standing::Quarantined, "{name} lists a liar");
        }
        if forest.is_rooted(key) && seat.role == Role::Relay {
            assert!(peers.first() == Some(&top) || peers.last() == Some(&top), "{name}: no last resort");
        }
    }
}
