//! What is not a SCSI command: task management, text, pings, logout.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::task::Id;

use super::{Peer, Session, Stage};
use crate::limits::{TASK_REQUESTS_MAX, TEXT_BYTES_MAX};
use crate::params::Answer;
use crate::pdu::{
    FINAL, Header, LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, TaskRequest, TaskResponse,
    TextRequest, TextResponse, function, reject_reason, task_response, text as text_flag,
};
use crate::scsi::{Aborting, Era, Unit, lun_of_wire};
use crate::target::mailbox::Promise;
use crate::target::tasks::{Finished, Outcome, Phase, Task};
use crate::text;

/// What waits until aborted commands have ended.
pub(in crate::target) struct Deferred {
    waits_for: HashSet<Id>,
    then: Then,
}

/// What follows.
enum Then {
    /// The task management function of this tag is answered.
    Tell(u32),
    /// The same, and all sessions with the target end.
    TellAndEvictAll(u32),
    /// Other sessions are told.
    Keep(Vec<Promise>),
}

impl Then {
    fn is_answer(&self) -> bool {
        !matches!(self, Then::Keep(_))
    }
}

/// A text request or response that goes over several PDUs.
#[derive(Default)]
pub(in crate::target) struct Text {
    request: Vec<u8>,
    /// What is left to be fetched, and the tag to do so with.
    rest: Option<(u32, Vec<u8>)>,
}

