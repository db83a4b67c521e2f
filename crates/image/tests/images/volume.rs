//! The image volume as a disk: what it fetches, when it need not wait, and what it refuses.

use std::collections::HashMap;
use std::fs;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use block::{
    Access, BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, DiskError, ExtentKind, FetchError,
    Priority, SlotHint, TryIo,
};
use image::{ImageVolume, Imported, OriginImage};
use proptest::prelude::*;
use tokio::sync::Semaphore;

use crate::support::{Bench, CHUNK, MIB, SIZE_BYTES, Unreachable, assert_same, noise};

/// Serves an origin's chunks, keeps them, and counts.
struct Keeping {
    origin: OriginImage,
    kept: Mutex<HashMap<ChunkHash, Chunk>>,
    fetches: AtomicUsize,
    /// Every fetch takes one and gives none back.
    permits: Semaphore,
}

impl Keeping {
    fn new(imported: &Imported) -> Arc<Keeping> {
        Arc::new(Keeping {
            origin: OriginImage::open(&imported.dir).unwrap(),
            kept: Mutex::default(),
            fetches: AtomicUsize::new(0),
            permits: Semaphore::new(1_000_000),
        })
    }

    fn volume(self: &Arc<Keeping>) -> ImageVolume {
        ImageVolume::new(self.origin.root().clone(), Arc::clone(self) as Arc<dyn ChunkSource>)
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::Relaxed)
    }
}

impl ChunkSource for Keeping {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        assert!(!chunk.is_zero(), "zero chunks are never asked for");
        self.fetches.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            self.permits.acquire().await.unwrap().forget();
            let fetched = self.origin.fetch(chunk, priority).await?;
            self.kept.lock().unwrap().insert(chunk, fetched.clone());
            Ok(fetched)
        })
    }

    fn try_read(&self, chunk: &ChunkHash, hint: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        let kept = self.kept.lock().unwrap();
        let Some(found) = kept.get(chunk) else { return TryIo::WouldBlock };
        hint.set(hint.get() + 1);
        buf.copy_from_slice(&found.bytes()[offset..offset + buf.len()]);
        TryIo::Done
    }
}

/// A disk without a hole: one page, and 48 chunks.
fn dense() -> (Bench, Arc<Keeping>) {
    let bench = Bench::new();
    bench.write("disk.raw", &noise(5, 3 * MIB as usize));
    let source = Keeping::new(&bench.import("disk.raw"));
    (bench, source)
}

#[tokio::test]
async fn a_read_waits_once_and_is_done_at_once_afterwards() {
    let (bench, source) = dense();
    let expected = fs::read(bench.file("disk.raw")).unwrap();
    let volume = source.volume();
    let (offset, len) = (CHUNK - 100, 2 * CHUNK as usize);
    let mut buf = vec![0; len];
    assert_eq!(volume.try_read(offset, &mut buf).unwrap(), TryIo::WouldBlock);
    volume.read(offset, &mut buf).await.unwrap();
    assert_eq!(source.fetches(), 1 + 3, "a page and three chunks");
    let mut again = vec![0; len];
    assert_eq!(volume.try_read(offset, &mut again).unwrap(), TryIo::Done);
    volume.read(offset, &mut buf).await.unwrap();
    assert_eq!(source.fetches(), 1 + 3, "nothing is fetched twice");
    assert!(again == expected[offset as usize..][..len] && buf == again);
}

#[tokio::test]
async fn holes_cost_no_fetch() {
    let bench = Bench::with_reference();
    let source = Keeping::new(&bench.import("disk.raw"));
    let volume = source.volume();
    let mut buf = vec![1; MIB as usize];
    volume.read(20 * MIB, &mut buf).await.unwrap();
    assert!(buf.iter().all(|&b| b == 0));
    assert_eq!(source.fetches(), 1, "the page alone");
    buf.fill(1);
    assert_eq!(volume.try_read(25 * MIB, &mut buf).unwrap(), TryIo::Done);
    assert!(buf.iter().all(|&b| b == 0));

    fs::File::create(bench.file("zero.raw")).unwrap().set_len(SIZE_BYTES).unwrap();
    let source = Keeping::new(&bench.import("zero.raw"));
    let volume = source.volume();
    assert_same(&volume, &bench.file("zero.raw"), "a disk of zeroes").await;
    assert_eq!(source.fetches(), 0);
}

#[tokio::test]
async fn one_read_fetches_sixteen_chunks_side_by_side_and_no_more() {
    let (bench, source) = dense();
    let volume = source.volume();
    volume.chunk_hash(ChunkIndex(0), Priority::Guest).await.unwrap();
    let before = source.fetches();
    let granted = source.permits.forget_permits(usize::MAX);
    assert!(granted > 0, "no fetch gets through from here on");
    let mut buf = vec![0; 3 * MIB as usize];
    {
        let mut read = pin!(volume.read(0, &mut buf));
        let mut context = Context::from_waker(Waker::noop());
        assert!(read.as_mut().poll(&mut context).is_pending());
        assert_eq!(source.fetches() - before, 16);
        source.permits.add_permits(1_000);
        read.await.unwrap();
    }
    assert_eq!(source.fetches() - before, 48);
    assert!(buf == fs::read(bench.file("disk.raw")).unwrap());
}

