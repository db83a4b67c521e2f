//! A node's chunk cache: several local media used as one, over any source of chunks.
//!
//! Each chunk is stored once, whatever images it belongs to, and found by its hash. Each shard of the
//! index has its own lock; a read that has a good [`SlotHint`](block::SlotHint) takes none at all.
//!
//! Consistency: a whole chunk that leaves the cache was verified on the way out. [`ChunkSource::try_read`]
//! serves parts of chunks that were verified since they came into memory, and checks before and after
//! that the slot holds the wanted chunk. What the page cache holds is trusted as this process's own memory is: who
//! writes to the file of a medium in use can change what guests read.
//! Retries: a chunk that is not what the directory says, or cannot be read, is dropped and fetched again;
//! the reader notices nothing. A medium that fails too often is no longer used. Errors from upstream go
//! to those who wait and are not remembered.
//! Cancellation: a fetch that nobody waits for any more is withdrawn; see [`singleflight`].
//! Crash: nothing is synced and nothing journaled, since each chunk proves itself; see [`medium`].
//! Media come and go meanwhile; see [`members`].
//! Bounds: the slots of the media; [`writer`] bounds what is on its way to them. Flights are as many as
//! the callers have fetches waiting.

mod fetch_task;
mod health;
mod medium;
mod members;
mod set;
mod shard;
mod singleflight;
mod slot;
mod source;
mod sums;
mod table;
mod writer;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use block::limits::CHUNK_BYTES;
use block::{Chunk, ChunkHash, ChunkSource, Priority, TryIo};

use self::fetch_task::FetchTask;
use self::medium::Medium;
use self::members::{Candidate, Members};
use self::set::{MediumSet, SlotId};
use self::shard::{Index, Reserved, Shard};
use self::singleflight::{SingleFlight, Waiter};
use self::slot::{SlotVersion, Stage};
use self::source::{Cached, Reader};
use self::sums::Sums;
use self::writer::{Store, Writer};
use crate::Media;

pub use self::health::MediumState;
pub use self::members::{MediaSpec, MediumStatus};

/// Most media in a group: four bits of a slot's number.
const MEDIA_MAX: usize = 16;

/// Most slots on one medium: the other 28 bits, 16 TiB, less the number that means "no slot".
const SLOTS_PER_MEDIUM_MAX: u64 = (1 << 28) - 1;

/// Slots that are worth a shard of their own.
const SLOTS_PER_SHARD: u64 = 1024;

/// Most shards: more than the cores that ever contend for them.
const SHARDS_MAX: u64 = 64;

/// Why a cache group cannot be opened, or its media changed.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The medium is too small to hold anything, or there are too many.
    #[error("{0}")]
    Unusable(String),
    /// Another cache group holds the medium.
    #[error("cache medium '{0}' is in use by another process, or under another name by this one")]
    InUse(String),
    /// The group has the medium already, but not as it is wanted.
    #[error("{0}")]
    Taken(String),
    /// The group has no such medium.
    #[error("there is no cache medium '{0}'")]
    Unknown(String),
    /// Without this medium nothing would be cached.
    #[error("cache medium '{0}' is the last one that works: add another first")]
    Last(String),
    /// The medium holds something that is not a cache and that we will not overwrite.
    #[error("'{0}' holds data that is not a VirtMan cache; erase it first if it may be used as one")]
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

#[derive(Default)]
struct Counters {
    misses: AtomicU64,
    coalesced: AtomicU64,
    fetched_chunks: AtomicU64,
    fetched_packed_bytes: AtomicU64,
    evicted: AtomicU64,
    dropped: AtomicU64,
    unstored: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

/// Several local media used as one cache of chunks.
pub struct CacheGroup {
    /// The newest set of media, for those who come without a lock.
    media: ArcSwap<MediumSet>,
    members: Members,
    shards: Box<[Shard]>,
    writer: Writer,
    counters: Counters,
}

/// Where a wanted chunk is.
enum Lookup {
    Stored(Arc<Medium>, SlotId, SlotVersion),
    /// In memory, on its way to its slot.
    Arrived(Chunk),
    Coming(Waiter),
}

impl CacheGroup {
    /// Opens the media, creating files that are missing. Blocks the thread while the directories are
    /// read: 40 bytes for each 64 KiB. Without media nothing is cached until one is added.
    pub fn open(media: &[MediaSpec]) -> Result<Arc<CacheGroup>, CacheError> {
        let (group, refused) = CacheGroup::open_usable(media);
        match refused.into_iter().next() {
            None => Ok(group),
            Some((_, error)) => Err(error),
        }
    }

    /// The same with those media that can be opened. The others come back.
    pub fn open_usable(media: &[MediaSpec]) -> (Arc<CacheGroup>, Vec<(MediaSpec, CacheError)>) {
        let opened: Vec<Result<Candidate, CacheError>> = media.iter().map(members::open_file).collect();
        let group = CacheGroup::for_bytes(opened.iter().flatten().map(|(_, size_bytes, _)| size_bytes).sum());
        let taken = opened.into_iter().map(|opened| opened.and_then(|medium| group.take_in(medium)));
        let refused = media.iter().zip(taken).filter_map(|(spec, taken)| Some((spec.clone(), taken.err()?)));
        let refused = refused.collect();
        (Arc::new(group), refused)
    }

