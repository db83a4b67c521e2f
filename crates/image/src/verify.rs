//! Reading a whole image again, to see whether its origin can still serve every chunk.
//!
//! Goes down the manifest as a reader would: every page against its name, then every chunk that is not zero,
//! found through the index, read from the source and held against its name. Chunks that a wrong page
//! names have no trustworthy name, and count as wrong.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use block::limits::{CHUNK_BYTES, HASHES_PER_PAGE};
use block::{Chunk, ChunkHash, ChunkIndex};
use bytes::Bytes;
use serde::Serialize;

use crate::import::{CHUNKS_PER_RUN, in_parallel};
use crate::manifest::{PageId, hashes_in};
use crate::origin::Shared;
use crate::source::Reader;
use crate::{ImportError, ImportProgress, OriginImage};

/// Wrong chunks that a report lists one by one; of more, it gives the number.
const WRONG_LISTED_MAX: usize = 100;

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Chunks that were read and are right.
    pub chunks_right: u64,
    /// Chunks that could not be served.
    pub chunks_wrong: u64,
    /// Chunks that are all zero, and so need no reading.
    pub chunks_zero: u64,
    /// Pages of the manifest that are not right; the chunks that a level-0 page names count as wrong with it.
    pub pages_wrong: u64,
    /// The positions of the first wrong chunks, in order, at most a hundred.
    pub wrong: Vec<u64>,
    /// The first reason that was met, in words.
    pub reason: Option<String>,
}

/// Why a verification did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The caller asked to stop.
    #[error("the verification was cancelled")]
    Cancelled,
}

impl VerifyReport {
    /// Whether every chunk can be served.
    pub fn is_right(&self) -> bool {
        self.chunks_wrong == 0 && self.pages_wrong == 0
    }

    fn count_wrong(&mut self, first: ChunkIndex, count: u64, reason: impl FnOnce() -> String) {
        self.chunks_wrong += count;
        let room = WRONG_LISTED_MAX.saturating_sub(self.wrong.len());
        self.wrong.extend((first.0..first.0 + count).take(room));
        self.reason.get_or_insert_with(reason);
    }

    fn add(&mut self, other: VerifyReport) {
        self.chunks_right += other.chunks_right;
        self.chunks_wrong += other.chunks_wrong;
        self.chunks_zero += other.chunks_zero;
        self.pages_wrong += other.pages_wrong;
        self.wrong.extend(other.wrong);
        self.wrong.sort_unstable();
        self.wrong.truncate(WRONG_LISTED_MAX);
        self.reason = self.reason.take().or(other.reason);
    }
}

impl OriginImage {
    /// Reads and verifies all that this image can be asked for. Blocks for as long as reading the file takes.
    pub fn verify(&self, progress: &ImportProgress) -> Result<VerifyReport, VerifyError> {
        let shared = self.shared();
        let shape = shared.stored.root.shape();
        progress.begin(shared.stored.root.size_bytes());
        let report = Mutex::new(VerifyReport::default());
        let next_page = AtomicU64::new(0);
        in_parallel(shape.pages_at(0), || {
            let mut own = VerifyReport::default();
            loop {
                let index = next_page.fetch_add(1, Ordering::Relaxed);
                if index >= shape.pages_at(0) {
                    break;
                }
                verify_page(shared, PageId { level: 0, index }, progress, &mut own)?;
            }
            report.lock().expect("no worker panics while it adds its numbers").add(own);
            Ok(())
        })?;
        let mut report = report.into_inner().expect("all workers have ended without a panic");
        for level in 1..shape.levels() {
            for index in 0..shape.pages_at(level) {
                let page = page_bytes(shared, PageId { level, index });
                report.pages_wrong += u64::from(page.is_err());
                report.reason = report.reason.take().or(page.err());
            }
        }
        Ok(report)
    }
}

/// A page's bytes if they are what the page above says.
fn page_bytes(shared: &Shared, page: PageId) -> Result<Bytes, String> {
    let name = shared
        .stored
        .pages
        .name(&shared.stored.root, crate::pages::Node::Page(page))
        .map_err(|e| e.to_string())?;
    let bytes = shared.stored.pages.read(page).map_err(|e| e.to_string())?;
    let chunk = Chunk::verify(name, bytes.into()).map_err(|e| format!("a page of the manifest: {e}"))?;
    Ok(chunk.bytes().clone())
}

fn verify_page(
    shared: &Shared,
    page: PageId,
    progress: &ImportProgress,
    report: &mut VerifyReport,
) -> Result<(), VerifyError> {
    let first = page.index * HASHES_PER_PAGE as u64;
    let count = shared.stored.root.shape().chunks_under(page);
    let bytes = match page_bytes(shared, page) {
        Ok(bytes) => bytes,
        Err(reason) => {
            report.pages_wrong += 1;
            report.count_wrong(ChunkIndex(first), count, || reason);
            progress.add_done(count * CHUNK_BYTES as u64);
            return Ok(());
        }
    };
    let names: Vec<ChunkHash> = hashes_in(&bytes).take(count as usize).collect();
    for (names, start) in
        names.chunks(CHUNKS_PER_RUN as usize).zip((first..).step_by(CHUNKS_PER_RUN as usize))
    {
        if progress.is_cancelled() {
            return Err(VerifyError::Cancelled);
        }
        for (name, index) in names.iter().zip((start..).map(ChunkIndex)) {
            if name.is_zero() {
                report.chunks_zero += 1;
                continue;
            }
            match verify_chunk(shared, index, *name) {
                Ok(()) => report.chunks_right += 1,
                Err(reason) => report.count_wrong(index, 1, || reason),
            }
        }
        progress.add_done(names.len() as u64 * CHUNK_BYTES as u64);
    }
    Ok(())
}

fn verify_chunk(shared: &Shared, index: ChunkIndex, name: ChunkHash) -> Result<(), String> {
    if shared.stored.locate(name).map_err(|e| e.to_string())?.is_none() {
        return Err(format!("the index does not know chunk {name}: add the image again"));
    }
    let read = |reader: &mut Reader| shared.read_data(reader, index);
    let bytes = shared.with_reader(read).map_err(|e: ImportError| e.to_string())?;
    Chunk::verify(name, bytes).map_err(|e| e.to_string())?;
    Ok(())
}
