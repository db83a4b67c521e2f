//! Derived images: the same as an import of the whole disk, at the price of what changed.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::{BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, FetchError, ImageId, Priority};
use image::{
    DeriveRequest, Derived, DerivedImage, ImageVolume, ImportError, ImportProgress, Kind, Novelty, OpenError,
    derive, difference,
};
use proptest::prelude::*;
use tokio::runtime::{Handle, Runtime};

use crate::sparse::{Counted, Sparse, assert_serves, import, opener, plain_difference};
use crate::support::{Bench, CHUNK, MIB, Unreachable, noise, runtime};

const GIB: u64 = 1 << 30;
/// Bytes of disk under one page of level 0.
const PAGE: u64 = 2048 * CHUNK;

fn request(
    base: &Arc<ImageVolume>,
    disk: &Arc<Sparse>,
    changed: &[Range<u64>],
    runtime: &Handle,
) -> DeriveRequest {
    DeriveRequest {
        base: Arc::clone(base),
        disk: Arc::clone(disk) as Arc<dyn Disk>,
        runtime: runtime.clone(),
        changed: changed.to_vec(),
        location: "frozen".to_owned(),
    }
}

/// A base that was imported, and what is needed to derive from it.
struct Setting {
    runtime: Runtime,
    bench: Bench,
    base: Arc<Sparse>,
    base_id: ImageId,
    source: Arc<Counted>,
}

impl Setting {
    fn new(base: Sparse) -> Setting {
        let (runtime, bench, base) = (runtime(), Bench::new(), Arc::new(base));
        let imported = import(&bench, &base, runtime.handle(), "base");
        let source = Counted::open(&imported, &base, runtime.handle());
        Setting { runtime, bench, base, base_id: imported.id, source }
    }

    fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    fn request(&self, disk: &Arc<Sparse>, changed: &[Range<u64>]) -> DeriveRequest {
        request(&self.source.volume(), disk, changed, self.handle())
    }

    fn try_derive(&self, request: &DeriveRequest) -> Result<Option<Derived>, ImportError> {
        derive(request, &self.bench.images(), &ImportProgress::default())
    }

    fn derive(&self, disk: &Arc<Sparse>, changed: &[Range<u64>]) -> Derived {
        self.try_derive(&self.request(disk, changed)).unwrap().expect("the disk differs from its base")
    }

    fn open(&self, derived: &Derived, disk: &Arc<Sparse>) -> DerivedImage {
        let base = Arc::clone(&self.source) as Arc<dyn ChunkSource>;
        DerivedImage::open(&derived.dir, opener(disk), base).unwrap()
    }

    fn volume(&self, derived: &Derived, disk: &Arc<Sparse>) -> ImageVolume {
        ImageVolume::new(derived.root.clone(), Arc::new(self.open(derived, disk)))
    }
}

/// A write: where as a part of the disk, or on which chunk that is there already; how much; and noise, or zeroes.
#[derive(Debug, Clone)]
struct Write {
    at: f64,
    on_chunk: Option<prop::sample::Index>,
    len: usize,
    seed: u64,
}

fn writes(count: Range<usize>) -> impl Strategy<Value = Vec<Write>> {
    let write = (0.0..1.0f64, any::<Option<prop::sample::Index>>(), 1usize..200_000, 0u64..6);
    let write = write.prop_map(|(at, on_chunk, len, seed)| Write { at, on_chunk, len, seed });
    prop::collection::vec(write, count)
}

/// Carries the writes out, and gives where they were, in order.
fn apply(disk: &Sparse, writes: &[Write]) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = writes
        .iter()
        .map(|write| {
            let anywhere = (disk.size_bytes() as f64 * write.at) as u64;
            let there = disk.positions();
            let at = match &write.on_chunk {
                Some(index) if !there.is_empty() => {
                    there[index.index(there.len())] * CHUNK + anywhere % CHUNK
                }
                _ => anywhere,
            };
            let data = if write.seed == 0 { vec![0; write.len] } else { noise(write.seed, write.len) };
            disk.put(at.min(disk.size_bytes() - 1), &data)
        })
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges
}

