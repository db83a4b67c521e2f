//! Reading the changed parts of a disk: ranges of bytes become pieces of whole chunks, which are read side by
//! side and given in order.
//!
//! Used from a thread that may block and waits on the disk's runtime: what is done with a piece may block, too.
//! Memory: [`PIECES_AT_ONCE`] pieces, whatever the size of the disk.

use std::ops::Range;
use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use block::{Disk, DiskError, ExtentKind};
use futures_util::StreamExt;
use futures_util::stream::{self, Stream};

/// Most chunks of one piece: 1 MiB, with which a disk streams. A page of hashes is a whole number of them.
const PIECE_CHUNKS: u64 = 16;

/// Pieces that are read and worked on at a time: enough that the disk has something to do while others are
/// hashed, 8 MiB in all.
const PIECES_AT_ONCE: usize = 8;

const CHUNK: u64 = CHUNK_BYTES as u64;

/// The chunks of a disk that some ranges of bytes touch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Touched {
    /// Positions of chunks: in order, and with a gap between one range and the next.
    spans: Vec<Range<u64>>,
    size_bytes: u64,
}

/// A run of chunks that is read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Position of the first chunk.
    pub(crate) first: u64,
    /// How many chunks, at least one.
    pub(crate) chunks: u64,
    /// Bytes of disk in them: fewer than they have at the end of a disk that ends within a chunk.
    pub(crate) len_bytes: u64,
}

impl Piece {
    /// Where the piece begins on the disk.
    pub(crate) fn offset(&self) -> u64 {
        self.first * CHUNK
    }
}

impl Touched {
    /// What `ranges` touch of a disk of `size_bytes`. They may overlap, be empty, or reach beyond its end.
    pub(crate) fn new(ranges: &[Range<u64>], size_bytes: u64) -> Touched {
        let on_disk = ranges.iter().map(|range| range.start..range.end.min(size_bytes));
        let mut spans: Vec<Range<u64>> = on_disk
            .filter(|range| !range.is_empty())
            .map(|range| range.start / CHUNK..range.end.div_ceil(CHUNK))
            .collect();
        // In order already, if the caller kept to what it promised; then this costs one look.
        spans.sort_unstable_by_key(|span| span.start);
        spans.dedup_by(|next, kept| {
            let meets = next.start <= kept.end;
            if meets {
                kept.end = kept.end.max(next.end);
            }
            meets
        });
        Touched { spans, size_bytes }
    }

    /// Bytes of disk in the touched chunks.
    pub(crate) fn bytes(&self) -> u64 {
        self.spans.iter().map(|span| (span.end * CHUNK).min(self.size_bytes) - span.start * CHUNK).sum()
    }

    /// The touched chunks in pieces, none of which belongs to two pages of hashes.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.spans.iter().cloned().flat_map(move |span| {
            let mut at = span.start;
            std::iter::from_fn(move || {
                let end = span.end.min((at / PIECE_CHUNKS + 1) * PIECE_CHUNKS);
                let chunks = (at < span.end).then(|| end - at)?;
                let len_bytes = (end * CHUNK).min(self.size_bytes) - at * CHUNK;
                let piece = Piece { first: at, chunks, len_bytes };
                at = end;
                Some(piece)
            })
        })
    }

    /// Reads all pieces, has `work` done with each on the blocking pool, and gives the results in order.
    pub(crate) fn read<T: Send + 'static>(
        &self,
        disk: &Arc<dyn Disk>,
        work: fn(Content) -> T,
    ) -> impl Stream<Item = Result<(Piece, T), DiskError>> {
        stream::iter(self.pieces())
            .map(move |piece| {
                let disk = Arc::clone(disk);
                async move {
                    let content = read(&*disk, piece).await?;
                    // Zeroes are nothing to work on.
                    if content.bytes.is_none() {
                        return Ok((piece, work(content)));
                    }
                    let worked = tokio::task::spawn_blocking(move || work(content)).await;
                    let stopped = |_| DiskError::Io("this node is shutting down".to_owned());
                    Ok((piece, worked.map_err(stopped)?))
                }
            })
            .buffered(PIECES_AT_ONCE)
    }
}

