//! Persistent reservations (SPC-4 §5.13): who is registered, and who holds the unit in which way.
//!
//! They outlive a session but not the target: APTPL is refused, so that no initiator counts on more. The
//! table is bounded by [`REGISTRATIONS_MAX`].

use super::nexus::{InitiatorPort, Nexus, attention};
use super::opcodes::Effect;
use super::sense::{Fault, Sense};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::unit::tests::nexus;

    const EXCLUSIVE: u8 = Kind::ExclusiveAccess as u8;
    const WRITE_EXCLUSIVE: u8 = Kind::WriteExclusive as u8;
    const OF_REGISTRANTS: u8 = Kind::WriteExclusiveRegistrants as u8;
    const OF_ALL: u8 = Kind::WriteExclusiveAll as u8;

    /// A table in which initiators 1 to `count` are registered, each with its number as its key.
    fn registered(count: u8) -> Table {
        let mut table = Table::default();
        (1..=count).for_each(|n| assert_eq!(table.act(n, action::REGISTER, 0, 0, n.into()), told(&[])));
        table
    }

    impl Table {
        fn act(&mut self, who: u8, action: u8, kind: u8, key: u64, action_key: u64) -> Result<Change, Fault> {
            let list = [&key.to_be_bytes()[..], &action_key.to_be_bytes(), &[0; 8]].concat();
            self.change(&nexus(who), action, kind, &list)
        }

        fn reserve_for(&mut self, who: u8, kind: u8) {
            assert_eq!(self.act(who, action::RESERVE, kind, who.into(), 0), told(&[]));
        }

        /// What initiators 1 to 4 may do: nothing, read, or write as well.
        fn rights(&self) -> String {
            let right =
                |n| match (self.allows(&nexus(n), Effect::Reads), self.allows(&nexus(n), Effect::Writes)) {
                    (_, true) => 'w',
                    (true, false) => 'r',
                    (false, false) => '-',
                };
            (1..=4).map(right).collect()
        }

        fn keys(&self) -> Vec<u64> {
            let mut cdb = [0; 16];
            cdb[7..9].fill(0xff);
            let told = self.report(&cdb).unwrap();
            assert_eq!(number(&told[4..8]) as usize, told.len() - 8);
            told[8..].chunks(8).map(number).collect()
        }

        fn generation(&self) -> u64 {
            number(&self.report(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]).unwrap()[..4])
        }

        /// Key and type of the reservation.
        fn reserved(&self) -> Option<(u64, u8)> {
            let told = self.report(&[0x5e, 1, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0]).unwrap();
            (told.len() > 8).then(|| (number(&told[8..16]), told[21]))
        }
    }

    fn told(attentions: &[(u8, u16)]) -> Result<Change, Fault> {
        let attentions = attentions.iter().map(|(n, code)| (nexus(*n).initiator, *code)).collect();
        Ok(Change { attentions, aborted: Vec::new() })
    }

    #[test]
    fn who_registers_says_the_key_it_has() {
        let mut table = Table::default();
        assert_eq!(table.act(1, action::REGISTER, 0, 5, 7), Err(Fault::Conflict), "it has none yet");
        assert_eq!(table.act(1, action::REGISTER, 0, 0, 7), told(&[]));
        assert_eq!(table.act(1, action::REGISTER, 0, 0, 8), Err(Fault::Conflict));
        assert_eq!(table.act(1, action::REGISTER, 0, 7, 8), told(&[]));
        assert_eq!(table.act(1, action::REGISTER_AND_IGNORE, 0, 99, 9), told(&[]));
        assert_eq!((table.keys(), table.generation()), (vec![9], 3));
        assert_eq!(table.act(2, action::REGISTER_AND_IGNORE, 0, 0, 0), told(&[]), "it was not registered");
        assert_eq!(table.generation(), 3);
        assert_eq!(table.act(1, action::REGISTER, 0, 9, 0), told(&[]));
        assert!(table.is_empty());
    }

    #[test]
    fn registrations_are_bounded() {
        let mut table = Table::default();
        let port = |n: usize| {
            let mut nexus = nexus(1);
            nexus.initiator.name = format!("iqn.2026-01.test:{n}");
            nexus
        };
        let list = [&[0; 8][..], &1u64.to_be_bytes(), &[0; 8]].concat();
        for n in 0..REGISTRATIONS_MAX {
            table.change(&port(n), action::REGISTER, 0, &list).unwrap();
        }
        let more = table.change(&port(REGISTRATIONS_MAX), action::REGISTER, 0, &list);
        assert_eq!(more, Err(Sense::REGISTRATIONS_FULL.into()));
    }

    #[test]
    fn each_type_spares_whom_it_says() {
        let rights = |kind: u8| {
            let mut table = registered(2);
            table.reserve_for(1, kind);
            table.rights()
        };
        assert_eq!(registered(2).rights(), "wwww");
        assert_eq!(rights(1), "wrrr");
        assert_eq!(rights(3), "w---");
        assert_eq!(rights(5), "wwrr");
        assert_eq!(rights(6), "ww--");
        assert_eq!(rights(7), "wwrr");
        assert_eq!(rights(8), "ww--");
        let mut table = registered(1);
        for wrong in [0, 2, 4, 9, 0x11] {
            assert_eq!(table.act(1, action::RESERVE, wrong, 1, 0), Err(Sense::in_command(2).into()));
        }
    }

    #[test]
    fn only_who_is_registered_reserves_and_only_one_of_them() {
        let mut table = registered(2);
        assert_eq!(table.act(3, action::RESERVE, EXCLUSIVE, 0, 0), Err(Fault::Conflict));
        assert_eq!(table.act(1, action::RESERVE, EXCLUSIVE, 2, 0), Err(Fault::Conflict), "not its key");
        table.reserve_for(1, EXCLUSIVE);
        table.reserve_for(1, EXCLUSIVE);
        assert_eq!(table.act(1, action::RESERVE, OF_ALL, 1, 0), Err(Fault::Conflict));
        assert_eq!(table.act(2, action::RESERVE, EXCLUSIVE, 2, 0), Err(Fault::Conflict));
        assert_eq!(table.reserved(), Some((1, EXCLUSIVE)));
    }

    #[test]
    fn who_lets_go_of_a_reservation_of_registrants_has_them_told() {
        let mut table = registered(3);
        table.reserve_for(1, OF_REGISTRANTS);
        assert_eq!(table.act(2, action::RELEASE, OF_REGISTRANTS, 2, 0), told(&[]), "it is not the holder's");
        assert_eq!(table.act(1, action::RELEASE, EXCLUSIVE, 1, 0), Err(Sense::INVALID_RELEASE.into()));
        assert_eq!(table.reserved(), Some((1, OF_REGISTRANTS)));
        let released = attention::RESERVATIONS_RELEASED;
        assert_eq!(
            table.act(1, action::RELEASE, OF_REGISTRANTS, 1, 0),
            told(&[(2, released), (3, released)])
        );
        table.reserve_for(1, EXCLUSIVE);
        assert_eq!(table.act(1, action::RELEASE, EXCLUSIVE, 1, 0), told(&[]));
        assert_eq!(table.reserved(), None);
    }

    #[test]
    fn a_holder_that_unregisters_lets_go_but_of_what_all_hold() {
        let mut table = registered(2);
        table.reserve_for(1, OF_REGISTRANTS);
        let released = attention::RESERVATIONS_RELEASED;
        assert_eq!(table.act(1, action::REGISTER, 0, 1, 0), told(&[(2, released)]));
        assert_eq!((table.reserved(), table.keys()), (None, vec![2]));

        let mut table = registered(2);
        table.reserve_for(1, OF_ALL);
        assert_eq!(table.act(1, action::REGISTER, 0, 1, 0), told(&[]));
        assert_eq!((table.reserved(), table.rights()), (Some((0, OF_ALL)), "rwrr".to_owned()));
        assert_eq!(table.act(2, action::REGISTER, 0, 2, 0), told(&[]));
        assert_eq!(table.reserved(), None, "nobody is left to hold it");
    }

    #[test]
    fn clear_takes_everything_from_everybody() {
        let mut table = registered(3);
        table.reserve_for(1, EXCLUSIVE);
        assert_eq!(table.act(4, action::CLEAR, 0, 0, 0), Err(Fault::Conflict));
        let preempted = attention::RESERVATIONS_PREEMPTED;
        assert_eq!(table.act(2, action::CLEAR, 0, 2, 0), told(&[(1, preempted), (3, preempted)]));
        assert!(table.is_empty());
        assert_eq!(table.rights(), "wwww");
    }

    #[test]
    fn who_preempts_the_holder_takes_its_place() {
        for (action, aborts) in [(action::PREEMPT, false), (action::PREEMPT_AND_ABORT, true)] {
            let mut table = registered(3);
            table.reserve_for(1, EXCLUSIVE);
            let change = table.act(2, action, WRITE_EXCLUSIVE, 2, 1).unwrap();
            assert_eq!(change.attentions, [(nexus(1).initiator, attention::REGISTRATIONS_PREEMPTED)]);
            assert_eq!(change.aborted, if aborts { vec![nexus(1).initiator] } else { vec![] });
            assert_eq!((table.keys(), table.reserved()), (vec![2, 3], Some((2, WRITE_EXCLUSIVE))));
            assert_eq!(table.rights(), "rwrr");
        }
    }

    #[test]
    fn who_preempts_another_only_takes_its_registration() {
        let mut table = registered(3);
        table.reserve_for(1, EXCLUSIVE);
        let preempted = attention::REGISTRATIONS_PREEMPTED;
        assert_eq!(table.act(2, action::PREEMPT, EXCLUSIVE, 2, 3), told(&[(3, preempted)]));
        assert_eq!((table.keys(), table.reserved()), (vec![1, 2], Some((1, EXCLUSIVE))));
        let before = table.generation();
        assert_eq!(
            table.act(2, action::PREEMPT, EXCLUSIVE, 2, 3),
            Err(Fault::Conflict),
            "nobody has that key"
        );
        assert_eq!(table.act(2, action::PREEMPT, EXCLUSIVE, 2, 0), Err(Sense::in_parameters(8).into()));
        assert_eq!(
            table.act(3, action::PREEMPT, EXCLUSIVE, 3, 1),
            Err(Fault::Conflict),
            "it is registered no more"
        );
        assert_eq!(table.generation(), before);
    }

    #[test]
    fn what_all_hold_is_preempted_from_all_with_no_key_and_from_one_with_its_key() {
        let preempted = attention::REGISTRATIONS_PREEMPTED;
        let mut table = registered(3);
        table.reserve_for(1, OF_ALL);
        assert_eq!(table.act(2, action::PREEMPT, OF_ALL, 2, 1), told(&[(1, preempted)]));
        assert_eq!((table.reserved(), table.rights()), (Some((0, OF_ALL)), "rwwr".to_owned()));
        assert_eq!(table.act(2, action::PREEMPT, EXCLUSIVE, 2, 0), told(&[(3, preempted)]));
        assert_eq!((table.keys(), table.reserved()), (vec![2], Some((2, EXCLUSIVE))));
    }

    #[test]
    fn a_holder_may_preempt_itself_to_change_the_type_and_registrants_are_told() {
        let mut table = registered(2);
        table.reserve_for(1, OF_REGISTRANTS);
        let released = attention::RESERVATIONS_RELEASED;
        assert_eq!(table.act(1, action::PREEMPT, EXCLUSIVE, 1, 1), told(&[(2, released)]));
        assert_eq!((table.keys(), table.reserved()), (vec![1, 2], Some((1, EXCLUSIVE))));
    }

    #[test]
    fn the_same_initiator_through_another_portal_is_another_registrant() {
        let mut table = registered(1);
        let mut target = (*nexus(1).target).clone();
        target.group = 2;
        let other = Nexus { target: target.into(), ..nexus(1) };
        table.reserve_for(1, EXCLUSIVE);
        assert!(!table.allows(&other, Effect::Reads));
        let list = [&[0; 8][..], &1u64.to_be_bytes(), &[0; 8]].concat();
        table.change(&other, action::REGISTER, 0, &list).unwrap();
        assert_eq!(table.keys(), [1, 1]);
        let full = table.report(&[0x5e, 3, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        // Two descriptors of equal length, of which the first holds the reservation.
        let (first, second) = full[8..].split_at((full.len() - 8) / 2);
        assert_eq!((first[12], first[13], second[12], second[13]), (1, EXCLUSIVE, 0, 0));
        assert_eq!((number(&first[18..20]), number(&second[18..20])), (1, 2));
        assert!(String::from_utf8_lossy(first).contains("iqn.2026-01.test:1,i,0x010101010101\0"));
    }

    #[test]
    fn lists_of_another_length_or_with_more_than_is_kept_are_refused() {
        let mut table = Table::default();
        for len in [0, 23, 25, 32] {
            let change = table.change(&nexus(1), action::REGISTER, 0, &vec![0; len]);
            assert_eq!(change, Err(Sense::PARAMETER_LENGTH.into()));
        }
        for flag in [0x08, 0x04, 0x01] {
            let mut list = [0; 24];
            (list[15], list[20]) = (1, flag);
            assert_eq!(
                table.change(&nexus(1), action::REGISTER, 0, &list),
                Err(Sense::in_parameters(20).into())
            );
        }
        assert_eq!(table.change(&nexus(1), 7, 0, &[0; 24]), Err(Sense::in_command(1).into()));
        assert!(table.is_empty());
    }
}
