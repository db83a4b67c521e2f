//! A disk in memory that does as a test says, and remembers what it was asked for.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind, TryIo};
use tokio::sync::Semaphore;

/// Where its extents may end.
pub const BLOCK: usize = 4096;

/// How a [`MemoryDisk`] takes reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// At once.
    Now,
    /// Always by the asynchronous form.
    Later,
}

/// What a disk was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// To read so many bytes.
    Read {
        /// Where they begin.
        offset: u64,
        /// How many they are.
        len: usize,
    },
    /// To write bytes, which it did not refuse.
    Write,
    /// To write zeroes or discard bytes, which it did not refuse.
    Clear,
    /// To make durable what was written.
    Flush,
}

/// A disk in memory, with a gate that holds up the reads of one block.
pub struct MemoryDisk {
    /// What it holds.
    pub bytes: Mutex<Vec<u8>>,
    pace: Pace,
    access: Access,
    /// Reads of this offset wait for a permit of `gate`; `u64::MAX` holds up nobody.
    pub gated_offset: AtomicU64,
    /// Takes one permit of each read that it lets through.
    pub gate: Semaphore,
    /// Whether it refuses changes for want of room.
    pub full: AtomicBool,
    /// Whether it fails at all that is read or changed.
    pub broken: AtomicBool,
    asked: Mutex<Vec<Asked>>,
}

impl MemoryDisk {
    /// A disk of zeroes that takes writes.
    pub fn new(size_bytes: usize, pace: Pace) -> Arc<MemoryDisk> {
        MemoryDisk::with(vec![0; size_bytes], pace, Access::ReadWrite)
    }

    /// A disk of these bytes.
    pub fn with(bytes: Vec<u8>, pace: Pace, access: Access) -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk {
            bytes: Mutex::new(bytes),
            pace,
            access,
            gated_offset: AtomicU64::new(u64::MAX),
            gate: Semaphore::new(0),
            full: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            asked: Mutex::default(),
        })
    }

    /// What it was asked for so far, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// How often it was flushed.
    pub fn flushes(&self) -> usize {
        self.asked.lock().unwrap().iter().filter(|&&asked| asked == Asked::Flush).count()
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }

    fn with_range<T>(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8]) -> T) -> Result<T, DiskError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(DiskError::Io("the test broke this disk".to_owned()));
        }
        let mut bytes = self.bytes.lock().unwrap();
        let size_bytes = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > size_bytes) {
            return Err(DiskError::OutOfRange { offset, len, size_bytes });
        }
        Ok(act(&mut bytes[offset as usize..(offset + len) as usize]))
    }

    fn change(
        &self,
        asked: Asked,
        offset: u64,
        len: u64,
        act: impl FnOnce(&mut [u8]),
    ) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(DiskError::NoSpace);
        }
        self.note(asked);
        self.with_range(offset, len, act)
    }

    fn is_gated(&self, offset: u64) -> bool {
        self.gated_offset.load(Ordering::SeqCst) == offset
    }
}

impl Disk for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn access(&self) -> Access {
        self.access
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        if self.pace == Pace::Later || self.is_gated(offset) {
            // What a disk leaves in the buffer when it has to wait must not reach the client.
            buf.fill(0xdb);
            return Ok(TryIo::WouldBlock);
        }
        self.note(Asked::Read { offset, len: buf.len() });
        self.with_range(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))?;
        Ok(TryIo::Done)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        if self.pace == Pace::Later {
            return Ok(TryIo::WouldBlock);
        }
        self.change(Asked::Write, offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))?;
        Ok(TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            self.note(Asked::Read { offset, len: buf.len() });
            if self.is_gated(offset) {
                self.gate.acquire().await.expect("the gate is never closed").forget();
            }
            tokio::task::yield_now().await;
            self.with_range(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            self.change(Asked::Write, offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move { self.change(Asked::Clear, offset, len, |bytes| bytes.fill(0)) })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.write_zeroes(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move {
            self.note(Asked::Flush);
            Ok(())
        })
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async move {
            self.with_range(offset, len, |bytes| {
                let mut extents = Vec::new();
                let mut at = 0;
                while at < bytes.len() {
                    // Extents end at block boundaries of the disk, as they do in real ones.
                    let step = (BLOCK - (offset as usize + at) % BLOCK).min(bytes.len() - at);
                    let zero = bytes[at..at + step].iter().all(|&b| b == 0);
                    let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
                    extents.push(Extent { len: step as u64, kind });
                    at += step;
                }
                extents
            })
        })
    }
}
