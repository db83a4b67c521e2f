//! Deriving an image: what a disk holds now, told by how it differs from the image that it was made on.
//!
//! Only chunks that may have changed are read and hashed; the rest of the manifest is the base's. So a derivation
//! costs what was changed, whatever the size of the image.
//!
//! - Consistency: `disk` must not change meanwhile, and all that differs must lie in the ranges that the caller
//!   names: then the image is the one that an import of the whole disk would give. What changes later is noticed
//!   when it is served.
//! - Retries: none.
//! - Cancellation: by [`ImportProgress::cancel`], also while a read or a page of the base is waited for.
//! - Crash: the directory gets its name when all in it is synced; see [`layout`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use block::{ChunkHash, Disk, ImageId};
use futures_util::StreamExt;
use tokio::runtime::Handle;

use super::record::DerivedRecord;
use super::tree::{Finished, Tree};
use crate::layout::{self, Novelty};
use crate::manifest::Shape;
use crate::pages::Pages;
use crate::pieces::{Content, Touched};
use crate::{ImageVolume, ImportError, ImportProgress, RootPage, index};

/// What to derive, and from what.
#[derive(Clone)]
pub struct DeriveRequest {
    /// The image that the disk was made on.
    pub base: Arc<ImageVolume>,
    /// The disk, in a state that does not change any more. It may be larger than the base, but not smaller.
    pub disk: Arc<dyn Disk>,
    /// The runtime on which the disk and the base are waited for.
    pub runtime: Handle,
    /// Ranges of bytes, in order, outside which the disk is as the base, and zero beyond the base's end.
    pub changed: Vec<Range<u64>>,
    /// Where the disk is, in the words by which it will be opened again. It is kept and shown: no secret may
    /// stand in it.
    pub location: String,
}

/// An image that was derived.
#[derive(Debug, Clone)]
pub struct Derived {
    /// The image's name.
    pub id: ImageId,
    /// Its root page.
    pub root: RootPage,
    /// Its directory, to be [opened](crate::DerivedImage::open); if the image was imported before, that of
    /// the import, which was left as it is. [`kind`](crate::kind) tells.
    pub dir: PathBuf,
    /// Whether the image was new here.
    pub novelty: Novelty,
    /// Bytes in the chunks that differ from the base's and are not zero: what is read from the disk from now on.
    pub bytes_changed: u64,
    /// Bytes of disk that were read.
    pub bytes_read: u64,
}

/// Derives an image and leaves it in `images_dir`, which is made if need be. Gives `None`, and leaves nothing, if
/// the disk does not differ from the base: it *is* the base.
///
/// Blocks for as long as reading the changed chunks takes, in a thread that may block: not one of the runtime's
/// workers. Deriving the same content again updates where its bytes are read from, for those who open the image
/// afterwards.
pub fn derive(
    request: &DeriveRequest,
    images_dir: &Path,
    progress: &ImportProgress,
) -> Result<Option<Derived>, ImportError> {
    let shape = shape_of(request)?;
    let unwritable = |error: io::Error| ImportError::writing(images_dir, &error);
    let unfinished = layout::begin(images_dir).map_err(unwritable)?;
    let dir = unfinished.path();
    let pages = create(dir, layout::PAGES).and_then(|file| Pages::create(file, shape)).map_err(unwritable)?;
    let touched = Touched::new(&request.changed, request.disk.size_bytes());
    progress.begin(touched.bytes());
    let tree = Tree::new(&request.base, shape, pages, dir)?;
    let work = read(request, &touched, tree, progress);
    let done = request.runtime.block_on(progress.unless_cancelled(work));
    let (finished, bytes_read) = done.ok_or(ImportError::Cancelled)??;

    let id = finished.root.id();
    if id == request.base.id() {
        return Ok(None);
    }
    write(dir, request, &finished).map_err(unwritable)?;
    if progress.is_cancelled() {
        return Err(ImportError::Cancelled);
    }
    let novelty = layout::publish(unfinished, images_dir, id).map_err(unwritable)?;
    let bytes_changed = finished.counts.changed * CHUNK_BYTES as u64;
    let base = request.base.id();
    tracing::info!(image = %id, %base, location = request.location, bytes_changed, ?novelty, "image_derived");
    let dir = images_dir.join(id.to_string());
    Ok(Some(Derived { id, root: finished.root, dir, novelty, bytes_changed, bytes_read }))
}

fn shape_of(request: &DeriveRequest) -> Result<Shape, ImportError> {
    let (size_bytes, base_bytes) = (request.disk.size_bytes(), request.base.size_bytes());
    let path = || PathBuf::from(&request.location);
    if size_bytes < base_bytes {
        let what = format!("a disk of {size_bytes} bytes on an image of {base_bytes}");
        let remedy = "a disk cannot be smaller than its image: add it as an image of its own".to_owned();
        return Err(ImportError::Unsupported { path: path(), what, remedy });
    }
    Shape::of(size_bytes).ok_or_else(|| ImportError::TooLarge { path: path(), size_bytes })
}

fn create(dir: &Path, name: &str) -> io::Result<File> {
    File::options().read(true).write(true).create_new(true).open(dir.join(name))
}

/// Reads what was touched into the manifest; gives also how many bytes were read.
async fn read(
    request: &DeriveRequest,
    touched: &Touched,
    mut tree: Tree<'_>,
    progress: &ImportProgress,
) -> Result<(Finished, u64), ImportError> {
    let unreadable = |error| ImportError::unreadable(Path::new(&request.location), error);
    let mut pieces = pin!(touched.read(&request.disk, names_of));
    let mut bytes_read = 0;
    while let Some(read) = pieces.next().await {
        let (piece, (names, read)) = read.map_err(unreadable)?;
        tree.add(piece.first, &names).await?;
        bytes_read += read;
        progress.add_done(piece.len_bytes);
        // File operations never wait here, so that a cancellation is not noticed otherwise while all is at hand.
        if progress.is_cancelled() {
            return Err(ImportError::Cancelled);
        }
    }
    Ok((tree.finish().await?, bytes_read))
}

/// The names of a piece's chunks, and how many bytes were read for them.
fn names_of(content: Content) -> (Vec<ChunkHash>, u64) {
    match content.bytes {
        None => (vec![ChunkHash::ZERO; content.piece.chunks as usize], 0),
        Some(bytes) => {
            let names = bytes.chunks_exact(CHUNK_BYTES).map(ChunkHash::of).collect();
            (names, content.piece.len_bytes)
        }
    }
}

/// Writes what follows from the manifest, and syncs all.
fn write(dir: &Path, request: &DeriveRequest, finished: &Finished) -> io::Result<()> {
    let Finished { root, pages, own, counts } = finished;
    pages.file().sync_all()?;
    let index = create(dir, layout::INDEX)?;
    index::write_nodes(&index, pages, root, own.count(), |visit| own.for_each(visit))?;
    index.sync_all()?;
    let record = DerivedRecord {
        version: DerivedRecord::VERSION,
        tool: layout::tool(),
        base: request.base.id(),
        location: request.location.clone(),
        chunks_changed: counts.changed,
        chunks_zeroed: counts.zeroed,
    };
    layout::write_synced(dir, layout::ROOT, &root.encode())?;
    layout::write_synced(dir, layout::DERIVED, &record.encode()?)
}
