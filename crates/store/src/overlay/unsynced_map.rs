//! Which blocks an overlay allocated since the machine started, for a process that is killed.
//!
//! What was answered is in the page cache, and a guest goes on when its daemon is killed and started again:
//! to it, nothing happened. So a block that was written and not flushed yet must still be the overlay's own
//! then. Its bytes are in the data file; this file says that they count. It is written before a change is
//! answered and never synced, because after a power cut, which ends the guests too, it means nothing: it
//! bears the number that the kernel drew at its start, and is ignored under another.
//!
//! Crash: bits are only added, so that any part of an interrupted write is right.

use std::io;
use std::sync::Arc;

use super::map::Word;
use crate::Media;

const MAGIC: [u8; 8] = *b"VMOVLIVE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;

/// Where the words begin.
const WORDS_START: u64 = 4096;

const WORD_BYTES: usize = 8;

/// How much is read at a time.
const PIECE_BYTES: usize = 64 * 1024;

/// One run of the machine, from its start to its end: what the page cache holds lives as long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// The present run of this machine, as Linux names it in `/proc/sys/kernel/random/boot_id`.
    pub fn current() -> io::Result<BootId> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let number = u128::from_str_radix(&digits, 16).map_err(io::Error::other)?;
        Ok(BootId(number.to_le_bytes()))
    }
}

/// The file `live` of an open overlay.
pub(super) struct UnsyncedMap {
    media: Arc<dyn Media>,
}

impl UnsyncedMap {
    /// Begins anew: nothing was allocated.
    pub(super) fn create(media: Arc<dyn Media>, boot: BootId) -> io::Result<UnsyncedMap> {
        // In this order: killed in between, the file has no head, and is nobody's.
        media.set_len(0)?;
        media.write_at(0, &header(boot))?;
        Ok(UnsyncedMap { media })
    }

    /// Hands all words to `apply` if they are of this run of the machine, and begins anew if not. `apply` says
    /// whether a word is possible; the first that is not is the error. `lost` is told if nobody knows of which run
    /// they are: a power cut leaves that, and then it costs nothing, but so does damage.
    pub(super) fn open(
        media: Arc<dyn Media>,
        boot: BootId,
        lost: impl FnOnce(),
        mut apply: impl FnMut(Word) -> bool,
    ) -> io::Result<Result<UnsyncedMap, Word>> {
        let len = media.len_bytes()?;
        let mut head = [0; HEADER_BYTES];
        if len >= HEADER_BYTES as u64 {
            media.read_at(0, &mut head)?;
        }
        if head != header(boot) {
            if !is_header(&head) {
                lost();
            }
            return UnsyncedMap::create(media, boot).map(Ok);
        }
        let mut piece = vec![0; PIECE_BYTES];
        let mut at = WORDS_START;
        while at < len {
            let piece = &mut piece[..PIECE_BYTES.min((len - at) as usize)];
            media.read_at(at, piece)?;
            let first = (at - WORDS_START) / WORD_BYTES as u64;
            for (index, word) in (first..).zip(piece.as_chunks::<WORD_BYTES>().0) {
                let word = Word { index, bits: u64::from_le_bytes(*word) };
                if word.bits != 0 && !apply(word) {
                    return Ok(Err(word));
                }
            }
            at += piece.len() as u64;
        }
        Ok(Ok(UnsyncedMap { media }))
    }

    /// Notes the words from number `first` on, each as eight bytes.
    pub(super) fn write(&self, first: u64, words: &[u8]) -> io::Result<()> {
        self.media.write_at(WORDS_START + first * WORD_BYTES as u64, words)
    }
}

/// Whether these bytes are the whole header of some run of some machine.
fn is_header(head: &[u8; HEADER_BYTES]) -> bool {
    let boot = head[12..28].try_into().expect("sixteen bytes");
    *head == header(BootId(boot))
}

fn header(boot: BootId) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..28].copy_from_slice(&boot.0);
    let crc = crc32c::crc32c(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryMedia;

    const BOOT: BootId = BootId([7; 16]);

    fn words(media: &Arc<MemoryMedia>, boot: BootId) -> Vec<Word> {
        let mut words = Vec::new();
        let lost = || panic!("its header is whole");
        let opened = UnsyncedMap::open(Arc::clone(media) as _, boot, lost, |word| {
            words.push(word);
            true
        });
        assert!(opened.unwrap().is_ok());
        words
    }

    #[test]
    fn a_header_that_is_not_whole_is_told_and_begun_anew() {
        for damage in [&b"VMOVLIVF"[..], &[0; HEADER_BYTES]] {
            let media = Arc::new(MemoryMedia::default());
            let unsynced = UnsyncedMap::create(Arc::clone(&media) as _, BOOT).unwrap();
            unsynced.write(3, &1u64.to_le_bytes()).unwrap();
            media.write_at(0, damage).unwrap();
            let mut told = 0;
            let opened = UnsyncedMap::open(Arc::clone(&media) as _, BOOT, || told += 1, |_| false);
            assert!(opened.unwrap().is_ok());
            assert_eq!(told, 1);
            assert_eq!(words(&media, BOOT), []);
        }
    }

    #[test]
    fn words_count_until_the_machine_starts_anew() {
        let media = Arc::new(MemoryMedia::default());
        let unsynced = UnsyncedMap::create(Arc::clone(&media) as _, BOOT).unwrap();
        unsynced.write(20_000, &5u64.to_le_bytes()).unwrap();
        unsynced.write(3, &[1u64.to_le_bytes(), 2u64.to_le_bytes()].concat()).unwrap();
        let expected = [(3, 1), (4, 2), (20_000, 5)].map(|(index, bits)| Word { index, bits });
        assert_eq!(words(&media, BOOT), expected);
        assert_eq!(words(&media, BootId([8; 16])), []);
        assert_eq!(words(&media, BOOT), [], "the second run began anew");
    }

    #[test]
    fn the_header_has_its_golden_bytes() {
        let media = Arc::new(MemoryMedia::default());
        UnsyncedMap::create(Arc::clone(&media) as _, BOOT).unwrap();
        let mut head = [0; HEADER_BYTES];
        media.read_at(0, &mut head).unwrap();
        let expected = [&b"VMOVLIVE"[..], &[1, 0, 0, 0], &[7; 16]].concat();
        assert_eq!(head[..28], expected);
        assert_eq!(media.len_bytes().unwrap(), HEADER_BYTES as u64);
    }

    #[test]
    fn this_machine_has_a_number_for_its_run() {
        assert_eq!(BootId::current().unwrap(), BootId::current().unwrap());
    }
}
