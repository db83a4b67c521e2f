//! One medium of a cache group: a header, a directory and slots (`docs/formats/cache.md`).
//!
//! Nothing but a new header is synced. A directory entry only *suggests* which chunk a slot holds: the chunk proves
//! it by its hash. So after a crash entries and slots may be torn, lost or old in any combination.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::limits::{BLOCK_BYTES, CHUNK_BYTES};
use block::{Chunk, ChunkHash, TryIo};
use tokio::sync::watch;

use super::health::Health;
use super::set::SlotId;
use super::slot::Slot;
use super::writer::Queue;
use super::{CacheError, SLOTS_PER_MEDIUM_MAX};
use crate::{Media, asyncio};

const MAGIC: [u8; 8] = *b"VMCHUNKS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const DIRECTORY_OFFSET: u64 = 4096;
const ENTRY_BYTES: usize = 40;
const CHUNK: u64 = CHUNK_BYTES as u64;

/// How much of the beginning must be zero, or a cache, before a medium is taken: partition tables and
/// the superblocks of common file systems lie within.
const FOREIGN_CHECK_BYTES: u64 = 128 * 1024;

/// Entries of the directory read at a time.
const ENTRIES_PER_READ: usize = 16 * 1024;

/// Where everything is on a medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    slots: u64,
    slots_offset: u64,
}

impl Layout {
    fn slots_offset(slots: u64) -> u64 {
        (DIRECTORY_OFFSET + slots * ENTRY_BYTES as u64).next_multiple_of(CHUNK)
    }

    /// The layout with the most slots within `size_bytes`.
    fn within(size_bytes: u64) -> Layout {
        let mut slots = (size_bytes / (CHUNK + ENTRY_BYTES as u64)).min(SLOTS_PER_MEDIUM_MAX);
        while slots > 0 && Layout::slots_offset(slots) + slots * CHUNK > size_bytes {
            slots -= 1;
        }
        Layout { slots, slots_offset: Layout::slots_offset(slots) }
    }

    /// The same, unless that is none at all.
    pub(super) fn must_hold_a_chunk(name: &str, size_bytes: u64) -> Result<Layout, CacheError> {
        let layout = Layout::within(size_bytes);
        if layout.slots > 0 {
            return Ok(layout);
        }
        Err(CacheError::Unusable(format!(
            "cache medium '{name}' is too small: {size_bytes} bytes hold no chunk, {} do",
            Layout::slots_offset(1) + CHUNK
        )))
    }

    fn size_bytes(&self) -> u64 {
        self.slots_offset + self.slots * CHUNK
    }
}

/// What a medium is called, and which part of its storage is used.
pub(super) struct Terms {
    /// Its number in the group.
    pub(super) number: usize,
    /// Its name: the path.
    pub(super) name: String,
    /// How many bytes of it may be used.
    pub(super) size_bytes: u64,
}

/// One medium. Whoever reads or writes it holds it, so it is closed, and its file free for others, when the last has
/// let go of it. That may be a guest's read; it then pays for giving back the slots' memory, a millisecond for
/// each 20 GiB or so.
pub(super) struct Medium {
    terms: Terms,
    media: Arc<dyn Media>,
    layout: Layout,
    id: u64,
    slots: Box<[Slot]>,
    /// How many slots hold a chunk.
    resident: AtomicU64,
    pub(super) health: Health,
    /// Chunks on their way here.
    pub(super) queue: Queue,
    /// Dropped when everything above is.
    gone: watch::Sender<()>,
}

impl Medium {
    /// Takes a medium: as it is if it holds a cache of just this layout, else as empty.
    pub(super) fn open(terms: Terms, media: Arc<dyn Media>) -> Result<Medium, CacheError> {
        let Terms { name, size_bytes, .. } = &terms;
        let layout = Layout::must_hold_a_chunk(name, *size_bytes)?;
        let id = match Medium::take(&*media, layout) {
            Ok(Some(id)) => id,
            Ok(None) => return Err(CacheError::Foreign(name.clone())),
            Err(source) => return Err(CacheError::Io { medium: name.clone(), source }),
        };
        Ok(Medium {
            terms,
            media,
            layout,
            id,
            slots: (0..layout.slots).map(|_| Slot::default()).collect(),
            resident: AtomicU64::new(0),
            health: Health::default(),
            queue: Queue::default(),
            gone: watch::Sender::new(()),
        })
    }

