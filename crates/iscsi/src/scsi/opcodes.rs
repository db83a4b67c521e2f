//! The commands: one table that says each fact once, for dispatch, reservations and the report of what is
//! supported (SPC-4 §6.35).

use super::sense::Sense;
use super::{number, truncated};
use crate::pdu::Cdb;

/// A command, whatever the length of its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    TestUnitReady,
    RequestSense,
    Inquiry,
    ReportLuns,
    ModeSense,
    ModeSelect,
    Reserve,
    Release,
    StartStop,
    PreventAllow,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    WriteVerify,
    Verify,
    WriteSame,
    CompareAndWrite,
    OrWrite,
    Unmap,
    SynchronizeCache,
    Prefetch,
    LbaStatus,
    PersistentIn,
    PersistentOut,
    ReportOpcodes,
    ReportTargetPortGroups,
    ReportTaskFunctions,
}

/// What a command does to a unit, as far as reservations and write protection care (SPC-4 table 59, SBC-3
/// table 10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Goes through unit attentions and all reservations.
    Tells,
    /// Goes through persistent reservations, but not through RESERVE(6).
    Harmless,
    /// Reads the medium or state.
    Reads,
    /// Changes state, but not the medium.
    Controls,
    /// Changes the medium.
    Writes,
    /// Has its own rules.
    Persistent,
}

/// One form of a command.
pub(super) struct Entry {
    pub(super) opcode: u8,
    /// Service action, where the operation code has several.
    pub(super) action: Option<u8>,
    pub(super) command: Command,
    pub(super) effect: Effect,
    /// The bits that have a meaning here; its length is the command's.
    pub(super) usage: &'static [u8],
}

const fn entry(
    opcode: u8,
    action: Option<u8>,
    command: Command,
    effect: Effect,
    usage: &'static [u8],
) -> Entry {
    Entry { opcode, action, command, effect, usage }
}

use Command as C;
use Effect::{Controls, Harmless, Persistent, Reads, Tells, Writes};

/// Usage bits of the common forms: operation code first, control byte last.
const F: u8 = 0xff;
const RW10: &[u8] = &[0, 0xf8, F, F, F, F, 0x1f, F, F, 4];
const RW12: &[u8] = &[0, 0xf8, F, F, F, F, F, F, F, F, 0x1f, 4];
const RW16: &[u8] = &[0, 0xf8, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 4];
const SAME16: &[u8] = &[0, 0xf9, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 4];
const VERIFY10: &[u8] = &[0, 0xf6, F, F, F, F, 0x1f, F, F, 4];
const VERIFY12: &[u8] = &[0, 0xf6, F, F, F, F, F, F, F, F, 0x1f, 4];
const VERIFY16: &[u8] = &[0, 0xf6, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 4];
const CACHE10: &[u8] = &[0, 2, F, F, F, F, 0x1f, F, F, 4];
const CACHE16: &[u8] = &[0, 2, F, F, F, F, F, F, F, F, F, F, F, F, 0x1f, 4];
const IN12: &[u8] = &[0, 0x1f, 0, 0, 0, 0, F, F, F, F, 0, 4];
const IN16: &[u8] = &[0, 0x1f, F, F, F, F, F, F, F, F, F, F, F, F, 0, 4];
const ALLOCATION10: &[u8] = &[0, 0x1f, 0, 0, 0, 0, 0, F, F, 4];
const OUT10: &[u8] = &[0, 0x1f, F, 0, 0, F, F, F, F, 4];