    /// A group over media that are open already, used up to their present length. Each comes with its
    /// name for messages. Blocks as [`CacheGroup::open`] does.
    pub fn from_media(media: Vec<(String, Arc<dyn Media>)>) -> Result<Arc<CacheGroup>, CacheError> {
        let opened = media.into_iter().map(|(name, media)| members::whole(name, media));
        let opened: Vec<Candidate> = opened.collect::<Result<_, _>>()?;
        let group = CacheGroup::for_bytes(opened.iter().map(|(_, size_bytes, _)| size_bytes).sum());
        opened.into_iter().try_for_each(|medium| group.take_in(medium))?;
        Ok(Arc::new(group))
    }

    /// A group without media, made for about so many bytes of them: each shard is to have a good number of slots. If
    /// media that come or go change that much, shards are longer waited for, or borrow slots from each other, until the
    /// group is opened again.
    fn for_bytes(size_bytes: u64) -> CacheGroup {
        let slots = size_bytes / CHUNK_BYTES as u64;
        let shards = (slots / SLOTS_PER_SHARD).clamp(1, SHARDS_MAX).next_power_of_two();
        CacheGroup {
            media: ArcSwap::default(),
            members: Members::default(),
            shards: (0..shards).map(|_| Shard::default()).collect(),
            writer: Writer::new(),
            counters: Counters::default(),
        }
    }

    /// The chunks of `upstream`, cached. Fetches of one chunk are one fetch, also across several such
    /// sources of one group. The futures need a Tokio runtime.
    pub fn over(self: &Arc<Self>, upstream: Arc<dyn ChunkSource>) -> Arc<dyn ChunkSource> {
        Arc::new(Cached { group: Arc::clone(self), upstream, reader: Reader::Own })
    }

    /// The same for children, who may have their place above this node in another image's hierarchy: what they ask
    /// for never waits for another upstream alone.
    pub fn over_for_children(self: &Arc<Self>, upstream: Arc<dyn ChunkSource>) -> Arc<dyn ChunkSource> {
        Arc::new(Cached { group: Arc::clone(self), upstream, reader: Reader::Child })
    }

    /// Whether the chunk is here, in its slot or on the way to it. Reads nothing and counts as no use; a chunk
    /// that was found in the directory at the start and not read since may turn out to be damaged.
    pub fn holds(&self, hash: &ChunkHash) -> bool {
        let mut index = self.shard(hash).lock();
        self.find(&mut index, hash).is_some()
            || index.flights.get(hash).is_some_and(|flight| flight.arrived().is_some())
    }

    /// What was counted so far.
    pub fn stats(&self) -> CacheStats {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let fetched_chunks = get(&counters.fetched_chunks);
        let media = self.media.load();
        let usable = || media.iter().filter(|medium| medium.is_usable());
        CacheStats {
            hits: self.shards.iter().map(|shard| get(&shard.hits)).sum(),
            misses: get(&counters.misses),
            coalesced: get(&counters.coalesced),
            fetched_chunks,
            fetched_bytes: fetched_chunks * CHUNK_BYTES as u64,
            fetched_packed_bytes: get(&counters.fetched_packed_bytes),
            evicted_chunks: get(&counters.evicted),
            dropped_chunks: get(&counters.dropped),
            unstored_chunks: get(&counters.unstored),
            resident_chunks: usable().map(|medium| medium.resident()).sum(),
            capacity_chunks: usable().map(|medium| medium.slots().len() as u64).sum(),
            failed_media: media.iter().filter(|m| m.health.state() == MediumState::Failed).count() as u64,
        }
    }

    /// Waits until every chunk that has arrived is stored: for a clean shutdown and for tests.
    pub async fn settled(&self) {
        self.writer.settled().await;
    }

    fn shard(&self, hash: &ChunkHash) -> &Shard {
        &self.shards[self.shard_number(hash)]
    }

    fn shard_number(&self, hash: &ChunkHash) -> usize {
        // The leading bits choose the shard, the trailing ones the place in its table.
        let shards = self.shards.len() as u64;
        (hash.prefix().rotate_left(16) % shards) as usize
    }

    fn note_hit(&self, shard: &Shard, medium: &Medium, id: SlotId, version: SlotVersion) {
        medium.slot(id).count_use(version, shard.epoch());
        add(&shard.hits, 1);
    }

    /// The slot that holds the chunk. A chunk on a medium that is not used any more is dropped as it comes by.
    fn find(&self, index: &mut Index, hash: &ChunkHash) -> Option<(SlotId, SlotVersion)> {
        let id = index.find(hash)?;
        if !index.media().medium(id).is_usable() {
            index.drop_chunk(id);
            return None;
        }
        Some((id, index.media().slot(id).version()))
    }

