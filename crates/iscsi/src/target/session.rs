//! The full feature phase of one connection, which is one session: PDUs in, PDUs out.
//!
//! One task owns all of it. What can be answered at once is answered where it came; what has to wait for the
//! disk becomes a future of its own, so that it holds up nobody.

pub(super) mod management;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::task::{Id, JoinError, JoinSet};

use super::buffers::Output;
use super::mailbox::{Eviction, Mail};
use super::memory_budget::{Budget, SessionMemory};
use super::registry::{Membership, Registry};
use super::session_status::ActiveSession;
use super::tasks::{Finished, Tags, Task};
use crate::limits::{COMMANDS_MAX, SPARE_BYTES_MAX};
use crate::login::Agreed;
use crate::name::IscsiName;
use crate::params::Parameters;
use crate::pdu::{
    Async, DataOut, FINAL, Frame, Header, LogoutRequest, NO_TAG, NopIn, NopOut, Reject, ScsiCommand, Snack,
    TaskRequest, TextRequest, event, reject_reason,
};
use crate::scsi::Nexus;

/// What the session is with.
pub(super) enum Peer {
    /// A target.
    Target(Membership, Nexus),
    /// Nobody: it only asks for targets.
    Discovery,
}

/// Whether more is taken from the initiator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is.
    Open,
    /// What is queued is sent, and then the connection ends.
    Closing,
    /// The connection ends at once.
    Closed,
}

/// A session in its full feature phase.
pub(super) struct Session {
    pub(super) peer: Peer,
    /// What others see of it, if it is with a target.
    pub(super) active: Option<Arc<ActiveSession>>,
    pub(super) registry: Arc<Registry>,
    pub(super) initiator: IscsiName,
    pub(super) local: std::net::SocketAddr,
    pub(super) group: u16,
    pub(super) cid: u16,
    pub(super) parameters: Parameters,
    pub(super) stage: Stage,
    exp_cmd_sn: u32,
    max_cmd_sn: u32,
    stat_sn: u32,
    pub(super) output: Output,
    pub(super) memory: SessionMemory,
    pub(super) tasks: HashMap<u32, Task>,
    /// Commands that wait for their turn, by task tag, the oldest first.
    pub(super) queue: VecDeque<u32>,
    /// ORDERED commands among the tasks.
    pub(super) ordered: usize,
    pub(super) immediate: usize,
    pub(super) arrivals: u64,
    pub(super) tags: Tags,
    pub(super) jobs: JoinSet<Finished>,
    /// Aborted commands whose future has not ended yet, with the bytes that they are booked with.
    pub(super) aborted: HashMap<Id, usize>,
    /// Answers that are due when aborted commands have ended.
    pub(super) deferred: Vec<management::Deferred>,
    pub(super) text: management::Text,
}

impl Session {
    pub(super) fn new(
        agreed: Agreed,
        peer: Peer,
        registry: Arc<Registry>,
        budget: Arc<Budget>,
        local: std::net::SocketAddr,
        group: u16,
    ) -> Session {
        let active = match &peer {
            Peer::Target(membership, _) => Some(Arc::clone(&membership.active)),
            Peer::Discovery => None,
        };
        Session {
            peer,
            active,
            registry,
            initiator: agreed.initiator,
            local,
            group,
            cid: agreed.cid,
            parameters: agreed.parameters,
            stage: Stage::Open,
            exp_cmd_sn: agreed.cmd_sn,
            max_cmd_sn: agreed.cmd_sn.wrapping_add(COMMANDS_MAX - 1),
            stat_sn: agreed.stat_sn,
            output: Output::default(),
            memory: SessionMemory::new(budget),
            tasks: HashMap::new(),
            queue: VecDeque::new(),
            ordered: 0,
            immediate: 0,
            arrivals: 0,
            tags: Tags::default(),
            jobs: JoinSet::new(),
            aborted: HashMap::new(),
            deferred: Vec::new(),
            text: management::Text::default(),
        }
    }

    /// Whether the initiator takes its replies; if it does not, nothing more is read from it.
    pub(super) fn takes_input(&self) -> bool {
        let queued_bytes = if self.output.bytes() == 0 { 0 } else { self.output.queued_bytes() };
        self.stage == Stage::Open && self.memory.takes_input(queued_bytes)
    }

    /// Notes what the output holds, and gives buffers back that nothing under way needs.
    pub(super) fn tidy(&mut self) {
        if self.tasks.is_empty() && self.output.bytes() == 0 {
            self.output.trim(SPARE_BYTES_MAX);
        }
        self.memory.note_output(&self.output);
    }

