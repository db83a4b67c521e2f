//! Which place a unit gets, who takes over from one that leaves, and how trees stay shallow.
//!
//! Nothing here moves more than a few units: a subtree that moves stays in one piece, and only its top gets
//! another parent. All searches end after [`CANDIDATES_MAX`] units that avoid each other.

use std::cmp::Reverse;

use super::plan::{Kind, Plan};
use crate::Standing;
use crate::forest::Key;
use crate::membership::Membership;

/// Moves upwards in one stripe per tick. Few, because each costs a node its connections: depth is worth a
/// little latency, haste is not.
const PROMOTIONS_PER_TICK_MAX: usize = 8;

/// Candidates that are looked at before a search for a stand-in is given up; those who avoid each other
/// are rare, and giving up only costs depth.
const CANDIDATES_MAX: usize = 16;

/// Loans that are looked at per event. There are few, and those that are left are looked at next time.
const REPAYS_MAX: usize = 64;

/// Levels that a graft must win: less is not worth moving two others.
const GRAFT_GAIN_MIN: u32 = 2;

impl Plan {
    /// Makes the trees a little shallower: the deepest leaves move to where there is room, if that wins at
    /// least two levels; the deepest that serve change places with higher ones that never will.
    pub(super) fn promote(&mut self, members: &Membership) {
        self.repay(members);
        for stripe in 0..self.forests.len() {
            self.promote_guests(members, stripe);
            for _ in 0..PROMOTIONS_PER_TICK_MAX {
                let Some(leaf) = self.forests[stripe].leaves_upwards().next() else { break };
                if !self.promote_leaf(members, stripe, leaf) && !self.promote_parent(members, stripe, leaf) {
                    break;
                }
            }
        }
    }

    /// Guests change places with leaves above them: below a guest there is a whole rack.
    fn promote_guests(&mut self, members: &Membership, stripe: usize) {
        let guests = self.units.iter().rev().take_while(|(key, _)| !key.is_node());
        let guests: Vec<Key> =
            guests.map(|(&key, _)| key).filter(|&k| self.forests[stripe].contains(k)).collect();
        for guest in guests.into_iter().filter(|guest| *guest != Key::OUTSIDE) {
            self.change_places(members, stripe, guest);
        }
    }

    fn promote_leaf(&mut self, members: &Membership, stripe: usize, leaf: Key) -> bool {
        let forest = &self.forests[stripe];
        let fits = |place: Key| place != leaf && !self.avoids(members, stripe, leaf, place);
        let wins = |place: &Key| forest.rank(*place) + 2 < forest.rank(leaf);
        let Some(place) = forest.best_open(leaf, fits).filter(wins) else { return false };
        self.unhang(stripe, leaf);
        self.hang(stripe, leaf, place);
        true
    }

    fn promote_parent(&mut self, members: &Membership, stripe: usize, leaf: Key) -> bool {
        let forest = &self.forests[stripe];
        forest.parent(leaf).is_some_and(|low| self.change_places(members, stripe, low))
    }

    /// Lets a unit change places with a leaf above it that never serves. Whether there is one.
    fn change_places(&mut self, members: &Membership, stripe: usize, low: Key) -> bool {
        let forest = &self.forests[stripe];
        let Some(above_low) = forest.parent(low) else { return false };
        let higher = |idle: &Key| forest.rank(*idle) < forest.rank(low);
        let swap = |idle: Key| {
            let above_idle = forest.parent(idle)?;
            let serves = [above_low, above_idle].map(|above| self.slots(above, stripe) > 0);
            let fits = serves == [true; 2]
                && forest.excess(above_low) + forest.excess(above_idle) == 0
                && !self.avoids(members, stripe, low, above_idle)
                && !self.avoids(members, stripe, idle, above_low);
            fits.then_some((idle, above_idle))
        };
        let found = self.idle_downwards(stripe).take(CANDIDATES_MAX).take_while(higher).find_map(swap);
        let Some((idle, above_idle)) = found else { return false };
        self.unhang(stripe, low);
        self.unhang(stripe, idle);
        self.hang(stripe, low, above_idle);
        self.hang(stripe, idle, above_low);
        true
    }

    /// The best open place for an orphan. In a plan without a root only an orphan that serves nobody joins one
    /// that does, and the others stay as they are: when the root is back, all is as it was.
    pub(super) fn open_place(&self, members: &Membership, stripe: usize, orphan: Key) -> Option<Key> {
        let forest = &self.forests[stripe];
        let fits = |place: Key| place != orphan && !self.avoids(members, stripe, orphan, place);
        if forest.origins().is_empty() {
            return forest.best_open(orphan, fits).filter(|_| forest.children(orphan).is_empty());
        }
        forest.best_open(orphan, fits).filter(|&place| forest.is_rooted(place))
    }

