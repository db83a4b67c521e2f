//! Which layer stands on which, and how many hold each: what is known of all of them in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Weak;

use super::LayerId;
use super::layer::{Layer, LayerRecord};

#[derive(Default)]
pub(super) struct Forest {
    pub(super) layers: BTreeMap<LayerId, Known>,
    /// Layers whose records cannot be read. While the node starts, they may be some that were being made.
    pub(super) damaged: Vec<Damaged>,
}

pub(super) struct Damaged {
    pub(super) dir: PathBuf,
    /// `None` if its directory has another name than a layer's.
    pub(super) id: Option<LayerId>,
    pub(super) reason: String,
    /// Somebody names it, or may.
    pub(super) is_needed: bool,
}

pub(super) struct Known {
    pub(super) record: LayerRecord,
    /// How many VMs, snapshots and derived images name it.
    pub(super) holders: usize,
    pub(super) children: BTreeSet<LayerId>,
    pub(super) open: Weak<Layer>,
}

impl Forest {
    pub(super) fn insert(&mut self, id: LayerId, record: LayerRecord, holders: usize) {
        if let Some(parent) = record.parent.layer()
            && let Some(parent) = self.layers.get_mut(&parent)
        {
            parent.children.insert(id);
        }
        self.layers.insert(id, Known { record, holders, children: BTreeSet::new(), open: Weak::new() });
    }

    /// The layers that are held beside one hold for each time that `own` names them, and all below those.
    pub(super) fn needed_beside(&self, own: &[LayerId]) -> BTreeSet<LayerId> {
        let mut needed = BTreeSet::new();
        for (id, known) in &self.layers {
            if known.holders <= own.iter().filter(|own| *own == id).count() {
                continue;
            }
            let mut at = Some(*id);
            while let Some(id) = at.filter(|id| needed.insert(*id)) {
                at = self.layers.get(&id).and_then(|known| known.record.parent.layer());
            }
        }
        needed
    }

    /// Notes that somebody names the layer. `false` if it is not there.
    pub(super) fn hold(&mut self, id: LayerId) -> bool {
        for damaged in self.damaged.iter_mut().filter(|damaged| damaged.id == Some(id)) {
            damaged.is_needed = true;
        }
        let known = self.layers.get_mut(&id);
        known.map(|known| known.holders += 1).is_some()
    }

    /// Notes that somebody who named or kept the layer does so no longer. What nobody needs then is taken out.
    pub(super) fn let_go(&mut self, id: LayerId) -> Vec<LayerId> {
        if let Some(known) = self.layers.get_mut(&id) {
            known.holders = known.holders.saturating_sub(1);
        }
        self.take_unneeded(id)
    }

    /// Takes out the layers that were being made when the daemon ended, if all that cannot be read are such.
    pub(super) fn take_torn(&mut self) -> Vec<LayerId> {
        let parents: BTreeSet<LayerId> =
            self.layers.values().filter_map(|known| known.record.parent.layer()).collect();
        let is_parent = |id: LayerId| parents.contains(&id);
        // What one that is needed stands on is not known, and may be any other.
        if self.damaged.iter().any(|damaged| damaged.is_needed || damaged.id.is_some_and(is_parent)) {
            return Vec::new();
        }
        self.damaged.drain(..).filter_map(|damaged| damaged.id).collect()
    }

    /// Holds every layer once more, for those whose records cannot be read.
    pub(super) fn hold_all(&mut self) {
        for known in self.layers.values_mut() {
            known.holders += 1;
        }
    }

    /// Whether a layer can be merged into the only one that stands on it, and which that is.
    pub(super) fn merges_into(&self, known: &Known) -> Option<LayerId> {
        let mut children = known.children.iter();
        let (Some(upper), None, 0) = (children.next(), children.next(), known.holders) else {
            return None;
        };
        // One that is to be rebased comes first.
        let is_carried = known.record.parent.is_carried() || self.is_carried(upper);
        (!is_carried).then_some(*upper)
    }

    /// Whether a layer has yet to take over another VM's disk.
    pub(super) fn is_carried(&self, id: &LayerId) -> bool {
        self.layers.get(id).is_some_and(|known| known.record.parent.is_carried())
    }

    /// Takes out a layer that nobody needs, and those below it that nobody needs without it.
    pub(super) fn take_unneeded(&mut self, from: LayerId) -> Vec<LayerId> {
        let mut unneeded = Vec::new();
        let mut at = Some(from);
        while let Some(id) = at.take() {
            let is_unneeded = |known: &Known| known.holders == 0 && known.children.is_empty();
            if !self.layers.get(&id).is_some_and(is_unneeded) {
                break;
            }
            let known = self.layers.remove(&id).expect("it was just looked at");
            unneeded.push(id);
            if let Some(parent) = known.record.parent.layer() {
                if let Some(parent) = self.layers.get_mut(&parent) {
                    parent.children.remove(&id);
                }
                at = Some(parent);
            }
        }
        unneeded
    }
}

