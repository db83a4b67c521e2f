//! Places that nodes report, after a restart of Volt: kept as far as they are legal.

use super::plan::Kind;
use super::{Hierarchy, Stage};
use crate::Placement;
use crate::forest::Key;
use crate::membership::Membership;

impl Hierarchy {
    /// Hangs a new relay where it says that it hangs, as far as that is legal.
    pub(super) fn adopt(&mut self, members: &Membership, key: Key, current: &Placement, stage: Stage) {
        let rack = self.seats[&key].rack;
        let mut adopted = 0;
        for (stripe, peers) in current.stripes.iter().enumerate() {
            let Some(parent) = peers.first().map(|peer| &peer.node) else { continue };
            let known = members.key(parent).filter(|parent| self.seats.contains_key(parent));
            match known {
                Some(parent) if self.adopt_under(members, stripe, key, parent) => adopted += 1,
                None if stage == Stage::Learning && *parent != members.get(key).name => {
                    self.plan_mut(rack).forest_mut(stripe).await_parent(key);
                    self.awaited.entry(parent.clone()).or_default().insert((stripe, key));
                    adopted += 1;
                }
                _ => {}
            }
        }
        let held = stage == Stage::Learning && adopted == self.stripes();
        self.has_reports |= held;
        if let Some(seat) = self.seats.get_mut(&key) {
            seat.held = held;
        }
    }

    /// Hangs those under a new node that have been waiting for it; those that may not be its children
    /// wait no longer.
    pub(super) fn welcome(&mut self, members: &Membership, key: Key) {
        for (stripe, child) in self.awaited.remove(&members.get(key).name).unwrap_or_default() {
            if !self.adopt_under(members, stripe, child, key) {
                let rack = self.seats[&child].rack;
                self.plan_mut(rack).forest_mut(stripe).orphan(child);
                self.unhold(child);
            }
        }
    }

    /// Hangs a node without parent under the one that it reports, if that is legal.
    fn adopt_under(&mut self, members: &Membership, stripe: usize, child: Key, parent: Key) -> bool {
        let (rack, host) = (self.seats[&child].rack, self.seats[&parent].rack);
        if rack == host {
            let plan = self.plan_mut(rack);
            let legal = plan.can_hang(members, stripe, child, parent);
            if legal {
                plan.forest_mut(stripe).link(child, parent);
            }
            return legal;
        }
        // The child is its rack's gateway.
        let outside = Key::OUTSIDE;
        let forest = self.racks[&rack].plan.forest(stripe);
        if !forest.contains(outside)
            || !forest.children(outside).is_empty()
            || self.racks[&rack].hosts[stripe].is_some()
            || !self.world.can_hang(members, stripe, rack, host)
        {
            return false;
        }
        let scopes = [crate::location::Scope::everywhere()].into();
        let plan = self.plan_mut(host);
        plan.add_guest(stripe, rack, scopes);
        plan.set_face(stripe, rack, Some(child));
        if !plan.can_hang(members, stripe, rack, parent) || plan.kind(parent) == Some(Kind::Guest) {
            plan.remove_guest(members, stripe, rack);
            return false;
        }
        plan.forest_mut(stripe).link(rack, parent);
        self.world.forest_mut(stripe).link(rack, host);
        let plan = self.plan_mut(rack);
        plan.set_face(stripe, outside, Some(parent));
        plan.forest_mut(stripe).link(child, outside);
        if let Some(rack) = self.racks.get_mut(&rack) {
            rack.hosts[stripe] = Some(host);
        }
        true
    }

    /// What the node reported no longer stands.
    pub(super) fn unhold(&mut self, key: Key) {
        if let Some(seat) = self.seats.get_mut(&key).filter(|seat| seat.held) {
            seat.held = false;
            self.asked.insert(key);
        }
    }
}
