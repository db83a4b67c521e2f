//! Adding an image: read it once, hash it with all cores, leave a manifest.
//!
//! The disk is cut into runs of chunks that the workers take in turn. Holes are skipped, not read: all that is
//! not written to `pages` is zero already, so a worker that finds a hole moves the others past it too. Memory is
//! a piece of a run per worker, whatever the size of the image.
//!
//! - Consistency: the files are looked at again at the end; if one was written to meanwhile, the import fails.
//! - Cancellation: by [`ImportProgress::cancel`]; workers look between runs.
//! - Crash: the directory gets its name when all in it is synced; see [`layout`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use block::limits::CHUNK_BYTES;
use block::{ChunkHash, ChunkIndex, Disk, ExtentKind, ImageId};
use futures_util::future::{Either, select};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::layout::{self, Keep, Novelty, SourceRecord};
use crate::manifest::Shape;
use crate::pages::Pages;
use crate::source::{AllowedDirs, Reader, RemoteReader, Source};
use crate::{Format, ImportError, RootPage, index};

/// Chunks that a worker takes at a time: 4 MiB keeps a disk streaming, and a page is a whole number of runs.
pub(crate) const CHUNKS_PER_RUN: u64 = 64;

/// Bytes that a worker reads at a time and hashes while they are still in its processor's cache.
const PIECE_BYTES: u64 = 4 * CHUNK_BYTES as u64;

/// Most workers: hashing is faster than any disk long before, and each holds a piece in memory.
const WORKERS_MAX: usize = 64;

/// What to add, and how.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    /// The image file or block device.
    pub file: PathBuf,
    /// Its format; `None` to tell it by its first bytes.
    pub format: Option<Format>,
    /// Where the file and all that it refers to may lie; if empty, in the file's own directory.
    pub allowed_dirs: Vec<PathBuf>,
    /// Where the bytes are to be read from later.
    pub keep: Keep,
}

/// A remote disk to add as an image, and how.
#[derive(Clone)]
pub struct RemoteRequest {
    /// Where the disk is, in the words by which it will be opened again. It is kept and shown: no secret may
    /// stand in it.
    pub location: String,
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The runtime on which the disk's operations are waited for.
    pub runtime: Handle,
    /// The format of its content: raw, or `None` to see that it does not look like another.
    pub format: Option<Format>,
    /// Where the bytes are to be read from later.
    pub keep: Keep,
}

/// How far an import, a derivation, an export or a verification is, and the way to stop it. Shared with the one who watches.
#[derive(Debug, Default)]
pub struct ImportProgress {
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
    cancelled: AtomicBool,
    /// Wakes what waits for a disk or a link, and not only looks between two pieces.
    cancelling: Notify,
}

impl ImportProgress {
    /// Bytes of disk to go through, holes included; 0 until known.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total.load(Ordering::Relaxed)
    }

    /// Bytes of disk that have been gone through, holes included.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done.load(Ordering::Relaxed).min(self.bytes_total())
    }

    /// Asks to stop; the work ends with its `Cancelled` error soon, and leaves nothing behind.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
        self.cancelling.notify_waiters();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// What `work` gives; `None` if it was cancelled first.
    pub(crate) async fn unless_cancelled<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        match select(pin!(self.cancelled()), pin!(work)).await {
            Either::Left(_) => None,
            Either::Right((done, _)) => Some(done),
        }
    }

    /// Ends when the work is cancelled.
    async fn cancelled(&self) {
        let mut notified = pin!(self.cancelling.notified());
        // From here on no call is missed; one before it has left its mark.
        notified.as_mut().enable();
        if !self.is_cancelled() {
            notified.await;
        }
    }

    /// Begins with so many bytes before it.
    pub fn begin(&self, bytes_total: u64) {
        self.bytes_done.store(0, Ordering::Relaxed);
        self.bytes_total.store(bytes_total, Ordering::Relaxed);
    }

    /// So many bytes more are done.
    pub fn add_done(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// An image that was added.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The image's name.
    pub id: ImageId,
    /// Its root page.
    pub root: RootPage,
    /// Its directory, to be [opened](crate::OriginImage::open).
    pub dir: PathBuf,
    /// The format that the file had.
    pub format: Format,
    /// Whether the image was new here.
    pub novelty: Novelty,
    /// Bytes of disk that were read; the rest were holes.
    pub bytes_read: u64,
}

