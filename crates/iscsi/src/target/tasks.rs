//! SCSI commands under way, and what they wait for.

use std::sync::Arc;

use tokio::task::AbortHandle;

use crate::pdu::{self, NO_TAG, ScsiCommand, command};
use crate::scsi::{Era, Fault, Reply, Unit, Work};

/// A sequence of solicited data that was asked for.
#[derive(Debug)]
pub(super) struct Solicited {
    pub(super) transfer_tag: u32,
    /// Bytes that are still to come.
    pub(super) left: u32,
    /// Number of the next PDU.
    pub(super) data_sn: u32,
}

/// What a command waits for.
#[derive(Debug)]
pub(super) enum Phase {
    /// Unsolicited data, and the number of its next PDU.
    Unsolicited(u32),
    /// Its turn: memory, or an ORDERED command before it.
    Queued,
    /// Solicited data.
    Solicited,
    /// The disk.
    Running(AbortHandle),
}

/// A command under way.
pub(super) struct Task {
    pub(super) pdu: ScsiCommand,
    pub(super) is_immediate: bool,
    /// Its place among the commands of the session.
    pub(super) arrival: u64,
    pub(super) unit: Arc<Unit>,
    pub(super) era: Era,
    pub(super) work: Option<Work>,
    pub(super) phase: Phase,
    /// A buffer for the data, of any length that is enough for what may come in this phase.
    pub(super) buffer: Vec<u8>,
    /// Bytes of data in it.
    pub(super) filled: usize,
    /// Bytes that came in all; what is beyond the need of the command is not kept.
    pub(super) received: u32,
    /// Bytes that were asked for by R2Ts or are unsolicited: where the next R2T begins.
    pub(super) asked: u32,
    pub(super) solicited: Vec<Solicited>,
    pub(super) r2ts: u32,
    /// Memory that it is booked with.
    pub(super) booked: usize,
}

impl Task {
    /// Bytes of data that the command needs and that its initiator has.
    pub(super) fn needed(&self) -> u32 {
        let work = self.work.as_ref().map_or(0, |work| work.data_out_bytes);
        work.min(outgoing(&self.pdu))
    }

    /// Bytes of its data, in whichever direction.
    pub(super) fn data_bytes(&self) -> usize {
        let read = self.work.as_ref().map_or(0, |work| work.read_bytes);
        self.needed().max(read.min(incoming(&self.pdu))) as usize
    }

    pub(super) fn is_ordered(&self) -> bool {
        is_ordered(&self.pdu)
    }

    /// Whether it is booked as a transfer, rather than as unsolicited data.
    pub(super) fn has_begun(&self) -> bool {
        matches!(self.phase, Phase::Solicited | Phase::Running(_))
    }

    /// Whether its initiator has to send something before it goes on.
    pub(super) fn waits_for_data(&self) -> bool {
        matches!(self.phase, Phase::Unsolicited(_)) || !self.solicited.is_empty()
    }

    /// Keeps a piece of data.
    pub(super) fn receive(&mut self, piece: &[u8]) {
        let wanted = (self.needed() as usize).saturating_sub(self.filled).min(piece.len());
        self.buffer[self.filled..self.filled + wanted].copy_from_slice(&piece[..wanted]);
        self.filled += wanted;
        self.received = self.received.saturating_add(u32::try_from(piece.len()).unwrap_or(u32::MAX));
    }
}

/// Bytes that the initiator means to send.
pub(super) fn outgoing(pdu: &ScsiCommand) -> u32 {
    if pdu.flags & command::WRITE != 0 { pdu.expected_bytes } else { 0 }
}

/// Bytes that the initiator means to take. Of a command with data both ways nothing is supported.
pub(super) fn incoming(pdu: &ScsiCommand) -> u32 {
    if pdu.flags & (command::READ | command::WRITE) == command::READ { pdu.expected_bytes } else { 0 }
}

pub(super) fn is_ordered(pdu: &ScsiCommand) -> bool {
    pdu.flags & command::ATTRIBUTE == command::ORDERED
}

/// What a command that went to the disk came to.
pub(super) enum Outcome {
    /// A read: the buffer, and how much of it is data.
    Read(Vec<u8>, Result<usize, Fault>),
    /// Anything else, with the buffer of its data.
    Other(Vec<u8>, Reply),
    /// It was no command: what was aborted at units has ended, in all sessions.
    Settled,
}

/// A command that has finished.
pub(super) struct Finished {
    pub(super) task_tag: u32,
    pub(super) outcome: Outcome,
}

/// How much was transferred against what was expected, as the flags and the count of a response.
pub(super) fn residual(expected: u32, available: u32) -> (u8, u32) {
    match expected.cmp(&available) {
        std::cmp::Ordering::Less => (pdu::residual::OVERFLOW, available - expected),
        std::cmp::Ordering::Equal => (0, 0),
        std::cmp::Ordering::Greater => (pdu::residual::UNDERFLOW, expected - available),
    }
}

/// Target transfer tags: any number but the one that means none.
#[derive(Debug, Default)]
pub(super) struct Tags(u32);

impl Tags {
    pub(super) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(1);
        if self.0 == NO_TAG {
            self.0 = 0;
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn residuals_tell_more_and_less() {
        assert_eq!(residual(512, 512), (0, 0));
        assert_eq!(residual(512, 100), (pdu::residual::UNDERFLOW, 412));
        assert_eq!(residual(0, 512), (pdu::residual::OVERFLOW, 512));
    }

    #[test]
    fn no_tag_is_none() {
        let mut tags = Tags(NO_TAG - 1);
        assert_eq!((tags.next(), tags.next()), (0, 1));
    }
}
