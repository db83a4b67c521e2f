//! A disk as SCSI sees it (SPC-4, SBC-3), without any transport.
//!
//! A [`Device`] is what an initiator finds behind one target: [`Unit`]s under numbers. A command goes through
//! [`Device::begin`], which answers at once what needs no medium and checks everything else that can be
//! checked beforehand; what is left is [`Work`], carried out by [`Unit::try_read`], [`Unit::try_write`] or
//! [`Unit::run`].
//!
//! Consistency: that of [`Disk`](block::Disk); COMPARE AND WRITE and ORWRITE exclude each other and every
//! write. Durability: the cache is reported as volatile; SYNCHRONIZE CACHE and FUA flush the disk.
//! Cancellation: dropping what [`Unit::run`] returns withdraws the command; the medium is as the disk says.
//! Crash: reservations and registrations live in memory only, APTPL is refused, and every nexus begins with
//! a unit attention, so that an initiator learns that they are gone.

mod device;
mod inquiry;
mod media;
mod mode;
mod nexus;
mod opcodes;
mod persistent;
mod run;
mod sense;
mod unit;

pub use device::{Device, lun_of_wire, wire_of_lun};
pub use media::{Range, Work};
pub use nexus::{
    Aborting, Era, Identity, InitiatorPort, Interrupt, Nexus, NexusId, SERIAL_BYTES_MAX, TargetPort,
};
pub use sense::{Fault, Sense, Status};
pub use unit::Unit;

/// Size of a logical block in bytes: what every initiator takes.
pub const LOGICAL_BLOCK_BYTES: u32 = 512;

/// Logical blocks in a physical one, as a power of two: the 4 KiB of [`block::limits::BLOCK_BYTES`].
pub const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

/// What a command comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Its status.
    pub status: Status,
    /// Data for the initiator.
    pub data: Vec<u8>,
    /// Sense data as it is sent, empty with any status but CHECK CONDITION.
    pub sense: Vec<u8>,
}

impl Reply {
    /// Success without data.
    pub fn good() -> Reply {
        Reply::data(Vec::new())
    }

    /// Success with data.
    pub fn data(data: Vec<u8>) -> Reply {
        Reply { status: Status::Good, data, sense: Vec::new() }
    }
}

/// How a command begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin {
    /// It is answered.
    Done(Reply),
    /// It is left to carry out.
    Work(Work),
}

/// Operation codes that are known, for fuzzers and tests that want to get beyond them.
pub(crate) const OPERATION_CODES: [u8; 16] =
    [0x00, 0x03, 0x12, 0x1a, 0x15, 0x28, 0x2f, 0x41, 0x42, 0x55, 0x5e, 0x5f, 0x89, 0x8b, 0x9e, 0xa3];

/// A big-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The first `len` bytes of parameter data: an initiator gets no more than it has room for.
fn truncated(mut data: Vec<u8>, len: u64) -> Vec<u8> {
    data.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    data
}
