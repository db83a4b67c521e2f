//! The seam above an image: what one VM, or one client of an export, sees.

use futures_util::future::BoxFuture;

/// Whether a disk takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writes are refused with [`DiskError::ReadOnly`].
    ReadOnly,
    /// Writes are taken.
    ReadWrite,
}

/// Whether an operation was done at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum TryIo {
    /// It is done.
    Done,
    /// It would have to wait; what the operation is about was not changed, but a buffer to be filled may
    /// hold anything. Use the asynchronous form.
    WouldBlock,
}

/// Why a disk operation failed. The variants are what an export has to tell its client.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The range does not lie on the disk.
    #[error("{len} bytes at {offset} do not lie on this disk of {size_bytes} bytes")]
    OutOfRange {
        /// First byte of the range.
        offset: u64,
        /// Length of the range in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size_bytes: u64,
    },
    /// The disk takes no writes.
    #[error("this disk is read-only")]
    ReadOnly,
    /// There is no room left on the medium below. The disk is intact, and the write can be repeated.
    #[error("no space left for this disk's data")]
    NoSpace,
    /// The medium failed.
    #[error("disk I/O failed: {0}")]
    Io(String),
}

impl From<std::io::Error> for DiskError {
    fn from(error: std::io::Error) -> DiskError {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => DiskError::NoSpace,
            _ => DiskError::Io(error.to_string()),
        }
    }
}

/// What is known of a range without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, as far as is known.
    Data,
    /// Reads as zeroes and takes no space.
    Hole,
}

/// A range of a disk of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// What the range holds.
    pub kind: ExtentKind,
}

/// A byte-addressed virtual disk.
///
/// Ranges may have any alignment. Every method checks its range and answers
/// [`DiskError::OutOfRange`] where it does not fit.
///
/// Consistency: a read that begins after a write was answered sees it. Concurrent operations on
/// overlapping ranges have no order, but each 4 KiB block is either old or new. Durability: what was
/// answered before a `flush` began survives any crash once that `flush` is answered. Cancellation: a
/// dropped future has been carried out, or not, or, for ranges over several blocks, in part; the disk
/// stays consistent.
///
/// The `try_` forms never block and never allocate; they are the fast path of every export.
pub trait Disk: Send + Sync {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// Whether the disk takes writes.
    fn access(&self) -> Access;

    /// Fills `buf` from `offset` if that needs no waiting.
    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        let _ = (offset, buf);
        Ok(TryIo::WouldBlock)
    }

    /// Writes `data` at `offset` if that needs no waiting.
    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        let _ = (offset, data);
        Ok(TryIo::WouldBlock)
    }

    /// Fills `buf` from `offset`.
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>>;

    /// Writes `data` at `offset`.
    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>>;

    /// Makes `len` bytes from `offset` read as zeroes, giving space back where possible.
    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>>;

    /// Declares `len` bytes from `offset` unneeded. They read as zeroes afterwards wherever whole blocks
    /// are covered; partly covered blocks may keep their bytes.
    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>>;

    /// Makes everything that was answered before durable.
    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>>;

    /// What is known of `len` bytes from `offset`, in order, covering at least the first byte and at
    /// most the whole range, in at most [`EXTENTS_MAX`](crate::limits::EXTENTS_MAX) pieces: a caller that
    /// wants more asks again from where the answer ends. Costs no fetch of data; may fetch manifest pages.
    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_medium_is_told_apart_from_a_broken_one() {
        let full = std::io::Error::from_raw_os_error(28);
        assert!(matches!(DiskError::from(full), DiskError::NoSpace));
        let broken = std::io::Error::from_raw_os_error(5);
        assert!(matches!(DiskError::from(broken), DiskError::Io(_)));
    }
}