/// Every form that is supported, the most frequent first.
pub(super) const COMMANDS: &[Entry] = &[
    entry(0x28, None, C::Read, Reads, RW10),
    entry(0x2a, None, C::Write, Writes, RW10),
    entry(0x88, None, C::Read, Reads, RW16),
    entry(0x8a, None, C::Write, Writes, RW16),
    entry(0x35, None, C::SynchronizeCache, Writes, CACHE10),
    entry(0x91, None, C::SynchronizeCache, Writes, CACHE16),
    entry(0x42, None, C::Unmap, Writes, &[0, 1, 0, 0, 0, 0, 0x1f, F, F, 4]),
    entry(0x41, None, C::WriteSame, Writes, RW10),
    entry(0x93, None, C::WriteSame, Writes, SAME16),
    entry(0x89, None, C::CompareAndWrite, Writes, &[0, 0xf8, F, F, F, F, F, F, F, F, 0, 0, 0, F, 0x1f, 4]),
    entry(0x8b, None, C::OrWrite, Writes, RW16),
    entry(0x00, None, C::TestUnitReady, Harmless, &[0, 0, 0, 0, 0, 4]),
    entry(0x03, None, C::RequestSense, Tells, &[0, 1, 0, 0, F, 4]),
    entry(0x08, None, C::Read, Reads, &[0, 0x1f, F, F, F, 4]),
    entry(0x0a, None, C::Write, Writes, &[0, 0x1f, F, F, F, 4]),
    entry(0x12, None, C::Inquiry, Tells, &[0, 1, F, F, F, 4]),
    entry(0x15, None, C::ModeSelect, Controls, &[0, 0x11, 0, 0, F, 4]),
    entry(0x16, None, C::Reserve, Persistent, &[0, 0, 0, 0, 0, 4]),
    entry(0x17, None, C::Release, Persistent, &[0, 0, 0, 0, 0, 4]),
    entry(0x1a, None, C::ModeSense, Reads, &[0, 8, F, F, F, 4]),
    entry(0x1b, None, C::StartStop, Controls, &[0, 1, 0, 0x0f, 0xf7, 4]),
    entry(0x1e, None, C::PreventAllow, Controls, &[0, 0, 0, 0, 3, 4]),
    entry(0x25, None, C::ReadCapacity10, Harmless, &[0, 0, F, F, F, F, 0, 0, 1, 4]),
    entry(0x2e, None, C::WriteVerify, Writes, VERIFY10),
    entry(0x2f, None, C::Verify, Reads, VERIFY10),
    entry(0x34, None, C::Prefetch, Reads, CACHE10),
    entry(0x55, None, C::ModeSelect, Controls, &[0, 0x11, 0, 0, 0, 0, 0, F, F, 4]),
    entry(0x5a, None, C::ModeSense, Reads, &[0, 0x18, F, F, 0, 0, 0, F, F, 4]),
    entry(0x5e, Some(0), C::PersistentIn, Harmless, ALLOCATION10),
    entry(0x5e, Some(1), C::PersistentIn, Harmless, ALLOCATION10),
    entry(0x5e, Some(2), C::PersistentIn, Harmless, ALLOCATION10),
    entry(0x5e, Some(3), C::PersistentIn, Harmless, ALLOCATION10),
    entry(0x5f, Some(0), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(1), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(2), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(3), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(4), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(5), C::PersistentOut, Persistent, OUT10),
    entry(0x5f, Some(6), C::PersistentOut, Persistent, OUT10),
    entry(0x8e, None, C::WriteVerify, Writes, VERIFY16),
    entry(0x8f, None, C::Verify, Reads, VERIFY16),
    entry(0x90, None, C::Prefetch, Reads, CACHE16),
    entry(0x9e, Some(0x10), C::ReadCapacity16, Harmless, IN16),
    entry(0x9e, Some(0x12), C::LbaStatus, Reads, IN16),
    entry(0xa0, None, C::ReportLuns, Tells, &[0, 0, F, 0, 0, 0, F, F, F, F, 0, 4]),
    entry(0xa3, Some(0x0a), C::ReportTargetPortGroups, Harmless, IN12),
    entry(0xa3, Some(0x0c), C::ReportOpcodes, Harmless, &[0, 0x1f, 0x87, F, F, F, F, F, F, F, 0, 4]),
    entry(0xa3, Some(0x0d), C::ReportTaskFunctions, Harmless, IN12),
    entry(0xa8, None, C::Read, Reads, RW12),
    entry(0xaa, None, C::Write, Writes, RW12),
    entry(0xae, None, C::WriteVerify, Writes, VERIFY12),
    entry(0xaf, None, C::Verify, Reads, VERIFY12),
];

/// Operation codes whose second byte holds a service action.
fn action_of(cdb: &Cdb) -> u8 {
    cdb[1] & 0x1f
}

