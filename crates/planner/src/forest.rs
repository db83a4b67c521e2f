//! The trees of one stripe of one plan, and the order in which places in them are given away. What is called
//! a node here may as well be a whole rack.
//!
//! Pure structure: names, leases and blame are not known here. A node is *rooted* if the root above it is
//! an origin, else *adrift*. Adrift nodes count their depth from [`ADRIFT`], so that every order by depth
//! puts rooted ones first.
//!
//! Invariants:
//! - `depth` of a child is that of its parent plus one; hence there are no cycles.
//! - `origins`, `orphans` and `waiting` partition the nodes without parent.
//! - `open`, `leaves`, `spares`, `idle` and `free` say of every node what follows from its own [`Spot`]:
//!   whoever changes a spot takes it out of the indexes first and puts it back afterwards.
//! - Every node whose list of peers may have changed is in `changed` until it is taken.
//!
//! Costs: finding a place is logarithmic. Linking and unlinking cost the size of the subtree that moves,
//! because its depths change; in a k-ary tree the mean size of a subtree is logarithmic too.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::location::Scope;

/// A node, for as long as it is known. Never reused; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key(pub(crate) u64);

impl Key {
    /// Keys from here on are not of nodes.
    const NOT_NODES: u64 = 1 << 62;

    /// What is outside a rack, seen from within.
    pub(crate) const OUTSIDE: Key = Key(Key::NOT_NODES);

    /// The key of the rack with this number.
    pub(crate) fn of_rack(number: u64) -> Key {
        Key(Key::NOT_NODES + 1 + number)
    }

    /// Whether it is a node's.
    pub(crate) fn is_node(self) -> bool {
        self.0 < Key::NOT_NODES
    }
}

/// Depth of an adrift root: more than any rooted node can have.
const ADRIFT: u32 = 1 << 30;

/// What a node without parent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Root {
    /// It holds the image and needs no parent.
    Origin,
    /// It has no parent because nobody can serve it.
    Orphan,
    /// Its parent is expected to report soon.
    Waiting,
}

#[derive(Debug)]
struct Spot {
    parent: Option<Key>,
    /// Meaningful only without parent.
    root: Root,
    children: BTreeSet<Key>,
    depth: u32,
    slots: u32,
    /// Narrowest first, everywhere last.
    scopes: Arc<[Scope]>,
}

/// The trees of one stripe.
#[derive(Debug, Default)]
pub(crate) struct StripeForest {
    spots: BTreeMap<Key, Spot>,
    origins: BTreeSet<Key>,
    orphans: BTreeSet<Key>,
    waiting: BTreeSet<Key>,
    /// Nodes that take another child, by scope, depth and number of children.
    open: BTreeSet<(Scope, u32, usize, Key)>,
    /// Nodes without children, by depth.
    leaves: BTreeSet<(u32, Key)>,
    /// Leaves that could take children.
    spares: BTreeSet<(u32, Key)>,
    /// Leaves that take none.
    idle: BTreeSet<(u32, Key)>,
    free: usize,
    changed: BTreeSet<Key>,
    /// The orphans at the last call of [`StripeForest::take_changed`].
    known_orphans: BTreeSet<Key>,
    /// Whether roots came or went since then.
    new_roots: bool,
}

impl StripeForest {
    /// Adds a node without parent and children that takes up to `slots` children.
    pub(crate) fn add(&mut self, key: Key, root: Root, slots: u32, scopes: Arc<[Scope]>) {
        let depth = if root == Root::Origin { 0 } else { ADRIFT };
        let spot = Spot { parent: None, root, children: BTreeSet::new(), depth, slots, scopes };
        let former = self.spots.insert(key, spot);
        debug_assert!(former.is_none(), "a node has one spot per stripe");
        self.roots_mut(root).insert(key);
        self.index(key);
        self.new_roots |= root == Root::Origin;
        self.mark_roots(root);
        self.changed.insert(key);
    }

    /// Removes a node that has neither parent nor children.
    pub(crate) fn remove(&mut self, key: Key) {
        self.unindex(key);
        let spot = self.spots.remove(&key).expect("only nodes of this forest are removed");
        debug_assert!(spot.parent.is_none() && spot.children.is_empty());
        self.roots_mut(spot.root).remove(&key);
        self.new_roots |= spot.root == Root::Origin;
        self.mark_roots(spot.root);
        self.changed.remove(&key);
        self.known_orphans.remove(&key);
    }