    /// Finds the chunk or joins its fetch, which begins here if there is none.
    fn locate(
        self: &Arc<Self>,
        hash: ChunkHash,
        priority: Priority,
        upstream: &Arc<dyn ChunkSource>,
    ) -> Lookup {
        let shard = self.shard(&hash);
        let mut index = shard.lock();
        if let Some((id, version)) = self.find(&mut index, &hash) {
            let medium = Arc::clone(index.media().medium(id));
            return Lookup::Stored(medium, id, version);
        }
        if let Some(flight) = index.flights.get(&hash) {
            if let Some(chunk) = flight.arrived() {
                add(&shard.hits, 1);
                return Lookup::Arrived(chunk);
            }
            add(&self.counters.coalesced, 1);
            return Lookup::Coming(flight.join(priority));
        }
        add(&self.counters.misses, 1);
        let flight = Arc::new(SingleFlight::new(identity(upstream)));
        let waiter = flight.join(priority);
        index.flights.insert(hash, Arc::clone(&flight));
        // A runtime that is ending drops the task at once, which takes it out of the index again.
        drop(index);
        let task = FetchTask::new(Arc::clone(self), hash, flight);
        tokio::spawn(task.run(Arc::clone(upstream)));
        Lookup::Coming(waiter)
    }

    /// Reads and verifies a stored chunk. `None` if it is not there any more, or never was what it was
    /// said to be; then it is not found again.
    async fn read_chunk(
        &self,
        hash: ChunkHash,
        medium: &Arc<Medium>,
        id: SlotId,
        mut version: SlotVersion,
    ) -> Option<Chunk> {
        let (shard, slot) = (self.shard(&hash), medium.slot(id));
        let was_ready = version.stage() == Stage::Ready;
        match medium.read(id).await {
            Err(error) => medium.note_error(&error),
            Ok(bytes) => match Chunk::verify(hash, bytes.into()) {
                Ok(chunk) => {
                    if !was_ready {
                        let sums = Sums::of(chunk.bytes());
                        let _nobody_fills_it = shard.lock();
                        version = slot.mark_ready(version, &sums);
                    }
                    self.note_hit(shard, medium, id, version);
                    return Some(chunk);
                }
                // What was there at the start may be wrong in an honest way; see the format's page on crashes.
                Err(_) if was_ready && slot.is_still(version) => medium.note_wrong_chunk(),
                Err(_) => {}
            },
        }
        let mut index = shard.lock();
        // A slot is emptied before its number can mean another's.
        if slot.is_still(version) {
            index.drop_chunk(id);
            add(&self.counters.dropped, 1);
        }
        None
    }

    /// A slot for a new chunk, emptied.
    fn reserve(&self, hash: &ChunkHash) -> Option<Reserved> {
        let own = self.shard_number(hash);
        if let Some(reserved) = self.shards[own].lock().reserve() {
            return Some(reserved);
        }
        // The media have become so small that no slot fell to this shard. A free one of another is better than one in use.
        let (before, after) = self.shards.split_at(own);
        let others = || after.iter().chain(before);
        let free = others().find_map(|shard| shard.lock().cede_free());
        let reserved = free.or_else(|| others().find_map(|shard| shard.lock().cede()))?;
        self.shards[own].lock().adopt();
        Some(reserved)
    }

    /// Writes an arrived chunk to its slot and lets it be found there. Runs on the blocking pool.
    fn store(&self, store: &Store) {
        let Store { medium, id, chunk, .. } = store;
        let hash = chunk.hash();
        let shard = self.shard(&hash);
        let written = if medium.is_usable() { medium.write(*id, chunk) } else { Ok(()) };
        let is_entered = match written {
            Ok(()) => shard.enter(medium, *id, &hash, &Sums::of(chunk.bytes())),
            Err(error) => {
                medium.note_error(&error);
                let mut index = shard.lock();
                index.release(medium, *id);
                index.flights.remove(&hash);
                false
            }
        };
        if !is_entered {
            add(&self.counters.unstored, 1);
        }
    }

    /// Copies from the slot, if it holds the chunk, verified, and its bytes are in memory and still the same.
    fn try_copy(&self, shard: &Shard, id: SlotId, hash: &ChunkHash, offset: usize, buf: &mut [u8]) -> TryIo {
        let media = self.media.load();
        let Some((medium, slot)) = media.get(id) else { return TryIo::WouldBlock };
        let Some(version) = slot.version_of(hash) else { return TryIo::WouldBlock };
        if version.stage() != Stage::Ready || !medium.is_usable() {
            return TryIo::WouldBlock;
        }
        match medium.try_copy(id, offset, buf) {
            Ok(TryIo::Done) if slot.is_still(version) && medium.is_usable() => {
                self.note_hit(shard, medium, id, version);
                TryIo::Done
            }
            // A chunk of which a part is wrong is found to be so by whoever reads it as a whole now.
            Ok(_) => TryIo::WouldBlock,
            Err(error) => {
                medium.note_error(&error);
                TryIo::WouldBlock
            }
        }
    }
}

/// Which source this is, for comparing.
fn identity(source: &Arc<dyn ChunkSource>) -> usize {
    Arc::as_ptr(source).cast::<()>() as usize
}

#[cfg(test)]
mod tests;
