//! The full feature phase of one connection: commands in, PDUs out; PDUs in, answers out. A state machine
//! without a socket; it is told what time it is.
//!
//! Everything that is needed to send a command again is kept until it is answered, so that a lost connection
//! loses no command: [`Session::into_jobs`] gives them to the next.
//!
//! A target can give wrong data, but it cannot make this panic, keep more than was asked for, or finish a read
//! of which it sent another part than it says.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use block::DiskError;
use tokio::sync::{OwnedRwLockWriteGuard, oneshot};
use tokio::time::Instant;

use super::limits::{OUTPUT_BYTES, PONGS_MAX, SENSE_BYTES_MAX};
use super::login::Agreed;
use crate::limits::{COMMANDS_MAX, SEGMENT_BYTES_MAX};
use crate::params::Parameters;
use crate::pdu::{
    self, Async, Cdb, DataIn, DataOut, FINAL, Frame, FrameError, Header, LogoutRequest, LogoutResponse,
    NO_TAG, NopIn, NopOut, R2t, Reject, ScsiCommand, ScsiResponse, command, data_in, residual,
};

/// Task attribute SIMPLE: the unit may choose the order.
const SIMPLE: u8 = 1;

/// Reason of a [`Reject`]: the data of a PDU came damaged (RFC 7143 §11.17.1).
const DATA_DIGEST: u8 = 0x02;

/// A SCSI command and its data. Copies share the data.
#[derive(Debug, Clone)]
pub(super) struct Command {
    pub(super) cdb: Cdb,
    pub(super) transfer: Transfer,
}

/// Which way data goes.
#[derive(Debug, Clone)]
pub(super) enum Transfer {
    /// There is none.
    None,
    /// To us, at most so many bytes.
    In(u32),
    /// From us.
    Out(Arc<[u8]>),
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    /// The SCSI status.
    pub(super) status: u8,
    /// What was read.
    pub(super) data: Vec<u8>,
    /// Sense data, empty if there is none.
    pub(super) sense: Vec<u8>,
    /// Whether all data that was offered was taken.
    pub(super) is_whole: bool,
}

/// A command, and who waits for it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) command: Command,
    pub(super) done: oneshot::Sender<Result<Reply, DiskError>>,
    /// Keeps others away until the command is over, whether anybody still waits for it or not.
    #[expect(dead_code, reason = "it is there to be dropped")]
    pub(super) hold: Option<Hold>,
}

/// The right to change a part of a block, see [`UnitClient`](super::disk::UnitClient).
pub(super) type Hold = Arc<OwnedRwLockWriteGuard<()>>;

/// The connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Breach {
    /// What comes is not a PDU.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The target broke the protocol.
    #[error("the target broke the protocol: {0}")]
    Protocol(&'static str),
    /// The target ends the session of its own accord.
    #[error("the target ends the session")]
    Leaving,
}

#[derive(Debug)]
struct Task {
    job: Job,
    arrival: u64,
    begun_at: Instant,
    /// What was read so far.
    data: Vec<u8>,
    /// Data-In and R2T PDUs that came.
    data_sn: u32,
    /// Bytes of a write that were sent or asked for.
    asked_bytes: u32,
    /// R2Ts whose data is not sent yet.
    bursts: u32,
}

/// Data of a write that the target asked for, or what is left of it.
#[derive(Debug)]
struct Burst {
    task_tag: u32,
    transfer_tag: u32,
    at: u32,
    end: u32,
    data_sn: u32,
}

/// A session in its full feature phase.
#[derive(Debug)]
pub(super) struct Session {
    lun: u64,
    parameters: Parameters,
    cmd_sn: u32,
    max_cmd_sn: u32,
    exp_stat_sn: u32,
    tasks: HashMap<u32, Task>,
    arrivals: u64,
    next_tag: u32,
    /// Commands that were not sent yet, by tag, oldest first.
    commands: VecDeque<u32>,
    bursts: VecDeque<Burst>,
    /// Pings, their answers, and the logout.
    urgent: VecDeque<Header>,
    answered: u64,
    is_logged_out: bool,
}

impl Session {
    /// A session with the logical unit of this number (as on the wire).
    pub(super) fn new(agreed: Agreed, lun: u64) -> Session {
        Session {
            lun,
            parameters: agreed.parameters,
            cmd_sn: agreed.cmd_sn,
            max_cmd_sn: agreed.max_cmd_sn,
            exp_stat_sn: agreed.exp_stat_sn,
            tasks: HashMap::new(),
            arrivals: 0,
            next_tag: 0,
            commands: VecDeque::new(),
            bursts: VecDeque::new(),
            urgent: VecDeque::new(),
            answered: 0,
            is_logged_out: false,
        }
    }