    /// Hangs a node without parent, with all that is below it, under `parent`.
    pub(crate) fn link(&mut self, child: Key, parent: Key) {
        debug_assert!(!self.is_within(parent, child), "a cycle");
        let root = self.spot(child).root;
        if root == Root::Waiting || self.known_orphans.remove(&child) || self.origins.len() != 1 {
            self.mark_below(child);
        }
        self.roots_mut(root).remove(&child);
        self.mark_roots(root);
        self.unindex(parent);
        self.spot_mut(parent).children.insert(child);
        self.index(parent);
        self.spot_mut(child).parent = Some(parent);
        self.relevel(child, self.spot(parent).depth + 1);
        self.mark_moved(child);
    }

    /// Takes a node, with all that is below it, from its parent if it has one. It is an orphan then.
    pub(crate) fn unlink(&mut self, child: Key) {
        let Some(parent) = self.spot(child).parent else { return };
        if !self.is_rooted(child) || self.origins.len() != 1 {
            self.mark_below(child);
        }
        self.mark_moved(child);
        self.unindex(parent);
        self.spot_mut(parent).children.remove(&child);
        self.index(parent);
        let spot = self.spot_mut(child);
        spot.parent = None;
        spot.root = Root::Orphan;
        self.orphans.insert(child);
        self.relevel(child, ADRIFT);
        self.mark_roots(Root::Orphan);
    }

    /// An orphan's parent is expected.
    pub(crate) fn await_parent(&mut self, key: Key) {
        if self.orphans.remove(&key) {
            self.spot_mut(key).root = Root::Waiting;
            self.waiting.insert(key);
            self.mark_roots(Root::Orphan);
        }
    }

    /// A waiting root has waited in vain.
    pub(crate) fn orphan(&mut self, key: Key) {
        if self.waiting.remove(&key) {
            self.spot_mut(key).root = Root::Orphan;
            self.orphans.insert(key);
            self.mark_roots(Root::Orphan);
        }
    }

    /// The node, with all that is below it, leaves its parent if it has one and needs none from now on.
    pub(crate) fn crown(&mut self, key: Key) {
        self.unlink(key);
        self.turn(key, Root::Origin, 0);
    }

    /// A root needs a parent from now on.
    pub(crate) fn uncrown(&mut self, key: Key) {
        self.turn(key, Root::Orphan, ADRIFT);
    }

    fn turn(&mut self, key: Key, root: Root, depth: u32) {
        let former = std::mem::replace(&mut self.spot_mut(key).root, root);
        self.roots_mut(former).remove(&key);
        self.roots_mut(root).insert(key);
        self.new_roots = true;
        self.relevel(key, depth);
        self.mark_roots(former);
        self.mark_roots(root);
    }

    /// From now on the node takes up to `slots` children. Those that it has stay, even if they are more.
    pub(crate) fn set_slots(&mut self, key: Key, slots: u32) {
        self.unindex(key);
        self.spot_mut(key).slots = slots;
        self.index(key);
    }

    /// Whether the node is here.
    pub(crate) fn contains(&self, key: Key) -> bool {
        self.spots.contains_key(&key)
    }

    /// The node's parent.
    pub(crate) fn parent(&self, key: Key) -> Option<Key> {
        self.spot(key).parent
    }

    /// The node's children.
    pub(crate) fn children(&self, key: Key) -> &BTreeSet<Key> {
        &self.spot(key).children
    }

    /// How many more children the node takes.
    pub(crate) fn room(&self, key: Key) -> usize {
        let spot = self.spot(key);
        (spot.slots as usize).saturating_sub(spot.children.len())
    }

    /// How many children beyond its slots the node has. One that takes none at all keeps those it has.
    pub(crate) fn excess(&self, key: Key) -> usize {
        let spot = self.spot(key);
        if spot.slots == 0 { 0 } else { spot.children.len().saturating_sub(spot.slots as usize) }
    }

    /// What comes after the node when places are given away: its depth, adrift ones after rooted ones.
    pub(crate) fn rank(&self, key: Key) -> u32 {
        self.spot(key).depth
    }

    /// Steps up to the root above the node.
    pub(crate) fn depth(&self, key: Key) -> u32 {
        self.spot(key).depth % ADRIFT
    }

    /// Steps down from the node to the deepest below it. Costs the size of the subtree.
    pub(crate) fn height(&self, key: Key) -> u32 {
        let deepest = self.subtree(key).into_iter().map(|below| self.rank(below)).max();
        deepest.unwrap_or_default().saturating_sub(self.rank(key))
    }

    /// Whether the root above the node is an origin.
    pub(crate) fn is_rooted(&self, key: Key) -> bool {
        self.spot(key).depth < ADRIFT
    }

