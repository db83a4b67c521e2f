//! Disks, their snapshots and their clones through random operations and crashes, against a model.
//!
//! Which layer stands on which is kept here, changed at once and never lost; which layers a disk has is in a record that
//! a power cut may set back to what was synced. That both are written whole is another part's promise. What is tried is
//! that the layers are what the records say.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

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
    /// It was frozen, and a flush covered it since.
    is_durable: bool,
}

/// What a disk's record says.
#[derive(Debug, Clone)]
struct Record {
    top: usize,
    /// Frozen layers and what they must read as.
    snapshots: Vec<(usize, Vec<u8>)>,
}

/// The record now, and after a power cut if that comes before the next sync.
struct RecordFile {
    now: Record,
    durable: Record,
}

impl RecordFile {
    fn new(top: usize) -> Arc<Mutex<RecordFile>> {
        let record = Record { top, snapshots: Vec::new() };
        Arc::new(Mutex::new(RecordFile { now: record.clone(), durable: record }))
    }

    fn sync(&mut self) {
        self.durable = self.now.clone();
    }

    fn is_synced(&self) -> bool {
        self.now.top == self.durable.top
    }

    /// The layers that it may name, now or later.
    fn names(&self) -> impl Iterator<Item = usize> {
        [&self.now, &self.durable]
            .into_iter()
            .flat_map(|record| record.snapshots.iter().map(|(layer, _)| *layer).chain([record.top]))
    }
}

struct Vm {
    record: Arc<Mutex<RecordFile>>,
    chain: Chain,
    model: Model,
}

impl Vm {
    fn record(&self) -> MutexGuard<'_, RecordFile> {
        self.record.lock().unwrap()
    }

    fn top(&self) -> usize {
        self.record().now.top
    }

    /// Any of its snapshots.
    fn choose(&self, random: &mut StdRng) -> Option<(usize, Vec<u8>)> {
        self.record().now.snapshots.iter().choose(random).cloned()
    }
}

/// What writes down that `next` is on top, for [`Chain::freeze`].
async fn put(
    file: &Mutex<RecordFile>,
    next: usize,
    snapshot: Option<(usize, Vec<u8>)>,
    overlay: Arc<Overlay>,
) -> Result<Arc<Overlay>, DiskError> {
    let mut file = file.lock().unwrap();
    file.now.top = next;
    file.now.snapshots.extend(snapshot);
    Ok(overlay)
}

