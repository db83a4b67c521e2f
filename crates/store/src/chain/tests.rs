//! Disks, their snapshots and their clones through random operations and crashes, against a model.
//!
//! The records that say which layer stands on which are kept here, changed at once and never lost: that they
//! are written whole is another part's promise. What is tried is that the layers are what the records say.

use std::collections::BTreeMap;

use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::Notify;

use super::*;
use crate::overlay::tests::model::{BASE_SIZE, Change, Model, SIZE, poll_some};
use crate::overlay::tests::{Base, Trio, read};

/// Most layers: enough for all shapes of trees.
const LAYERS_MAX: usize = 12;

/// A change of no byte: nothing was under way.
const NOTHING: Change = Change::Discard { offset: 0, len: 0 };

/// What is wrong with a layer's media.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Full,
    Broken,
}

impl Fault {
    fn must_cause(self, error: &DiskError, what: &str) {
        let fits = match self {
            Fault::Full => matches!(error, DiskError::NoSpace),
            Fault::Broken => matches!(error, DiskError::Io(_)),
        };
        assert!(fits, "{what}: {self:?} media cannot cause {error:?}");
    }
}

struct Layer {
    trio: Trio,
    overlay: Arc<Overlay>,
    /// `None` is the image.
    parent: Option<usize>,
}

struct Vm {
    top: usize,
    chain: Chain,
    model: Model,
    /// Frozen layers and what they must read as.
    snapshots: Vec<(usize, Vec<u8>)>,
}

