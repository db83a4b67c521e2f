//! Who is there, and whom one may ask: nodes, leases, suspicion and blame.
//!
//! - A child that cannot reach a peer is kept away from it for a lease; the peer itself suffers nothing.
//!   When at least [`QUORUM_MIN`] of its children say so within a lease, and more than still hold to it,
//!   it is *suspect*: no new children and no duty as alternate for a lease. A heartbeat does not clear it,
//!   since it shows that the node reaches Volt, not that its children reach the node.
//! - A child that was sent a wrong chunk is kept away from the liar until the liar is pardoned: one word
//!   suffices for that, because it harms nobody but the accuser. One accuser could itself be the liar, so
//!   it takes two, or one that is the only child, to *quarantine*: serve nobody until pardoned. Restarting
//!   clears nothing; hence blame is kept by name and outlives the node.

use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};

use crate::forest::Key;
use crate::{Location, Millis, NodeView, Peer, Standing};

/// Reports that make a node suspect. One child alone may be the one that is cut off.
pub(crate) const QUORUM_MIN: usize = 2;

/// Accusers that quarantine a node whatever its other children say.
pub(crate) const ACCUSERS_MIN: usize = 2;

/// Peers that one node is kept away from at a time; beyond it the oldest is forgotten. More would let one
/// cut-off node make every search for a place long.
const LOST_MAX: usize = 16;

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) name: NodeName,
    /// A number that is fixed for a name and else as if drawn by lot.
    pub(crate) lot: u64,
    pub(crate) address: String,
    pub(crate) location: Location,
    pub(crate) lease_until: Millis,
    pub(crate) images: BTreeSet<ImageId>,
    suspect_until: Option<Millis>,
    /// Whom it cannot reach, and until when that is believed.
    lost: BTreeMap<Key, Millis>,
    /// Who cannot reach it, and until when that counts.
    reports: BTreeMap<Key, Millis>,
}

#[derive(Debug, Default)]
pub(crate) struct Membership {
    nodes: BTreeMap<Key, Node>,
    keys: BTreeMap<NodeName, Key>,
    next_key: u64,
    quarantined: BTreeSet<NodeName>,
    /// By liar: at most [`ACCUSERS_MIN`] accusers each.
    accusers: BTreeMap<NodeName, BTreeSet<NodeName>>,
}

impl Membership {
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn key(&self, name: &NodeName) -> Option<Key> {
        self.keys.get(name).copied()
    }

