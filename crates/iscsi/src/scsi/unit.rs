//! One logical unit: a disk, and what its initiators have set, reserved and not been told yet.
//!
//! One short lock guards that state; it is never held across I/O, and other units have their own.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Access, Disk};
use tokio::sync::RwLock;

use super::media::{self, Kind, Work};
use super::mode::Modes;
use super::nexus::{
    Aborting, Era, Identity, InitiatorPort, Interrupt, Nexus, NexusId, SERIAL_BYTES_MAX, attention,
};
use super::opcodes::{self, Command, Effect, Entry};
use super::persistent::Table;
use super::sense::{Fault, Sense, Status};
use super::{Begin, LOGICAL_BLOCK_BYTES, PHYSICAL_BLOCK_EXPONENT, Reply, inquiry, number, truncated};
use crate::pdu::Cdb;

/// A disk as a SCSI logical unit.
pub struct Unit {
    pub(super) disk: Arc<dyn Disk>,
    identity: Identity,
    state: Mutex<UnitState>,
    /// Writes share it; commands that read, decide and write hold it alone.
    pub(super) gate: RwLock<()>,
}

pub(super) struct UnitState {
    nexuses: HashMap<NexusId, Attached>,
    /// Who holds RESERVE(6).
    reserved_by: Option<NexusId>,
    pub(super) persistent: Table,
    pub(super) modes: Modes,
    era: Era,
}

struct Attached {
    initiator: InitiatorPort,
    interrupt: Interrupt,
    /// Codes that were not told yet, each at most once, the oldest first.
    attentions: Vec<u16>,
}

