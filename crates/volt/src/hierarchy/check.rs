//! The invariants, as code for the tests.

use std::collections::BTreeSet;

use super::{Hierarchy, Seat, Stage};
use crate::forest::Key;
use crate::roster::Roster;
use crate::{Role, Standing};

impl Hierarchy {
    /// Panics unless the invariants at the head of the hierarchy, and those of [`Hierarchy::peers`], hold.
    pub(crate) fn check(&self, roster: &Roster, stage: Stage) {
        for (stripe, forest) in self.forests.iter().enumerate() {
            forest.check();
            let waiting: BTreeSet<Key> = self
                .awaited
                .values()
                .flatten()
                .filter(|entry| entry.0 == stripe)
                .map(|entry| entry.1)
                .collect();
            assert_eq!(forest.waiting(), &waiting, "who waits is awaited");
            for (&key, seat) in &self.seats {
                self.check_place(roster, stage, stripe, key, seat);
            }
        }
        for (&key, seat) in self.seats.iter().filter(|(_, seat)| !seat.held) {
            let name = &roster.get(key).name;
            let placement = self.placement(roster, key, seat);
            assert_eq!(seat.told.as_ref(), Some(&placement), "{name} was told its placement");
        }
    }

    fn check_place(&self, roster: &Roster, stage: Stage, stripe: usize, key: Key, seat: &Seat) {
        let forest = &self.forests[stripe];
        let name = &roster.get(key).name;
        let quarantined = roster.standing(key) == Standing::Quarantined;
        if seat.role == Role::Origin && quarantined {
            assert!(!forest.contains(key), "{name} is a quarantined origin in the tree");
            return;
        }
        let children = forest.children(key);
        assert_eq!(forest.origins().contains(&key), seat.role == Role::Origin, "{name} is a root or not");
        if seat.role == Role::Relay {
            assert!(children.len() <= self.shape.fan_out() as usize, "{name} has too many children");
            assert!(seat.home == stripe || children.is_empty(), "{name} serves in two stripes");
            assert!(!quarantined || children.is_empty(), "{name} serves in quarantine");
        }
        if forest.excess(key) > 0 && stage == Stage::Planning {
            let open = forest.best_open(key, |_| true).filter(|&place| forest.is_rooted(place));
            let movable = |place: Key| {
                let mut ways = children.iter().filter(|&&c| !forest.is_within(place, c));
                ways.any(|&child| !roster.avoids(child, place))
            };
            assert!(!open.is_some_and(movable), "{name} is overloaded for no reason");
        }
        let top = forest.upwards(key).last().unwrap();
        if !forest.origins().is_empty() {
            assert!(forest.is_rooted(key) || forest.is_waiting(top), "{name} has no way to an origin");
        }
        if seat.held || forest.is_waiting(key) {
            return;
        }
        let peers = self.peers(roster, stripe, key);
        for (at, &peer) in peers.iter().enumerate() {
            let order = |key: Key| (forest.rank(key), &roster.get(key).name);
            assert!(order(peer) < order(key), "{name} lists one that is not before it");
            assert!(!peers[..at].contains(&peer), "{name} lists one twice");
            assert_ne!(roster.standing(peer), Standing::Quarantined, "{name} lists a liar");
        }
        if forest.is_rooted(key) && seat.role == Role::Relay {
            assert!(peers.first() == Some(&top) || peers.last() == Some(&top), "{name}: no last resort");
        }
    }
}
