//! Whole PDUs on a stream: header, additional headers, data, each with its digest.

use super::digest::{Digest, Digests, crc32c_padded, padding};
use super::header::{HEADER_BYTES, Header};

/// One whole PDU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Its additional header segments.
    pub additional: &'a [u8],
    /// Its data, without padding.
    pub data: &'a [u8],
    /// Length of all of it in the stream.
    pub bytes: usize,
}

/// Why what comes cannot be read on: the connection has to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The data is longer than was agreed.
    #[error("a PDU announces {len} bytes of data, more than the {max} agreed")]
    TooLong {
        /// What was announced.
        len: usize,
        /// What was agreed.
        max: usize,
    },
    /// The header is damaged.
    #[error("the digest of a header is wrong")]
    HeaderDigest,
    /// The data is damaged.
    #[error("the digest of data is wrong")]
    DataDigest,
}

/// The PDU at the front of `input`, whose data has at most `data_bytes_max` bytes; `None` if it is not
/// complete yet. What is too long is told as soon as its header is there.
pub fn frame(input: &[u8], digests: Digests, data_bytes_max: usize) -> Result<Option<Frame<'_>>, FrameError> {
    let Some(&header) = input.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
    let header = Header(header);
    let len = header.data_bytes();
    if len > data_bytes_max {
        return Err(FrameError::TooLong { len, max: data_bytes_max });
    }
    let heads = HEADER_BYTES + header.additional_bytes();
    let Some((head, rest)) = split(input, heads, digests.header, FrameError::HeaderDigest)? else {
        return Ok(None);
    };
    // Without data there is no digest of it.
    let digest = if len == 0 { Digest::None } else { digests.data };
    let Some((data, rest)) = split(rest, len, digest, FrameError::DataDigest)? else { return Ok(None) };
    Ok(Some(Frame { header, additional: &head[HEADER_BYTES..], data, bytes: input.len() - rest.len() }))
}

/// A part of a PDU, and what follows it.
type Split<'a> = Option<(&'a [u8], &'a [u8])>;

/// Splits `len` bytes with their padding and digest off the front.
fn split(input: &[u8], len: usize, digest: Digest, error: FrameError) -> Result<Split<'_>, FrameError> {
    let Some((padded, rest)) = input.split_at_checked(len + padding(len)) else { return Ok(None) };
    let Some((sum, rest)) = rest.split_at_checked(digest.bytes()) else { return Ok(None) };
    // Padding is not ours to judge: the digest covers what was sent there.
    if digest == Digest::Crc32c && sum != crc32c_padded(padded) {
        return Err(error);
    }
    Ok(Some((&padded[..len], rest)))
}

/// Bytes that go before and behind the data of a PDU on the stream.
#[derive(Debug, Clone, Copy)]
pub struct Seal {
    head: [u8; HEADER_BYTES + 4],
    head_bytes: usize,
    tail: [u8; 7],
    tail_bytes: usize,
}

impl Seal {
    /// What goes before the data.
    pub fn head(&self) -> &[u8] {
        &self.head[..self.head_bytes]
    }

    /// What goes behind it: padding and digest.
    pub fn tail(&self) -> &[u8] {
        &self.tail[..self.tail_bytes]
    }
}

/// Makes a header and its data ready to be sent: sets the length and computes the digests.
pub fn seal(mut header: Header, data: &[u8], digests: Digests) -> Seal {
    header.set_data_bytes(data.len());
    let mut seal =
        Seal { head: [0; HEADER_BYTES + 4], head_bytes: HEADER_BYTES, tail: [0; 7], tail_bytes: 0 };
    seal.head[..HEADER_BYTES].copy_from_slice(&header.0);
    if digests.header == Digest::Crc32c {
        seal.head[HEADER_BYTES..].copy_from_slice(&crc32c_padded(&header.0));
        seal.head_bytes += 4;
    }
    seal.tail_bytes = padding(data.len());
    if digests.data == Digest::Crc32c && !data.is_empty() {
        seal.tail[seal.tail_bytes..seal.tail_bytes + 4].copy_from_slice(&crc32c_padded(data));
        seal.tail_bytes += 4;
    }
    seal
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pdu::{NO_TAG, NopIn, NopOut};
    use proptest::prelude::*;

    const BOTH: Digests = Digests { header: Digest::Crc32c, data: Digest::Crc32c };

    fn sent(header: Header, data: &[u8], digests: Digests) -> Vec<u8> {
        let seal = seal(header, data, digests);
        [seal.head(), data, seal.tail()].concat()
    }

    #[test]
    fn a_ping_has_the_bytes_that_the_rfc_gives() {
        let ping = NopIn {
            flags: 0x80,
            task_tag: NO_TAG,
            transfer_tag: 7,
            stat_sn: 1,
            exp_cmd_sn: 2,
            max_cmd_sn: 3,
            ..NopIn::default()
        };
        let mut golden = [0; 48];
        golden[..2].copy_from_slice(&[0x20, 0x80]);
        golden[16..20].fill(0xff);
        golden[23] = 7;
        golden[27] = 1;
        golden[31] = 2;
        golden[35] = 3;
        assert_eq!(ping.header().0, golden);
        assert_eq!(NopIn::parse(&Header(golden)), ping);
    }

    #[test]
    fn every_flipped_bit_is_found_by_the_digests() {
        let whole = sent(NopOut { task_tag: 5, ..NopOut::default() }.header(), b"hello", BOTH);
        assert!(frame(&whole, BOTH, 64).unwrap().is_some());
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A damaged length may also make the PDU too long or leave it incomplete.
            assert!(!matches!(frame(&damaged, BOTH, 64), Ok(Some(_))), "bit {bit}");
        }
    }

    #[test]
    fn what_is_too_long_is_told_by_its_header_alone() {
        let mut header = NopOut::default().header();
        header.set_data_bytes(65);
        assert_eq!(frame(&header.0, BOTH, 64), Err(FrameError::TooLong { len: 65, max: 64 }));
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_framed_once_complete(
            data in prop::collection::vec(any::<u8>(), 0..40), header_digest: bool, data_digest: bool,
        ) {
            let digest = |on| if on { Digest::Crc32c } else { Digest::None };
            let digests = Digests { header: digest(header_digest), data: digest(data_digest) };
            let whole = sent(NopOut::default().header(), &data, digests);
            for cut in 0..whole.len() {
                prop_assert_eq!(frame(&whole[..cut], digests, 64), Ok(None));
            }
            let framed = frame(&whole, digests, 64).unwrap().unwrap();
            prop_assert_eq!(framed.data, &data[..]);
            prop_assert_eq!(framed.bytes, whole.len());
        }

        #[test]
        fn foreign_bytes_never_panic(input: Vec<u8>, on: bool) {
            let _ = frame(&input, if on { BOTH } else { Digests::default() }, 64);
        }
    }
}
