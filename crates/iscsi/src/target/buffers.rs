//! The buffers of one connection: what came, what is to go, and spares.
//!
//! Buffers are initialised once and used again, because clearing them for every read would cost as much as
//! filling them. No byte of an earlier use ever leaves: only what was filled is sent.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::Arc;

use crate::limits::{BATCH_BYTES, IN_FLIGHT_BYTES_MAX, INPUT_BYTES, VECTORS_MAX};
use crate::pdu::{Digests, Header, seal};

/// Size of the smallest buffer in bytes: one block of a disk.
const BUFFER_BYTES_MIN: usize = 4 << 10;

/// Size in bytes of the buffer that holds `len` bytes. Sizes are powers of two, so that buffers fit again and
/// none is much larger than what it was taken for.
pub(super) fn buffer_bytes(len: usize) -> usize {
    len.next_power_of_two().max(BUFFER_BYTES_MIN)
}

/// Empty buffers for the next transfers.
#[derive(Default)]
pub(super) struct Spares {
    spares: Vec<Vec<u8>>,
    bytes: usize,
}

impl Spares {
    /// A buffer of [`buffer_bytes`] for `len`, which hold anything.
    pub(super) fn take(&mut self, len: usize) -> Vec<u8> {
        self.find(len).unwrap_or_else(|| vec![0; buffer_bytes(len)])
    }

    /// The same, if there is one.
    pub(super) fn find(&mut self, len: usize) -> Option<Vec<u8>> {
        let size = buffer_bytes(len);
        let at = self.spares.iter().rposition(|spare| spare.len() == size)?;
        self.bytes -= size;
        Some(self.spares.swap_remove(at))
    }

    /// Keeps a buffer for later, if there is not enough already.
    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        let size = buffer.len();
        if size == buffer_bytes(size) && self.bytes + size <= IN_FLIGHT_BYTES_MAX {
            self.bytes += size;
            self.spares.push(buffer);
        }
    }

    /// Drops buffers until they have at most so many bytes.
    fn trim(&mut self, bytes_max: usize) {
        while self.bytes > bytes_max {
            self.bytes -= self.spares.pop().map_or(0, |spare| spare.len());
        }
    }
}

/// A piece of what is to be sent.
enum Piece {
    /// Short things one behind the other, filled up to a mark.
    Batch(Vec<u8>, usize),
    /// A part of a buffer that others share.
    Part(Arc<Vec<u8>>, Range<usize>),
}

impl Piece {
    fn filled(&self) -> &[u8] {
        match self {
            Piece::Batch(bytes, filled) => &bytes[..*filled],
            Piece::Part(bytes, range) => &bytes[range.clone()],
        }
    }
}

/// PDUs on their way out, in order. Short ones are gathered, long data stays where it was read to.
#[derive(Default)]
pub(super) struct Output {
    queue: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    sent: usize,
    bytes: usize,
    /// Size of the buffers that hold what is queued.
    queued_bytes: usize,
    spares: Spares,
}

impl Output {
    /// Bytes that were not sent yet.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Memory that what is queued takes.
    pub(super) fn queued_bytes(&self) -> usize {
        self.queued_bytes
    }

    /// Memory that empty buffers take.
    pub(super) fn spare_bytes(&self) -> usize {
        self.spares.bytes
    }

    pub(super) fn spares(&mut self) -> &mut Spares {
        &mut self.spares
    }

    /// Keeps at most so many bytes of empty buffers.
    pub(super) fn trim(&mut self, spare_bytes_max: usize) {
        self.spares.trim(spare_bytes_max);
    }

