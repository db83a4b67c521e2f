//! The `index` file of an image directory: finds a chunk by its hash without keeping anything in memory.
//!
//! Sorted records of [`RECORD_BYTES`] bytes: the first eight bytes of the hash, then what the manifest has there
//! ([`Node`]), both big-endian. A record is a hint: the caller holds the node's whole name against the hash it
//! looks for. The index of a derived image knows only what is not its base's.
//!
//! Chunks that occur several times have one record. Hashes are uniform, so a search interpolates and
//! is done after a few small reads; bisecting beside it bounds the reads for any file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use block::{ChunkHash, ChunkIndex};

use crate::manifest::{RootPage, Shape};
use crate::pages::{Node, Pages};

const RECORD_BYTES: usize = 16;

/// Set in a location that is the place of a page; else it is the index of a data chunk.
const PAGE_FLAG: u64 = 1 << 63;

/// Records that are sorted at once: 64 MiB of memory, whatever the size of the image. Larger indexes are made
/// in several passes over the pages, each for one band of hashes.
const RECORDS_PER_PASS: u64 = 4 << 20;

/// Records that a search ends with and reads in one piece: 4 KiB.
const RECORDS_PER_READ: u64 = 256;

/// Records of one prefix that a lookup looks at. Two hashes of one image share eight bytes with a probability
/// of 2^-24 even at 2^20 chunks; more than a few means a damaged file.
const CANDIDATES_MAX: usize = 8;

pub(crate) fn location_of(shape: &Shape, node: Node) -> u64 {
    match node {
        Node::Data(chunk) => chunk.0,
        Node::Page(page) => PAGE_FLAG | shape.ordinal(page),
    }
}

pub(crate) fn node_at(shape: &Shape, location: u64) -> Option<Node> {
    if location & PAGE_FLAG != 0 {
        return shape.page_at(location & !PAGE_FLAG).map(Node::Page);
    }
    (location < shape.geometry().chunk_count()).then_some(Node::Data(ChunkIndex(location)))
}

/// Takes one node after the other with its name, which is not zero.
pub(crate) type Visit<'a> = &'a mut dyn FnMut(Node, ChunkHash) -> io::Result<()>;

/// Writes the index of a finished manifest.
pub(crate) fn write(file: &File, pages: &Pages, root: &RootPage) -> io::Result<()> {
    let nodes_max = root.chunk_count() - root.zero_chunks() + root.shape().pages_total();
    write_nodes(file, pages, root, nodes_max, |visit| pages.for_each_node(root, visit))
}