    /// A place for an orphan where none is open: one that is lent from another stripe, or a root beyond its
    /// only child, at last even one that the orphan avoids.
    pub(super) fn other_place(&mut self, members: &Membership, stripe: usize, orphan: Key) -> Option<Key> {
        if self.forests[stripe].origins().is_empty() {
            return None;
        }
        self.lend(members, stripe, orphan).or_else(|| {
            let forest = &self.forests[stripe];
            let load = |&&root: &&Key| {
                (self.avoids(members, stripe, orphan, root), forest.children(root).len(), root)
            };
            forest.origins().iter().min_by_key(load).copied()
        })
    }

    /// The leaf that has to yield its place to an orphan whose home this is: one that never serves here, and
    /// hangs higher than the orphan otherwise would. Else leaves of other stripes would fill the top of the
    /// tree, and with as many stripes as children its depth would grow with the number of units.
    pub(super) fn idle_above(
        &self,
        members: &Membership,
        stripe: usize,
        orphan: Key,
        open: Option<Key>,
    ) -> Option<Key> {
        let forest = &self.forests[stripe];
        let unit = &self.units[&orphan];
        // Below a guest there is a whole rack.
        let serves = unit.kind == Kind::Guest || unit.home == stripe && self.slots(orphan, stripe) > 0;
        if !serves {
            return None;
        }
        let higher = |idle: &Key| open.is_none_or(|place| forest.rank(*idle) <= forest.rank(place));
        let fits = |idle: &Key| {
            forest.parent(*idle).is_some_and(|parent| {
                self.slots(parent, stripe) > 0
                    && forest.excess(parent) == 0
                    && !self.avoids(members, stripe, orphan, parent)
            })
        };
        self.idle_downwards(stripe).take(CANDIDATES_MAX).take_while(higher).find(fits)
    }

    /// The leaves that never serve, shallowest first.
    fn idle_downwards(&self, stripe: usize) -> impl Iterator<Item = Key> {
        let idle = self.forests[stripe].idle_downwards();
        idle.filter(|idle| self.units[idle].kind != Kind::Guest)
    }

    /// Where a high subtree is to hang that would double the depth of the tree at the open `place`: a leaf
    /// is put in above a branch of equal height, and takes that branch and the orphan as its children. So
    /// two nodes move besides the orphan, and the tree grows by one level.
    pub(super) fn graft(
        &mut self,
        members: &Membership,
        stripe: usize,
        orphan: Key,
        place: Key,
    ) -> Option<Key> {
        let forest = &self.forests[stripe];
        let up = forest.height(orphan).min(forest.depth(place).saturating_sub(1));
        if up < GRAFT_GAIN_MIN || !forest.is_rooted(place) {
            return None;
        }
        let branch = forest.upwards(place).nth(up as usize)?;
        let above = forest.parent(branch)?;
        if self.slots(above, stripe) == 0 || forest.excess(above) > 0 {
            return None;
        }
        let fits = |leaf: &Key| {
            let avoids = [(*leaf, above), (branch, *leaf), (orphan, *leaf)];
            forest.room(*leaf) >= 2
                && *leaf != branch
                && !avoids.iter().any(|pair| self.avoids(members, stripe, pair.0, pair.1))
        };
        let joint = forest.spares_upwards(place).take(CANDIDATES_MAX).find(fits)?;
        self.unhang(stripe, joint);
        self.unhang(stripe, branch);
        self.hang(stripe, joint, above);
        self.hang(stripe, branch, joint);
        Some(joint)
    }

    /// Gives this stripe a place for `child` that was another stripe's: a whole home if that has plenty, or
    /// else one slot, from the one with the most room.
    fn lend(&mut self, members: &Membership, stripe: usize, child: Key) -> Option<Key> {
        let mut donors: Vec<usize> = (0..self.forests.len())
            .filter(|&donor| donor != stripe && self.forests[donor].free() > 0)
            .collect();
        donors.sort_by_key(|&donor| Reverse(self.forests[donor].free()));
        // What is left must hold the children and at least one newcomer.
        let plenty = |&&donor: &&usize| self.forests[donor].free() > self.shape.fan_out() as usize;
        if let Some(&rich) = donors.first().filter(plenty)
            && let Some(spare) = self.open_spare(members, stripe, child, rich)
        {
            return Some(spare);
        }
        for donor in donors {
            let forest = &self.forests[stripe];
            let lenders = self.forests[donor].open_upwards().take(CANDIDATES_MAX);
            let fits = lenders.filter(|&unit| self.can_take(members, stripe, child, unit));
            if let Some(lender) = fits.max_by_key(|&unit| (forest.rank(unit), unit)) {
                self.shift(lender, donor, stripe);
                return Some(lender);
            }
        }
        None
    }