#[cfg(test)]
mod tests {
    use block::ImageId;

    use super::super::layer::{Older, Parent};
    use super::*;

    fn record(parent: Parent) -> LayerRecord {
        LayerRecord { parent, made_unix_ms: 0 }
    }

    fn image() -> Parent {
        Parent::Image(ImageId::of_root_page(b"image"))
    }

    #[test]
    fn what_nobody_needs_is_taken_out_down_to_what_somebody_does() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..5).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 0);
        forest.insert(ids[3], record(Parent::Layer(ids[2])), 1);
        forest.insert(ids[4], record(Parent::Layer(ids[0])), 1);
        assert!(forest.take_unneeded(ids[3]).is_empty(), "it is held");
        forest.layers.get_mut(&ids[3]).unwrap().holders = 0;
        assert_eq!(forest.take_unneeded(ids[3]), [ids[3], ids[2]]);
        forest.layers.get_mut(&ids[1]).unwrap().holders = 0;
        assert_eq!(forest.take_unneeded(ids[1]), [ids[1]]);
        assert_eq!(forest.layers.keys().copied().collect::<Vec<_>>(), [ids[0], ids[4]]);
    }

    #[test]
    fn a_layer_is_shared_if_somebody_else_holds_it_or_one_that_stands_on_it() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..6).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 1);
        forest.insert(ids[3], record(Parent::Layer(ids[1])), 2);
        forest.insert(ids[4], record(Parent::Layer(ids[0])), 1);
        let needed = |own: &[LayerId]| forest.needed_beside(own).into_iter().collect::<Vec<_>>();
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[3], ids[4]]), []);
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[3]]), [ids[0], ids[4]]);
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[4]]), [ids[0], ids[1], ids[3]]);
    }

    #[test]
    fn what_is_to_stand_on_an_older_state_needs_it_and_is_merged_with_it_only_when_it_does() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..2).map(LayerId).collect();
        let came_as = ImageId::of_root_page(b"older");
        let on = Some(Older { layer: ids[0], image: came_as });
        forest.insert(ids[0], record(image()), 0);
        let carried = Parent::Carried { image: ImageId::of_root_page(b"newer"), base: came_as, on };
        forest.insert(ids[1], record(carried), 1);
        assert!(forest.take_unneeded(ids[0]).is_empty());
        assert_eq!(forest.needed_beside(&[]).len(), 2);
        assert_eq!(
            forest.merges_into(&forest.layers[&ids[0]]),
            None,
            "it reads otherwise until it has settled"
        );
        forest.layers.get_mut(&ids[1]).unwrap().record = record(Parent::Layer(ids[0]));
        assert_eq!(forest.merges_into(&forest.layers[&ids[0]]), Some(ids[1]));
        forest.layers.get_mut(&ids[1]).unwrap().record = record(carried);
        forest.layers.get_mut(&ids[1]).unwrap().holders = 0;
        assert_eq!(forest.take_unneeded(ids[1]), [ids[1], ids[0]]);
    }

    #[test]
    fn while_a_record_cannot_be_read_what_it_may_name_neither_goes_nor_is_merged() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..3).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        let merges_into = |forest: &Forest, id| forest.merges_into(&forest.layers[&id]);
        assert_eq!(merges_into(&forest, ids[0]), Some(ids[1]));

        forest.hold_all();
        assert_eq!(merges_into(&forest, ids[0]), None);
        forest.layers.get_mut(&ids[1]).unwrap().holders -= 1;
        assert!(forest.take_unneeded(ids[1]).is_empty(), "what was there when the record could not be read");
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 0);
        assert_eq!(forest.take_unneeded(ids[2]), [ids[2]], "what was made since");
    }

    #[test]
    fn a_torn_record_is_what_a_killed_daemon_was_making_only_if_nobody_may_name_it() {
        let torn = |id| Damaged {
            dir: PathBuf::new(),
            id: Some(LayerId(id)),
            reason: "it is torn".to_owned(),
            is_needed: false,
        };
        let forest = || {
            let mut forest = Forest::default();
            forest.insert(LayerId(0), record(image()), 1);
            forest.damaged.extend([torn(1), torn(2)]);
            forest
        };
        let mut unnamed = forest();
        assert_eq!(unnamed.take_torn(), [LayerId(1), LayerId(2)]);
        assert!(unnamed.damaged.is_empty());

        let mut held = forest();
        assert!(!held.hold(LayerId(2)));
        let mut below = forest();
        below.insert(LayerId(3), record(Parent::Layer(LayerId(1))), 1);
        let mut foreign = forest();
        foreign.damaged.push(Damaged { id: None, is_needed: true, ..torn(4) });
        for mut forest in [held, below, foreign] {
            let damaged = forest.damaged.len();
            assert!(forest.take_torn().is_empty(), "what the damaged one stands on may be any other");
            assert_eq!(forest.damaged.len(), damaged);
        }
    }
}