impl Entry {
    /// The form of a command.
    pub(super) fn find(cdb: &Cdb) -> Result<&'static Entry, Sense> {
        let mut known = false;
        for entry in COMMANDS.iter().filter(|entry| entry.opcode == cdb[0]) {
            if entry.action.is_none_or(|action| action == action_of(cdb)) {
                return Ok(entry);
            }
            known = true;
        }
        Err(if known { Sense::in_command(1) } else { Sense::OPERATION_CODE })
    }

    /// Its usage data: the operation code, then the bits, the service action among them.
    fn usage_data(&self) -> Vec<u8> {
        let mut usage = self.usage.to_vec();
        usage[0] = self.opcode;
        if let Some(action) = self.action {
            usage[1] = (usage[1] & !0x1f) | action;
        }
        usage
    }

    fn len(&self) -> u16 {
        u16::try_from(self.usage.len()).expect("commands have at most 16 bytes")
    }
}

/// A command timeouts descriptor (SPC-4 table 241) that names no times.
const NO_TIMEOUTS: [u8; 12] = [0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// REPORT SUPPORTED OPERATION CODES.
pub(super) fn report(cdb: &Cdb) -> Result<Vec<u8>, Sense> {
    let timeouts = cdb[2] & 0x80 != 0;
    let (opcode, action) = (cdb[3], number(&cdb[4..6]));
    let mut forms = COMMANDS.iter().filter(|entry| entry.opcode == opcode);
    let has_actions = forms.clone().any(|entry| entry.action.is_some());
    let data = match cdb[2] & 7 {
        0 => all(timeouts),
        1 if has_actions => return Err(Sense::in_command(2)),
        1 => one(forms.next(), timeouts),
        2 if !has_actions && forms.next().is_some() => return Err(Sense::in_command(2)),
        2 => one(forms.find(|entry| entry.action.map(u64::from) == Some(action)), timeouts),
        _ => return Err(Sense::in_command(2)),
    };
    Ok(truncated(data, number(&cdb[6..10])))
}

fn all(timeouts: bool) -> Vec<u8> {
    let mut data = vec![0; 4];
    for entry in COMMANDS {
        let flags = u8::from(entry.action.is_some()) | u8::from(timeouts) << 1;
        data.extend_from_slice(&[entry.opcode, 0, 0, entry.action.unwrap_or(0), 0, flags]);
        data.extend_from_slice(&entry.len().to_be_bytes());
        if timeouts {
            data.extend_from_slice(&NO_TIMEOUTS);
        }
    }
    let len = u32::try_from(data.len() - 4).expect("the table is short");
    data[..4].copy_from_slice(&len.to_be_bytes());
    data
}

fn one(entry: Option<&Entry>, timeouts: bool) -> Vec<u8> {
    const NOT_SUPPORTED: u8 = 1;
    const AS_THE_STANDARD_SAYS: u8 = 3;
    let Some(entry) = entry else { return vec![0, NOT_SUPPORTED, 0, 0] };
    let mut data = vec![0, AS_THE_STANDARD_SAYS | u8::from(timeouts) << 7];
    data.extend_from_slice(&entry.len().to_be_bytes());
    data.extend_from_slice(&entry.usage_data());
    if timeouts {
        data.extend_from_slice(&NO_TIMEOUTS);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_the_length_that_its_operation_code_says() {
        for entry in COMMANDS {
            let len = match entry.opcode >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                _ => 12,
            };
            assert_eq!(entry.usage.len(), len, "operation code {:#04x}", entry.opcode);
        }
    }

    #[test]
    fn a_wrong_service_action_is_not_a_wrong_operation_code() {
        let mut cdb = [0; 16];
        cdb[0] = 0x9e;
        cdb[1] = 0x1f;
        assert_eq!(Entry::find(&cdb).err(), Some(Sense::in_command(1)));
        cdb[0] = 0xff;
        assert_eq!(Entry::find(&cdb).err(), Some(Sense::OPERATION_CODE));
    }

    #[test]
    fn a_report_of_one_command_gives_its_usage() {
        let mut cdb: Cdb = [0; 16];
        (cdb[2], cdb[3], cdb[9]) = (1, 0x12, 64);
        assert_eq!(report(&cdb), Ok(vec![0, 3, 0, 6, 0x12, 1, F, F, F, 4]));
        (cdb[2], cdb[3], cdb[5]) = (2, 0x9e, 0x10);
        assert_eq!(report(&cdb).unwrap()[..6], [0, 3, 0, 16, 0x9e, 0x10]);
        (cdb[2], cdb[3]) = (1, 0x9e);
        assert_eq!(report(&cdb), Err(Sense::in_command(2)));
        (cdb[2], cdb[3]) = (1, 0xff);
        assert_eq!(report(&cdb), Ok(vec![0, 1, 0, 0]));
    }
}
