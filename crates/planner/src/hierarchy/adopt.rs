//! Places that nodes report, after a restart of Volt: kept as far as they are legal.

use super::plan::Kind;
use super::{Hierarchy, Stage};
use crate::Placement;
use crate::forest::Key;
use crate::roster::Roster;

impl Hierarchy {
    /// Hangs a new relay where it says that it hangs, as far as that is legal.
    pub(super) fn adopt(&mut self, roster: &Roster, key: Key, current: &Placement, stage: Stage) {
        let cell = self.seats[&key].cell;
        let mut adopted = 0;
        for (stripe, peers) in current.stripes.iter().enumerate() {
            let Some(parent) = peers.first().map(|peer| &peer.node) else { continue };
            let known = roster.key(parent).filter(|parent| self.seats.contains_key(parent));
            match known {
                Some(parent) if self.adopt_under(roster, stripe, key, parent) => adopted += 1,
                None if stage == Stage::Learning && *parent != roster.get(key).name => {
                    self.plan_mut(cell).forest_mut(stripe).await_parent(key);
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
    pub(super) fn welcome(&mut self, roster: &Roster, key: Key) {
        for (stripe, child) in self.awaited.remove(&roster.get(key).name).unwrap_or_default() {
            if !self.adopt_under(roster, stripe, child, key) {
                let cell = self.seats[&child].cell;
                self.plan_mut(cell).forest_mut(stripe).orphan(child);
                self.unhold(child);
            }
        }
    }

    /// Hangs a node without parent under the one that it reports, if that is legal.
    fn adopt_under(&mut self, roster: &Roster, stripe: usize, child: Key, parent: Key) -> bool {
        let (cell, host) = (self.seats[&child].cell, self.seats[&parent].cell);
        if cell == host {
            let plan = self.plan_mut(cell);
            let legal = plan.can_hang(roster, stripe, child, parent);
            if legal {
                plan.forest_mut(stripe).link(child, parent);
            }
            return legal;
        }
        // The child is its cell's gateway.
        let outside = Key::OUTSIDE;
        let forest = self.cells[&cell].plan.forest(stripe);
        if !forest.contains(outside)
            || !forest.children(outside).is_empty()
            || self.cells[&cell].hosts[stripe].is_some()
            || !self.world.can_hang(roster, stripe, cell, host)
        {
            return false;
        }
        let scopes = [crate::location::Scope::everywhere()].into();
        let plan = self.plan_mut(host);
        plan.add_guest(stripe, cell, scopes);
        plan.set_face(stripe, cell, Some(child));
        if !plan.can_hang(roster, stripe, cell, parent) || plan.kind(parent) == Some(Kind::Guest) {
            plan.remove_guest(roster, stripe, cell);
            return false;
        }
        plan.forest_mut(stripe).link(cell, parent);
        self.world.forest_mut(stripe).link(cell, host);
        let plan = self.plan_mut(cell);
        plan.set_face(stripe, outside, Some(parent));
        plan.forest_mut(stripe).link(child, outside);
        if let Some(cell) = self.cells.get_mut(&cell) {
            cell.hosts[stripe] = Some(host);
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
