//! The planner itself: takes events, keeps the membership and the hierarchies in step, collects actions.
//!
//! Consistency: between two events every hierarchy is settled, and what each node was told is what the
//! plan says, or, for a lease after the first event, what the node itself reported. Crash: nothing here is
//! durable but for quarantines, which the caller records. A new planner *learns* for one lease: nodes
//! register and attach with the placement that they have, and those places are kept.

use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};

use crate::forest::Key;
use crate::hierarchy::{Hierarchy, Stage};
use crate::membership::{ACCUSERS_MIN, Membership};
use crate::{Action, Event, Location, Millis, NodeView, Placement, Role, Settings, Shaping, Tree};

/// Nodes that one planner takes. Ten times what a cluster is planned for; bounds its memory.
pub const NODES_MAX: usize = 100_000;

/// Plans the hierarchies of all images.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    now: Millis,
    learning: Learning,
    members: Membership,
    hierarchies: BTreeMap<ImageId, Hierarchy>,
    /// Of the images that were tuned.
    shapings: BTreeMap<ImageId, Shaping>,
    /// Images whose hierarchy the event at hand has touched.
    touched: BTreeSet<ImageId>,
    actions: Vec<Action>,
}

/// Whether nodes still report where they were under an earlier planner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Learning {
    NotBegun,
    Until(Millis),
    Done,
}

impl Planner {
    /// A planner that knows nobody.
    pub fn new(settings: Settings) -> Planner {
        Planner {
            settings,
            now: Millis(0),
            learning: Learning::NotBegun,
            members: Membership::default(),
            hierarchies: BTreeMap::new(),
            shapings: BTreeMap::new(),
            touched: BTreeSet::new(),
            actions: Vec::new(),
        }
    }

    /// Takes note of what happened at `now` and says what to do, in order. Time never goes back: an
    /// earlier `now` than the last one counts as the last one.
    pub fn apply(&mut self, now: Millis, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        self.learn();
        match event {
            Event::NodeUp { node, address, location } => self.node_up(node, address, location),
            Event::Heartbeat { node } => self.heartbeat(&node),
            Event::NodeDown { node } => {
                self.members.key(&node).into_iter().for_each(|key| self.remove_dead(key));
            }
            Event::Attach { node, image, role, current } => self.attach(&node, image, role, current),
            Event::Detach { node, image } => {
                self.members.key(&node).into_iter().for_each(|key| self.detach(key, image));
            }
            Event::Leave { node, image } => self.leave(node, image),
            Event::Lost { by, parent } => self.lost(&by, &parent),
            Event::Blame { by, liar, image, chunk: _ } => self.blame(&by, &liar, image),
            Event::Quarantine { node } => self.quarantine(&node),
            Event::Pardon { node } => {
                self.members.pardon(&node);
                self.reassess(&node);
            }
            Event::Tune { image, shaping } => self.tune(image, shaping),
            Event::Tick => self.tick(),
        }
        self.settle();
        std::mem::take(&mut self.actions)
    }

    /// Whom `node` was last told to fetch `image` from.
    pub fn placement(&self, node: &NodeName, image: &ImageId) -> Option<&Placement> {
        self.hierarchies.get(image)?.told(self.members.key(node)?)
    }

    /// The live nodes by name.
    pub fn nodes(&self) -> impl Iterator<Item = NodeView> {
        self.members.by_name().map(|key| self.members.view(key))
    }

    /// One live node.
    pub fn node(&self, name: &NodeName) -> Option<NodeView> {
        self.members.key(name).map(|key| self.members.view(key))
    }

    /// The images that some node has attached, by id.
    pub fn images(&self) -> impl Iterator<Item = ImageId> {
        self.hierarchies.keys().copied()
    }

    /// The hierarchy of `image`; none if nobody has it attached.
    pub fn tree(&self, image: &ImageId) -> Option<Tree> {
        self.hierarchies.get(image).map(|hierarchy| hierarchy.view(&self.members))
    }
}

/// The events, one by one.
impl Planner {
    fn node_up(&mut self, name: NodeName, address: String, location: Location) {
        let lease_until = self.now + self.settings.lease;
        let Some(key) = self.members.key(&name) else {
            if self.members.len() == NODES_MAX {
                self.actions.push(Action::Refuse { node: name });
            } else {
                self.members.add(name, address, location, lease_until);
            }
            return;
        };
        let node = self.members.get_mut(key);
        node.lease_until = lease_until;
        node.address = address;
        node.location = location;
        for image in self.images_of(key) {
            self.change(image, |hierarchy, members| hierarchy.returned(members, key, lease_until));
        }
    }

    fn heartbeat(&mut self, name: &NodeName) {
        match self.members.key(name) {
            Some(key) => self.members.get_mut(key).lease_until = self.now + self.settings.lease,
            None => self.actions.push(Action::Unknown { node: name.clone() }),
        }
    }

