//! What lies below the overlays of these tests: nothing.

use block::{Access, BoxFuture, Disk, DiskError, Extent};

/// An empty base: all that an overlay over it holds is its own.
pub struct NoBase;

impl Disk for NoBase {
    fn size_bytes(&self) -> u64 {
        0
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, _: u64, _: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}
