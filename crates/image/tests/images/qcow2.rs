//! Disks out into qcow2 files, and qcow2 files in without what they build upon; QEMU's tools judge both.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Access, BoxFuture, Disk, DiskError, Extent};
use image::{
    Backing, ExportError, Exported, ImportError, ImportProgress, LayerExtent, Qcow2Layer, Qcow2Request,
    TakeOverError, take_over, write_qcow2,
};
use proptest::prelude::*;
use tokio::runtime::Runtime;

use crate::sparse::Sparse;
use crate::support::{Bench, CHUNK, MIB, noise, runtime};

/// Writes the disk as a sparse raw file.
fn raw(bench: &Bench, disk: &Sparse, name: &str) -> PathBuf {
    let file = File::create(bench.file(name)).unwrap();
    file.set_len(disk.size_bytes()).unwrap();
    for position in disk.positions() {
        let len = CHUNK.min(disk.size_bytes() - position * CHUNK) as usize;
        file.write_all_at(&disk.chunk(position)[..len], position * CHUNK).unwrap();
    }
    bench.file(name)
}

fn request(
    bench: &Bench,
    runtime: &Runtime,
    disk: &Arc<Sparse>,
    data: Vec<Range<u64>>,
    backing: Option<&str>,
) -> Qcow2Request {
    let backing = backing.map(|name| Backing { name: name.to_owned(), format: "raw".to_owned() });
    Qcow2Request {
        path: bench.file("out.qcow2"),
        disk: Arc::clone(disk) as Arc<dyn Disk>,
        runtime: runtime.handle().clone(),
        data,
        backing,
    }
}

fn write(request: &Qcow2Request) -> Result<Exported, ExportError> {
    write_qcow2(request, &ImportProgress::default())
}

/// What differs between two sparse disks, in blocks of 4 KiB as an overlay knows them.
fn changed_blocks(base: &Sparse, disk: &Sparse) -> Vec<Range<u64>> {
    let mut blocks = Vec::new();
    let mut positions = [base.positions(), disk.positions()].concat();
    positions.sort_unstable();
    positions.dedup();
    let bytes_of = |disk: &Sparse, at| match disk.chunk(at) {
        empty if empty.is_empty() => vec![0; CHUNK as usize],
        bytes => bytes,
    };
    for at in positions {
        let (old, new) = (bytes_of(base, at), bytes_of(disk, at));
        for (number, (old, new)) in old.chunks(4096).zip(new.chunks(4096)).enumerate() {
            let start = at * CHUNK + number as u64 * 4096;
            if old != new {
                blocks.push(start..start + 4096);
            }
        }
    }
    blocks
}

#[derive(Debug, Clone)]
struct Write {
    at: u64,
    len: usize,
    seed: u64,
}

fn writes() -> impl Strategy<Value = Vec<Write>> {
    let at = prop_oneof![0..2 * MIB, 511 * MIB..514 * MIB, 600 * MIB..601 * MIB];
    let write = (at, 1usize..300_000, 0u64..5).prop_map(|(at, len, seed)| Write { at, len, seed });
    prop::collection::vec(write, 0..8)
}