/// Sizes on both sides of where a tree gets another page, and another level.
fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..3 * CHUNK,
        PAGE - 2 * CHUNK..3 * PAGE,
        8 * GIB - 2 * CHUNK..8 * GIB + 2 * PAGE,
        (1 << 44) - 2 * CHUNK..(1 << 44) + PAGE,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_derived_image_is_what_an_import_of_the_whole_disk_gives(
        base_bytes in size(),
        bigger in prop::option::of(size()),
        before in writes(0..6),
        after in writes(0..6),
    ) {
        let base = Sparse::new(base_bytes);
        apply(&base, &before);
        let setting = Setting::new(base);
        let disk = Arc::new(setting.base.grown(bigger.map_or(0, |size| size.saturating_sub(base_bytes))));
        let changed = apply(&disk, &after);
        let whole = import(&setting.bench, &disk, setting.handle(), "whole");

        let derived = setting.try_derive(&setting.request(&disk, &changed)).unwrap();
        let Some(derived) = derived else {
            prop_assert_eq!(whole.id, setting.base_id, "only what is equal is not derived");
            return Ok(());
        };
        prop_assert_eq!(derived.root.encode(), whole.root.encode());
        setting.source.take_fetches();
        let volume = setting.volume(&derived, &disk);
        assert_serves(&volume, &disk, &setting.runtime);

        let expected = plain_difference(&setting.base, &disk);
        let of_base = setting.source.volume();
        let found = setting.runtime.block_on(difference(&of_base, &volume)).unwrap();
        prop_assert_eq!(&found, &expected);
        let back = setting.runtime.block_on(difference(&volume, &of_base)).unwrap();
        prop_assert_eq!(back, plain_difference(&disk, &setting.base));
        let of_disk = |range: &Range<ChunkIndex>| (range.start.0..range.end.0).filter(|at| !disk.chunk(*at).is_empty());
        let own = expected.iter().flat_map(of_disk).count() as u64;
        prop_assert_eq!(derived.bytes_changed, own * CHUNK);
    }

    #[test]
    fn the_difference_of_any_two_images_is_what_a_plain_comparison_gives(
        sizes in (size(), size()),
        both in writes(0..5),
        one in writes(0..5),
        other in writes(0..5),
    ) {
        let runtime = runtime();
        let bench = Bench::new();
        let (smaller, larger) = (sizes.0.min(sizes.1), sizes.0.max(sizes.1));
        let common = Sparse::new(smaller);
        apply(&common, &both);
        let (one_disk, other_disk) = (common.grown(0), common.grown(larger - smaller));
        apply(&one_disk, &one);
        apply(&other_disk, &other);
        let open = |disk: Sparse| {
            let disk = Arc::new(disk);
            let imported = import(&bench, &disk, runtime.handle(), "images");
            (Counted::open(&imported, &disk, runtime.handle()).volume(), disk)
        };
        let ((a, a_disk), (b, b_disk)) = (open(one_disk), open(other_disk));
        let found = runtime.block_on(difference(&a, &b)).unwrap();
        prop_assert_eq!(found, plain_difference(&a_disk, &b_disk));
        let found = runtime.block_on(difference(&b, &a)).unwrap();
        prop_assert_eq!(found, plain_difference(&b_disk, &a_disk));
    }
}

/// A disk of 20 GiB, two levels of pages, with a chunk in each of its first 40 level-0 pages.
fn wide() -> Setting {
    let base = Sparse::new(20 * GIB);
    for page in 0..40 {
        base.put(page * PAGE + 3 * CHUNK, &noise(page + 1, CHUNK as usize));
    }
    Setting::new(base)
}