    /// The id in the medium's header, which is written if there is none of this layout. `None` if the
    /// medium holds something else.
    fn take(media: &dyn Media, layout: Layout) -> io::Result<Option<u64>> {
        let mut start = vec![0; FOREIGN_CHECK_BYTES.min(media.len_bytes()?) as usize];
        media.read_at(0, &mut start)?;
        let is_cache = start.starts_with(&MAGIC);
        if !is_cache && start.iter().any(|&byte| byte != 0) {
            return Ok(None);
        }
        media.set_len(layout.size_bytes())?;
        if let Some(id) = start.get(..HEADER_BYTES).and_then(|header| decode_header(header, layout)) {
            return Ok(Some(id));
        }
        // A new id makes all old entries of the directory invalid.
        let id = RandomState::new().hash_one(std::time::SystemTime::now());
        media.write_at(0, &encode_header(layout, id))?;
        // The only sync there is: chunks without a header would be foreign data after a power cut.
        media.sync()?;
        Ok(Some(id))
    }

    pub(super) fn number(&self) -> usize {
        self.terms.number
    }

    pub(super) fn name(&self) -> &str {
        &self.terms.name
    }

    /// How many bytes of it may be used.
    pub(super) fn size_bytes(&self) -> u64 {
        self.terms.size_bytes
    }

    pub(super) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(super) fn slot(&self, id: SlotId) -> &Slot {
        &self.slots[id.index() as usize]
    }

