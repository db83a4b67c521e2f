//! What lies behind one target: units under numbers, and the answers for numbers that have none.

use std::sync::Arc;

use super::nexus::{Interrupt, Nexus};
use super::opcodes::{Command, Entry};
use super::sense::{Fault, Sense, Status};
use super::unit::Unit;
use super::{Begin, Reply, inquiry, number, truncated};
use crate::pdu::Cdb;

/// The units of a target; the number of each is its place.
#[derive(Clone)]
pub struct Device {
    units: Vec<Arc<Unit>>,
}

/// The number of a logical unit in its eight bytes (SAM-5 §4.7): peripheral or flat space addressing.
pub fn lun_of_wire(wire: u64) -> Option<usize> {
    let [method, low, rest @ ..] = wire.to_be_bytes();
    if rest != [0; 6] {
        return None;
    }
    match method >> 6 {
        0 if method == 0 => Some(low.into()),
        1 => Some(usize::from(method & 0x3f) << 8 | usize::from(low)),
        _ => None,
    }
}

/// The eight bytes of a number below 256.
pub fn wire_of_lun(lun: u8) -> u64 {
    u64::from(lun) << 48
}

impl Device {
    /// A device of these units.
    pub fn new(units: Vec<Arc<Unit>>) -> Device {
        Device { units }
    }

    /// The unit of this number.
    pub fn unit(&self, wire: u64) -> Option<&Arc<Unit>> {
        lun_of_wire(wire).and_then(|lun| self.units.get(lun))
    }

    /// All units.
    pub fn units(&self) -> impl Iterator<Item = &Arc<Unit>> {
        self.units.iter()
    }

    /// Makes a nexus known to all units; `interrupt` makes what each calls.
    pub fn attach(&self, nexus: &Nexus, interrupt: impl Fn(usize) -> Interrupt) {
        for (lun, unit) in self.units.iter().enumerate() {
            unit.attach(nexus, interrupt(lun));
        }
    }

    /// Forgets a nexus.
    pub fn detach(&self, nexus: &Nexus) {
        self.units.iter().for_each(|unit| unit.detach(nexus));
    }

    /// Begins a command at the unit of this number.
    pub fn begin(&self, nexus: &Nexus, wire: u64, cdb: &Cdb) -> Begin {
        let command = Entry::find(cdb).map(|entry| entry.command);
        match (self.unit(wire), command) {
            (_, Ok(Command::ReportLuns)) => self.answer(self.report_luns(cdb)),
            (Some(unit), _) => unit.begin(nexus, cdb),
            (None, Ok(Command::Inquiry)) => self.answer(inquiry::absent(cdb)),
            (None, Ok(Command::RequestSense)) => {
                self.answer(Ok(truncated(Sense::NO_UNIT.fixed(), cdb[4].into())))
            }
            (None, _) => self.answer(Err(Sense::NO_UNIT)),
        }
    }

    /// What is answered where the transport found a command at this number wrong.
    pub fn refuse(&self, wire: u64, sense: Sense) -> Reply {
        match self.unit(wire) {
            Some(unit) => unit.refuse(Fault::Check(sense)),
            None => Reply { status: Status::CheckCondition, data: Vec::new(), sense: sense.fixed() },
        }
    }

    fn answer(&self, data: Result<Vec<u8>, Sense>) -> Begin {
        Begin::Done(data.map_or_else(|sense| self.refuse(0, sense), Reply::data))
    }

    fn report_luns(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        const WELL_KNOWN_ONLY: u8 = 1;
        const ALL: u8 = 2;
        let luns: &[Arc<Unit>] = match cdb[2] {
            0 | ALL => &self.units,
            WELL_KNOWN_ONLY => &[],
            _ => return Err(Sense::in_command(2)),
        };
        let len = u32::try_from(luns.len() * 8).expect("units are few").to_be_bytes();
        let mut data = [len, [0; 4]].concat();
        for lun in 0..luns.len() {
            let lun = u8::try_from(lun).expect("a target has at most 256 units");
            data.extend_from_slice(&wire_of_lun(lun).to_be_bytes());
        }
        Ok(truncated(data, number(&cdb[6..10])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_two_forms() {
        assert_eq!(lun_of_wire(wire_of_lun(7)), Some(7));
        assert_eq!(lun_of_wire(0x4007 << 48), Some(7));
        assert_eq!(lun_of_wire(0x4100 << 48), Some(256));
        assert_eq!(lun_of_wire(0x0100 << 48), None);
        assert_eq!(lun_of_wire(0xc101 << 48), None);
        assert_eq!(lun_of_wire(1), None);
    }
}
