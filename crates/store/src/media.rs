//! The one seam to storage.
//!
//! Everything durable in this crate is written through [`Media`], so that tests can put a medium below
//! it that forgets, tears and fails. The trait is synchronous: whoever calls from asynchronous code goes
//! through `asyncio`, which knows what may be done on the spot and what belongs on the blocking pool.

mod file;
mod memory;

use std::io;

use block::{ExtentKind, TryIo};

pub(crate) use file::InUse;
pub use file::{FileMedia, start_sync};
pub use memory::MemoryMedia;
pub(crate) use memory::SparseBytes;

/// Random-access storage of bytes.
///
/// All offsets and lengths are in bytes and of any alignment. Nothing is durable before [`Media::sync`]
/// returned; until then a crash may keep any part of what was written. A write that failed may have been
/// carried out in part.
pub trait Media: Send + Sync + 'static {
    /// Fills `buf` from `offset`, waiting as long as it takes. Reading beyond the end is an
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills `buf` from `offset` if that needs no waiting for a device; otherwise `buf` holds anything.
    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo>;

    /// Writes `data` at `offset`. A file grows where it is too short; a device does not.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes `len` bytes from `offset` read as zeroes, giving their space back where the medium can. The
    /// length of the medium stays as it is; what lies beyond its end is ignored.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes everything written before durable. After an error nothing that was written since the last
    /// success can be relied on, and calling again proves nothing.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Makes the medium `len` bytes long; new bytes are zero. A block device refuses to grow.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// What is known of the range without reading it: a kind, and for how many bytes from `offset` it
    /// holds (at least 1, at most `len`). `len` is not 0.
    fn extent_at(&self, offset: u64, len: u64) -> io::Result<(ExtentKind, u64)> {
        let _ = offset;
        Ok((ExtentKind::Data, len))
    }
}

#[cfg(test)]
mod tests;
