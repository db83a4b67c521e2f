//! What the image of a storm holds: bytes that anybody can compute from a seed and a position.
//!
//! Each word of eight bytes is a hash of the seed and of its own place, so that nothing compresses, no chunk
//! comes twice, and a reader can tell a byte from the wrong place, the wrong chunk or the wrong VM by looking
//! at a single word. What VMs write is made in the same way, from a seed of the VM and of the write.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use block::limits::CHUNK_BYTES;

use super::super::Outcome;

/// Bytes of a word.
pub(super) const WORD_BYTES: u64 = 8;

/// Bytes of a chunk, as an offset.
pub(super) const CHUNK: u64 = CHUNK_BYTES as u64;

/// The word at a place, which is counted in words. (SplitMix64's finalizer: equal to no other place's word
/// under the same seed.)
pub(super) fn word(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Fills `buf` with what lies at `offset`. Both are whole words.
pub(super) fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    for (word_of_buf, place) in buf.chunks_exact_mut(WORD_BYTES as usize).zip(offset / WORD_BYTES..) {
        word_of_buf.copy_from_slice(&word(seed, place).to_le_bytes());
    }
}

/// Writes a sparse image of `size_bytes`: the chunks in `wanted`, and others from the front until there are
/// `data_bytes` in all.
pub(super) fn write_image(
    path: &Path,
    seed: u64,
    size_bytes: u64,
    wanted: &BTreeSet<u64>,
    data_bytes: u64,
) -> Outcome {
    let failed = |e: std::io::Error| format!("cannot write {}: {e}", path.display());
    let file = File::create(path).map_err(failed)?;
    file.set_len(size_bytes).map_err(failed)?;
    let room = (data_bytes / CHUNK).saturating_sub(wanted.len() as u64) as usize;
    let rest = (0..size_bytes / CHUNK).filter(|chunk| !wanted.contains(chunk)).take(room);
    let mut buf = vec![0; CHUNK as usize];
    for chunk in wanted.iter().copied().chain(rest) {
        let offset = chunk * CHUNK;
        let len = CHUNK.min(size_bytes - offset) as usize;
        fill(seed, offset, &mut buf[..len]);
        file.write_all_at(&buf[..len], offset).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_holds_the_wanted_chunks_and_no_more_data_than_was_asked_for() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let size_bytes = 64 * CHUNK;
        write_image(&path, 7, size_bytes, &BTreeSet::from([3, 40]), 4 * CHUNK).unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size_bytes);
        assert!(file.metadata().unwrap().blocks() * 512 <= 5 * CHUNK);
        let at = |offset: u64| {
            let mut buf = [0; 8];
            file.read_exact_at(&mut buf, offset).unwrap();
            u64::from_le_bytes(buf)
        };
        for chunk in [0, 1, 3, 40] {
            assert_eq!(at(chunk * CHUNK + 16), word(7, chunk * CHUNK / 8 + 2), "chunk {chunk}");
        }
        assert_eq!(at(2 * CHUNK), 0);
    }

    #[test]
    fn a_word_tells_its_place_and_its_seed() {
        assert_ne!(word(1, 5), word(1, 6));
        assert_ne!(word(1, 5), word(2, 5));
    }
}
