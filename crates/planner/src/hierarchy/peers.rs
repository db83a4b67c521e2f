//! Who is whose parent, and what nodes are told: lists of peers, derived from the trees.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::{Hierarchy, Seat};
use crate::forest::Key;
use crate::membership::Membership;
use crate::{Peer, Role, Standing, Tree, TreeNode};

impl Hierarchy {
    /// The lists of the node that are not what it was told, of those in `stripes`.
    pub(super) fn news(
        &self,
        members: &Membership,
        key: Key,
        seat: &Seat,
        stripes: &[usize],
    ) -> Vec<(usize, Vec<Peer>)> {
        let told = seat.told.as_ref().map_or(&[][..], |told| &told.stripes);
        let changed = |&stripe: &usize| {
            let forest = self.racks[&seat.rack].plan.forest(stripe);
            if forest.contains(key) && forest.is_waiting(key) {
                return None;
            }
            let is = self.peers(members, stripe, key);
            let was = told.get(stripe).map_or(&[][..], |list| list);
            let same = |(&is, was): (&Key, &Peer)| {
                let node = members.get(is);
                (&node.name, &node.address) == (&was.node, &was.address)
            };
            let equal = is.len() == was.len() && is.iter().zip(was).all(same);
            (!equal).then(|| (stripe, is.into_iter().map(|peer| members.peer(peer)).collect()))
        };
        stripes.iter().filter_map(changed).collect()
    }

    /// Whom a node fetches from in a stripe, best first: its parent, its grandparent and an uncle (or, where
    /// it has none, an elder sibling), those of its own rack first; and the origin.
    ///
    /// Each of them is before the node in the order by depth, then name. So whatever peers the nodes
    /// choose from their lists, no request ever comes back to one that waits for its answer.
    pub(super) fn peers(&self, members: &Membership, stripe: usize, key: Key) -> Vec<Key> {
        let name = |key: Key| &members.get(key).name;
        let lends = |peer: &Key| members.standing(*peer) == Standing::Good && !members.avoids(key, *peer);
        let elder = |siblings: Vec<Key>| {
            let elders = siblings.into_iter().filter(|&other| name(other) < name(key)).filter(lends);
            elders.max_by_key(|&other| name(other))
        };
        if self.seats[&key].role == Role::Origin {
            return Vec::new();
        }
        let Some(parent) = self.parent(stripe, key) else {
            return elder(self.rootless(stripe)).into_iter().collect();
        };
        let origin = self.origin_above(stripe, key);
        let grandparent = self.parent(stripe, parent);
        let aunts = match grandparent {
            Some(grandparent) => self.family(stripe, grandparent, parent),
            None if Some(parent) == origin => self.serving_origins(),
            None => Vec::new(),
        };
        let own = members.get(key);
        let rack = self.seats[&key].rack;
        let is_near = |peer: Key| self.racks[&rack].plan.contains(peer);
        // Each child has an order of its own, so that those of a dead node do not all turn to the same one.
        let mut others: Vec<(bool, u64, Key)> = aunts
            .into_iter()
            .filter(|&other| other != parent)
            .map(|other| (is_near(other), mixed(own.lot, members.get(other).lot), other))
            .collect();
        others.sort_unstable_by_key(|&other| Reverse(other));
        let uncle = others.into_iter().map(|other| other.2).find(lends);
        let beside = uncle.or_else(|| elder(self.family(stripe, parent, key)));
        let mut alternates: Vec<Key> = [grandparent.filter(lends), beside]
            .into_iter()
            .flatten()
            .filter(|&peer| Some(peer) != origin)
            .collect();
        alternates.sort_by_key(|&peer| !is_near(peer));
        let mut peers = vec![parent];
        peers.extend(alternates);
        peers.extend(origin.filter(|&origin| origin != parent));
        peers
    }

    /// The node's parent.
    pub(super) fn parent(&self, stripe: usize, key: Key) -> Option<Key> {
        let rack = self.seats[&key].rack;
        let forest = self.racks[&rack].plan.forest(stripe);
        if !forest.contains(key) {
            return None;
        }
        match forest.parent(key)? {
            Key::OUTSIDE if self.gateway(stripe, rack) == Some(key) => self.parent_of_rack(stripe, rack),
            // One too many: it must not burden those below whom the rack hangs.
            Key::OUTSIDE => self.racks[&rack].tops[stripe],
            parent => Some(parent),
        }
    }

    fn parent_of_rack(&self, stripe: usize, rack: Key) -> Option<Key> {
        let host = self.racks[&rack].hosts[stripe]?;
        match self.racks[&host].plan.forest(stripe).parent(rack)? {
            Key::OUTSIDE => self.racks[&host].tops[stripe],
            parent => Some(parent),
        }
    }