impl Unit {
    /// A unit of this disk. Bytes beyond its last whole logical block cannot be seen.
    ///
    /// # Panics
    /// If the serial number is not what [`Identity::serial`] asks for.
    pub fn new(disk: Arc<dyn Disk>, identity: Identity) -> Unit {
        let fits = (1..=SERIAL_BYTES_MAX).contains(&identity.serial.len());
        assert!(fits && identity.serial.bytes().all(|b| (0x20..0x7f).contains(&b)), "{identity:?}");
        let state = UnitState {
            nexuses: HashMap::new(),
            reserved_by: None,
            persistent: Table::default(),
            modes: Modes::default(),
            era: Era::default(),
        };
        Unit { disk, identity, state: Mutex::new(state), gate: RwLock::new(()) }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, UnitState> {
        // The state is changed in whole steps: a panic between them leaves it consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size in logical blocks.
    pub fn blocks(&self) -> u64 {
        self.disk.size_bytes() / u64::from(LOGICAL_BLOCK_BYTES)
    }

    /// Makes a nexus known.
    pub fn attach(&self, nexus: &Nexus, interrupt: Interrupt) {
        let initiator = nexus.initiator.clone();
        let attached = Attached { initiator, interrupt, attentions: vec![attention::POWER_ON] };
        self.state().nexuses.insert(nexus.id, attached);
    }

    /// Forgets a nexus, and what it had reserved with RESERVE(6).
    pub fn detach(&self, nexus: &Nexus) {
        let mut state = self.state();
        state.nexuses.remove(&nexus.id);
        state.reserved_by = state.reserved_by.filter(|holder| *holder != nexus.id);
    }

    /// Resets the unit: aborts all commands that have begun, releases RESERVE(6), takes back the mode
    /// parameters. All is done but for the commands, which may need a moment to end.
    #[must_use]
    pub fn reset(&self) -> Aborting {
        let mut state = self.state();
        let era = state.next_era();
        state.reserved_by = None;
        state.modes = Modes::default();
        let interrupts: Vec<_> = state.nexuses.values().map(|n| Arc::clone(&n.interrupt)).collect();
        for attached in state.nexuses.values_mut() {
            // What was to be told before is of no interest any more (SAM-5 §5.14.1).
            attached.attentions = vec![attention::RESET];
        }
        drop(state);
        abort(&interrupts, era)
    }

    /// Begins a command.
    pub fn begin(&self, nexus: &Nexus, cdb: &Cdb) -> Begin {
        let begun = Entry::find(cdb).map_err(Fault::from).and_then(|entry| {
            let mut state = self.state();
            state.admit(nexus, cdb, entry)?;
            let mut begun = self.dispatch(&mut state, nexus, cdb, entry)?;
            if let Begin::Work(work) = &mut begun {
                work.era = state.era;
            }
            Ok(begun)
        });
        begun.unwrap_or_else(|fault| Begin::Done(self.refuse(fault)))
    }

    /// What is answered for a fault, in the format of sense data that was asked for.
    pub fn refuse(&self, fault: Fault) -> Reply {
        match fault {
            Fault::Conflict => Reply { status: Status::ReservationConflict, ..Reply::good() },
            Fault::Check(sense) => {
                let descriptors = self.state().modes.descriptor_sense();
                let sense = if descriptors { sense.descriptors() } else { sense.fixed() };
                Reply { status: Status::CheckCondition, data: Vec::new(), sense }
            }
        }
    }

    fn dispatch(
        &self,
        state: &mut UnitState,
        nexus: &Nexus,
        cdb: &Cdb,
        entry: &Entry,
    ) -> Result<Begin, Fault> {
        if entry.effect == Effect::Writes && self.is_protected(state) {
            // Flushing a disk that takes no writes is not a write.
            if entry.command != Command::SynchronizeCache {
                return Err(Sense::WRITE_PROTECTED.into());
            }
        }
        let data = match entry.command {
            Command::TestUnitReady | Command::PreventAllow => Vec::new(),
            Command::StartStop => return start_stop(cdb),
            Command::RequestSense => state.request_sense(nexus, cdb)?,
            Command::Inquiry => inquiry::inquiry(cdb, &self.identity, nexus)?,
            Command::ModeSense => state.modes.sense(cdb, self.blocks(), self.is_protected(state))?,
            Command::ReadCapacity10 => self.capacity_10(cdb)?,
            Command::ReadCapacity16 => self.capacity_16(cdb)?,
            Command::PersistentIn => state.persistent.report(cdb)?,
            Command::ReportOpcodes => opcodes::report(cdb)?,
            Command::ReportTargetPortGroups => port_groups(nexus, cdb),
            Command::ReportTaskFunctions => task_functions(cdb),
            Command::Reserve => {
                if !state.persistent.is_empty() {
                    return Err(Fault::Conflict);
                }
                state.reserved_by = Some(nexus.id);
                Vec::new()
            }
            Command::Release => {
                state.reserved_by = state.reserved_by.filter(|holder| *holder != nexus.id);
                Vec::new()
            }
            Command::ModeSelect => return Ok(Begin::Work(media::mode_select(cdb)?)),
            Command::PersistentOut => return Ok(Begin::Work(media::persistent_out(cdb)?)),
            Command::ReportLuns => return Err(Sense::OPERATION_CODE.into()), // The device answers it.
            medium => return Ok(Begin::Work(media::parse(medium, cdb, self.blocks())?)),
        };
        Ok(Begin::Done(Reply::data(data)))
    }

    fn is_protected(&self, state: &UnitState) -> bool {
        self.disk.access() == Access::ReadOnly || state.modes.write_protected()
    }

    fn capacity_10(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        if number(&cdb[2..6]) != 0 {
            return Err(Sense::in_command(2));
        }
        // A larger disk says so by its largest number, and READ CAPACITY(16) tells the rest.
        let last = u32::try_from(self.blocks().saturating_sub(1)).unwrap_or(u32::MAX);
        Ok([last.to_be_bytes(), LOGICAL_BLOCK_BYTES.to_be_bytes()].concat())
    }

    fn capacity_16(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        const PROVISIONED_AND_ZEROES: u8 = 0xc0;
        if number(&cdb[2..10]) != 0 {
            return Err(Sense::in_command(2));
        }
        let mut data = self.blocks().saturating_sub(1).to_be_bytes().to_vec();
        data.extend_from_slice(&LOGICAL_BLOCK_BYTES.to_be_bytes());
        data.extend_from_slice(&[0, PHYSICAL_BLOCK_EXPONENT, PROVISIONED_AND_ZEROES]);
        data.resize(32, 0);
        Ok(truncated(data, number(&cdb[10..14])))
    }

    /// Carries out PERSISTENT RESERVE OUT, but for the aborts that it may ask for.
    pub(super) fn persistent_out(&self, nexus: &Nexus, work: &Work, data: &[u8]) -> Result<Aborting, Fault> {
        let Kind::PersistentOut { action, scope_and_type } = work.kind else {
            return Err(Sense::INTERNAL.into());
        };
        let mut state = self.state();
        if state.reserved_by.is_some() {
            return Err(Fault::Conflict);
        }
        let change = state.persistent.change(nexus, action, scope_and_type, data)?;
        let mut interrupts = Vec::new();
        for attached in state.nexuses.values_mut() {
            for (who, code) in &change.attentions {
                if *who == attached.initiator {
                    attached.note(*code);
                }
            }
            if change.aborted.contains(&attached.initiator) {
                interrupts.push(Arc::clone(&attached.interrupt));
            }
        }
        let era = state.next_era();
        drop(state);
        Ok(abort(&interrupts, era))
    }

    /// Carries out MODE SELECT.
    pub(super) fn mode_select(&self, nexus: &Nexus, work: &Work, data: &[u8]) -> Result<(), Fault> {
        let Kind::ModeSelect(form) = work.kind else { return Err(Sense::INTERNAL.into()) };
        let mut state = self.state();
        let before = state.modes;
        state.modes.select(form, data)?;
        if state.modes != before {
            let others = state.nexuses.iter_mut().filter(|(id, _)| **id != nexus.id);
            others.for_each(|(_, attached)| attached.note(attention::MODE_CHANGED));
        }
        Ok(())
    }
}

impl Attached {
    fn note(&mut self, code: u16) {
        if !self.attentions.contains(&code) {
            self.attentions.push(code);
        }
    }
}

/// Aborts what began before an era.
fn abort(interrupts: &[Interrupt], era: Era) -> Aborting {
    let aborting: Vec<Aborting> = interrupts.iter().map(|interrupt| interrupt(era)).collect();
    Box::pin(async move {
        for one in aborting {
            one.await;
        }
    })
}

impl UnitState {
    /// Begins a new era; commands of those before can be told by theirs.
    fn next_era(&mut self) -> Era {
        self.era = Era(self.era.0 + 1);
        self.era
    }

    /// Whether a command may begin: nothing has to be told first, and nobody else has reserved the unit.
    fn admit(&mut self, nexus: &Nexus, cdb: &Cdb, entry: &Entry) -> Result<(), Fault> {
        if entry.effect != Effect::Tells
            && let Some(attached) = self.nexuses.get_mut(&nexus.id)
            && !attached.attentions.is_empty()
        {
            return Err(Sense::attention(attached.attentions.remove(0)).into());
        }
        let allows_removal = entry.command == Command::PreventAllow && cdb[4] & 3 == 0;
        if entry.effect == Effect::Tells || entry.command == Command::Release || allows_removal {
            return Ok(());
        }
        let reserved = self.reserved_by.is_some_and(|holder| holder != nexus.id);
        if reserved || !self.persistent.allows(nexus, entry.effect) {
            return Err(Fault::Conflict);
        }
        Ok(())
    }

    fn request_sense(&mut self, nexus: &Nexus, cdb: &Cdb) -> Result<Vec<u8>, Fault> {
        let attached = self.nexuses.get_mut(&nexus.id).filter(|attached| !attached.attentions.is_empty());
        let sense = attached.map_or(Sense::NONE, |a| Sense::attention(a.attentions.remove(0)));
        let data = if cdb[1] & 1 == 0 { sense.fixed() } else { sense.descriptors() };
        Ok(truncated(data, cdb[4].into()))
    }
}

/// There is nothing to start, stop or eject: only what cannot be is refused.
fn start_stop(cdb: &Cdb) -> Result<Begin, Fault> {
    const LOAD_OR_EJECT: u8 = 2;
    const START: u8 = 1;
    let power_condition = cdb[4] >> 4;
    if power_condition == 0 && cdb[4] & LOAD_OR_EJECT != 0 {
        return Err(Sense::in_command(4).into());
    }
    // What stops had best be durable (SBC-3 §5.20).
    if power_condition == 0 && cdb[4] & START == 0 {
        return Ok(Begin::Work(Work::flush()));
    }
    Ok(Begin::Done(Reply::good()))
}

/// REPORT TARGET PORT GROUPS: one group, active and optimized, with all ports.
fn port_groups(nexus: &Nexus, cdb: &Cdb) -> Vec<u8> {
    const EXTENDED_FORMAT: u8 = 0x20;
    const ACTIVE_OPTIMIZED_SUPPORTED: u8 = 0x01;
    let count = u8::try_from(nexus.target.groups.len()).unwrap_or(u8::MAX);
    let mut data = Vec::new();
    if cdb[1] & 0xe0 == EXTENDED_FORMAT {
        data.extend_from_slice(&[0x10, 0, 0, 0]);
    }
    data.extend_from_slice(&[0, ACTIVE_OPTIMIZED_SUPPORTED]);
    data.extend_from_slice(&inquiry::PORT_GROUP.to_be_bytes());
    data.extend_from_slice(&[0, 0, 0, count]);
    for group in nexus.target.groups.iter().take(usize::from(count)) {
        data.extend_from_slice(&[0, 0]);
        data.extend_from_slice(&group.to_be_bytes());
    }
    let len = u32::try_from(data.len()).expect("255 ports are short").to_be_bytes();
    truncated([&len[..], &data].concat(), number(&cdb[6..10]))
}

/// REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS: abort task, abort and clear task set, unit reset.
fn task_functions(cdb: &Cdb) -> Vec<u8> {
    truncated(vec![0xd8, 0, 0, 0], number(&cdb[6..10]))
}

#[cfg(test)]
pub(in crate::scsi) mod tests {
    use super::super::nexus::TargetPort;
    use super::*;
    use crate::pdu::Isid;

    /// A nexus of initiator `n`.
    pub(in crate::scsi) fn nexus(n: u8) -> Nexus {
        let target = TargetPort { name: "iqn.2026-01.test:disk".to_owned(), group: 1, groups: vec![1, 2] };
        let initiator = InitiatorPort { name: format!("iqn.2026-01.test:{n}"), isid: Isid([n; 6]) };
        Nexus { id: NexusId(n.into()), initiator, target: Arc::new(target) }
    }
}