    /// Makes this stripe the home of a unit from a richer one; the children that it has there, if any, go to
    /// its neighbours. It is taken from the bottom, where children are leaves.
    fn open_spare(&mut self, members: &Membership, stripe: usize, child: Key, rich: usize) -> Option<Key> {
        let from = &self.forests[rich];
        let fits = |spare: &Key| {
            let elsewhere = |other: usize| other != rich && !self.forests[other].children(*spare).is_empty();
            self.can_take(members, stripe, child, *spare)
                && from.is_rooted(*spare)
                && !(0..self.forests.len()).any(elsewhere)
        };
        let spare = from.open_upwards().take(CANDIDATES_MAX).find(fits)?;
        for below in from.children(spare).clone() {
            let from = &self.forests[rich];
            let fits =
                |place: Key| !from.is_within(place, spare) && !self.avoids(members, rich, below, place);
            let place = from.best_open(below, fits).filter(|&place| from.is_rooted(place))?;
            self.unhang(rich, below);
            self.hang(rich, below, place);
        }
        self.move_home(spare, stripe).then_some(spare)
    }

    /// Whether `child` could hang below this relay if it had a slot.
    fn can_take(&self, members: &Membership, stripe: usize, child: Key, unit: Key) -> bool {
        let forest = &self.forests[stripe];
        self.units[&unit].kind == Kind::Relay
            && forest.is_rooted(unit)
            && !forest.is_within(unit, child)
            && !self.avoids(members, stripe, child, unit)
    }

    /// Puts lenders below those who serve here at home, gives lent slots back where the stripe has room of
    /// its own by now, and lets no stripe both lend and borrow.
    pub(super) fn repay(&mut self, members: &Membership) {
        for (stripe, lender) in self.loans_due() {
            self.return_idle(stripe, lender);
            if self.is_loan(stripe, lender) {
                self.sink(members, stripe, lender);
                self.repay_one(members, stripe, lender);
            }
            if self.is_loan(stripe, lender) {
                self.pass_on(members, stripe, lender);
            }
        }
    }

    fn loans_due(&self) -> Vec<(usize, Key)> {
        self.loans.iter().copied().take(REPAYS_MAX).collect()
    }

    fn is_loan(&self, stripe: usize, lender: Key) -> bool {
        self.loans.contains(&(stripe, lender)) && self.units[&lender].standing == Standing::Good
    }

    /// Gives back what the lender has lent and nobody uses.
    fn return_idle(&mut self, stripe: usize, lender: Key) {
        while self.loans.contains(&(stripe, lender)) && self.forests[stripe].room(lender) > 0 {
            self.shift(lender, stripe, self.units[&lender].home);
        }
    }

    /// The lender takes a slot back that its home has to borrow from a third stripe; what it had lent is lent
    /// by that one instead. So long chains of loans become short, and rings vanish.
    fn pass_on(&mut self, members: &Membership, stripe: usize, lender: Key) {
        let home = self.units[&lender].home;
        let (at_home, away) = (&self.forests[home], &self.forests[stripe]);
        let Some(&child) = away.children(lender).first() else { return };
        let found =
            self.loans.range((home, Key(0))..(home + 1, Key(0))).take(CANDIDATES_MAX).find_map(|loan| {
                let third = loan.1;
                let fits = |moved: &&Key| {
                    !at_home.is_within(lender, **moved) && !self.avoids(members, home, **moved, lender)
                };
                let moved = at_home.children(third).iter().find(fits)?;
                (third != lender
                    && at_home.is_rooted(lender)
                    && self.units[&third].standing == Standing::Good
                    && self.can_take(members, stripe, child, third))
                .then_some((third, *moved))
            });
        let Some((third, moved)) = found else { return };
        self.unhang(stripe, child);
        self.shift(lender, stripe, home);
        self.unhang(home, moved);
        self.hang(home, moved, lender);
        self.shift(third, home, stripe);
        self.hang(stripe, child, third);
    }

