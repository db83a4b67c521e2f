//! The file form of a boot profile: `docs/formats/profile.md`.
//!
//! Invariant: `encode` gives the one form that `decode` accepts.

use block::{ChunkIndex, ImageId};

use super::{BootProfile, CHUNKS_MAX, PROFILE_CHUNKS_MAX, ProfileError};

const MAGIC: &[u8; 8] = b"VirtBoot";
pub(super) const VERSION: u16 = 1;
const HEAD_BYTES: usize = 48;
const CRC_BYTES: usize = 4;

/// Longest number: a step between any two chunks of the largest disk has 31 bits with its sign.
const STEP_BYTES_MAX: usize = 5;

/// Longest profile in bytes.
pub const PROFILE_BYTES_MAX: usize = HEAD_BYTES + PROFILE_CHUNKS_MAX * STEP_BYTES_MAX + CRC_BYTES;

impl BootProfile {
    /// The profile's bytes, at most [`PROFILE_BYTES_MAX`].
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEAD_BYTES + 2 * self.chunks.len() + CRC_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(self.chunks.len() as u32).to_le_bytes());
        out.extend_from_slice(self.image.as_bytes());
        let mut before = 0;
        for chunk in &self.chunks {
            let step = chunk.0 as i64 - before;
            before = chunk.0 as i64;
            put_number(&mut out, zigzag(step));
        }
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads a profile. Accepts exactly what [`BootProfile::encode`] gives, and never panics.
    ///
    /// # Errors
    /// [`ProfileError`], for any other bytes.
    pub fn decode(bytes: &[u8]) -> Result<BootProfile, ProfileError> {
        if !bytes.starts_with(MAGIC) {
            return Err(ProfileError::Magic);
        }
        if bytes.len() < HEAD_BYTES + CRC_BYTES {
            return Err(ProfileError::Damaged("it ends within its head"));
        }
        let (covered, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
        let (head, mut steps) = covered.split_at(HEAD_BYTES);
        // A later version may have its checksum elsewhere.
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != VERSION {
            return Err(ProfileError::Version(version));
        }
        if crc32c::crc32c(covered).to_le_bytes() != *crc {
            return Err(ProfileError::Damaged("its checksum is wrong, so it was cut short or changed"));
        }
        if head[10..12] != [0; 2] {
            return Err(ProfileError::Damaged("its reserved field is not 0"));
        }
        let count = u32::from_le_bytes(head[12..16].try_into().expect("the slice has four bytes"));
        if count as usize > PROFILE_CHUNKS_MAX {
            return Err(ProfileError::TooMany(u64::from(count)));
        }
        let image = ImageId::from_bytes(head[16..HEAD_BYTES].try_into().expect("the slice has 32 bytes"));
        let mut chunks = Vec::with_capacity(count as usize);
        let mut before = 0i64;
        for _ in 0..count {
            before += unzigzag(take_number(&mut steps)?);
            // Checked here already, so that the next addition cannot overflow.
            match u64::try_from(before) {
                Ok(chunk) if chunk < CHUNKS_MAX => chunks.push(ChunkIndex(chunk)),
                _ => return Err(ProfileError::Damaged("a step leads out of every disk")),
            }
        }
        if !steps.is_empty() {
            return Err(ProfileError::Damaged("it goes on after its last chunk"));
        }
        BootProfile::new(image, chunks)
    }
}

/// Small steps of either sign as small numbers: 0, -1, 1, -2, 2 … become 0, 1, 2, 3, 4 …
fn zigzag(step: i64) -> u64 {
    ((step << 1) ^ (step >> 63)) as u64
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// Seven bits a byte, the lowest first; the high bit says that more follow.
fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Result<u64, ProfileError> {
    let mut number = 0;
    for place in 0..STEP_BYTES_MAX {
        let Some((&byte, rest)) = bytes.split_first() else {
            return Err(ProfileError::Damaged("it has fewer chunks than its head says"));
        };
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return match byte {
                0 if place > 0 => Err(ProfileError::Damaged("a number is longer than it needs to be")),
                _ => Ok(number),
            };
        }
    }
    Err(ProfileError::Damaged("a number is too long"))
}