/// Adds an image to `images_dir`, which is made if need be. Blocks for as long as reading the file takes.
///
/// The same content gives the same id, in whatever format it comes; adding it again only updates where its bytes
/// are read from, for those who open the image afterwards.
pub fn import(
    request: &ImportRequest,
    images_dir: &Path,
    progress: &ImportProgress,
) -> Result<Imported, ImportError> {
    let file = request.file.canonicalize().map_err(|e| ImportError::unreadable(&request.file, e))?;
    let allowed = AllowedDirs::new(&request.allowed_dirs, &file)?;
    let source = Source::open(&file, request.format, &allowed)?;
    check_paths(&source, allowed.dirs())?;
    let record = record_of(&source, request.keep);
    add(&source, &SourceRecord { allowed_dirs: allowed.dirs().to_vec(), ..record }, images_dir, progress)
}

/// Adds the raw image on a remote disk to `images_dir`, as [`import`] does with a file. Blocks for as long as
/// reading the disk takes, in a thread that may block: not one of the runtime's workers.
///
/// If the bytes are kept where they are, [`OriginImage::open_with`](crate::OriginImage::open_with) opens the image.
pub fn import_remote(
    request: &RemoteRequest,
    images_dir: &Path,
    progress: &ImportProgress,
) -> Result<Imported, ImportError> {
    let disk = RemoteReader::new(Arc::clone(&request.disk), request.runtime.clone());
    let source = Source::open_remote(&request.location, request.format, disk)?;
    let record = record_of(&source, request.keep);
    add(&source, &SourceRecord { remote: Some(request.location.clone()), ..record }, images_dir, progress)
}

fn record_of(source: &Source, keep: Keep) -> SourceRecord {
    SourceRecord {
        version: SourceRecord::VERSION,
        tool: layout::tool(),
        format: source.format(),
        keep,
        files: source.parts().to_vec(),
        remote: None,
        allowed_dirs: Vec::new(),
    }
}

/// Reads an opened image and leaves what `record` says of it in a directory of its own.
fn add(
    source: &Source,
    record: &SourceRecord,
    images_dir: &Path,
    progress: &ImportProgress,
) -> Result<Imported, ImportError> {
    let unfinished = layout::begin(images_dir).map_err(|e| ImportError::writing(images_dir, &e))?;
    let scan = scan(source, record.keep, unfinished.path(), progress)?;
    let unwritable = |error: io::Error| ImportError::writing(images_dir, &error);
    let root = finish(unfinished.path(), &scan, record).map_err(unwritable)?;
    source.check_unchanged()?;
    if progress.is_cancelled() {
        return Err(ImportError::Cancelled);
    }
    let novelty = layout::publish(unfinished, images_dir, root.id()).map_err(unwritable)?;
    let id = root.id();
    tracing::info!(image = %id, file = %source.path().display(), format = %record.format, ?novelty, "image_added");
    Ok(Imported {
        id,
        dir: images_dir.join(id.to_string()),
        format: record.format,
        novelty,
        bytes_read: scan.bytes_read,
        root,
    })
}

/// Paths are kept as JSON text.
fn check_paths(source: &Source, dirs: &[PathBuf]) -> Result<(), ImportError> {
    let mut paths = source.parts().iter().map(|part| &part.path).chain(dirs);
    match paths.find(|path| path.to_str().is_none()) {
        None => Ok(()),
        Some(path) => Err(ImportError::Unsupported {
            path: path.clone(),
            what: "a name that is not valid UTF-8".to_owned(),
            remedy: "rename it".to_owned(),
        }),
    }
}