    pub(crate) fn get(&self, key: Key) -> &Node {
        self.nodes.get(&key).expect("keys are handed out for live nodes only")
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> &mut Node {
        self.nodes.get_mut(&key).expect("keys are handed out for live nodes only")
    }

    pub(crate) fn nodes(&self) -> impl Iterator<Item = (Key, &Node)> {
        self.nodes.iter().map(|(&key, node)| (key, node))
    }

    /// The live nodes by name.
    pub(crate) fn by_name(&self) -> impl Iterator<Item = Key> {
        self.keys.values().copied()
    }

    pub(crate) fn add(
        &mut self,
        name: NodeName,
        address: String,
        location: Location,
        lease_until: Millis,
    ) -> Key {
        let key = Key(self.next_key);
        self.next_key += 1;
        self.keys.insert(name.clone(), key);
        let node = Node {
            lot: lot(&name),
            name,
            address,
            location,
            lease_until,
            images: BTreeSet::new(),
            suspect_until: None,
            lost: BTreeMap::new(),
            reports: BTreeMap::new(),
        };
        self.nodes.insert(key, node);
        key
    }

    pub(crate) fn remove(&mut self, key: Key) {
        if let Some(node) = self.nodes.remove(&key) {
            self.keys.remove(&node.name);
        }
    }

    pub(crate) fn peer(&self, key: Key) -> Peer {
        let node = self.get(key);
        Peer { node: node.name.clone(), address: node.address.clone() }
    }

    pub(crate) fn standing(&self, key: Key) -> Standing {
        let node = self.get(key);
        if self.quarantined.contains(&node.name) {
            Standing::Quarantined
        } else if node.suspect_until.is_some() {
            Standing::Suspect
        } else {
            Standing::Good
        }
    }

    /// Whether `node` must not be sent to `peer` while there is anyone else. Nobody avoids the dead.
    pub(crate) fn avoids(&self, node: Key, peer: Key) -> bool {
        let (Some(from), Some(to)) = (self.nodes.get(&node), self.nodes.get(&peer)) else { return false };
        from.lost.contains_key(&peer) || self.accusers.get(&to.name).is_some_and(|by| by.contains(&from.name))
    }

    /// Notes that `by` cannot reach `parent`.
    pub(crate) fn note_lost(&mut self, by: Key, parent: Key, until: Millis) {
        let lost = &mut self.get_mut(by).lost;
        lost.insert(parent, until);
        if lost.len() > LOST_MAX {
            let oldest = lost.iter().min_by_key(|entry| (*entry.1, *entry.0)).map(|entry| *entry.0);
            oldest.map(|key| lost.remove(&key));
        }
        self.get_mut(parent).reports.insert(by, until);
    }

    /// Whether the reports against a node with these children make it suspect.
    pub(crate) fn is_deserted(&self, key: Key, children: &BTreeSet<Key>) -> bool {
        let reports = &self.get(key).reports;
        let faithful = children.iter().filter(|child| !reports.contains_key(child)).count();
        reports.len() >= QUORUM_MIN && reports.len() > faithful
    }

    /// Makes a node suspect; whether it was not before.
    pub(crate) fn suspect(&mut self, key: Key, until: Millis) -> bool {
        self.get_mut(key).suspect_until.replace(until).is_none()
    }

    /// Notes an accusation and says how many nodes accuse the liar by now.
    pub(crate) fn note_blame(&mut self, by: Key, liar: Key) -> usize {
        let (by, liar) = (self.get(by).name.clone(), self.get(liar).name.clone());
        let accusers = self.accusers.entry(liar).or_default();
        if accusers.len() < ACCUSERS_MIN {
            accusers.insert(by);
        }
        accusers.len()
    }

    /// Quarantines a node, known or not; whether it was not before.
    pub(crate) fn quarantine(&mut self, name: &NodeName) -> bool {
        self.quarantined.insert(name.clone())
    }

    /// Clears a node of blame.
    pub(crate) fn pardon(&mut self, name: &NodeName) {
        self.quarantined.remove(name);
        self.accusers.remove(name);
    }

    /// Forgets what is over at `now`: the nodes whose standing or avoidance changed by that.
    pub(crate) fn expire(&mut self, now: Millis) -> Vec<Key> {
        let mut changed = Vec::new();
        for (&key, node) in &mut self.nodes {
            let lost = node.lost.len();
            node.lost.retain(|_, until| *until > now);
            node.reports.retain(|_, until| *until > now);
            let cleared = node.suspect_until.take_if(|until| *until <= now).is_some();
            if cleared || lost != node.lost.len() {
                changed.push(key);
            }
        }
        changed
    }

    /// The nodes whose lease has run out at `now`.
    pub(crate) fn lapsed(&self, now: Millis) -> Vec<Key> {
        self.nodes().filter(|(_, node)| node.lease_until <= now).map(|(key, _)| key).collect()
    }

    pub(crate) fn view(&self, key: Key) -> NodeView {
        let node = self.get(key);
        NodeView {
            node: node.name.clone(),
            address: node.address.clone(),
            location: node.location.clone(),
            lease_until: node.lease_until,
            standing: self.standing(key),
            images: node.images.iter().copied().collect(),
        }
    }
}

/// FNV-1a, 64 bits.
fn lot(name: &NodeName) -> u64 {
    let bytes = name.as_str().bytes();
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
