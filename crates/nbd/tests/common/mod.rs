//! Disks and servers for the tests.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(dead_code, unreachable_pub)] // Each test file uses a part of this.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind, TryIo};
use nbd::{Export, Exports, Listing, Server};
use tokio::sync::Semaphore;

pub const BLOCK: usize = 4096;

/// How a [`MemoryDisk`] takes reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// At once.
    Now,
    /// Always by the asynchronous form.
    Later,
}

/// A disk in memory, with a gate that holds up the reads of one block, and counters.
pub struct MemoryDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub pace: Pace,
    pub access: Access,
    /// Reads of this offset wait for a permit of `gate`; `u64::MAX` holds up nobody.
    pub gated_offset: AtomicU64,
    pub gate: Semaphore,
    pub flushes: AtomicU64,
    pub reads: AtomicU64,
    pub full: AtomicBool,
    pub broken: AtomicBool,
}

impl MemoryDisk {
    pub fn new(size_bytes: usize, pace: Pace) -> Arc<MemoryDisk> {
        MemoryDisk::with(vec![0; size_bytes], pace, Access::ReadWrite)
    }

    pub fn with(bytes: Vec<u8>, pace: Pace, access: Access) -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk {
            bytes: Mutex::new(bytes),
            pace,
            access,
            gated_offset: AtomicU64::new(u64::MAX),
            gate: Semaphore::new(0),
            flushes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            full: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        })
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

    fn change(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8])) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        if self.full.load(Ordering::SeqCst) {
            return Err(DiskError::NoSpace);
        }
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
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.with_range(offset, buf.len() as u64, |bytes| buf.copy_from_slice(bytes))?;
        Ok(TryIo::Done)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        if self.pace == Pace::Later {
            return Ok(TryIo::WouldBlock);
        }
        self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))?;
        Ok(TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
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
            self.change(offset, data.len() as u64, |bytes| bytes.copy_from_slice(data))
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move { self.change(offset, len, |bytes| bytes.fill(0)) })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.write_zeroes(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move {
            self.flushes.fetch_add(1, Ordering::SeqCst);
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

/// Serves one disk as `disk` and as the default export.
pub struct OneDisk(pub Arc<dyn Disk>);

impl Exports for OneDisk {
    fn open(&self, name: &str) -> Option<Export> {
        ["", "disk"]
            .contains(&name)
            .then(|| Export { disk: Arc::clone(&self.0), description: "a disk for tests".to_owned() })
    }

    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: "disk".to_owned(), description: "a disk for tests".to_owned() }]
    }
}

pub fn server(disk: Arc<dyn Disk>) -> Server {
    Server::new(Arc::new(OneDisk(disk)))
}

/// Serves whoever connects, until it is dropped.
pub struct Serving(tokio::task::JoinHandle<()>);

impl Serving {
    pub fn unix(server: Server, listener: tokio::net::UnixListener) -> Serving {
        Serving(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                connections.spawn(async move { server.serve(stream, std::future::pending()).await });
            }
        }))
    }

    pub fn tcp(server: Server, listener: tokio::net::TcpListener) -> Serving {
        Serving(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                connections.spawn(async move { server.serve(stream, std::future::pending()).await });
            }
        }))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A server on a UNIX socket.
pub struct Listening {
    pub path: std::path::PathBuf,
    _serving: Serving,
}

impl Listening {
    /// Listens in `dir`.
    pub fn start(server: Server, dir: &std::path::Path) -> Listening {
        let path = dir.join("nbd.sock");
        let listener = tokio::net::UnixListener::bind(&path).expect("a fresh directory takes a socket");
        Listening { path, _serving: Serving::unix(server, listener) }
    }

    /// The address in the form that foreign tools take.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display())
    }
}