#[test]
fn only_what_was_touched_is_read_fetched_and_kept() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let mut changed = vec![disk.put(5 * PAGE + 3 * CHUNK + 100, &noise(77, 4096))];
    changed.push(disk.put(5 * PAGE + 9 * CHUNK, &noise(78, 4096)));
    // The same bytes again, zeroes over zeroes, zeroes over data, and data where no page was.
    changed.push(disk.put(7 * PAGE + 3 * CHUNK, &setting.base.chunk(7 * 2048 + 3)));
    changed.push(disk.put(8 * PAGE, &[0; 4096]));
    changed.push(disk.put(9 * PAGE + 3 * CHUNK, &[0; CHUNK as usize]));
    changed.push(disk.put(100 * PAGE, b"new"));
    let derived = setting.derive(&disk, &changed);
    assert_eq!(setting.source.take_fetches(), 1 + 4, "the page on top, and one for each place that has any");
    assert_eq!(derived.bytes_changed, 3 * CHUNK);
    assert_eq!(derived.bytes_read, 4 * CHUNK, "holes are not read");
    assert_eq!(disk.bytes_read.load(Ordering::SeqCst), 4 * CHUNK);

    let file = |name: &str| fs::metadata(derived.dir.join(name)).unwrap();
    assert!(file("pages").blocks() * 512 <= 4 * CHUNK, "three pages: two of level 0 and the one above");
    assert_eq!(file("index").len(), 16 * (3 + 3), "three chunks and three pages");

    let image = setting.open(&derived, &disk);
    let fetch = |chunk: ChunkHash| setting.runtime.block_on(image.fetch(chunk, Priority::Guest));
    assert!(fetch(disk.name(5 * 2048 + 9)).is_ok());
    assert_eq!(setting.source.take_fetches(), 0, "what is its own does not need the base");
    assert!(fetch(disk.name(7 * 2048 + 3)).is_ok());
    assert_eq!(setting.source.take_fetches(), 1, "and what is the base's comes from there");
    assert_eq!(fetch(ChunkHash::ZERO).unwrap(), Chunk::zero());
    let stranger = fetch(ChunkHash::of(b"stranger"));
    assert!(matches!(stranger, Err(FetchError::NotHere(_))), "{stranger:?}");
    setting.source.take_fetches();

    let described = image.describe();
    assert_eq!((described.base, described.location.as_str()), (setting.base_id, "frozen"));
    assert_eq!((described.chunks_changed, described.chunks_zeroed), (3, 1));
    assert_eq!((image.id(), image.bytes_changed()), (derived.id, 3 * CHUNK));
}

#[test]
fn equal_subtrees_are_not_fetched_to_find_a_difference() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let changed = [disk.put(5 * PAGE + 9 * CHUNK, b"changed"), disk.put(30 * PAGE, b"changed too")];
    let derived = setting.derive(&disk, &changed);
    setting.source.take_fetches();
    let (base, other) = (setting.source.volume(), setting.volume(&derived, &disk));
    let found = setting.runtime.block_on(difference(&base, &other)).unwrap();
    assert_eq!(found, plain_difference(&setting.base, &disk));
    assert_eq!(setting.source.take_fetches(), 3, "the base's three pages above the two chunks");

    let found = setting.runtime.block_on(difference(&base, &setting.source.volume())).unwrap();
    assert_eq!(found, []);
    assert_eq!(setting.source.take_fetches(), 0, "equal roots say it all");
}

#[test]
fn a_disk_that_does_not_differ_is_its_base_and_leaves_nothing() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let same = disk.put(3 * CHUNK, &setting.base.chunk(3));
    assert!(setting.try_derive(&setting.request(&disk, &[])).unwrap().is_none());
    assert!(setting.try_derive(&setting.request(&disk, &[same])).unwrap().is_none());
    assert_eq!(setting.bench.images_entries(), 0);
    let grown = Arc::new(setting.base.grown(1));
    assert!(setting.try_derive(&setting.request(&grown, &[])).unwrap().is_some(), "a size is a difference");
}

#[test]
fn a_disk_that_changed_or_went_away_gives_errors_and_serves_again_when_put_back() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let changed = [disk.put(CHUNK, &noise(50, CHUNK as usize))];
    let derived = setting.derive(&disk, &changed);
    let name = disk.name(1);
    let image = setting.open(&derived, &disk);
    let fetch = || setting.runtime.block_on(image.fetch(name, Priority::Guest));

    disk.put(CHUNK, &[disk.chunk(1)[0] ^ 1]);
    assert!(matches!(fetch(), Err(FetchError::Wrong(_))));
    disk.put(CHUNK, &[disk.chunk(1)[0] ^ 1]);
    assert!(fetch().is_ok());
    disk.is_broken.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let away = fetch();
        assert!(
            matches!(&away, Err(FetchError::Storage { reason, .. }) if reason.contains("frozen")),
            "{away:?}"
        );
    }
    disk.is_broken.store(false, Ordering::SeqCst);
    assert!(fetch().is_ok());

    let other = Arc::new(setting.base.grown(CHUNK));
    let fetched = setting.runtime.block_on(setting.open(&derived, &other).fetch(name, Priority::Guest));
    assert!(
        matches!(&fetched, Err(FetchError::Storage { reason, .. }) if reason.contains("instead of")),
        "a disk of another size: {fetched:?}"
    );
}

