//! Replies of the transmission phase: their form on the wire, both ways.
//!
//! Pure functions without a socket. A server encodes a [`Head`] and puts the payload behind it; a client
//! takes a [`ReplyHead`] off the front of what came and then deals with the payload that it announces.

use std::ops::Deref;

use crate::limits::STRING_BYTES_MAX;
use crate::proto::{
    EXTENDED_REPLY_MAGIC, Errno, Fields, Framing, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO,
    STRUCTURED_REPLY_MAGIC,
};
use crate::request::Request;

/// Longest header of a reply in bytes, with the offset that precedes data and the length of a hole.
const HEAD_BYTES_MAX: usize = 32 + 12;

const FLAG_DONE: u16 = 1;

/// Stands for a length that 32 bits cannot hold: the longest that keeps every alignment up to a chunk.
const LEN_CUT: u32 = 0xffff_0000;

mod chunk {
    pub(super) const NONE: u16 = 0;
    pub(super) const OFFSET_DATA: u16 = 1;
    pub(super) const OFFSET_HOLE: u16 = 2;
    pub(super) const BLOCK_STATUS: u16 = 5;
    pub(super) const BLOCK_STATUS_EXT: u16 = 6;
    pub(super) const ERROR_BIT: u16 = 1 << 15;
    pub(super) const ERROR: u16 = ERROR_BIT + 1;
}

/// Whether a chunk is the last of its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// More chunks follow.
    No,
    /// The reply is complete with this chunk.
    Yes,
}

/// What `base:allocation` says of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Length in bytes.
    pub len: u64,
    /// [`STATE_HOLE`] and [`STATE_ZERO`].
    pub flags: u64,
}

/// The encoded front of a reply, kept off the heap.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    len: usize,
}

impl Head {
    fn new() -> Head {
        Head { bytes: [0; HEAD_BYTES_MAX], len: 0 }
    }

    fn push(mut self, field: &[u8]) -> Head {
        self.bytes[self.len..self.len + field.len()].copy_from_slice(field);
        self.len += field.len();
        self
    }

