//! The racks of a hierarchy: how each hangs in the plan of all, as a guest of another.
//!
//! The plan of the racks says per stripe which rack is another one's *host*; the host's own plan says below
//! which of its nodes the guest hangs; the guest's plan says which of its nodes is the gateway. So a gateway's
//! parent follows from three plans, and [`Hierarchy::settle`] keeps them in step.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::plan::{Kind, Plan};
use super::{Hierarchy, Stage};
use crate::forest::Key;
use crate::location::Scope;
use crate::membership::Membership;
use crate::{Role, Shape, Standing};

/// Nodes that are near each other, for one image.
#[derive(Debug)]
pub(super) struct Rack {
    pub(super) scope: Scope,
    pub(super) plan: Plan,
    /// Per stripe: the rack below which this one hangs.
    pub(super) hosts: Vec<Option<Key>>,
    /// Per stripe: the origin above it.
    pub(super) tops: Vec<Option<Key>>,
}

/// A rack passes on no more than it receives: it has as many other racks below it as there are stripes. With
/// one stripe this would be a chain, so there it passes on twice as much.
pub(super) fn shape_of_world(shape: Shape) -> Shape {
    let stripes = shape.stripes();
    Shape::new(stripes.max(2).min(shape.fan_out()), stripes).expect("no more stripes than children")
}

impl Hierarchy {
    /// The rack of this name, which may be new. While nodes report, a new one waits for the reports of those
    /// that it hangs below.
    pub(super) fn rack_for(&mut self, scope: &Scope, stage: Stage) -> Key {
        if let Some(&rack) = self.by_scope.get(scope) {
            return rack;
        }
        let key = Key::of_rack(self.racks_ever);
        self.racks_ever += 1;
        let none = vec![None; self.stripes()];
        let mut plan = Plan::new(self.shape);
        plan.add(Key::OUTSIDE, Kind::Root, Standing::Good, [Scope::everywhere()].into());
        let rack = Rack { scope: scope.clone(), plan, hosts: none.clone(), tops: none };
        self.racks.insert(key, rack);
        self.by_scope.insert(scope.clone(), key);
        let around: Arc<[Scope]> = scope.around_rack().into();
        self.world_unsettled = true;
        self.world.add(key, Kind::Relay, Standing::Good, around);
        if stage == Stage::Learning {
            (0..self.stripes()).for_each(|stripe| self.world.forest_mut(stripe).await_parent(key));
        }
        key
    }

    /// The plan of a rack, to be changed.
    pub(super) fn plan_mut(&mut self, rack: Key) -> &mut Plan {
        self.unsettled.insert(rack);
        &mut self.racks.get_mut(&rack).expect("a seat's rack exists, and so does a guest's host").plan
    }

    /// Nodes of the rack came, went or changed their standing: it may be a root or none now, or empty.
    pub(super) fn review_rack(&mut self, members: &Membership, key: Key) {
        let plan = self.plan_mut(key);
        let has_nodes = plan.nodes().next().is_some();
        let has_origin = plan.forest(0).origins().iter().any(|root| root.is_node());
        if has_origin {
            plan.remove(members, Key::OUTSIDE);
        } else if !plan.contains(Key::OUTSIDE) {
            plan.add(Key::OUTSIDE, Kind::Root, Standing::Good, [Scope::everywhere()].into());
        }
        let lends = plan.nodes().any(|node| plan.standing(node) == Some(Standing::Good));
        if !has_nodes && !self.seats.values().any(|seat| seat.rack == key) {
            return self.drop_rack(members, key);
        }
        let kind = if has_origin { Kind::Root } else { Kind::Relay };
        if self.world.kind(key) != Some(kind) {
            self.world_unsettled = true;
            self.world.set_kind(key, kind);
        }
        let standing = if lends { Standing::Good } else { Standing::Suspect };
        if self.world.standing(key) != Some(standing) {
            self.world_unsettled = true;
            self.world.set_standing(members, key, standing);
        }
    }

    fn drop_rack(&mut self, members: &Membership, key: Key) {
        self.world_unsettled = true;
        self.world.remove(members, key);
        let Some(rack) = self.racks.remove(&key) else { return };
        self.by_scope.remove(&rack.scope);
        self.unsettled.remove(&key);
        self.stirred.remove(&key);
        for guest in rack.plan.guests() {
            if let Some(guest) = self.racks.get_mut(&guest) {
                let gone = guest.hosts.iter_mut().filter(|host| **host == Some(key));
                gone.for_each(|host| *host = None);
            }
        }
        for (stripe, host) in rack.hosts.into_iter().enumerate() {
            if let Some(host) = host.filter(|host| self.racks.contains_key(host)) {
                self.plan_mut(host).remove_guest(members, stripe, key);
            }
        }
    }

