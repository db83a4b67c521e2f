//! What is not a SCSI command: task management, text, pings, logout.

use std::collections::HashSet;

use tokio::task::Id;

use super::session::{Peer, Session, Stage};
use super::tasks::Phase;
use crate::limits::TEXT_BYTES_MAX;
use crate::params::Answer;
use crate::pdu::{
    FINAL, Header, LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, TaskRequest, TaskResponse,
    TextRequest, TextResponse, function, reject_reason, task_response, text as text_flag,
};
use crate::scsi::lun_of_wire;
use crate::text;

/// An answer to a task management function that waits until aborted commands have ended.
pub(super) struct Deferred {
    task_tag: u32,
    response: u8,
    waits_for: HashSet<Id>,
    then: Then,
}

/// What follows the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    /// All sessions with the target end.
    EvictAll,
}

/// A text request or response that goes over several PDUs.
#[derive(Default)]
pub(super) struct Text {
    request: Vec<u8>,
    /// What is left to be fetched, and the tag to do so with.
    rest: Option<(u32, Vec<u8>)>,
}

impl Session {
    pub(super) fn nop_out(&mut self, pdu: &NopOut, data: &[u8]) {
        // An answer to our ping; that something came is all that counts.
        if pdu.task_tag == NO_TAG {
            return;
        }
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let reply = NopIn {
            flags: FINAL,
            lun: pdu.lun,
            task_tag: pdu.task_tag,
            transfer_tag: NO_TAG,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
        };
        let len = data.len().min(self.parameters.peer_segment_bytes_max as usize);
        self.send(reply.header(), &data[..len]);
    }

    pub(super) fn manage(&mut self, pdu: &TaskRequest) {
        let Peer::Target(membership, _) = &self.peer else {
            return self.tell(pdu.task_tag, task_response::REJECTED);
        };
        let device = membership.served.device.clone();
        let unit = device.unit(pdu.lun);
        let lun = lun_of_wire(pdu.lun);
        let function = pdu.function & 0x7f;
        let of_unit = matches!(
            function,
            function::ABORT_TASK_SET | function::CLEAR_TASK_SET | function::LOGICAL_UNIT_RESET
        );
        if of_unit && unit.is_none() {
            return self.tell(pdu.task_tag, task_response::NO_UNIT);
        }
        let mut then = Then::Nothing;
        let waits_for = match function {
            function::ABORT_TASK => {
                let of_unit = self.tasks.get(&pdu.referenced_task_tag).filter(|t| t.pdu.lun == pdu.lun);
                if of_unit.is_none() {
                    return self.tell(pdu.task_tag, task_response::NO_TASK);
                }
                self.abort(pdu.referenced_task_tag).into_iter().collect()
            }
            // Each initiator has a task set of its own here (TST), so that both mean the same.
            function::ABORT_TASK_SET | function::CLEAR_TASK_SET => self.abort_where(|wire| wire == lun),
            function::LOGICAL_UNIT_RESET => {
                let waits_for = self.abort_where(|wire| wire == lun);
                unit.into_iter().for_each(|unit| unit.reset());
                waits_for
            }
            function::TARGET_WARM_RESET | function::TARGET_COLD_RESET => {
                let waits_for = self.abort_where(|_| true);
                device.units().for_each(|unit| unit.reset());
                if function == function::TARGET_COLD_RESET {
                    then = Then::EvictAll;
                }
                waits_for
            }
            function::TASK_REASSIGN => return self.tell(pdu.task_tag, task_response::NO_REASSIGNMENT),
            _ => return self.tell(pdu.task_tag, task_response::UNSUPPORTED),
        };
        let response = task_response::COMPLETE;
        let deferred = Deferred { task_tag: pdu.task_tag, response, waits_for, then };
        if deferred.waits_for.is_empty() {
            self.conclude(&deferred);
        } else {
            self.deferred.push(deferred);
        }
        self.pump();
    }

    /// Aborts the commands at a unit because another session said so.
    pub(super) fn abort_unit(&mut self, lun: usize) {
        self.abort_where(|wire| wire == Some(lun));
        self.pump();
    }

    /// Aborts the commands at some units; the futures that have yet to end.
    fn abort_where(&mut self, chosen: impl Fn(Option<usize>) -> bool) -> HashSet<Id> {
        let tasks = self.tasks.iter().filter(|(_, task)| chosen(lun_of_wire(task.pdu.lun)));
        let tags: Vec<u32> = tasks.map(|(tag, _)| *tag).collect();
        tags.into_iter().filter_map(|tag| self.abort(tag)).collect()
    }

    /// Aborts a command; its future if that has yet to end. Nothing is answered to it.
    fn abort(&mut self, task_tag: u32) -> Option<Id> {
        let task = self.forget(task_tag)?;
        let Phase::Running(handle) = task.phase else { return None };
        handle.abort();
        // Its memory is in use until it has ended.
        self.account.book(task.booked);
        self.aborted.insert(handle.id(), task.booked);
        Some(handle.id())
    }