    fn simple(errno: u32, cookie: u64) -> Head {
        let head = Head::new().push(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.push(&errno.to_be_bytes()).push(&cookie.to_be_bytes())
    }

    /// The head of a chunk whose payload has `len` bytes.
    fn chunk(framing: Framing, request: &Request, last: Last, kind: u16, len: u64) -> Head {
        let extended = framing == Framing::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        let flags = if last == Last::Yes { FLAG_DONE } else { 0 };
        let head = Head::new().push(&magic.to_be_bytes()).push(&flags.to_be_bytes());
        let head = head.push(&kind.to_be_bytes()).push(&request.cookie.to_be_bytes());
        if extended {
            head.push(&request.offset.to_be_bytes()).push(&len.to_be_bytes())
        } else {
            head.push(&(len as u32).to_be_bytes())
        }
    }
}

impl Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Success of a request whose reply has no payload.
pub fn success(framing: Framing, request: &Request) -> Head {
    match framing {
        Framing::Extended => Head::chunk(framing, request, Last::Yes, chunk::NONE, 0),
        // Structured replies allow the simple form here, and it is shorter.
        Framing::Simple | Framing::Structured => Head::simple(0, request.cookie),
    }
}

/// Bytes that stand before the data of a read.
pub fn data_head_bytes(framing: Framing) -> usize {
    match framing {
        Framing::Simple => 16,
        Framing::Structured => 20 + 8,
        Framing::Extended => 32 + 8,
    }
}

/// The front of `len` bytes of data from `offset`, as long as [`data_head_bytes`] says. A simple reply has
/// exactly one piece of data, which is the whole.
pub fn data(framing: Framing, request: &Request, last: Last, offset: u64, len: usize) -> Head {
    match framing {
        Framing::Simple => Head::simple(0, request.cookie),
        Framing::Structured | Framing::Extended => {
            Head::chunk(framing, request, last, chunk::OFFSET_DATA, len as u64 + 8)
                .push(&offset.to_be_bytes())
        }
    }
}

/// `len` bytes from `offset` that read as zeroes. Not for [`Framing::Simple`].
pub fn hole(framing: Framing, request: &Request, last: Last, offset: u64, len: u32) -> Head {
    let head = Head::chunk(framing, request, last, chunk::OFFSET_HOLE, 12);
    head.push(&offset.to_be_bytes()).push(&len.to_be_bytes())
}

/// The success of a read of no bytes, which has no chunk of data.
pub fn nothing(framing: Framing, request: &Request) -> Head {
    match framing {
        Framing::Simple => Head::simple(0, request.cookie),
        _ => Head::chunk(framing, request, Last::Yes, chunk::NONE, 0),
    }
}

/// Refuses a request. The message is for people; it is cut at the protocol's limit for strings and left
/// out where the framing has no place for it.
pub fn error(framing: Framing, request: &Request, errno: Errno, message: &str) -> Vec<u8> {
    if framing == Framing::Simple {
        return Head::simple(errno as u32, request.cookie).to_vec();
    }
    let message = &message[..message.floor_char_boundary(STRING_BYTES_MAX)];
    let head = Head::chunk(framing, request, Last::Yes, chunk::ERROR, 6 + message.len() as u64);
    let mut out = head.to_vec();
    out.extend_from_slice(&(errno as u32).to_be_bytes());
    out.extend_from_slice(&(message.len() as u16).to_be_bytes());
    out.extend_from_slice(message.as_bytes());
    out
}

/// Answers what is known of a range, at least one descriptor. Not for [`Framing::Simple`].
pub fn block_status(framing: Framing, request: &Request, context: u32, states: &[Status]) -> Vec<u8> {
    let extended = framing == Framing::Extended;
    let (kind, front, each) =
        if extended { (chunk::BLOCK_STATUS_EXT, 8, 16) } else { (chunk::BLOCK_STATUS, 4, 8) };
    let len = front + states.len() as u64 * each;
    let mut out = Head::chunk(framing, request, Last::Yes, kind, len).to_vec();
    out.extend_from_slice(&context.to_be_bytes());
    if extended {
        out.extend_from_slice(&(states.len() as u32).to_be_bytes());
    }
    for state in states {
        if extended {
            out.extend_from_slice(&state.len.to_be_bytes());
            out.extend_from_slice(&state.flags.to_be_bytes());
        } else {
            // A compact length has 32 bits; the client asks again for what is cut off.
            let len = u32::try_from(state.len).unwrap_or(LEN_CUT);
            out.extend_from_slice(&len.to_be_bytes());
            out.extend_from_slice(&(state.flags as u32).to_be_bytes());
        }
    }
    out
}

/// What the payload of a reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A simple reply: the error, or the data of a read without further framing.
    Simple(Option<Errno>),
    /// No payload.
    None,
    /// An offset and data.
    Data,
    /// An offset and the length of a hole.
    Hole,
    /// Descriptors of 32 bits.
    BlockStatus,
    /// Descriptors of 64 bits.
    BlockStatusExtended,
    /// An error with a message.
    Error,
}

/// The header of a reply, as a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHead {
    /// What the payload is.
    pub kind: Kind,
    /// Whether the reply is complete with this.
    pub last: Last,
    /// The name of the request that is answered.
    pub cookie: u64,
    /// Bytes of payload; 0 for [`Kind::Simple`], which does not say.
    pub payload_bytes: u64,
}

