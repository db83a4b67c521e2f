//! Derived images: those that differ in parts from a base, and are kept as what differs.
//!
//! [`derive()`](make::derive) makes one; [`DerivedImage`] serves it. Pages of its own come from its directory,
//! changed chunks from the disk that it was derived from, and everything else from the source of the base. The
//! image has an id like any other, and its nodes need not know how its origin keeps it: since all that did not
//! change has the names that it has in the base, they hold most of it already.
//!
//! - Consistency: what was read becomes a [`Chunk`] only by verification, so a disk that changed after all gives
//!   errors, never wrong bytes.
//! - Retries: none; but after an error the disk is opened anew.
//! - Cancellation: a dropped fetch lets a lookup finish on the blocking pool, still counted against the bound.
//! - Crash: nothing is written here.

mod make;
mod record;
mod tree;

use std::fmt::Display;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::limits::CHUNK_BYTES;
use block::{
    BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, FetchError, ImageId, Priority, SlotHint,
    TryIo,
};
use bytes::BytesMut;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use make::{DeriveRequest, Derived, derive};
use record::DerivedRecord;
pub use record::{Kind, kind};

use crate::pages::Node;
use crate::stored::Stored;
use crate::{OpenError, OpenRemote, RootPage};

/// Reads of one image's own parts at a time, as for an imported image. What the base is asked for is bounded by
/// the base.
const READS_MAX: usize = 16;

/// A derived image, opened to be served.
pub struct DerivedImage {
    shared: Arc<Shared>,
    base: Arc<dyn ChunkSource>,
    reads: Arc<Semaphore>,
}

/// What there is to say of a derived image at its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DerivedDescription {
    /// The image's name.
    pub id: ImageId,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// Chunks that cover the disk, zero ones included.
    pub chunk_count: u64,
    /// Chunks that are all zero.
    pub zero_chunks: u64,
    /// The image that it is derived from.
    pub base: ImageId,
    /// Where the disk is that the changed chunks are read from.
    pub location: String,
    /// Chunks that differ from the base's and are not zero.
    pub chunks_changed: u64,
    /// Chunks that are zero, and are not so in the base.
    pub chunks_zeroed: u64,
    /// Bytes in the chunks that differ from the base's and are not zero.
    pub bytes_changed: u64,
}

impl DerivedImage {
    /// Opens the directory of a derived image. The changed chunks come from the disk that `opener` opens when it
    /// is first read; everything else from `base`, which must have all chunks and pages of the image's
    /// [base](crate::Kind::Derived).
    pub fn open(
        dir: &Path,
        opener: Arc<dyn OpenRemote>,
        base: Arc<dyn ChunkSource>,
    ) -> Result<DerivedImage, OpenError> {
        let stored = Stored::open(dir)?;
        let record = DerivedRecord::read(dir)?;
        let complained = AtomicBool::new(false);
        let shared = Arc::new(Shared { stored, record, opener, disk: Mutex::default(), complained });
        Ok(DerivedImage { shared, base, reads: Arc::new(Semaphore::new(READS_MAX)) })
    }

    /// The image's name.
    pub fn id(&self) -> ImageId {
        self.shared.stored.id
    }

    /// The image's root page.
    pub fn root(&self) -> &RootPage {
        &self.shared.stored.root
    }

    /// The image that this one is derived from.
    pub fn base(&self) -> ImageId {
        self.shared.record.base
    }

    /// Where the disk is that the changed chunks are read from.
    pub fn location(&self) -> &str {
        &self.shared.record.location
    }

    /// Bytes in the chunks that differ from the base's and are not zero.
    pub fn bytes_changed(&self) -> u64 {
        self.shared.record.chunks_changed.saturating_mul(CHUNK_BYTES as u64)
    }

    /// What there is to say of the image.
    pub fn describe(&self) -> DerivedDescription {
        let (root, record) = (self.root(), &self.shared.record);
        DerivedDescription {
            id: self.id(),
            size_bytes: root.size_bytes(),
            chunk_count: root.chunk_count(),
            zero_chunks: root.zero_chunks(),
            base: record.base,
            location: record.location.clone(),
            chunks_changed: record.chunks_changed,
            chunks_zeroed: record.chunks_zeroed,
            bytes_changed: self.bytes_changed(),
        }
    }

