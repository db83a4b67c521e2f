//! Persistent reservations (SPC-4 §5.13): who is registered, and who holds the unit in which way.
//!
//! They outlive a session but not the target: APTPL is refused, so that no initiator counts on more. The
//! table is bounded by [`REGISTRATIONS_MAX`].

use super::opcodes::Effect;
use super::sense::{Fault, Sense};
use super::unit::{InitiatorPort, Nexus, attention};
use super::{number, truncated};
use crate::limits::REGISTRATIONS_MAX;
use crate::pdu::Cdb;

/// The registrations of a unit and its reservation.
#[derive(Debug, Default)]
pub(super) struct Table {
    generation: u32,
    registrations: Vec<Registration>,
    reservation: Option<Reservation>,
}

/// One path of one initiator.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Registrant {
    initiator: InitiatorPort,
    group: u16,
}

#[derive(Debug)]
struct Registration {
    who: Registrant,
    key: u64,
}

#[derive(Debug, Clone)]
struct Reservation {
    /// Who made it; of a reservation of all registrants, all hold it.
    by: Registrant,
    kind: Kind,
}

/// The types (SPC-4 table 181).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrants = 5,
    ExclusiveAccessRegistrants = 6,
    WriteExclusiveAll = 7,
    ExclusiveAccessAll = 8,
}

/// Whom a change concerns besides the one who made it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Unit attentions to establish.
    pub(super) attentions: Vec<(InitiatorPort, u16)>,
    /// Whose commands are to be aborted.
    pub(super) aborted: Vec<InitiatorPort>,
}

/// The parameter list of PERSISTENT RESERVE OUT.
struct Parameters {
    key: u64,
    action_key: u64,
}

impl Kind {
    fn of(scope_and_type: u8) -> Result<Kind, Sense> {
        Ok(match scope_and_type {
            1 => Kind::WriteExclusive,
            3 => Kind::ExclusiveAccess,
            5 => Kind::WriteExclusiveRegistrants,
            6 => Kind::ExclusiveAccessRegistrants,
            7 => Kind::WriteExclusiveAll,
            8 => Kind::ExclusiveAccessAll,
            _ => return Err(Sense::in_command(2)),
        })
    }

    /// Whether every registrant holds it.
    fn is_of_all(self) -> bool {
        matches!(self, Kind::WriteExclusiveAll | Kind::ExclusiveAccessAll)
    }

    /// Whether every registrant may do what its holder may.
    fn spares_registrants(self) -> bool {
        !matches!(self, Kind::WriteExclusive | Kind::ExclusiveAccess)
    }

    fn spares_readers(self) -> bool {
        matches!(self, Kind::WriteExclusive | Kind::WriteExclusiveRegistrants | Kind::WriteExclusiveAll)
    }
}

impl Parameters {
    fn parse(list: &[u8], action: u8) -> Result<Parameters, Sense> {
        const BYTES: usize = 24;
        const FLAGS: usize = 20;
        const SPECIFIED_PORTS: u8 = 0x08;
        const ALL_TARGET_PORTS: u8 = 0x04;
        const THROUGH_POWER_LOSS: u8 = 0x01;
        const REGISTERS: [u8; 2] = [action::REGISTER, action::REGISTER_AND_IGNORE];
        if list.len() != BYTES {
            return Err(Sense::PARAMETER_LENGTH);
        }
        let refused = SPECIFIED_PORTS | ALL_TARGET_PORTS | THROUGH_POWER_LOSS;
        if REGISTERS.contains(&action) && list[FLAGS] & refused != 0 {
            return Err(Sense::in_parameters(FLAGS));
        }
        Ok(Parameters { key: number(&list[..8]), action_key: number(&list[8..16]) })
    }
}

/// Service actions of PERSISTENT RESERVE OUT.
mod action {
    pub(super) const REGISTER: u8 = 0;
    pub(super) const RESERVE: u8 = 1;
    pub(super) const RELEASE: u8 = 2;
    pub(super) const CLEAR: u8 = 3;
    pub(super) const PREEMPT: u8 = 4;
    pub(super) const PREEMPT_AND_ABORT: u8 = 5;
    pub(super) const REGISTER_AND_IGNORE: u8 = 6;
}

impl Registrant {
    fn of(nexus: &Nexus) -> Registrant {
        Registrant { initiator: nexus.initiator.clone(), group: nexus.target.group }
    }

    fn is(&self, nexus: &Nexus) -> bool {
        self.group == nexus.target.group && self.initiator == nexus.initiator
    }
}

impl Table {
    /// Whether there is neither a registration nor a reservation.
    pub(super) fn is_empty(&self) -> bool {
        self.registrations.is_empty() && self.reservation.is_none()
    }

    /// Whether a nexus may do what has this effect.
    pub(super) fn allows(&self, nexus: &Nexus, effect: Effect) -> bool {
        let Some(reservation) = &self.reservation else { return true };
        let harmless = match effect {
            Effect::Tells | Effect::Harmless => true,
            Effect::Reads => reservation.kind.spares_readers(),
            Effect::Controls | Effect::Writes => false,
            // PERSISTENT RESERVE OUT has its own rules; RESERVE(6) is refused by the registrations.
            Effect::Persistent => true,
        };
        let spared = reservation.kind.spares_registrants() && self.key_of(nexus).is_some();
        harmless || spared || reservation.by.is(nexus)
    }

