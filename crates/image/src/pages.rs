//! The `pages` file of an image directory: every page of the manifest at its own place.
//!
//! Page number *n*, counted level by level from level 0, lies at *n* × [`CHUNK_BYTES`]. So the hash of data
//! chunk *c* lies at *c* × 32, whatever the size of the image, and the workers of an import write hashes there
//! without keeping them. All-zero pages are holes of the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::limits::{CHUNK_BYTES, HASHES_PER_PAGE};
use block::{ChunkHash, ChunkIndex, ExtentKind};

use crate::manifest::{HASH_BYTES, ManifestError, PageId, RootPage, Shape, hashes_in};
use crate::source::RawReader;

/// What a manifest names: a data chunk, or one of its own pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Node {
    Data(ChunkIndex),
    Page(PageId),
}

/// The pages of one image in a file.
pub(crate) struct Pages {
    file: File,
    shape: Shape,
}

fn place_of(shape: &Shape, page: PageId) -> u64 {
    shape.ordinal(page) * CHUNK_BYTES as u64
}

impl Pages {
    /// Takes an empty file, and makes all pages zero.
    pub(crate) fn create(file: File, shape: Shape) -> io::Result<Pages> {
        file.set_len(shape.pages_total() * CHUNK_BYTES as u64)?;
        Ok(Pages { file, shape })
    }

    /// Takes a finished file; `InvalidData` if its length is not right.
    pub(crate) fn open(file: File, shape: Shape) -> io::Result<Pages> {
        let (expected, actual) = (shape.pages_total() * CHUNK_BYTES as u64, file.metadata()?.len());
        if expected != actual {
            let reason = format!("it has {actual} bytes instead of {expected}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(Pages { file, shape })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Writes the hashes of the data chunks from `first` on; they must not reach past the last one.
    pub(crate) fn put(&self, first: ChunkIndex, hashes: &[ChunkHash]) -> io::Result<()> {
        let bytes: Vec<u8> = hashes.iter().flat_map(ChunkHash::as_bytes).copied().collect();
        self.file.write_all_at(&bytes, first.0 * HASH_BYTES as u64)
    }

    /// Writes a page that is not all zero.
    pub(crate) fn put_page(&self, page: PageId, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, place_of(&self.shape, page))
    }

    /// The bytes of a page.
    pub(crate) fn read(&self, page: PageId) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; CHUNK_BYTES];
        self.file.read_exact_at(&mut bytes, place_of(&self.shape, page))?;
        Ok(bytes)
    }

    /// The name that the manifest gives to a node.
    pub(crate) fn name(&self, root: &RootPage, node: Node) -> io::Result<ChunkHash> {
        let (parent, slot) = match node {
            Node::Data(chunk) => PageId::of_chunk(chunk),
            Node::Page(page) if self.shape.is_top(page) => return Ok(root.top(page)),
            Node::Page(page) => page.parent(),
        };
        let mut hash = [0; HASH_BYTES];
        let place = place_of(&self.shape, parent) + (slot * HASH_BYTES) as u64;
        self.file.read_exact_at(&mut hash, place)?;
        Ok(ChunkHash::from_bytes(hash))
    }

    /// With all data chunks [put](Pages::put), names the pages up to the top and gives the root page.
    pub(crate) fn finish(&self, zero_chunks: u64) -> io::Result<RootPage> {
        let mut tops = vec![ChunkHash::ZERO; self.shape.tops() as usize];
        self.for_each_page(|page, bytes| {
            let hash = ChunkHash::of(bytes);
            if self.shape.is_top(page) {
                tops[page.index as usize] = hash;
                return Ok(());
            }
            let (parent, slot) = page.parent();
            let place = place_of(&self.shape, parent) + (slot * HASH_BYTES) as u64;
            self.file.write_all_at(hash.as_bytes(), place)
        })?;
        let size_bytes = self.shape.geometry().size_bytes();
        RootPage::new(size_bytes, zero_chunks, tops.into())
            .map_err(|error: ManifestError| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// Every node with a name other than zero, pages included, in the order of the file, then the tops.
    pub(crate) fn for_each_node(
        &self,
        root: &RootPage,
        mut each: impl FnMut(Node, ChunkHash) -> io::Result<()>,
    ) -> io::Result<()> {
        self.for_each_page(|page, bytes| {
            for (hash, index) in hashes_in(bytes).zip(page.index * HASHES_PER_PAGE as u64..) {
                let node = match page.level {
                    0 => Node::Data(ChunkIndex(index)),
                    above => Node::Page(PageId { level: above - 1, index }),
                };
                if !hash.is_zero() {
                    each(node, hash)?;
                }
            }
            Ok(())
        })?;
        for index in 0..self.shape.tops() {
            let page = PageId { level: self.shape.levels() - 1, index };
            if !root.top(page).is_zero() {
                each(Node::Page(page), root.top(page))?;
            }
        }
        Ok(())
    }

    /// Every page that is not a hole of the file, in order; so each level comes before the one above it, and what
    /// `each` writes above is seen when its turn comes.
    fn for_each_page(&self, mut each: impl FnMut(PageId, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let chunk = CHUNK_BYTES as u64;
        let len = self.shape.pages_total() * chunk;
        let holes = RawReader::new(Arc::new(self.file.try_clone()?), len);
        let mut at = 0;
        while at < len {
            let extent = holes.extent(at)?;
            let next = (at + extent.len) / chunk * chunk;
            if extent.kind == ExtentKind::Hole && next > at {
                at = next;
                continue;
            }
            let page = self.shape.page_at(at / chunk).expect("the place lies before the last page's end");
            each(page, &self.read(page)?)?;
            at += chunk;
        }
        Ok(())
    }
}
