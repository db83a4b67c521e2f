//! The targets of a server and the sessions with them: who is there, and how others reach it.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::mailbox::Eviction;
use super::session_status::{ActiveSession, SessionStatus};
use super::{Admission, Portal, Target};
use crate::limits::UNITS_MAX;
use crate::login::{self, Authentication, Directory, Refusal};
use crate::name::IscsiName;
use crate::pdu::Isid;
use crate::scsi::{Device, Nexus, NexusId};

/// Why a target was not added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// There is one of this name.
    #[error("there is a target '{0}' already")]
    Exists(IscsiName),
    /// It has none or too many logical units.
    #[error("a target has 1 to {UNITS_MAX} logical units, not {0}")]
    Units(usize),
}

/// A target that is served.
pub(super) struct Served {
    pub(super) alias: String,
    pub(super) device: Device,
    admission: Admission,
}

/// By what a session is known (RFC 7143 §4.4.3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct SessionKey {
    pub(super) initiator: IscsiName,
    pub(super) isid: Isid,
    pub(super) target: IscsiName,
    pub(super) group: u16,
}

/// Targets and sessions.
pub(super) struct Registry {
    portals: Vec<Portal>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    targets: BTreeMap<IscsiName, Arc<Served>>,
    sessions: HashMap<SessionKey, Arc<ActiveSession>>,
    last_nexus: u64,
}

/// A session in the registry until it is dropped.
pub(super) struct Membership {
    registry: Arc<Registry>,
    key: SessionKey,
    pub(super) served: Arc<Served>,
    pub(super) active: Arc<ActiveSession>,
    pub(super) nexus: NexusId,
}

impl Registry {
    pub(super) fn new(portals: Vec<Portal>) -> Registry {
        Registry { portals, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is one insertion or removal: a panic leaves the maps whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn portals(&self) -> &[Portal] {
        &self.portals
    }

    pub(super) fn add(&self, target: Target) -> Result<(), AddError> {
        let Target { name, alias, units, admission } = target;
        if !(1..=UNITS_MAX).contains(&units.len()) {
            return Err(AddError::Units(units.len()));
        }
        let mut inner = self.inner();
        if inner.targets.contains_key(&name) {
            return Err(AddError::Exists(name));
        }
        let served = Served { alias, device: Device::new(units), admission };
        inner.targets.insert(name, Arc::new(served));
        Ok(())
    }

    /// Removes a target and ends its sessions; whether there was one.
    pub(super) async fn remove(&self, name: &IscsiName) -> bool {
        let removed = self.inner().targets.remove(name).is_some();
        let sessions = self.sessions_of(name);
        sessions.iter().for_each(|session| session.mailbox.evict(Eviction::Removed));
        for session in sessions {
            session.mailbox.has_ended().await;
        }
        removed
    }

    fn sessions_of(&self, name: &IscsiName) -> Vec<Arc<ActiveSession>> {
        let inner = self.inner();
        let sessions = inner.sessions.iter().filter(|(key, _)| key.target == *name);
        sessions.map(|(_, active)| Arc::clone(active)).collect()
    }

    /// The sessions with a target, the oldest first.
    pub(super) fn statuses(&self, target: &IscsiName) -> Vec<SessionStatus> {
        let inner = self.inner();
        let sessions = inner.sessions.iter().filter(|(key, _)| key.target == *target);
        let status =
            |(key, active): (&SessionKey, &Arc<ActiveSession>)| active.status(&key.initiator, key.group);
        let mut statuses: Vec<SessionStatus> = sessions.map(status).collect();
        statuses.sort_by_key(|status| status.since);
        statuses
    }

    /// Makes a session known, after the one that it replaces has ended. `None` if the target is gone.
    pub(super) async fn join(
        self: &Arc<Registry>,
        key: SessionKey,
        address: SocketAddr,
        authentication: Authentication,
    ) -> Option<Membership> {
        loop {
            let before = {
                let mut inner = self.inner();
                let served = Arc::clone(inner.targets.get(&key.target)?);
                match inner.sessions.get(&key) {
                    Some(before) => Arc::clone(before),
                    None => {
                        let active = Arc::new(ActiveSession::new(address, authentication));
                        inner.sessions.insert(key.clone(), Arc::clone(&active));
                        inner.last_nexus += 1;
                        let nexus = NexusId(inner.last_nexus);
                        return Some(Membership { registry: Arc::clone(self), key, served, active, nexus });
                    }
                }
            };
            before.mailbox.evict(Eviction::Replaced);
            before.mailbox.has_ended().await;
        }
    }

    /// The targets that an initiator may see.
    pub(super) fn visible_to(&self, initiator: &IscsiName) -> Vec<IscsiName> {
        let inner = self.inner();
        let visible = inner.targets.iter().filter(|(_, served)| served.admission.knows(initiator));
        visible.map(|(name, _)| name.clone()).collect()
    }
}

impl Membership {
    /// Makes its nexus known to the units of its target, which abort its commands by mail.
    pub(super) fn attach(&self, nexus: &Nexus) {
        self.served.device.attach(nexus, |lun| {
            let active = Arc::clone(&self.active);
            Arc::new(move |era| active.mailbox.abort(lun, era))
        });
    }

    /// Ends all other sessions with the target, for a cold reset.
    pub(super) fn evict_others(&self) {
        let inner = self.registry.inner();
        let of_target = inner.sessions.iter().filter(|(key, _)| key.target == self.key.target);
        let others = of_target.filter(|(key, _)| **key != self.key);
        others.for_each(|(_, active)| active.mailbox.evict(Eviction::Replaced));
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.registry.inner().sessions.remove(&self.key);
        self.active.mailbox.close();
    }
}

impl Admission {
    fn knows(&self, initiator: &IscsiName) -> bool {
        self.initiators.as_ref().is_none_or(|known| known.contains(initiator))
    }
}

/// What the login phase asks.
pub(super) struct Doors<'a> {
    pub(super) registry: &'a Registry,
    pub(super) discovery: &'a Admission,
}

impl Directory for Doors<'_> {
    fn discovery(&self, initiator: &IscsiName) -> Result<login::Admission, Refusal> {
        admit(self.discovery, initiator, String::new())
    }

    fn target(&self, initiator: &IscsiName, target: &IscsiName) -> Result<login::Admission, Refusal> {
        let served = self.registry.inner().targets.get(target).map(Arc::clone).ok_or(Refusal::Unknown)?;
        admit(&served.admission, initiator, served.alias.clone())
    }
}

fn admit(admission: &Admission, initiator: &IscsiName, alias: String) -> Result<login::Admission, Refusal> {
    if !admission.knows(initiator) {
        return Err(Refusal::Forbidden);
    }
    let Admission { initiator, target, .. } = admission.clone();
    Ok(login::Admission { initiator, target, alias })
}
