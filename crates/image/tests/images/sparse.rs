//! A disk in memory of any size, most of it zeroes, and images of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{
    Access, BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, DiskError, Extent, ExtentKind,
    FetchError, Priority,
};
use image::{
    ImageVolume, ImportProgress, Imported, Keep, OpenRemote, OriginImage, RemoteRequest, Remotes,
    import_remote,
};
use tokio::runtime::{Handle, Runtime};

use crate::support::{Bench, CHUNK};

/// The disk; what it holds is copied with it.
pub(crate) struct Sparse {
    size_bytes: u64,
    chunks: Mutex<BTreeMap<u64, Vec<u8>>>,
    pub(crate) bytes_read: AtomicU64,
    pub(crate) is_broken: AtomicBool,
}

impl Sparse {
    pub(crate) fn new(size_bytes: u64) -> Sparse {
        let (bytes_read, is_broken) = (AtomicU64::new(0), AtomicBool::new(false));
        Sparse { size_bytes, chunks: Mutex::default(), bytes_read, is_broken }
    }

    /// The same content on a disk that may be larger.
    pub(crate) fn grown(&self, more_bytes: u64) -> Sparse {
        let copy = Sparse::new(self.size_bytes + more_bytes);
        *copy.chunks.lock().unwrap() = self.chunks.lock().unwrap().clone();
        copy
    }

    /// Writes as much as lies on the disk, and gives where.
    pub(crate) fn put(&self, offset: u64, data: &[u8]) -> Range<u64> {
        let end = (offset + data.len() as u64).min(self.size_bytes);
        let mut chunks = self.chunks.lock().unwrap();
        let len = (end - offset) as usize;
        let mut rest = data;
        for (chunk, within, len) in block::Geometry::split(offset, len) {
            let (piece, tail) = rest.split_at(len);
            rest = tail;
            let bytes = chunks.entry(chunk.0).or_insert_with(|| vec![0; CHUNK as usize]);
            bytes[within..within + len].copy_from_slice(piece);
            if bytes.iter().all(|byte| *byte == 0) {
                chunks.remove(&chunk.0);
            }
        }
        offset..end
    }

    /// The positions of all chunks that are not zero.
    pub(crate) fn positions(&self) -> Vec<u64> {
        self.chunks.lock().unwrap().keys().copied().collect()
    }

    /// The chunk's bytes; empty if it is zero.
    pub(crate) fn chunk(&self, position: u64) -> Vec<u8> {
        self.chunks.lock().unwrap().get(&position).cloned().unwrap_or_default()
    }

    pub(crate) fn name(&self, position: u64) -> ChunkHash {
        match self.chunk(position) {
            empty if empty.is_empty() => ChunkHash::ZERO,
            bytes => ChunkHash::of(&bytes),
        }
    }

    fn check(&self) -> Result<(), DiskError> {
        match self.is_broken.load(Ordering::SeqCst) {
            true => Err(DiskError::Io("the disk is away".to_owned())),
            false => Ok(()),
        }
    }
}

fn read_only<'a>() -> BoxFuture<'a, Result<(), DiskError>> {
    Box::pin(async { Err(DiskError::ReadOnly) })
}

impl Disk for Sparse {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            self.check()?;
            assert!(offset + buf.len() as u64 <= self.size_bytes, "nobody reads beyond the end");
            self.bytes_read.fetch_add(buf.len() as u64, Ordering::SeqCst);
            let mut rest = buf;
            for (chunk, within, len) in block::Geometry::split(offset, rest.len()) {
                let (piece, tail) = rest.split_at_mut(len);
                rest = tail;
                match self.chunk(chunk.0) {
                    empty if empty.is_empty() => piece.fill(0),
                    bytes => piece.copy_from_slice(&bytes[within..within + len]),
                }
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        read_only()
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        read_only()
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        read_only()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    /// One extent at a time, as little as the trait allows.
    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async move {
            self.check()?;
            let first = offset / CHUNK;
            let next = self.chunks.lock().unwrap().range(first..).next().map(|(position, _)| *position);
            Ok(vec![match next {
                Some(position) if position == first => {
                    Extent { len: len.min(CHUNK - offset % CHUNK), kind: ExtentKind::Data }
                }
                Some(position) => Extent { len: len.min(position * CHUNK - offset), kind: ExtentKind::Hole },
                None => Extent { len, kind: ExtentKind::Hole },
            }])
        })
    }
}