/// Writes what follows from the names of the data chunks, and syncs all.
fn finish(dir: &Path, scan: &Scanned, record: &SourceRecord) -> io::Result<RootPage> {
    let root = scan.pages.finish(scan.zero_chunks)?;
    scan.pages.file().sync_all()?;
    let index = File::create(dir.join(layout::INDEX))?;
    index::write(&index, &scan.pages, &root)?;
    index.sync_all()?;
    if let Some(copy) = &scan.copy {
        copy.sync_all()?;
    }
    layout::write_synced(dir, layout::ROOT, &root.encode())?;
    layout::write_synced(dir, layout::SOURCE, &serde_json::to_vec_pretty(record)?)?;
    Ok(root)
}

/// What reading the whole disk has given.
struct Scanned {
    pages: Pages,
    copy: Option<File>,
    zero_chunks: u64,
    bytes_read: u64,
}

/// What the workers share.
struct Scan<'a> {
    source: &'a Source,
    progress: &'a ImportProgress,
    out_dir: &'a Path,
    pages: Pages,
    copy: Option<File>,
    /// The first run that nobody has taken.
    next_run: AtomicU64,
    chunk_count: AtomicU64,
    bytes_read: AtomicU64,
    /// Set by the first worker that fails, so that the others stop.
    failed: AtomicBool,
}

fn scan(
    source: &Source,
    keep: Keep,
    out_dir: &Path,
    progress: &ImportProgress,
) -> Result<Scanned, ImportError> {
    let size_bytes = source.size_bytes();
    let shape = Shape::of(size_bytes)
        .ok_or_else(|| ImportError::TooLarge { path: source.path().to_owned(), size_bytes })?;
    let create = |name: &str| {
        let path = out_dir.join(name);
        File::options().read(true).write(true).create_new(true).open(path)
    };
    let unwritable = |error: io::Error| ImportError::writing(out_dir, &error);
    let copy = match keep {
        Keep::InPlace => None,
        Keep::Copy => {
            let copy = create(layout::DATA).map_err(unwritable)?;
            copy.set_len(size_bytes).map_err(unwritable)?;
            Some(copy)
        }
    };
    let pages = create(layout::PAGES).and_then(|file| Pages::create(file, shape)).map_err(unwritable)?;
    progress.begin(size_bytes);

    let scan = Scan {
        source,
        progress,
        out_dir,
        pages,
        copy,
        next_run: AtomicU64::new(0),
        chunk_count: AtomicU64::new(0),
        bytes_read: AtomicU64::new(0),
        failed: AtomicBool::new(false),
    };
    let runs = shape.geometry().chunk_count().div_ceil(CHUNKS_PER_RUN);
    in_parallel(runs, || scan.work())?;
    Ok(Scanned {
        pages: scan.pages,
        copy: scan.copy,
        zero_chunks: shape.geometry().chunk_count() - scan.chunk_count.into_inner(),
        bytes_read: scan.bytes_read.into_inner(),
    })
}

/// Runs `work` on all cores, though on no more than there are `runs`, and gives the first error.
pub(crate) fn in_parallel<E: Send>(runs: u64, work: impl Fn() -> Result<(), E> + Sync) -> Result<(), E> {
    let cores = thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
    let workers = cores.min(usize::try_from(runs).unwrap_or(cores));
    thread::scope(|scope| {
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(&work)).collect();
        let results = handles.into_iter().map(|handle| match handle.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        results.collect::<Vec<_>>().into_iter().collect()
    })
}

