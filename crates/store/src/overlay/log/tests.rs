//! The log of an overlay's map: what a crash may tear, and what is damage.

use super::*;
use crate::faulty::{FaultyMedia, TearUnit};

const SIZE: u64 = 1 << 30;

fn words(indices: std::ops::Range<u64>) -> Vec<Word> {
    indices.map(|index| Word { index, bits: index + 1 }).collect()
}

/// The words in the log, in order of appearance.
fn reopen(media: &FaultyMedia) -> Result<(MapLog, Vec<Word>), LogError> {
    let mut found = Vec::new();
    let log = MapLog::open(Arc::new(media.clone()), |_, word| {
        found.push(word);
        word.index < SIZE
    })?;
    Ok((log, found))
}

fn create(unit: TearUnit) -> (FaultyMedia, MapLog) {
    let media = FaultyMedia::new(7, unit);
    let log = MapLog::create(Arc::new(media.clone()), SIZE).unwrap();
    (media, log)
}

#[test]
fn the_format_is_what_the_document_says() {
    let (media, mut log) = create(TearUnit::Page);
    log.append(&[Word { index: 3, bits: 5 }]).unwrap();
    let mut header = [0; 64];
    media.read_at(4096, &mut header).unwrap();
    let golden = "564d4f564c4d4150 01000000 00100000 0000004000000000 0100000000000000 0020000000000000 \
                  1800000000000000 000000000000000000000000 CRC";
    assert_hex(&header, golden, &header[..60]);
    let mut records = [0; 24 + 40];
    media.read_at(8192, &mut records).unwrap();
    assert_hex(&records[..24], "CRC 00000000 0100000000000000 0000000000000000", &records[4..24]);
    let golden = "CRC 01000000 0100000000000000 0100000000000000 0300000000000000 0500000000000000";
    assert_hex(&records[24..], golden, &records[28..]);
}

/// Compares with hexadecimal digits in which `CRC` stands for the CRC-32C of `covered`.
fn assert_hex(bytes: &[u8], golden: &str, covered: &[u8]) {
    let crc: String = crc32c::crc32c(covered).to_le_bytes().iter().map(|b| format!("{b:02x}")).collect();
    let golden: String = golden.replace("CRC", &crc).split_whitespace().collect();
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(hex, golden);
}

#[test]
fn torn_map_tail_is_dropped() {
    let (media, mut log) = create(TearUnit::Sector);
    log.append(&words(0..10)).unwrap();
    let end = log.end;
    log.append(&words(10..1000)).unwrap();
    media.flip_bit(log.end - 1, 3);
    let (mut log, found) = reopen(&media).unwrap();
    assert_eq!(found, words(0..10));
    assert_eq!(log.end, end);
    log.append(&words(20..22)).unwrap();
    let expected = [words(0..10), words(20..22)].concat();
    assert_eq!(reopen(&media).unwrap().1, expected);
}

#[test]
fn a_corrupt_record_before_a_good_one_is_an_error_not_a_tail() {
    let (media, mut log) = create(TearUnit::Sector);
    log.append(&words(0..10)).unwrap();
    let end = log.end;
    log.append(&words(10..20)).unwrap();
    media.flip_bit(end - 1, 3);
    assert!(matches!(reopen(&media), Err(LogError::Damaged(_))));
}

#[test]
fn a_corrupt_snapshot_is_an_error_not_an_empty_log() {
    let (media, mut log) = create(TearUnit::Sector);
    log.rewrite(&words(0..10)).unwrap();
    media.flip_bit(log.end - 1, 0);
    assert!(matches!(reopen(&media), Err(LogError::Damaged(_))));
}

#[test]
fn a_corrupt_header_is_an_error_even_if_an_older_one_is_intact() {
    let (media, mut log) = create(TearUnit::Sector);
    log.append(&words(0..10)).unwrap();
    log.rewrite(&words(0..10)).unwrap();
    media.flip_bit(slot_offset(&log.header) + 20, 0);
    assert!(matches!(reopen(&media), Err(LogError::Damaged(_))));
}

#[test]
fn a_header_that_ends_its_log_beyond_all_numbers_is_damage() {
    let (media, log) = create(TearUnit::Page);
    let header = Header { log_start: u64::MAX, ..log.header };
    media.write_at(slot_offset(&header), &header.encode()).unwrap();
    assert!(matches!(reopen(&media), Err(LogError::Damaged(_))));
}

#[test]
fn a_rewritten_log_says_the_same_and_later_rewrites_use_the_space_in_front() {
    let (media, mut log) = create(TearUnit::Sector);
    for round in 1..20 {
        log.append(&words(0..round)).unwrap();
        log.rewrite(&words(0..round)).unwrap();
        assert_eq!(log.bytes(), MapLog::bytes_of(round));
        assert_eq!(reopen(&media).unwrap().1, words(0..round));
    }
    assert!(media.len_bytes().unwrap() < LOG_START + 5 * SLOT_BYTES, "the file grows without need");
    log.rewrite(&[]).unwrap();
    assert_eq!(reopen(&media).unwrap().1, []);
}

#[test]
fn a_power_cut_within_a_rewrite_leaves_the_old_log_or_the_new() {
    for seed in 0..40 {
        let media = FaultyMedia::new(seed, TearUnit::Sector);
        let mut log = MapLog::create(Arc::new(media.clone()), SIZE).unwrap();
        log.append(&words(0..100)).unwrap();
        log.append(&words(0..100)).unwrap();
        // A rewrite takes five operations; whichever comes last, the words are there.
        media.fail_after(seed % 6);
        let _ = log.rewrite(&words(0..100));
        let (_, mut found) = reopen(&media.power_cut()).unwrap();
        found.dedup_by_key(|word| word.index);
        found.truncate(100);
        assert_eq!(found, words(0..100), "seed {seed}");
    }
}

#[test]
fn a_map_of_a_later_version_is_refused_by_its_number() {
    let (media, log) = create(TearUnit::Page);
    let mut bytes = log.header.encode();
    bytes[8] = 9;
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    media.write_at(slot_offset(&log.header), &bytes).unwrap();
    let Err(LogError::Damaged(what)) = reopen(&media) else { panic!("it was opened") };
    assert!(what.contains("version 9"), "{what}");
}

proptest::proptest! {
    #[test]
    fn random_bytes_are_never_a_panic(bytes in proptest::collection::vec(0u8.., 0..20_000), with_header in 0u8..2) {
        let (media, _) = create(TearUnit::Page);
        let at = u64::from(with_header) * (LOG_START + 24);
        media.write_at(at, &bytes).unwrap();
        let _ = reopen(&media);
    }
}