/// An address as it is told: without what only this host knows, which is the scope of an IPv6 address and that
/// an IPv4 connection came through an IPv6 socket.
fn told(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Where an initiator that reached us at `here` reaches a portal: one at every address of this host is there
/// too, if it takes that kind of address.
fn reached(portal: SocketAddr, here: IpAddr) -> Option<SocketAddr> {
    match portal.ip() {
        ip if !ip.is_unspecified() => Some(portal),
        IpAddr::V4(_) if here.is_ipv6() => None,
        _ => Some(SocketAddr::new(here, portal.port())),
    }
}

impl Session {
    pub(in crate::target) fn nop_out(&mut self, pdu: &NopOut, data: &[u8]) {
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

    pub(in crate::target) fn manage_tasks(&mut self, pdu: &TaskRequest) {
        if self.deferred.iter().filter(|deferred| deferred.then.is_answer()).count() >= TASK_REQUESTS_MAX {
            return self.tell(pdu.task_tag, task_response::REJECTED);
        }
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
        let mut then = Then::Tell(pdu.task_tag);
        let mut resetting = None;
        match function {
            function::ABORT_TASK => {
                let of_unit = self.tasks.get(&pdu.referenced_task_tag).filter(|t| t.pdu.lun == pdu.lun);
                if of_unit.is_none() {
                    return self.tell(pdu.task_tag, task_response::NO_TASK);
                }
                self.abort(pdu.referenced_task_tag);
            }
            // Each initiator has a task set of its own here (TST), so that both mean the same.
            function::ABORT_TASK_SET | function::CLEAR_TASK_SET => {
                self.abort_where(|task| lun_of_wire(task.pdu.lun) == lun);
            }
            function::LOGICAL_UNIT_RESET => resetting = Some(self.reset(unit.into_iter())),
            function::TARGET_WARM_RESET => resetting = Some(self.reset(device.units())),
            function::TARGET_COLD_RESET => {
                resetting = Some(self.reset(device.units()));
                then = Then::TellAndEvictAll(pdu.task_tag);
            }
            function::TASK_REASSIGN => return self.tell(pdu.task_tag, task_response::NO_REASSIGNMENT),
            _ => return self.tell(pdu.task_tag, task_response::UNSUPPORTED),
        }
        self.defer(resetting, then);
        self.pump();
    }

    /// Aborts the commands at a unit that began before an era, because another session said so.
    pub(in crate::target) fn abort_unit(&mut self, lun: usize, era: Era, promises: Vec<Promise>) {
        self.abort_where(|task| lun_of_wire(task.pdu.lun) == Some(lun) && task.era < era);
        // Not for resets of this session: their sessions may wait for this one.
        self.defer(None, Then::Keep(promises));
        self.pump();
    }

    /// Resets units. What has begun at them is aborted in this session as in all others, by mail; what
    /// answers here ends when that is done.
    fn reset<'a>(&mut self, units: impl Iterator<Item = &'a Arc<Unit>>) -> Id {
        let aborting: Vec<Aborting> = units.map(|unit| unit.reset()).collect();
        let handle = self.jobs.spawn(async move {
            for one in aborting {
                one.await;
            }
            Finished { task_tag: NO_TAG, outcome: Outcome::Settled }
        });
        handle.id()
    }

    /// Aborts some commands.
    fn abort_where(&mut self, chosen: impl Fn(&Task) -> bool) {
        let tasks = self.tasks.iter().filter(|(_, task)| chosen(task));
        let tags: Vec<u32> = tasks.map(|(tag, _)| *tag).collect();
        tags.into_iter().for_each(|tag| self.abort(tag));
    }

    /// Aborts a command. Nothing is answered to it.
    fn abort(&mut self, task_tag: u32) {
        let Some(task) = self.forget(task_tag) else { return };
        let Phase::Running(handle) = task.phase else { return self.output.spares().give(task.buffer) };
        handle.abort();
        // Its memory is in use until it has ended.
        self.memory.begin(task.booked, 0);
        self.aborted.insert(handle.id(), task.booked);
    }

    /// Does something as soon as all that was aborted so far has ended, and this as well.
    fn defer(&mut self, also: Option<Id>, then: Then) {
        let waits_for: HashSet<Id> = self.aborted.keys().copied().chain(also).collect();
        if waits_for.is_empty() {
            self.conclude(then);
        } else {
            self.deferred.push(Deferred { waits_for, then });
        }
    }

    /// Does what waited for this future.
    pub(in crate::target) fn conclude_deferred(&mut self, ended: Id) {
        for deferred in &mut self.deferred {
            deferred.waits_for.remove(&ended);
        }
        let due = self.deferred.extract_if(.., |deferred| deferred.waits_for.is_empty());
        for deferred in due.collect::<Vec<_>>() {
            self.conclude(deferred.then);
        }
    }

    fn conclude(&mut self, then: Then) {
        match then {
            Then::Tell(task_tag) => self.tell(task_tag, task_response::COMPLETE),
            Then::TellAndEvictAll(task_tag) => {
                self.tell(task_tag, task_response::COMPLETE);
                let Peer::Target(membership, nexus) = &self.peer else { return };
                membership.evict_others();
                tracing::info!(initiator = %nexus.initiator.name, "target_reset: all its sessions end");
                self.stage = Stage::Closing;
            }
            Then::Keep(promises) => drop(promises),
        }
    }

    fn tell(&mut self, task_tag: u32, response: u8) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let pdu = TaskResponse { flags: FINAL, response, task_tag, stat_sn, exp_cmd_sn, max_cmd_sn };
        self.send(pdu.header(), &[]);
    }

    pub(in crate::target) fn logout(&mut self, pdu: &LogoutRequest) {
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

    pub(in crate::target) fn text_request(&mut self, header: &Header, pdu: &TextRequest, data: &[u8]) {
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
    fn addresses(&self) -> Vec<(SocketAddr, u16)> {
        let here = told(self.local);
        let mut addresses = vec![(here, self.group)];
        for portal in self.registry.portals() {
            let address = reached(told(portal.address), here.ip());
            addresses
                .extend(address.map(|address| (address, portal.group)).filter(|a| !addresses.contains(a)));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_at_every_address_is_told_as_it_was_reached() {
        let at = |portal: &str, local: &str| {
            let (portal, local): (SocketAddr, SocketAddr) = (portal.parse().unwrap(), local.parse().unwrap());
            reached(told(portal), told(local).ip()).map(|address| address.to_string())
        };
        let some = |address: &str| Some(address.to_owned());
        assert_eq!(at("0.0.0.0:3261", "10.0.0.7:3260"), some("10.0.0.7:3261"));
        assert_eq!(at("[::]:3261", "10.0.0.7:3260"), some("10.0.0.7:3261"));
        assert_eq!(at("[::]:3261", "[::ffff:10.0.0.7]:3260"), some("10.0.0.7:3261"));
        assert_eq!(at("[::]:3261", "[fe80::7%2]:3260"), some("[fe80::7]:3261"));
        assert_eq!(at("0.0.0.0:3261", "[2001:db8::7]:3260"), None, "there is no such address of IPv4");
        assert_eq!(at("10.0.0.8:3261", "10.0.0.7:3260"), some("10.0.0.8:3261"));
    }
}
