//! Which blocks of an overlay are its own, on the medium: two header slots and an append-only log
//! (`docs/formats/overlay.md`).
//!
//! Since bits only ever go from 0 to 1, a record says `word |= bits` and the order of records does not
//! matter; a record that is read twice does no harm.
//!
//! Crash: a record is synced before the next is written, so only the last one can be torn, and then its
//! flush was never answered. What follows a bad record tells the two cases apart: nothing valid, a torn
//! tail, which is dropped; a valid later record, damage to what was durable, which is an error. A process that was
//! killed may leave a good record that it did not come to sync: the first round of the next one syncs it.
//!
//! Compaction writes the whole map to a free part of the file, syncs it, and then switches to it with the
//! other header slot. One of the slots is good at any point. This was preferred to a new file and a
//! rename because it needs nothing but [`Media`], so that the crash tests cover it.

use std::io;
use std::sync::Arc;

use block::Geometry;
use block::limits::BLOCK_BYTES;

use super::map::Word;
use crate::Media;

const MAGIC: [u8; 8] = *b"VMOVLMAP";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const SLOT_BYTES: u64 = 4096;
const SLOTS: u64 = 2;

/// Where the first log begins: behind the header slots.
const LOG_START: u64 = SLOTS * SLOT_BYTES;

const RECORD_HEADER_BYTES: usize = 24;
const WORD_BYTES: usize = 16;

/// Most words in one record: a megabyte, which bounds the memory that a damaged length can ask for.
const RECORD_WORDS_MAX: usize = 64 * 1024;

/// How far behind a bad record a valid one is looked for: more than any single flush appends at once.
const DAMAGE_SCAN_BYTES: u64 = 16 << 20;

/// Why a log cannot be opened.
#[derive(Debug)]
pub(super) enum LogError {
    Damaged(String),
    Io(io::Error),
}

impl From<io::Error> for LogError {
    fn from(error: io::Error) -> LogError {
        LogError::Io(error)
    }
}

fn damaged<T>(what: impl Into<String>) -> Result<T, LogError> {
    Err(LogError::Damaged(what.into()))
}