    /// Whether the node is expecting its parent to report.
    pub(crate) fn is_waiting(&self, key: Key) -> bool {
        self.waiting.contains(&key)
    }

    /// Whether `key` is `top` or below it.
    pub(crate) fn is_within(&self, key: Key, top: Key) -> bool {
        self.upwards(key).any(|above| above == top)
    }

    /// The node, its parent, and so on up to the root.
    pub(crate) fn upwards(&self, key: Key) -> impl Iterator<Item = Key> {
        std::iter::successors(Some(key), |&at| self.spot(at).parent)
    }

    /// The roots that need no parent.
    pub(crate) fn origins(&self) -> &BTreeSet<Key> {
        &self.origins
    }

    /// The roots that lack a parent.
    pub(crate) fn orphans(&self) -> &BTreeSet<Key> {
        &self.orphans
    }

    /// The roots whose parents are expected.
    pub(crate) fn waiting(&self) -> &BTreeSet<Key> {
        &self.waiting
    }

    /// How many more children all nodes together take.
    pub(crate) fn free(&self) -> usize {
        self.free
    }

    /// The best node to hang `child` under that `fits`: the shallowest, among those the nearest to the
    /// child, among those the one with the fewest children, then the oldest. Rooted ones come first.
    /// Costs one step for each node that does not fit.
    pub(crate) fn best_open(&self, child: Key, fits: impl Fn(Key) -> bool) -> Option<Key> {
        let scopes = &self.spot(child).scopes;
        let everywhere = scopes.last()?;
        let first_in = |scope: &Scope, depth: u32| {
            self.open
                .range((scope.clone(), depth, 0, Key(0))..)
                .take_while(|entry| entry.0 == *scope)
                .find(|entry| fits(entry.3))
                .map(|entry| (entry.1, entry.3))
        };
        let (depth, any) = first_in(everywhere, 0)?;
        let near = scopes.iter().filter_map(|scope| first_in(scope, depth)).find(|found| found.0 == depth);
        Some(near.map_or(any, |found| found.1))
    }

    /// The rooted nodes without children, deepest first.
    pub(crate) fn leaves_upwards(&self) -> impl Iterator<Item = Key> {
        self.leaves.range(..(ADRIFT, Key(0))).rev().map(|entry| entry.1)
    }

    /// The nodes without children that could take some, deepest first; rooted or adrift as `like` is.
    pub(crate) fn spares_upwards(&self, like: Key) -> impl Iterator<Item = Key> {
        let adrift = (ADRIFT, Key(0));
        let range =
            if self.is_rooted(like) { self.spares.range(..adrift) } else { self.spares.range(adrift..) };
        range.rev().map(|entry| entry.1)
    }

    /// The nodes that take another child, deepest first, of those the ones with the most children.
    pub(crate) fn open_upwards(&self) -> impl Iterator<Item = Key> {
        let everywhere = Scope::everywhere();
        let range = (everywhere.clone(), 0, 0, Key(0))..(everywhere, ADRIFT, 0, Key(0));
        self.open.range(range).rev().map(|entry| entry.3)
    }

    /// The rooted nodes that neither have children nor take any, shallowest first.
    pub(crate) fn idle_downwards(&self) -> impl Iterator<Item = Key> {
        self.idle.range(..(ADRIFT, Key(0))).map(|entry| entry.1)
    }

    /// The nodes whose lists of peers may have changed since the last call. A change of depth alone changes
    /// no list; another root, or none, changes those of all below it.
    pub(crate) fn take_changed(&mut self) -> BTreeSet<Key> {
        if std::mem::take(&mut self.new_roots) {
            self.changed.extend(self.spots.keys());
        }
        let fresh: Vec<Key> = self.orphans.difference(&self.known_orphans).copied().collect();
        fresh.into_iter().for_each(|orphan| self.mark_below(orphan));
        self.known_orphans.clone_from(&self.orphans);
        std::mem::take(&mut self.changed)
    }

    fn mark_below(&mut self, top: Key) {
        let below = self.subtree(top);
        self.changed.extend(below);
    }

    /// Marks as changed all that may list the node as parent or alternate, and the node itself.
    pub(crate) fn mark_around(&mut self, key: Key) {
        self.mark_moved(key);
        let grandchildren = self.spots[&key].children.iter().flat_map(|child| &self.spots[child].children);
        self.changed.extend(grandchildren);
    }

