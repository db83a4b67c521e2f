//! Disks and targets for the tests.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(dead_code, unreachable_pub)] // Each test file uses a part of this.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind, TryIo};

use iscsi::scsi::{Identity, Unit};
use iscsi::{Admission, Portal, Server, ServerOptions, Target};
use std::net::SocketAddr;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

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

/// A target of these disks under `name`, for everybody.
pub fn target(name: &str, disks: &[Arc<MemoryDisk>]) -> Target {
    let unit = |(lun, disk): (usize, &Arc<MemoryDisk>)| {
        let identity = Identity { serial: format!("{name}/{lun}") };
        Arc::new(Unit::new(Arc::clone(disk) as Arc<dyn Disk>, identity))
    };
    Target {
        name: name.parse().unwrap(),
        alias: "a disk for tests".to_owned(),
        units: disks.iter().enumerate().map(unit).collect(),
        admission: Admission::default(),
    }
}

/// A server on two portals of the loopback interface, closed when it is dropped.
pub struct Serving {
    pub server: Server,
    pub portals: [SocketAddr; 2],
    _tasks: JoinSet<std::io::Result<()>>,
}

impl Serving {
    pub async fn start(targets: Vec<Target>) -> Serving {
        Serving::with(targets, Admission::default()).await
    }

    pub async fn with(targets: Vec<Target>, discovery: Admission) -> Serving {
        let mut listeners = Vec::new();
        for _ in 0..2 {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> = listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        let portals = addresses.iter().zip(1..).map(|(&address, group)| Portal { address, group }).collect();
        let server = Server::new(ServerOptions { portals, discovery });
        targets.into_iter().for_each(|target| server.add(target).unwrap());
        let mut tasks = JoinSet::new();
        for (listener, group) in listeners.into_iter().zip(1..) {
            let server = server.clone();
            tasks.spawn(async move { server.serve(listener, group).await });
        }
        Serving { server, portals: [addresses[0], addresses[1]], _tasks: tasks }
    }
}

/// The path of a tool, or a failure that says how to get it.
pub fn tool(name: &str, package: &str) -> std::path::PathBuf {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|dir| dir.join(name)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{name} is not installed: apt-get install {package}"))
}
