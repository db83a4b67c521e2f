//! Leaving in the order that hurts nobody: from the leaves up.
//!
//! A node that has no use for an image stays in its place while somebody below it has some, but gets no new children.
//! So when all nodes want to leave they go one after the other, and nobody moves for it. Who still serves one that
//! stays when its time is up is taken out like any other, and its children get other parents.
//!
//! With several stripes a node may be above another in one and below it in the next, and perhaps nobody is a leaf in
//! all. So a node does not wait until it has no children, but until all below it want to leave, and goes with them.

use std::collections::BTreeSet;

use super::{Hierarchy, Stage};
use crate::forest::Key;
use crate::membership::Membership;
use crate::{Millis, Role, Standing};

impl Hierarchy {
    /// The node wants to go: when nobody below it wants to stay, and at `by` at the latest. An origin stays.
    pub(crate) fn leave(&mut self, members: &Membership, key: Key, by: Millis, stage: Stage) {
        let Some(seat) = self.seats.get_mut(&key).filter(|seat| seat.role == Role::Relay) else { return };
        if seat.leave_by.is_none() {
            seat.leave_by = Some(by);
            // Children that have yet to report are not new.
            if stage == Stage::Planning {
                self.reassess(members, key);
            }
        }
    }

    /// The node wants to stay after all.
    pub(super) fn stay(&mut self, members: &Membership, key: Key) {
        if self.seats.get_mut(&key).is_some_and(|seat| seat.leave_by.take().is_some()) {
            self.reassess(members, key);
        }
    }

    /// Who wants to go.
    pub(crate) fn leaving(&self) -> Vec<Key> {
        self.seats.iter().filter(|(_, seat)| seat.leave_by.is_some()).map(|(&key, _)| key).collect()
    }

    /// Who may go now that the node may, children before their parents, itself the last; nobody if it may not. While
    /// nodes report, children may have yet to say that they are some.
    ///
    /// Costs a look at everybody below, but ends with the first that wants to stay.
    pub(crate) fn may_leave_with(&self, key: Key, now: Millis, stage: Stage) -> Vec<Key> {
        let leave_by = |key: &Key| self.seats.get(key).and_then(|seat| seat.leave_by);
        match leave_by(&key) {
            None => return Vec::new(),
            Some(by) if by <= now => return vec![key],
            Some(_) if stage == Stage::Learning => return Vec::new(),
            Some(_) => {}
        }
        let mut found = BTreeSet::from([key]);
        let mut leavers = Vec::new();
        let mut path = vec![(key, self.children(key))];
        while let Some((above, children)) = path.last_mut() {
            let Some(child) = children.pop_first() else {
                leavers.push(*above);
                path.pop();
                continue;
            };
            if leave_by(&child).is_none() {
                return Vec::new();
            }
            if found.insert(child) {
                path.push((child, self.children(child)));
            }
        }
        leavers
    }

    /// The node's parents in all stripes.
    pub(crate) fn parents(&self, key: Key) -> BTreeSet<Key> {
        if !self.is_planted(key) {
            return BTreeSet::new();
        }
        (0..self.stripes()).filter_map(|stripe| self.parent(stripe, key)).collect()
    }

    /// How the node is trusted with children of this image.
    pub(super) fn standing(&self, members: &Membership, key: Key) -> Standing {
        match members.standing(key) {
            Standing::Good if self.seats[&key].leave_by.is_some() => Standing::Suspect,
            standing => standing,
        }
    }
}
