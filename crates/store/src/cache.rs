//! A node's chunk cache: several local media used as one, over any source of chunks.
//!
//! Each chunk is stored once, whatever images it belongs to, and found by its hash. Each shard of the
//! index has its own lock; a read that has a good [`SlotHint`](block::SlotHint) takes none at all.
//!
//! Consistency: a whole chunk that leaves the cache was verified on the way out. [`ChunkSource::read_now`]
//! serves parts of chunks that were verified since the group was opened, and checks before and after
//! that the slot holds the wanted chunk.
//! Retries: a chunk that is not what the directory says, or cannot be read, is dropped and fetched again;
//! the reader notices nothing. A medium that fails too often is no longer used. Errors from upstream go
//! to those who wait and are not remembered.
//! Cancellation: a fetch that nobody waits for any more is withdrawn; see [`flight`].
//! Crash: nothing is synced and nothing journaled, since each chunk proves itself; see [`medium`].
//! Bounds: the slots of the media; [`writer`] bounds what is on its way to them. Flights are as many as
//! the callers have fetches waiting.

mod flight;
mod journey;
mod medium;
mod shard;
mod slot;
mod source;
mod table;
mod writer;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::limits::CHUNK_BYTES;
use block::{Chunk, ChunkHash, ChunkSource, Now, Priority};
use bytes::Bytes;

use self::flight::{Flight, Waiter};
use self::journey::Journey;
use self::medium::Medium;
use self::shard::{Index, Shard};
use self::slot::{Seen, Slot, Stage};
use self::source::Cached;
use self::writer::Writer;
use crate::media::{FileMedia, InUse};
use crate::{Media, asyncio};

/// Most media in a group: four bits of a slot's number.
const MEDIA_MAX: usize = 16;

/// Most slots on one medium: the other 28 bits, 16 TiB, less the number that means "no slot".
const SLOTS_PER_MEDIUM_MAX: u64 = (1 << 28) - 1;

/// Slots that are worth a shard of their own.
const SLOTS_PER_SHARD: usize = 1024;

/// Most shards: more than the cores that ever contend for them.
const SHARDS_MAX: usize = 64;

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

/// A slot of the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SlotId(u32);

impl SlotId {
    fn new(medium: usize, index: u32) -> SlotId {
        SlotId((medium as u32) << 28 | index)
    }

    fn medium(self) -> usize {
        (self.0 >> 28) as usize
    }

    fn index(self) -> u32 {
        self.0 & ((1 << 28) - 1)
    }

    /// The slot as a note for the next read. Never 0.
    fn to_hint(self) -> u64 {
        u64::from(self.0) + 1
    }

    fn from_hint(hint: u64) -> Option<SlotId> {
        u32::try_from(hint.checked_sub(1)?).ok().map(SlotId)
    }
}

/// The media of a group, and with them all slots.
struct MediumSet(Box<[Medium]>);

impl MediumSet {
    fn medium(&self, id: SlotId) -> &Medium {
        &self.0[id.medium()]
    }

    fn slot(&self, id: SlotId) -> &Slot {
        &self.medium(id).slots()[id.index() as usize]
    }

    /// The slot, if a number from outside names one.
    fn get(&self, id: SlotId) -> Option<&Slot> {
        self.0.get(id.medium())?.slots().get(id.index() as usize)
    }

    fn is_failed(&self, id: SlotId) -> bool {
        self.medium(id).is_failed()
    }
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
    media: MediumSet,
    shards: Box<[Shard]>,
    writer: Writer,
    counters: Counters,
}

/// Where a wanted chunk is.
enum Whereabouts {
    Stored(SlotId, Seen),
    /// In memory, on its way to its slot.
    Arrived(Chunk),
    Coming(Waiter),
}

impl CacheGroup {
    /// Opens the media, creating files that are missing. Blocks the thread while the directories are
    /// read: 40 bytes for each 64 KiB.
    pub fn open(media: Vec<MediaSpec>) -> Result<Arc<CacheGroup>, CacheError> {
        let open = |spec: MediaSpec| {
            let name = spec.path.display().to_string();
            let (file, size_bytes) = open_file(&spec).map_err(|error| match error {
                Ok(InUse) => CacheError::InUse(name.clone()),
                Err(source) => CacheError::Io { medium: name.clone(), source },
            })?;
            Medium::open(name, Arc::new(file), size_bytes)
        };
        CacheGroup::over_media(media.into_iter().map(open).collect::<Result<_, _>>()?)
    }

