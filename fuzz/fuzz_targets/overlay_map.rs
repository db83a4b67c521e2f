//! The map and the live file of an overlay, damaged in any way that checksums do not tell.
//!
//! Checked: it is refused or opened, and an overlay that was opened keeps what is written to it from then on
//! and can be opened again.

#![no_main]

use std::sync::{Arc, LazyLock};

use block::limits::{BLOCK_BYTES, DISK_BYTES_MAX};
use block::{Disk, TryIo};
use fuzz::{Input, NoBase};
use store::{BootId, Media, MemoryMedia, Overlay, OverlayMedia};
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().build().expect("a runtime without drivers needs nothing"));

/// Where the first record is unless the header says otherwise.
const LOG_START: u64 = 8192;

fn header(input: &mut Input<'_>) -> Vec<u8> {
    let any = input.u64();
    let size_bytes = input.pick(&[1 << 20, 4097, 1, DISK_BYTES_MAX, DISK_BYTES_MAX + 1, 0, any]);
    let generation = input.pick(&[1, 2, 3, any]);
    let log_start = input.pick(&[LOG_START, 2 * LOG_START, u64::MAX, any]);
    let snapshot_bytes = input.pick(&[24, 40, 64, any]);
    let mut out = b"VMOVLMAP".to_vec();
    out.extend(input.pick(&[1u32, 1, 1, 2]).to_le_bytes());
    out.extend(input.pick(&[4096u32, 4096, 4096, 512]).to_le_bytes());
    for field in [size_bytes, generation, log_start, snapshot_bytes] {
        out.extend(field.to_le_bytes());
    }
    out.resize(60, 0);
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

fn record(input: &mut Input<'_>) -> Vec<u8> {
    let count = u32::from(input.u8()) % 4;
    let mut out = vec![0; 4];
    let anything = u32::from_le_bytes([input.u8(), 0, input.u8(), 0]);
    out.extend(input.pick(&[count, count, count, anything]).to_le_bytes());
    out.extend(input.pick(&[1u64, 2, 3]).to_le_bytes());
    out.extend((u64::from(input.u8()) % 4).to_le_bytes());
    for _ in 0..count {
        let any = input.u64();
        out.extend(input.pick(&[0, 1, 3, any]).to_le_bytes());
        out.extend(input.u64().to_le_bytes());
    }
    let crc = crc32c::crc32c(&out[4..]) ^ u32::from(input.u8() == 255);
    out[..4].copy_from_slice(&crc.to_le_bytes());
    out
}

fn map(input: &mut Input<'_>) -> Arc<MemoryMedia> {
    let map = Arc::new(MemoryMedia::new(0));
    let write = |offset, bytes: &[u8]| map.write_at(offset, bytes).expect("memory takes all");
    for slot in 0..u64::from(input.u8() % 3) {
        write(slot * 4096, &header(input));
    }
    let mut at = input.pick(&[LOG_START, 2 * LOG_START]);
    while !input.is_empty() {
        let record = record(input);
        write(at, &record);
        at += record.len() as u64;
    }
    map
}

const BOOT: BootId = BootId([1; 16]);

/// A live file of this run of the machine, or of another, with a few words.
fn live(input: &mut Input<'_>) -> Arc<MemoryMedia> {
    let live = Arc::new(MemoryMedia::new(0));
    let write = |offset, bytes: &[u8]| live.write_at(offset, bytes).expect("memory takes all");
    let mut header = [&b"VMOVLIVE"[..], &[1, 0, 0, 0], &[input.pick(&[1, 1, 1, 2]); 16]].concat();
    header.extend(crc32c::crc32c(&header).to_le_bytes());
    write(0, &header);
    for _ in 0..input.u8() % 3 {
        let any = u64::from(input.u8());
        let index = input.pick(&[0, 3, 255, 1 << 20, any]);
        write(4096 + index * 8, &input.u64().to_le_bytes());
    }
    live
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let (live, map) = (live(&mut input), map(&mut input));
    let data = Arc::new(MemoryMedia::new(DISK_BYTES_MAX));
    let media = OverlayMedia { data, map, live, boot: BOOT };
    let open = || Overlay::open_on(media.clone(), Arc::new(NoBase));
    let Ok(overlay) = open() else { return };
    let size_bytes = overlay.size_bytes();
    assert!((1..=DISK_BYTES_MAX).contains(&size_bytes));
    assert!(overlay.allocated_bytes() <= size_bytes.next_multiple_of(BLOCK_BYTES as u64));

    let text = [7; 1];
    let written = overlay.try_write(size_bytes - 1, &text).expect("the last byte is there");
    assert_eq!(written, TryIo::Done);
    RUNTIME.block_on(overlay.flush()).expect("memory takes all");
    let allocated_bytes = overlay.allocated_bytes();
    drop(overlay);

    let overlay = open().expect("what was flushed can be opened");
    assert_eq!(overlay.allocated_bytes(), allocated_bytes);
    let mut found = [0; 1];
    assert_eq!(overlay.try_read(size_bytes - 1, &mut found).expect("it is there"), TryIo::Done);
    assert_eq!(found, text, "what was flushed is there");
});
