//! One VM's private, durable layer over a read-only base.
//!
//! A sparse data file holds block *i* at byte *i* x 4096; the map says which blocks are the overlay's
//! own. All others are the base's, and zero beyond the base's end. A zeroed or discarded block is an own
//! block with a hole in the data file.
//!
//! Consistency: every change [locks](range_lock) the blocks it touches; the map's bit is set after
//! the block's bytes are in the data file. A block is only ever written as a whole, with the rest of a
//! partly covered one read from where it was before, so a read sees each block old or new.
//! Durability: [`flush`]. Nothing else syncs.
//! Cancellation: what runs on the blocking pool owns its buffers and its lock, so a dropped future has
//! either not begun a step or the step runs to its end before anybody else may change these blocks.
//! Crash: the map never names a block whose bytes are not durable, and [`log`] finds its own torn tail. A killed
//! process loses nothing that it answered, flushed or not: its guests go on; see [`unsynced_map`].
//! Layers: an overlay may be the base of others. It is [frozen](Overlay::freeze) first; from then on what it reads
//! as never changes. What it lacks can still be [streamed](Overlay::stream_from_base) from its base, or what it holds be
//! [committed](Overlay::commit_from) to that, so that one of the two can be [left out](Overlay::set_base).
//! Retries: none. [`DiskError::NoSpace`] leaves everything as it was, and the guest may try again.

mod alignment;
mod files;
mod flush;
mod log;
mod map;
mod merge;
mod range_lock;
mod unsynced_map;

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use block::limits::BLOCK_BYTES;
use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind, Geometry, TryIo};
use futures_util::FutureExt;

use self::alignment::{AlignedSplit, Edge, touched};
use self::flush::Flusher;
use self::log::{LogError, MapLog};
use self::map::{BlockMap, Place};
use self::range_lock::{RangeGuard, RangeLock};
use self::unsynced_map::UnsyncedMap;
use crate::{Media, asyncio};

pub use self::unsynced_map::BootId;

const BLOCK: u64 = BLOCK_BYTES as u64;

/// Most bytes written on the spot before other tasks get their turn: about 20 us of copying into the
/// page cache, little more than what handing the write to the blocking pool would cost.
const WRITE_PIECE_BYTES: usize = 64 * 1024;

/// Most extents in one answer: fewer than a disk may give, because each of them costs a task switch.
const EXTENTS_MAX: usize = 512;

type Block = [u8; BLOCK_BYTES];

/// Why an overlay cannot be created, opened or removed.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// There is an overlay already.
    #[error("there is already an overlay in '{}'", .0.display())]
    Exists(PathBuf),
    /// There is none.
    #[error("there is no overlay in '{}'", .0.display())]
    Missing(PathBuf),
    /// It is open elsewhere.
    #[error("the overlay in '{}' is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The size is 0 or beyond what a disk may have.
    #[error("an overlay cannot have {0} bytes")]
    Size(u64),
    /// A file does not hold what it must; the disk cannot be trusted.
    #[error("'{}' is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The operating system refused.
    #[error("'{}': {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What an overlay holds and did since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OverlayStats {
    /// Size of the disk.
    pub size_bytes: u64,
    /// Bytes that no longer come from the base, holes included.
    pub allocated_bytes: u64,
    /// Length of the log of allocations.
    pub map_bytes: u64,
    /// Rounds of syncing that succeeded; concurrent flushes share one.
    pub flushes: u64,
    /// How often the log was written anew.
    pub compactions: u64,
}

/// What an overlay is kept on.
#[derive(Clone)]
pub struct OverlayMedia {
    /// The blocks.
    pub data: Arc<dyn Media>,
    /// Which of them count.
    pub map: Arc<dyn Media>,
    /// Which do so since the machine started.
    pub live: Arc<dyn Media>,
    /// The present run of the machine.
    pub boot: BootId,
}

/// An empty overlay that was written and is not durable yet.
pub struct NewOverlay {
    log: MapLog,
    data: Arc<dyn Media>,
    unsynced: UnsyncedMap,
    base: Arc<dyn Disk>,
    map: PathBuf,
}

