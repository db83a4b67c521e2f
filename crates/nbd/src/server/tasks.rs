//! What a request does where it has to wait for the disk: one future each, run beside the connection.
//!
//! Each owns its buffers and ends with exactly one complete reply.

use std::sync::Arc;

use block::{Disk, DiskError, Extent, ExtentKind};

use super::buffers::Buffer;
use crate::limits::{EXTENTS_MAX, HOLE_BYTES_MIN, SPARSE_READ_BYTES_MIN, STEP_BYTES};
use crate::negotiate::ALLOCATION_CONTEXT;
use crate::proto::{Errno, Framing, flag};
use crate::reply::{self, Last, Status};
use crate::request::{Command, Request};

/// One request with what it needs.
pub(super) struct Task {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) framing: Framing,
    pub(super) request: Request,
}

/// A finished request.
pub(super) struct Finished {
    /// The complete reply.
    pub(super) reply: Buffer,
    /// A buffer that is of no more use to this request.
    pub(super) spare: Option<Buffer>,
    /// The bytes that the request was booked with.
    pub(super) booked_bytes: usize,
}

/// Tells an error in the protocol's terms.
pub(super) fn errno(error: &DiskError) -> Errno {
    match error {
        DiskError::OutOfRange { .. } => Errno::Inval,
        DiskError::ReadOnly => Errno::Perm,
        DiskError::NoSpace => Errno::NoSpc,
        DiskError::Io(_) => Errno::Io,
    }
}

impl Task {
    /// Reads into `buffer`, which is empty and has room for the reply.
    pub(super) async fn read(self, mut buffer: Buffer, booked_bytes: usize) -> Finished {
        match self.try_read(&mut buffer).await {
            Ok(()) => Finished { reply: buffer, spare: None, booked_bytes },
            Err(error) => self.finish(Err(error), Some(buffer), booked_bytes),
        }
    }

    async fn try_read(&self, buffer: &mut Buffer) -> Result<(), DiskError> {
        let Request { offset, len, .. } = self.request;
        let sparse =
            self.framing != Framing::Simple && !self.request.has(flag::DF) && len >= SPARSE_READ_BYTES_MIN;
        let extents = if sparse { self.disk.extents(offset, len).await? } else { Vec::new() };
        let pieces = coarse(&extents, len);
        let mut at = offset;
        for (i, piece) in pieces.iter().enumerate() {
            let last = if i + 1 == pieces.len() { Last::Yes } else { Last::No };
            match piece.kind {
                ExtentKind::Hole => {
                    let len = u32::try_from(piece.len).expect("a read is at most 32 MiB long");
                    buffer.push(&reply::hole(self.framing, &self.request, last, at, len));
                }
                ExtentKind::Data => {
                    let len = usize::try_from(piece.len).expect("a read is at most 32 MiB long");
                    buffer.push(&reply::data(self.framing, &self.request, last, at, len));
                    self.disk.read(at, buffer.room(len)).await?;
                    buffer.fill(len);
                }
            }
            at += piece.len;
        }
        Ok(())
    }

    /// Writes the payload.
    pub(super) async fn write(self, payload: Buffer, booked_bytes: usize) -> Finished {
        let mut result = self.disk.write(self.request.offset, payload.filled()).await;
        if result.is_ok() && self.request.has(flag::FUA) {
            result = self.disk.flush().await;
        }
        self.finish(result, Some(payload), booked_bytes)
    }

    /// Carries out a request that has no payload either way.
    pub(super) async fn run(self) -> Finished {
        if self.request.command == Command::BlockStatus {
            return self.block_status().await;
        }
        let result = self.change().await;
        self.finish(result, None, 0)
    }

    async fn change(&self) -> Result<(), DiskError> {
        let Request { offset, len, command, .. } = self.request;
        match command {
            Command::Trim => self.disk.discard(offset, len).await?,
            Command::WriteZeroes if self.request.has(flag::NO_HOLE) => self.allocate().await?,
            Command::WriteZeroes => self.disk.write_zeroes(offset, len).await?,
            Command::Cache => self.fill_caches().await?,
            _ => {}
        }
        if command == Command::Flush || (command != Command::Cache && self.request.has(flag::FUA)) {
            self.disk.flush().await?;
        }
        Ok(())
    }

    /// Writes zeroes that take space.
    async fn allocate(&self) -> Result<(), DiskError> {
        let zeroes = vec![0; STEP_BYTES];
        for (at, len) in steps(&self.request) {
            self.disk.write(at, &zeroes[..len]).await?;
        }
        Ok(())
    }

    /// Reads and forgets, so that whatever caches lie below the disk hold the range.
    async fn fill_caches(&self) -> Result<(), DiskError> {
        let mut scratch = vec![0; STEP_BYTES];
        for (at, len) in steps(&self.request) {
            self.disk.read(at, &mut scratch[..len]).await?;
        }
        Ok(())
    }