/// Opens one disk, whatever it is called.
pub(crate) fn opener(disk: &Arc<Sparse>) -> Arc<dyn OpenRemote> {
    let disk = Arc::clone(disk);
    Arc::new(move |_: &str| match disk.is_broken.load(Ordering::SeqCst) {
        true => Err("nobody is at home".to_owned()),
        false => Ok(Arc::clone(&disk) as Arc<dyn Disk>),
    })
}

/// Imports the whole disk, into `images`. To be called on a thread that may block.
pub(crate) fn import(bench: &Bench, disk: &Arc<Sparse>, runtime: &Handle, images: &str) -> Imported {
    let request = RemoteRequest {
        location: "memory".to_owned(),
        disk: Arc::clone(disk) as Arc<dyn Disk>,
        runtime: runtime.clone(),
        format: Some(image::Format::Raw),
        keep: Keep::InPlace,
    };
    import_remote(&request, &bench.file(images), &ImportProgress::default()).unwrap()
}

/// An imported disk as a source of chunks that notes what it is asked for.
pub(crate) struct Counted {
    pub(crate) origin: OriginImage,
    pub(crate) fetched: Mutex<Vec<ChunkHash>>,
}

impl Counted {
    pub(crate) fn open(imported: &Imported, disk: &Arc<Sparse>, runtime: &Handle) -> Arc<Counted> {
        let remotes = Remotes { opener: opener(disk), runtime: runtime.clone() };
        let origin = OriginImage::open_with(&imported.dir, remotes).unwrap();
        Arc::new(Counted { origin, fetched: Mutex::default() })
    }

    /// A volume that has fetched nothing yet.
    pub(crate) fn volume(self: &Arc<Counted>) -> Arc<ImageVolume> {
        let source = Arc::clone(self) as Arc<dyn ChunkSource>;
        Arc::new(ImageVolume::new(self.origin.root().clone(), source))
    }

    /// How many chunks were fetched since the last time; each of them once.
    pub(crate) fn take_fetches(&self) -> usize {
        let mut fetched = std::mem::take(&mut *self.fetched.lock().unwrap());
        let count = fetched.len();
        fetched.sort_unstable();
        fetched.dedup();
        assert_eq!(fetched.len(), count, "nothing is fetched twice");
        count
    }
}

impl ChunkSource for Counted {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        assert!(!chunk.is_zero(), "zero chunks are never asked for");
        self.fetched.lock().unwrap().push(chunk);
        self.origin.fetch(chunk, priority)
    }
}

/// Reads every chunk that is not zero, and what lies beside it.
pub(crate) fn assert_serves(volume: &ImageVolume, disk: &Sparse, runtime: &Runtime) {
    let around = disk.positions().into_iter().flat_map(|at| [at.saturating_sub(1), at, at + 1]);
    let last = (volume.size_bytes() - 1) / CHUNK;
    for position in around.chain([0, last]).filter(|at| *at <= last).collect::<BTreeSet<_>>() {
        let len = CHUNK.min(volume.size_bytes() - position * CHUNK) as usize;
        let (mut expected, mut actual) = (vec![1; len], vec![2; len]);
        runtime.block_on(disk.read(position * CHUNK, &mut expected)).unwrap();
        runtime.block_on(volume.read(position * CHUNK, &mut actual)).unwrap();
        assert!(expected == actual, "chunk {position} differs");
    }
}

/// What differs, found by looking at everything.
pub(crate) fn plain_difference(base: &Sparse, other: &Sparse) -> Vec<Range<ChunkIndex>> {
    let positions: BTreeSet<u64> = base.positions().into_iter().chain(other.positions()).collect();
    let mut ranges: Vec<Range<ChunkIndex>> = Vec::new();
    let end = other.size_bytes().div_ceil(CHUNK);
    for at in positions.into_iter().filter(|at| *at < end && base.chunk(*at) != other.chunk(*at)) {
        match ranges.last_mut() {
            Some(last) if last.end.0 == at => last.end.0 += 1,
            _ => ranges.push(ChunkIndex(at)..ChunkIndex(at + 1)),
        }
    }
    ranges
}
