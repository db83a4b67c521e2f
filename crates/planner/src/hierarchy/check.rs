//! The invariants, as code for the tests.

use std::collections::BTreeSet;

use super::plan::{Kind, Plan};
use super::{Hierarchy, Seat, Stage};
use crate::forest::Key;
use crate::membership::Membership;
use crate::{Role, Standing};

impl Hierarchy {
    /// Panics unless the invariants at the head of the hierarchy, and those of [`Hierarchy::peers`], hold.
    pub(crate) fn check(&self, members: &Membership, stage: Stage) {
        assert!(
            self.unsettled.is_empty()
                && self.stirred.is_empty()
                && self.changed.is_empty()
                && self.asked.is_empty()
        );
        self.world.check(members, stage);
        for (&key, rack) in &self.racks {
            rack.plan.check(members, stage);
            assert_eq!(self.by_scope.get(&rack.scope), Some(&key));
            for stripe in 0..self.stripes() {
                assert_eq!(rack.hosts[stripe], self.world.forest(stripe).parent(key), "the plans agree");
                assert_eq!(rack.tops[stripe], self.find_top(stripe, key));
                let is_guest = |host: &Key| self.racks[host].plan.forest(stripe).contains(key);
                let hosts: Vec<Key> = self.racks.keys().copied().filter(is_guest).collect();
                assert_eq!(hosts, Vec::from_iter(rack.hosts[stripe]), "a rack is the guest of its host");
            }
        }
        let rooted = !self.serving_origins().is_empty();
        for (&key, seat) in &self.seats {
            for stripe in 0..self.stripes() {
                self.check_place(members, stripe, key, seat);
                let forest = self.racks[&seat.rack].plan.forest(stripe);
                let waits = !self.world.forest(stripe).waiting().is_empty() || !forest.waiting().is_empty();
                if rooted && seat.role == Role::Relay && !waits && stage == Stage::Planning {
                    let name = &members.get(key).name;
                    assert!(self.origin_above(stripe, key).is_some(), "{name} has no way to an origin");
                }
            }
            if seat.role == Role::Relay {
                let served: usize = (0..self.stripes()).map(|s| self.children_in(s, key).len()).sum();
                assert!(served <= self.shape.fan_out() as usize, "a relay has too many children");
            }
        }
        for (&key, seat) in self.seats.iter().filter(|(_, seat)| !seat.held) {
            let name = &members.get(key).name;
            let all: Vec<usize> = (0..self.stripes()).collect();
            assert_eq!(self.news(members, key, seat, &all), [], "{name} was told its placement");
            let told = seat.told.as_ref().map(|told| told.stripes.len());
            assert_eq!(told, Some(self.stripes()), "{name} was told of every stripe");
        }
    }

    fn check_place(&self, members: &Membership, stripe: usize, key: Key, seat: &Seat) {
        let forest = self.racks[&seat.rack].plan.forest(stripe);
        let name = &members.get(key).name;
        let quarantined = members.standing(key) == Standing::Quarantined;
        assert_eq!(self.is_planted(key), forest.contains(key));
        if seat.role == Role::Origin && quarantined {
            assert!(!forest.contains(key), "{name} is a quarantined origin in the tree");
            return;
        }
        assert_eq!(forest.origins().contains(&key), seat.role == Role::Origin, "{name} is a root or not");
        assert!(!quarantined || forest.children(key).is_empty(), "{name} serves in quarantine");
        if seat.held || forest.is_waiting(key) {
            return;
        }
        let peers = self.peers(members, stripe, key);
        for (at, &peer) in peers.iter().enumerate() {
            let order = |key: Key| (self.depth(stripe, key), &members.get(key).name);
            assert!(order(peer) < order(key), "{name} lists one that is not before it");
            assert!(!peers[..at].contains(&peer), "{name} lists one twice");
            assert_ne!(members.standing(peer), Standing::Quarantined, "{name} lists a liar");
        }
        if let Some(origin) = self.origin_above(stripe, key).filter(|_| seat.role == Role::Relay) {
            assert!(
                peers.first() == Some(&origin) || peers.last() == Some(&origin),
                "{name}: no last resort"
            );
        }
    }
}

impl Plan {
    fn check(&self, members: &Membership, stage: Stage) {
        for (stripe, forest) in self.forests.iter().enumerate() {
            forest.check();
            for (&key, unit) in self.units.iter().filter(|(key, _)| forest.contains(**key)) {
                let children = forest.children(key);
                let top = forest.upwards(key).last().unwrap();
                assert_eq!(forest.origins().contains(&key), unit.kind == Kind::Root);
                assert!(forest.origins().is_empty() || forest.is_rooted(key) || forest.is_waiting(top));
                if unit.kind != Kind::Root {
                    assert!(children.len() <= unit.slots[stripe] as usize, "more children than slots");
                } else if forest.excess(key) > 0 && stage == Stage::Planning {
                    let open = forest.best_open(key, |_| true).filter(|&place| forest.is_rooted(place));
                    let movable = |place: Key| {
                        // Whom a guest stands for can change, or leave it empty, without its host's doing: the host's
                        // plan is looked at again with the next tick.
                        let own = children.iter().filter(|child| self.units[child].kind != Kind::Guest);
                        let mut ways = own.filter(|&&child| !forest.is_within(place, child));
                        ways.any(|&child| !self.avoids(members, stripe, child, place))
                    };
                    assert!(!open.is_some_and(movable), "a root is overloaded for no reason");
                }
            }
        }
        let mut loans = BTreeSet::new();
        for (&key, unit) in &self.units {
            let slots: u32 = unit.slots.iter().sum();
            assert_eq!(slots, if unit.kind == Kind::Guest { 0 } else { self.shape.fan_out() });
            let lent = (0..self.forests.len()).filter(|&s| s != unit.home && unit.slots[s] > 0);
            loans.extend(lent.map(|stripe| (stripe, key)));
        }
        assert_eq!(self.loans, loans);
    }
}