    /// Marks as changed all that list another peer if the node comes to its place or leaves it: not its
    /// grandchildren, whose lists go no further up.
    fn mark_moved(&mut self, key: Key) {
        let spot = &self.spots[&key];
        self.changed.insert(key);
        let family = match (spot.parent, spot.root) {
            (Some(parent), _) => Some(&self.spots[&parent].children),
            (None, Root::Origin) => Some(&self.origins),
            (None, Root::Orphan) => Some(&self.orphans),
            (None, Root::Waiting) => None,
        };
        let siblings = family.into_iter().flatten();
        let nephews = siblings.clone().flat_map(|key| &self.spots[key].children);
        self.changed.extend(siblings.chain(nephews).chain(&spot.children));
    }

    /// The node and all below it, parents first.
    pub(crate) fn subtree(&self, top: Key) -> Vec<Key> {
        let mut found = vec![top];
        let mut at = 0;
        while at < found.len() {
            found.extend(&self.spot(found[at]).children);
            at += 1;
        }
        found
    }

    fn relevel(&mut self, top: Key, depth: u32) {
        let former = self.spot(top).depth;
        if former == depth {
            return;
        }
        for key in self.subtree(top) {
            self.unindex(key);
            let spot = self.spot_mut(key);
            spot.depth = spot.depth - former + depth;
            self.index(key);
        }
    }

    /// Origins are alternates of each other's children, and orphans of each other.
    fn mark_roots(&mut self, root: Root) {
        match root {
            Root::Origin => {
                self.changed.extend(self.origins.iter().flat_map(|key| &self.spots[key].children));
            }
            Root::Orphan => self.changed.extend(&self.orphans),
            Root::Waiting => {}
        }
    }

    fn roots_mut(&mut self, root: Root) -> &mut BTreeSet<Key> {
        match root {
            Root::Origin => &mut self.origins,
            Root::Orphan => &mut self.orphans,
            Root::Waiting => &mut self.waiting,
        }
    }

    fn spot(&self, key: Key) -> &Spot {
        self.spots.get(&key).expect("only nodes of this forest are asked for")
    }

    fn spot_mut(&mut self, key: Key) -> &mut Spot {
        self.spots.get_mut(&key).expect("only nodes of this forest are changed")
    }

    fn index(&mut self, key: Key) {
        let spot = &self.spots[&key];
        let children = spot.children.len();
        let room = (spot.slots as usize).saturating_sub(children);
        self.free += room;
        if room > 0 {
            self.open.extend(spot.scopes.iter().map(|scope| (scope.clone(), spot.depth, children, key)));
        }
        if children == 0 {
            self.leaves.insert((spot.depth, key));
            let kind = if room > 0 { &mut self.spares } else { &mut self.idle };
            kind.insert((spot.depth, key));
        }
    }

    fn unindex(&mut self, key: Key) {
        let spot = &self.spots[&key];
        let children = spot.children.len();
        let room = (spot.slots as usize).saturating_sub(children);
        self.free -= room;
        if room > 0 {
            for scope in spot.scopes.iter() {
                self.open.remove(&(scope.clone(), spot.depth, children, key));
            }
        }
        self.leaves.remove(&(spot.depth, key));
        self.spares.remove(&(spot.depth, key));
        self.idle.remove(&(spot.depth, key));
    }
}

#[cfg(test)]
impl StripeForest {
    /// Panics unless the invariants at the head of this file hold.
    pub(crate) fn check(&self) {
        let mut fresh = StripeForest::default();
        for (&key, spot) in &self.spots {
            match spot.parent {
                Some(parent) => {
                    assert!(self.spots[&parent].children.contains(&key));
                    assert_eq!(spot.depth, self.spots[&parent].depth + 1);
                }
                None => {
                    assert_eq!(spot.depth, if spot.root == Root::Origin { 0 } else { ADRIFT });
                    fresh.roots_mut(spot.root).insert(key);
                }
            }
            for child in &spot.children {
                assert_eq!(self.spots[child].parent, Some(key));
            }
            let copy = Spot { children: spot.children.clone(), scopes: spot.scopes.clone(), ..*spot };
            fresh.spots.insert(key, copy);
            fresh.index(key);
        }
        assert_eq!(
            (&self.origins, &self.orphans, &self.waiting),
            (&fresh.origins, &fresh.orphans, &fresh.waiting)
        );
        assert_eq!(
            (&self.open, &self.leaves, &self.spares, &self.idle),
            (&fresh.open, &fresh.leaves, &fresh.spares, &fresh.idle)
        );
        assert_eq!(self.free, fresh.free);
    }
}