    fn attach(&mut self, name: &NodeName, image: ImageId, role: Role, current: Option<Placement>) {
        let Some(key) = self.members.key(name) else {
            self.actions.push(Action::Unknown { node: name.clone() });
            return;
        };
        let shaping = self.shaping(&image);
        let stage = self.stage();
        let reported = current.as_ref().map_or(0, |placement| placement.stripes.len());
        self.members.get_mut(key).images.insert(image);
        self.hierarchies.entry(image).or_insert_with(|| Hierarchy::new(image, shaping.first(reported)));
        self.change(image, |hierarchy, members| {
            if stage == Stage::Learning && !hierarchy.has_reports() {
                hierarchy.reshape(members, shaping.reported(hierarchy.shape(), reported));
            }
            if stage == Stage::Planning || !hierarchy.has_reports() {
                hierarchy
                    .reshape(members, shaping.grown(hierarchy.shape(), hierarchy.relays_with(key, role)));
            }
            hierarchy.attach(members, key, role, current, stage);
        });
    }

    fn detach(&mut self, key: Key, image: ImageId) {
        let above = self.remove_from_hierarchy(key, image);
        self.release(image, above);
    }

    fn leave(&mut self, node: NodeName, image: ImageId) {
        let Some(key) = self.members.key(&node) else {
            self.actions.push(Action::Unknown { node });
            return;
        };
        if !self.members.get(key).images.contains(&image) {
            self.actions.push(Action::Released { node, image });
            return;
        }
        let (until, stage) = (self.now + self.settings.lease, self.stage());
        self.change(image, |hierarchy, members| hierarchy.leave(members, key, until, stage));
        self.release(image, vec![key]);
    }

    fn lost(&mut self, by: &NodeName, parent: &NodeName) {
        let Some((by, parent_key)) = self.pair(by, parent) else { return };
        let images = self.images_of(by);
        if !images.iter().any(|image| self.hierarchies[image].lists(by, parent)) {
            return;
        }
        let until = self.now + self.settings.lease;
        self.members.note_lost(by, parent_key, until);
        for image in images {
            self.change(image, |hierarchy, _| hierarchy.separate(by, parent_key));
        }
        if self.members.is_deserted(parent_key, &self.children_of(parent_key))
            && self.members.suspect(parent_key, until)
        {
            self.actions.push(Action::Suspect { node: parent.clone() });
            self.reassess(parent);
        }
    }

    fn blame(&mut self, by: &NodeName, liar: &NodeName, image: ImageId) {
        let Some((by, liar_key)) = self.pair(by, liar) else { return };
        let is_listed = |hierarchy: &Hierarchy| hierarchy.lists(by, liar);
        // The accuser may have lost the liar first and been moved.
        if !self.hierarchies.get(&image).is_some_and(is_listed) && !self.members.avoids(by, liar_key) {
            return;
        }
        let accusers = self.members.note_blame(by, liar_key);
        let only_child = self.children_of(liar_key) == BTreeSet::from([by]);
        for image in self.images_of(by) {
            self.change(image, |hierarchy, _| hierarchy.separate(by, liar_key));
        }
        let images = self.images_of(liar_key);
        let needed = images.iter().any(|image| self.hierarchies[image].depends_on(liar_key));
        if (accusers >= ACCUSERS_MIN || only_child) && !needed {
            self.quarantine(liar);
        }
    }

    fn quarantine(&mut self, name: &NodeName) {
        if self.members.quarantine(name) {
            self.actions.push(Action::Quarantine { node: name.clone() });
            self.reassess(name);
        }
    }

    fn tune(&mut self, image: ImageId, shaping: Option<Shaping>) {
        match shaping {
            Some(shaping) => self.shapings.insert(image, shaping),
            None => self.shapings.remove(&image),
        };
        let shaping = self.shaping(&image);
        self.change(image, |hierarchy, members| {
            hierarchy.reshape(members, shaping.fitting(hierarchy.shape(), hierarchy.relays()));
        });
    }

    fn tick(&mut self) {
        let now = self.now;
        self.members.lapsed(now).into_iter().for_each(|key| self.remove_dead(key));
        let late = |(&image, hierarchy): (&ImageId, &Hierarchy)| {
            hierarchy.unconfirmed(now).into_iter().map(move |key| (key, image)).collect::<Vec<_>>()
        };
        let unconfirmed: Vec<_> = self.hierarchies.iter().flat_map(late).collect();
        unconfirmed.into_iter().for_each(|(key, image)| self.detach(key, image));
        for key in self.members.expire(now) {
            let name = self.members.get(key).name.clone();
            self.reassess(&name);
        }
        for image in self.images().collect::<Vec<_>>() {
            let leaving = self.hierarchies[&image].leaving();
            self.release(image, leaving);
        }
        self.settle();
        if self.stage() == Stage::Planning {
            for image in self.images().collect::<Vec<_>>() {
                let shaping = self.shaping(&image);
                self.change(image, |hierarchy, members| {
                    hierarchy.reshape(members, shaping.fitting(hierarchy.shape(), hierarchy.relays()));
                    hierarchy.promote(members);
                });
            }
        }
    }
}