fn apply(disk: &Sparse, writes: &[Write]) {
    for write in writes.iter().filter(|write| write.at < disk.size_bytes()) {
        let data = if write.seed == 0 { vec![0; write.len] } else { noise(write.seed, write.len) };
        disk.put(write.at, &data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn qemu_reads_the_disk_from_both_kinds_of_files(
        sectors in prop_oneof![1u64..300, 1_048_000u64..1_229_000],
        more_sectors in prop_oneof![Just(0u64), 1u64..3000],
        before in writes(),
        after in writes(),
    ) {
        let (bench, runtime) = (Bench::new(), runtime());
        let base = Sparse::new(sectors * 512);
        apply(&base, &before);
        let disk = Arc::new(base.grown(more_sectors * 512));
        apply(&disk, &after);
        raw(&bench, &base, "base.raw");
        raw(&bench, &disk, "disk.raw");
        let whole = 0..disk.size_bytes();
        let blocks = changed_blocks(&base, &disk);
        for (data, backing) in [(vec![whole], None), (blocks.clone(), Some("base.raw"))] {
            let request = request(&bench, &runtime, &disk, data, backing);
            let exported = write(&request).unwrap();
            prop_assert_eq!(exported.size_bytes, disk.size_bytes());
            prop_assert_eq!(exported.file_bytes, fs::metadata(&request.path).unwrap().len());
            bench.qemu_img("check -f qcow2 out.qcow2");
            bench.qemu_img("compare -f raw -F qcow2 disk.raw out.qcow2");

            let layer = Qcow2Layer::open(&request.path).unwrap();
            prop_assert_eq!(layer.backing(), backing);
            let extents: Vec<_> = layer.extents().map(Result::unwrap).collect();
            let kind = |zero: bool| extents.iter().filter(move |e| matches!(e, LayerExtent::Zero(_)) == zero);
            let len = |extent: &LayerExtent| match extent {
                LayerExtent::Data(range) | LayerExtent::Zero(range) => range.end - range.start,
            };
            prop_assert_eq!(kind(false).map(len).sum::<u64>(), exported.data_bytes);
            if backing.is_none() {
                prop_assert_eq!(kind(true).count(), 0, "zeroes take nothing without a backing file");
            }
            let data_chunks = disk.positions().len() as u64;
            prop_assert!(exported.data_bytes <= data_chunks * CHUNK, "zeroes are not written as data");
            fs::remove_file(&request.path).unwrap();
        }
        // And what is not named is left to the backing file.
        let untouched = request(&bench, &runtime, &disk, Vec::new(), Some("base.raw"));
        prop_assert_eq!(write(&untouched).unwrap().data_bytes, 0);
        if more_sectors == 0 {
            bench.qemu_img("compare -f raw -F qcow2 base.raw out.qcow2");
        }
    }
}

#[test]
fn a_disk_that_ends_within_a_sector_is_kept_to_its_last_byte() {
    let (bench, runtime) = (Bench::new(), runtime());
    let disk = Arc::new(Sparse::new(100_001));
    disk.put(0, &noise(3, 100_001));
    let size_bytes = disk.size_bytes();
    let exported = write(&request(&bench, &runtime, &disk, std::iter::once(0..size_bytes).collect(), None));
    assert_eq!(exported.unwrap().size_bytes, 100_352);
    bench.qemu_img("check -f qcow2 out.qcow2");
    bench.qemu_img("convert -f qcow2 -O raw out.qcow2 back.raw");
    let back = fs::read(bench.file("back.raw")).unwrap();
    assert!(back[..100_001] == noise(3, 100_001) && back[100_001..] == [0; 351]);
}

#[test]
fn a_large_disk_with_little_in_it_makes_a_small_file() {
    let (bench, runtime) = (Bench::new(), runtime());
    let disk = Arc::new(Sparse::new(2 << 40));
    let data = vec![disk.put(1 << 40, b"data"), disk.put((2 << 40) - 4, b"last")];
    let exported = write(&request(&bench, &runtime, &disk, data, None)).unwrap();
    bench.qemu_img("check -f qcow2 out.qcow2");
    assert_eq!(exported.data_bytes, 2 * CHUNK);
    assert_eq!(disk.bytes_read.load(Ordering::SeqCst), 2 * CHUNK);
    let metadata = fs::metadata(bench.file("out.qcow2")).unwrap();
    assert!(metadata.blocks() * 512 < MIB, "{} blocks", metadata.blocks());
    let ordinary = fs::metadata(bench.write("ordinary", b"")).unwrap();
    assert_eq!(metadata.permissions().mode(), ordinary.permissions().mode(), "it is a file like any other");
}

/// A disk of which something happens when it is read behind its first mebibytes.
struct Eventful {
    disk: Arc<Sparse>,
    event: Event,
}

enum Event {
    /// The read fails.
    Fails,
    /// The work is cancelled, and the read never ends.
    Cancelled(Arc<ImportProgress>),
    /// Somebody else makes the file that is being written.
    Overtaken(PathBuf),
}

impl Disk for Eventful {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        match &self.event {
            _ if offset < 20 * MIB => {}
            Event::Fails => return Box::pin(async { Err(DiskError::Io("a bad sector".to_owned())) }),
            Event::Cancelled(progress) => {
                progress.cancel();
                return Box::pin(std::future::pending());
            }
            Event::Overtaken(path) => fs::write(path, b"precious").unwrap(),
        }
        self.disk.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.disk.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.disk.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.disk.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.disk.extents(offset, len)
    }
}

#[test]
fn what_cannot_be_written_says_why_and_leaves_nothing() {
    let (bench, runtime) = (Bench::new(), runtime());
    let disk = Arc::new(Sparse::new(30 * MIB));
    disk.put(0, &noise(1, 30 << 20));
    let whole: Vec<_> = std::iter::once(0..30 * MIB).collect();
    let good = request(&bench, &runtime, &disk, whole, None);
    let entries = || fs::read_dir(bench.files()).unwrap().count();

    bench.write("out.qcow2", b"precious");
    let error = write(&good).unwrap_err();
    assert!(matches!(error, ExportError::Exists(_)) && error.to_string().contains("out.qcow2"), "{error}");
    assert_eq!(fs::read(&good.path).unwrap(), b"precious");
    fs::remove_file(&good.path).unwrap();
    std::os::unix::fs::symlink("nowhere", &good.path).unwrap();
    assert!(matches!(write(&good), Err(ExportError::Exists(_))), "a link is not followed");
    fs::remove_file(&good.path).unwrap();

    let long = Backing { name: "x".repeat(1024), format: "raw".to_owned() };
    let error = write(&Qcow2Request { backing: Some(long), ..good.clone() }).unwrap_err();
    assert!(matches!(error, ExportError::BackingName(1024)), "{error:?}");
    let error = write(&Qcow2Request { path: bench.file("no/dir"), ..good.clone() }).unwrap_err();
    assert!(matches!(error, ExportError::Unwritable { .. }), "{error:?}");

    let eventful = |event| {
        let disk = Eventful { disk: Arc::clone(&disk), event };
        Qcow2Request { disk: Arc::new(disk), ..good.clone() }
    };
    let error = write(&eventful(Event::Fails)).unwrap_err();
    assert!(matches!(error, ExportError::Disk(_)) && error.to_string().contains("bad sector"), "{error}");
    let progress = Arc::new(ImportProgress::default());
    let error = write_qcow2(&eventful(Event::Cancelled(Arc::clone(&progress))), &progress);
    assert!(matches!(error, Err(ExportError::Cancelled)), "{error:?}");
    assert_eq!(entries(), 0, "something was left behind");

    let error = write(&eventful(Event::Overtaken(good.path.clone()))).unwrap_err();
    assert!(matches!(error, ExportError::Exists(_)), "{error:?}");
    assert_eq!((fs::read(&good.path).unwrap(), entries()), (b"precious".to_vec(), 1));
    fs::remove_file(&good.path).unwrap();
    assert!(write(&good).is_ok());
    assert_eq!(entries(), 1);
}

#[test]
fn zeroes_over_data_become_zero_clusters_if_there_is_a_backing_file() {
    let (bench, runtime) = (Bench::new(), runtime());
    let base = Sparse::new(4 * MIB);
    base.put(0, &noise(1, 4 << 20));
    raw(&bench, &base, "base.raw");
    let disk = Arc::new(base.grown(0));
    // A hole of the disk, zeroes that it does not know to be a hole, and a part of a cluster.
    let ranges = [(MIB, 3 * CHUNK), (2 * MIB - 5, CHUNK + 5), (3 * MIB, 4096)];
    let data: Vec<_> = ranges.iter().map(|(at, len)| disk.put(*at, &vec![0; *len as usize])).collect();
    raw(&bench, &disk, "disk.raw");
    let request = request(&bench, &runtime, &disk, data, Some("base.raw"));
    let exported = write(&request).unwrap();
    assert_eq!(exported.data_bytes, 2 * CHUNK, "two clusters are zero in part");
    bench.qemu_img("check -f qcow2 out.qcow2");
    bench.qemu_img("compare -f raw -F qcow2 disk.raw out.qcow2");
    let extents: Vec<_> = Qcow2Layer::open(&request.path).unwrap().extents().map(Result::unwrap).collect();
    let expected = [
        LayerExtent::Zero(MIB..MIB + 3 * CHUNK),
        LayerExtent::Data(2 * MIB - CHUNK..2 * MIB),
        LayerExtent::Zero(2 * MIB..2 * MIB + CHUNK),
        LayerExtent::Data(3 * MIB..3 * MIB + CHUNK),
    ];
    assert_eq!(extents, expected);
}

/// An overlay of 8 MiB on a base of noise, with all that a cluster can be.
fn overlay(options: &str) -> Bench {
    let bench = Bench::new();
    bench.write("base.raw", &noise(1, 8 << 20));
    bench.qemu_img(&format!("create -f qcow2 {options} -b base.raw -F raw overlay.qcow2"));
    for command in [
        "write -P 0x11 100k 200k",
        "write -P 0x22 1M 64k",
        "write -c -P 0x33 2M 64k",
        "write -c -P 0x44 2112k 64k",
        "write -z 3M 256k",
        "write -z -u 4M 128k",
        "write -P 0x55 4100k 4k",
        "write -P 0x66 8128k 64k",
    ] {
        bench.qemu_io(command, "overlay.qcow2");
    }
    bench
}

/// A disk that takes writes until something happens, at the first one behind its first mebibytes.
struct Written {
    disk: Sparse,
    event: Option<Event>,
    flushed: AtomicBool,
}

impl Written {
    fn over(base: &Sparse, event: Option<Event>) -> Written {
        Written { disk: base.grown(0), event, flushed: AtomicBool::new(false) }
    }

    fn change(&self, offset: u64, data: &[u8]) -> BoxFuture<'_, Result<(), DiskError>> {
        match &self.event {
            _ if offset < 20 * MIB => {}
            Some(Event::Fails) => return Box::pin(async { Err(DiskError::NoSpace) }),
            Some(Event::Cancelled(progress)) => {
                progress.cancel();
                return Box::pin(std::future::pending());
            }
            Some(Event::Overtaken(path)) => fs::write(path, b"another").unwrap(),
            None => {}
        }
        self.disk.put(offset, data);
        Box::pin(async { Ok(()) })
    }
}

