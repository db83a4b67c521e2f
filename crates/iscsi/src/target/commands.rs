//! SCSI commands of a session: their data in both directions, and their answers.

use std::sync::Arc;

use block::TryIo;

use super::buffers::buffer_bytes;
use super::session::{Peer, Session};
use super::tasks::{Finished, Outcome, Phase, Solicited, Task, incoming, is_ordered, outgoing, residual};
use crate::limits::{
    AHEAD_BYTES_MAX, BATCH_BYTES, COMMANDS_MAX, COPY_BYTES_MAX, IMMEDIATE_COMMANDS_MAX, INLINE_BYTES_MAX,
    TRANSFER_BYTES_RESERVED,
};
use crate::pdu::{DataIn, DataOut, FINAL, Frame, NO_TAG, R2t, ScsiCommand, ScsiResponse, data_in, seal};
use crate::pdu::{HEADER_BYTES, reject_reason};
use crate::scsi::{Begin, Fault, Reply, Sense, Status, Unit, Work};

impl Session {
    /// A SCSI command that came in its turn.
    pub(super) fn scsi_command(&mut self, frame: &Frame<'_>, pdu: &ScsiCommand) {
        let Peer::Target(membership, nexus) = &self.peer else {
            return self.reject(&frame.header, reject_reason::PROTOCOL);
        };
        membership.active.traffic.command();
        membership.active.traffic.written(frame.data.len());
        let is_immediate = frame.header.is_immediate();
        if self.tasks.contains_key(&pdu.task_tag) || pdu.task_tag == NO_TAG {
            return self.reject(&frame.header, reject_reason::INVALID_FIELD);
        }
        if is_immediate && self.immediate >= IMMEDIATE_COMMANDS_MAX as usize {
            return self.reject(&frame.header, reject_reason::IMMEDIATE);
        }
        let device = &membership.served.device;
        let unit = device.unit(pdu.lun).map(Arc::clone);
        let begun = match self.check_data(frame, pdu) {
            Err(sense) => Begin::Done(device.refuse(pdu.lun, sense)),
            Ok(()) if self.tasks.len() >= (COMMANDS_MAX + IMMEDIATE_COMMANDS_MAX) as usize => {
                Begin::Done(Reply { status: Status::TaskSetFull, ..Reply::good() })
            }
            Ok(()) => device.begin(nexus, pdu.lun, &pdu.cdb),
        };
        match (begun, unit) {
            (Begin::Work(work), Some(unit)) => match work.check_offer(outgoing(pdu)) {
                Ok(()) => self.work(frame, pdu, unit, work),
                Err(sense) => self.answer(pdu, 0, unit.refuse(Fault::Check(sense))),
            },
            (Begin::Done(reply), _) => self.answer(pdu, 0, reply),
            // A device begins work only at units that it has.
            (Begin::Work(_), None) => self.reject(&frame.header, reject_reason::INVALID_FIELD),
        }
    }

    /// Whether the data that comes with a command, or is announced by it, is what was agreed on.
    fn check_data(&self, frame: &Frame<'_>, pdu: &ScsiCommand) -> Result<(), Sense> {
        let agreed = &self.parameters;
        let unsolicited_max = agreed.first_burst_bytes_max.min(outgoing(pdu)) as usize;
        let comes_early = pdu.flags & FINAL == 0;
        if !frame.additional.is_empty() {
            // Longer commands and data in both directions: there are none here.
            return Err(Sense::in_command(0));
        }
        if frame.data.len() > unsolicited_max
            || (!frame.data.is_empty() && !agreed.immediate_data)
            || (comes_early && (agreed.initial_r2t || outgoing(pdu) == 0))
        {
            return Err(Sense::UNEXPECTED_DATA);
        }
        Ok(())
    }

