//! Chunks and the hashes that name them.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::CHUNK_BYTES;

/// The name of a chunk: BLAKE3 of its [`CHUNK_BYTES`] bytes.
///
/// An all-zero chunk is not named by its BLAKE3 value but by [`ChunkHash::ZERO`], so that it can be told
/// without being read, and never crosses the network. This holds at every level of a manifest: a page
/// of zero marks is itself an all-zero chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkHash([u8; 32]);

/// The name of an image: BLAKE3 of the bytes of its root page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId([u8; 32]);

impl ChunkHash {
    /// Marks a chunk whose bytes are all zero.
    pub const ZERO: ChunkHash = ChunkHash([0; 32]);

    /// The name of the chunk with these bytes; [`ChunkHash::ZERO`] if all are zero. Bytes that are fewer or
    /// more than [`CHUNK_BYTES`] get a value too, but it names no chunk: [`Chunk::verify`] refuses them.
    pub fn of(bytes: &[u8]) -> ChunkHash {
        if is_all_zero(bytes) { ChunkHash::ZERO } else { ChunkHash(*blake3::hash(bytes).as_bytes()) }
    }

    /// Whether this marks the all-zero chunk.
    pub fn is_zero(&self) -> bool {
        *self == ChunkHash::ZERO
    }

    /// The leading eight bytes as an integer: uniform, so it shards, stripes and interpolates well.
    pub fn prefix(&self) -> u64 {
        u64::from_be_bytes(self.0[..8].try_into().expect("a hash has 32 bytes"))
    }
}

impl ImageId {
    /// The name of the image with this root page.
    pub fn of_root_page(bytes: &[u8]) -> ImageId {
        ImageId(*blake3::hash(bytes).as_bytes())
    }

    /// The first 12 hexadecimal digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

/// Whether every byte is zero.
fn is_all_zero(bytes: &[u8]) -> bool {
    // SAFETY: every bit pattern is a valid u128.
    let (head, middle, tail) = unsafe { bytes.align_to::<u128>() };
    head.iter().all(|&b| b == 0) && middle.iter().all(|&w| w == 0) && tail.iter().all(|&b| b == 0)
}

/// A string is not 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a hash: expected 64 hexadecimal digits")]
pub struct ParseHashError(String);

fn parse_hex(text: &str) -> Result<[u8; 32], ParseHashError> {
    let wrong = || ParseHashError(text.chars().take(80).collect());
    if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    let mut out = [0; 32];
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(out)
}

macro_rules! hash_type {
    ($name:ident) => {
        impl $name {
            /// The hash in its binary form.
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// Takes the binary form as it is; nothing is checked, because nothing can be.
            pub fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), &self.to_string()[..12])
            }
        }

        impl FromStr for $name {
            type Err = ParseHashError;
            fn from_str(text: &str) -> Result<Self, ParseHashError> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

hash_type!(ChunkHash);
hash_type!(ImageId);

/// A verified chunk: [`CHUNK_BYTES`] bytes that hash to their name.
///
/// The only way to make one is to verify, so a function that takes a `Chunk` needs no check of its own.
#[derive(Clone)]
pub struct Chunk {
    hash: ChunkHash,
    bytes: Bytes,
    packed: Option<Bytes>,
}

/// Bytes that are not the chunk they were said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongChunk {
    /// The length is not [`CHUNK_BYTES`].
    #[error("chunk {hash} has {len} bytes instead of {CHUNK_BYTES}")]
    Length {
        /// The chunk that was expected.
        hash: ChunkHash,
        /// The length that came.
        len: usize,
    },
    /// The bytes hash to something else.
    #[error("the bytes that came as chunk {expected} hash to {actual}")]
    Hash {
        /// The chunk that was expected.
        expected: ChunkHash,
        /// What the bytes hash to.
        actual: ChunkHash,
    },
    /// The compressed form is damaged.
    #[error("the bytes that came as chunk {hash} cannot be unpacked")]
    Packed {
        /// The chunk that was expected.
        hash: ChunkHash,
    },
}

impl Chunk {
    /// Checks that `bytes` are the chunk `hash`.
    pub fn verify(hash: ChunkHash, bytes: Bytes) -> Result<Chunk, WrongChunk> {
        if bytes.len() != CHUNK_BYTES {
            return Err(WrongChunk::Length { hash, len: bytes.len() });
        }
        let actual = ChunkHash::of(&bytes);
        if actual != hash {
            return Err(WrongChunk::Hash { expected: hash, actual });
        }
        Ok(Chunk { hash, bytes, packed: None })
    }

