//! An imported image as a source of chunks: the root of its hierarchy.
//!
//! Pages come from the image's directory, data from the image file through the reader of its format, or from the
//! remote disk that the image was added from, which is opened when it is first read. Whatever was read becomes a
//! [`Chunk`] only by verification, so what was changed after the import gives errors, never wrong bytes.
//!
//! - Consistency: an opened image keeps to the source that it was opened with.
//! - Retries: none; but after an error the source is opened anew, so that a file that was put back serves again.
//! - Cancellation: a dropped fetch lets its read finish on the blocking pool, still counted against the bound.
//! - Crash: nothing is written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::limits::CHUNK_BYTES;
use block::{BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, FetchError, ImageId, Priority};
use bytes::{Bytes, BytesMut};
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::layout::{self, Keep, SourceRecord};
use crate::pages::Node;
use crate::source::{AllowedDirs, Reader, RemoteReader, Source};
use crate::stored::Stored;
use crate::{FilePart, Format, ImportError, Remotes, RootPage};

/// Reads that one image has on the blocking pool at a time: enough to keep a disk's queue filled, few enough
/// that images do not starve each other of the pool's threads.
const READS_MAX: usize = 16;

/// An imported image, opened to be served.
pub struct OriginImage {
    shared: Arc<Shared>,
    reads: Arc<Semaphore>,
}

/// Why an image's directory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such image.
    #[error("there is no image in '{}'", .0.display())]
    Missing(PathBuf),
    /// One of the directory's files is not what it should be.
    #[error("'{}' is damaged: {reason}; add the image again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system does not let us read.
    #[error("cannot read '{}': {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
}

impl OpenError {
    pub(crate) fn damaged(dir: &Path, name: &str, reason: String) -> OpenError {
        OpenError::Damaged { path: dir.join(name), reason }
    }

    /// An error from reading one of the directory's files, told apart by its kind.
    pub(crate) fn of(dir: &Path, name: &str, error: &io::Error) -> OpenError {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::NotFound => {
                OpenError::damaged(dir, name, error.to_string())
            }
            _ => OpenError::Unreadable { path: dir.join(name), reason: error.to_string() },
        }
    }
}

/// What there is to say of an image at its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Description {
    /// The image's name.
    pub id: ImageId,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Chunks that cover the disk, zero ones included.
    pub chunk_count: u64,
    /// Chunks that are all zero.
    pub zero_chunks: u64,
    /// The format that the image file had when it was added.
    pub format: Format,
    /// Where the bytes are read from.
    pub keep: Keep,
    /// The file that the bytes are read from, or the location of the remote disk.
    pub path: PathBuf,
    /// The files that the image was added from: the image file, then those that it builds upon. None if it was
    /// added from a remote disk.
    pub files: Vec<FilePart>,
}

impl OriginImage {
    /// Opens the directory of an imported image. The image file itself is opened when it is first read. An image
    /// that lies on a remote disk needs [`open_with`](Self::open_with).
    pub fn open(dir: &Path) -> Result<OriginImage, OpenError> {
        OriginImage::open_shared(dir, None)
    }

    /// Opens the directory of an imported image, which may lie on a remote disk.
    pub fn open_with(dir: &Path, remotes: Remotes) -> Result<OriginImage, OpenError> {
        OriginImage::open_shared(dir, Some(remotes))
    }

    fn open_shared(dir: &Path, remotes: Option<Remotes>) -> Result<OriginImage, OpenError> {
        let shared = Arc::new(Shared::open(dir, remotes)?);
        Ok(OriginImage { shared, reads: Arc::new(Semaphore::new(READS_MAX)) })
    }

    /// The image's name.
    pub fn id(&self) -> ImageId {
        self.shared.stored.id
    }

    /// The image's root page.
    pub fn root(&self) -> &RootPage {
        &self.shared.stored.root
    }

    /// What there is to say of the image.
    pub fn describe(&self) -> Description {
        let shared = &self.shared;
        let root = self.root();
        Description {
            id: self.id(),
            size_bytes: root.size_bytes(),
            chunk_count: root.chunk_count(),
            zero_chunks: root.zero_chunks(),
            format: shared.record.format,
            keep: shared.record.keep,
            path: shared.data_path(),
            files: shared.record.files.clone(),
        }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }
}

impl ChunkSource for OriginImage {
    fn fetch(&self, chunk: ChunkHash, _priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        if chunk.is_zero() {
            return Box::pin(std::future::ready(Ok(Chunk::zero())));
        }
        Box::pin(async move {
            let unreachable = |reason: &str| FetchError::Unreachable(reason.to_owned());
            let permit = Arc::clone(&self.reads).acquire_owned().await;
            let permit = permit.map_err(|_| unreachable("the image is being closed"))?;
            let shared = Arc::clone(&self.shared);
            let read = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                shared.read(chunk)
            });
            read.await.map_err(|_| unreachable("this node is shutting down"))?
        })
    }
}

/// What fetches and verification use.
pub(crate) struct Shared {
    pub(crate) stored: Stored,
    record: SourceRecord,
    remotes: Option<Remotes>,
    readers: Mutex<Readers>,
    /// Whether somebody was told that the source is not what it was.
    complained: AtomicBool,
}