struct World {
    random: StdRng,
    base: Arc<Base>,
    next: usize,
    layers: BTreeMap<usize, Layer>,
    vms: Vec<Vm>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = vec![0; BASE_SIZE];
        random.fill(&mut bytes[..]);
        let mut world = World {
            random,
            base: Base::new(bytes.clone()),
            next: 0,
            layers: BTreeMap::new(),
            vms: Vec::new(),
        };
        let top = world.add_layer(None);
        world.add_vm(top, Model::new(&bytes));
        world
    }

    fn add_layer(&mut self, parent: Option<usize>) -> usize {
        let trio = Trio::new(self.random.random());
        let overlay = Arc::new(trio.create(SIZE, self.base_of(parent)));
        let id = self.next;
        self.next += 1;
        self.layers.insert(id, Layer { trio, overlay, parent });
        id
    }

    fn base_of(&self, parent: Option<usize>) -> Arc<dyn Disk> {
        match parent {
            Some(id) => Arc::clone(&self.layers[&id].overlay) as _,
            None => Arc::clone(&self.base) as _,
        }
    }

    fn add_vm(&mut self, top: usize, model: Model) {
        let chain = Chain::new(Arc::clone(&self.layers[&top].overlay));
        self.vms.push(Vm { top, chain, model, snapshots: Vec::new() });
    }

    /// Ends the process or the machine, and opens everything as the records say.
    fn restart(&mut self, crash: impl Fn(&Trio) -> Trio) {
        // Parents were always made before their children, and merging only replaces one by an older one.
        let ids: Vec<usize> = self.layers.keys().copied().collect();
        let tops: Vec<usize> = self.vms.iter().map(|vm| vm.top).collect();
        for id in ids {
            let trio = crash(&self.layers[&id].trio);
            let overlay = Arc::new(trio.open(self.base_of(self.layers[&id].parent)));
            if !tops.contains(&id) {
                overlay.set_frozen();
            }
            let layer = self.layers.get_mut(&id).unwrap();
            (layer.trio, layer.overlay) = (trio, overlay);
        }
        for vm in &mut self.vms {
            vm.chain = Chain::new(Arc::clone(&self.layers[&vm.top].overlay));
        }
    }

    /// Removes what no disk and no snapshot needs.
    fn sweep(&mut self) {
        let mut needed: Vec<usize> = Vec::new();
        for vm in &self.vms {
            for root in vm.snapshots.iter().map(|(layer, _)| *layer).chain([vm.top]) {
                let up = std::iter::successors(Some(root), |id| self.layers[id].parent);
                needed.extend(up);
            }
        }
        self.layers.retain(|id, _| needed.contains(id));
    }

    /// A frozen layer that no snapshot names and only one layer stands on, and that one.
    fn mergeable(&mut self) -> Option<(usize, usize)> {
        let is_named =
            |id: usize| self.vms.iter().any(|vm| vm.top == id || vm.snapshots.iter().any(|s| s.0 == id));
        let children = |id: usize| {
            self.layers
                .iter()
                .filter(move |(_, l)| l.parent == Some(id))
                .map(|(id, _)| *id)
                .collect::<Vec<_>>()
        };
        let pairs =
            self.layers.keys().filter(|&&id| !is_named(id)).filter_map(|&id| match children(id)[..] {
                [only] => Some((id, only)),
                _ => None,
            });
        pairs.choose(&mut self.random)
    }

    async fn check(&self, what: &str) {
        for (number, vm) in self.vms.iter().enumerate() {
            let now = read(&vm.chain, 0, SIZE as usize).await;
            assert!(now == vm.model.current(0, SIZE as usize), "{what}: disk {number} reads wrong");
            for (layer, expected) in &vm.snapshots {
                let now = read(&*self.layers[layer].overlay, 0, SIZE as usize).await;
                assert!(now == *expected, "{what}: snapshot {layer} of disk {number} reads wrong");
            }
        }
    }

    async fn snapshot(&mut self, at: usize, what: &str) {
        let next = self.add_layer(Some(self.vms[at].top));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let change = Change::random(&mut self.random);
        let is_late = self.random.random();
        let paused = Notify::new();
        let vm = &mut self.vms[at];
        // A change is under way when it is taken: each of its blocks is in the snapshot, or is not and never will.
        let freeze = async {
            let commit = async {
                paused.notify_one();
                tokio::task::yield_now().await;
                Ok(overlay)
            };
            let frozen = vm.chain.freeze::<DiskError>(commit).await.unwrap();
            read(&*frozen.layer, 0, SIZE as usize).await
        };
        let late_change = async {
            if is_late {
                paused.notified().await;
            }
            change.run(&vm.chain).await
        };
        let (changed, frozen) = futures_util::join!(late_change, freeze);
        changed.unwrap();
        let layer = Arc::clone(&self.layers[&vm.top].overlay);
        let mut then = vm.model.clone();
        then.done_in_part(&change, &*layer, what).await;
        assert!(then.current(0, SIZE as usize) == frozen, "{what}: a frozen layer changed");
        vm.snapshots.push((vm.top, frozen));
        vm.top = next;
        vm.model.flushed();
        vm.model.done(&change);
    }

    /// Has a layer's media be full soon, or fail.
    fn spoil(&mut self, layer: usize) -> Fault {
        let trio = &self.layers[&layer].trio;
        if self.random.random() {
            trio.fill_up(self.random.random_range(0..60_000));
            Fault::Full
        } else {
            trio.fail_after(self.random.random_range(0..8));
            Fault::Broken
        }
    }

    /// Puts right what [`World::spoil`] did: somebody makes room, or whatever failed is started anew.
    async fn mend(&mut self, layer: usize, fault: Fault, what: &str) {
        match fault {
            Fault::Full => self.layers[&layer].trio.repair(),
            Fault::Broken if self.random.random() => self.restart(Trio::kill),
            Fault::Broken => self.power_cut(0, &NOTHING, what).await,
        }
        self.check(what).await;
    }

    /// Takes a snapshot while there is little room, or the media fail: it is taken, or all is as it was.
    async fn snapshot_in_trouble(&mut self, at: usize, what: &str) {
        let top = self.vms[at].top;
        let next = self.add_layer(Some(top));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let fault = self.spoil(top);
        let vm = &mut self.vms[at];
        match vm.chain.freeze::<DiskError>(async { Ok(overlay) }).await {
            Ok(_) => {
                vm.snapshots.push((top, vm.model.current(0, SIZE as usize)));
                vm.top = next;
                vm.model.flushed();
            }
            Err(error) => fault.must_cause(&error, what),
        }
        self.mend(top, fault, what).await;
    }

    /// Merges while there is little room above, or the media of one of the two fail: it is done, or all is as it was.
    async fn merge_in_trouble(&mut self, what: &str) {
        let Some((lower, upper)) = self.mergeable() else { return };
        let (below, above) = (&self.layers[&lower].overlay, &self.layers[&upper].overlay);
        let (below, above) = (Arc::clone(below), Arc::clone(above));
        let spoilt = if self.random.random() { upper } else { lower };
        let fault = self.spoil(spoilt);
        let merged = async {
            for range in below.own_ranges() {
                above.pull(range).await?;
            }
            above.flush().await
        };
        match merged.await {
            Ok(()) if spoilt == upper => self.merged(lower, upper),
            Ok(()) => {}
            Err(error) => fault.must_cause(&error, what),
        }
        self.mend(spoilt, fault, what).await;
    }

    /// Cuts the power while the disk `at` is changed.
    async fn power_cut(&mut self, at: usize, change: &Change, what: &str) {
        self.restart(Trio::power_cut);
        for (number, vm) in self.vms.iter_mut().enumerate() {
            let change = if number == at { change } else { &NOTHING };
            vm.model.crashed(change, &vm.chain, what).await;
        }
    }

    /// Sets a disk back to one of its snapshots.
    async fn revert(&mut self, at: usize) {
        let Some((layer, bytes)) = self.vms[at].snapshots.iter().choose(&mut self.random).cloned() else {
            return;
        };
        let next = self.add_layer(Some(layer));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let vm = &mut self.vms[at];
        vm.chain.freeze::<DiskError>(async { Ok(overlay) }).await.unwrap();
        vm.top = next;
        vm.model = Model::new(&bytes);
    }

    fn clone_disk(&mut self, at: usize) {
        let Some((layer, bytes)) = self.vms[at].snapshots.iter().choose(&mut self.random).cloned() else {
            return;
        };
        let top = self.add_layer(Some(layer));
        self.add_vm(top, Model::new(&bytes));
    }

    /// Merges a layer into the one above, or gives that up half-way.
    async fn merge(&mut self) {
        let Some((lower, upper)) = self.mergeable() else { return };
        let below = Arc::clone(&self.layers[&lower].overlay);
        let above = Arc::clone(&self.layers[&upper].overlay);
        let mut random = StdRng::seed_from_u64(self.random.random());
        let is_given_up = random.random();
        for range in below.own_ranges() {
            if is_given_up {
                poll_some(&mut random, async { above.pull(range).await.map(drop) }).await;
            } else {
                above.pull(range).await.unwrap();
            }
        }
        if is_given_up {
            return;
        }
        above.flush().await.unwrap();
        self.merged(lower, upper);
    }

    /// Lets `upper`, which holds all of `lower` durably, stand on what that stands on.
    fn merged(&mut self, lower: usize, upper: usize) {
        let parent = self.layers[&lower].parent;
        self.layers[&upper].overlay.set_base(self.base_of(parent));
        self.layers.get_mut(&upper).unwrap().parent = parent;
        self.layers.remove(&lower);
        // A flush of a top covers what its guest wrote too.
        for vm in self.vms.iter_mut().filter(|vm| vm.top == upper) {
            vm.model.flushed();
        }
    }

    async fn step(&mut self, what: &str) {
        let at = self.random.random_range(0..self.vms.len());
        let change = Change::random(&mut self.random);
        let has_room = self.layers.len() < LAYERS_MAX;
        match self.random.random_range(0..28) {
            0..8 => {
                let vm = &mut self.vms[at];
                change.run(&vm.chain).await.unwrap();
                vm.model.done(&change);
            }
            8..10 => {
                let vm = &mut self.vms[at];
                vm.chain.flush().await.unwrap();
                vm.model.flushed();
            }
            10..13 if has_room => self.snapshot(at, what).await,
            13 if has_room => self.revert(at).await,
            14 if has_room => self.clone_disk(at),
            15 => {
                let vm = &mut self.vms[at];
                if !vm.snapshots.is_empty() {
                    vm.snapshots.remove(self.random.random_range(0..vm.snapshots.len()));
                }
            }
            16 if self.vms.len() > 1 => drop(self.vms.remove(at)),
            17..20 => self.merge().await,
            20 => {
                let vm = &self.vms[at];
                let refused = vm.chain.freeze::<DiskError>(async { Err(DiskError::NoSpace) }).await;
                assert!(matches!(refused, Err(DiskError::NoSpace)));
            }
            21 => {
                poll_some(&mut self.random, change.run(&self.vms[at].chain)).await;
                self.restart(Trio::kill);
                let vm = &mut self.vms[at];
                vm.model.done_in_part(&change, &vm.chain, what).await;
            }
            22 => {
                poll_some(&mut self.random, change.run(&self.vms[at].chain)).await;
                self.power_cut(at, &change, what).await;
            }
            23 | 24 if has_room => self.snapshot_in_trouble(at, what).await,
            25 | 26 => self.merge_in_trouble(what).await,
            _ => {}
        }
        self.sweep();
    }
}

async fn run(seed: u64) {
    let mut world = World::new(seed);
    for step in 0..150 {
        let what = format!("seed {seed}, step {step}");
        world.step(&what).await;
        if step % 10 == 0 {
            world.check(&what).await;
        }
    }
    world.check(&format!("seed {seed}, the end")).await;
}

#[tokio::test]
async fn disks_snapshots_and_clones_through_crashes_agree_with_the_model() {
    for seed in 0..40 {
        run(seed).await;
    }
}