    /// How many slots hold a chunk.
    pub(super) fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// Notes that one more slot holds a chunk.
    pub(super) fn count_filled(&self) {
        self.resident.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that one slot less holds a chunk.
    pub(super) fn count_emptied(&self) {
        self.resident.fetch_sub(1, Ordering::Relaxed);
    }

    /// Says when the medium is closed: then nothing can be received any more.
    pub(super) fn gone(&self) -> watch::Receiver<()> {
        self.gone.subscribe()
    }

    pub(super) fn is_usable(&self) -> bool {
        self.health.is_usable()
    }

    pub(super) fn note_error(&self, error: &io::Error) {
        self.health.note_error(self.name(), error);
    }

    pub(super) fn note_wrong_chunk(&self) {
        self.health.note_wrong_chunk(self.name());
    }

    /// Byte offset of a slot on the medium.
    fn slot_offset(&self, index: u32) -> u64 {
        self.layout.slots_offset + u64::from(index) * CHUNK
    }

    fn try_read(&self, id: SlotId, offset: usize, buf: &mut [u8]) -> io::Result<TryIo> {
        self.media.try_read_at(self.slot_offset(id.index()) + offset as u64, buf)
    }

    /// Copies from the chunk in a slot that is ready, at `offset`, if its bytes are in memory and are what they were when
    /// the chunk was verified. That is not known of bytes in the page cache: another reader, or the kernel ahead of one,
    /// may have brought them from the device a moment ago. So each block is compared with its checksum.
    pub(super) fn try_copy(&self, id: SlotId, offset: usize, buf: &mut [u8]) -> io::Result<TryIo> {
        let slot = self.slot(id);
        let read = |block: usize, piece: &mut [u8]| -> io::Result<bool> {
            let is_read = self.try_read(id, block * BLOCK_BYTES, piece)? == TryIo::Done;
            Ok(is_read && slot.has_blocks(block, piece))
        };
        let mut done = 0;
        while done < buf.len() {
            let (block, within) = ((offset + done) / BLOCK_BYTES, (offset + done) % BLOCK_BYTES);
            let rest = &mut buf[done..];
            let whole = rest.len() / BLOCK_BYTES * BLOCK_BYTES;
            let (is_read, len) = if within == 0 && whole > 0 {
                (read(block, &mut rest[..whole])?, whole)
            } else {
                // The edge of a range that begins or ends within a block.
                let mut bytes = [0; BLOCK_BYTES];
                let (is_read, len) = (read(block, &mut bytes)?, rest.len().min(BLOCK_BYTES - within));
                rest[..len].copy_from_slice(&bytes[within..within + len]);
                (is_read, len)
            };
            if !is_read {
                return Ok(TryIo::WouldBlock);
            }
            done += len;
        }
        Ok(TryIo::Done)
    }

    /// Reads a whole slot, to be verified. What the blocking pool reads holds the medium, also if nobody waits for it any
    /// more.
    pub(super) async fn read(self: &Arc<Self>, id: SlotId) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; CHUNK_BYTES];
        if self.try_read(id, 0, &mut bytes)? == TryIo::Done {
            return Ok(bytes);
        }
        let medium = Arc::clone(self);
        asyncio::blocking(move || {
            medium.media.read_at(medium.slot_offset(id.index()), &mut bytes)?;
            Ok(bytes)
        })
        .await
    }

    /// Reads the directory and calls `visit` for every slot with the chunk that its entry names, if it
    /// names any.
    pub(super) fn read_directory(&self, mut visit: impl FnMut(u32, Option<ChunkHash>)) -> io::Result<()> {
        let mut bytes = vec![0; ENTRIES_PER_READ * ENTRY_BYTES];
        let mut first = 0;
        while first < self.layout.slots {
            let count = (self.layout.slots - first).min(ENTRIES_PER_READ as u64);
            let piece = &mut bytes[..count as usize * ENTRY_BYTES];
            self.media.read_at(DIRECTORY_OFFSET + first * ENTRY_BYTES as u64, piece)?;
            for (index, entry) in (first..).zip(piece.chunks_exact(ENTRY_BYTES)) {
                visit(index as u32, decode_entry(entry, self.id, index));
            }
            first += count;
        }
        Ok(())
    }

    /// Writes the chunk and then its entry; whichever a crash loses, the other misleads nobody. A file that somebody
    /// cut short would become longer again by that, with holes in the place of chunks, so it is not written to.
    pub(super) fn write(&self, id: SlotId, chunk: &Chunk) -> io::Result<()> {
        let index = id.index();
        self.must_be_whole()?;
        self.media.write_at(self.slot_offset(index), chunk.bytes())?;
        let entry = encode_entry(&chunk.hash(), self.id, u64::from(index));
        self.media.write_at(DIRECTORY_OFFSET + u64::from(index) * ENTRY_BYTES as u64, &entry)?;
        // Or cut short between the question and the write.
        self.must_be_whole()
    }

    fn must_be_whole(&self) -> io::Result<()> {
        if self.media.len_bytes()? < self.layout.size_bytes() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it was cut short while it was in use"));
        }
        Ok(())
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn encode_header(layout: Layout, id: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
    out[16..24].copy_from_slice(&layout.slots.to_le_bytes());
    out[24..32].copy_from_slice(&id.to_le_bytes());
    let crc = crc32c::crc32c(&out[..60]);
    out[60..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The medium's id, if this is an intact header of `layout`.
fn decode_header(bytes: &[u8], layout: Layout) -> Option<u64> {
    let fits = bytes[..8] == MAGIC
        && u32_at(bytes, 8) == VERSION
        && u32_at(bytes, 12) == CHUNK_BYTES as u32
        && u64_at(bytes, 16) == layout.slots
        && u32_at(bytes, 60) == crc32c::crc32c(&bytes[..60]);
    fits.then(|| u64_at(bytes, 24))
}

fn entry_crc(hash: &[u8], id: u64, index: u64) -> u32 {
    let crc = crc32c::crc32c(hash);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &id.to_le_bytes()), &index.to_le_bytes())
}

