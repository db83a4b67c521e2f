//! What nodes are told: lists of peers, derived from the trees.

use std::collections::BTreeSet;

use super::{Hierarchy, Seat};
use crate::forest::{Forest, Key};
use crate::roster::Roster;
use crate::{Placement, Standing};

impl Hierarchy {
    pub(super) fn placement(&self, roster: &Roster, key: Key, seat: &Seat) -> Placement {
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
    pub(super) fn peers(&self, roster: &Roster, stripe: usize, key: Key) -> Vec<Key> {
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