impl Scan<'_> {
    fn work(&self) -> Result<(), ImportError> {
        let done = self.work_until_done();
        if done.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        done
    }

    fn work_until_done(&self) -> Result<(), ImportError> {
        let run_bytes = CHUNKS_PER_RUN * CHUNK_BYTES as u64;
        let size_bytes = self.source.size_bytes();
        let mut reader = self.source.reader()?;
        let mut buf = vec![0; PIECE_BYTES as usize];
        loop {
            if self.progress.is_cancelled() {
                return Err(ImportError::Cancelled);
            }
            let start = self.next_run.fetch_add(1, Ordering::Relaxed).saturating_mul(run_bytes);
            if start >= size_bytes || self.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            let end = size_bytes.min(start + run_bytes);
            let data_end = self.run(&mut reader, start, end, &mut buf)?;
            self.progress.add_done(end - start);
            self.skip_to(data_end / run_bytes);
        }
    }

    /// Goes through one run. Gives where the next data may begin: `end`, or far behind it.
    fn run(&self, reader: &mut Reader, start: u64, end: u64, buf: &mut [u8]) -> Result<u64, ImportError> {
        let chunk = CHUNK_BYTES as u64;
        let unreadable = |error: io::Error| ImportError::reading(self.source.path(), &error);
        let mut hashes = [ChunkHash::ZERO; CHUNKS_PER_RUN as usize];
        let mut at = start;
        while at < end {
            let extent = reader.extent(at, end).map_err(unreadable)?;
            let extent_end = at + extent.len;
            let whole_end =
                if extent_end == self.source.size_bytes() { extent_end } else { extent_end / chunk * chunk };
            if extent.kind == ExtentKind::Hole && whole_end > at {
                at = whole_end;
                continue;
            }
            // Data, or a hole that ends within this chunk.
            let read_end = end.min(extent_end.next_multiple_of(chunk));
            self.bytes_read.fetch_add(read_end - at, Ordering::Relaxed);
            while at < read_end {
                let piece_end = read_end.min(at + PIECE_BYTES);
                let padded = &mut buf[..(piece_end - at).next_multiple_of(chunk) as usize];
                let (data, padding) = padded.split_at_mut((piece_end - at) as usize);
                reader.read_at(at, data).map_err(unreadable)?;
                padding.fill(0);
                self.name_chunks(at, piece_end, padded, &mut hashes[((at - start) / chunk) as usize..])?;
                at = piece_end;
            }
        }
        let count = (end - start).div_ceil(chunk) as usize;
        let named = hashes[..count].iter().filter(|hash| !hash.is_zero()).count();
        if named > 0 {
            let first = ChunkIndex(start / chunk);
            self.pages.put(first, &hashes[..count]).map_err(|e| ImportError::writing(self.out_dir, &e))?;
            self.chunk_count.fetch_add(named as u64, Ordering::Relaxed);
        }
        Ok(at)
    }

    /// Names the chunks from `at` on, and copies those that are not zero if a copy is wanted.
    fn name_chunks(
        &self,
        at: u64,
        end: u64,
        padded: &[u8],
        hashes: &mut [ChunkHash],
    ) -> Result<(), ImportError> {
        let offsets = (at..).step_by(CHUNK_BYTES);
        for ((bytes, hash), offset) in padded.chunks_exact(CHUNK_BYTES).zip(hashes).zip(offsets) {
            *hash = ChunkHash::of(bytes);
            if let Some(copy) = &self.copy
                && !hash.is_zero()
            {
                let len = (end - offset).min(CHUNK_BYTES as u64) as usize;
                copy.write_all_at(&bytes[..len], offset)
                    .map_err(|e| ImportError::writing(self.out_dir, &e))?;
            }
        }
        Ok(())
    }

    /// Moves all workers past runs that lie wholly in a hole.
    fn skip_to(&self, run: u64) {
        let run_bytes = CHUNKS_PER_RUN * CHUNK_BYTES as u64;
        let next = self.next_run.fetch_max(run, Ordering::Relaxed);
        self.progress.add_done(run.saturating_sub(next).saturating_mul(run_bytes));
    }
}