#[tokio::test]
async fn extents_tell_data_from_holes_without_fetching_data() {
    let bench = Bench::with_reference();
    let source = Keeping::new(&bench.import("disk.raw"));
    let volume = source.volume();
    let extents = volume.extents(1000, SIZE_BYTES - 1000).await.unwrap();
    assert_eq!(source.fetches(), 3, "the three pages alone");
    let mut at = 1000;
    let mut data = Vec::new();
    for (extent, next) in extents.iter().zip(extents.iter().skip(1)) {
        assert_ne!(extent.kind, next.kind, "neighbours of one kind are merged");
    }
    for extent in &extents {
        if extent.kind == ExtentKind::Data {
            data.push((at, at + extent.len));
        }
        at += extent.len;
    }
    assert_eq!(at, SIZE_BYTES);
    let down = |offset: u64| offset / CHUNK * CHUNK;
    let expected = [
        (1000, 4 * CHUNK),
        (down(128 * MIB - 1_000_000), down(128 * MIB + 2_000_000) + CHUNK),
        (200 * MIB, 201 * MIB),
        (250 * MIB, 250 * MIB + CHUNK),
        (down(SIZE_BYTES), SIZE_BYTES),
    ];
    assert_eq!(data, expected);
    assert_eq!(volume.extents(0, 0).await.unwrap(), []);
}

#[tokio::test]
async fn all_names_are_walked_page_by_page() {
    let bench = Bench::with_reference();
    let imported = bench.import("disk.raw");
    let volume = Keeping::new(&imported).volume();
    let mut names = Vec::new();
    for page in 0..volume.page_count() {
        names.extend(volume.page_hashes(page, Priority::Background).await.unwrap());
    }
    assert_eq!(names.len() as u64, imported.root.chunk_count());
    let zero = names.iter().filter(|name| name.is_zero()).count() as u64;
    assert_eq!(zero, imported.root.zero_chunks());
    for chunk in [0, 2047, 2048, names.len() - 1] {
        let name = volume.chunk_hash(ChunkIndex(chunk as u64), Priority::Background).await.unwrap();
        assert_eq!(name, names[chunk]);
    }
    let past = ChunkIndex(imported.root.chunk_count());
    assert!(volume.chunk_hash(past, Priority::Background).await.unwrap().is_zero());
    assert!(volume.page_hashes(volume.page_count(), Priority::Background).await.unwrap().is_empty());
}

#[tokio::test]
async fn what_does_not_fit_or_would_write_is_refused() {
    let (_bench, source) = dense();
    let volume = source.volume();
    let size = volume.size_bytes();
    let mut buf = [0; 2];
    assert!(matches!(volume.read(size - 1, &mut buf).await, Err(DiskError::OutOfRange { .. })));
    assert!(matches!(volume.try_read(u64::MAX, &mut buf), Err(DiskError::OutOfRange { .. })));
    assert!(matches!(volume.extents(size, 1).await, Err(DiskError::OutOfRange { .. })));
    assert_eq!(volume.access(), Access::ReadOnly);
    assert!(matches!(volume.write(0, &buf).await, Err(DiskError::ReadOnly)));
    assert!(matches!(volume.write_zeroes(0, 1).await, Err(DiskError::ReadOnly)));
    assert!(matches!(volume.discard(0, 1).await, Err(DiskError::ReadOnly)));
    assert!(volume.flush().await.is_ok());
}

#[tokio::test]
async fn a_failed_fetch_is_an_io_error_that_tells_why() {
    let (_bench, source) = dense();
    let volume = ImageVolume::new(source.origin.root().clone(), Arc::new(Unreachable));
    match volume.read(0, &mut [0]).await {
        Err(DiskError::Io(reason)) => assert!(reason.contains("no route"), "{reason}"),
        other => panic!("expected an I/O error, got {other:?}"),
    }
}

/// A source that always has the same answer.
struct Confused(Chunk);

impl ChunkSource for Confused {
    fn fetch(&self, _: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

#[tokio::test]
async fn another_chunk_than_the_one_asked_for_is_not_taken() {
    let (_bench, source) = dense();
    let page = ImageVolume::new(source.origin.root().clone(), Arc::new(Confused(Chunk::zero())));
    assert!(matches!(page.read(0, &mut [0]).await, Err(DiskError::Io(_))));
    // The right page, but then the page again instead of a chunk.
    source.volume().chunk_hash(ChunkIndex(0), Priority::Guest).await.unwrap();
    let page = source.kept.lock().unwrap().values().next().unwrap().clone();
    let data = ImageVolume::new(source.origin.root().clone(), Arc::new(Confused(page)));
    assert!(data.chunk_hash(ChunkIndex(0), Priority::Guest).await.is_ok());
    assert!(matches!(data.read(0, &mut [0]).await, Err(DiskError::Io(_))));
}

#[test]
fn any_read_gives_the_bytes_of_the_file() {
    let (bench, source) = dense();
    let expected = fs::read(bench.file("disk.raw")).unwrap();
    let volume = source.volume();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    proptest!(ProptestConfig::with_cases(200), |(offset in 0..3 * MIB, len in 0..300_000u64)| {
        let len = len.min(3 * MIB - offset) as usize;
        let mut buf = vec![0; len];
        runtime.block_on(volume.read(offset, &mut buf)).unwrap();
        prop_assert!(buf == expected[offset as usize..][..len]);
        prop_assert_eq!(volume.try_read(offset, &mut buf).unwrap(), TryIo::Done);
        prop_assert!(buf == expected[offset as usize..][..len]);
    });
}