/// What several events have in common.
impl Planner {
    /// The first event begins the time to learn; the first one after it ends it.
    fn learn(&mut self) {
        match self.learning {
            Learning::NotBegun => self.learning = Learning::Until(self.now + self.settings.lease),
            Learning::Until(end) if end <= self.now => {
                self.learning = Learning::Done;
                for image in self.images().collect::<Vec<_>>() {
                    self.change(image, Hierarchy::stop_waiting);
                }
            }
            Learning::Until(_) | Learning::Done => {}
        }
    }

    fn stage(&self) -> Stage {
        if self.learning == Learning::Done { Stage::Planning } else { Stage::Learning }
    }

    fn remove_dead(&mut self, key: Key) {
        self.actions.push(Action::Dead { node: self.members.get(key).name.clone() });
        for image in self.images_of(key) {
            self.detach(key, image);
        }
        self.members.remove(key);
    }

    /// Takes a node out of a hierarchy. Returns who were its parents.
    fn remove_from_hierarchy(&mut self, key: Key, image: ImageId) -> Vec<Key> {
        if !self.members.get_mut(key).images.remove(&image) {
            return Vec::new();
        }
        let parents = self.hierarchies[&image].parents(key);
        self.change(image, |hierarchy, members| hierarchy.detach(members, key));
        parents.into_iter().collect()
    }

    /// Releases those of the nodes that may leave, and then whoever waited for them alone: from the leaves up.
    fn release(&mut self, image: ImageId, mut candidates: Vec<Key>) {
        while let Some(key) = candidates.pop() {
            let Some(hierarchy) = self.hierarchies.get(&image) else { return };
            for leaver in hierarchy.may_leave_with(key, self.now, self.stage()) {
                self.actions.push(Action::Released { node: self.members.get(leaver).name.clone(), image });
                candidates.extend(self.remove_from_hierarchy(leaver, image));
            }
        }
    }

    /// Applies a change of the node's standing, and of whom it avoids.
    fn reassess(&mut self, name: &NodeName) {
        let Some(key) = self.members.key(name) else { return };
        for image in self.images_of(key) {
            self.change(image, |hierarchy, members| {
                hierarchy.reassess(members, key);
                hierarchy.review(key);
            });
        }
    }

    fn change(&mut self, image: ImageId, change: impl FnOnce(&mut Hierarchy, &Membership)) {
        if let Some(hierarchy) = self.hierarchies.get_mut(&image) {
            change(hierarchy, &self.members);
            self.touched.insert(image);
        }
    }

    /// Brings the hierarchies that were touched in order, and tells the nodes.
    fn settle(&mut self) {
        let stage = self.stage();
        for image in std::mem::take(&mut self.touched) {
            let Some(hierarchy) = self.hierarchies.get_mut(&image) else { continue };
            hierarchy.settle(&self.members, stage);
            hierarchy.flush(&self.members, &mut self.actions);
            if hierarchy.is_empty() {
                self.hierarchies.remove(&image);
            }
        }
    }

    fn shaping(&self, image: &ImageId) -> Shaping {
        self.shapings.get(image).copied().unwrap_or(self.settings.shaping)
    }

    fn images_of(&self, key: Key) -> Vec<ImageId> {
        self.members.get(key).images.iter().copied().collect()
    }

    fn children_of(&self, key: Key) -> BTreeSet<Key> {
        self.images_of(key).iter().flat_map(|image| self.hierarchies[image].children(key)).collect()
    }

    /// Two different live nodes.
    fn pair(&self, one: &NodeName, other: &NodeName) -> Option<(Key, Key)> {
        let pair = (self.members.key(one)?, self.members.key(other)?);
        (pair.0 != pair.1).then_some(pair)
    }
}

#[cfg(test)]
impl Planner {
    /// Panics unless every invariant of this crate holds.
    pub(crate) fn check(&self) {
        for (image, hierarchy) in &self.hierarchies {
            assert!(!hierarchy.is_empty(), "{image} is kept for nobody");
            hierarchy.check(&self.members, self.stage());
        }
        for key in self.members.by_name() {
            for image in self.images_of(key) {
                assert!(self.hierarchies[&image].told(key).is_some(), "a node has a seat per image");
            }
        }
    }
}
