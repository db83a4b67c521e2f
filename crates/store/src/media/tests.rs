//! What every medium promises, asked of each kind of them.

use super::*;
use crate::faulty::{FaultyMedia, TearUnit};

/// On every Linux a tmpfs.
const IN_MEMORY: &str = "/dev/shm";

fn each_medium(test: impl Fn(&dyn Media)) {
    for dir in [tempfile::tempdir().unwrap(), tempfile::tempdir_in(IN_MEMORY).unwrap()] {
        test(&FileMedia::open_or_create(&dir.path().join("file")).unwrap());
    }
    test(&MemoryMedia::new(0));
    test(&FaultyMedia::new(1, TearUnit::Sector));
}

fn read(media: &dyn Media, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    media.read_at(offset, &mut buf).unwrap();
    buf
}

#[test]
fn every_medium_keeps_what_is_written_and_reads_holes_as_zeroes() {
    each_medium(|media| {
        media.set_len(20_000).unwrap();
        media.write_at(4_000, &[7; 9_000]).unwrap();
        media.punch_hole(5_000, 4_000).unwrap();
        assert_eq!(media.len_bytes().unwrap(), 20_000);
        assert_eq!(read(media, 3_999, 2), [0, 7]);
        assert_eq!(read(media, 4_999, 4_002), [&[7][..], &[0; 4_000], &[7]].concat());
        assert_eq!(read(media, 12_999, 2), [7, 0]);
    });
}

#[test]
fn every_medium_refuses_to_read_beyond_its_end() {
    each_medium(|media| {
        media.set_len(100).unwrap();
        let mut buf = [0; 2];
        assert_eq!(media.read_at(99, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(!matches!(media.try_read_at(99, &mut buf), Ok(TryIo::Done)));
        media.punch_hole(50, 1_000).unwrap();
        assert_eq!(media.len_bytes().unwrap(), 100, "a hole beyond the end makes nothing longer");
    });
}

#[test]
fn bytes_that_were_cut_off_come_back_as_zeroes() {
    each_medium(|media| {
        media.write_at(0, &[1; 10_000]).unwrap();
        media.set_len(5_000).unwrap();
        media.set_len(10_000).unwrap();
        assert_eq!(read(media, 4_999, 5_001), [&[1][..], &[0; 5_000]].concat());
    });
}

#[test]
fn a_file_tells_its_holes_from_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let media = FileMedia::open_or_create(&dir.path().join("file")).unwrap();
    media.set_len(3 << 20).unwrap();
    media.write_at(1 << 20, &[1; 1 << 20]).unwrap();
    assert_eq!(media.extent_at(0, 3 << 20).unwrap(), (ExtentKind::Hole, 1 << 20));
    assert_eq!(media.extent_at(1 << 20, 2 << 20).unwrap(), (ExtentKind::Data, 1 << 20));
    assert_eq!(media.extent_at(2 << 20, 1 << 20).unwrap(), (ExtentKind::Hole, 1 << 20));
}

#[test]
fn a_power_cut_keeps_what_was_synced_and_tears_the_rest_at_unit_boundaries() {
    let mut kept = [false; 2];
    for seed in 0..20 {
        let media = FaultyMedia::new(seed, TearUnit::Sector);
        media.write_at(0, &[1; 512 * 64]).unwrap();
        media.sync().unwrap();
        media.write_at(512 * 32, &[2; 512 * 32]).unwrap();
        let after = media.power_cut();
        assert!(media.read_at(0, &mut [0]).is_err(), "a handle from before the cut is dead");
        for (sector, bytes) in read(&after, 0, 512 * 64).chunks(512).enumerate() {
            assert!(bytes.iter().all(|&b| b == bytes[0]), "seed {seed}: sector {sector} is torn inside");
            match bytes[0] {
                1 => kept[0] |= sector >= 32,
                2 if sector >= 32 => kept[1] = true,
                other => panic!("seed {seed}: sector {sector} reads {other}"),
            }
        }
    }
    assert_eq!(kept, [true; 2], "unsynced sectors are sometimes lost and sometimes kept");
}

#[test]
fn a_file_in_memory_is_read_without_waiting() {
    let dir = tempfile::tempdir_in(IN_MEMORY).unwrap();
    let media = FileMedia::open_or_create(&dir.path().join("file")).unwrap();
    media.write_at(0, &[7; 100]).unwrap();
    let mut buf = [0; 50];
    assert_eq!(media.try_read_at(25, &mut buf).unwrap(), TryIo::Done);
    assert_eq!(buf, [7; 50]);
}