    /// The origin above a rack that has none, as the trees are now.
    pub(super) fn find_top(&self, stripe: usize, rack: Key) -> Option<Key> {
        let mut at = rack;
        loop {
            let host = self.racks[&at].hosts[stripe]?;
            let forest = self.racks[&host].plan.forest(stripe);
            match forest.upwards(at).last()? {
                Key::OUTSIDE => at = host,
                root => return Some(root).filter(|root| forest.origins().contains(root)),
            }
        }
    }

    /// The origin above a node, as of the last event.
    pub(super) fn origin_above(&self, stripe: usize, key: Key) -> Option<Key> {
        self.root_above(stripe, self.seats[&key].rack, key)
    }

    /// The origin above a unit of a rack, as of the last event.
    pub(super) fn root_above(&self, stripe: usize, rack: Key, unit: Key) -> Option<Key> {
        let rack = &self.racks[&rack];
        let forest = rack.plan.forest(stripe);
        let root = match forest.origins().first() {
            Some(&only) if forest.origins().len() == 1 => Some(only).filter(|_| forest.is_rooted(unit)),
            _ => forest.upwards(unit).last().filter(|root| forest.origins().contains(root)),
        };
        if root == Some(Key::OUTSIDE) { rack.tops[stripe] } else { root }
    }

    /// The node's children in a stripe, but for those that an origin has because there is no other place.
    pub(super) fn children_in(&self, stripe: usize, key: Key) -> Vec<Key> {
        let forest = self.racks[&self.seats[&key].rack].plan.forest(stripe);
        if !forest.contains(key) {
            return Vec::new();
        }
        let node = |&unit: &Key| if unit.is_node() { Some(unit) } else { self.gateway(stripe, unit) };
        // A unit whose node just left is not asked for by anybody.
        let seated = |node: &Key| self.seats.contains_key(node);
        forest.children(key).iter().filter_map(node).filter(seated).collect()
    }

    /// The children of a node, one of which is known. None if the plan does not mean that one to be there:
    /// nobody else's list depends on it.
    fn family(&self, stripe: usize, parent: Key, child: Key) -> Vec<Key> {
        let children = self.children_in(stripe, parent);
        if children.contains(&child) { children } else { Vec::new() }
    }

    /// The node's children in all stripes.
    pub(crate) fn children(&self, key: Key) -> BTreeSet<Key> {
        let is_origin = self.seats.get(&key).is_some_and(|seat| seat.role == Role::Origin);
        let in_stripe = |stripe: usize| -> Vec<Key> {
            if is_origin {
                let all = self.seats.keys().copied();
                all.filter(|&child| self.parent(stripe, child) == Some(key)).collect()
            } else {
                self.children_in(stripe, key)
            }
        };
        (0..self.stripes()).flat_map(in_stripe).collect()
    }

    /// The origins that serve.
    pub(super) fn serving_origins(&self) -> Vec<Key> {
        self.origins.iter().copied().filter(|&origin| self.is_planted(origin)).collect()
    }

    /// The nodes that have no parent although they need one.
    fn rootless(&self, stripe: usize) -> Vec<Key> {
        let forest = self.world.forest(stripe);
        forest.orphans().iter().filter_map(|&rack| self.gateway(stripe, rack)).collect()
    }

    /// Steps up to the root above the node.
    pub(super) fn depth(&self, stripe: usize, key: Key) -> u32 {
        let mut depth = 0;
        let mut at = key;
        while let Some(parent) = self.parent(stripe, at) {
            (depth, at) = (depth + 1, parent);
        }
        depth
    }

    /// The hierarchy as people see it.
    pub(crate) fn view(&self, members: &Membership) -> Tree {
        let name = |key: Key| members.get(key).name.clone();
        let by_name_from_last = |keys: &mut Vec<Key>| keys.sort_by_key(|&key| Reverse(name(key)));
        let stripe_view = |stripe: usize| {
            let mut families: BTreeMap<Option<Key>, Vec<Key>> = BTreeMap::new();
            for &key in self.seats.keys().filter(|&&key| self.is_planted(key)) {
                families.entry(self.parent(stripe, key)).or_default().push(key);
            }
            families.values_mut().for_each(by_name_from_last);
            let roots = families.remove(&None).unwrap_or_default();
            let mut ahead: Vec<(Key, Option<Key>, u32)> =
                roots.into_iter().map(|root| (root, None, 0)).collect();
            let mut nodes = Vec::new();
            while let Some((key, parent, depth)) = ahead.pop() {
                let (node, role) = (name(key), self.seats[&key].role);
                nodes.push(TreeNode { node, parent: parent.map(name), depth, role });
                let children = families.remove(&Some(key)).unwrap_or_default();
                ahead.extend(children.into_iter().map(|child| (child, Some(key), depth + 1)));
            }
            nodes
        };
        Tree { shape: self.shape, stripes: (0..self.stripes()).map(stripe_view).collect() }
    }
}

/// Two lots as one, in which each bit depends on all of both (the finalizer of MurmurHash3).
fn mixed(one: u64, other: u64) -> u64 {
    let mixed = (one ^ other.rotate_left(32)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ (mixed >> 33)
}