    /// Room for `len` bytes behind all that is queued; [commit](Output::commit) what was filled of it.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let fits =
            |piece: &Piece| matches!(piece, Piece::Batch(bytes, filled) if bytes.len() - filled >= len);
        if !self.queue.back().is_some_and(fits) {
            // Behind a part there is mostly one header before the next.
            let follows_part = matches!(self.queue.back(), Some(Piece::Part(..)));
            let batch_bytes = if follows_part { BUFFER_BYTES_MIN } else { BATCH_BYTES };
            let batch = self.spares.take(len.max(batch_bytes));
            self.queued_bytes += batch.len();
            self.queue.push_back(Piece::Batch(batch, 0));
        }
        match self.queue.back_mut() {
            Some(Piece::Batch(bytes, filled)) => &mut bytes[*filled..*filled + len],
            _ => unreachable!("a batch was just queued"),
        }
    }

    /// Queues the first `len` bytes of the room that was asked for last.
    pub(super) fn commit(&mut self, len: usize) {
        if let Some(Piece::Batch(_, filled)) = self.queue.back_mut() {
            *filled += len;
            self.bytes += len;
        }
    }

    /// Queues a copy of `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.room(bytes.len()).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Queues a PDU whose data is copied.
    pub(super) fn pdu(&mut self, header: Header, data: &[u8], digests: Digests) {
        let seal = seal(header, data, digests);
        self.push(seal.head());
        self.push(data);
        self.push(seal.tail());
    }

    /// Makes a buffer one of those whose parts are sent from where they are. All [parts](Output::pdu_of) of it
    /// have to be queued before any is sent.
    pub(super) fn share(&mut self, buffer: Vec<u8>) -> Arc<Vec<u8>> {
        self.queued_bytes += buffer.len();
        Arc::new(buffer)
    }

    /// Queues a PDU whose data is a part of a shared buffer.
    pub(super) fn pdu_of(
        &mut self,
        header: Header,
        buffer: &Arc<Vec<u8>>,
        range: Range<usize>,
        digests: Digests,
    ) {
        let seal = seal(header, &buffer[range.clone()], digests);
        self.push(seal.head());
        self.bytes += range.len();
        self.queue.push_back(Piece::Part(Arc::clone(buffer), range));
        self.push(seal.tail());
    }

    /// What is to be sent next, in at most [`VECTORS_MAX`] pieces. Empty only if nothing is.
    pub(super) fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut skip = self.sent;
        let mut slices = Vec::new();
        for piece in self.queue.iter().take(VECTORS_MAX) {
            let unsent = &piece.filled()[std::mem::take(&mut skip)..];
            if !unsent.is_empty() {
                slices.push(IoSlice::new(unsent));
            }
        }
        slices
    }

    /// Notes that the next `len` bytes were sent.
    pub(super) fn sent(&mut self, len: usize) {
        self.bytes -= len;
        self.sent += len;
        while let Some(front) = self.queue.front() {
            let filled = front.filled().len();
            if self.sent < filled {
                break;
            }
            self.sent -= filled;
            match self.queue.pop_front() {
                Some(Piece::Batch(bytes, _)) => {
                    self.queued_bytes -= bytes.len();
                    self.spares.give(bytes);
                }
                // Whoever sends the last part gets the buffer back.
                Some(Piece::Part(bytes, _)) => {
                    if let Ok(bytes) = Arc::try_unwrap(bytes) {
                        self.queued_bytes -= bytes.len();
                        self.spares.give(bytes);
                    }
                }
                None => {}
            }
        }
    }
}

/// What came from the initiator and was not dealt with yet.
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Input {
        // One PDU of full length has to fit, with its digests and additional headers.
        Input { bytes: vec![0; INPUT_BYTES], start: 0, end: 0 }
    }

    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        assert!(self.start <= self.end, "no more is consumed than came");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room for what comes next. Never empty, unless nothing was consumed of a full buffer.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 && self.bytes.len() - self.end < self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    pub(super) fn fill(&mut self, len: usize) {
        self.end += len;
        assert!(self.end <= self.bytes.len(), "no more is filled than there is room for");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdu::NopIn;
    use proptest::prelude::*;

    fn unsent(output: &Output) -> Vec<u8> {
        output.slices().iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn spares_are_used_again_and_bounded() {
        let mut spares = Spares::default();
        let first = spares.take(100 << 10);
        assert_eq!(first.len(), 128 << 10);
        let address = first.as_ptr();
        spares.give(first);
        let second = spares.take(70 << 10);
        assert_eq!(second.as_ptr(), address);
        for _ in 0..100 {
            spares.give(vec![0; 256 << 10]);
        }
        assert!(spares.bytes <= IN_FLIGHT_BYTES_MAX);
        spares.trim(300 << 10);
        assert_eq!((spares.bytes, spares.spares.len()), (256 << 10, 1));
    }

    proptest! {
        #[test]
        fn output_leaves_whole_and_in_order(
            pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..300), any::<bool>()), 0..40),
            step in 1usize..500,
        ) {
            let mut output = Output::default();
            let (mut expected, mut sent) = (Vec::new(), Vec::new());
            let header = NopIn::default().header();
            for (piece, shared) in pieces {
                let seal = seal(header, &piece, Digests::default());
                expected.extend_from_slice(&[seal.head(), &piece, seal.tail()].concat());
                if shared {
                    let buffer = output.share(piece);
                    output.pdu_of(header, &buffer, 0..buffer.len(), Digests::default());
                } else {
                    // Room that is not committed must leave no trace.
                    output.room(100).fill(0xee);
                    output.pdu(header, &piece, Digests::default());
                }
                let front: Vec<u8> = unsent(&output).into_iter().take(step).collect();
                output.sent(front.len());
                sent.extend_from_slice(&front);
            }
            while output.bytes() > 0 {
                let rest = unsent(&output);
                prop_assert!(!rest.is_empty());
                output.sent(rest.len());
                sent.extend_from_slice(&rest);
            }
            prop_assert_eq!(sent, expected);
            prop_assert_eq!(output.queued_bytes(), 0);
        }
    }
}
