//! One VM's private, durable layer.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{BoxFuture, Disk, DiskError};

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

/// A VM's writable disk over a read-only base.
pub struct Overlay {
    base: Arc<dyn Disk>,
}

impl Overlay {
    /// Creates an empty overlay in `dir`, which is created too. Blocks.
    pub fn create(dir: &Path, size_bytes: u64, base: Arc<dyn Disk>) -> Result<Overlay, OverlayError> {
        let _ = (dir, size_bytes);
        Ok(Overlay { base })
    }

    /// Opens the overlay in `dir`. Blocks.
    pub fn open(dir: &Path, base: Arc<dyn Disk>) -> Result<Overlay, OverlayError> {
        let _ = dir;
        Ok(Overlay { base })
    }

    /// Removes the overlay in `dir` and the directory. Refused while it is open. Blocks.
    pub fn remove(dir: &Path) -> Result<(), OverlayError> {
        Err(OverlayError::Missing(dir.to_owned()))
    }

    /// What it holds and did.
    pub fn stats(&self) -> OverlayStats {
        OverlayStats { size_bytes: self.base.size_bytes(), ..OverlayStats::default() }
    }

    /// Bytes that no longer come from the base, holes included.
    pub fn allocated_bytes(&self) -> u64 {
        self.stats().allocated_bytes
    }
}

impl Disk for Overlay {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn access(&self) -> block::Access {
        self.base.access()
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.base.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.base.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.base.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.base.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.base.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<block::Extent>, DiskError>> {
        self.base.extents(offset, len)
    }
}
