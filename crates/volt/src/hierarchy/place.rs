//! Which place a node gets, who takes over from one that leaves, and how trees stay shallow.
//!
//! Nothing here moves more than a few nodes: a subtree that moves stays in one piece, and only its top is
//! told of another parent. All searches end after [`CANDIDATES_MAX`] nodes that avoid each other.

use std::cmp::Reverse;

use super::{Hierarchy, Stage};
use crate::forest::{Key, Root};
use crate::roster::Roster;
use crate::{Placement, Role, Standing};

/// Moves upwards in one stripe per tick. Few, because each costs a node its connections: depth is worth a
/// little latency, haste is not.
const RISES_PER_TICK_MAX: usize = 8;

/// Candidates that are looked at before a search for a stand-in is given up; those who avoid each other
/// are rare, and giving up only costs depth.
const CANDIDATES_MAX: usize = 16;

/// Levels that a graft must win: less is not worth moving two others.
const GRAFT_GAIN_MIN: u32 = 2;

impl Hierarchy {
    /// Makes the trees a little shallower: the deepest leaves move to where there is room, if that wins at
    /// least two levels; the deepest that serve change places with higher ones that never will.
    pub(crate) fn rise(&mut self, roster: &Roster) {
        for stripe in 0..self.forests.len() {
            for _ in 0..RISES_PER_TICK_MAX {
                let Some(leaf) = self.forests[stripe].leaves_upwards().next() else { break };
                if !self.rise_leaf(roster, stripe, leaf) && !self.rise_parent(roster, stripe, leaf) {
                    break;
                }
            }
        }
    }

    fn rise_leaf(&mut self, roster: &Roster, stripe: usize, leaf: Key) -> bool {
        let forest = &self.forests[stripe];
        let fits = |place: Key| place != leaf && !roster.avoids(leaf, place);
        let wins = |place: &Key| forest.rank(*place) + 2 < forest.rank(leaf);
        let Some(place) = forest.best_open(leaf, fits).filter(wins) else { return false };
        self.unhang(stripe, leaf);
        self.hang(stripe, leaf, place);
        true
    }

    fn rise_parent(&mut self, roster: &Roster, stripe: usize, leaf: Key) -> bool {
        let forest = &self.forests[stripe];
        let Some(low) = forest.parent(leaf) else { return false };
        let Some(above_low) = forest.parent(low) else { return false };
        let higher = |idle: &Key| forest.rank(*idle) < forest.rank(low);
        let swap = |idle: Key| {
            let above_idle = forest.parent(idle)?;
            let serves = [above_low, above_idle].map(|above| self.slots(roster, above, stripe) > 0);
            let fits = serves == [true; 2]
                && forest.excess(above_low) + forest.excess(above_idle) == 0
                && !roster.avoids(low, above_idle)
                && !roster.avoids(idle, above_low);
            fits.then_some((idle, above_idle))
        };
        let found = forest.idle_downwards().take(CANDIDATES_MAX).take_while(higher).find_map(swap);
        let Some((idle, above_idle)) = found else { return false };
        self.unhang(stripe, low);
        self.unhang(stripe, idle);
        self.hang(stripe, low, above_idle);
        self.hang(stripe, idle, above_low);
        true
    }

    /// Children that the node may have in the stripe.
    pub(super) fn slots(&self, roster: &Roster, key: Key, stripe: usize) -> u32 {
        let seat = &self.seats[&key];
        let serves = seat.role == Role::Origin || seat.home == stripe;
        if serves && roster.standing(key) == Standing::Good { self.shape.fan_out() } else { 0 }
    }

    /// Puts a seated node into the trees, without a parent. A quarantined origin is left out: it serves
    /// nobody and needs nobody.
    pub(super) fn plant(&mut self, roster: &Roster, key: Key) {
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
    pub(super) fn adopt(&mut self, roster: &Roster, key: Key, current: &Placement, stage: Stage) {
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
    pub(super) fn welcome(&mut self, roster: &Roster, key: Key) {
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
    pub(super) fn place_for(&mut self, roster: &Roster, stripe: usize, orphan: Key) -> Option<Key> {
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
    pub(super) fn idle_above(
        &self,
        roster: &Roster,
        stripe: usize,
        orphan: Key,
        place: Option<Key>,
    ) -> Option<Key> {
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
    pub(super) fn graft(&mut self, roster: &Roster, stripe: usize, orphan: Key, place: Key) -> Option<Key> {
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
    pub(super) fn relieve(&mut self, roster: &Roster, stripe: usize, origin: Key) {
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
    pub(super) fn vacate(&mut self, roster: &Roster, stripe: usize, key: Key) {
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

    pub(super) fn hang(&mut self, stripe: usize, child: Key, parent: Key) {
        self.unhold(child);
        self.forests[stripe].link(child, parent);
    }

    pub(super) fn unhang(&mut self, stripe: usize, child: Key) {
        self.unhold(child);
        self.forests[stripe].unlink(child);
    }

    pub(super) fn unhold(&mut self, key: Key) {
        if let Some(seat) = self.seats.get_mut(&key) {
            seat.held = false;
        }
    }
}
