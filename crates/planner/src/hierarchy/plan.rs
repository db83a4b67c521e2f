//! The trees of one group of units, a tree per stripe: how many children each may have in which stripe.
//!
//! A unit is whatever hangs in a tree: a node in its rack, or a rack among the racks; see [`Kind`]. Which,
//! the plan does not know.
//!
//! Invariants, after [`Plan::settle`]:
//! - A root has one child per stripe. It may have more only while no other place is to be had.
//! - A relay has at most `fan_out` children in all stripes together. They are in one stripe, its *home*,
//!   but for *loans*: where another stripe is short of places, single slots are lent to it, and paid back
//!   as soon as that stripe has room of its own. With as many children as stripes the places are exactly
//!   enough; without loans a number of relays that is not a multiple of the stripes would overload the root.
//! - A guest has no children.
//! - Each unit hangs below a root, if the plan has one; except those whose parent is expected to report.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Stage;
use crate::forest::{Key, Root, StripeForest};
use crate::location::Scope;
use crate::membership::Membership;
use crate::{Shape, Standing};

/// What a unit is in its plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It needs no parent.
    Root,
    /// It needs a parent in each stripe, and serves.
    Relay,
    /// It needs a parent in one stripe, and serves nobody here.
    Guest,
}

#[derive(Debug)]
pub(super) struct Unit {
    pub(super) kind: Kind,
    pub(super) standing: Standing,
    /// The stripe in which a relay has most of its slots.
    pub(super) home: usize,
    /// Children that a relay may have, per stripe; `fan_out` in all.
    pub(super) slots: Vec<u32>,
    scopes: Arc<[Scope]>,
}

#[derive(Debug)]
pub(crate) struct Plan {
    pub(super) shape: Shape,
    pub(super) forests: Vec<StripeForest>,
    pub(super) units: BTreeMap<Key, Unit>,
    /// Slots that are not in their unit's home, by stripe.
    pub(super) loans: BTreeSet<(usize, Key)>,
    /// Which node a unit that is none stands for, per stripe: whom one must be able to reach.
    pub(super) faces: BTreeMap<(usize, Key), Key>,
    /// Whether units came, went or changed their standing since loans were looked at.
    changed: bool,
    /// Who got or lost a parent since the last call of [`Plan::take_moved`].
    pub(super) moved: BTreeSet<(usize, Key)>,
}

impl Plan {
    pub(super) fn new(shape: Shape) -> Plan {
        Plan {
            shape,
            forests: (0..shape.stripes()).map(|_| StripeForest::default()).collect(),
            units: BTreeMap::new(),
            loans: BTreeSet::new(),
            faces: BTreeMap::new(),
            changed: false,
            moved: BTreeSet::new(),
        }
    }

    /// Adds a root or a relay, without a parent. A relay's home is the stripe that has the least room of its
    /// own: as if all loans were paid back.
    pub(super) fn add(&mut self, key: Key, kind: Kind, standing: Standing, scopes: Arc<[Scope]>) {
        let (mut lent, mut borrowed) = (vec![0; self.forests.len()], vec![0; self.forests.len()]);
        for &(stripe, lender) in &self.loans {
            let unit = &self.units[&lender];
            lent[unit.home] += unit.slots[stripe] as usize;
            borrowed[stripe] += unit.slots[stripe] as usize;
        }
        // Room can be less than what is borrowed; the constant keeps the difference above zero.
        let borrowed_max: usize = borrowed.iter().sum();
        let room =
            |&stripe: &usize| self.forests[stripe].free() + lent[stripe] + borrowed_max - borrowed[stripe];
        let home = (0..self.forests.len()).min_by_key(room).unwrap_or(0);
        let mut slots = vec![0; self.forests.len()];
        slots[home] = self.shape.fan_out();
        self.units.insert(key, Unit { kind, standing, home, slots, scopes });
        (0..self.forests.len()).for_each(|stripe| self.plant(stripe, key));
        self.changed = true;
    }

    /// Adds a guest to one stripe, without a parent.
    pub(super) fn add_guest(&mut self, stripe: usize, key: Key, scopes: Arc<[Scope]>) {
        let slots = vec![0; self.forests.len()];
        let unit = Unit { kind: Kind::Guest, standing: Standing::Good, home: stripe, slots, scopes };
        self.units.entry(key).or_insert(unit);
        self.changed = true;
        self.plant(stripe, key);
    }

    /// Makes a relay a root or a root a relay; its children stay.
    pub(super) fn set_kind(&mut self, key: Key, kind: Kind) {
        let Some(unit) = self.units.get_mut(&key).filter(|unit| unit.kind != kind) else { return };
        unit.kind = kind;
        for stripe in 0..self.forests.len() {
            match kind {
                Kind::Root => self.forests[stripe].crown(key),
                Kind::Relay | Kind::Guest => self.forests[stripe].uncrown(key),
            }
        }
        if kind == Kind::Relay {
            self.keep_children(key);
        }
        self.apply_slots(key);
    }