/// Writes an index of at most `nodes_max` nodes of a manifest: those that `for_each` goes through, each time that
/// it is called. The pages above them must be in `pages`.
pub(crate) fn write_nodes(
    file: &File,
    pages: &Pages,
    root: &RootPage,
    nodes_max: u64,
    for_each: impl Fn(Visit<'_>) -> io::Result<()>,
) -> io::Result<()> {
    write_in_passes(file, pages, root, nodes_max.div_ceil(RECORDS_PER_PASS), for_each)
}

fn write_in_passes(
    file: &File,
    pages: &Pages,
    root: &RootPage,
    passes: u64,
    for_each: impl Fn(Visit<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let shape = root.shape();
    let mut out = BufWriter::new(file);
    for pass in 0..passes {
        let mut records: Vec<(u64, u64)> = Vec::new();
        for_each(&mut |node, hash| {
            if (u128::from(hash.prefix()) * u128::from(passes)) >> 64 == u128::from(pass) {
                records.push((hash.prefix(), location_of(&shape, node)));
            }
            Ok(())
        })?;
        records.sort_unstable();
        let mut last: Option<(u64, ChunkHash)> = None;
        for (position, &(prefix, location)) in records.iter().enumerate() {
            // Only a neighbour with the same prefix can be the same chunk; seldom is a name looked up.
            let next = records.get(position + 1).is_some_and(|(next, _)| *next == prefix);
            if next || last.is_some_and(|(last, _)| last == prefix) {
                let node = node_at(&shape, location).expect("the location was made from a node");
                let name = pages.name(root, node)?;
                if last.replace((prefix, name)) == Some((prefix, name)) {
                    continue;
                }
            }
            out.write_all(&prefix.to_be_bytes())?;
            out.write_all(&location.to_be_bytes())?;
        }
    }
    out.flush()
}

/// An index, opened for lookups.
pub(crate) struct Index {
    file: File,
    shape: Shape,
    records: u64,
}

impl Index {
    /// Takes a finished file; `InvalidData` if it cannot be one.
    pub(crate) fn open(file: File, shape: Shape) -> io::Result<Index> {
        let len = file.metadata()?.len();
        if !len.is_multiple_of(RECORD_BYTES as u64) {
            let reason = format!("its {len} bytes are no whole number of records");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(Index { file, shape, records: len / RECORD_BYTES as u64 })
    }

    /// The nodes that may have this name; all but very rarely none or one.
    pub(crate) fn candidates(&self, hash: ChunkHash) -> io::Result<Vec<Node>> {
        let prefix = hash.prefix();
        let (first, end) = self.narrow(prefix)?;
        let count = (end - first + CANDIDATES_MAX as u64).min(self.records - first) as usize;
        let mut bytes = vec![0; count * RECORD_BYTES];
        self.file.read_exact_at(&mut bytes, first * RECORD_BYTES as u64)?;
        let (records, _) = bytes.as_chunks::<RECORD_BYTES>();
        let found = records.iter().map(split).filter(|(key, _)| *key == prefix);
        Ok(found.filter_map(|(_, location)| node_at(&self.shape, location)).take(CANDIDATES_MAX).collect())
    }

    /// A range of at most [`RECORDS_PER_READ`] records in which the first one not below `prefix` lies, or which
    /// it follows.
    fn narrow(&self, prefix: u64) -> io::Result<(u64, u64)> {
        let (mut first, mut end) = (0, self.records);
        let (mut low, mut high) = (0, u64::MAX);
        while end - first > RECORDS_PER_READ {
            let span = end - first;
            let part = u128::from(prefix.saturating_sub(low)) * u128::from(span);
            let guess = first + (part / u128::from((high - low).max(1))).min(u128::from(span - 1)) as u64;
            // How far a uniform key strays from its place; twice that seldom misses.
            let stray = 2 * span.isqrt();
            for probe in [guess.saturating_sub(stray), guess.saturating_add(stray), first.midpoint(end)] {
                if probe < first || probe >= end {
                    continue;
                }
                let mut record = [0; RECORD_BYTES];
                self.file.read_exact_at(&mut record, probe * RECORD_BYTES as u64)?;
                let (key, _) = split(&record);
                if key < prefix {
                    (first, low) = (probe + 1, key);
                } else {
                    (end, high) = (probe, key.max(low));
                }
            }
        }
        Ok((first, end))
    }
}

fn split(record: &[u8; RECORD_BYTES]) -> (u64, u64) {
    let (prefix, location) = record.split_at(8);
    let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("half a record has eight bytes"));
    (number(prefix), number(location))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manifest whose data chunks have these names, with its index made in `passes`.
    fn indexed(names: &[ChunkHash], passes: u64) -> (Pages, RootPage, Index) {
        let shape = Shape::of(names.len() as u64 * block::limits::CHUNK_BYTES as u64).unwrap();
        let pages = Pages::create(tempfile::tempfile().unwrap(), shape).unwrap();
        pages.put(ChunkIndex(0), names).unwrap();
        let zero = names.iter().filter(|name| name.is_zero()).count() as u64;
        let root = pages.finish(zero).unwrap();
        let file = tempfile::tempfile().unwrap();
        write_in_passes(&file, &pages, &root, passes, |visit| pages.for_each_node(&root, visit)).unwrap();
        let index = Index::open(file, shape).unwrap();
        (pages, root, index)
    }

    fn name(number: u64) -> ChunkHash {
        ChunkHash::of(&(number + 1).to_le_bytes())
    }

    #[test]
    fn every_chunk_and_page_is_found_and_nothing_else() {
        let mut names: Vec<ChunkHash> = (0..10_000).map(name).collect();
        names[77] = ChunkHash::ZERO;
        names[5000] = names[3];
        for passes in [1, 3] {
            let (pages, root, index) = indexed(&names, passes);
            assert_eq!(index.records, 9_998 + 5, "one record for each different chunk, and five pages");
            let mut nodes = 0;
            let each = |node, hash| {
                let found = index.candidates(hash)?;
                let same =
                    if node == Node::Data(ChunkIndex(5000)) { Node::Data(ChunkIndex(3)) } else { node };
                assert_eq!(found, [same]);
                nodes += 1;
                Ok(())
            };
            pages.for_each_node(&root, each).unwrap();
            assert_eq!(nodes, 9_999 + 5);
            for stranger in 20_000..21_000 {
                assert_eq!(index.candidates(name(stranger)).unwrap(), []);
            }
        }
    }

    #[test]
    fn hashes_that_share_a_prefix_are_both_found() {
        let twin = |last: u8| {
            let mut bytes = [0x55; 32];
            bytes[31] = last;
            ChunkHash::from_bytes(bytes)
        };
        let names: Vec<ChunkHash> =
            (0..600).map(name).chain([twin(1), twin(2), twin(1)]).chain((700..1000).map(name)).collect();
        let (_, _, index) = indexed(&names, 1);
        let found = index.candidates(twin(2)).unwrap();
        assert!(found.contains(&Node::Data(ChunkIndex(600))), "{found:?}");
        assert!(found.contains(&Node::Data(ChunkIndex(601))), "{found:?}");
    }

    #[test]
    fn keys_that_are_not_uniform_are_found_too() {
        let name = |low: u64| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&(u64::MAX - low * low).to_be_bytes());
            bytes[31] = 1;
            ChunkHash::from_bytes(bytes)
        };
        let names: Vec<ChunkHash> = (0..5000).map(name).collect();
        let (_, _, index) = indexed(&names, 2);
        for (place, name) in names.iter().enumerate() {
            assert_eq!(index.candidates(*name).unwrap(), [Node::Data(ChunkIndex(place as u64))]);
        }
    }

    #[test]
    fn an_image_of_zeroes_has_an_empty_index() {
        let (_, _, index) = indexed(&[ChunkHash::ZERO; 3], 1);
        assert_eq!(index.records, 0);
        assert_eq!(index.candidates(name(1)).unwrap(), []);
    }
}
