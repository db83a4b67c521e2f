//! Who talks with a unit: ports and nexuses, what a unit is known by, and what concerns all of its initiators.

use std::sync::Arc;

use block::BoxFuture;

use crate::pdu::Isid;

/// The side of an initiator: its name and the identifier of its session (RFC 7143 §4.4.3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct InitiatorPort {
    /// The initiator's name.
    pub name: String,
    /// Which of its sessions.
    pub isid: Isid,
}

/// The side of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetPort {
    /// The target's name.
    pub name: String,
    /// The portal group through which this nexus came; also its relative port identifier.
    pub group: u16,
    /// All portal groups of the target.
    pub groups: Vec<u16>,
}

/// Which nexus; unique while a device lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NexusId(pub u64);

/// An initiator port and a target port that talk with each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nexus {
    /// Which one.
    pub id: NexusId,
    /// The initiator.
    pub initiator: InitiatorPort,
    /// The target.
    pub target: Arc<TargetPort>,
}

/// By what a unit is known, whatever the path to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Serial number: printable ASCII of at most [`SERIAL_BYTES_MAX`] bytes, the same for the same disk on
    /// all its paths and after restarts.
    pub serial: String,
}

/// Longest serial number in bytes: it has to fit a designator.
pub const SERIAL_BYTES_MAX: usize = 128;

/// Where a command stands among the aborts at its unit: each begins a new era, and concerns the commands of
/// the eras before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Era(pub(super) u64);

/// Called when the commands of a nexus at a unit that began before an era are to be aborted, because another
/// one said so. It must not wait.
pub type Interrupt = Arc<dyn Fn(Era) -> Aborting + Send + Sync>;

/// Ready when the commands that are to be aborted have ended, so that none of them changes the disk any more.
pub type Aborting = BoxFuture<'static, ()>;

/// Unit attention codes (SPC-4 table F.2).
pub(super) mod attention {
    pub(in crate::scsi) const POWER_ON: u16 = 0x2900;
    pub(in crate::scsi) const RESET: u16 = 0x2903;
    pub(in crate::scsi) const MODE_CHANGED: u16 = 0x2a01;
    pub(in crate::scsi) const RESERVATIONS_PREEMPTED: u16 = 0x2a03;
    pub(in crate::scsi) const RESERVATIONS_RELEASED: u16 = 0x2a04;
    pub(in crate::scsi) const REGISTRATIONS_PREEMPTED: u16 = 0x2a05;
}