    /// Takes a unit out; its children get other parents.
    pub(super) fn remove(&mut self, members: &Membership, key: Key) {
        for stripe in 0..self.forests.len() {
            if self.forests[stripe].contains(key) {
                self.vacate(members, stripe, key);
            }
        }
        self.forget(key);
    }

    /// Takes a guest out of one stripe.
    pub(super) fn remove_guest(&mut self, members: &Membership, stripe: usize, key: Key) {
        if self.forests[stripe].contains(key) {
            self.vacate(members, stripe, key);
        }
        self.faces.remove(&(stripe, key));
        if !self.forests.iter().any(|forest| forest.contains(key)) {
            self.forget(key);
        }
    }

    /// Sets how a unit is trusted. One that is quarantined loses its children.
    pub(super) fn set_standing(&mut self, members: &Membership, key: Key, standing: Standing) {
        let Some(unit) = self.units.get_mut(&key) else { return };
        unit.standing = standing;
        self.changed = true;
        for stripe in 0..self.forests.len() {
            self.forests[stripe].mark_around(key);
            let slots = self.slots(key, stripe);
            if standing == Standing::Quarantined && !self.forests[stripe].children(key).is_empty() {
                self.vacate(members, stripe, key);
                self.plant(stripe, key);
                self.moved.insert((stripe, key));
            } else {
                self.forests[stripe].set_slots(key, slots);
            }
        }
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        self.units.contains_key(&key)
    }

    pub(super) fn kind(&self, key: Key) -> Option<Kind> {
        self.units.get(&key).map(|unit| unit.kind)
    }

    pub(super) fn standing(&self, key: Key) -> Option<Standing> {
        self.units.get(&key).map(|unit| unit.standing)
    }

