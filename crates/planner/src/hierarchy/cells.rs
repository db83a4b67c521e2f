//! The cells of a hierarchy: how each hangs in the plan of all, as a guest of another.
//!
//! The plan of the cells says per stripe which cell is another one's *host*; the host's own plan says below
//! which of its nodes the guest hangs; the guest's plan says which of its nodes is the gateway. So a gateway's
//! parent follows from three plans, and [`Hierarchy::settle`] keeps them in step.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::plan::{Kind, Plan};
use super::{Hierarchy, Stage};
use crate::forest::Key;
use crate::location::Scope;
use crate::roster::Roster;
use crate::{Role, Shape, Standing};

/// Nodes that are near each other, for one image.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) scope: Scope,
    pub(super) plan: Plan,
    /// Per stripe: the cell below which this one hangs.
    pub(super) hosts: Vec<Option<Key>>,
    /// Per stripe: the origin above it.
    pub(super) tops: Vec<Option<Key>>,
}

/// A cell passes on no more than it receives: it has as many other cells below it as there are stripes. With
/// one stripe this would be a chain, so there it passes on twice as much.
pub(super) fn shape_of_world(shape: Shape) -> Shape {
    let stripes = shape.stripes();
    Shape::new(stripes.max(2).min(shape.fan_out()), stripes).expect("no more stripes than children")
}

impl Hierarchy {
    /// The cell of this name, which may be new. While nodes report, a new one waits for the reports of those
    /// that it hangs below.
    pub(super) fn cell_for(&mut self, scope: &Scope, stage: Stage) -> Key {
        if let Some(&cell) = self.by_scope.get(scope) {
            return cell;
        }
        let key = Key::of_cell(self.cells_ever);
        self.cells_ever += 1;
        let none = vec![None; self.stripes()];
        let mut plan = Plan::new(self.shape);
        plan.add(Key::OUTSIDE, Kind::Root, Standing::Good, [Scope::everywhere()].into());
        let cell = Cell { scope: scope.clone(), plan, hosts: none.clone(), tops: none };
        self.cells.insert(key, cell);
        self.by_scope.insert(scope.clone(), key);
        let around: Arc<[Scope]> = scope.around_cell().into();
        self.world_unsettled = true;
        self.world.add(key, Kind::Relay, Standing::Good, around);
        if stage == Stage::Learning {
            (0..self.stripes()).for_each(|stripe| self.world.forest_mut(stripe).await_parent(key));
        }
        key
    }

    /// The plan of a cell, to be changed.
    pub(super) fn plan_mut(&mut self, cell: Key) -> &mut Plan {
        self.unsettled.insert(cell);
        &mut self.cells.get_mut(&cell).expect("a seat's cell exists, and so does a guest's host").plan
    }

    /// Nodes of the cell came, went or changed their standing: it may be a root or none now, or empty.
    pub(super) fn review_cell(&mut self, roster: &Roster, key: Key) {
        let plan = self.plan_mut(key);
        let has_nodes = plan.nodes().next().is_some();
        let has_origin = plan.forest(0).origins().iter().any(|root| root.is_node());
        if has_origin {
            plan.remove(roster, Key::OUTSIDE);
        } else if !plan.contains(Key::OUTSIDE) {
            plan.add(Key::OUTSIDE, Kind::Root, Standing::Good, [Scope::everywhere()].into());
        }
        let lends = plan.nodes().any(|node| plan.standing(node) == Some(Standing::Good));
        if !has_nodes && !self.seats.values().any(|seat| seat.cell == key) {
            return self.drop_cell(roster, key);
        }
        let kind = if has_origin { Kind::Root } else { Kind::Relay };
        if self.world.kind(key) != Some(kind) {
            self.world_unsettled = true;
            self.world.set_kind(key, kind);
        }
        let standing = if lends { Standing::Good } else { Standing::Suspect };
        if self.world.standing(key) != Some(standing) {
            self.world_unsettled = true;
            self.world.set_standing(roster, key, standing);
        }
    }

    fn drop_cell(&mut self, roster: &Roster, key: Key) {
        self.world_unsettled = true;
        self.world.remove(roster, key);
        let Some(cell) = self.cells.remove(&key) else { return };
        self.by_scope.remove(&cell.scope);
        self.unsettled.remove(&key);
        self.stirred.remove(&key);
        for guest in cell.plan.guests() {
            if let Some(guest) = self.cells.get_mut(&guest) {
                let gone = guest.hosts.iter_mut().filter(|host| **host == Some(key));
                gone.for_each(|host| *host = None);
            }
        }
        for (stripe, host) in cell.hosts.into_iter().enumerate() {
            if let Some(host) = host.filter(|host| self.cells.contains_key(host)) {
                self.plan_mut(host).remove_guest(roster, stripe, key);
            }
        }
    }

    /// Gives everybody a place who lacks one and can have one, within the cells and among them, and takes
    /// children from overloaded roots where there is room elsewhere.
    pub(crate) fn settle(&mut self, roster: &Roster, stage: Stage) {
        self.settle_cells(roster, stage);
        if std::mem::take(&mut self.world_unsettled) {
            self.world.settle(roster, stage);
            self.world.take_moved();
        }
        for stripe in 0..self.stripes() {
            for cell in self.world.forest_mut(stripe).take_changed() {
                self.follow(roster, stripe, cell);
            }
        }
        self.settle_cells(roster, stage);
    }

