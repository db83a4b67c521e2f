//! What the directories of all images have: a root page, pages, and an index that finds a chunk by its name.
//!
//! The pages and chunks that the index knows can be located without keeping anything in memory. What else
//! stands in a directory, and where data comes from, is the business of [`origin`](crate::origin) and
//! [`derived`](crate::derived).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use block::{Chunk, ChunkHash, FetchError, ImageId};

use crate::index::Index;
use crate::layout;
use crate::pages::{Node, Pages};
use crate::{ManifestError, OpenError, RootPage};

/// An opened directory of an image.
pub(crate) struct Stored {
    pub(crate) dir: PathBuf,
    pub(crate) id: ImageId,
    pub(crate) root: RootPage,
    pub(crate) pages: Pages,
    index: Index,
}

impl Stored {
    /// Opens a directory; its name must be that of the image.
    pub(crate) fn open(dir: &Path) -> Result<Stored, OpenError> {
        if !dir.is_dir() {
            return Err(OpenError::Missing(dir.to_owned()));
        }
        let read = fs::read(dir.join(layout::ROOT));
        let bytes = read.map_err(|e| OpenError::of(dir, layout::ROOT, &e))?;
        let root = RootPage::decode(&bytes)
            .map_err(|error: ManifestError| OpenError::damaged(dir, layout::ROOT, error.to_string()))?;
        let id = root.id();
        if dir.file_name().and_then(|name| name.to_str()) != Some(&id.to_string()) {
            return Err(OpenError::damaged(dir, layout::ROOT, format!("it is the root page of image {id}")));
        }
        let open = |name: &str| File::open(dir.join(name)).map_err(|e| OpenError::of(dir, name, &e));
        let pages = Pages::open(open(layout::PAGES)?, root.shape())
            .map_err(|e| OpenError::of(dir, layout::PAGES, &e))?;
        let index = Index::open(open(layout::INDEX)?, root.shape())
            .map_err(|e| OpenError::of(dir, layout::INDEX, &e))?;
        Ok(Stored { dir: dir.to_owned(), id, root, pages, index })
    }

    /// Where the chunk is, if the index knows it.
    pub(crate) fn locate(&self, chunk: ChunkHash) -> Result<Option<Node>, FetchError> {
        self.locate_in_index(chunk).map_err(|error| FetchError::Storage {
            chunk,
            reason: format!("the index of image {} cannot be read: {error}", self.id.short()),
        })
    }

    fn locate_in_index(&self, chunk: ChunkHash) -> io::Result<Option<Node>> {
        for node in self.index.candidates(chunk)? {
            if self.pages.name(&self.root, node)? == chunk {
                return Ok(Some(node));
            }
        }
        Ok(None)
    }

    /// A page that was located under this name.
    pub(crate) fn page(&self, chunk: ChunkHash, page: crate::manifest::PageId) -> Result<Chunk, FetchError> {
        let read = self.pages.read(page);
        let bytes = read.map_err(|e| FetchError::Storage { chunk, reason: e.to_string() })?;
        Chunk::verify(chunk, bytes.into()).map_err(FetchError::Wrong)
    }
}