    async fn block_status(self) -> Finished {
        let Request { offset, len, .. } = self.request;
        let extents = match self.disk.extents(offset, len).await {
            Ok(extents) => extents,
            Err(error) => return self.finish(Err(error), None, 0),
        };
        let mut states: Vec<Status> = Vec::new();
        for extent in merged(&extents, len) {
            states.push(match extent.kind {
                ExtentKind::Data => Status::of_data(extent.len),
                ExtentKind::Hole => Status::of_hole(extent.len),
            });
        }
        let count = if self.request.has(flag::REQ_ONE) { 1 } else { EXTENTS_MAX };
        states.truncate(count);
        if self.framing == Framing::Structured
            && let Some(long) = states.iter().position(|s| s.len > u64::from(u32::MAX))
        {
            // What follows an extent that gets cut would be taken for its rest.
            states.truncate(long + 1);
        }
        let reply = reply::block_status(self.framing, &self.request, ALLOCATION_CONTEXT, &states);
        Finished { reply: reply.into(), spare: None, booked_bytes: 0 }
    }

    fn finish(&self, result: Result<(), DiskError>, spare: Option<Buffer>, booked_bytes: usize) -> Finished {
        let reply = match result {
            Ok(()) => reply::success(self.framing, &self.request).to_vec(),
            Err(error) => reply::error(self.framing, &self.request, errno(&error), &error.to_string()),
        };
        Finished { reply: reply.into(), spare, booked_bytes }
    }
}

/// The range of a request in pieces of at most [`STEP_BYTES`].
fn steps(request: &Request) -> impl Iterator<Item = (u64, usize)> + use<> {
    let (mut at, end) = (request.offset, request.offset + request.len);
    std::iter::from_fn(move || {
        let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(STEP_BYTES);
        let step = (at, len);
        at += len as u64;
        (len > 0).then_some(step)
    })
}

/// The extents that lie within `len` bytes, neighbours of one kind made one. What the disk does not tell
/// counts as data, and at least the first byte is told.
fn merged(extents: &[Extent], len: u64) -> Vec<Extent> {
    let mut out: Vec<Extent> = Vec::new();
    let mut left = len;
    for extent in extents {
        let extent = Extent { len: extent.len.min(left), ..*extent };
        left -= extent.len;
        match out.last_mut() {
            Some(last) if last.kind == extent.kind => last.len += extent.len,
            _ if extent.len > 0 => out.push(extent),
            _ => {}
        }
    }
    if out.is_empty() {
        out.push(Extent { len, kind: ExtentKind::Data });
    }
    out
}

/// Pieces that cover `len` bytes, where holes too short to be worth a chunk of their own count as data.
fn coarse(extents: &[Extent], len: u64) -> Vec<Extent> {
    let told: u64 = extents.iter().map(|e| e.len).sum();
    let rest = Extent { len: len.saturating_sub(told), kind: ExtentKind::Data };
    // Neighbouring short holes are one long hole, so they are joined before they are judged.
    let mut joined = merged(extents, len);
    if told == 0 {
        return joined;
    }
    for extent in &mut joined {
        if extent.len < HOLE_BYTES_MIN {
            extent.kind = ExtentKind::Data;
        }
    }
    joined.push(rest);
    merged(&joined, len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATA: ExtentKind = ExtentKind::Data;
    const HOLE: ExtentKind = ExtentKind::Hole;

    fn extents(list: &[(u64, ExtentKind)]) -> Vec<Extent> {
        list.iter().map(|&(len, kind)| Extent { len, kind }).collect()
    }

    #[test]
    fn short_holes_count_as_data_and_what_is_not_told_too() {
        let told = extents(&[(10, DATA), (100, HOLE), (10, DATA), (8192, HOLE), (5, DATA)]);
        assert_eq!(coarse(&told, 10_000), extents(&[(120, DATA), (8192, HOLE), (1688, DATA)]));
        assert_eq!(coarse(&[], 77), extents(&[(77, DATA)]));
    }

    #[test]
    fn neighbouring_short_holes_are_one_hole() {
        let told = extents(&[(2048, HOLE), (2048, HOLE), (10, DATA)]);
        assert_eq!(coarse(&told, 4106), extents(&[(4096, HOLE), (10, DATA)]));
    }

    proptest! {
        #[test]
        fn a_sparse_reply_covers_the_read_and_never_outgrows_its_buffer(
            told in prop::collection::vec((1u64..20_000, any::<bool>()), 0..40), len in 1u64..200_000,
        ) {
            let told: Vec<_> =
                told.into_iter().map(|(len, hole)| Extent { len, kind: if hole { HOLE } else { DATA } }).collect();
            let pieces = coarse(&told, len);
            prop_assert_eq!(pieces.iter().map(|p| p.len).sum::<u64>(), len);
            prop_assert!(pieces.windows(2).all(|w| w[0].kind != w[1].kind));
            let head = reply::data_head_bytes(Framing::Extended) as u64;
            let hole_chunk = 32 + 12;
            let cost: u64 =
                pieces.iter().map(|p| if p.kind == HOLE { hole_chunk } else { head + p.len }).sum();
            prop_assert!(cost <= (head + len).max(hole_chunk), "{} for {} bytes", cost, len);
        }
    }
}