/// What a piece holds.
pub(crate) struct Content {
    pub(crate) piece: Piece,
    /// Its chunks, the last one padded with zeroes; `None` if the disk knows without reading that all is zero.
    pub(crate) bytes: Option<Vec<u8>>,
}

async fn read(disk: &dyn Disk, piece: Piece) -> Result<Content, DiskError> {
    let extents = disk.extents(piece.offset(), piece.len_bytes).await?;
    let hole: u64 =
        extents.iter().take_while(|extent| extent.kind == ExtentKind::Hole).map(|extent| extent.len).sum();
    if hole >= piece.len_bytes {
        return Ok(Content { piece, bytes: None });
    }
    let mut bytes = vec![0; piece.chunks as usize * CHUNK_BYTES];
    disk.read(piece.offset(), &mut bytes[..piece.len_bytes as usize]).await?;
    Ok(Content { piece, bytes: Some(bytes) })
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Waker};

    use block::limits::HASHES_PER_PAGE;
    use block::{Access, BoxFuture, Extent};
    use proptest::prelude::*;

    use super::*;

    /// A disk that is asked and never answers.
    #[derive(Default)]
    struct Silent {
        reads: AtomicUsize,
    }

    fn read_only<'a>() -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    impl Disk for Silent {
        fn size_bytes(&self) -> u64 {
            1 << 30
        }

        fn access(&self) -> Access {
            Access::ReadOnly
        }

        fn read<'a>(&'a self, _: u64, _: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            Box::pin(std::future::pending())
        }

        fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
            read_only()
        }

        fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
            read_only()
        }

        fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
            read_only()
        }

        fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
            Box::pin(async { Ok(()) })
        }

        fn extents(&self, _: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
            Box::pin(async move { Ok(vec![Extent { len, kind: ExtentKind::Data }]) })
        }
    }

    #[test]
    fn a_bounded_number_of_pieces_is_read_at_a_time() {
        let silent = Arc::new(Silent::default());
        let disk = Arc::clone(&silent) as Arc<dyn Disk>;
        let whole = 0..disk.size_bytes();
        let touched = Touched::new(std::slice::from_ref(&whole), disk.size_bytes());
        let mut pieces = pin!(touched.read(&disk, |_| ()));
        assert!(pieces.as_mut().poll_next(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(silent.reads.load(Ordering::Relaxed), PIECES_AT_ONCE);
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_touched_chunks_once_and_in_order(
            size_bytes in 1u64..300 * CHUNK,
            ranges in prop::collection::vec((0u64..310 * CHUNK, 0u64..20 * CHUNK), 0..12),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let touched = Touched::new(&ranges, size_bytes);
            let is_touched = |chunk: &u64| {
                let own = chunk * CHUNK..((chunk + 1) * CHUNK).min(size_bytes);
                ranges.iter().any(|r| !r.is_empty() && r.start < own.end && own.start < r.end)
            };
            let expected: Vec<u64> = (0..size_bytes.div_ceil(CHUNK)).filter(is_touched).collect();
            let pieces: Vec<Piece> = touched.pieces().collect();
            let actual: Vec<u64> = pieces.iter().flat_map(|p| p.first..p.first + p.chunks).collect();
            prop_assert_eq!(actual, expected);
            prop_assert_eq!(pieces.iter().map(|piece| piece.len_bytes).sum::<u64>(), touched.bytes());
            for piece in pieces {
                let page = |chunk: u64| chunk / HASHES_PER_PAGE as u64;
                prop_assert_eq!(page(piece.first), page(piece.first + piece.chunks - 1));
                prop_assert!(piece.offset() + piece.len_bytes <= size_bytes && piece.chunks <= PIECE_CHUNKS);
            }
        }
    }
}