/// What a failed write to the log left behind.
#[derive(Debug)]
pub(super) enum AppendError {
    /// The log as it was: the same words can be appended again.
    Intact(io::Error),
    /// Nobody knows: the medium may have kept or forgotten what was written, and no later sync would
    /// say so.
    Unknown(io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    size_bytes: u64,
    generation: u64,
    log_start: u64,
    snapshot_bytes: u64,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        out[16..24].copy_from_slice(&self.size_bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.generation.to_le_bytes());
        out[32..40].copy_from_slice(&self.log_start.to_le_bytes());
        out[40..48].copy_from_slice(&self.snapshot_bytes.to_le_bytes());
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` if these bytes are no complete header, `Damaged` if they are one of another version.
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Option<Header>, LogError> {
        if bytes[..8] != MAGIC || u32_at(bytes, 60) != crc32c::crc32c(&bytes[..60]) {
            return Ok(None);
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return damaged(format!("its format has version {version}, this program knows {VERSION}"));
        }
        let header = Header {
            size_bytes: u64_at(bytes, 16),
            generation: u64_at(bytes, 24),
            log_start: u64_at(bytes, 32),
            snapshot_bytes: u64_at(bytes, 40),
        };
        let is_possible = u32_at(bytes, 12) == BLOCK_BYTES as u32
            && Geometry::new(header.size_bytes).is_some()
            && header.log_start >= LOG_START
            && header.snapshot_bytes >= RECORD_HEADER_BYTES as u64
            && header.log_start.checked_add(header.snapshot_bytes).is_some()
            && header.generation < u64::MAX;
        if is_possible { Ok(Some(header)) } else { damaged("its header is impossible") }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn encode_record(generation: u64, sequence: u64, words: &[Word]) -> Vec<u8> {
    let mut out = Vec::with_capacity(RECORD_HEADER_BYTES + words.len() * WORD_BYTES);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(words.len() as u32).to_le_bytes());
    out.extend_from_slice(&generation.to_le_bytes());
    out.extend_from_slice(&sequence.to_le_bytes());
    for word in words {
        out.extend_from_slice(&word.index.to_le_bytes());
        out.extend_from_slice(&word.bits.to_le_bytes());
    }
    let crc = crc32c::crc32c(&out[4..]);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The head of a record, not yet checked against its checksum.
struct RecordHead {
    words: usize,
    generation: u64,
    sequence: u64,
}

impl RecordHead {
    /// `None` if `bytes` is too short or claims more words than a record may have.
    fn decode(bytes: &[u8]) -> Option<RecordHead> {
        let head = bytes.get(..RECORD_HEADER_BYTES)?;
        let words = u32_at(head, 4) as usize;
        let plausible = words <= RECORD_WORDS_MAX;
        plausible.then(|| RecordHead { words, generation: u64_at(head, 8), sequence: u64_at(head, 16) })
    }

    fn record_bytes(&self) -> usize {
        RECORD_HEADER_BYTES + self.words * WORD_BYTES
    }
}

/// Whether `bytes` are a whole record with the right checksum.
fn is_intact(record: &[u8]) -> bool {
    u32_at(record, 0) == crc32c::crc32c(&record[4..])
}

/// The durable side of a block map. Owned by whoever runs the flushes.
pub(super) struct MapLog {
    media: Arc<dyn Media>,
    header: Header,
    end: u64,
    sequence: u64,
    /// Whether all that was read or written is durable.
    is_synced: bool,
}

impl MapLog {
    /// Writes an empty log for a disk of `size_bytes`. It is durable once it is [synced](MapLog::sync).
    pub(super) fn create(media: Arc<dyn Media>, size_bytes: u64) -> io::Result<MapLog> {
        let record = encode_record(1, 0, &[]);
        let header =
            Header { size_bytes, generation: 1, log_start: LOG_START, snapshot_bytes: record.len() as u64 };
        media.set_len(LOG_START)?;
        media.write_at(LOG_START, &record)?;
        media.write_at(slot_offset(&header), &header.encode())?;
        Ok(MapLog { media, end: LOG_START + header.snapshot_bytes, header, sequence: 1, is_synced: false })
    }

    /// Makes durable what was written when the log was created, or read when it was opened.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if !self.is_synced {
            self.media.sync()?;
            self.is_synced = true;
        }
        Ok(())
    }

    /// Reads the log and hands every durable word to `apply`, which says whether it is possible.
    pub(super) fn open(
        media: Arc<dyn Media>,
        mut apply: impl FnMut(&MapLog, Word) -> bool,
    ) -> Result<MapLog, LogError> {
        let header = newest_header(&*media)?;
        let mut log = MapLog { media, header, end: header.log_start, sequence: 0, is_synced: false };
        let snapshot_end = header.log_start + header.snapshot_bytes;
        while let Some(record) = log.next_record()? {
            for word in record[RECORD_HEADER_BYTES..].chunks_exact(WORD_BYTES) {
                let word = Word { index: u64_at(word, 0), bits: u64_at(word, 8) };
                if !apply(&log, word) {
                    return damaged(format!("it allocates blocks beyond the disk (word {})", word.index));
                }
            }
            log.end += record.len() as u64;
            log.sequence += 1;
        }
        if log.end < snapshot_end {
            return damaged(format!("the record at byte {} is corrupt", log.end));
        }
        log.drop_tail()?;
        Ok(log)
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    /// Length of the log in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.end - self.header.log_start
    }

    /// Length that the log would have if it were written anew with `words` words.
    pub(super) fn bytes_of(words: u64) -> u64 {
        words * WORD_BYTES as u64
            + words.div_ceil(RECORD_WORDS_MAX as u64).max(1) * RECORD_HEADER_BYTES as u64
    }

    /// Makes `words` durable, and what was there when the log was opened.
    pub(super) fn append(&mut self, words: &[Word]) -> Result<(), AppendError> {
        self.sync().map_err(AppendError::Unknown)?;
        for words in words.chunks(RECORD_WORDS_MAX) {
            let record = encode_record(self.header.generation, self.sequence, words);
            self.media.write_at(self.end, &record).map_err(AppendError::Intact)?;
            self.media.sync().map_err(AppendError::Unknown)?;
            self.end += record.len() as u64;
            self.sequence += 1;
        }
        Ok(())
    }

    /// Writes the log anew so that it says exactly `words`, and gives the old one's space back.
    pub(super) fn rewrite(&mut self, words: &[Word]) -> Result<(), AppendError> {
        let generation = self.header.generation + 1;
        let snapshot_bytes = MapLog::bytes_of(words.len() as u64);
        let fits_in_front = LOG_START + snapshot_bytes <= self.header.log_start;
        let log_start = if fits_in_front { LOG_START } else { self.end.next_multiple_of(SLOT_BYTES) };
        let mut end = log_start;
        let mut sequence = 0;
        let empty: &[Word] = &[];
        let records = words.chunks(RECORD_WORDS_MAX).chain(words.is_empty().then_some(empty));
        for words in records {
            let record = encode_record(generation, sequence, words);
            self.media.write_at(end, &record).map_err(AppendError::Intact)?;
            end += record.len() as u64;
            sequence += 1;
        }
        self.media.sync().map_err(AppendError::Unknown)?;
        let header = Header { generation, log_start, snapshot_bytes, ..self.header };
        self.media.write_at(slot_offset(&header), &header.encode()).map_err(AppendError::Unknown)?;
        self.media.sync().map_err(AppendError::Unknown)?;
        let old = self.header.log_start..self.end;
        (self.header, self.end, self.sequence) = (header, end, sequence);
        if let Err(error) = self.media.punch_hole(old.start, old.end - old.start) {
            tracing::warn!(%error, "overlay_map_not_trimmed");
        }
        Ok(())
    }

    /// The record at the end, if there is a good one.
    fn next_record(&self) -> io::Result<Option<Vec<u8>>> {
        let mut head = [0; RECORD_HEADER_BYTES];
        let left = self.media.len_bytes()?.saturating_sub(self.end);
        if left < RECORD_HEADER_BYTES as u64 {
            return Ok(None);
        }
        self.media.read_at(self.end, &mut head)?;
        let Some(head) = RecordHead::decode(&head) else { return Ok(None) };
        let fits = head.record_bytes() as u64 <= left;
        if !fits || head.generation != self.header.generation || head.sequence != self.sequence {
            return Ok(None);
        }
        let mut record = vec![0; head.record_bytes()];
        self.media.read_at(self.end, &mut record)?;
        Ok(is_intact(&record).then_some(record))
    }

    /// Clears what lies behind the last good record, after making sure that it is nothing durable.
    fn drop_tail(&self) -> Result<(), LogError> {
        let left = self.media.len_bytes()?.saturating_sub(self.end);
        let mut tail = vec![0; left.min(DAMAGE_SCAN_BYTES) as usize];
        self.media.read_at(self.end, &mut tail)?;
        for at in (0..tail.len()).step_by(8) {
            let Some(head) = RecordHead::decode(&tail[at..]) else { continue };
            if head.generation == self.header.generation
                && head.sequence > self.sequence
                && tail.get(at..at + head.record_bytes()).is_some_and(is_intact)
            {
                return damaged(format!(
                    "the record at byte {} is corrupt, and later ones are not",
                    self.end
                ));
            }
        }
        if tail.iter().any(|&byte| byte != 0) {
            self.media.punch_hole(self.end, left)?;
        }
        Ok(())
    }
}

fn slot_offset(header: &Header) -> u64 {
    header.generation % SLOTS * SLOT_BYTES
}

fn newest_header(media: &dyn Media) -> Result<Header, LogError> {
    let mut newest: Option<Header> = None;
    let len = media.len_bytes()?;
    for slot in 0..SLOTS {
        let mut bytes = [0; HEADER_BYTES];
        if (slot * SLOT_BYTES + HEADER_BYTES as u64) > len {
            continue;
        }
        media.read_at(slot * SLOT_BYTES, &mut bytes)?;
        if let Some(header) = Header::decode(&bytes)?
            && newest.is_none_or(|newest| newest.generation < header.generation)
        {
            newest = Some(header);
        }
    }
    newest.ok_or_else(|| LogError::Damaged("neither of its two headers is intact".to_owned()))
}

#[cfg(test)]
mod tests;