/// The opened source and the readers of it that nobody uses just now, at most as many as there ever were users.
#[derive(Default)]
struct Readers {
    source: Option<Arc<Source>>,
    idle: Vec<Reader>,
}

impl Shared {
    fn open(dir: &Path, remotes: Option<Remotes>) -> Result<Shared, OpenError> {
        let stored = Stored::open(dir)?;
        let record = SourceRecord::read(&dir.join(layout::SOURCE))
            .map_err(|e| OpenError::of(dir, layout::SOURCE, &e))?;
        let complained = AtomicBool::new(false);
        Ok(Shared { stored, record, remotes, readers: Mutex::default(), complained })
    }

    fn data_path(&self) -> PathBuf {
        match self.record.keep {
            Keep::Copy => self.stored.dir.join(layout::DATA),
            Keep::InPlace => match (&self.record.remote, self.record.files.first()) {
                (Some(location), _) => PathBuf::from(location),
                (None, file) => file.expect("a record names files or a remote disk").path.clone(),
            },
        }
    }

    fn read(&self, chunk: ChunkHash) -> Result<Chunk, FetchError> {
        let read = match self.stored.locate(chunk) {
            Ok(None) => return Err(FetchError::NotHere(chunk)),
            Ok(Some(Node::Page(page))) => self.stored.page(chunk, page),
            Ok(Some(Node::Data(index))) => self.read_chunk(chunk, index),
            Err(error) => Err(error),
        };
        read.inspect_err(|error| self.complain(error))
    }

    fn read_chunk(&self, chunk: ChunkHash, index: ChunkIndex) -> Result<Chunk, FetchError> {
        let read = self.with_reader(|reader| self.read_data(reader, index));
        let bytes = read.map_err(|e| FetchError::Storage { chunk, reason: e.to_string() })?;
        Chunk::verify(chunk, bytes).map_err(|wrong| {
            self.readers().take();
            FetchError::Wrong(wrong)
        })
    }

    /// The bytes of a data chunk as the source has them now, padded; not verified.
    pub(crate) fn read_data(&self, reader: &mut Reader, index: ChunkIndex) -> Result<Bytes, ImportError> {
        let offset = index.0 * CHUNK_BYTES as u64;
        let len = (self.stored.root.size_bytes() - offset).min(CHUNK_BYTES as u64) as usize;
        let mut bytes = BytesMut::zeroed(CHUNK_BYTES);
        let read = reader.read_at(offset, &mut bytes[..len]);
        read.map_err(|e| ImportError::reading(&self.data_path(), &e))?;
        Ok(bytes.freeze())
    }

    /// Runs `work` with a reader of the source. After an error the source will be opened anew.
    pub(crate) fn with_reader<T>(
        &self,
        work: impl FnOnce(&mut Reader) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let mut reader = self.take_reader()?;
        let worked = work(&mut reader);
        match worked {
            Ok(_) => self.readers().idle.push(reader),
            Err(_) => self.readers().take(),
        }
        worked
    }

    fn take_reader(&self) -> Result<Reader, ImportError> {
        let source = {
            let mut readers = self.readers();
            if let Some(reader) = readers.idle.pop() {
                return Ok(reader);
            }
            match &readers.source {
                Some(source) => Arc::clone(source),
                None => Arc::clone(readers.source.insert(Arc::new(self.open_source()?))),
            }
        };
        source.reader()
    }

    fn open_source(&self) -> Result<Source, ImportError> {
        let path = self.data_path();
        let open =
            |format, dirs: &[PathBuf]| Source::open(&path, Some(format), &AllowedDirs::new(dirs, &path)?);
        let source = match (self.record.keep, &self.record.remote) {
            (Keep::Copy, _) => open(Format::Raw, std::slice::from_ref(&self.stored.dir)),
            (Keep::InPlace, None) => open(self.record.format, &self.record.allowed_dirs),
            (Keep::InPlace, Some(location)) => self.open_remote(location),
        }?;
        let (expected, actual) = (self.stored.root.size_bytes(), source.size_bytes());
        if actual < expected {
            let reason = format!("it holds a disk of {actual} bytes instead of {expected}");
            return Err(ImportError::truncated(&path, reason));
        }
        Ok(source)
    }

    fn open_remote(&self, location: &str) -> Result<Source, ImportError> {
        let unreadable = |reason: &str| ImportError::unreadable(Path::new(location), reason);
        let none = || unreadable("remote disks cannot be opened here");
        let Remotes { opener, runtime } = self.remotes.as_ref().ok_or_else(none)?;
        let disk = opener.open(location).map_err(|reason| unreadable(&reason))?;
        let reader = RemoteReader::new(disk, runtime.clone());
        Source::open_remote(location, Some(self.record.format), reader)
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a person, once, that the source does not give the image any more.
    fn complain(&self, reason: &dyn std::fmt::Display) {
        let path = self.data_path();
        if self.complained.swap(true, Ordering::Relaxed) {
            tracing::debug!(image = %self.stored.id.short(), file = %path.display(), %reason, "chunk not served");
            return;
        }
        tracing::error!(
            image = %self.stored.id.short(),
            file = %path.display(),
            %reason,
            "origin_changed: the image file or disk no longer gives what was imported from it: put the old one back, or add it as a new image"
        );
    }
}

impl Readers {
    /// Forgets the source and its readers.
    fn take(&mut self) {
        *self = Readers::default();
    }
}