    fn settle_cells(&mut self, roster: &Roster, stage: Stage) {
        while let Some(key) = self.unsettled.pop_first() {
            let Some(cell) = self.cells.get_mut(&key) else { continue };
            self.stirred.insert(key);
            cell.plan.settle(roster, stage);
            for stripe in 0..cell.hosts.len() {
                let forest = cell.plan.forest(stripe);
                let enters = forest.contains(Key::OUTSIDE) && !forest.children(Key::OUTSIDE).is_empty();
                if enters && cell.hosts[stripe].is_none() {
                    // Nobody has reported its place, so it gets one.
                    let forest = self.world.forest_mut(stripe);
                    if forest.is_waiting(key) {
                        forest.orphan(key);
                        self.world_unsettled = true;
                    }
                }
            }
            for (stripe, unit) in cell.plan.take_moved() {
                let node = if unit.is_node() { Some(unit) } else { self.gateway(stripe, unit) };
                node.into_iter().for_each(|node| self.unhold(node));
            }
        }
    }

    /// Makes the cell a guest where the plan of the cells has it now.
    fn follow(&mut self, roster: &Roster, stripe: usize, key: Key) {
        let host = self.world.forest(stripe).parent(key);
        let Some(cell) = self.cells.get_mut(&key) else { return };
        let former = std::mem::replace(&mut cell.hosts[stripe], host);
        let gateway = self.gateway(stripe, key);
        if former != host {
            if let Some(former) = former.filter(|former| self.cells.contains_key(former)) {
                self.plan_mut(former).remove_guest(roster, stripe, key);
            }
            if let Some(host) = host {
                let plan = self.plan_mut(host);
                plan.add_guest(stripe, key, [Scope::everywhere()].into());
                plan.set_face(stripe, key, gateway);
            }
            gateway.into_iter().for_each(|node| self.unhold(node));
        }
        self.retopped.insert((stripe, key));
        self.mark_gateway(stripe, key);
    }

    /// Finds whose list of peers may have changed.
    pub(super) fn collect_changes(&mut self) {
        let mut entered = BTreeSet::new();
        while let Some(key) = self.stirred.pop_first() {
            for stripe in 0..self.stripes() {
                let Some(cell) = self.cells.get_mut(&key) else { break };
                let changed = cell.plan.forest_mut(stripe).take_changed();
                let gateway = self.gateway(stripe, key);
                let host = self.cells[&key].hosts[stripe];
                if let Some(host) = host.and_then(|host| self.cells.get_mut(&host).map(|cell| (host, cell)))
                    && (host.1.plan.face(stripe, key) != gateway
                        || gateway.is_some_and(|gateway| changed.contains(&gateway)))
                {
                    host.1.plan.set_face(stripe, key, gateway);
                    host.1.plan.forest_mut(stripe).mark_around(key);
                    self.stirred.insert(host.0);
                    entered.insert((stripe, key));
                }
                for unit in changed {
                    if unit.is_node() {
                        self.changed.insert((unit, stripe));
                    } else if unit != Key::OUTSIDE {
                        entered.insert((stripe, unit));
                    }
                }
            }
        }
        for (stripe, key) in entered {
            self.mark_entry(stripe, key);
        }
        if self.serving_origins().is_empty() {
            // Those without a parent ask each other.
            for stripe in 0..self.stripes() {
                let entered = self.cells.values().map(|cell| cell.plan.forest(stripe));
                let entered = entered.filter(|forest| forest.contains(Key::OUTSIDE));
                let nodes =
                    entered.flat_map(|forest| forest.children(Key::OUTSIDE)).filter(|key| key.is_node());
                self.changed.extend(nodes.map(|&node| (node, stripe)));
            }
        }
        for (stripe, key) in std::mem::take(&mut self.retopped) {
            if !self.cells.contains_key(&key) {
                continue;
            }
            let top = self.find_top(stripe, key);
            if let Some(cell) = self.cells.get_mut(&key).filter(|cell| cell.tops[stripe] != top) {
                cell.tops[stripe] = top;
                self.changed.extend(cell.plan.nodes().map(|node| (node, stripe)));
            }
        }
    }

    /// The way into the cell changed: its gateway has other peers, and so have those below it.
    fn mark_entry(&mut self, stripe: usize, key: Key) {
        let Some(host) = self.cells.get(&key).and_then(|cell| cell.hosts[stripe]) else { return };
        if self.cells[&key].tops[stripe] != self.root_above(stripe, host, key) {
            // It has come under another origin, with all that is below it.
            let below = self.world.forest(stripe).subtree(key);
            self.retopped.extend(below.into_iter().map(|below| (stripe, below)));
        }
        let parent = self.cells[&host].plan.forest(stripe).parent(key).filter(|parent| parent.is_node());
        if let Some(cell) = self.cells.get_mut(&key) {
            cell.plan.set_face(stripe, Key::OUTSIDE, parent);
        }
        self.mark_gateway(stripe, key);
    }

    fn mark_gateway(&mut self, stripe: usize, key: Key) {
        if let Some(gateway) = self.gateway(stripe, key) {
            let listing = self.children_in(stripe, gateway).into_iter().chain([gateway]);
            self.changed.extend(listing.map(|node| (node, stripe)));
        }
    }

    /// Who fetches into the cell from outside.
    pub(super) fn gateway(&self, stripe: usize, cell: Key) -> Option<Key> {
        let forest = self.cells.get(&cell)?.plan.forest(stripe);
        if !forest.contains(Key::OUTSIDE) {
            return None;
        }
        forest.children(Key::OUTSIDE).first().copied().filter(|first| first.is_node())
    }

    /// Whether a node of this role may be asked by all: not one that is kept out of the trees.
    pub(super) fn is_planted(&self, key: Key) -> bool {
        let seat = &self.seats[&key];
        seat.role == Role::Relay || self.cells[&seat.cell].plan.contains(key)
    }
}