    /// Commands under way, sent or not.
    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether a further command may be added.
    pub(super) fn has_room(&self) -> bool {
        self.tasks.len() < COMMANDS_MAX as usize
    }

    /// Commands that were answered on this connection.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Whether the target has confirmed a [`logout`](Self::logout).
    pub(super) fn is_logged_out(&self) -> bool {
        self.is_logged_out
    }

    /// Since when the oldest command waits.
    pub(super) fn waits_since(&self) -> Option<Instant> {
        self.tasks.values().map(|task| task.begun_at).min()
    }

    /// Takes a command on. Whoever gave up before it was sent is spared it.
    pub(super) fn add(&mut self, job: Job, now: Instant) {
        if job.done.is_closed() {
            return;
        }
        let tag = self.free_tag();
        let (arrival, begun_at) = (self.arrivals, now);
        self.arrivals += 1;
        let task = Task { job, arrival, begun_at, data: Vec::new(), data_sn: 0, asked_bytes: 0, bursts: 0 };
        self.tasks.insert(tag, task);
        self.commands.push_back(tag);
    }

    /// All commands that were not answered, oldest first.
    pub(super) fn into_jobs(self) -> Vec<Job> {
        let mut tasks: Vec<Task> = self.tasks.into_values().collect();
        tasks.sort_unstable_by_key(|task| task.arrival);
        tasks.into_iter().map(|task| task.job).collect()
    }

    /// Asks the target whether it is there.
    pub(super) fn ping(&mut self) {
        let ping =
            NopOut { flags: FINAL, task_tag: self.free_tag(), transfer_tag: NO_TAG, ..NopOut::default() };
        self.urgent.push_back(ping.header().immediate());
    }

    /// Takes leave.
    pub(super) fn logout(&mut self) {
        let request = LogoutRequest { reason: FINAL, task_tag: self.free_tag(), ..LogoutRequest::default() };
        self.urgent.push_back(request.header().immediate());
    }

    fn free_tag(&mut self) -> u32 {
        loop {
            let tag = self.next_tag;
            self.next_tag = self.next_tag.wrapping_add(1);
            if tag != NO_TAG && !self.tasks.contains_key(&tag) {
                return tag;
            }
        }
    }

    /// Appends what is to be sent to `out`, up to about [`OUTPUT_BYTES`] of it.
    pub(super) fn fill(&mut self, out: &mut Vec<u8>) {
        while out.len() < OUTPUT_BYTES {
            if let Some(mut header) = self.urgent.pop_front() {
                self.number(&mut header);
                self.push(header, &[], out);
            } else if let Some(burst) = self.bursts.pop_front() {
                self.send_burst(burst, out);
            } else if self.window_is_open()
                && let Some(tag) = self.commands.pop_front()
            {
                self.send_command(tag, out);
            } else {
                return;
            }
        }
    }

    fn window_is_open(&self) -> bool {
        self.max_cmd_sn.wrapping_sub(self.cmd_sn).cast_signed() >= 0
    }

    /// Gives an immediate request its numbers, which lie in the same place in all of them.
    fn number(&self, header: &mut Header) {
        header.0[24..28].copy_from_slice(&self.cmd_sn.to_be_bytes());
        header.0[28..32].copy_from_slice(&self.exp_stat_sn.to_be_bytes());
    }

    fn push(&self, header: Header, data: &[u8], out: &mut Vec<u8>) {
        let seal = pdu::seal(header, data, self.parameters.digests);
        out.extend_from_slice(seal.head());
        out.extend_from_slice(data);
        out.extend_from_slice(seal.tail());
    }

    fn send_command(&mut self, task_tag: u32, out: &mut Vec<u8>) {
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let Command { cdb, transfer } = task.job.command.clone();
        let (direction, expected_bytes, data) = match &transfer {
            Transfer::None => (0, 0, &[][..]),
            Transfer::In(len) => (command::READ, *len, &[][..]),
            Transfer::Out(data) => {
                let Parameters { peer_segment_bytes_max, first_burst_bytes_max, .. } = self.parameters;
                let at_once = peer_segment_bytes_max.min(first_burst_bytes_max) as usize;
                let at_once = if self.parameters.immediate_data { at_once.min(data.len()) } else { 0 };
                (command::WRITE, length(data), &data[..at_once])
            }
        };
        task.asked_bytes = length(data);
        let request = ScsiCommand {
            flags: FINAL | direction | SIMPLE,
            lun: self.lun,
            task_tag,
            expected_bytes,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
            cdb,
        };
        self.cmd_sn = self.cmd_sn.wrapping_add(1);
        self.push(request.header(), data, out);
    }