impl NewOverlay {
    /// `dir` is the media's directory, if they have one.
    fn write(
        media: OverlayMedia,
        size_bytes: u64,
        base: Arc<dyn Disk>,
        dir: &Path,
    ) -> Result<NewOverlay, OverlayError> {
        check_size(size_bytes)?;
        let io = |name: &str| {
            let path = dir.join(name);
            move |source| OverlayError::Io { path, source }
        };
        let OverlayMedia { data, map, live, boot } = media;
        data.set_len(size_bytes.next_multiple_of(BLOCK)).map_err(io(files::DATA))?;
        let unsynced = UnsyncedMap::create(live, boot).map_err(io(files::LIVE))?;
        let log = MapLog::create(map, size_bytes).map_err(io(files::MAP))?;
        Ok(NewOverlay { log, data, unsynced, base, map: dir.join(files::MAP) })
    }

    /// Makes its files durable. Their names in the directory, and the directory's own, are the caller's to sync. Blocks
    /// the thread.
    pub fn sync(mut self) -> Result<Overlay, OverlayError> {
        self.log.sync().map_err(|source| OverlayError::Io { path: self.map, source })?;
        let blocks = Overlay::empty_map(self.log.size_bytes());
        Ok(Overlay::new(self.data, self.log, self.unsynced, blocks, self.base))
    }
}

/// A VM's writable disk over a read-only base.
///
/// Dropping it flushes nothing: what was not flushed is kept if the process ends, and lost or kept if the machine
/// does.
pub struct Overlay {
    geometry: Geometry,
    /// Replaced by one that reads the same, and only then.
    base: RwLock<Arc<dyn Disk>>,
    data: Arc<dyn Media>,
    map: Arc<BlockMap>,
    unsynced: Arc<UnsyncedMap>,
    frozen: AtomicBool,
    range_lock: Arc<RangeLock>,
    flusher: Arc<Flusher>,
}

fn check_size(size_bytes: u64) -> Result<(), OverlayError> {
    if Geometry::new(size_bytes).is_none() {
        return Err(OverlayError::Size(size_bytes));
    }
    Ok(())
}

impl Overlay {
    /// Writes an empty overlay of `size_bytes` into `dir`, which is created too. Blocks the thread.
    pub fn create(dir: &Path, size_bytes: u64, base: Arc<dyn Disk>) -> Result<NewOverlay, OverlayError> {
        files::create(dir, size_bytes, base)
    }

    /// Opens the overlay in `dir`. Blocks the thread.
    pub fn open(dir: &Path, base: Arc<dyn Disk>) -> Result<Overlay, OverlayError> {
        files::open(dir, base)
    }

    /// Removes the overlay in `dir` and the directory. Refused while it is open. Blocks the thread.
    pub fn remove(dir: &Path) -> Result<(), OverlayError> {
        files::remove(dir)
    }

    /// Creates an empty overlay of `size_bytes` on empty media.
    pub fn create_on(
        media: OverlayMedia,
        size_bytes: u64,
        base: Arc<dyn Disk>,
    ) -> Result<Overlay, OverlayError> {
        NewOverlay::write(media, size_bytes, base, Path::new(""))?.sync()
    }

    /// Opens the overlay on its media.
    pub fn open_on(media: OverlayMedia, base: Arc<dyn Disk>) -> Result<Overlay, OverlayError> {
        Overlay::open_named(media, base, Path::new(""))
    }

    fn open_named(media: OverlayMedia, base: Arc<dyn Disk>, dir: &Path) -> Result<Overlay, OverlayError> {
        let damaged = |name: &str, what| OverlayError::Damaged { path: dir.join(name), what };
        let io = |name: &str| {
            let path = dir.join(name);
            move |source| OverlayError::Io { path, source }
        };
        let OverlayMedia { data, map, live, boot } = media;
        let mut blocks = None;
        let log = MapLog::open(map, |log, word| {
            blocks.get_or_insert_with(|| Overlay::empty_map(log.size_bytes())).restore(word)
        })
        .map_err(|error| match error {
            LogError::Damaged(what) => damaged(files::MAP, what),
            LogError::Io(error) => io(files::MAP)(error),
        })?;
        let size_bytes = log.size_bytes();
        let blocks = blocks.unwrap_or_else(|| Overlay::empty_map(size_bytes));
        let lost = || {
            let file = dir.join(files::LIVE);
            tracing::warn!(file = %file.display(), "overlay_damaged: if the machine ran on, what was not flushed is lost");
        };
        let unsynced = UnsyncedMap::open(live, boot, lost, |word| blocks.restore_unsynced(word))
            .map_err(io(files::LIVE))?;
        let unsynced = unsynced.map_err(|word| {
            damaged(files::LIVE, format!("it allocates blocks beyond the disk (word {})", word.index))
        })?;
        let whole_len = size_bytes.next_multiple_of(BLOCK);
        let len = data.len_bytes().map_err(io(files::DATA))?;
        if len < whole_len {
            // A crash before the first flush may have lost the length that `create` set. Later the first
            // flush made it durable, so that blocks beyond the end were lost by something else.
            if blocks.run(len / BLOCK..whole_len / BLOCK) != (Place::Base, whole_len / BLOCK - len / BLOCK) {
                return Err(damaged(files::DATA, format!("it has {len} bytes, its disk has {size_bytes}")));
            }
            data.set_len(whole_len).map_err(io(files::DATA))?;
        }
        Ok(Overlay::new(data, log, unsynced, blocks, base))
    }