#[test]
fn a_disk_that_failed_is_opened_anew() {
    let setting = wide();
    let (good, bad) = (Arc::new(setting.base.grown(0)), Arc::new(setting.base.grown(0)));
    let derived = setting.derive(&good, &[good.put(CHUNK, b"changed")]);
    let opened = Arc::new(AtomicUsize::new(0));
    let (count, name) = (Arc::clone(&opened), good.name(1));
    let opener = move |_: &str| {
        let disk = if count.fetch_add(1, Ordering::SeqCst) == 0 { &bad } else { &good };
        Ok(Arc::clone(disk) as Arc<dyn Disk>)
    };
    let base = Arc::clone(&setting.source) as Arc<dyn ChunkSource>;
    let image = DerivedImage::open(&derived.dir, Arc::new(opener), base).unwrap();
    let fetch = || setting.runtime.block_on(image.fetch(name, Priority::Guest));
    assert_eq!(opened.load(Ordering::SeqCst), 0, "it is opened when it is first read");
    assert!(matches!(fetch(), Err(FetchError::Wrong(_))));
    assert!(fetch().is_ok() && fetch().is_ok());
    assert_eq!(opened.load(Ordering::SeqCst), 2);
}

#[test]
fn images_are_derived_from_derived_ones() {
    let setting = wide();
    let first_disk = Arc::new(setting.base.grown(0));
    let changed = [first_disk.put(2 * CHUNK, b"first"), first_disk.put(11 * PAGE, b"stays")];
    let first = setting.derive(&first_disk, &changed);
    let base = Arc::new(setting.volume(&first, &first_disk));

    let disk = Arc::new(first_disk.grown(5));
    let changed = [disk.put(2 * CHUNK, b"second")];
    let second = setting.try_derive(&request(&base, &disk, &changed, setting.handle())).unwrap().unwrap();
    let below = Arc::new(setting.open(&first, &first_disk));
    let image = DerivedImage::open(&second.dir, opener(&disk), below).unwrap();
    assert_eq!((image.base(), image.location(), second.bytes_changed), (first.id, "frozen", CHUNK));
    let volume = ImageVolume::new(image.root().clone(), Arc::new(image));
    assert_serves(&volume, &disk, &setting.runtime);
}

#[test]
fn directories_of_both_kinds_are_told_apart_listed_removed_and_replaced() {
    let setting = wide();
    let images = setting.bench.images();
    let disk = Arc::new(setting.base.grown(0));
    let changed = [disk.put(2 * CHUNK, b"changed")];
    let derived = setting.derive(&disk, &changed);
    assert_eq!(derived.novelty, Novelty::New);
    assert_eq!(image::list(&images).unwrap(), [derived.id]);
    let kind_of = |dir| image::kind(dir).unwrap();
    let expected = Kind::Derived { base: setting.base_id, location: "frozen".to_owned() };
    assert_eq!(kind_of(&derived.dir), expected);

    // From elsewhere, and then from another base.
    let moved = DeriveRequest { location: "moved".to_owned(), ..setting.request(&disk, &changed) };
    let again = setting.try_derive(&moved).unwrap().unwrap();
    assert_eq!((again.id, again.novelty), (derived.id, Novelty::Known));
    let expected = Kind::Derived { base: setting.base_id, location: "moved".to_owned() };
    assert_eq!(kind_of(&derived.dir), expected);
    let other = Setting::new(setting.base.grown(0));
    other.base.put(9, b"another base");
    let other = Setting::new(other.base.grown(0));
    let range = 0..3 * CHUNK;
    let asked = other.request(&disk, std::slice::from_ref(&range));
    let from_other = derive(&asked, &images, &ImportProgress::default());
    let from_other = from_other.unwrap().unwrap();
    assert_eq!((from_other.id, from_other.novelty), (derived.id, Novelty::Known));
    assert_eq!(kind_of(&derived.dir), Kind::Derived { base: other.base_id, location: "frozen".to_owned() });
    assert_serves(&other.volume(&from_other, &disk), &disk, &setting.runtime);
    assert_eq!(setting.bench.images_entries(), 1, "nothing of the old ones is left");

    // An import is complete without a base: it takes the place, and keeps it.
    let whole = import(&setting.bench, &disk, setting.handle(), "../images");
    assert_eq!((whole.id, whole.novelty, kind_of(&whole.dir)), (derived.id, Novelty::Known, Kind::Imported));
    let again = setting.derive(&disk, &changed);
    assert_eq!((again.novelty, kind_of(&again.dir)), (Novelty::Known, Kind::Imported));
    let origin = Counted::open(&whole, &disk, setting.handle());
    assert_serves(&origin.volume(), &disk, &setting.runtime);

    fs::create_dir(images.join(".unfinished-x")).unwrap();
    image::sweep(&images).unwrap();
    image::remove(&images, derived.id).unwrap();
    assert_eq!(setting.bench.images_entries(), 0);
    assert!(matches!(image::kind(&derived.dir), Err(OpenError::Missing(_))));
}