/// What came is not a reply, or one that the protocol forbids here: the connection is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the server broke the protocol: {0}")]
pub struct BadReply(pub &'static str);

/// Takes the header of a reply off the front of `input`, with its length in bytes; `None` if it is not
/// complete yet.
pub fn parse(framing: Framing, input: &[u8]) -> Result<Option<(ReplyHead, usize)>, BadReply> {
    let mut fields = Fields(input);
    let Some(magic) = fields.u32() else { return Ok(None) };
    let parsed = match (magic, framing) {
        (SIMPLE_REPLY_MAGIC, Framing::Simple | Framing::Structured) => parse_simple(&mut fields),
        (STRUCTURED_REPLY_MAGIC, Framing::Structured) | (EXTENDED_REPLY_MAGIC, Framing::Extended) => {
            parse_chunk(framing, &mut fields)?
        }
        _ => return Err(BadReply("a reply begins with a wrong magic")),
    };
    Ok(parsed.map(|head| (head, input.len() - fields.0.len())))
}

fn parse_simple(fields: &mut Fields<'_>) -> Option<ReplyHead> {
    let errno = match fields.u32()? {
        0 => None,
        number => Some(Errno::from_wire(number)),
    };
    Some(ReplyHead { kind: Kind::Simple(errno), last: Last::Yes, cookie: fields.u64()?, payload_bytes: 0 })
}

fn parse_chunk(framing: Framing, fields: &mut Fields<'_>) -> Result<Option<ReplyHead>, BadReply> {
    let mut take = || {
        let flags = fields.u16()?;
        let kind = fields.u16()?;
        let cookie = fields.u64()?;
        let len = if framing == Framing::Extended {
            fields.u64()?; // The request's offset again, which the cookie tells as well.
            fields.u64()?
        } else {
            u64::from(fields.u32()?)
        };
        Some((flags, kind, cookie, len))
    };
    let Some((flags, number, cookie, payload_bytes)) = take() else { return Ok(None) };
    let (kind, fits) = match number {
        chunk::NONE => (Kind::None, payload_bytes == 0),
        chunk::OFFSET_DATA => (Kind::Data, payload_bytes > 8),
        chunk::OFFSET_HOLE => (Kind::Hole, payload_bytes == 12),
        chunk::BLOCK_STATUS => (Kind::BlockStatus, payload_bytes >= 12 && payload_bytes % 8 == 4),
        chunk::BLOCK_STATUS_EXT => {
            (Kind::BlockStatusExtended, payload_bytes >= 24 && payload_bytes % 16 == 8)
        }
        error if error & chunk::ERROR_BIT != 0 => (Kind::Error, payload_bytes >= 6),
        _ => return Err(BadReply("a reply has an unknown type")),
    };
    if !fits {
        return Err(BadReply("the payload of a reply has an impossible length"));
    }
    let last = if flags & FLAG_DONE != 0 { Last::Yes } else { Last::No };
    Ok(Some(ReplyHead { kind, last, cookie, payload_bytes }))
}

/// Takes an error's payload apart: the error, and the message with control characters escaped.
pub fn parse_error(payload: &[u8]) -> Result<(Errno, String), BadReply> {
    let mut fields = Fields(payload);
    let mut take = || {
        let errno = Errno::from_wire(fields.u32()?);
        let len = usize::from(fields.u16()?);
        let message = String::from_utf8_lossy(fields.bytes(len)?);
        Some((errno, message.chars().flat_map(char::escape_debug).collect()))
    };
    take().ok_or(BadReply("an error ends before its message"))
}

/// Takes the payload of a block status apart: the context, and the descriptors.
pub fn parse_block_status(kind: Kind, payload: &[u8]) -> Result<(u32, Vec<Status>), BadReply> {
    let mut fields = Fields(payload);
    let mut take = || {
        let context = fields.u32()?;
        let mut states = Vec::with_capacity(payload.len() / 8);
        if kind == Kind::BlockStatusExtended {
            let _count = fields.u32()?; // The length of the payload says it too, and was checked.
            while !fields.is_empty() {
                states.push(Status { len: fields.u64()?, flags: fields.u64()? });
            }
        } else {
            while !fields.is_empty() {
                states.push(Status { len: fields.u32()?.into(), flags: fields.u32()?.into() });
            }
        }
        Some((context, states))
    };
    let (context, states) = take().ok_or(BadReply("a block status is cut off"))?;
    if states.is_empty() || states.iter().any(|s| s.len == 0) {
        return Err(BadReply("a block status has an empty extent"));
    }
    Ok((context, states))
}

impl Status {
    /// Whether the range is known to read as zeroes.
    pub fn is_zero(&self) -> bool {
        self.flags & STATE_ZERO != 0
    }

    /// The status of a range of `len` bytes that is a hole.
    pub fn of_hole(len: u64) -> Status {
        Status { len, flags: STATE_HOLE | STATE_ZERO }
    }

    /// The status of a range of `len` bytes that holds data.
    pub fn of_data(len: u64) -> Status {
        Status { len, flags: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Command;
    use proptest::prelude::*;

    const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

    fn request() -> Request {
        Request { flags: 0, command: Command::Read, cookie: 0x0102_0304_0506_0708, offset: 4096, len: 8 }
    }

    #[test]
    fn a_chunk_of_data_has_the_bytes_that_the_document_gives() {
        let head = data(Framing::Structured, &request(), Last::Yes, 4096, 8);
        let golden: &[u8] = b"\x66\x8e\x33\xef\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x10\
            \0\0\0\0\0\0\x10\0";
        assert_eq!(&*head, golden);
    }

    #[test]
    fn every_data_head_is_as_long_as_it_says() {
        for framing in FRAMINGS {
            let head = data(framing, &request(), Last::No, 0, 1);
            assert_eq!(head.len(), data_head_bytes(framing), "{framing:?}");
        }
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let message = "ä".repeat(STRING_BYTES_MAX);
        let out = error(Framing::Structured, &request(), Errno::Io, &message);
        let (_, head) = parse(Framing::Structured, &out).unwrap().unwrap();
        let (errno, told) = parse_error(&out[head..]).unwrap();
        assert_eq!((errno, told.len()), (Errno::Io, STRING_BYTES_MAX));
    }

    #[test]
    fn an_error_cannot_smuggle_control_characters_into_a_terminal() {
        let out = error(Framing::Extended, &request(), Errno::Io, "\x1b[2J");
        let (_, head) = parse(Framing::Extended, &out).unwrap().unwrap();
        assert!(!parse_error(&out[head..]).unwrap().1.contains('\x1b'));
    }

    #[test]
    fn block_status_survives_the_wire_in_both_sizes() {
        let states = [Status::of_data(4096), Status::of_hole(1 << 20)];
        for framing in [Framing::Structured, Framing::Extended] {
            let out = block_status(framing, &request(), 9, &states);
            let (head, len) = parse(framing, &out).unwrap().unwrap();
            assert_eq!(head.payload_bytes as usize, out.len() - len);
            let parsed = parse_block_status(head.kind, &out[len..]).unwrap();
            assert_eq!(parsed, (9, states.to_vec()));
        }
    }

    #[test]
    fn an_extent_that_32_bits_cannot_hold_is_cut_not_wrapped() {
        let out = block_status(Framing::Structured, &request(), 1, &[Status::of_hole(1 << 40)]);
        let (head, len) = parse(Framing::Structured, &out).unwrap().unwrap();
        let (_, states) = parse_block_status(head.kind, &out[len..]).unwrap();
        assert_eq!(states, [Status::of_hole(0xffff_0000)]);
    }

    proptest! {
        #[test]
        fn foreign_bytes_never_panic(input: Vec<u8>, magic in 0usize..4) {
            let mut input = input;
            let magics = [SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, EXTENDED_REPLY_MAGIC];
            if let (Some(magic), true) = (magics.get(magic), input.len() >= 4) {
                input[..4].copy_from_slice(&magic.to_be_bytes());
            }
            for framing in FRAMINGS {
                if let Ok(Some((_, len))) = parse(framing, &input) {
                    prop_assert!(len <= input.len());
                }
            }
            let _ = parse_error(&input);
            let _ = parse_block_status(Kind::BlockStatus, &input);
            let _ = parse_block_status(Kind::BlockStatusExtended, &input);
        }
    }
}