struct World {
    random: StdRng,
    base: Arc<Base>,
    next: usize,
    layers: BTreeMap<usize, Layer>,
    vms: Vec<Vm>,
    /// Power cuts that set a record back.
    set_back: usize,
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
            set_back: 0,
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
        self.layers.insert(id, Layer { trio, overlay, parent, is_durable: false });
        id
    }

    fn base_of(&self, parent: Option<usize>) -> Arc<dyn Disk> {
        match parent {
            Some(id) => Arc::clone(&self.layers[&id].overlay) as _,
            None => Arc::clone(&self.base) as _,
        }
    }

    fn add_vm(&mut self, top: usize, model: Model) {
        let record = RecordFile::new(top);
        let chain = self.open_chain(&record);
        self.vms.push(Vm { record, chain, model });
    }

    fn open_chain(&self, file: &Arc<Mutex<RecordFile>>) -> Chain {
        let top = file.lock().unwrap().now.top;
        let overlay = |id: usize| Arc::clone(&self.layers[&id].overlay);
        let below = self.up(top).skip(1).map(overlay).collect();
        let file = Arc::clone(file);
        let sync = move || {
            file.lock().unwrap().sync();
            Ok(())
        };
        Chain::new(overlay(top), below, Box::new(sync))
    }

    /// A layer and those below it.
    fn up(&self, from: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(from), |id| self.layers[id].parent)
    }

    /// A flush covered all that was done with a disk.
    fn settled(&mut self, at: usize) {
        assert!(self.vms[at].record().is_synced());
        for id in self.up(self.vms[at].top()).skip(1).collect::<Vec<_>>() {
            self.layers.get_mut(&id).unwrap().is_durable = true;
        }
    }

    fn is_settled(&self, vm: &Vm) -> bool {
        vm.record().is_synced() && self.up(vm.top()).skip(1).all(|id| self.layers[&id].is_durable)
    }

    async fn flush(&mut self, at: usize) {
        self.vms[at].chain.flush().await.unwrap();
        self.vms[at].model.flushed();
        self.settled(at);
    }

    /// Ends the process, and opens everything as the records say, which are synced first.
    fn kill(&mut self) {
        for vm in &self.vms {
            vm.record().sync();
        }
        self.restart(Trio::kill);
    }

    /// Opens everything as the records say.
    fn restart(&mut self, crash: impl Fn(&Trio) -> Trio) {
        // Parents were always made before their children, and merging only replaces one by an older one.
        let ids: Vec<usize> = self.layers.keys().copied().collect();
        let tops: Vec<usize> = self.vms.iter().map(Vm::top).collect();
        for id in ids {
            let trio = crash(&self.layers[&id].trio);
            let overlay = Arc::new(trio.open(self.base_of(self.layers[&id].parent)));
            if !tops.contains(&id) {
                overlay.set_frozen();
            }
            let layer = self.layers.get_mut(&id).unwrap();
            (layer.trio, layer.overlay) = (trio, overlay);
        }
        for at in 0..self.vms.len() {
            self.vms[at].chain = self.open_chain(&self.vms[at].record);
        }
    }

    /// Removes what no disk and no snapshot needs.
    fn sweep(&mut self) {
        let roots = self.vms.iter().flat_map(|vm| vm.record().names().collect::<Vec<_>>());
        let needed: Vec<usize> = roots.flat_map(|root| self.up(root)).collect();
        self.layers.retain(|id, _| needed.contains(id));
    }

    /// A frozen layer that no snapshot names and only one layer stands on, and that one.
    fn mergeable(&mut self) -> Option<(usize, usize)> {
        let is_named = |id: usize| self.vms.iter().any(|vm| vm.record().names().any(|named| named == id));
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
            let snapshots = vm.record().now.snapshots.clone();
            for (layer, expected) in snapshots {
                let now = read(&*self.layers[&layer].overlay, 0, SIZE as usize).await;
                assert!(now == expected, "{what}: snapshot {layer} of disk {number} reads wrong");
            }
        }
    }

    async fn snapshot(&mut self, at: usize, what: &str) {
        let top = self.vms[at].top();
        let next = self.add_layer(Some(top));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let change = Change::random(&mut self.random);
        let is_late = self.random.random();
        let paused = Notify::new();
        let vm = &mut self.vms[at];
        // A change is under way when it is taken: each of its blocks is in the snapshot, or is not and never will.
        let freeze = async {
            let record = async {
                paused.notify_one();
                tokio::task::yield_now().await;
                put(&vm.record, next, None, overlay).await
            };
            let frozen = vm.chain.freeze::<DiskError>(record).await.unwrap();
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
        let layer = Arc::clone(&self.layers[&top].overlay);
        let mut then = vm.model.clone();
        then.done_in_part(&change, &*layer, what).await;
        assert!(then.current(0, SIZE as usize) == frozen, "{what}: a frozen layer changed");
        vm.record().now.snapshots.push((top, frozen));
        // It began with a flush.
        vm.model.flushed();
        vm.model.done(&change);
        if self.random.random() {
            self.vms[at].chain.settle().await.unwrap();
            self.settled(at);
        }
    }

    /// Ends the process or the machine while a snapshot is taken and the disk changed: it is there as a whole, or all
    /// is as it was.
    async fn snapshot_cut_short(&mut self, at: usize, what: &str) {
        let top = self.vms[at].top();
        let next = self.add_layer(Some(top));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let change = Change::random(&mut self.random);
        let turns_before_change = self.random.random_range(0..8);
        // It ends somewhere, or soon after the next layer is on top.
        let (turns, mut turns_on_top) = match self.random.random() {
            true => (self.random.random_range(0..12), 100),
            false => (100, self.random.random_range(0..3)),
        };
        {
            let vm = &self.vms[at];
            let mut taken = pin!(async {
                vm.chain.freeze(put(&vm.record, next, None, overlay)).await?;
                vm.chain.settle().await
            });
            let mut changed = pin!(change.run(&vm.chain).fuse());
            // A change that waits for the image's bytes now is done when all before it has been flushed.
            let _ = changed.as_mut().now_or_never();
            for turn in 0..turns {
                if taken.as_mut().now_or_never().is_some() || turns_on_top == 0 {
                    break;
                }
                turns_on_top -= u32::from(vm.top() == next);
                if turn >= turns_before_change {
                    let _ = changed.as_mut().now_or_never();
                }
                // Each step of a snapshot is a turn of the blocking pool.
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        if self.random.random() {
            return self.power_cut(at, &change, what).await;
        }
        self.kill();
        let vm = &mut self.vms[at];
        vm.model.done_in_part(&change, &vm.chain, what).await;
        self.check(what).await;
        if self.random.random() {
            self.flush(at).await;
            self.power_cut(at, &NOTHING, what).await;
        }
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
            Fault::Broken if self.random.random() => self.kill(),
            Fault::Broken => self.power_cut(0, &NOTHING, what).await,
        }
        self.check(what).await;
    }

    /// Takes a snapshot while there is little room, or the media fail: it is taken, or all is as it was.
    async fn snapshot_in_trouble(&mut self, at: usize, what: &str) {
        let top = self.vms[at].top();
        let next = self.add_layer(Some(top));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let fault = self.spoil(top);
        let vm = &mut self.vms[at];
        let snapshot = (top, vm.model.current(0, SIZE as usize));
        match vm.chain.freeze(put(&vm.record, next, Some(snapshot), overlay)).await {
            Ok(_) => {
                vm.model.flushed();
                match vm.chain.settle().await {
                    Ok(()) => self.settled(at),
                    Err(error) => fault.must_cause(&error, what),
                }
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
                above.stream_from_base(range).await?;
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
        for vm in &self.vms {
            let mut record = vm.record();
            if self.random.random() && !record.is_synced() {
                record.now = record.durable.clone();
                self.set_back += 1;
            }
            // A snapshot that was not durable holds some of what it held.
            let is_durable = |id: usize| self.up(id).all(|id| self.layers[&id].is_durable);
            record.now.snapshots.retain(|(layer, _)| is_durable(*layer));
            record.sync();
        }
        self.restart(Trio::power_cut);
        for (number, vm) in self.vms.iter_mut().enumerate() {
            let change = if number == at { change } else { &NOTHING };
            vm.model.crashed(change, &vm.chain, what).await;
        }
    }

    /// Sets a disk back to one of its snapshots.
    async fn revert(&mut self, at: usize) {
        let Some((layer, bytes)) = self.vms[at].choose(&mut self.random) else { return };
        let next = self.add_layer(Some(layer));
        let overlay = Arc::clone(&self.layers[&next].overlay);
        let vm = &mut self.vms[at];
        vm.chain.freeze(put(&vm.record, next, None, overlay)).await.unwrap();
        vm.chain.settle().await.unwrap();
        vm.model = Model::new(&bytes);
        self.settled(at);
    }

    async fn clone_disk(&mut self, at: usize) {
        let Some((layer, bytes)) = self.vms[at].choose(&mut self.random) else { return };
        for id in self.up(layer).collect::<Vec<_>>() {
            let layer = self.layers.get_mut(&id).unwrap();
            layer.overlay.flush().await.unwrap();
            layer.is_durable = true;
        }
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
                poll_some(&mut random, async { above.stream_from_base(range).await.map(drop) }).await;
            } else {
                above.stream_from_base(range).await.unwrap();
            }
        }
        if is_given_up {
            return;
        }
        above.flush().await.unwrap();
        self.merged(lower, upper);
    }

    /// Merges a frozen layer into the one below, or gives that up half-way, or between two of its records.
    async fn merge_down(&mut self) {
        let Some((lower, upper)) = self.mergeable() else { return };
        // One that takes changes, or will again after a power cut.
        let is_top = |file: &RecordFile| file.now.top == upper || file.durable.top == upper;
        if self.vms.iter().any(|vm| is_top(&vm.record())) {
            return;
        }
        let below = Arc::clone(&self.layers[&lower].overlay);
        let above = Arc::clone(&self.layers[&upper].overlay);
        above.flush().await.unwrap();
        let mut random = StdRng::seed_from_u64(self.random.random());
        let is_given_up = random.random_range(0..3) == 0;
        for range in above.own_ranges() {
            if is_given_up {
                poll_some(&mut random, async { below.commit_from(&above, range).await.map(drop) }).await;
            } else {
                below.commit_from(&above, range).await.unwrap();
            }
        }
        if is_given_up {
            return;
        }
        below.flush().await.unwrap();
        self.layers.get_mut(&lower).unwrap().is_durable = true;
        for vm in &self.vms {
            let mut record = vm.record();
            let record = &mut *record;
            for record in [&mut record.now, &mut record.durable] {
                for (layer, _) in record.snapshots.iter_mut().filter(|(layer, _)| *layer == upper) {
                    *layer = lower;
                }
            }
        }
        let children: Vec<usize> =
            self.layers.iter().filter(|(_, layer)| layer.parent == Some(upper)).map(|(id, _)| *id).collect();
        for child in children {
            if random.random_range(0..8) == 0 {
                return;
            }
            self.layers[&child].overlay.set_base(self.base_of(Some(lower)));
            self.layers.get_mut(&child).unwrap().parent = Some(lower);
        }
    }

    /// Lets `upper`, which holds all of `lower` durably, stand on what that stands on.
    fn merged(&mut self, lower: usize, upper: usize) {
        let parent = self.layers[&lower].parent;
        self.layers[&upper].overlay.set_base(self.base_of(parent));
        self.layers.get_mut(&upper).unwrap().parent = parent;
        self.layers.remove(&lower);
        // A flush of a top covers what its guest wrote too.
        for at in 0..self.vms.len() {
            if self.vms[at].top() == upper && self.is_settled(&self.vms[at]) {
                self.vms[at].model.flushed();
            }
        }
    }

    async fn step(&mut self, what: &str) {
        let at = self.random.random_range(0..self.vms.len());
        let change = Change::random(&mut self.random);
        let has_room = self.layers.len() < LAYERS_MAX;
        match self.random.random_range(0..30) {
            0..8 => {
                let vm = &mut self.vms[at];
                change.run(&vm.chain).await.unwrap();
                vm.model.done(&change);
            }
            8..10 => self.flush(at).await,
            10..13 if has_room => self.snapshot(at, what).await,
            13 if has_room => self.revert(at).await,
            14 if has_room => self.clone_disk(at).await,
            15 => {
                let mut record = self.vms[at].record();
                let count = record.now.snapshots.len();
                if record.is_synced() && count > 0 {
                    record.now.snapshots.remove(self.random.random_range(0..count));
                    record.sync();
                }
            }
            16 if self.vms.len() > 1 => drop(self.vms.remove(at)),
            17..19 => self.merge().await,
            19 => self.merge_down().await,
            20 => {
                let vm = &self.vms[at];
                let refused = vm.chain.freeze::<DiskError>(async { Err(DiskError::NoSpace) }).await;
                assert!(matches!(refused, Err(DiskError::NoSpace)));
            }
            21 => {
                poll_some(&mut self.random, change.run(&self.vms[at].chain)).await;
                self.kill();
                let vm = &mut self.vms[at];
                vm.model.done_in_part(&change, &vm.chain, what).await;
            }
            22 => {
                poll_some(&mut self.random, change.run(&self.vms[at].chain)).await;
                self.power_cut(at, &change, what).await;
            }
            23 | 24 if has_room => self.snapshot_in_trouble(at, what).await,
            25 | 26 => self.merge_in_trouble(what).await,
            27 | 28 if has_room => self.snapshot_cut_short(at, what).await,
            _ => {}
        }
        self.sweep();
    }
}

/// Says how many power cuts set a record back.
async fn run(seed: u64) -> usize {
    let mut world = World::new(seed);
    for step in 0..150 {
        let what = format!("seed {seed}, step {step}");
        world.step(&what).await;
        if step % 10 == 0 {
            world.check(&what).await;
        }
    }
    world.check(&format!("seed {seed}, the end")).await;
    world.set_back
}

#[tokio::test]
async fn disks_snapshots_and_clones_through_crashes_agree_with_the_model() {
    let mut set_back = 0;
    for seed in 0..40 {
        set_back += run(seed).await;
    }
    assert!(set_back > 0, "no power cut came between a record and its sync");
}

/// A disk of one layer whose record can be synced or not, as `can_sync` says.
fn disk(trio: &Trio, can_sync: Arc<AtomicBool>) -> (Arc<Overlay>, Chain) {
    let overlay = Arc::new(trio.create(SIZE, Base::new(vec![9; BASE_SIZE])));
    let sync = move || match can_sync.load(Ordering::SeqCst) {
        true => Ok(()),
        false => Err(io::Error::other("the medium is gone")),
    };
    (Arc::clone(&overlay), Chain::new(overlay, Vec::new(), Box::new(sync)))
}

#[tokio::test]
async fn a_change_waits_for_the_record_and_not_for_the_medium() {
    let (lower, upper) = (Trio::new(1), Trio::new(2));
    let (overlay, chain) = disk(&lower, Arc::new(AtomicBool::new(true)));
    let next = Arc::new(upper.create(SIZE, overlay));
    // Every other read of the image takes a turn, and so the change that needs it.
    read(&chain, 0, 1).await;
    let mut change = chain.write(1, &[1; 10]);
    assert!((&mut change).now_or_never().is_none());
    let syncs = Cell::new(None);
    let mut frozen = pin!(chain.freeze(async {
        syncs.set(Some(lower.sync_count()));
        Ok::<_, DiskError>(next)
    }));
    for _ in 0..20 {
        assert!(frozen.as_mut().now_or_never().is_none());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(syncs.get(), None, "a change was under way");
    let before = lower.sync_count();
    change.await.unwrap();
    frozen.await.unwrap();
    assert_eq!(syncs.get(), Some(before), "nothing was synced while changes waited");
    assert_eq!(lower.sync_count(), before);
    chain.write(5, &[2; 10]).await.unwrap();
    chain.flush().await.unwrap();
    assert!(lower.sync_count() > before);
    assert_eq!(read(&chain, 0, 15).await, [&[9][..], &[1; 4], &[2; 10]].concat());
}

#[tokio::test]
async fn after_a_record_could_not_be_synced_no_flush_succeeds() {
    let (lower, upper) = (Trio::new(1), Trio::new(2));
    let can_sync = Arc::new(AtomicBool::new(false));
    let (overlay, chain) = disk(&lower, Arc::clone(&can_sync));
    let next = Arc::new(upper.create(SIZE, overlay));
    chain.freeze(async { Ok::<_, DiskError>(next) }).await.unwrap();
    for _ in 0..2 {
        let refused = chain.flush().await;
        assert!(
            matches!(&refused, Err(DiskError::Io(why)) if why.contains("the medium is gone")),
            "{refused:?}"
        );
        // A medium may say so once, and forget.
        can_sync.store(true, Ordering::SeqCst);
    }
    chain.write(0, &[1]).await.unwrap();
    assert_eq!(read(&chain, 0, 1).await, [1]);
}