    fn work(&mut self, frame: &Frame<'_>, pdu: &ScsiCommand, unit: Arc<Unit>, work: Work) {
        let free = self.queue.is_empty() && self.ordered == 0 && !is_ordered(pdu);
        if free && work.is_read() && self.try_read(pdu, &unit, &work) {
            return;
        }
        let needed = work.data_out_bytes.min(outgoing(pdu));
        let complete = pdu.flags & FINAL != 0 && frame.data.len() >= needed as usize;
        if free && complete && needed > 0 && !work.is_read() {
            match unit.try_write(&work, &frame.data[..needed as usize]) {
                Ok(TryIo::Done) => return self.answer(pdu, needed_total(&work), Reply::good()),
                Ok(TryIo::WouldBlock) => {}
                Err(fault) => return self.answer(pdu, needed_total(&work), unit.refuse(fault)),
            }
        }
        let is_immediate = frame.header.is_immediate();
        // All that may come unsolicited, of which no more is kept than is needed.
        let early = if pdu.flags & FINAL != 0 {
            frame.data.len()
        } else {
            self.parameters.first_burst_bytes_max as usize
        };
        let early = early.min(needed as usize);
        let booked = if early == 0 { 0 } else { buffer_bytes(early) };
        if !self.memory.try_early(booked) {
            let full = Reply { status: Status::TaskSetFull, ..Reply::good() };
            return self.answer(pdu, needed_total(&work), full);
        }
        let buffer = if early == 0 { Vec::new() } else { self.output.spares().take(early) };
        self.arrivals += 1;
        let mut task = Task {
            pdu: *pdu,
            is_immediate,
            arrival: self.arrivals,
            unit,
            era: work.era,
            work: Some(work),
            phase: Phase::Queued,
            buffer,
            filled: 0,
            received: 0,
            asked: 0,
            solicited: Vec::new(),
            r2ts: 0,
            booked,
        };
        task.receive(frame.data);
        if pdu.flags & FINAL == 0 {
            task.phase = Phase::Unsolicited(0);
        }
        self.ordered += usize::from(task.is_ordered());
        self.immediate += usize::from(is_immediate);
        self.tasks.insert(pdu.task_tag, task);
        if pdu.flags & FINAL != 0 {
            self.enqueue(pdu.task_tag);
        }
    }

    /// Reads and answers in one go, if there is room and the disk need not wait; whether it did.
    fn try_read(&mut self, pdu: &ScsiCommand, unit: &Arc<Unit>, work: &Work) -> bool {
        let len = work.read_bytes.min(incoming(pdu));
        let segment = (INLINE_BYTES_MAX as u32).min(self.parameters.peer_segment_bytes_max);
        let segment = segment.min(self.parameters.burst_bytes_max);
        if len == 0 || len > segment || !self.memory.has_room(BATCH_BYTES) {
            return false;
        }
        let digests = self.parameters.digests;
        let head_bytes = HEADER_BYTES + digests.header.bytes();
        let len = len as usize;
        let room = self.output.room(head_bytes + len);
        match unit.try_read(work, &mut room[head_bytes..]) {
            Ok(TryIo::Done) => {}
            Ok(TryIo::WouldBlock) => return false,
            Err(fault) => {
                self.answer(pdu, 0, unit.refuse(fault));
                return true;
            }
        }
        let header = self.last_data_in(pdu, 0, 0, work.read_bytes).header();
        let room = self.output.room(head_bytes + len);
        let seal = seal(header, &room[head_bytes..], digests);
        room[..head_bytes].copy_from_slice(seal.head());
        self.output.commit(head_bytes + len);
        self.count_read(len);
        self.output.push(seal.tail());
        true
    }

    fn count_read(&self, bytes: usize) {
        if let Some(active) = &self.active {
            active.traffic.read(bytes);
        }
    }

    /// Puts a command that has its unsolicited data in line.
    fn enqueue(&mut self, task_tag: u32) {
        if let Some(task) = self.tasks.get_mut(&task_tag) {
            task.phase = Phase::Queued;
            task.asked = task.received.min(task.needed());
            self.queue.push_back(task_tag);
        }
        self.pump();
    }

    /// Begins the commands in line, as far as there is room for them.
    pub(super) fn pump(&mut self) {
        while let Some(&task_tag) = self.queue.front() {
            let Some(task) = self.tasks.get(&task_tag) else {
                self.queue.pop_front();
                continue;
            };
            if self.ordered > 0 && !self.is_next(task) {
                return;
            }
            match self.begin(task_tag) {
                Begun::Yes => {
                    self.queue.pop_front();
                    self.go_on(task_tag);
                }
                Begun::Later => return,
                Begun::TooLong => {
                    self.queue.pop_front();
                    self.complete(task_tag, Reply { status: Status::TaskSetFull, ..Reply::good() });
                }
            }
        }
    }

