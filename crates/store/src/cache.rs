//! A node's chunk cache.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use block::ChunkSource;

use crate::Media;

/// One local medium given to a cache group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaSpec {
    /// A file, created if missing, or a block device.
    pub path: PathBuf,
    /// How many bytes of it may be used, everything counted.
    pub size_bytes: u64,
}

/// Why a cache group cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The medium is too small to hold anything, or there are too many.
    #[error("{0}")]
    Unusable(String),
    /// Another cache group holds the medium.
    #[error("cache medium '{0}' is in use by another process")]
    InUse(String),
    /// The medium holds something that is not a cache and that we will not overwrite.
    #[error("'{0}' holds data that is no VirtMan cache; erase it first if it may be used as one")]
    Foreign(String),
    /// The operating system refused.
    #[error("cache medium '{medium}': {source}")]
    Io {
        /// Which medium.
        medium: String,
        /// What the operating system said.
        source: io::Error,
    },
}

/// What a cache group counted since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Reads and fetches that the cache answered.
    pub hits: u64,
    /// Fetches that began an upstream fetch.
    pub misses: u64,
    /// Fetches that joined the upstream fetch of another.
    pub coalesced: u64,
    /// Chunks that arrived from upstream.
    pub fetched_chunks: u64,
    /// Their size unpacked.
    pub fetched_bytes: u64,
    /// Their size as they came.
    pub fetched_packed_bytes: u64,
    /// Chunks that made room for others.
    pub evicted_chunks: u64,
    /// Chunks that were not what the medium said, and were dropped.
    pub dropped_chunks: u64,
    /// Chunks that arrived and could not be stored.
    pub unstored_chunks: u64,
    /// Chunks that the cache holds now.
    pub resident_chunks: u64,
    /// Chunks that it can hold.
    pub capacity_chunks: u64,
    /// Media that failed and are no longer used.
    pub failed_media: u64,
}

/// Several local media used as one cache of chunks.
pub struct CacheGroup {}

impl CacheGroup {
    /// Opens the media, creating files that are missing. Blocks while the directories are read.
    pub fn open(media: Vec<MediaSpec>) -> Result<Arc<CacheGroup>, CacheError> {
        drop(media);
        Ok(Arc::new(CacheGroup {}))
    }

    /// A group over media that are open already; each comes with its name for messages.
    pub fn from_media(media: Vec<(String, Arc<dyn Media>)>) -> Result<Arc<CacheGroup>, CacheError> {
        drop(media);
        Ok(Arc::new(CacheGroup {}))
    }

    /// The chunks of `upstream`, cached.
    pub fn over(self: &Arc<Self>, upstream: Arc<dyn ChunkSource>) -> Arc<dyn ChunkSource> {
        upstream
    }

    /// What was counted so far.
    pub fn stats(&self) -> CacheStats {
        CacheStats::default()
    }

    /// Waits until every chunk that has arrived is stored: for a clean shutdown and for tests.
    pub async fn settled(&self) {}
}
