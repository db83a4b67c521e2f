//! The numbers of the protocol, and the few types that both sides share.
//!
//! Names follow the protocol document (`doc/proto.md` of the NBD project) without their `NBD_` prefix.

/// First magic of the server's greeting: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Magic of newstyle negotiation and of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Magic of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The server and client speak fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// The 124 zeroes after `EXPORT_NAME` are left out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Zeroes after the answer to `EXPORT_NAME` in bytes, unless both sides agreed to leave them out.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Options of the negotiation.
pub mod option {
    #![allow(missing_docs)] // The names are those of the protocol document.
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod rep {
    #![allow(missing_docs)] // The names are those of the protocol document.
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERR_BIT + 1;
    pub const ERR_POLICY: u32 = ERR_BIT + 2;
    pub const ERR_INVALID: u32 = ERR_BIT + 3;
    pub const ERR_TLS_REQD: u32 = ERR_BIT + 5;
    pub const ERR_UNKNOWN: u32 = ERR_BIT + 6;
    pub const ERR_TOO_BIG: u32 = ERR_BIT + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERR_BIT + 10;
}

/// Items of information in the answer to `INFO` and `GO`.
pub mod info {
    #![allow(missing_docs)] // The names are those of the protocol document.
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod transmission {
    #![allow(missing_docs)] // The names are those of the protocol document.
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Command flags.
pub mod flag {
    #![allow(missing_docs)] // The names are those of the protocol document.
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// The only metadata context of this crate.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Status flag of `base:allocation`: the range takes no space.
pub const STATE_HOLE: u64 = 1 << 0;
/// Status flag of `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u64 = 1 << 1;

/// How requests and replies are framed in the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Framing {
    /// Compact requests and simple replies.
    Simple,
    /// Compact requests and structured replies.
    Structured,
    /// Extended requests and replies, with 64-bit lengths.
    Extended,
}

/// The errors that the protocol knows, with their numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The disk takes no writes.
    Perm = 1,
    /// The medium failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// There is no room, or the write ends beyond the disk.
    NoSpc = 28,
    /// What was asked for cannot be done, or not fast.
    NotSup = 95,
    /// The server is going away.
    Shutdown = 108,
}

impl Errno {
    /// The error with this number; numbers that the protocol does not know count as invalid requests, as
    /// its document asks.
    pub fn from_wire(number: u32) -> Errno {
        match number {
            1 => Errno::Perm,
            5 => Errno::Io,
            28 => Errno::NoSpc,
            95 => Errno::NotSup,
            108 => Errno::Shutdown,
            _ => Errno::Inval,
        }
    }
}

/// Takes big-endian fields off the front of bytes from outside; `None` where they end too early.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with a 32-bit length before it; `None` also if it is longer than the protocol allows or
    /// no UTF-8.
    pub(crate) fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > crate::limits::STRING_BYTES_MAX {
            return None;
        }
        std::str::from_utf8(self.bytes(len)?).ok()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
