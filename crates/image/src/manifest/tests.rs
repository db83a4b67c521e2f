//! The shape of manifests and their root pages: what is written reads back, and nothing else is accepted.

use block::limits::{CHUNK_BYTES, DISK_BYTES_MAX};
use block::{ChunkHash, ChunkIndex};
use proptest::prelude::*;

use super::root::ROOT_PAGE_BYTES_MAX;
use super::shape::{LEVELS_MAX, PageId, Shape, TOPS_MAX};
use super::{ManifestError, RootPage};

/// A consistent root page: the size, which tops are zero, and how many zero chunks within the bounds.
fn root_page() -> impl Strategy<Value = RootPage> {
    let size = prop_oneof![1u64..1 << 24, 1u64..1 << 36, (DISK_BYTES_MAX - (1 << 40))..=DISK_BYTES_MAX];
    (size, any::<[bool; 64]>(), any::<u64>()).prop_map(|(size, zero, pick)| {
        let shape = Shape::of(size).unwrap();
        let (mut least, mut most) = (0, 0);
        let mut tops = Vec::new();
        for index in 0..shape.tops() {
            let under = shape.chunks_under(PageId { level: shape.levels() - 1, index });
            let is_zero = zero[index as usize];
            least += if is_zero { under } else { 0 };
            most += if is_zero { under } else { under - 1 };
            tops.push(if is_zero {
                ChunkHash::ZERO
            } else {
                ChunkHash::of(&index.to_le_bytes().map(|b| b | 1))
            });
        }
        RootPage::new(size, least + pick % (most - least + 1), tops.into()).unwrap()
    })
}

proptest! {
    #[test]
    fn a_root_page_survives_its_bytes(root in root_page()) {
        let bytes = root.encode();
        prop_assert!(bytes.len() <= ROOT_PAGE_BYTES_MAX);
        prop_assert_eq!(RootPage::decode(&bytes), Ok(root));
    }

    #[test]
    fn changed_bytes_are_refused_or_mean_something_else(
        root in root_page(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let good = root.encode();
        let mut bad = good.to_vec();
        for (at, value) in changes {
            let at = at.index(bad.len());
            bad[at] = value;
        }
        for bytes in [&bad[..], &bad[..cut.index(bad.len())]] {
            if let Ok(other) = RootPage::decode(bytes) {
                prop_assert_eq!(&other.encode()[..], bytes, "only the canonical form is accepted");
                prop_assert_eq!(other == root, bytes == &good[..]);
            }
        }
    }

    #[test]
    fn every_page_has_its_own_place(size in 1u64..=1 << 44) {
        let shape = Shape::of(size).unwrap();
        prop_assert!(shape.levels() <= LEVELS_MAX && shape.tops() <= TOPS_MAX);
        for ordinal in [0, shape.pages_total() / 2, shape.pages_total() - 1] {
            let page = shape.page_at(ordinal).unwrap();
            prop_assert_eq!(shape.ordinal(page), ordinal);
        }
        prop_assert_eq!(shape.page_at(shape.pages_total()), None);
        let last = ChunkIndex(shape.geometry().chunk_count() - 1);
        let (mut page, _) = PageId::of_chunk(last);
        while !shape.is_top(page) {
            prop_assert_eq!(page.index, shape.pages_at(page.level) - 1);
            page = page.parent().0;
        }
        prop_assert!(page.index < shape.tops());
    }
}

#[test]
fn the_bytes_of_version_1_are_as_documented() {
    let tops: Box<[ChunkHash]> = [[0xab; 32], [0; 32]].map(ChunkHash::from_bytes).into();
    let root = RootPage::new((128 << 20) + 1, 2000, tops).unwrap();
    let mut golden = Vec::new();
    golden.extend_from_slice(b"VirtMan\n");
    golden.extend_from_slice(&[1, 0, 1, 2, 0, 0, 0, 0]);
    golden.extend_from_slice(&[1, 0, 0, 8, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0x01, 0x08, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0xd0, 0x07, 0, 0, 0, 0, 0, 0]);
    golden.extend_from_slice(&[0xab; 32]);
    golden.extend_from_slice(&[0; 32]);
    assert_eq!(root.encode(), golden);
    assert_eq!(RootPage::decode(&golden), Ok(root));
}

#[test]
fn each_wrong_field_is_named() {
    let root = RootPage::new(3 * CHUNK_BYTES as u64, 1, [ChunkHash::of(b"x")].into()).unwrap();
    let refused = |at: usize, byte: u8| {
        let mut bytes = root.encode().to_vec();
        bytes[at] = byte;
        RootPage::decode(&bytes).expect_err("a contradiction").to_string()
    };
    assert!(refused(0, b'v').contains("magic"));
    assert!(refused(8, 2).contains("version 2"));
    assert!(refused(10, 2).contains("number of levels"));
    assert!(refused(11, 2).contains("number of top hashes"));
    assert!(refused(13, 1).contains("reserved"));
    assert!(refused(23, 1).contains("disk of"));
    assert!(refused(24, 9).contains("number of data chunks"));
    assert!(refused(32, 3).contains("number of zero chunks"), "three of three with a top that is not zero");
    let mut long = root.encode().to_vec();
    long.push(0);
    assert_eq!(RootPage::decode(&long), Err(ManifestError::Length { expected: 72, actual: 73 }));
    assert_eq!(RootPage::decode(b"VirtMan\n"), Err(ManifestError::Length { expected: 40, actual: 8 }));
    assert_eq!(RootPage::decode(b""), Err(ManifestError::Magic));
}

#[test]
fn the_largest_disk_has_a_shape_and_one_byte_more_has_none() {
    assert_eq!(Shape::of(DISK_BYTES_MAX).map(|s| (s.levels(), s.tops())), Some((3, 1)));
    assert_eq!(Shape::of(DISK_BYTES_MAX + 1), None);
    assert_eq!(Shape::of(0), None);
    assert_eq!(Shape::of(1).map(|s| (s.levels(), s.tops())), Some((1, 1)));
}