    fn repay_one(&mut self, members: &Membership, stripe: usize, lender: Key) {
        let forest = &self.forests[stripe];
        let lightest = |child: &&Key| (forest.children(**child).len(), **child);
        let Some(&child) = forest.children(lender).iter().min_by_key(lightest) else { return };
        let at_home = |place: Key| self.units[&place].kind == Kind::Root || self.units[&place].home == stripe;
        let fits = |place: Key| {
            at_home(place) && !forest.is_within(place, child) && !self.avoids(members, stripe, child, place)
        };
        let rooted = |place: &Key| forest.is_rooted(*place) && forest.is_rooted(child);
        if let Some(place) = forest.best_open(child, fits).filter(rooted) {
            self.unhang(stripe, child);
            self.hang(stripe, child, place);
            self.shift(lender, stripe, self.units[&lender].home);
        }
    }

    /// Moves a lender below those of its children whose home this is: they take more children, and so the
    /// tree is shallower if they are above.
    fn sink(&mut self, members: &Membership, stripe: usize, lender: Key) {
        for _ in 0..CANDIDATES_MAX {
            let forest = &self.forests[stripe];
            let Some(above) = forest.parent(lender).filter(|&above| self.slots(above, stripe) > 0) else {
                return;
            };
            let fits = |child: &&Key| {
                let unit = &self.units[child];
                unit.kind == Kind::Relay
                    && unit.home == stripe
                    && self.slots(**child, stripe) > 1
                    && !self.avoids(members, stripe, **child, above)
                    && !self.avoids(members, stripe, lender, **child)
            };
            let Some(&child) = forest.children(lender).iter().find(fits) else { return };
            if forest.excess(above) > 0 {
                return;
            }
            // The lender has room for one as soon as the child is above it.
            let below = forest.children(child).first().copied().filter(|_| forest.room(child) == 0);
            self.unhang(stripe, child);
            self.unhang(stripe, lender);
            if let Some(below) = below {
                self.unhang(stripe, below);
                self.hang(stripe, below, lender);
            }
            self.hang(stripe, child, above);
            self.hang(stripe, lender, child);
        }
    }

    /// Moves children of an overloaded root to where there is room.
    pub(super) fn relieve(&mut self, members: &Membership, stripe: usize, root: Key) {
        for _ in 0..self.forests[stripe].excess(root) {
            let forest = &self.forests[stripe];
            let mut children: Vec<Key> = forest.children(root).iter().copied().collect();
            children.sort_by_key(|&child| (forest.children(child).len(), Reverse(child)));
            let found = children.into_iter().take(CANDIDATES_MAX).find_map(|child| {
                let forest = &self.forests[stripe];
                let fits = |place: Key| {
                    !forest.is_within(place, child) && !self.avoids(members, stripe, child, place)
                };
                let open = forest.best_open(child, fits).filter(|&place| forest.is_rooted(place));
                Some((child, open.or_else(|| self.lend(members, stripe, child))?))
            });
            let Some((child, place)) = found else { return };
            self.unhang(stripe, child);
            self.hang(stripe, child, place);
        }
    }

    /// Takes a unit out of a tree. Its place and its children go to a stand-in: a child that has room for
    /// its siblings, so that nobody else moves, or else the deepest leaf. If there is none, as under a
    /// root, the children are orphans.
    pub(super) fn vacate(&mut self, members: &Membership, stripe: usize, key: Key) {
        let stand_in = self.stand_in(members, stripe, key);
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
            if !self.avoids(members, stripe, child, stand_in) {
                self.hang(stripe, child, stand_in);
            }
        }
    }

    fn stand_in(&self, members: &Membership, stripe: usize, key: Key) -> Option<Key> {
        let forest = &self.forests[stripe];
        let children = forest.children(key);
        if children.is_empty() || forest.origins().contains(&key) || forest.is_waiting(key) {
            return None;
        }
        let parent = forest.parent(key);
        let no_room = |parent| self.slots(parent, stripe) == 0 || forest.excess(parent) > 0;
        if parent.is_some_and(no_room) {
            return None;
        }
        let may_follow =
            |stand_in: Key| parent.is_none_or(|parent| !self.avoids(members, stripe, stand_in, parent));
        let roomy = |child: &&Key| forest.room(**child) + 1 >= children.len() && may_follow(**child);
        let deepest = || {
            let deeper = |leaf: &Key| forest.rank(*leaf) > forest.rank(key);
            let fits = |leaf: &Key| forest.room(*leaf) >= children.len() && may_follow(*leaf);
            forest.spares_upwards(key).take(CANDIDATES_MAX).take_while(deeper).find(fits)
        };
        children.iter().find(roomy).copied().or_else(deepest)
    }
}
