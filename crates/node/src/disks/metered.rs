//! A disk that counts what is done with it.

use std::sync::atomic::{AtomicU64, Ordering};

use block::{Access, BoxFuture, Disk, DiskError, Extent, TryIo};

use control::api::details::DiskIo;
use control::api::now_unix_ms;

/// A disk that counts what is done with it, and notes when it was first read since it was last asked to: the moment
/// at which a booting guest's firmware reached it.
pub(crate) struct MeteredDisk<D> {
    disk: D,
    /// 0 while the first read is awaited, [`NOT_AWAITED`] until then.
    first_read_unix_ms: AtomicU64,
    counts: Counts,
}

/// Instead of the time of the first read: a disk that is opened after a restart has a guest that read it before.
const NOT_AWAITED: u64 = u64::MAX;

/// Each is exact by itself; together they are as good as a glance.
#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    clears: AtomicU64,
    flushes: AtomicU64,
}

fn add(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

impl<D: Disk> MeteredDisk<D> {
    pub(crate) fn new(disk: D) -> Self {
        MeteredDisk { disk, first_read_unix_ms: AtomicU64::new(NOT_AWAITED), counts: Counts::default() }
    }

    /// The disk below.
    pub(crate) fn inner(&self) -> &D {
        &self.disk
    }

    /// What was done with it so far.
    pub(crate) fn io(&self) -> DiskIo {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskIo {
            reads: get(&self.counts.reads),
            read_bytes: get(&self.counts.read_bytes),
            writes: get(&self.counts.writes),
            written_bytes: get(&self.counts.written_bytes),
            clears: get(&self.counts.clears),
            flushes: get(&self.counts.flushes),
        }
    }

    /// Takes the next read for the first.
    pub(crate) fn await_first_read(&self) {
        self.first_read_unix_ms.store(0, Ordering::Relaxed);
    }

    /// When the disk was first read, in milliseconds since the UNIX epoch.
    pub(crate) fn first_read_unix_ms(&self) -> Option<u64> {
        Some(self.first_read_unix_ms.load(Ordering::Relaxed)).filter(|&ms| ms > 0 && ms != NOT_AWAITED)
    }

    fn note_read(&self) {
        if self.first_read_unix_ms.load(Ordering::Relaxed) == 0 {
            self.first_read_unix_ms.store(now_unix_ms(), Ordering::Relaxed);
        }
    }

    fn count_read(&self, len: usize) {
        add(&self.counts.reads, 1);
        add(&self.counts.read_bytes, len);
    }

    fn count_write(&self, len: usize) {
        add(&self.counts.writes, 1);
        add(&self.counts.written_bytes, len);
    }
}

impl<D: Disk> Disk for MeteredDisk<D> {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn access(&self) -> Access {
        self.disk.access()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.note_read();
        let tried = self.disk.try_read(offset, buf)?;
        // One that has to wait is asked for again.
        if tried == TryIo::Done {
            self.count_read(buf.len());
        }
        Ok(tried)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        let tried = self.disk.try_write(offset, data)?;
        if tried == TryIo::Done {
            self.count_write(data.len());
        }
        Ok(tried)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.note_read();
        self.count_read(buf.len());
        self.disk.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.count_write(data.len());
        self.disk.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.clears, 1);
        self.disk.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.clears, 1);
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.flushes, 1);
        self.disk.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.disk.extents(offset, len)
    }
}
