//! The buffers of one connection: what came, what is to go, and spares.
//!
//! Buffers are initialised once and used again, because clearing them for every request would cost as much
//! as filling them. No byte of an earlier use ever leaves: only what was filled is sent.

use std::collections::VecDeque;

use crate::limits::{BATCH_BYTES, INPUT_BYTES, SPARE_BYTES_MAX};

/// Sizes of buffers are multiples of this many bytes, so that they fit more often.
const GRAIN_BYTES: usize = 64 << 10;

/// Bytes, filled up to a mark and sent up to another.
#[derive(Default)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    filled: usize,
    sent: usize,
}

impl Buffer {
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// The next `len` bytes, or fewer if there are fewer, for filling.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let end = (self.filled + len).min(self.bytes.len());
        &mut self.bytes[self.filled..end]
    }

    /// Notes that `len` bytes of the room were filled.
    pub(super) fn fill(&mut self, len: usize) {
        self.filled += len;
        assert!(self.filled <= self.bytes.len(), "no more is filled than there is room for");
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.fill(bytes.len());
    }

    fn room_bytes(&self) -> usize {
        self.bytes.len() - self.filled
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Buffer {
        Buffer { filled: bytes.len(), bytes, sent: 0 }
    }
}

/// Empty buffers for the next requests.
#[derive(Default)]
pub(super) struct Spares {
    spares: Vec<Vec<u8>>,
    bytes: usize,
}

impl Spares {
    /// An empty buffer with room for at least `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let fitting = (0..self.spares.len()).filter(|&i| self.spares[i].len() >= len);
        let bytes = match fitting.min_by_key(|&i| self.spares[i].len()) {
            Some(i) => {
                let bytes = self.spares.swap_remove(i);
                self.bytes -= bytes.len();
                bytes
            }
            None => vec![0; len.next_multiple_of(GRAIN_BYTES)],
        };
        Buffer { bytes, filled: 0, sent: 0 }
    }

    /// Keeps a buffer for later, if there is not enough already.
    pub(super) fn give(&mut self, buffer: Buffer) {
        let len = buffer.bytes.len();
        if len >= GRAIN_BYTES && self.bytes + len <= SPARE_BYTES_MAX {
            self.bytes += len;
            self.spares.push(buffer.bytes);
        }
    }
}

/// Replies on their way out, in order. Short ones are gathered, long ones keep their own buffer.
#[derive(Default)]
pub(super) struct Output {
    queue: VecDeque<Buffer>,
    bytes: usize,
}

impl Output {
    /// Bytes that were not sent yet.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Room for `len` bytes behind all that is queued; [commit](Output::commit) what was filled of it.
    pub(super) fn room(&mut self, len: usize, spares: &mut Spares) -> &mut [u8] {
        if self.queue.back().is_none_or(|b| b.room_bytes() < len) {
            self.queue.push_back(spares.take(len.max(BATCH_BYTES)));
        }
        self.queue.back_mut().expect("a buffer was just queued").room(len)
    }

    /// Queues the first `len` bytes of the room that was asked for last.
    pub(super) fn commit(&mut self, len: usize) {
        self.queue.back_mut().expect("room was asked for").fill(len);
        self.bytes += len;
    }

    /// Queues a copy of `bytes`.
    pub(super) fn push(&mut self, bytes: &[u8], spares: &mut Spares) {
        self.room(bytes.len(), spares).copy_from_slice(bytes);
        self.commit(bytes.len());
    }

    /// Queues a buffer as it is.
    pub(super) fn append(&mut self, buffer: Buffer) {
        self.bytes += buffer.filled;
        self.queue.push_back(buffer);
    }

    /// What is to be sent next. Empty only if nothing is.
    pub(super) fn front(&self) -> &[u8] {
        let unsent = self.queue.iter().map(|b| &b.bytes[b.sent..b.filled]);
        unsent.into_iter().find(|b| !b.is_empty()).unwrap_or_default()
    }

    /// Notes that the first `len` bytes of the [front](Output::front) were sent.
    pub(super) fn sent(&mut self, len: usize, spares: &mut Spares) {
        self.bytes -= len;
        let mut left = len;
        while let Some(front) = self.queue.front_mut() {
            let step = left.min(front.filled - front.sent);
            front.sent += step;
            left -= step;
            if front.sent < front.filled {
                break;
            }
            if let Some(buffer) = self.queue.pop_front() {
                spares.give(buffer);
            }
        }
    }
}

/// What came from the client and was not dealt with yet.
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    /// A buffer that begins with `early` bytes.
    pub(super) fn new(early: &[u8]) -> Input {
        let mut bytes = vec![0; INPUT_BYTES.max(early.len())];
        bytes[..early.len()].copy_from_slice(early);
        Input { bytes, start: 0, end: early.len() }
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
    use proptest::prelude::*;

    #[test]
    fn spares_are_used_again_and_bounded() {
        let mut spares = Spares::default();
        let first = spares.take(100 << 10);
        let address = first.bytes.as_ptr();
        spares.give(first);
        assert_eq!(spares.take(70 << 10).bytes.as_ptr(), address);
        for _ in 0..100 {
            spares.give(Buffer::from(vec![0; 256 << 10]));
        }
        assert!(spares.bytes <= SPARE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn output_leaves_whole_and_in_order(
            pieces in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..300), 0usize..3), 0..40),
            step in 1usize..500,
        ) {
            let (mut output, mut spares) = (Output::default(), Spares::default());
            let (mut expected, mut sent) = (Vec::new(), Vec::new());
            for (piece, way) in pieces {
                expected.extend_from_slice(&piece);
                match way {
                    0 => output.push(&piece, &mut spares),
                    1 => output.append(Buffer::from(piece)),
                    _ => {
                        // Room that is not committed must leave no trace.
                        output.room(100, &mut spares).fill(0xee);
                        output.push(&piece, &mut spares);
                    }
                }
                let front = output.front();
                let len = front.len().min(step);
                sent.extend_from_slice(&front[..len]);
                output.sent(len, &mut spares);
            }
            while output.bytes() > 0 {
                let front = output.front().to_vec();
                prop_assert!(!front.is_empty());
                sent.extend_from_slice(&front);
                output.sent(front.len(), &mut spares);
            }
            prop_assert_eq!(sent, expected);
        }
    }
}