    /// Books the memory of a transfer and gives it a buffer, if there is room for it.
    fn begin(&mut self, task_tag: u32) -> Begun {
        let Some(task) = self.tasks.get_mut(&task_tag) else { return Begun::Later };
        if task.work.as_ref().is_some_and(Work::is_read) && self.output.bytes() >= AHEAD_BYTES_MAX {
            return Begun::Later;
        }
        let scratch = task.work.as_ref().map_or(0, Work::scratch_bytes);
        let len = task.data_bytes();
        let bytes = if len == 0 { scratch } else { buffer_bytes(len) + scratch };
        // An empty buffer that is used again must not count twice.
        let spare = if task.buffer.len() < len { self.output.spares().find(len) } else { None };
        self.memory.note_output(&self.output);
        if !self.memory.try_begin(bytes, task.booked) {
            self.output.trim(0);
            self.memory.note_output(&self.output);
            if !self.memory.try_begin(bytes, task.booked) {
                let waits = !self.memory.is_idle() || self.output.bytes() > 0;
                if waits || len > TRANSFER_BYTES_RESERVED {
                    self.output.spares().give(spare.unwrap_or_default());
                    return if waits { Begun::Later } else { Begun::TooLong };
                }
                // Nothing would end the wait.
                self.memory.begin(bytes, task.booked);
            }
        }
        (task.booked, task.phase) = (bytes, Phase::Solicited);
        if task.buffer.len() < len {
            let buffer = spare.unwrap_or_else(|| vec![0; buffer_bytes(len)]);
            let early = std::mem::replace(&mut task.buffer, buffer);
            task.buffer[..task.filled].copy_from_slice(&early[..task.filled]);
            self.output.spares().give(early);
        }
        Begun::Yes
    }

    /// Whether no ORDERED command lies between this one and those before it.
    fn is_next(&self, task: &Task) -> bool {
        let before = |other: &&Task| other.arrival < task.arrival;
        let mut earlier = self.tasks.values().filter(before);
        if task.is_ordered() { earlier.next().is_none() } else { !earlier.any(Task::is_ordered) }
    }

    /// Asks for the next data of a command, or carries it out if it has all.
    fn go_on(&mut self, task_tag: u32) {
        loop {
            let Some(task) = self.tasks.get(&task_tag) else { return };
            let (needed, asked, open) = (task.needed(), task.asked, task.solicited.len());
            if asked < needed && open < self.parameters.r2t_max as usize {
                self.solicit(task_tag, (needed - asked).min(self.parameters.burst_bytes_max));
                continue;
            }
            if asked == needed && open == 0 {
                self.carry_out(task_tag);
            }
            return;
        }
    }