    fn empty_map(size_bytes: u64) -> BlockMap {
        BlockMap::new(size_bytes.div_ceil(BLOCK))
    }

    fn new(
        data: Arc<dyn Media>,
        log: MapLog,
        unsynced: UnsyncedMap,
        map: BlockMap,
        base: Arc<dyn Disk>,
    ) -> Overlay {
        let geometry =
            Geometry::new(log.size_bytes()).expect("a log of another size is neither made nor opened");
        let map = Arc::new(map);
        let flusher = Arc::new(Flusher::new(Arc::clone(&data), Arc::clone(&map), log));
        let (base, unsynced, frozen) = (RwLock::new(base), Arc::new(unsynced), AtomicBool::new(false));
        Overlay { geometry, base, data, map, unsynced, frozen, range_lock: Arc::default(), flusher }
    }

    /// Holds up all changes once those that run are done, until the answer is dropped. What comes later is refused
    /// with [`DiskError::ReadOnly`] if the overlay is to be [kept](Freezing::keep) as it is.
    pub async fn freeze(&self) -> Freezing<'_> {
        let began = Instant::now();
        let guard = self.range_lock.lock(0..u64::MAX).await;
        Freezing { overlay: self, _guard: guard, began }
    }

    /// Whether it takes no change any more.
    pub fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }

    /// Takes no change from now on: to be called when an overlay that others build upon was opened.
    pub fn set_frozen(&self) {
        self.frozen.store(true, Ordering::Release);
    }

    /// Reads what it does not hold itself from `base` from now on. That must read the same in all blocks that the
    /// overlay does not hold.
    pub fn set_base(&self, base: Arc<dyn Disk>) {
        *self.base.write().unwrap_or_else(PoisonError::into_inner) = base;
    }

    fn base(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.base.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a change may begin: asked with the lock in hand, which orders it with freezing.
    fn must_take_changes(&self) -> Result<(), DiskError> {
        if self.is_frozen() { Err(DiskError::ReadOnly) } else { Ok(()) }
    }

    /// What it holds and did.
    pub fn stats(&self) -> OverlayStats {
        OverlayStats {
            size_bytes: self.geometry.size_bytes(),
            allocated_bytes: self.allocated_bytes(),
            map_bytes: self.flusher.map_bytes(),
            flushes: self.flusher.rounds_done(),
            compactions: self.flusher.compactions(),
        }
    }

    /// Bytes that no longer come from the base, holes included.
    pub fn allocated_bytes(&self) -> u64 {
        self.map.allocated_blocks() * BLOCK
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size_bytes = self.geometry.size_bytes();
        if self.geometry.contains(offset, len) {
            Ok(())
        } else {
            Err(DiskError::OutOfRange { offset, len, size_bytes })
        }
    }

    /// The place of the byte at `offset`, and for how many of `len` bytes it holds.
    fn run(&self, offset: u64, len: u64) -> (Place, u64) {
        let (place, blocks) = self.map.run(touched(offset, len));
        let end = (offset / BLOCK + blocks) * BLOCK;
        (place, len.min(end - offset))
    }

    fn try_read_run(&self, place: Place, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        match place {
            Place::Own => Ok(self.data.try_read_at(offset, buf)?),
            Place::Base => {
                // Held while the base is read: that does not wait, and costs less than counting a reference.
                let base = self.base.read().unwrap_or_else(PoisonError::into_inner);
                let (below, beyond) = buf.split_at_mut(bytes_on(&**base, offset, buf.len()));
                beyond.fill(0);
                if below.is_empty() { Ok(TryIo::Done) } else { base.try_read(offset, below) }
            }
        }
    }

    async fn read_run(&self, place: Place, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        match place {
            Place::Own => Ok(asyncio::read(&self.data, offset, buf).await?),
            Place::Base => {
                let base = self.base();
                let (below, beyond) = buf.split_at_mut(bytes_on(&*base, offset, buf.len()));
                beyond.fill(0);
                if below.is_empty() || base.try_read(offset, below)? == TryIo::Done {
                    return Ok(());
                }
                base.read(offset, below).await
            }
        }
    }

    async fn read_all(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (place, len) = self.run(at, (buf.len() - done) as u64);
            self.read_run(place, at, &mut buf[done..done + len as usize]).await?;
            done += len as usize;
        }
        Ok(())
    }

    fn place(&self, block: u64) -> Place {
        if self.map.is_own(block) { Place::Own } else { Place::Base }
    }

    /// The bytes of a partly covered block as they are before the change.
    async fn edge_block(&self, edge: &Edge) -> Result<Box<Block>, DiskError> {
        let mut block = Box::new([0; BLOCK_BYTES]);
        self.read_run(self.place(edge.block), edge.block * BLOCK, &mut block[..]).await?;
        Ok(block)
    }

    /// Writes whole blocks from block `first`. Needs the lock on them. Never waits for another task.
    fn put(&self, _guard: &RangeGuard, first: u64, data: &[u8]) -> Result<(), DiskError> {
        self.data.write_at(first * BLOCK, data)?;
        self.map.allocate(&self.unsynced, first..first + (data.len() as u64).div_ceil(BLOCK))?;
        self.flusher.mark_dirty();
        Ok(())
    }

    async fn write_all(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.check(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(());
        }
        let guard = self.range_lock.lock(touched(offset, data.len() as u64)).await;
        self.must_take_changes()?;
        let split = AlignedSplit::new(offset, data.len() as u64, self.geometry.size_bytes());
        for edge in split.edges.iter().flatten() {
            let mut block = self.edge_block(edge).await?;
            let bytes = &data[edge.at..edge.at + edge.within.len()];
            block[edge.within.clone()].copy_from_slice(bytes);
            self.put(&guard, edge.block, &block[..])?;
        }
        let whole = whole_of(data, &split, offset);
        let mut first = split.whole.start;
        for (index, piece) in whole.chunks(WRITE_PIECE_BYTES).enumerate() {
            if index > 0 {
                tokio::task::yield_now().await;
            }
            self.put(&guard, first, piece)?;
            first += (WRITE_PIECE_BYTES / BLOCK_BYTES) as u64;
        }
        Ok(())
    }

    /// Punches holes for whole blocks and makes them the overlay's own, as far as the base reaches:
    /// beyond it, a block that nobody wrote is zero anyway.
    async fn punch(&self, guard: RangeGuard, whole: Range<u64>) -> Result<(), DiskError> {
        let base_blocks = self.base().size_bytes().div_ceil(BLOCK);
        self.punch_own(Arc::new(guard), whole, base_blocks).await
    }

    /// Punches holes for whole blocks and makes those before block `own_end` the overlay's own.
    async fn punch_own(
        &self,
        guard: Arc<RangeGuard>,
        whole: Range<u64>,
        own_end: u64,
    ) -> Result<(), DiskError> {
        if whole.is_empty() {
            return Ok(());
        }
        let (data, map, unsynced) =
            (Arc::clone(&self.data), Arc::clone(&self.map), Arc::clone(&self.unsynced));
        let flusher = Arc::clone(&self.flusher);
        asyncio::blocking(move || {
            data.punch_hole(whole.start * BLOCK, (whole.end - whole.start) * BLOCK)?;
            map.allocate(&unsynced, whole.start..whole.end.min(own_end))?;
            flusher.mark_dirty();
            drop(guard);
            Ok(())
        })
        .await
        .map_err(DiskError::from)
    }

    async fn zero_all(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let guard = self.range_lock.lock(touched(offset, len)).await;
        self.must_take_changes()?;
        let split = AlignedSplit::new(offset, len, self.geometry.size_bytes());
        for edge in split.edges.iter().flatten() {
            let mut block = self.edge_block(edge).await?;
            block[edge.within.clone()].fill(0);
            self.put(&guard, edge.block, &block[..])?;
        }
        self.punch(guard, split.whole).await
    }

    async fn discard_all(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let whole = AlignedSplit::new(offset, len, self.geometry.size_bytes()).whole;
        let guard = self.range_lock.lock(whole.clone()).await;
        self.must_take_changes()?;
        self.punch(guard, whole).await
    }

    async fn list_extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DiskError> {
        self.check(offset, len)?;
        let mut extents: Vec<Extent> = Vec::new();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            for extent in self.run_extents(at, end - at).await? {
                at += extent.len;
                let is_full = extents.len() == EXTENTS_MAX;
                match extents.last_mut() {
                    Some(last) if last.kind == extent.kind => last.len += extent.len,
                    _ if is_full => return Ok(extents),
                    _ => extents.push(extent),
                }
            }
        }
        Ok(extents)
    }

    /// The extents at `offset`: at least one, none beyond `len` bytes.
    async fn run_extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DiskError> {
        let (place, len) = self.run(offset, len);
        let base = self.base();
        let below = len.min(base.size_bytes().saturating_sub(offset));
        match place {
            Place::Own => {
                let data = Arc::clone(&self.data);
                let (kind, len) = asyncio::blocking(move || data.extent_at(offset, len)).await?;
                Ok(vec![Extent { len, kind }])
            }
            Place::Base if below == 0 => Ok(vec![Extent { len, kind: ExtentKind::Hole }]),
            Place::Base => match base.extents(offset, below).await? {
                // A base that knows nothing has data there, as far as is known.
                none if none.is_empty() => Ok(vec![Extent { len: below, kind: ExtentKind::Data }]),
                some => Ok(some),
            },
        }
    }
}

