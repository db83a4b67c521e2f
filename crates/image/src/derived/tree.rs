//! The manifest of a derived image: its base's, with the pages above the changed chunks made anew.
//!
//! Chunks come in order. So of level 0 one page is open at a time, and of the levels above, only the names that
//! changed are kept: 40 bytes for each 128 MiB of disk in which anything did. A page of the base is looked at if
//! and only if a chunk under it was touched.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::sync::Arc;

use block::limits::HASHES_PER_PAGE;
use block::{ChunkHash, ChunkIndex, Priority};

use crate::index::{Visit, location_of, node_at};
use crate::manifest::{HASH_BYTES, PageId, Shape, page_of};
use crate::page_cache::Page;
use crate::pages::{Node, Pages};
use crate::{ImageVolume, ImportError, RootPage};

/// A manifest in the making.
pub(super) struct Tree<'a> {
    base: &'a ImageVolume,
    shape: Shape,
    dir: &'a Path,
    pages: Pages,
    own: OwnNodes,
    open: Option<OpenPage>,
    /// Level-0 pages that differ from the base's, in order, and their names.
    changed: Vec<(u64, ChunkHash)>,
    /// Chunks of the disk that are zero, corrected with each chunk that becomes zero, or ceases to be.
    zero_chunks: u64,
    counts: Counts,
}

/// How many chunks differ from the base's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Those that are not zero.
    pub(super) changed: u64,
    /// Those that are.
    pub(super) zeroed: u64,
}

/// A finished manifest.
pub(super) struct Finished {
    pub(super) root: RootPage,
    pub(super) pages: Pages,
    pub(super) own: OwnNodes,
    pub(super) counts: Counts,
}

/// The level-0 page to which chunks are being added.
struct OpenPage {
    index: u64,
    base: Arc<Page>,
    names: Vec<ChunkHash>,
}

fn names_in(page: &Page) -> Vec<ChunkHash> {
    (0..HASHES_PER_PAGE).map(|slot| page.hash(slot)).collect()
}

