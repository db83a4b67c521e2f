//! The basic header segment: 48 bytes, and the types of its fields.

use super::digest::padding;

/// Length of every header in bytes.
pub const HEADER_BYTES: usize = 48;

/// Bit of the first byte that makes a request immediate.
const IMMEDIATE: u8 = 0x40;

/// A basic header segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header(pub [u8; HEADER_BYTES]);

/// The initiator's part of a session's name, six bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Isid(pub [u8; 6]);

/// A command descriptor block of at most 16 bytes, filled up with zeroes.
pub type Cdb = [u8; 16];

impl Header {
    /// The operation code, without the immediate bit.
    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    /// Whether the immediate bit is set; only requests have it.
    pub fn is_immediate(&self) -> bool {
        self.0[0] & IMMEDIATE != 0
    }

    /// The same header with the immediate bit.
    #[must_use]
    pub fn immediate(mut self) -> Header {
        self.0[0] |= IMMEDIATE;
        self
    }

    /// Length of the additional header segments in bytes.
    pub fn additional_bytes(&self) -> usize {
        usize::from(self.0[4]) * 4
    }

    /// Length of the data segment in bytes, without padding.
    pub fn data_bytes(&self) -> usize {
        u32::from_be_bytes([0, self.0[5], self.0[6], self.0[7]]) as usize
    }

    /// Sets the length of the data segment.
    ///
    /// # Panics
    /// If it does not fit 24 bits: the limits of a connection are far below.
    pub fn set_data_bytes(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a data segment fits 24 bits").to_be_bytes();
        assert_eq!(len[0], 0, "a data segment fits 24 bits");
        self.0[5..8].copy_from_slice(&len[1..]);
    }

    /// Length of the data segment in bytes with its padding.
    pub fn padded_data_bytes(&self) -> usize {
        self.data_bytes() + padding(self.data_bytes())
    }

    /// The Initiator Task Tag, which lies in the same place in all PDUs.
    pub fn task_tag(&self) -> u32 {
        Field::get(&self.0, 16)
    }
}

/// A field of a header: how it lies in the bytes.
pub(super) trait Field: Copy {
    fn get(bytes: &[u8; HEADER_BYTES], at: usize) -> Self;
    fn put(self, bytes: &mut [u8; HEADER_BYTES], at: usize);
}

macro_rules! big_endian_fields {
    ($($number:ty),*) => {$(
        impl Field for $number {
            fn get(bytes: &[u8; HEADER_BYTES], at: usize) -> $number {
                let field = bytes[at..].first_chunk().expect("the field lies in the header");
                <$number>::from_be_bytes(*field)
            }

            fn put(self, bytes: &mut [u8; HEADER_BYTES], at: usize) {
                bytes[at..at + size_of::<$number>()].copy_from_slice(&self.to_be_bytes());
            }
        }
    )*};
}

big_endian_fields!(u8, u16, u32, u64);

impl<const N: usize> Field for [u8; N] {
    fn get(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
        *bytes[at..].first_chunk().expect("the field lies in the header")
    }

    fn put(self, bytes: &mut [u8; HEADER_BYTES], at: usize) {
        bytes[at..at + N].copy_from_slice(&self);
    }
}

impl Field for Isid {
    fn get(bytes: &[u8; HEADER_BYTES], at: usize) -> Isid {
        Isid(Field::get(bytes, at))
    }

    fn put(self, bytes: &mut [u8; HEADER_BYTES], at: usize) {
        self.0.put(bytes, at);
    }
}
