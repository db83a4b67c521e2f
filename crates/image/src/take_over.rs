//! Taking over into a disk what a qcow2 file has of its own.
//!
//! The disk stands on the image that the file was made on, and so has already what the file leaves to its backing
//! file. What the file has is written to it: data as data, zeroes as zeroes.
//!
//! - Consistency: the file is looked at again at the end; if it was written to meanwhile, the work fails.
//! - Retries: none.
//! - Cancellation: by [`ImportProgress::cancel`], also while the disk is waited for.
//! - Crash, failure: the disk has some of what the file has. It is the caller's to give up.

use std::ops::Range;

use block::{Disk, DiskError};
use tokio::runtime::Handle;

use crate::{ImportError, ImportProgress, LayerExtent, Qcow2Layer};

/// Bytes that are read and written at a time: with which files stream, and the memory that the work takes.
const PIECE_BYTES: u64 = 1 << 20;

/// Why a file was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The file cannot be read, or the caller asked to stop.
    #[error(transparent)]
    File(#[from] ImportError),
    /// The disk cannot be written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// Writes to `disk`, which is no smaller than the one in the file, what the file has of its own, and makes it durable.
/// Gives how many bytes of disk that are, zeroes included. Blocks for as long as it takes, in a thread that may block:
/// not one of the workers of `runtime`, on which the disk is waited for.
pub fn take_over(
    layer: &Qcow2Layer,
    disk: &dyn Disk,
    runtime: &Handle,
    progress: &ImportProgress,
) -> Result<u64, TakeOverError> {
    progress.begin(layer.size_bytes());
    let work = TakeOver { layer, disk, runtime, progress };
    let bytes = work.write_all()?;
    layer.check_unchanged()?;
    work.wait(disk.flush())?;
    Ok(bytes)
}

struct TakeOver<'a> {
    layer: &'a Qcow2Layer,
    disk: &'a dyn Disk,
    runtime: &'a Handle,
    progress: &'a ImportProgress,
}

impl TakeOver<'_> {
    fn write_all(&self) -> Result<u64, TakeOverError> {
        let mut buf = vec![0; PIECE_BYTES as usize];
        let (mut bytes, mut at) = (0, 0);
        while let Some(extent) = self.layer.extent(at)? {
            let (LayerExtent::Data(range) | LayerExtent::Zero(range)) = &extent;
            self.progress.add_done(range.start - at);
            bytes += range.end - range.start;
            at = range.end;
            match extent {
                LayerExtent::Zero(range) => self.zero(range)?,
                LayerExtent::Data(range) => self.copy(range, &mut buf)?,
            }
        }
        self.progress.add_done(self.layer.size_bytes() - at);
        Ok(bytes)
    }

    fn zero(&self, range: Range<u64>) -> Result<(), TakeOverError> {
        let len = range.end - range.start;
        self.wait(self.disk.write_zeroes(range.start, len))?;
        self.progress.add_done(len);
        Ok(())
    }

    fn copy(&self, range: Range<u64>, buf: &mut [u8]) -> Result<(), TakeOverError> {
        let mut at = range.start;
        while at < range.end {
            let piece = &mut buf[..(range.end - at).min(PIECE_BYTES) as usize];
            self.layer.read_at(at, piece)?;
            self.wait(self.disk.write(at, piece))?;
            at += piece.len() as u64;
            self.progress.add_done(piece.len() as u64);
        }
        Ok(())
    }

    /// Waits for the disk, unless the work is cancelled first.
    fn wait(&self, done: impl Future<Output = Result<(), DiskError>>) -> Result<(), TakeOverError> {
        let done = self.runtime.block_on(self.progress.unless_cancelled(done));
        Ok(done.ok_or(ImportError::Cancelled)??)
    }
}
