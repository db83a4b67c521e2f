//! The arithmetic of a manifest: everything about the tree that follows from the size of the disk.

use block::limits::HASHES_PER_PAGE;
use block::{ChunkIndex, Geometry};

/// Bytes of one hash in a page.
pub(crate) const HASH_BYTES: usize = 32;

/// Most hashes in a root page: with its head it stays near 2 KB, and a disk of up to 8 GiB needs a single level.
pub(crate) const TOPS_MAX: u64 = 64;

/// Most levels of pages: a disk of `DISK_BYTES_MAX` has 2^30 chunks, 2^19 pages, 2^8 above them and one on top.
pub(crate) const LEVELS_MAX: usize = 3;

/// A page of a manifest: level 0 holds the hashes of data chunks, each other level those of the level below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PageId {
    pub(crate) level: usize,
    pub(crate) index: u64,
}

impl PageId {
    /// The level-0 page that names a data chunk, and the slot in it.
    pub(crate) fn of_chunk(chunk: ChunkIndex) -> (PageId, usize) {
        let (index, slot) = in_page(chunk.0);
        (PageId { level: 0, index }, slot)
    }

    /// The page that names this one, and the slot in it. Beyond the last level this is the root page's slot
    /// alone; ask [`Shape::is_top`] first.
    pub(crate) fn parent(self) -> (PageId, usize) {
        let (index, slot) = in_page(self.index);
        (PageId { level: self.level + 1, index }, slot)
    }
}

fn in_page(index: u64) -> (u64, usize) {
    let hashes = HASHES_PER_PAGE as u64;
    (index / hashes, (index % hashes) as usize)
}

/// How many pages of which level a disk of a given size has. There is always at least level 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    geometry: Geometry,
    /// Pages of each level; 0 where there is no such level.
    pages: [u64; LEVELS_MAX],
    levels: usize,
}

impl Shape {
    /// The shape of a disk of `size_bytes`; `None` if no disk has that size.
    pub(crate) fn of(size_bytes: u64) -> Option<Shape> {
        let geometry = Geometry::new(size_bytes)?;
        let mut pages = [0; LEVELS_MAX];
        let mut names = geometry.chunk_count();
        let mut levels = 0;
        loop {
            names = names.div_ceil(HASHES_PER_PAGE as u64);
            pages[levels] = names;
            levels += 1;
            if names <= TOPS_MAX {
                return Some(Shape { geometry, pages, levels });
            }
        }
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How many levels of pages there are, 1 to [`LEVELS_MAX`].
    pub(crate) fn levels(&self) -> usize {
        self.levels
    }

    /// How many pages `level` has.
    pub(crate) fn pages_at(&self, level: usize) -> u64 {
        self.pages[level]
    }

    /// How many pages there are in all.
    pub(crate) fn pages_total(&self) -> u64 {
        self.pages.iter().sum()
    }

    /// How many hashes stand in the root page.
    pub(crate) fn tops(&self) -> u64 {
        self.pages[self.levels - 1]
    }

    /// Whether the page is named by the root page itself.
    pub(crate) fn is_top(&self, page: PageId) -> bool {
        page.level + 1 == self.levels
    }

    /// How many data chunks one page of `level` covers when full.
    pub(crate) fn span(level: usize) -> u64 {
        (0..=level).map(|_| HASHES_PER_PAGE as u64).product()
    }

    /// How many data chunks the page covers on this disk.
    pub(crate) fn chunks_under(&self, page: PageId) -> u64 {
        let span = Shape::span(page.level);
        span.min(self.geometry.chunk_count().saturating_sub(page.index.saturating_mul(span)))
    }

    /// The place of the page when all pages stand one after the other, level by level from 0.
    pub(crate) fn ordinal(&self, page: PageId) -> u64 {
        self.pages[..page.level].iter().sum::<u64>() + page.index
    }

    /// The page at a place, the inverse of [`Shape::ordinal`]; `None` beyond the last.
    pub(crate) fn page_at(&self, ordinal: u64) -> Option<PageId> {
        let mut index = ordinal;
        for level in 0..self.levels {
            if index < self.pages[level] {
                return Some(PageId { level, index });
            }
            index -= self.pages[level];
        }
        None
    }
}
