//! Digests (RFC 7143 §13.1): CRC32C over a header or a data segment with its padding.

/// Whether a part of a PDU carries a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Digest {
    /// None.
    #[default]
    None,
    /// CRC32C, four bytes.
    Crc32c,
}

impl Digest {
    /// Bytes that it takes.
    pub fn bytes(self) -> usize {
        match self {
            Digest::None => 0,
            Digest::Crc32c => 4,
        }
    }

    /// The value that negotiates it.
    pub fn name(self) -> &'static str {
        match self {
            Digest::None => "None",
            Digest::Crc32c => "CRC32C",
        }
    }
}

/// What a connection agreed on; before the full feature phase, neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digests {
    /// Of the header.
    pub header: Digest,
    /// Of the data segment.
    pub data: Digest,
}

/// The digest of `bytes` followed by as many zeroes as pad them to a multiple of four, as it is sent.
pub(super) fn crc32c_padded(bytes: &[u8]) -> [u8; 4] {
    let crc = crc32c::crc32c(bytes);
    crc32c::crc32c_append(crc, &[0; 3][..padding(bytes.len())]).to_le_bytes()
}

/// Bytes that pad `len` to a multiple of four.
pub(super) fn padding(len: usize) -> usize {
    len.next_multiple_of(4) - len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_rfcs_examples() {
        // RFC 7143 Appendix A: 32 zeroes, 32 ones, and the numbers from 0 to 31.
        assert_eq!(crc32c_padded(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(crc32c_padded(&[0xff; 32]), [0x43, 0xab, 0xa8, 0x62]);
        let counting: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c_padded(&counting), [0x4e, 0x79, 0xdd, 0x46]);
    }

    #[test]
    fn padding_counts_as_zeroes() {
        assert_eq!(crc32c_padded(&[1, 2, 3]), crc32c_padded(&[1, 2, 3, 0]));
    }
}