    fn solicit(&mut self, task_tag: u32, wanted_bytes: u32) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.numbers();
        let transfer_tag = self.tags.next();
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let r2t = R2t {
            flags: FINAL,
            lun: task.pdu.lun,
            task_tag,
            transfer_tag,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            r2t_sn: task.r2ts,
            offset: task.asked,
            wanted_bytes,
        };
        task.r2ts += 1;
        task.asked += wanted_bytes;
        task.solicited.push(Solicited { transfer_tag, left: wanted_bytes, data_sn: 0 });
        self.send(r2t.header(), &[]);
    }

    /// A piece of data. What belongs to no command is what is left of one that failed or was aborted.
    pub(super) fn data_out(&mut self, pdu: &DataOut, data: &[u8]) {
        if let Some(active) = &self.active {
            active.traffic.written(data.len());
        }
        let first_burst = self.parameters.first_burst_bytes_max;
        let Some(task) = self.tasks.get_mut(&pdu.task_tag) else { return };
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let last = pdu.flags & FINAL != 0;
        let in_order = pdu.offset == task.received;
        let taken = match &mut task.phase {
            Phase::Unsolicited(data_sn) if pdu.transfer_tag == NO_TAG => {
                let max = first_burst.min(outgoing(&task.pdu));
                let right = *data_sn == pdu.data_sn && task.received.saturating_add(len) <= max;
                *data_sn = data_sn.wrapping_add(1);
                right.then_some(last)
            }
            Phase::Solicited => match task.solicited.first_mut() {
                Some(now) if now.transfer_tag == pdu.transfer_tag => {
                    let right = now.data_sn == pdu.data_sn && len <= now.left;
                    now.data_sn = now.data_sn.wrapping_add(1);
                    now.left = now.left.saturating_sub(len);
                    // The last piece says so, and no other does.
                    (right && last == (now.left == 0)).then_some(last)
                }
                _ => None,
            },
            _ => None,
        };
        match taken {
            Some(last) if in_order => {
                task.receive(data);
                if !last {
                    return;
                }
                if matches!(task.phase, Phase::Unsolicited(_)) {
                    self.enqueue(pdu.task_tag);
                } else {
                    task.solicited.remove(0);
                    self.go_on(pdu.task_tag);
                    self.pump();
                }
            }
            _ => {
                let reply = task.unit.refuse(Fault::Check(Sense::DATA_ORDER));
                self.complete(pdu.task_tag, reply);
                self.pump();
            }
        }
    }

    /// Has a command carried out: at once if its disk need not wait.
    fn carry_out(&mut self, task_tag: u32) {
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let Some(work) = task.work.clone() else { return };
        let (len, mut buffer) = (task.data_bytes(), std::mem::take(&mut task.buffer));
        let done = if work.is_read() {
            task.unit.try_read(&work, &mut buffer[..len])
        } else {
            task.unit.try_write(&work, &buffer[..len])
        };
        let outcome = match done {
            Ok(TryIo::WouldBlock) => return self.spawn(task_tag, work, buffer),
            Ok(TryIo::Done) if work.is_read() => Outcome::Read(buffer, Ok(len)),
            Ok(TryIo::Done) => Outcome::Other(buffer, Reply::good()),
            Err(fault) => Outcome::Other(buffer, task.unit.refuse(fault)),
        };
        self.finish(Finished { task_tag, outcome });
    }

    /// Gives a command to its disk, which has to wait for something.
    fn spawn(&mut self, task_tag: u32, work: Work, mut buffer: Vec<u8>) {
        let Peer::Target(_, nexus) = &self.peer else { return };
        let Some(task) = self.tasks.get_mut(&task_tag) else { return };
        let (len, unit) = (task.data_bytes(), Arc::clone(&task.unit));
        let handle = if work.is_read() {
            self.jobs.spawn(async move {
                let read = unit.read(&work, &mut buffer[..len]).await;
                Finished { task_tag, outcome: Outcome::Read(buffer, read.map(|()| len)) }
            })
        } else {
            let nexus = nexus.clone();
            self.jobs.spawn(async move {
                let reply = unit.run(&nexus, &work, &buffer[..len]).await;
                Finished { task_tag, outcome: Outcome::Other(buffer, reply) }
            })
        };
        task.phase = Phase::Running(handle);
    }

    /// Answers a command that has come back from its disk.
    pub(super) fn finish(&mut self, finished: Finished) {
        match finished.outcome {
            Outcome::Settled => {}
            Outcome::Other(buffer, reply) => {
                self.output.spares().give(buffer);
                self.complete(finished.task_tag, reply);
            }
            Outcome::Read(buffer, Err(fault)) => {
                self.output.spares().give(buffer);
                let Some(task) = self.tasks.get(&finished.task_tag) else { return };
                let reply = task.unit.refuse(fault);
                self.complete(finished.task_tag, reply);
            }
            Outcome::Read(buffer, Ok(len)) => {
                let Some(task) = self.forget(finished.task_tag) else { return };
                let available = task.work.as_ref().map_or(0, |work| work.read_bytes);
                if len == 0 {
                    self.respond(&task.pdu, available, &Reply::good(), 0);
                } else {
                    self.count_read(len);
                    self.data_in(&task.pdu, buffer, len, available);
                }
            }
        }
        self.memory.note_output(&self.output);
    }

    /// Answers a task and forgets it.
    fn complete(&mut self, task_tag: u32, reply: Reply) {
        if let Some(task) = self.forget(task_tag) {
            let wanted = task.work.as_ref().map_or(0, needed_total);
            self.answer_after(&task.pdu, wanted, reply, task.r2ts);
        }
    }

    /// Takes a task out of all lists, and gives back what it was booked with.
    pub(super) fn forget(&mut self, task_tag: u32) -> Option<Task> {
        let task = self.tasks.remove(&task_tag)?;
        if matches!(task.phase, Phase::Queued) {
            // Its tag may come again before its turn would have come.
            self.queue.retain(|queued| *queued != task_tag);
        }
        self.ordered -= usize::from(task.is_ordered());
        self.immediate -= usize::from(task.is_immediate);
        if task.has_begun() {
            self.memory.end(task.booked);
        } else {
            self.memory.end_early(task.booked);
        }
        Some(task)
    }

    /// Answers a command; `wanted` is how much data it took.
    fn answer(&mut self, pdu: &ScsiCommand, wanted: u32, reply: Reply) {
        self.answer_after(pdu, wanted, reply, 0);
    }

    fn answer_after(&mut self, pdu: &ScsiCommand, wanted: u32, reply: Reply, r2ts: u32) {
        let available = u32::try_from(reply.data.len()).unwrap_or(u32::MAX);
        let len = available.min(incoming(pdu)) as usize;
        if len > 0 {
            return self.data_in(pdu, reply.data, len, available);
        }
        self.respond(pdu, available.max(wanted), &reply, r2ts);
    }

    /// A SCSI response without data.
    fn respond(&mut self, pdu: &ScsiCommand, transfer: u32, reply: &Reply, data_pdus: u32) {
        let expected = if outgoing(pdu) > 0 { outgoing(pdu) } else { incoming(pdu) };
        let (flags, residual_bytes) = residual(expected, transfer);
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        let response = ScsiResponse {
            flags: FINAL | flags,
            response: 0,
            status: reply.status as u8,
            task_tag: pdu.task_tag,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            exp_data_sn: data_pdus,
            residual_bytes,
        };
        if reply.sense.is_empty() {
            return self.send(response.header(), &[]);
        }
        let len = u16::try_from(reply.sense.len()).expect("sense data is short").to_be_bytes();
        self.send(response.header(), &[&len[..], &reply.sense].concat());
    }

    /// Data with the status in its last PDU.
    fn data_in(&mut self, pdu: &ScsiCommand, buffer: Vec<u8>, len: usize, available: u32) {
        let segment = self.parameters.peer_segment_bytes_max;
        let burst = self.parameters.burst_bytes_max;
        let len = u32::try_from(len).expect("transfers are bounded");
        let shared = len as usize > COPY_BYTES_MAX;
        let buffer = if shared { self.output.share(buffer) } else { Arc::new(buffer) };
        let (mut at, mut data_sn) = (0, 0);
        while at < len {
            let burst_end = (at / burst + 1).saturating_mul(burst);
            let end = at.saturating_add(segment).min(burst_end).min(len);
            let header = if end == len {
                self.last_data_in(pdu, data_sn, at, available)
            } else {
                let (_, exp_cmd_sn, max_cmd_sn) = self.numbers();
                let flags = if end == burst_end { FINAL } else { 0 };
                let (lun, task_tag) = (pdu.lun, pdu.task_tag);
                let numbers = DataIn { exp_cmd_sn, max_cmd_sn, data_sn, offset: at, ..DataIn::default() };
                DataIn { flags, lun, task_tag, transfer_tag: NO_TAG, ..numbers }
            };
            let (range, digests) = (at as usize..end as usize, self.parameters.digests);
            if shared {
                self.output.pdu_of(header.header(), &buffer, range, digests);
            } else {
                self.output.pdu(header.header(), &buffer[range], digests);
            }
            (at, data_sn) = (end, data_sn + 1);
        }
        if let Some(buffer) = Arc::into_inner(buffer) {
            self.output.spares().give(buffer);
        }
    }

    /// The header of a command's last data, with the status GOOD.
    fn last_data_in(&mut self, pdu: &ScsiCommand, data_sn: u32, offset: u32, available: u32) -> DataIn {
        let (flags, residual_bytes) = residual(incoming(pdu), available);
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.status_numbers();
        DataIn {
            flags: FINAL | data_in::STATUS | flags,
            status: Status::Good as u8,
            lun: pdu.lun,
            task_tag: pdu.task_tag,
            transfer_tag: NO_TAG,
            stat_sn,
            exp_cmd_sn,
            max_cmd_sn,
            data_sn,
            offset,
            residual_bytes,
        }
    }
}

/// Whether a transfer has begun.
enum Begun {
    /// It has.
    Yes,
    /// It will when what is under way has ended.
    Later,
    /// There is no memory for it, and nothing under way in this session whose end would bring some.
    TooLong,
}

/// Bytes that a command transfers, whatever its initiator expects.
fn needed_total(work: &Work) -> u32 {
    work.data_out_bytes.max(work.read_bytes)
}