    /// PERSISTENT RESERVE IN.
    pub(super) fn report(&self, cdb: &Cdb) -> Result<Vec<u8>, Sense> {
        let data = match cdb[1] & 0x1f {
            0 => {
                let keys: Vec<u8> = self.registrations.iter().flat_map(|r| r.key.to_be_bytes()).collect();
                self.with_head(&keys)
            }
            1 => self.with_head(&self.reservation_descriptor()),
            2 => capabilities(),
            3 => self.with_head(&self.full_status()),
            _ => return Err(Sense::in_command(1)),
        };
        Ok(truncated(data, number(&cdb[7..9])))
    }

    fn with_head(&self, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).expect("registrations are bounded").to_be_bytes();
        [&self.generation.to_be_bytes()[..], &len, data].concat()
    }

    fn reservation_descriptor(&self) -> Vec<u8> {
        let Some(reservation) = &self.reservation else { return Vec::new() };
        let holder = self.registrations.iter().find(|r| r.who == reservation.by);
        let key = if reservation.kind.is_of_all() { 0 } else { holder.map_or(0, |r| r.key) };
        [&key.to_be_bytes()[..], &[0, 0, 0, 0, 0, reservation.kind as u8, 0, 0]].concat()
    }

    fn full_status(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for registration in &self.registrations {
            let held = self.reservation.as_ref().filter(|r| r.kind.is_of_all() || r.by == registration.who);
            let name = transport_id(&registration.who.initiator);
            let len = u32::try_from(name.len()).expect("names are bounded").to_be_bytes();
            out.extend_from_slice(&registration.key.to_be_bytes());
            out.extend_from_slice(&[0, 0, 0, 0, u8::from(held.is_some()), held.map_or(0, |r| r.kind as u8)]);
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&registration.who.group.to_be_bytes());
            out.extend_from_slice(&len);
            out.extend_from_slice(&name);
        }
        out
    }

    /// PERSISTENT RESERVE OUT.
    pub(super) fn change(
        &mut self,
        nexus: &Nexus,
        action: u8,
        scope_and_type: u8,
        list: &[u8],
    ) -> Result<Change, Fault> {
        let parameters = Parameters::parse(list, action)?;
        match action {
            action::REGISTER | action::REGISTER_AND_IGNORE => self.register(nexus, action, &parameters),
            action::RESERVE
            | action::RELEASE
            | action::CLEAR
            | action::PREEMPT
            | action::PREEMPT_AND_ABORT => {
                if self.key_of(nexus) != Some(parameters.key) {
                    return Err(Fault::Conflict);
                }
                match action {
                    action::RESERVE => self.reserve(nexus, Kind::of(scope_and_type)?),
                    action::RELEASE => self.release(nexus, Kind::of(scope_and_type)?),
                    action::CLEAR => Ok(self.clear(nexus)),
                    action => self.preempt(nexus, action, Kind::of(scope_and_type)?, parameters.action_key),
                }
            }
            _ => Err(Sense::in_command(1).into()),
        }
    }

    fn key_of(&self, nexus: &Nexus) -> Option<u64> {
        self.registrations.iter().find(|r| r.who.is(nexus)).map(|r| r.key)
    }

    fn register(&mut self, nexus: &Nexus, action: u8, parameters: &Parameters) -> Result<Change, Fault> {
        let known = self.key_of(nexus);
        if action == action::REGISTER && known.unwrap_or(0) != parameters.key {
            return Err(Fault::Conflict);
        }
        let mut change = Change::default();
        match (known, parameters.action_key) {
            (None, 0) => return Ok(change),
            (None, key) => {
                if self.registrations.len() == REGISTRATIONS_MAX {
                    return Err(Sense::REGISTRATIONS_FULL.into());
                }
                self.registrations.push(Registration { who: Registrant::of(nexus), key });
            }
            (Some(_), 0) => {
                self.registrations.retain(|r| !r.who.is(nexus));
                change = self.let_go(nexus);
            }
            (Some(_), key) => {
                self.registrations.iter_mut().filter(|r| r.who.is(nexus)).for_each(|r| r.key = key);
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(change)
    }

    /// Ends a reservation whose holder has just unregistered, unless other registrants hold it as well.
    fn let_go(&mut self, nexus: &Nexus) -> Change {
        let Some(reservation) = self.reservation.clone() else { return Change::default() };
        if reservation.kind.is_of_all() {
            match self.registrations.first() {
                None => self.reservation = None,
                Some(next) if reservation.by.is(nexus) => {
                    self.reservation = Some(Reservation { by: next.who.clone(), ..reservation });
                }
                Some(_) => {}
            }
            return Change::default();
        }
        if !reservation.by.is(nexus) {
            return Change::default();
        }
        self.reservation = None;
        if reservation.kind.spares_registrants() { self.told_released(nexus) } else { Change::default() }
    }

    /// All other registrants learn that a reservation ended.
    fn told_released(&self, nexus: &Nexus) -> Change {
        let others = self.registrations.iter().filter(|r| !r.who.is(nexus));
        let attentions = others.map(|r| (r.who.initiator.clone(), attention::RESERVATIONS_RELEASED));
        Change { attentions: attentions.collect(), aborted: Vec::new() }
    }

    fn holds(&self, nexus: &Nexus) -> bool {
        self.reservation.as_ref().is_some_and(|r| r.kind.is_of_all() || r.by.is(nexus))
    }

    fn reserve(&mut self, nexus: &Nexus, kind: Kind) -> Result<Change, Fault> {
        match &self.reservation {
            None => self.reservation = Some(Reservation { by: Registrant::of(nexus), kind }),
            Some(held) if held.kind == kind && self.holds(nexus) => {}
            Some(_) => return Err(Fault::Conflict),
        }
        Ok(Change::default())
    }

    fn release(&mut self, nexus: &Nexus, kind: Kind) -> Result<Change, Fault> {
        let Some(held) = self.reservation.clone().filter(|_| self.holds(nexus)) else {
            return Ok(Change::default());
        };
        if held.kind != kind {
            return Err(Sense::INVALID_RELEASE.into());
        }
        self.reservation = None;
        Ok(if kind.spares_registrants() { self.told_released(nexus) } else { Change::default() })
    }

    fn clear(&mut self, nexus: &Nexus) -> Change {
        let others = self.registrations.iter().filter(|r| !r.who.is(nexus));
        let attentions = others.map(|r| (r.who.initiator.clone(), attention::RESERVATIONS_PREEMPTED));
        let change = Change { attentions: attentions.collect(), aborted: Vec::new() };
        self.registrations.clear();
        self.reservation = None;
        self.generation = self.generation.wrapping_add(1);
        change
    }

    fn preempt(&mut self, nexus: &Nexus, action: u8, kind: Kind, victim: u64) -> Result<Change, Fault> {
        let held = self.reservation.clone();
        let of_all = held.as_ref().is_some_and(|r| r.kind.is_of_all());
        if victim == 0 && !of_all {
            return Err(Sense::in_parameters(8).into());
        }
        // A zero means all others, where all hold the reservation (SPC-4 §5.13.11.4).
        let is_victim = |r: &Registration| !r.who.is(nexus) && (victim == 0 || r.key == victim);
        let own_key = self.key_of(nexus) == Some(victim);
        let victims: Vec<Registrant> =
            self.registrations.iter().filter(|r| is_victim(r)).map(|r| r.who.clone()).collect();
        if victims.is_empty() && !own_key && victim != 0 {
            return Err(Fault::Conflict);
        }
        let takes = match &held {
            None => false,
            Some(held) if of_all => victim == 0 || self.registrations.iter().all(|r| held.by != r.who),
            Some(held) => victims.contains(&held.by) || (own_key && held.by.is(nexus)),
        };
        self.registrations.retain(|r| !victims.contains(&r.who));
        let mut change = Change::default();
        for who in &victims {
            change.attentions.push((who.initiator.clone(), attention::REGISTRATIONS_PREEMPTED));
            if action == action::PREEMPT_AND_ABORT {
                change.aborted.push(who.initiator.clone());
            }
        }
        if takes {
            let changed =
                held.as_ref().is_some_and(|held| held.kind != kind && held.kind.spares_registrants());
            self.reservation = Some(Reservation { by: Registrant::of(nexus), kind });
            if changed {
                change.attentions.extend(self.told_released(nexus).attentions);
            }
        } else if let Some(held) = held.filter(|held| of_all && victims.contains(&held.by)) {
            // The reservation of all stays with those who are left.
            let by = self.registrations.first().map(|r| r.who.clone());
            self.reservation = by.map(|by| Reservation { by, ..held });
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(change)
    }
}

/// REPORT CAPABILITIES: RESERVE(6) may be used beside, all types, nothing through power loss.
fn capabilities() -> Vec<u8> {
    const TYPES_ARE_VALID: u8 = 0x80;
    const TYPES: [u8; 2] = [0xea, 0x01];
    vec![0, 8, 0, TYPES_ARE_VALID, TYPES[0], TYPES[1], 0, 0]
}

/// A TransportID of iSCSI with the session's identifier (SPC-4 §7.6.4.6).
fn transport_id(initiator: &InitiatorPort) -> Vec<u8> {
    const ISCSI_WITH_ISID: u8 = 0x45;
    let isid = initiator.isid.0.map(|byte| format!("{byte:02x}")).concat();
    let mut name = format!("{},i,0x{isid}\0", initiator.name).into_bytes();
    name.resize(name.len().next_multiple_of(4), 0);
    let len = u16::try_from(name.len()).expect("names are bounded").to_be_bytes();
    [&[ISCSI_WITH_ISID, 0][..], &len, &name].concat()
}