    /// A group over media that are open already, used up to their present length. Each comes with its
    /// name for messages. Blocks as [`CacheGroup::open`] does.
    pub fn from_media(media: Vec<(String, Arc<dyn Media>)>) -> Result<Arc<CacheGroup>, CacheError> {
        let open = |(name, media): (String, Arc<dyn Media>)| {
            let size_bytes =
                media.len_bytes().map_err(|source| CacheError::Io { medium: name.clone(), source })?;
            Medium::open(name, media, size_bytes)
        };
        CacheGroup::over_media(media.into_iter().map(open).collect::<Result<_, _>>()?)
    }

    fn over_media(media: Vec<Medium>) -> Result<Arc<CacheGroup>, CacheError> {
        if media.len() > MEDIA_MAX {
            return Err(CacheError::Unusable(format!(
                "a cache group has at most {MEDIA_MAX} media, not {}",
                media.len()
            )));
        }
        let slots: usize = media.iter().map(|medium| medium.slots().len()).sum();
        let shards = (slots / SLOTS_PER_SHARD).clamp(1, SHARDS_MAX).next_power_of_two();
        let group = CacheGroup {
            writer: Writer::new(media.len()),
            media: MediumSet(media.into()),
            shards: (0..shards).map(|_| Shard::default()).collect(),
            counters: Counters::default(),
        };
        for number in 0..group.media.0.len() {
            group.find_chunks(number);
        }
        for shard in &group.shards {
            shard.lock().set_out();
        }
        Ok(Arc::new(group))
    }

    /// Enters what a medium's directory names. A directory that cannot be read makes the rest of its
    /// medium empty.
    fn find_chunks(&self, number: usize) {
        let medium = &self.media.0[number];
        let slots = medium.slots().len() as u32;
        let mut visited = 0;
        let read = medium.read_directory(|index, hash| {
            visited = index + 1;
            let id = SlotId::new(number, index);
            let is_entered =
                hash.is_some_and(|hash| self.shard(&hash).lock().add_found(&self.media, id, &hash));
            if !is_entered {
                self.add_free(id);
            }
        });
        if let Err(error) = read {
            medium.note_error(&error);
            (visited..slots).for_each(|index| self.add_free(SlotId::new(number, index)));
        }
    }

    fn add_free(&self, id: SlotId) {
        // Any shard may have any slot; in turn, each gets the same number.
        self.shards[id.index() as usize % self.shards.len()].lock().add_free(id);
    }