impl<'a> Tree<'a> {
    /// The manifest of a disk that is not smaller than the base, with all files in `dir`. `pages` are all zero yet.
    pub(super) fn new(
        base: &'a ImageVolume,
        shape: Shape,
        pages: Pages,
        dir: &'a Path,
    ) -> Result<Tree<'a>, ImportError> {
        let own = OwnNodes::create(dir, shape).map_err(|e| ImportError::writing(dir, &e))?;
        let more_chunks = shape.geometry().chunk_count() - base.root().chunk_count();
        Ok(Tree {
            base,
            shape,
            dir,
            pages,
            own,
            open: None,
            changed: Vec::new(),
            zero_chunks: base.root().zero_chunks() + more_chunks,
            counts: Counts::default(),
        })
    }

    /// Adds the names that chunks from `first` on have now. They lie under one page, and behind all that were
    /// added before.
    pub(super) async fn add(&mut self, first: u64, hashes: &[ChunkHash]) -> Result<(), ImportError> {
        let (page, mut slot) = PageId::of_chunk(ChunkIndex(first));
        let mut open = match self.open.take() {
            Some(open) if open.index == page.index => open,
            other => {
                self.close(other)?;
                let base = self.base_names(page).await?;
                OpenPage { index: page.index, names: names_in(&base), base }
            }
        };
        for (hash, chunk) in hashes.iter().zip(first..) {
            let before = open.base.hash(slot);
            open.names[slot] = *hash;
            if before != *hash {
                self.count(before, *hash);
                self.note(Node::Data(ChunkIndex(chunk)), *hash)?;
            }
            slot += 1;
        }
        self.open = Some(open);
        Ok(())
    }

    fn count(&mut self, before: ChunkHash, now: ChunkHash) {
        self.zero_chunks -= u64::from(before.is_zero());
        self.zero_chunks += u64::from(now.is_zero());
        match now.is_zero() {
            true => self.counts.zeroed += 1,
            false => self.counts.changed += 1,
        }
    }

    /// A page's names in the base. No guest waits for them.
    async fn base_names(&self, page: PageId) -> Result<Arc<Page>, ImportError> {
        let names = self.base.names(page, Priority::Background).await;
        names.map_err(|error| ImportError::Base { id: self.base.id(), reason: error.to_string() })
    }

    fn note(&mut self, node: Node, name: ChunkHash) -> Result<(), ImportError> {
        if name.is_zero() {
            return Ok(());
        }
        self.own.push(node, name).map_err(|e| ImportError::writing(self.dir, &e))
    }

    fn close(&mut self, open: Option<OpenPage>) -> Result<(), ImportError> {
        let Some(open) = open else { return Ok(()) };
        if open.names != names_in(&open.base) {
            let name = self.put(PageId { level: 0, index: open.index }, &open.names)?;
            self.changed.push((open.index, name));
        }
        Ok(())
    }

    /// Writes a page that the base does not have, and gives its name.
    fn put(&mut self, page: PageId, names: &[ChunkHash]) -> Result<ChunkHash, ImportError> {
        let bytes = page_of(names);
        let name = ChunkHash::of(&bytes);
        if !name.is_zero() {
            self.pages.put_page(page, &bytes).map_err(|e| ImportError::writing(self.dir, &e))?;
            self.note(Node::Page(page), name)?;
        }
        Ok(name)
    }

    /// Makes the levels above, up to the root page.
    pub(super) async fn finish(mut self) -> Result<Finished, ImportError> {
        let open = self.open.take();
        self.close(open)?;
        let mut changed = std::mem::take(&mut self.changed);
        for level in 1..self.shape.levels() {
            changed = self.level_above(level, changed).await?;
        }
        // The level that the root page itself would be, were it a page, in a base that has as many levels.
        let above = self.base_names(PageId { level: self.shape.levels(), index: 0 }).await?;
        let mut tops: Vec<ChunkHash> = (0..self.shape.tops() as usize).map(|top| above.hash(top)).collect();
        for (index, name) in changed {
            tops[index as usize] = name;
        }
        let writing = |error: io::Error| ImportError::writing(self.dir, &error);
        self.own.flush().map_err(writing)?;
        let root = RootPage::new(self.shape.geometry().size_bytes(), self.zero_chunks, tops.into());
        let root = root.map_err(|error| writing(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        Ok(Finished { root, pages: self.pages, own: self.own, counts: self.counts })
    }

    /// The pages of a level that differ from the base's, given those of the level below.
    async fn level_above(
        &mut self,
        level: usize,
        below: Vec<(u64, ChunkHash)>,
    ) -> Result<Vec<(u64, ChunkHash)>, ImportError> {
        let mut pages: BTreeMap<u64, Vec<(usize, ChunkHash)>> = BTreeMap::new();
        if level >= self.base.root().shape().levels() {
            // A level that the base does not have, so that its first page is new whatever changed under it.
            pages.entry(0).or_default();
        }
        for (index, name) in below {
            let (page, slot) = PageId { level: level - 1, index }.parent();
            pages.entry(page.index).or_default().push((slot, name));
        }
        let mut changed = Vec::with_capacity(pages.len());
        for (index, slots) in pages {
            let page = PageId { level, index };
            let mut names = names_in(&*self.base_names(page).await?);
            for (slot, name) in slots {
                names[slot] = name;
            }
            changed.push((index, self.put(page, &names)?));
        }
        Ok(changed)
    }
}

/// The nodes of a manifest that its base does not have, with their names, in a file without a name: the index is
/// made from it in as many passes as it takes.
pub(super) struct OwnNodes {
    file: BufWriter<File>,
    shape: Shape,
    count: u64,
}

const RECORD_BYTES: usize = HASH_BYTES + 8;

impl OwnNodes {
    fn create(dir: &Path, shape: Shape) -> io::Result<OwnNodes> {
        Ok(OwnNodes { file: BufWriter::new(tempfile::tempfile_in(dir)?), shape, count: 0 })
    }

    fn push(&mut self, node: Node, name: ChunkHash) -> io::Result<()> {
        self.count += 1;
        self.file.write_all(name.as_bytes())?;
        self.file.write_all(&location_of(&self.shape, node).to_le_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Goes through all of them.
    pub(super) fn for_each(&self, visit: Visit<'_>) -> io::Result<()> {
        let mut file = self.file.get_ref();
        file.rewind()?;
        let mut records = BufReader::new(file);
        for _ in 0..self.count {
            let mut record = [0; RECORD_BYTES];
            records.read_exact(&mut record)?;
            let (name, location) = record.split_at(HASH_BYTES);
            let name = name.try_into().expect("the record was split behind the name");
            let location = location.try_into().expect("a record has eight bytes behind the name");
            let node = node_at(&self.shape, u64::from_le_bytes(location)).expect("a node was written");
            visit(node, ChunkHash::from_bytes(name))?;
        }
        Ok(())
    }
}
