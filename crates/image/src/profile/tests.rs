//! Profiles: their bytes, what merging keeps, and what a recorder notes.

use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use proptest::prelude::*;

use super::*;

fn image() -> ImageId {
    ImageId::from_bytes([0xab; 32])
}

fn profile(chunks: &[u64]) -> BootProfile {
    BootProfile::new(image(), chunks.iter().copied().map(ChunkIndex).collect()).unwrap()
}

fn indices(profile: &BootProfile) -> Vec<u64> {
    profile.chunks().iter().map(|chunk| chunk.0).collect()
}

fn any_profile() -> impl Strategy<Value = BootProfile> {
    let near = prop::collection::hash_set(0u64..3000, 1..200);
    let far = prop::collection::hash_set(0..CHUNKS_MAX, 1..200);
    prop_oneof![near, far].prop_map(|chunks| profile(&chunks.into_iter().collect::<Vec<_>>()))
}

proptest! {
    #[test]
    fn a_profile_survives_its_bytes(profile in any_profile()) {
        let bytes = profile.encode();
        prop_assert!(bytes.len() <= PROFILE_BYTES_MAX);
        prop_assert_eq!(BootProfile::decode(&bytes), Ok(profile));
    }

    #[test]
    fn changed_bytes_are_refused_or_in_the_one_form(
        profile in any_profile(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bad = profile.encode();
        for (at, value) in changes {
            let at = at.index(bad.len());
            bad[at] = value;
        }
        bad.truncate(1 + cut.index(bad.len()));
        // With a right checksum the bytes get past it, to the checks behind.
        let mut sealed = bad.clone();
        sealed.extend_from_slice(&crc32c::crc32c(&bad).to_le_bytes());
        for bytes in [&bad, &sealed] {
            if let Ok(other) = BootProfile::decode(bytes) {
                prop_assert_eq!(&other.encode(), bytes, "only the canonical form is accepted");
            }
        }
    }

    #[test]
    fn a_recorder_notes_what_the_reads_touch_first(
        reads in prop::collection::vec((0u64..1 << 28, 1usize..300_000), 1..100),
    ) {
        let recorder = Recorder::new();
        reads.iter().for_each(|&(offset, len)| recorder.note(offset, len));
        let expected = BootProfile::of_reads(image(), reads).unwrap();
        prop_assert_eq!(recorder.chunks(), expected.chunks());
        prop_assert_eq!(recorder.noted(), expected.chunks().len());
    }

    #[test]
    fn merging_keeps_the_order_of_equal_records_and_names_nothing_new(
        record in any_profile(),
        copies in 1usize..5,
        other in any_profile(),
    ) {
        let equal = vec![record.clone(); copies];
        prop_assert_eq!(BootProfile::merged(image(), &equal).unwrap(), record.clone());
        let both = BootProfile::merged(image(), [&record, &other]).unwrap();
        let named = |chunk| record.chunks().contains(chunk) || other.chunks().contains(chunk);
        prop_assert!(both.chunks().iter().all(named));
    }
}

#[test]
fn the_bytes_of_version_1_are_as_documented() {
    let profile = profile(&[0, 1, 2, 300, 299, 70_000]);
    let golden = "56 69 72 74 42 6f 6f 74  01 00 00 00 06 00 00 00
        ab ab ab ab ab ab ab ab  ab ab ab ab ab ab ab ab
        ab ab ab ab ab ab ab ab  ab ab ab ab ab ab ab ab
        00 02 02 d4 04 01 8a c1  08 a0 1e a3 c9";
    let golden: String = golden.split_whitespace().collect();
    let bytes = profile.encode();
    assert_eq!(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>(), golden);
}

#[test]
fn what_is_no_profile_is_refused_by_its_fault() {
    let good = profile(&[5, 6]).encode();
    let sealed = |mut bytes: Vec<u8>| {
        bytes.truncate(bytes.len() - 4);
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        BootProfile::decode(&bytes)
    };
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    assert_eq!(BootProfile::decode(b"QFI\xfb"), Err(ProfileError::Magic));
    for cut in 8..good.len() {
        let refused = BootProfile::decode(&good[..cut]);
        assert!(matches!(refused, Err(ProfileError::Damaged(_))), "{cut} bytes: {refused:?}");
    }
    assert!(matches!(BootProfile::decode(&with(20, 1)), Err(ProfileError::Damaged(_))));
    assert_eq!(sealed(with(8, 2)), Err(ProfileError::Version(2)));
    assert!(matches!(sealed(with(12, 1)), Err(ProfileError::Damaged(_))), "a number is left over");
    assert!(matches!(sealed(with(12, 3)), Err(ProfileError::Damaged(_))), "a number is missing");
    assert_eq!(sealed(with(14, 1)), Err(ProfileError::TooMany(65_538)));
    assert_eq!(sealed(with(49, 0)), Err(ProfileError::Repeated(5)));
    assert!(matches!(sealed(with(48, 1)), Err(ProfileError::Damaged(_))), "chunk -1");
    let empty = [&with(12, 0)[..48], &[0; 4]].concat();
    assert_eq!(sealed(empty), Err(ProfileError::Empty));
}

#[test]
fn bounds_hold_for_profiles_that_are_made_too() {
    let chunks = |count: u64| (0..count).map(ChunkIndex).collect::<Vec<_>>();
    let most = BootProfile::new(image(), chunks(PROFILE_CHUNKS_MAX as u64)).unwrap();
    assert_eq!(BootProfile::decode(&most.encode()), Ok(most));
    let beyond = PROFILE_CHUNKS_MAX as u64 + 1;
    assert_eq!(BootProfile::new(image(), chunks(beyond)), Err(ProfileError::TooMany(beyond)));
    let far = BootProfile::new(image(), vec![ChunkIndex(CHUNKS_MAX)]);
    assert_eq!(far, Err(ProfileError::Beyond { chunk: CHUNKS_MAX, chunks: CHUNKS_MAX }));
    let everything = BootProfile::of_reads(image(), [(0, (PROFILE_CHUNKS_MAX + 5) * CHUNK_BYTES)]).unwrap();
    assert_eq!(everything.chunks().len(), PROFILE_CHUNKS_MAX);
}

#[test]
fn merging_drops_what_a_minority_touched_and_is_not_moved_by_one_disturbed_boot() {
    let records = [
        profile(&[1, 2, 3, 4, 90]),
        profile(&[1, 3, 2, 4, 91]),
        profile(&[1, 2, 3, 4]),
        // This one was busy with something else first.
        profile(&[92, 93, 94, 95, 96, 1, 2, 3, 4]),
    ];
    assert_eq!(indices(&BootProfile::merged(image(), &records).unwrap()), [1, 2, 3, 4]);
    let (a, b) = (profile(&[1, 2]), profile(&[8, 9]));
    assert_eq!(indices(&BootProfile::merged(image(), [&a, &b]).unwrap()), [1, 8, 2, 9], "half is enough");
    let other = BootProfile::new(ImageId::from_bytes([1; 32]), vec![ChunkIndex(7)]).unwrap();
    assert_eq!(BootProfile::merged(image(), [&other]), Err(ProfileError::Empty));
}

#[test]
fn a_closed_recorder_notes_nothing_and_a_full_one_closes() {
    let recorder = Recorder::new();
    recorder.note(0, 1);
    recorder.close();
    recorder.note(CHUNK_BYTES as u64, 1);
    assert_eq!(recorder.chunks(), [ChunkIndex(0)]);

    let recorder = Recorder::new();
    recorder.note(0, (PROFILE_CHUNKS_MAX + 1) * CHUNK_BYTES);
    assert!(!recorder.is_open());
    assert_eq!(recorder.chunks().len(), PROFILE_CHUNKS_MAX);
}

#[test]
fn threads_that_touch_the_same_chunks_note_each_once() {
    let recorder = Arc::new(Recorder::new());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..5000).for_each(|chunk| recorder.note(chunk * CHUNK_BYTES as u64, 1)));
        }
    });
    let mut noted: Vec<u64> = recorder.chunks().into_iter().map(|chunk| chunk.0).collect();
    noted.sort_unstable();
    assert!(noted.into_iter().eq(0..5000));
}