    /// Deals with a PDU.
    pub(super) fn take(&mut self, frame: &Frame<'_>) {
        let header = &frame.header;
        match header.opcode() {
            DataOut::OPCODE => self.data_out(&DataOut::parse(header), frame.data),
            ScsiCommand::OPCODE => {
                let pdu = ScsiCommand::parse(header);
                if self.admit(header, pdu.cmd_sn) {
                    self.scsi_command(frame, &pdu);
                }
            }
            NopOut::OPCODE => {
                let pdu = NopOut::parse(header);
                if pdu.task_tag == NO_TAG || self.admit(header, pdu.cmd_sn) {
                    self.nop_out(&pdu, frame.data);
                }
            }
            TaskRequest::OPCODE => {
                let pdu = TaskRequest::parse(header);
                if self.admit(header, pdu.cmd_sn) {
                    self.manage_tasks(&pdu);
                }
            }
            TextRequest::OPCODE => {
                let pdu = TextRequest::parse(header);
                if self.admit(header, pdu.cmd_sn) {
                    self.text_request(header, &pdu, frame.data);
                }
            }
            LogoutRequest::OPCODE => {
                let pdu = LogoutRequest::parse(header);
                if self.admit(header, pdu.cmd_sn) {
                    self.logout(&pdu);
                }
            }
            Snack::OPCODE => self.reject(header, reject_reason::SNACK),
            _ => self.reject(header, reject_reason::PROTOCOL),
        }
    }

    /// Whether a command comes when it should. One that does not is dropped without a word (RFC 7143
    /// §4.2.2.1); on one connection there are no gaps that another command could fill.
    fn admit(&mut self, header: &Header, cmd_sn: u32) -> bool {
        if header.is_immediate() {
            return true;
        }
        let welcome = cmd_sn == self.exp_cmd_sn && self.exp_cmd_sn != self.max_cmd_sn.wrapping_add(1);
        if welcome {
            self.exp_cmd_sn = self.exp_cmd_sn.wrapping_add(1);
        }
        welcome
    }

    /// The next status number, the next command number that is expected, and the last one that is welcome. The
    /// window never shrinks.
    pub(super) fn numbers(&mut self) -> (u32, u32, u32) {
        let under_way = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX).min(COMMANDS_MAX);
        let max = self.exp_cmd_sn.wrapping_add(COMMANDS_MAX - under_way).wrapping_sub(1);
        let grows = max.wrapping_sub(self.max_cmd_sn) <= COMMANDS_MAX;
        if grows {
            self.max_cmd_sn = max;
        }
        (self.stat_sn, self.exp_cmd_sn, self.max_cmd_sn)
    }

    /// The same, for a PDU that carries a status and uses its number up.
    pub(super) fn status_numbers(&mut self) -> (u32, u32, u32) {
        let numbers = self.numbers();
        self.stat_sn = self.stat_sn.wrapping_add(1);
        numbers
    }

    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        self.output.pdu(header, data, self.parameters.digests);
    }

    /// Refuses a PDU; its header goes back.
    pub(super) fn reject(&mut self, refused: &Header, reason: u8) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let pdu = Reject { flags: FINAL, reason, task_tag: NO_TAG, stat_sn, exp_cmd_sn, max_cmd_sn };
        self.send(pdu.header(), &refused.0);
    }

    /// Asks the initiator whether it is there.
    pub(super) fn ping(&mut self) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.numbers();
        let transfer_tag = self.tags.next();
        let pdu =
            NopIn { flags: FINAL, lun: 0, task_tag: NO_TAG, transfer_tag, stat_sn, exp_cmd_sn, max_cmd_sn };
        self.send(pdu.header(), &[]);
    }

    /// Takes the mail that others have put.
    pub(super) fn take_mail(&mut self, mail: Mail) {
        for (lun, (era, promises)) in mail.aborts {
            self.abort_unit(lun, era, promises);
        }
        match mail.eviction {
            Some(Eviction::Replaced) => self.stage = Stage::Closed,
            Some(Eviction::Removed) => self.part(event::SESSION_DROPPED),
            None => {}
        }
    }

    /// Tells the initiator why the session is over, and ends it.
    pub(super) fn part(&mut self, event: u8) {
        if self.stage != Stage::Open {
            return;
        }
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let pdu = Async {
            flags: FINAL,
            task_tag: NO_TAG,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            event,
            ..Async::default()
        };
        self.send(pdu.header(), &[]);
        self.stage = Stage::Closing;
    }

    /// Notes that a future has ended.
    pub(super) fn ended(&mut self, ended: Result<(Id, Finished), JoinError>) -> Result<(), JoinError> {
        let (id, finished) = match ended {
            Ok((id, finished)) => (id, Some(finished)),
            Err(error) if error.is_cancelled() => (error.id(), None),
            Err(error) => return Err(error),
        };
        if let Some(booked) = self.aborted.remove(&id) {
            self.memory.end(booked);
        } else if let Some(finished) = finished {
            self.finish(finished);
        }
        self.conclude_deferred(id);
        self.pump();
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Peer::Target(membership, nexus) = &self.peer {
            membership.served.device.detach(nexus);
        }
    }
}
