//! Another VM's disk as it is read before all of it is here.
//!
//! It comes as an image that was derived from one that this node has too. What both have in common is fetched as
//! the latter is, from its own origins and parents; so only what differs burdens the node that the disk comes from.
//!
//! Consistency: both are fixed by their root pages. Retries, cancellation: those of the images below. Crash: nothing is
//! kept.

use std::ops::Range;
use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use block::{Access, BoxFuture, ChunkIndex, Disk, DiskError, Extent, Priority, TryIo};
use futures_util::FutureExt;
use image::ImageVolume;

/// An image, and the one that it was derived from.
pub(super) struct TransferDisk {
    image: Arc<ImageVolume>,
    base: Arc<ImageVolume>,
}

impl TransferDisk {
    pub(super) fn new(image: Arc<ImageVolume>, base: Arc<ImageVolume>) -> TransferDisk {
        TransferDisk { image, base }
    }

    /// The volume through which a chunk is fetched.
    async fn way_to(&self, chunk: ChunkIndex) -> Result<&Arc<ImageVolume>, DiskError> {
        if chunk.0 >= self.base.root().chunk_count() {
            return Ok(&self.image);
        }
        let name = |volume: &Arc<ImageVolume>| {
            let volume = Arc::clone(volume);
            async move { volume.chunk_hash(chunk, Priority::Guest).await }
        };
        let (own, common) = futures_util::try_join!(name(&self.image), name(&self.base))
            .map_err(|error| DiskError::Io(error.to_string()))?;
        Ok(if own == common { &self.base } else { &self.image })
    }

    async fn read_piece(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let way = self.way_to(ChunkIndex(offset / CHUNK_BYTES as u64)).await?;
        // The last chunk of the smaller one is padded, and so as long as that of the larger.
        if offset + buf.len() as u64 > way.size_bytes() {
            return self.image.read(offset, buf).await;
        }
        way.read(offset, buf).await
    }

    fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = at;
            let within = (offset + start as u64) % CHUNK_BYTES as u64;
            at = len.min(start + CHUNK_BYTES - within as usize);
            (start < len).then_some(start..at)
        })
    }
}

impl Disk for TransferDisk {
    fn size_bytes(&self) -> u64 {
        self.image.size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        // What is here is found by its name, whichever image it came with.
        self.image.try_read(offset, buf)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        async move {
            let reads: Vec<Range<usize>> = TransferDisk::pieces(offset, buf.len()).collect();
            let mut rest = buf;
            let mut under_way = Vec::with_capacity(reads.len());
            for piece in reads {
                let (part, behind) = rest.split_at_mut(piece.len());
                rest = behind;
                under_way.push(self.read_piece(offset + piece.start as u64, part));
            }
            futures_util::future::try_join_all(under_way).await.map(drop)
        }
        .boxed()
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.image.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.image.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.image.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.image.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.image.extents(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_cut_at_chunks() {
        let chunk = CHUNK_BYTES as u64;
        let pieces = |offset, len| TransferDisk::pieces(offset, len).collect::<Vec<_>>();
        assert_eq!(pieces(7, CHUNK_BYTES - 7).len(), 1);
        assert_eq!(pieces(chunk - 1, 2), [0..1, 1..2]);
        assert_eq!(
            pieces(chunk - 1, 2 + CHUNK_BYTES),
            [0..1, 1..1 + CHUNK_BYTES, 1 + CHUNK_BYTES..2 + CHUNK_BYTES]
        );
        assert!(pieces(5, 0).is_empty());
    }
}