#[test]
fn damage_in_a_derived_directory_is_noticed() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let derived = setting.derive(&disk, &[disk.put(2 * CHUNK, b"changed")]);
    let open = || {
        let base = Arc::clone(&setting.source) as Arc<dyn ChunkSource>;
        DerivedImage::open(&derived.dir, opener(&disk), base)
    };
    let pages = fs::File::options().write(true).open(derived.dir.join("pages")).unwrap();
    pages.write_all_at(&[0xaa], 32 * 5).unwrap();
    let volume = ImageVolume::new(derived.root.clone(), Arc::new(open().unwrap()));
    let read = setting.runtime.block_on(volume.read(2 * CHUNK, &mut [0]));
    assert!(read.is_err(), "a page that is not what its name says");
    for (name, bytes) in
        [("derived.json", &b"{}"[..]), ("index", b"odd"), ("pages", b"short"), ("root", b"x")]
    {
        let path = derived.dir.join(name);
        let good = fs::read(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        match open().err() {
            Some(OpenError::Damaged { path: damaged, .. }) => assert_eq!(damaged, path),
            other => panic!("{name}: {other:?}"),
        }
        fs::write(&path, good).unwrap();
    }
    assert!(open().is_ok());
}

/// A source that never answers, and whoever asked it gives up then.
struct Silent(Arc<ImportProgress>);

impl ChunkSource for Silent {
    fn fetch(&self, _: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        self.0.cancel();
        Box::pin(std::future::pending())
    }
}

#[test]
fn what_cannot_be_derived_says_why_and_leaves_nothing() {
    let setting = wide();
    let disk = Arc::new(setting.base.grown(0));
    let changed = [disk.put(3 * CHUNK, b"changed")];
    let refused = |request: &DeriveRequest| {
        let error = setting.try_derive(request).expect_err("this must not be derived");
        assert_eq!(setting.bench.images_entries(), 0, "something was left behind");
        error
    };
    let small = Arc::new(Sparse::new(GIB));
    let error = refused(&setting.request(&small, &[]));
    assert!(matches!(error, ImportError::Unsupported { .. }), "{error:?}");
    assert!(error.to_string().contains("frozen") && error.to_string().contains("1073741824"), "{error}");

    let root = setting.source.origin.root().clone();
    let away = Arc::new(ImageVolume::new(root.clone(), Arc::new(Unreachable)));
    let error = refused(&request(&away, &disk, &changed, setting.handle()));
    assert!(matches!(&error, ImportError::Base { id, .. } if *id == setting.base_id), "{error:?}");
    assert!(error.to_string().contains("no route"), "{error}");

    let progress = Arc::new(ImportProgress::default());
    let silent = Arc::new(ImageVolume::new(root, Arc::new(Silent(Arc::clone(&progress)))));
    let asking = request(&silent, &disk, &changed, setting.handle());
    let error = derive(&asking, &setting.bench.images(), &progress);
    assert!(matches!(error, Err(ImportError::Cancelled)), "{error:?}");
    assert_eq!(setting.bench.images_entries(), 0);

    disk.is_broken.store(true, Ordering::SeqCst);
    let error = refused(&setting.request(&disk, &changed));
    assert!(matches!(&error, ImportError::Unreadable { reason, .. } if reason.contains("away")), "{error:?}");
}

#[test]
fn a_terabyte_of_discarded_blocks_is_not_read() {
    let setting = Setting::new(Sparse::new(2 << 40));
    let disk = Arc::new(setting.base.grown(0));
    disk.put(MIB, b"the only data");
    let progress = ImportProgress::default();
    let discarded = 0..100 * GIB;
    let request = setting.request(&disk, std::slice::from_ref(&discarded));
    let derived = derive(&request, &setting.bench.images(), &progress).unwrap().unwrap();
    assert!(derived.bytes_read <= MIB, "{} bytes were read", derived.bytes_read);
    assert_eq!((progress.bytes_total(), progress.bytes_done()), (100 * GIB, 100 * GIB));
}