    /// Sends one segment of a burst; what is left of it goes back to the front.
    fn send_burst(&mut self, mut burst: Burst, out: &mut Vec<u8>) {
        let Some(task) = self.tasks.get_mut(&burst.task_tag) else { return };
        let Transfer::Out(data) = &task.job.command.transfer else { return };
        let data = Arc::clone(data);
        let end = burst.end.min(burst.at.saturating_add(self.parameters.peer_segment_bytes_max));
        let is_last = end == burst.end;
        if is_last {
            task.bursts -= 1;
        }
        let request = DataOut {
            flags: if is_last { FINAL } else { 0 },
            lun: self.lun,
            task_tag: burst.task_tag,
            transfer_tag: burst.transfer_tag,
            exp_stat_sn: self.exp_stat_sn,
            data_sn: burst.data_sn,
            offset: burst.at,
        };
        self.push(request.header(), &data[burst.at as usize..end as usize], out);
        if !is_last {
            burst.at = end;
            burst.data_sn += 1;
            self.bursts.push_front(burst);
        }
    }

    /// Deals with what the target sent, and says how much of it is dealt with; the rest belongs to a PDU that
    /// is not complete, and comes again with more behind it.
    pub(super) fn feed(&mut self, input: &[u8]) -> Result<usize, Breach> {
        let mut rest = input;
        while let Some(frame) = pdu::frame(rest, self.parameters.digests, SEGMENT_BYTES_MAX as usize)? {
            self.take(&frame)?;
            rest = &rest[frame.bytes..];
        }
        Ok(input.len() - rest.len())
    }

    fn take(&mut self, frame: &Frame<'_>) -> Result<(), Breach> {
        let header = &frame.header;
        match header.opcode() {
            DataIn::OPCODE => self.take_data(&DataIn::parse(header), frame.data),
            ScsiResponse::OPCODE => self.take_response(&ScsiResponse::parse(header), frame.data),
            R2t::OPCODE => self.take_r2t(&R2t::parse(header)),
            NopIn::OPCODE => self.take_ping(&NopIn::parse(header)),
            Async::OPCODE => {
                let message = Async::parse(header);
                self.advance(Some(message.stat_sn), message.exp_cmd_sn, message.max_cmd_sn);
                // Sense data that belongs to no command, and what vendors have made up, changes nothing.
                if (1..=4).contains(&message.event) { Err(Breach::Leaving) } else { Ok(()) }
            }
            Reject::OPCODE => self.take_reject(&Reject::parse(header), frame.data),
            LogoutResponse::OPCODE => {
                self.is_logged_out = true;
                Ok(())
            }
            _ => Err(Breach::Protocol("it sends what no target sends")),
        }
    }

    /// Takes over the numbers of a PDU. A status number that is not the next is taken as well: each command
    /// waits for its own answer, so that none is lost by it.
    fn advance(&mut self, stat_sn: Option<u32>, exp_cmd_sn: u32, max_cmd_sn: u32) {
        if let Some(next) = stat_sn.map(|stat_sn| stat_sn.wrapping_add(1))
            && is_after(next, self.exp_stat_sn)
        {
            self.exp_stat_sn = next;
        }
        // RFC 7143 §4.2.2.1: a window that ends before it begins, or that was closed meanwhile, says nothing.
        if !is_after(exp_cmd_sn.wrapping_sub(1), max_cmd_sn) && is_after(max_cmd_sn, self.max_cmd_sn) {
            self.max_cmd_sn = max_cmd_sn;
        }
    }

    fn take_data(&mut self, pdu: &DataIn, data: &[u8]) -> Result<(), Breach> {
        let is_last = pdu.flags & data_in::STATUS != 0;
        self.advance(is_last.then_some(pdu.stat_sn), pdu.exp_cmd_sn, pdu.max_cmd_sn);
        let task = self.tasks.get_mut(&pdu.task_tag).ok_or(UNKNOWN)?;
        let Transfer::In(wanted) = task.job.command.transfer else {
            return Err(Breach::Protocol("data came for a command that reads nothing"));
        };
        let fits = pdu.data_sn == task.data_sn
            && pdu.offset as usize == task.data.len()
            && data.len() <= wanted as usize - task.data.len();
        if !fits {
            return Err(Breach::Protocol("data came that was not asked for, or not in its order"));
        }
        task.data_sn += 1;
        if task.data.is_empty() && data.len() < wanted as usize {
            task.data.reserve_exact(wanted as usize);
        }
        task.data.extend_from_slice(data);
        if is_last { self.finish(pdu.task_tag, pdu.status, Vec::new(), 0) } else { Ok(()) }
    }

    fn take_response(&mut self, pdu: &ScsiResponse, data: &[u8]) -> Result<(), Breach> {
        self.advance(Some(pdu.stat_sn), pdu.exp_cmd_sn, pdu.max_cmd_sn);
        if pdu.response != 0 {
            return self.fail(pdu.task_tag, "the target failed to carry out the command");
        }
        let sense = data.split_first_chunk().map_or(&[][..], |(len, sense)| {
            let len = usize::from(u16::from_be_bytes(*len)).min(SENSE_BYTES_MAX);
            &sense[..len.min(sense.len())]
        });
        let differs = pdu.flags & (residual::OVERFLOW | residual::UNDERFLOW) != 0;
        self.finish(pdu.task_tag, pdu.status, sense.to_owned(), if differs { pdu.residual_bytes } else { 0 })
    }