    /// The chunk if it is the image's own, and not its base's.
    async fn fetch_own(&self, chunk: ChunkHash) -> Result<Option<Chunk>, FetchError> {
        let closing = |_| FetchError::Unreachable("the image is being closed".to_owned());
        let permit = Arc::clone(&self.reads).acquire_owned().await.map_err(closing)?;
        let shared = Arc::clone(&self.shared);
        let find = tokio::task::spawn_blocking(move || shared.find(chunk, permit));
        let stopping = |_| FetchError::Unreachable("this node is shutting down".to_owned());
        match find.await.map_err(stopping)?? {
            Found::InBase => Ok(None),
            Found::Page(page) => Ok(Some(page)),
            Found::Data { index, disk, permit: _permit } => {
                let read = self.shared.read(chunk, index, &*disk).await;
                read.map(Some).inspect_err(|error| self.shared.give_up_disk(error))
            }
        }
    }
}

impl ChunkSource for DerivedImage {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        if chunk.is_zero() {
            return Box::pin(std::future::ready(Ok(Chunk::zero())));
        }
        Box::pin(async move {
            match self.fetch_own(chunk).await? {
                Some(chunk) => Ok(chunk),
                None => self.base.fetch(chunk, priority).await,
            }
        })
    }

    /// What the base has at hand under this name is the chunk, whoever else has it.
    fn try_read(&self, chunk: &ChunkHash, hint: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        self.base.try_read(chunk, hint, offset, buf)
    }
}

/// What is shared with the blocking pool.
struct Shared {
    stored: Stored,
    record: DerivedRecord,
    opener: Arc<dyn OpenRemote>,
    disk: Mutex<Option<Arc<dyn Disk>>>,
    /// Whether somebody was told that the disk is not what it was.
    complained: AtomicBool,
}

/// Where a chunk is.
enum Found {
    InBase,
    Page(Chunk),
    Data { index: ChunkIndex, disk: Arc<dyn Disk>, permit: OwnedSemaphorePermit },
}

impl Shared {
    fn find(&self, chunk: ChunkHash, permit: OwnedSemaphorePermit) -> Result<Found, FetchError> {
        let found = match self.stored.locate(chunk) {
            Ok(None) => return Ok(Found::InBase),
            Ok(Some(Node::Page(page))) => self.stored.page(chunk, page).map(Found::Page),
            Ok(Some(Node::Data(index))) => {
                let opened = self.opened().map_err(|reason| self.storage(chunk, &reason));
                opened.map(|disk| Found::Data { index, disk, permit })
            }
            Err(error) => Err(error),
        };
        found.inspect_err(|error| self.complain(error))
    }

    /// The disk, opened if it is not.
    fn opened(&self) -> Result<Arc<dyn Disk>, String> {
        if let Some(disk) = &*self.disk() {
            return Ok(Arc::clone(disk));
        }
        // Without the lock: opening may take long. Of two that were opened at once, the last one stays.
        let disk = self.opener.open(&self.record.location)?;
        let (expected, actual) = (self.stored.root.size_bytes(), disk.size_bytes());
        if actual != expected {
            return Err(format!("it is a disk of {actual} bytes instead of {expected}"));
        }
        *self.disk() = Some(Arc::clone(&disk));
        Ok(disk)
    }

    async fn read(&self, chunk: ChunkHash, index: ChunkIndex, disk: &dyn Disk) -> Result<Chunk, FetchError> {
        let offset = index.0 * CHUNK_BYTES as u64;
        let len = (self.stored.root.size_bytes() - offset).min(CHUNK_BYTES as u64) as usize;
        let mut bytes = BytesMut::zeroed(CHUNK_BYTES);
        let read = disk.read(offset, &mut bytes[..len]).await;
        read.map_err(|error| self.storage(chunk, &error))?;
        Chunk::verify(chunk, bytes.freeze()).map_err(FetchError::Wrong)
    }

    fn storage(&self, chunk: ChunkHash, reason: &dyn Display) -> FetchError {
        FetchError::Storage { chunk, reason: format!("'{}': {reason}", self.record.location) }
    }

    /// Forgets the disk, so that one that was put back is found.
    fn give_up_disk(&self, error: &FetchError) {
        self.disk().take();
        self.complain(error);
    }

    fn disk(&self) -> MutexGuard<'_, Option<Arc<dyn Disk>>> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a person, once, that the image cannot be served from here any more.
    fn complain(&self, reason: &dyn Display) {
        let (image, location) = (self.stored.id.short(), &self.record.location);
        if self.complained.swap(true, Ordering::Relaxed) {
            tracing::debug!(%image, location, %reason, "chunk not served");
            return;
        }
        tracing::error!(
            %image,
            location,
            %reason,
            "origin_changed: the disk no longer gives what an image was derived from it: put it back as it was, or derive the image again"
        );
    }
}
