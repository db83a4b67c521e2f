//! Media without a device below: for tests and for simulated nodes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block::TryIo;

use crate::Media;

const PAGE: u64 = 4096;

/// A growable array of bytes that takes memory only for pages that are not zero.
#[derive(Debug, Clone, Default)]
pub(crate) struct SparseBytes {
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
}

impl SparseBytes {
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Cuts or grows to `len` bytes. What is cut off is forgotten, so growing again brings zeroes.
    pub(crate) fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len, self.len - len);
        }
        self.len = len;
    }

    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|&end| end <= self.len);
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, range) in pieces(offset, buf.len()) {
            match self.pages.get(&page) {
                Some(bytes) => {
                    let len = range.len();
                    buf[range].copy_from_slice(&bytes[within..within + len]);
                }
                None => buf[range].fill(0),
            }
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        for (page, within, range) in pieces(offset, data.len()) {
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            bytes[within..within + range.len()].copy_from_slice(&data[range]);
        }
        self.len = self.len.max(offset + data.len() as u64);
    }

    /// Zeroes the part of the range that exists.
    pub(crate) fn zero(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        if offset >= end {
            return;
        }
        let touched: Vec<u64> =
            self.pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(&p, _)| p).collect();
        for page in touched {
            let from = offset.max(page * PAGE) - page * PAGE;
            let to = end.min((page + 1) * PAGE) - page * PAGE;
            if to - from == PAGE {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[from as usize..to as usize].fill(0);
            }
        }
    }
}

/// Cuts a range at page boundaries: page, offset in it, range of the caller's buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done as u64;
        let within = (at % PAGE) as usize;
        let piece = (PAGE as usize - within).min(len - done);
        let range = done..done + piece;
        done += piece;
        Some((at / PAGE, within, range))
    })
}

/// Media in memory: never fails, never waits, and forgets everything when it is dropped.
#[derive(Debug, Default)]
pub struct MemoryMedia {
    bytes: Mutex<SparseBytes>,
}

impl MemoryMedia {
    /// A medium of `len` zero bytes.
    pub fn new(len: u64) -> MemoryMedia {
        let mut bytes = SparseBytes::default();
        bytes.set_len(len);
        MemoryMedia { bytes: Mutex::new(bytes) }
    }

    fn bytes(&self) -> MutexGuard<'_, SparseBytes> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Media for MemoryMedia {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.bytes().read(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo> {
        self.read_at(offset, buf).map(|()| TryIo::Done)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.bytes().write(offset, data);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes().zero(offset, len);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes().len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes().set_len(len);
        Ok(())
    }
}