impl Disk for Written {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.disk.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        assert!(data.len() as u64 <= MIB, "nobody holds more in memory");
        self.change(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.change(offset, &vec![0; len as usize])
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.flushed.store(true, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.disk.extents(offset, len)
    }
}

/// A disk of noise with data and zeroes written over it, and the file in which these are.
fn changed(bench: &Bench, runtime: &Runtime) -> (Sparse, Arc<Sparse>, Qcow2Layer) {
    let base = Sparse::new(30 * MIB);
    base.put(0, &noise(1, 30 << 20));
    let disk = Arc::new(base.grown(0));
    let writes = [(3, noise(2, 3_000_000)), (9 * MIB, vec![0; 200_000]), (25 * MIB, noise(3, 1_500_000))];
    let data = writes.iter().map(|(at, bytes)| disk.put(*at, bytes)).collect();
    let request = request(bench, runtime, &disk, data, Some("base.raw"));
    write(&request).unwrap();
    (base, disk, Qcow2Layer::open(&request.path).unwrap())
}

#[test]
fn what_a_file_has_of_its_own_is_taken_over_whole_and_durable() {
    let (bench, runtime) = (Bench::new(), runtime());
    let (base, disk, layer) = changed(&bench, &runtime);
    let (target, progress) = (Written::over(&base, None), ImportProgress::default());
    let bytes = take_over(&layer, &target, runtime.handle(), &progress).unwrap();
    let own = layer.extents().map(|extent| range_of(&extent.unwrap())).map(|range| range.end - range.start);
    assert_eq!(bytes, own.sum::<u64>());
    assert_eq!((progress.bytes_done(), progress.bytes_total()), (30 * MIB, 30 * MIB));
    assert!(target.flushed.load(Ordering::SeqCst));
    assert_eq!(target.disk.positions(), disk.positions());
    for position in disk.positions() {
        assert!(target.disk.chunk(position) == disk.chunk(position), "chunk {position} differs");
    }
}

#[test]
fn a_file_that_cannot_be_taken_over_says_why() {
    let (bench, runtime) = (Bench::new(), runtime());
    let (base, _, layer) = changed(&bench, &runtime);
    let progress = Arc::new(ImportProgress::default());
    let run = |event| take_over(&layer, &Written::over(&base, Some(event)), runtime.handle(), &progress);
    let full = run(Event::Fails);
    assert!(matches!(full, Err(TakeOverError::Disk(DiskError::NoSpace))), "{full:?}");
    let changed = run(Event::Overtaken(bench.file("out.qcow2")));
    assert!(matches!(changed, Err(TakeOverError::File(_))), "{changed:?}");
    fs::remove_file(bench.file("out.qcow2")).unwrap();
    let (_, _, layer) = self::changed(&bench, &runtime);
    let target = Written::over(&base, Some(Event::Cancelled(Arc::clone(&progress))));
    let cancelled = take_over(&layer, &target, runtime.handle(), &progress);
    assert!(matches!(cancelled, Err(TakeOverError::File(ImportError::Cancelled))), "{cancelled:?}");
}

fn range_of(extent: &LayerExtent) -> Range<u64> {
    match extent {
        LayerExtent::Data(range) | LayerExtent::Zero(range) => range.clone(),
    }
}

#[test]
fn the_extents_of_an_overlay_over_its_base_are_its_disk() {
    for options in ["-o cluster_size=64k", "-o cluster_size=4k", "-o compat=0.10", "-o cluster_size=512"] {
        let bench = overlay(options);
        bench.qemu_img("convert -f qcow2 -O raw overlay.qcow2 disk.raw");
        let expected = fs::read(bench.file("disk.raw")).unwrap();
        let mut flat = fs::read(bench.file("base.raw")).unwrap();
        fs::remove_file(bench.file("base.raw")).unwrap();

        let layer = Qcow2Layer::open(&bench.file("overlay.qcow2")).unwrap();
        // Files of version 2 are read without the extension of the header that tells the format.
        let format = if options.contains("compat") { None } else { Some("raw") };
        assert_eq!((layer.backing(), layer.backing_format()), (Some("base.raw"), format));
        assert_eq!(layer.size_bytes(), 8 * MIB);
        let mut end = 0;
        for extent in layer.extents() {
            let extent = extent.unwrap();
            let range = range_of(&extent);
            assert!(end <= range.start && !range.is_empty() && range.end <= 8 * MIB, "{extent:?}");
            end = range.end;
            let target = &mut flat[range.start as usize..range.end as usize];
            match extent {
                LayerExtent::Data(_) => layer.read_at(range.start, target).unwrap(),
                LayerExtent::Zero(_) => target.fill(0),
            }
        }
        assert!(flat == expected, "{options}");
        layer.check_unchanged().unwrap();
    }
}

#[test]
fn data_zeroes_and_what_is_left_to_the_base_are_told_apart() {
    let bench = overlay("-o cluster_size=64k");
    let layer = Qcow2Layer::open(&bench.file("overlay.qcow2")).unwrap();
    let extents: Vec<_> = layer.extents().map(Result::unwrap).collect();
    let k = 1024;
    let expected = [
        LayerExtent::Data(64 * k..320 * k),
        LayerExtent::Data(MIB..MIB + 64 * k),
        LayerExtent::Data(2 * MIB..2 * MIB + 128 * k),
        LayerExtent::Zero(3 * MIB..3 * MIB + 256 * k),
        LayerExtent::Data(4 * MIB..4 * MIB + 64 * k),
        LayerExtent::Zero(4 * MIB + 64 * k..4 * MIB + 128 * k),
        LayerExtent::Data(8128 * k..8 * MIB),
    ];
    assert_eq!(extents, expected);
    assert_eq!(layer.extent(3 * MIB + 5).unwrap(), Some(LayerExtent::Zero(3 * MIB + 5..3 * MIB + 256 * k)));
    assert_eq!(layer.extent(8 * MIB).unwrap(), None);
    let mut buf = [9; 3];
    layer.read_at(7 * MIB, &mut buf).unwrap();
    assert_eq!(buf, [0; 3], "what is left to the base reads as zeroes");
    for offset in [8 * MIB - 2, u64::MAX - 1] {
        assert!(layer.read_at(offset, &mut buf).is_err(), "beyond the end");
    }
    bench.qemu_io("write 0 4k", "overlay.qcow2");
    assert!(matches!(layer.check_unchanged(), Err(ImportError::Changed(_))));
}

#[test]
fn a_backing_file_is_told_and_never_opened() {
    let bench = Bench::new();
    bench.qemu_img("create -f qcow2 alone.qcow2 1M");
    let alone = Qcow2Layer::open(&bench.file("alone.qcow2")).unwrap();
    assert_eq!((alone.backing(), alone.extents().count()), (None, 0));
    for name in ["/etc/passwd", "nbd://127.0.0.1:1/x", "../outside/none", "json:{}"] {
        bench.qemu_img(&format!("create -u -f qcow2 -b {name} -F raw strange.qcow2 1M"));
        let layer = Qcow2Layer::open(&bench.file("strange.qcow2")).unwrap();
        assert_eq!(layer.backing(), Some(name));
        assert_eq!(layer.extents().count(), 0);
    }
}

#[test]
fn files_that_are_no_layer_are_refused() {
    let bench = overlay("-o cluster_size=64k");
    let refused = |name: &str| Qcow2Layer::open(&bench.file(name)).err().expect("this must not be opened");
    assert!(matches!(refused("base.raw"), ImportError::WrongFormat { .. }));
    assert!(matches!(refused("missing"), ImportError::Unreadable { .. }));
    assert!(matches!(refused("."), ImportError::NotAFile(_)));
    bench.qemu_img("create -f qcow2 -o extended_l2=on subclusters.qcow2 1M");
    assert!(matches!(refused("subclusters.qcow2"), ImportError::Unsupported { .. }));
    bench.qemu_img("create -f qcow2 empty.qcow2 0");
    assert!(matches!(refused("empty.qcow2"), ImportError::Empty(_)));

    // Cut within its clusters: what is there is read, what was lost is an error and never zeroes.
    let overlay = File::options().write(true).open(bench.file("overlay.qcow2")).unwrap();
    overlay.set_len(overlay.metadata().unwrap().len() - CHUNK).unwrap();
    let layer = Qcow2Layer::open(&bench.file("overlay.qcow2")).unwrap();
    let last = layer.extents().last().unwrap();
    assert!(matches!(last, Err(ImportError::Truncated { .. })), "{last:?}");
    let read = layer.read_at(8128 * 1024, &mut [0]);
    assert!(matches!(read, Err(ImportError::Truncated { .. })), "{read:?}");
    assert!(layer.read_at(MIB, &mut [0]).is_ok());
    overlay.set_len(200_000).unwrap();
    assert!(matches!(refused("overlay.qcow2"), ImportError::Truncated { .. }));
}

#[test]
fn garbage_in_a_layer_is_an_error_or_data_and_ends() {
    let bench = overlay("-o cluster_size=4k");
    let good = fs::read(bench.file("overlay.qcow2")).unwrap();
    let patch = (0..good.len().min(60_000), prop::collection::vec(any::<u8>(), 1..9));
    let patches = prop::collection::vec(patch, 1..6);
    proptest!(ProptestConfig::with_cases(200), |(patches in patches)| {
        let mut bad = good.clone();
        for (at, bytes) in &patches {
            let end = (at + bytes.len()).min(bad.len());
            bad[*at..end].copy_from_slice(&bytes[..end - at]);
        }
        let path = bench.write("bad.qcow2", &bad);
        let Ok(layer) = Qcow2Layer::open(&path) else { return Ok(()) };
        let mut end = 0;
        for extent in layer.extents() {
            let Ok(extent) = extent else { break };
            let range = range_of(&extent);
            prop_assert!(end <= range.start && !range.is_empty() && range.end <= layer.size_bytes());
            end = range.end;
            let len = (range.end - range.start).min(MIB) as usize;
            let _ = layer.read_at(range.start, &mut vec![0; len]);
        }
    });
}