    /// The units that are nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = Key> {
        self.units.keys().copied().filter(|key| key.is_node())
    }

    /// The racks that are guests here.
    pub(super) fn guests(&self) -> impl Iterator<Item = Key> {
        let others = self.units.keys().copied().filter(|key| !key.is_node());
        others.filter(|&key| key != Key::OUTSIDE)
    }

    pub(super) fn forest(&self, stripe: usize) -> &StripeForest {
        &self.forests[stripe]
    }

    pub(super) fn forest_mut(&mut self, stripe: usize) -> &mut StripeForest {
        &mut self.forests[stripe]
    }

    /// Says which node a unit that is none stands for in a stripe.
    pub(super) fn set_face(&mut self, stripe: usize, key: Key, face: Option<Key>) {
        match face {
            Some(face) => self.faces.insert((stripe, key), face),
            None => self.faces.remove(&(stripe, key)),
        };
    }

    /// Which node a unit that is none stands for in a stripe.
    pub(super) fn face(&self, stripe: usize, key: Key) -> Option<Key> {
        self.faces.get(&(stripe, key)).copied()
    }

    /// Who got or lost a parent since the last call, per stripe.
    pub(super) fn take_moved(&mut self) -> BTreeSet<(usize, Key)> {
        std::mem::take(&mut self.moved)
    }

    /// Gives every unit a place that lacks one and can have one, and takes children from overloaded roots
    /// where there is room elsewhere.
    pub(super) fn settle(&mut self, members: &Membership, stage: Stage) {
        for stripe in 0..self.forests.len() {
            // The youngest first, so that without a root the newcomer joins those that hold chunks.
            let mut orphans: Vec<Key> = self.forests[stripe].orphans().iter().copied().collect();
            while let Some(orphan) = orphans.pop() {
                let open = self.open_place(members, stripe, orphan);
                if let Some(idle) = self.idle_above(members, stripe, orphan, open) {
                    let parent = self.forests[stripe].parent(idle);
                    self.unhang(stripe, idle);
                    parent.into_iter().for_each(|parent| self.hang(stripe, orphan, parent));
                    // It cannot displace anyone in turn.
                    orphans.push(idle);
                } else if let Some(parent) = open.or_else(|| self.other_place(members, stripe, orphan)) {
                    let joint = self.graft(members, stripe, orphan, parent);
                    self.hang(stripe, orphan, joint.unwrap_or(parent));
                }
            }
        }
        if stage == Stage::Planning {
            if std::mem::take(&mut self.changed) {
                self.repay(members);
            }
            for stripe in 0..self.forests.len() {
                let roots: Vec<Key> = self.forests[stripe].origins().iter().copied().collect();
                roots.into_iter().for_each(|root| self.relieve(members, stripe, root));
            }
        }
    }

    /// Children that the unit may have in the stripe.
    pub(super) fn slots(&self, key: Key, stripe: usize) -> u32 {
        let unit = &self.units[&key];
        match unit.kind {
            _ if unit.standing != Standing::Good => 0,
            Kind::Root => 1,
            Kind::Relay => unit.slots[stripe],
            Kind::Guest => 0,
        }
    }

    /// Whether `child` must not be sent to `parent` while there is anyone else.
    pub(super) fn avoids(&self, members: &Membership, stripe: usize, child: Key, parent: Key) -> bool {
        let face = |key: Key| if key.is_node() { Some(key) } else { self.face(stripe, key) };
        face(child).zip(face(parent)).is_some_and(|(child, parent)| members.avoids(child, parent))
    }

    /// Moves one slot of a relay, in which it has no child, to another stripe.
    pub(super) fn shift(&mut self, key: Key, from: usize, to: usize) {
        let Some(unit) = self.units.get_mut(&key).filter(|unit| unit.slots[from] > 0) else { return };
        unit.slots[from] -= 1;
        unit.slots[to] += 1;
        self.apply_slots(key);
    }

    /// Makes a stripe the home of a relay that has no children. Whether it could.
    pub(super) fn move_home(&mut self, key: Key, stripe: usize) -> bool {
        let serves = self.forests.iter().any(|f| f.contains(key) && !f.children(key).is_empty());
        let Some(unit) = self.units.get_mut(&key).filter(|unit| unit.kind == Kind::Relay && !serves) else {
            return false;
        };
        unit.slots.fill(0);
        unit.slots[stripe] = self.shape.fan_out();
        unit.home = stripe;
        self.apply_slots(key);
        true
    }

    /// Whether the child may hang under this parent, which for that may give up a slot in another stripe
    /// where it has no child.
    pub(super) fn can_hang(&mut self, members: &Membership, stripe: usize, child: Key, parent: Key) -> bool {
        let forest = &self.forests[stripe];
        if !forest.contains(parent)
            || forest.is_within(parent, child)
            || self.avoids(members, stripe, child, parent)
        {
            return false;
        }
        if forest.origins().contains(&parent) {
            // A root may be overloaded for good reasons; if not, it is relieved later.
            return true;
        }
        if forest.room(parent) == 0 && !self.move_home(parent, stripe) {
            let roomy = |&other: &usize| other != stripe && self.forests[other].room(parent) > 0;
            let from = (0..self.forests.len()).find(roomy);
            from.into_iter().for_each(|from| self.shift(parent, from, stripe));
        }
        self.forests[stripe].room(parent) > 0
    }

    /// Nobody waits any longer for a parent to report.
    pub(super) fn stop_waiting(&mut self) {
        for forest in &mut self.forests {
            let waiting: Vec<Key> = forest.waiting().iter().copied().collect();
            waiting.into_iter().for_each(|key| forest.orphan(key));
        }
        // What was lent was as likely to be reported first as what was not.
        for key in self.units.keys().copied().collect::<Vec<_>>() {
            self.find_home(key);
        }
    }

    /// Makes the stripe the home of a relay in which it has most children.
    fn find_home(&mut self, key: Key) {
        let children = |stripe: &usize| {
            let forest = &self.forests[*stripe];
            if forest.contains(key) { forest.children(key).len() } else { 0 }
        };
        let Some(home) = (0..self.forests.len()).rev().max_by_key(children) else { return };
        let moves = |unit: &&mut Unit| unit.kind == Kind::Relay && unit.home != home;
        if children(&home) > 0
            && let Some(unit) = self.units.get_mut(&key).filter(moves)
        {
            unit.home = home;
            self.keep_children(key);
            self.apply_slots(key);
        }
    }

    pub(super) fn hang(&mut self, stripe: usize, child: Key, parent: Key) {
        self.moved.insert((stripe, child));
        self.forests[stripe].link(child, parent);
    }

    pub(super) fn unhang(&mut self, stripe: usize, child: Key) {
        self.moved.insert((stripe, child));
        self.forests[stripe].unlink(child);
    }

    /// Gives a relay slots for the children that it has, as far as they go.
    fn keep_children(&mut self, key: Key) {
        let mut left = self.shape.fan_out();
        let mut slots = Vec::new();
        for stripe in 0..self.forests.len() {
            let children = self.forests[stripe].children(key).clone();
            let kept = children.len().min(left as usize);
            children.iter().skip(kept).for_each(|&child| self.unhang(stripe, child));
            let kept = u32::try_from(kept).unwrap_or(left);
            left -= kept;
            slots.push(kept);
        }
        if let Some(unit) = self.units.get_mut(&key) {
            slots[unit.home] += left;
            unit.slots = slots;
        }
    }

    fn plant(&mut self, stripe: usize, key: Key) {
        let unit = &self.units[&key];
        let root = if unit.kind == Kind::Root { Root::Origin } else { Root::Orphan };
        let (slots, scopes) = (self.slots(key, stripe), unit.scopes.clone());
        self.forests[stripe].add(key, root, slots, scopes);
    }

    fn forget(&mut self, key: Key) {
        self.units.remove(&key);
        self.changed = true;
        self.loans.retain(|loan| loan.1 != key);
        self.faces.retain(|at, _| at.1 != key);
    }

    fn apply_slots(&mut self, key: Key) {
        for stripe in 0..self.forests.len() {
            let slots = self.slots(key, stripe);
            self.forests[stripe].set_slots(key, slots);
            let unit = &self.units[&key];
            if stripe != unit.home && unit.slots[stripe] > 0 {
                self.loans.insert((stripe, key));
            } else {
                self.loans.remove(&(stripe, key));
            }
        }
    }
}