/// An overlay that takes no changes at present, and none ever again if that is [meant](Freezing::keep).
///
/// Dropping it lets changes go on; those that waited are refused if the overlay is frozen then.
pub struct Freezing<'a> {
    overlay: &'a Overlay,
    _guard: RangeGuard,
    began: Instant,
}

impl Freezing<'_> {
    /// Freezes the overlay for good.
    pub fn keep(&self) {
        self.overlay.set_frozen();
    }

    /// How long changes have been waiting.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
}

/// How many of `len` bytes from `offset` lie on `disk`.
fn bytes_on(disk: &dyn Disk, offset: u64, len: usize) -> usize {
    (len as u64).min(disk.size_bytes().saturating_sub(offset)) as usize
}

/// The part of a write that covers whole blocks.
fn whole_of<'a>(data: &'a [u8], split: &AlignedSplit, offset: u64) -> &'a [u8] {
    if split.whole.is_empty() {
        return &[];
    }
    let from = split.whole_at(offset);
    let len = ((split.whole.end - split.whole.start) * BLOCK) as usize;
    &data[from..data.len().min(from + len)]
}

impl Disk for Overlay {
    fn size_bytes(&self) -> u64 {
        self.geometry.size_bytes()
    }

    fn access(&self) -> Access {
        if self.is_frozen() { Access::ReadOnly } else { Access::ReadWrite }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.check(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (place, len) = self.run(at, (buf.len() - done) as u64);
            if self.try_read_run(place, at, &mut buf[done..done + len as usize])? == TryIo::WouldBlock {
                return Ok(TryIo::WouldBlock);
            }
            done += len as usize;
        }
        Ok(TryIo::Done)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        self.check(offset, data.len() as u64)?;
        if data.is_empty() {
            return Ok(TryIo::Done);
        }
        if data.len() > WRITE_PIECE_BYTES {
            return Ok(TryIo::WouldBlock);
        }
        let Some(guard) = self.range_lock.try_lock(touched(offset, data.len() as u64)) else {
            return Ok(TryIo::WouldBlock);
        };
        self.must_take_changes()?;
        let split = AlignedSplit::new(offset, data.len() as u64, self.geometry.size_bytes());
        // Both edges are read before anything is written: waiting must leave everything as it was.
        let mut blocks = [[0; BLOCK_BYTES]; 2];
        for (edge, block) in split.edges.iter().zip(&mut blocks) {
            let Some(edge) = edge else { continue };
            if self.try_read_run(self.place(edge.block), edge.block * BLOCK, block)? == TryIo::WouldBlock {
                return Ok(TryIo::WouldBlock);
            }
            block[edge.within.clone()].copy_from_slice(&data[edge.at..edge.at + edge.within.len()]);
        }
        for (edge, block) in split.edges.iter().zip(&blocks) {
            if let Some(edge) = edge {
                self.put(&guard, edge.block, block)?;
            }
        }
        let whole = whole_of(data, &split, offset);
        if !whole.is_empty() {
            self.put(&guard, split.whole.start, whole)?;
        }
        Ok(TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.read_all(offset, buf).boxed()
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.write_all(offset, data).boxed()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.zero_all(offset, len).boxed()
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.discard_all(offset, len).boxed()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        async { self.flusher.flush().await }.boxed()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.list_extents(offset, len).boxed()
    }
}

#[cfg(test)]
pub(crate) mod tests;