    /// The chunks of `upstream`, cached. Fetches of one chunk are one fetch, also across several such
    /// sources of one group. The futures need a Tokio runtime.
    pub fn over(self: &Arc<Self>, upstream: Arc<dyn ChunkSource>) -> Arc<dyn ChunkSource> {
        Arc::new(Cached { group: Arc::clone(self), upstream })
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
        let capacity = |medium: &Medium| if medium.is_failed() { 0 } else { medium.slots().len() as u64 };
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
            resident_chunks: self.shards.iter().map(|shard| shard.lock().resident() as u64).sum(),
            capacity_chunks: self.media.0.iter().map(capacity).sum(),
            failed_media: self.media.0.iter().filter(|medium| medium.is_failed()).count() as u64,
        }
    }

    /// Waits until every chunk that has arrived is stored: for a clean shutdown and for tests.
    pub async fn settled(&self) {
        self.writer.settled().await;
    }

    fn shard(&self, hash: &ChunkHash) -> &Shard {
        // The leading bits choose the shard, the trailing ones the place in its table.
        let shards = self.shards.len() as u64;
        &self.shards[(hash.prefix().rotate_left(16) % shards) as usize]
    }

    fn note_hit(&self, shard: &Shard, id: SlotId, seen: Seen) {
        self.media.slot(id).count_use(seen, shard.epoch());
        add(&shard.hits, 1);
    }

    /// The slot that holds the chunk. A chunk on a medium that failed is dropped as it comes by.
    fn find(&self, index: &mut Index, hash: &ChunkHash) -> Option<(SlotId, Seen)> {
        let id = index.find(&self.media, hash)?;
        if self.media.is_failed(id) {
            index.drop_chunk(&self.media, id);
            return None;
        }
        Some((id, self.media.slot(id).see()))
    }

    /// Finds the chunk or joins its fetch, which begins here if there is none.
    fn locate(
        self: &Arc<Self>,
        hash: ChunkHash,
        priority: Priority,
        upstream: &Arc<dyn ChunkSource>,
    ) -> Whereabouts {
        let shard = self.shard(&hash);
        let mut index = shard.lock();
        if let Some((id, seen)) = self.find(&mut index, &hash) {
            return Whereabouts::Stored(id, seen);
        }
        if let Some(flight) = index.flights.get(&hash) {
            if let Some(chunk) = flight.arrived() {
                add(&shard.hits, 1);
                return Whereabouts::Arrived(chunk);
            }
            add(&self.counters.coalesced, 1);
            return Whereabouts::Coming(flight.join(priority));
        }
        add(&self.counters.misses, 1);
        let flight = Arc::new(Flight::new(identity(upstream)));
        let waiter = flight.join(priority);
        index.flights.insert(hash, Arc::clone(&flight));
        let journey = Journey::new(Arc::clone(self), hash, flight);
        tokio::spawn(journey.run(Arc::clone(upstream)));
        Whereabouts::Coming(waiter)
    }

    /// Reads and verifies a stored chunk. `None` if it is not there any more, or never was what it was
    /// said to be; then it is not found again.
    async fn read_chunk(&self, hash: ChunkHash, id: SlotId, seen: Seen) -> Option<Chunk> {
        let medium = self.media.medium(id);
        let mut bytes = vec![0; CHUNK_BYTES];
        let read = asyncio::read(medium.media(), medium.slot_offset(id.index()), &mut bytes).await;
        if let Err(error) = &read {
            medium.note_error(error);
        } else if let Ok(chunk) = Chunk::verify(hash, Bytes::from(bytes)) {
            self.media.slot(id).mark_ready(seen);
            self.note_hit(self.shard(&hash), id, seen);
            return Some(chunk);
        }
        let mut index = self.shard(&hash).lock();
        if self.media.slot(id).is_still(seen) {
            index.drop_chunk(&self.media, id);
            add(&self.counters.dropped, 1);
        }
        None
    }

    /// Writes an arrived chunk to its slot and lets it be found there. Runs on the blocking pool.
    fn store(&self, id: SlotId, chunk: &Chunk) {
        let (medium, hash) = (self.media.medium(id), chunk.hash());
        let shard = self.shard(&hash);
        match medium.write(id.index(), chunk) {
            Ok(()) => shard.enter(&self.media, id, &hash),
            Err(error) => {
                medium.note_error(&error);
                add(&self.counters.unstored, 1);
                let mut index = shard.lock();
                index.release(id);
                index.flights.remove(&hash);
            }
        }
    }

    /// Copies from the slot, if it holds the chunk, verified, and its bytes are in memory.
    fn copy_now(&self, shard: &Shard, id: SlotId, hash: &ChunkHash, offset: usize, buf: &mut [u8]) -> Now {
        let Some(slot) = self.media.get(id) else { return Now::Wait };
        let Some(seen) = slot.see_chunk(hash) else { return Now::Wait };
        let medium = self.media.medium(id);
        if seen.stage() != Stage::Ready || medium.is_failed() {
            return Now::Wait;
        }
        match medium.media().read_at_now(medium.slot_offset(id.index()) + offset as u64, buf) {
            Ok(Now::Done) if slot.is_still(seen) => {
                self.note_hit(shard, id, seen);
                Now::Done
            }
            Ok(_) => Now::Wait,
            Err(error) => {
                medium.note_error(&error);
                Now::Wait
            }
        }
    }
}

/// Which source this is, for comparing.
fn identity(source: &Arc<dyn ChunkSource>) -> usize {
    Arc::as_ptr(source).cast::<()>() as usize
}

fn open_file(spec: &MediaSpec) -> Result<(FileMedia, u64), Result<InUse, io::Error>> {
    let file = FileMedia::open_or_create(&spec.path).map_err(Err)?;
    file.lock().map_err(Err)?.map_err(Ok)?;
    let size_bytes = if file.is_device() {
        spec.size_bytes.min(Media::len_bytes(&file).map_err(Err)?)
    } else {
        spec.size_bytes
    };
    Ok((file, size_bytes))
}

#[cfg(test)]
mod tests;
