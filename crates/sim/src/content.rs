//! The image of a run: its boot set, as chunks that really hash to their names.

use std::collections::BTreeMap;

use block::limits::CHUNK_BYTES;
use block::{ChunkHash, ImageId};
use bytes::Bytes;

/// A chunk of the boot set, by its place in the boot profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChunkIx(pub(crate) u32);

/// The boot set of one image.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) image: ImageId,
    chunks: Vec<(ChunkHash, Bytes)>,
    places: BTreeMap<ChunkHash, ChunkIx>,
}

impl Content {
    /// `count` different chunks. `salt` makes runs differ in their hashes, hence in how chunks fall on stripes.
    pub(crate) fn new(count: u32, salt: u64) -> Content {
        let chunk = |ix: u32| {
            // Zeroes behind a name: what hashing costs does not depend on the bytes.
            let mut bytes = vec![0; CHUNK_BYTES];
            bytes[..8].copy_from_slice(&salt.to_be_bytes());
            bytes[8..12].copy_from_slice(&(ix + 1).to_be_bytes());
            let bytes = Bytes::from(bytes);
            (ChunkHash::of(&bytes), bytes)
        };
        let chunks: Vec<_> = (0..count).map(chunk).collect();
        let places = chunks.iter().zip(0..).map(|(&(hash, _), ix)| (hash, ChunkIx(ix))).collect();
        Content { image: ImageId::of_root_page(&salt.to_be_bytes()), chunks, places }
    }

    pub(crate) fn len(&self) -> usize {
        self.chunks.len()
    }

    pub(crate) fn hash(&self, ix: ChunkIx) -> ChunkHash {
        self.chunks[ix.0 as usize].0
    }

    pub(crate) fn bytes(&self, ix: ChunkIx) -> &Bytes {
        &self.chunks[ix.0 as usize].1
    }

    pub(crate) fn find(&self, hash: &ChunkHash) -> Option<ChunkIx> {
        self.places.get(hash).copied()
    }

    /// What a liar sends instead: one bit is another.
    pub(crate) fn flipped(&self, ix: ChunkIx) -> Bytes {
        let mut bytes = self.bytes(ix).to_vec();
        bytes[CHUNK_BYTES / 2] ^= 1;
        Bytes::from(bytes)
    }
}

/// A set of chunks.
#[derive(Debug, Clone)]
pub(crate) struct ChunkSet {
    words: Vec<u64>,
    len: usize,
    count: usize,
}

impl ChunkSet {
    pub(crate) fn empty(len: usize) -> ChunkSet {
        ChunkSet { words: vec![0; len.div_ceil(64)], len, count: 0 }
    }

    pub(crate) fn full(len: usize) -> ChunkSet {
        let mut set = ChunkSet::empty(len);
        (0..).take(len).for_each(|ix| {
            set.insert(ChunkIx(ix));
        });
        set
    }

    pub(crate) fn contains(&self, ix: ChunkIx) -> bool {
        self.words[ix.0 as usize / 64] & (1 << (ix.0 % 64)) != 0
    }

    pub(crate) fn insert(&mut self, ix: ChunkIx) {
        if !self.contains(ix) {
            self.words[ix.0 as usize / 64] |= 1 << (ix.0 % 64);
            self.count += 1;
        }
    }

    /// How many chunks there can be.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }
}
