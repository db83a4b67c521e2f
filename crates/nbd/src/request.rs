//! Requests of the transmission phase: their form on the wire, both ways.
//!
//! Pure functions without a socket. What came from outside is never trusted: [`parse`] only takes the
//! header apart; whether the request makes sense for an export is the server's to judge.

use crate::proto::{EXTENDED_REQUEST_MAGIC, Fields, Framing, REQUEST_MAGIC, flag};

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // The names are those of the protocol document.
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// A command that this crate does not know.
    Unknown(u16),
}

impl Command {
    fn from_wire(number: u16) -> Command {
        match number {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Command::Read => 0,
            Command::Write => 1,
            Command::Disconnect => 2,
            Command::Flush => 3,
            Command::Trim => 4,
            Command::Cache => 5,
            Command::WriteZeroes => 6,
            Command::BlockStatus => 7,
            Command::Unknown(other) => other,
        }
    }
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags, see [`flag`].
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// The client's name for the request, repeated in the reply.
    pub cookie: u64,
    /// First byte that is meant.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The bytes are no request; the stream cannot be understood from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a request, got magic {0:#010x}")]
pub struct NotARequest(pub u32);

/// Length of a request's header in bytes.
pub fn head_bytes(framing: Framing) -> usize {
    if framing == Framing::Extended { 32 } else { 28 }
}

/// Takes the header of a request off the front of `input`; `None` if it is not complete yet. A wrong
/// magic is told as soon as it is there.
pub fn parse(framing: Framing, input: &[u8]) -> Result<Option<Request>, NotARequest> {
    let mut fields = Fields(input);
    let Some(magic) = fields.u32() else { return Ok(None) };
    let expected = if framing == Framing::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    if magic != expected {
        return Err(NotARequest(magic));
    }
    let mut rest = || {
        let flags = fields.u16()?;
        let command = Command::from_wire(fields.u16()?);
        let cookie = fields.u64()?;
        let offset = fields.u64()?;
        let len = if framing == Framing::Extended { fields.u64()? } else { u64::from(fields.u32()?) };
        Some(Request { flags, command, cookie, offset, len })
    };
    Ok(rest())
}

impl Request {
    /// Bytes of payload that follow the header.
    pub fn payload_bytes(&self, framing: Framing) -> u64 {
        let flagged = framing == Framing::Extended && self.flags & flag::PAYLOAD_LEN != 0;
        if self.command == Command::Write || flagged { self.len } else { 0 }
    }

    /// Whether a command flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Appends the header to `out`. Without [`Framing::Extended`] the length must fit 32 bits, which the
    /// client sees to by splitting what is longer.
    pub fn encode(&self, framing: Framing, out: &mut Vec<u8>) {
        let extended = framing == Framing::Extended;
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let payload = if extended && self.command == Command::Write { flag::PAYLOAD_LEN } else { 0 };
        out.extend_from_slice(&magic.to_be_bytes());
        out.extend_from_slice(&(self.flags | payload).to_be_bytes());
        out.extend_from_slice(&self.command.to_wire().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&self.len.to_be_bytes());
        } else {
            let len = u32::try_from(self.len).expect("the client splits requests that 32 bits cannot hold");
            out.extend_from_slice(&len.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FRAMINGS: [Framing; 3] = [Framing::Simple, Framing::Structured, Framing::Extended];

    #[test]
    fn a_read_has_the_bytes_that_the_document_gives() {
        let read = Request { flags: 0, command: Command::Read, cookie: 7, offset: 0x1000, len: 512 };
        let mut out = Vec::new();
        read.encode(Framing::Simple, &mut out);
        let golden = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\x02\0";
        assert_eq!(out, golden);
    }

    #[test]
    fn extended_writes_carry_the_payload_flag() {
        let write = Request { flags: 0, command: Command::Write, cookie: 1, offset: 2, len: 3 };
        let mut out = Vec::new();
        write.encode(Framing::Extended, &mut out);
        let parsed = parse(Framing::Extended, &out).unwrap().unwrap();
        assert_eq!(parsed.flags, flag::PAYLOAD_LEN);
        assert_eq!(parsed.payload_bytes(Framing::Extended), 3);
    }

    #[test]
    fn a_wrong_magic_is_told_before_the_header_is_complete() {
        for framing in FRAMINGS {
            assert_eq!(parse(framing, b"GET "), Err(NotARequest(0x4745_5420)));
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_parsed_once_complete(
            flags in 0u16..32, command in 0u16..9, cookie: u64, offset: u64, len: u32,
        ) {
            let request =
                Request { flags, command: Command::from_wire(command), cookie, offset, len: len.into() };
            for framing in FRAMINGS {
                let mut out = Vec::new();
                request.encode(framing, &mut out);
                prop_assert_eq!(out.len(), head_bytes(framing));
                for cut in 0..out.len() {
                    prop_assert_eq!(parse(framing, &out[..cut]), Ok(None));
                }
                let parsed = parse(framing, &out).unwrap().unwrap();
                prop_assert_eq!(Request { flags: parsed.flags & !flag::PAYLOAD_LEN, ..parsed }, request);
            }
        }

        #[test]
        fn foreign_bytes_never_panic(input: Vec<u8>, valid_magic: bool) {
            for framing in FRAMINGS {
                let mut input = input.clone();
                if valid_magic && input.len() >= 4 {
                    let magic =
                        if framing == Framing::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
                    input[..4].copy_from_slice(&magic.to_be_bytes());
                }
                if let Ok(Some(request)) = parse(framing, &input) {
                    request.payload_bytes(framing);
                }
            }
        }
    }
}