    /// Gives the answers that waited for this future.
    pub(super) fn answer_deferred(&mut self, ended: Id) {
        for deferred in &mut self.deferred {
            deferred.waits_for.remove(&ended);
        }
        let due = self.deferred.extract_if(.., |deferred| deferred.waits_for.is_empty());
        for deferred in due.collect::<Vec<_>>() {
            self.conclude(&deferred);
        }
    }

    fn conclude(&mut self, deferred: &Deferred) {
        self.tell(deferred.task_tag, deferred.response);
        if let (Then::EvictAll, Peer::Target(membership, nexus)) = (deferred.then, &self.peer) {
            membership.evict_others();
            tracing::info!(initiator = %nexus.initiator.name, "a cold reset ends all sessions of a target");
            self.stage = Stage::Closing;
        }
    }

    fn tell(&mut self, task_tag: u32, response: u8) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let pdu = TaskResponse { flags: FINAL, response, task_tag, stat_sn, exp_cmd_sn, max_cmd_sn };
        self.send(pdu.header(), &[]);
    }

    pub(super) fn logout(&mut self, pdu: &LogoutRequest) {
        const RECOVERY: u8 = 2;
        const CLOSED: u8 = 0;
        const NO_CONNECTION: u8 = 1;
        const NO_RECOVERY: u8 = 2;
        let response = match pdu.reason & 0x7f {
            0 => CLOSED,
            RECOVERY => NO_RECOVERY,
            _ if pdu.cid == self.cid => CLOSED,
            _ => NO_CONNECTION,
        };
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let reply = LogoutResponse {
            flags: FINAL,
            response,
            task_tag: pdu.task_tag,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
        };
        self.send(reply.header(), &[]);
        if response == CLOSED {
            self.stage = Stage::Closing;
        }
    }

    pub(super) fn text_request(&mut self, header: &Header, pdu: &TextRequest, data: &[u8]) {
        if pdu.transfer_tag != NO_TAG {
            return match self.text.rest.take_if(|(tag, _)| *tag == pdu.transfer_tag) {
                Some((_, rest)) => self.text_response(pdu, rest),
                None => self.reject(header, reject_reason::INVALID_FIELD),
            };
        }
        // A new request ends the one before it.
        self.text.rest = None;
        self.text.request.extend_from_slice(data);
        if self.text.request.len() > TEXT_BYTES_MAX {
            self.text.request.clear();
            return self.reject(header, reject_reason::PROTOCOL);
        }
        if pdu.flags & text_flag::CONTINUE != 0 {
            return self.text_response(pdu, Vec::new());
        }
        let request = std::mem::take(&mut self.text.request);
        let mut out = Vec::new();
        let Ok(pairs) = text::pairs(&request) else {
            return self.reject(header, reject_reason::PROTOCOL);
        };
        for (key, value) in pairs {
            match key {
                "SendTargets" => self.send_targets(value, &mut out),
                "MaxRecvDataSegmentLength" => {
                    if let Answer::Value(answer) = self.parameters.answer(key, value) {
                        text::push(&mut out, key, &answer);
                    }
                }
                _ => text::push(&mut out, key, "NotUnderstood"),
            }
        }
        self.text_response(pdu, out);
    }

    /// The targets with their addresses (RFC 7143 Appendix C): all that the initiator may see, or the one it
    /// named, or the one of this session.
    fn send_targets(&self, value: &str, out: &mut Vec<u8>) {
        let mut targets = self.registry.visible_to(&self.initiator);
        match (&self.peer, value) {
            (Peer::Discovery, "All") => {}
            (Peer::Target(_, nexus), "") => targets.retain(|name| name.as_str() == nexus.target.name),
            (_, named) => targets.retain(|name| name.as_str() == named),
        }
        for name in targets {
            text::push(out, "TargetName", name.as_str());
            for (address, group) in self.addresses() {
                text::push(out, "TargetAddress", &format!("{address},{group}"));
            }
        }
    }

    /// Where a target can be reached: first as it was reached just now.
    fn addresses(&self) -> Vec<(std::net::SocketAddr, u16)> {
        let mut addresses = vec![(self.local, self.group)];
        for portal in self.registry.portals() {
            // A portal at every address of this host has no address of its own to tell.
            if portal.address != self.local && !portal.address.ip().is_unspecified() {
                addresses.push((portal.address, portal.group));
            }
        }
        addresses
    }

    fn text_response(&mut self, pdu: &TextRequest, mut text: Vec<u8>) {
        let rest = text.split_off(text.len().min(self.parameters.peer_segment_bytes_max as usize));
        let (flags, transfer_tag) = if rest.is_empty() {
            (if pdu.flags & text_flag::CONTINUE == 0 { FINAL } else { 0 }, NO_TAG)
        } else {
            let tag = self.tags.next();
            self.text.rest = Some((tag, rest));
            (text_flag::CONTINUE, tag)
        };
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let response = TextResponse {
            flags,
            lun: pdu.lun,
            task_tag: pdu.task_tag,
            transfer_tag,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
        };
        self.send(response.header(), &text);
    }
}