    /// Gives everybody a place who lacks one and can have one, within the racks and among them, and takes
    /// children from overloaded roots where there is room elsewhere.
    pub(crate) fn settle(&mut self, members: &Membership, stage: Stage) {
        self.settle_racks(members, stage);
        if std::mem::take(&mut self.world_unsettled) {
            self.world.settle(members, stage);
            self.world.take_moved();
        }
        for stripe in 0..self.stripes() {
            for rack in self.world.forest_mut(stripe).take_changed() {
                self.follow(members, stripe, rack);
            }
        }
        self.settle_racks(members, stage);
    }

    fn settle_racks(&mut self, members: &Membership, stage: Stage) {
        while let Some(key) = self.unsettled.pop_first() {
            let Some(rack) = self.racks.get_mut(&key) else { continue };
            self.stirred.insert(key);
            rack.plan.settle(members, stage);
            for stripe in 0..rack.hosts.len() {
                let forest = rack.plan.forest(stripe);
                let enters = forest.contains(Key::OUTSIDE) && !forest.children(Key::OUTSIDE).is_empty();
                if enters && rack.hosts[stripe].is_none() {
                    // Nobody has reported its place, so it gets one.
                    let forest = self.world.forest_mut(stripe);
                    if forest.is_waiting(key) {
                        forest.orphan(key);
                        self.world_unsettled = true;
                    }
                }
            }
            for (stripe, unit) in rack.plan.take_moved() {
                let node = if unit.is_node() { Some(unit) } else { self.gateway(stripe, unit) };
                node.into_iter().for_each(|node| self.unhold(node));
            }
        }
    }

    /// Makes the rack a guest where the plan of the racks has it now.
    fn follow(&mut self, members: &Membership, stripe: usize, key: Key) {
        let host = self.world.forest(stripe).parent(key);
        let Some(rack) = self.racks.get_mut(&key) else { return };
        let former = std::mem::replace(&mut rack.hosts[stripe], host);
        let gateway = self.gateway(stripe, key);
        if former != host {
            if let Some(former) = former.filter(|former| self.racks.contains_key(former)) {
                self.plan_mut(former).remove_guest(members, stripe, key);
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
                let Some(rack) = self.racks.get_mut(&key) else { break };
                let changed = rack.plan.forest_mut(stripe).take_changed();
                let gateway = self.gateway(stripe, key);
                let host = self.racks[&key].hosts[stripe];
                if let Some(host) = host.and_then(|host| self.racks.get_mut(&host).map(|rack| (host, rack)))
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
                let entered = self.racks.values().map(|rack| rack.plan.forest(stripe));
                let entered = entered.filter(|forest| forest.contains(Key::OUTSIDE));
                let nodes =
                    entered.flat_map(|forest| forest.children(Key::OUTSIDE)).filter(|key| key.is_node());
                self.changed.extend(nodes.map(|&node| (node, stripe)));
            }
        }
        for (stripe, key) in std::mem::take(&mut self.retopped) {
            if !self.racks.contains_key(&key) {
                continue;
            }
            let top = self.find_top(stripe, key);
            if let Some(rack) = self.racks.get_mut(&key).filter(|rack| rack.tops[stripe] != top) {
                rack.tops[stripe] = top;
                self.changed.extend(rack.plan.nodes().map(|node| (node, stripe)));
            }
        }
    }

    /// The way into the rack changed: its gateway has other peers, and so have those below it.
    fn mark_entry(&mut self, stripe: usize, key: Key) {
        let Some(host) = self.racks.get(&key).and_then(|rack| rack.hosts[stripe]) else { return };
        if self.racks[&key].tops[stripe] != self.root_above(stripe, host, key) {
            // It has come under another origin, with all that is below it.
            let below = self.world.forest(stripe).subtree(key);
            self.retopped.extend(below.into_iter().map(|below| (stripe, below)));
        }
        let parent = self.racks[&host].plan.forest(stripe).parent(key).filter(|parent| parent.is_node());
        if let Some(rack) = self.racks.get_mut(&key) {
            rack.plan.set_face(stripe, Key::OUTSIDE, parent);
        }
        self.mark_gateway(stripe, key);
    }

    fn mark_gateway(&mut self, stripe: usize, key: Key) {
        if let Some(gateway) = self.gateway(stripe, key) {
            let listing = self.children_in(stripe, gateway).into_iter().chain([gateway]);
            self.changed.extend(listing.map(|node| (node, stripe)));
        }
    }

    /// Who fetches into the rack from outside.
    pub(super) fn gateway(&self, stripe: usize, rack: Key) -> Option<Key> {
        let forest = self.racks.get(&rack)?.plan.forest(stripe);
        if !forest.contains(Key::OUTSIDE) {
            return None;
        }
        forest.children(Key::OUTSIDE).first().copied().filter(|first| first.is_node())
    }

    /// Whether a node of this role may be asked by all: not one that is kept out of the trees.
    pub(super) fn is_planted(&self, key: Key) -> bool {
        let seat = &self.seats[&key];
        seat.role == Role::Relay || self.racks[&seat.rack].plan.contains(key)
    }
}