    fn finish(&mut self, tag: u32, status: u8, sense: Vec<u8>, residual_bytes: u32) -> Result<(), Breach> {
        let task = self.tasks.remove(&tag).ok_or(UNKNOWN)?;
        self.answered += 1;
        let is_whole = match &task.job.command.transfer {
            Transfer::None => true,
            Transfer::In(wanted) => task.data.len() == *wanted as usize,
            // What was not asked for, or was asked for and not sent, cannot have been written.
            Transfer::Out(data) => {
                residual_bytes == 0 && task.asked_bytes == length(data) && task.bursts == 0
            }
        };
        // Whoever no longer waits needs no answer; the same holds below.
        let _ = task.job.done.send(Ok(Reply { status, data: task.data, sense, is_whole }));
        Ok(())
    }

    fn fail(&mut self, tag: u32, why: &str) -> Result<(), Breach> {
        let task = self.tasks.remove(&tag).ok_or(UNKNOWN)?;
        self.answered += 1;
        let _ = task.job.done.send(Err(DiskError::Io(why.to_owned())));
        Ok(())
    }

    fn take_r2t(&mut self, pdu: &R2t) -> Result<(), Breach> {
        self.advance(None, pdu.exp_cmd_sn, pdu.max_cmd_sn);
        let task = self.tasks.get_mut(&pdu.task_tag).ok_or(UNKNOWN)?;
        let Transfer::Out(data) = &task.job.command.transfer else {
            return Err(Breach::Protocol("it asks for data of a command that has none"));
        };
        let end = pdu.offset.checked_add(pdu.wanted_bytes).filter(|end| *end <= length(data));
        let (true, Some(end)) = (pdu.offset == task.asked_bytes && pdu.wanted_bytes > 0, end) else {
            return Err(Breach::Protocol("it asks for data that a command does not have, or out of order"));
        };
        if task.bursts >= self.parameters.r2t_max || pdu.r2t_sn != task.data_sn {
            return Err(Breach::Protocol("it asks for more data at a time than was agreed"));
        }
        task.data_sn += 1;
        task.bursts += 1;
        task.asked_bytes = end;
        let (task_tag, transfer_tag, at) = (pdu.task_tag, pdu.transfer_tag, pdu.offset);
        self.bursts.push_back(Burst { task_tag, transfer_tag, at, end, data_sn: 0 });
        Ok(())
    }

    fn take_ping(&mut self, pdu: &NopIn) -> Result<(), Breach> {
        // The answer to a ping of ours has a number of its own, a ping of the target tells the next one.
        let stat_sn = (pdu.task_tag != NO_TAG).then_some(pdu.stat_sn);
        self.advance(stat_sn, pdu.exp_cmd_sn, pdu.max_cmd_sn);
        if pdu.transfer_tag == NO_TAG {
            return Ok(());
        }
        if self.urgent.len() >= PONGS_MAX {
            return Err(Breach::Protocol("it pings without waiting for the answers"));
        }
        let (lun, transfer_tag) = (pdu.lun, pdu.transfer_tag);
        let pong = NopOut { flags: FINAL, lun, task_tag: NO_TAG, transfer_tag, ..NopOut::default() };
        self.urgent.push_back(pong.header().immediate());
        Ok(())
    }

    /// A refused command fails, since it would be refused again; but one whose data was damaged on the way is
    /// sent again on another connection, as is whatever else is refused.
    fn take_reject(&mut self, pdu: &Reject, data: &[u8]) -> Result<(), Breach> {
        self.advance(Some(pdu.stat_sn), pdu.exp_cmd_sn, pdu.max_cmd_sn);
        let refused = data.first_chunk().map(|header| Header(*header));
        match refused {
            Some(header) if header.opcode() == NopOut::OPCODE => Ok(()),
            Some(header) if header.opcode() == ScsiCommand::OPCODE && pdu.reason != DATA_DIGEST => {
                let why = format!("the target rejected a command (reason {:#04x})", pdu.reason);
                self.fail(header.task_tag(), &why)
            }
            _ => Err(Breach::Protocol("it rejects what it was sent")),
        }
    }
}

const UNKNOWN: Breach = Breach::Protocol("it answers a command that is not under way");

/// Length of a piece of data, which is one of ours.
fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("transfers are cut to pieces")
}

/// Whether a number comes after another, in the arithmetic of RFC 1982.
fn is_after(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

#[cfg(test)]
mod tests;
