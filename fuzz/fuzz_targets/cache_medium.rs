//! A cache medium in any state that a crash, a bad disk or an attacker leaves it in.
//!
//! Checked: foreign data is refused and left alone; whatever else is on the medium, a reader gets the bytes
//! that it asked for, also with a slot hint that is nonsense.

#![no_main]

use std::sync::{Arc, LazyLock};

use block::limits::CHUNK_BYTES;
use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, Priority, SlotHint, TryIo};
use fuzz::Input;
use fuzz::frames::{CHUNKS, chunk};
use store::{CacheError, CacheGroup, Media, MemoryMedia};
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime without drivers needs nothing"));

/// One less than there are chunks, so that chunks must make room for each other.
const SLOTS: u64 = 3;
const SLOTS_OFFSET: u64 = 65_536;
const SLOT_BYTES: u64 = CHUNK_BYTES as u64;

fn medium(input: &mut Input<'_>) -> Arc<MemoryMedia> {
    let medium = Arc::new(MemoryMedia::new(SLOTS_OFFSET + SLOTS * SLOT_BYTES));
    let write = |offset, bytes: &[u8]| medium.write_at(offset, bytes).expect("memory takes all");
    let id = u64::from(input.u8());
    let mut header = input.pick(&[b"VMCHUNKS", b"VMCHUNKS", b"LUKS\xba\xbe\0\x02"]).to_vec();
    header.extend(input.pick(&[1u32, 1, 2]).to_le_bytes());
    header.extend((CHUNK_BYTES as u32).to_le_bytes());
    header.extend(input.pick(&[SLOTS, SLOTS, u64::MAX]).to_le_bytes());
    header.extend(id.to_le_bytes());
    header.resize(60, 0);
    let crc = crc32c::crc32c(&header) ^ u32::from(input.u8() == 255);
    header.extend(crc.to_le_bytes());
    write(0, &header);
    for slot in 0..SLOTS {
        let mut entry = chunk(input).hash().as_bytes().to_vec();
        let covered = [&entry[..], &id.to_le_bytes(), &slot.to_le_bytes()].concat();
        let crc = crc32c::crc32c(&covered) ^ u32::from(input.u8() == 255);
        entry.extend(crc.to_le_bytes());
        write(4096 + slot * 40, &entry);
        write(SLOTS_OFFSET + slot * SLOT_BYTES, chunk(input).bytes());
        write(SLOTS_OFFSET + slot * SLOT_BYTES + u64::from(input.u16()), input.bytes(1));
    }
    medium
}

fn read(source: &dyn ChunkSource, hint: &SlotHint, input: &mut Input<'_>) {
    let wanted = chunk(input);
    match input.u8() % 4 {
        0 | 1 => {
            let priority = input.pick(&[Priority::Guest, Priority::Background]);
            let found = RUNTIME.block_on(source.fetch(wanted.hash(), priority)).expect("all is to be had");
            assert_eq!(found.bytes(), wanted.bytes(), "the wrong chunk");
        }
        2 => {
            let offset = input.below(CHUNK_BYTES);
            let mut found = vec![0; input.below(CHUNK_BYTES - offset)];
            if source.try_read(&wanted.hash(), hint, offset, &mut found) == TryIo::Done {
                assert_eq!(found, wanted.bytes()[offset..offset + found.len()], "the wrong bytes");
            }
        }
        _ => hint.set(input.u64()),
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let medium = medium(&mut input);
    let mut before = vec![0; 65_536];
    medium.read_at(0, &mut before).expect("it is there");
    let group = match CacheGroup::from_media(vec![("medium".to_owned(), medium.clone())]) {
        Ok(group) => group,
        Err(CacheError::Foreign(_)) => {
            let mut after = vec![0; 65_536];
            medium.read_at(0, &mut after).expect("it is there");
            assert_eq!(before, after, "foreign data was changed");
            return;
        }
        Err(error) => panic!("memory never fails: {error}"),
    };
    let source = group.over(Arc::new(AllChunks));
    let hint = SlotHint::default();
    while !input.is_empty() {
        read(&*source, &hint, &mut input);
    }
    RUNTIME.block_on(group.settled());
    assert!(group.stats().resident_chunks <= SLOTS);
});

/// Has every chunk at once.
struct AllChunks;

impl ChunkSource for AllChunks {
    fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let found = CHUNKS.iter().find(|known| known.hash() == chunk).cloned();
        Box::pin(async move { found.ok_or(FetchError::NotHere(chunk)) })
    }
}