    /// Checks that `packed` unpacks to the chunk `hash`, and keeps it, so that a relay can pass the chunk on
    /// without compressing it again. `unpack` gives `None` for what it cannot unpack.
    pub fn verify_packed(
        hash: ChunkHash,
        packed: Bytes,
        unpack: impl FnOnce(&[u8]) -> Option<Bytes>,
    ) -> Result<Chunk, WrongChunk> {
        let bytes = unpack(&packed).ok_or(WrongChunk::Packed { hash })?;
        Ok(Chunk { packed: Some(packed), ..Chunk::verify(hash, bytes)? })
    }

    /// The all-zero chunk.
    pub fn zero() -> Chunk {
        static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];
        Chunk { hash: ChunkHash::ZERO, bytes: Bytes::from_static(&ZEROES), packed: None }
    }

    /// Names bytes that are ours to name: the importer's way to make a chunk. Panics unless there are
    /// exactly [`CHUNK_BYTES`].
    pub fn of(bytes: Bytes) -> Chunk {
        assert_eq!(bytes.len(), CHUNK_BYTES, "a chunk has exactly CHUNK_BYTES bytes");
        Chunk { hash: ChunkHash::of(&bytes), bytes, packed: None }
    }

    /// The chunk's name.
    pub fn hash(&self) -> ChunkHash {
        self.hash
    }

    /// The [`CHUNK_BYTES`] bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The compressed form, if the chunk arrived in one.
    pub fn packed(&self) -> Option<&Bytes> {
        self.packed.as_ref()
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chunk({})", &self.hash.to_string()[..12])
    }
}

impl PartialEq for Chunk {
    fn eq(&self, other: &Chunk) -> bool {
        // Both were verified, so equal names mean equal bytes.
        self.hash == other.hash
    }
}

impl Eq for Chunk {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_with_one_flipped_bit_is_refused() {
        let good = Bytes::from(vec![7u8; CHUNK_BYTES]);
        let hash = ChunkHash::of(&good);
        let mut bad = good.to_vec();
        bad[CHUNK_BYTES - 1] ^= 1;
        assert!(Chunk::verify(hash, good).is_ok());
        assert!(matches!(Chunk::verify(hash, bad.into()), Err(WrongChunk::Hash { .. })));
    }

    #[test]
    fn a_packed_form_is_kept_only_if_it_unpacks_to_the_chunk() {
        let good = Chunk::of(Bytes::from(vec![7u8; CHUNK_BYTES]));
        let packed = Bytes::from_static(b"packed");
        let verify = |bytes: Option<Bytes>| Chunk::verify_packed(good.hash(), packed.clone(), |_| bytes);
        assert_eq!(verify(Some(good.bytes().clone())).unwrap().packed(), Some(&packed));
        assert!(matches!(verify(Some(Chunk::zero().bytes().clone())), Err(WrongChunk::Hash { .. })));
        assert_eq!(verify(None), Err(WrongChunk::Packed { hash: good.hash() }));
    }

    #[test]
    fn a_short_chunk_is_refused_even_if_its_hash_is_right() {
        let short = Bytes::from_static(b"short");
        let hash = ChunkHash::of(&short);
        assert_eq!(Chunk::verify(hash, short), Err(WrongChunk::Length { hash, len: 5 }));
    }

    #[test]
    fn zeroes_are_named_by_the_zero_mark_at_every_length() {
        for len in [1, 15, 16, 17, CHUNK_BYTES] {
            assert!(ChunkHash::of(&vec![0; len]).is_zero(), "{len} zero bytes");
            for at in [0, len / 2, len - 1] {
                let mut bytes = vec![0; len];
                bytes[at] = 1;
                assert!(!ChunkHash::of(&bytes).is_zero(), "{len} bytes with a one at {at}");
            }
        }
        assert!(Chunk::verify(ChunkHash::ZERO, Chunk::zero().bytes().clone()).is_ok());
    }

    #[test]
    fn a_hash_survives_its_text_form_and_odd_text_is_refused() {
        let hash = ChunkHash::of(b"x");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        for bad in ["", "12", &"g".repeat(64), &"é".repeat(32)] {
            assert!(bad.parse::<ChunkHash>().is_err(), "{bad:?}");
        }
    }
}