fn encode_entry(hash: &ChunkHash, id: u64, index: u64) -> [u8; ENTRY_BYTES] {
    let mut out = [0; ENTRY_BYTES];
    out[..32].copy_from_slice(hash.as_bytes());
    out[32..36].copy_from_slice(&entry_crc(hash.as_bytes(), id, index).to_le_bytes());
    out
}

fn decode_entry(bytes: &[u8], id: u64, index: u64) -> Option<ChunkHash> {
    let hash = ChunkHash::from_bytes(bytes[..32].try_into().expect("32 bytes"));
    let fits = !hash.is_zero() && u32_at(bytes, 32) == entry_crc(&bytes[..32], id, index);
    fits.then_some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryMedia;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn open(media: &Arc<MemoryMedia>, size_bytes: u64) -> Result<Medium, CacheError> {
        Medium::open(Terms { number: 0, name: "test".to_owned(), size_bytes }, media.clone())
    }

    fn directory(medium: &Medium) -> Vec<Option<ChunkHash>> {
        let mut found = Vec::new();
        medium.read_directory(|_, hash| found.push(hash)).unwrap();
        found
    }

    proptest! {
        #[test]
        fn a_layout_fits_its_size_and_wastes_less_than_two_slots(size in 0u64..1 << 40) {
            let layout = Layout::within(size);
            prop_assert!(layout.slots == 0 || layout.size_bytes() <= size);
            let more = layout.slots + 2;
            prop_assert!(Layout::slots_offset(more) + more * CHUNK > size);
        }
    }

    #[test]
    fn the_format_is_what_the_document_says() {
        let layout = Layout { slots: 2, slots_offset: 65536 };
        let header = encode_header(layout, 0x1122_3344_5566_7788);
        let golden = b"VMCHUNKS\x01\0\0\0\0\0\x01\0\x02\0\0\0\0\0\0\0\x88\x77\x66\x55\x44\x33\x22\x11";
        assert_eq!(&header[..32], golden);
        assert_eq!(header[32..60], [0; 28]);
        assert_eq!(u32_at(&header, 60), crc32c::crc32c(&header[..60]));
        let hash = ChunkHash::from_bytes([9; 32]);
        let entry = encode_entry(&hash, 1, 2);
        let covered = [&[9; 32][..], &1u64.to_le_bytes(), &2u64.to_le_bytes()].concat();
        assert_eq!(entry[..32], [9; 32]);
        assert_eq!(u32_at(&entry, 32), crc32c::crc32c(&covered));
        assert_eq!(entry[36..], [0; 4]);
    }

    #[test]
    fn a_reopened_medium_names_its_chunks_and_one_of_another_size_is_empty() {
        let media = Arc::new(MemoryMedia::new(0));
        let chunk = Chunk::of(Bytes::from(vec![5; CHUNK_BYTES]));
        open(&media, 300_000).unwrap().write(SlotId::new(0, 2), &chunk).unwrap();
        assert_eq!(directory(&open(&media, 300_000).unwrap()), [None, None, Some(chunk.hash())]);
        assert_eq!(directory(&open(&media, 400_000).unwrap()), [None; 5]);
    }

    #[test]
    fn a_medium_with_foreign_data_is_refused_and_left_alone() {
        let media = Arc::new(MemoryMedia::new(1 << 20));
        media.write_at(0x10040, b"_BHRfS_M").unwrap();
        assert!(matches!(open(&media, 300_000), Err(CacheError::Foreign(_))));
        assert_eq!(media.len_bytes().unwrap(), 1 << 20);
    }

    #[test]
    fn an_entry_with_a_flipped_bit_names_nothing() {
        let entry = encode_entry(&ChunkHash::from_bytes([9; 32]), 1, 2);
        for bit in 0..36 * 8 {
            let mut bad = entry;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_entry(&bad, 1, 2), None, "bit {bit}");
        }
        assert_eq!(decode_entry(&entry, 1, 3), None, "an entry of another slot");
        assert_eq!(decode_entry(&entry, 7, 2), None, "an entry from before the medium was taken anew");
    }
}
