//! iSCSI exports: VM disks and images that initiators on the network may open.
//!
//! Each is a target with one unit, behind every portal that the node was given. Who may open it, with which
//! secrets, is a record of its own, so that a node that restarts serves what it served before.
//!
//! Consistency: what is exported and what the records say is changed together, one change at a time. Crash: the
//! record of a VM that is gone is left over from an unfinished removal, and is swept away at the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Access, BoxFuture, NodeName};
use iscsi::scsi::{Identity, Unit};
use iscsi::{Admission, Credentials, IscsiName, Portal, Server, ServerOptions, SessionStatus, Target};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Disks, Exported, Protocol};
use crate::state::{self, Layout};
use control::api::export::{
    ChapSecret, ExportAccess, ExportName, ExportProtocol, ExportView, IscsiAccess, IscsiSession,
};
use control::api::unix_ms;
use control::refusal::{Code, Refusal};

/// Begins the names of all our targets; a node's name and an export's follow.
const TARGET_PREFIX: &str = "iqn.2026-11.virtman";

/// What is remembered of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ExportRecord {
    name: ExportName,
    access: IscsiAccess,
    read_only: bool,
}

/// The iSCSI exports of a node.
pub(crate) struct IscsiExports {
    node: NodeName,
    dir: PathBuf,
    server: Server,
    /// Where initiators reach the portals.
    portals: Vec<String>,
    records: Mutex<BTreeMap<ExportName, ExportRecord>>,
    /// Held while an export is added or removed.
    changing: tokio::sync::Mutex<()>,
}

/// The sockets behind the portals.
pub(crate) struct Portals(Vec<TcpListener>);

impl Portals {
    /// Listens on each address.
    pub(crate) async fn listen(addresses: &[SocketAddr]) -> Result<Portals, String> {
        let mut listeners = Vec::with_capacity(addresses.len());
        for address in addresses {
            listeners.push(TcpListener::bind(address).await.map_err(|e| {
                format!("cannot listen on {address} for iSCSI: {e}; choose another with --iscsi-listen")
            })?);
        }
        Ok(Portals(listeners))
    }

    fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.0.iter().map(TcpListener::local_addr).collect()
    }

    /// Serves the exports until `shutdown`.
    pub(crate) async fn serve(self, exports: &IscsiExports, shutdown: CancellationToken) {
        let mut portals = JoinSet::new();
        for (listener, group) in self.0.into_iter().zip(1..) {
            let server = exports.server.clone();
            portals.spawn(async move { server.serve(listener, group).await });
        }
        let all = async {
            while let Some(ended) = portals.join_next().await {
                tracing::error!(?ended, "portal_ended");
            }
        };
        shutdown.run_until_cancelled(all).await;
    }
}

impl IscsiExports {
    /// No export yet, behind these portals. `address` is where the node is reached, as HOST:PORT: what people are
    /// told of portals that listen on every address.
    pub(crate) fn new(
        node: NodeName,
        address: &str,
        layout: &Layout,
        portals: &Portals,
    ) -> Result<IscsiExports, String> {
        let portals = portals.addresses().map_err(|e| format!("the portals of iSCSI: {e}"))?;
        let numbered = portals.iter().zip(1..).map(|(&address, group)| Portal { address, group });
        let options = ServerOptions { portals: numbered.collect(), discovery: Admission::default() };
        Ok(IscsiExports {
            node,
            dir: layout.exports(),
            server: Server::new(options),
            portals: portals.iter().map(|portal| reached_at(portal, address)).collect(),
            records: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        })
    }

    /// Refuses an export for what it says.
    fn check_access(&self, name: &ExportName, access: &IscsiAccess) -> Result<(), Refusal> {
        if self.portals.is_empty() {
            return Err(Refusal::new(
                Code::NoPortal,
                format!("node {} serves no iSCSI: it was started without --iscsi-listen", self.node),
            )
            .with_hint("start it with --iscsi-listen ADDRESS:3260, or choose another node"));
        }
        if !access.anyone && access.initiators.is_empty() && access.chap.is_none() {
            return Err(Refusal::new(
                Code::OpenExport,
                format!("whoever reaches {} could open '{name}'", self.portals.join(", ")),
            )
            .with_hint(
                "set a secret with --chap-file, name the initiators with --initiator, or say --anyone",
            ));
        }
        self.admission(access).map(drop)
    }

    /// Exports a disk, or changes who may open one that is exported; sessions that there were end then.
    /// Repeating it changes nothing.
    async fn add(
        &self,
        name: &ExportName,
        access: IscsiAccess,
        exported: Exported,
    ) -> Result<ExportView, Refusal> {
        self.check_access(name, &access)?;
        let _one_at_a_time = self.changing.lock().await;
        let read_only = exported.disk.access() == Access::ReadOnly;
        let record = ExportRecord { name: name.clone(), access, read_only };
        let known = self.records().get(name).cloned();
        if known.as_ref() != Some(&record) {
            if known.is_some() {
                self.server.remove(&self.target(name)).await;
            }
            let file = self.file(name);
            tokio::task::block_in_place(|| state::write_record(&file, &record))
                .map_err(|e| Refusal::internal(format!("cannot write {}: {e}", file.display())))?;
            if let Err(error) = self.serve(record.clone(), exported) {
                self.forget(name)?;
                return Err(error);
            }
            tracing::info!(export = %name, "export_started: exported over iSCSI");
        }
        Ok(self.view(&record))
    }

    /// Exports a disk no longer: its sessions have ended when this answers. Whether it was exported.
    async fn remove(&self, name: &ExportName) -> Result<bool, Refusal> {
        let _one_at_a_time = self.changing.lock().await;
        if !self.records().contains_key(name) {
            return Ok(false);
        }
        self.server.remove(&self.target(name)).await;
        self.forget(name)?;
        tracing::info!(export = %name, "export_ended: no longer exported over iSCSI");
        Ok(true)
    }

    fn serve(&self, record: ExportRecord, exported: Exported) -> Result<(), Refusal> {
        let target = Target {
            name: self.target(&record.name),
            alias: record.name.to_string(),
            units: vec![Arc::new(Unit::new(exported.disk, Identity { serial: exported.serial }))],
            admission: self.admission(&record.access)?,
        };
        self.server.add(target).map_err(|error| {
            Refusal::new(Code::TargetExists, format!("'{}' cannot be exported: {error}", record.name))
                .with_hint("iSCSI names know no upper case: two names that differ in case alone are one")
        })?;
        self.records().insert(record.name.clone(), record);
        Ok(())
    }

    fn forget(&self, name: &ExportName) -> Result<(), Refusal> {
        self.records().remove(name);
        let file = self.file(name);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Refusal::internal(format!("cannot remove {}: {error}", file.display())))
            }
            _ => Ok(()),
        }
    }

    fn admission(&self, access: &IscsiAccess) -> Result<Admission, Refusal> {
        let initiator = |name: &String| {
            name.parse::<IscsiName>().map_err(|e| Refusal::new(Code::BadInitiator, e.to_string()))
        };
        let initiators: BTreeSet<IscsiName> =
            access.initiators.iter().map(initiator).collect::<Result<_, _>>()?;
        let chap = access.chap.as_ref().map(credentials).transpose()?;
        let mutual = access.mutual_chap.as_ref().map(credentials).transpose()?;
        match (&access.chap, &access.mutual_chap) {
            (None, Some(_)) => Err(Refusal::new(
                Code::MutualChapAlone,
                "the node proves itself only to initiators that prove themselves",
            )
            .with_hint("give --chap-file too")),
            (Some(one), Some(other)) if one.secret == other.secret => Err(Refusal::new(
                Code::SameSecret,
                "the two directions have the same secret, so that either side could answer with the other's",
            )
            .with_hint("use two secrets (RFC 7143 section 9.2.1)")),
            _ => Ok(Admission {
                initiators: (!initiators.is_empty()).then_some(initiators),
                initiator: chap,
                target: mutual,
            }),
        }
    }

    /// The iSCSI name of an export.
    fn target(&self, name: &ExportName) -> IscsiName {
        let text = format!("{TARGET_PREFIX}:{}:{name}", self.node);
        text.parse().expect("names of nodes, VMs and images are short and have nothing that iSCSI names lack")
    }

    fn view(&self, record: &ExportRecord) -> ExportView {
        let target = self.target(&record.name);
        let session = |session: SessionStatus| IscsiSession {
            initiator: session.initiator.to_string(),
            from: session.address.to_string(),
            portal: usize::from(session.group).saturating_sub(1),
            since_unix_ms: unix_ms(session.since),
            commands: session.commands,
            read_bytes: session.read_bytes,
            written_bytes: session.written_bytes,
        };
        let access = &record.access;
        let authentication = match (&access.chap, &access.mutual_chap) {
            (None, _) => "none",
            (Some(_), None) => "chap",
            (Some(_), Some(_)) => "mutual chap",
        };
        ExportView {
            name: record.name.clone(),
            node: self.node.clone(),
            protocol: ExportProtocol::Iscsi,
            read_only: record.read_only,
            addresses: self.portals.iter().map(|portal| format!("iscsi://{portal}/{target}/0")).collect(),
            initiators: access.initiators.clone(),
            authentication: authentication.to_owned(),
            sessions: self.server.sessions(&target).into_iter().map(session).collect(),
            target: Some(target.to_string()),
        }
    }

    fn file(&self, name: &ExportName) -> PathBuf {
        self.dir.join(format!("{}.json", name.file_name()))
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<ExportName, ExportRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Protocol for IscsiExports {
    fn protocol(&self) -> ExportProtocol {
        ExportProtocol::Iscsi
    }

    fn check(&self, name: &ExportName, access: &ExportAccess) -> Result<(), Refusal> {
        self.check_access(name, iscsi_access(access)?)
    }

    fn start<'a>(
        &'a self,
        name: &'a ExportName,
        access: ExportAccess,
        disk: Exported,
    ) -> BoxFuture<'a, Result<ExportView, Refusal>> {
        Box::pin(async move { self.add(name, iscsi_access(&access)?.clone(), disk).await })
    }

    fn stop<'a>(&'a self, name: &'a ExportName) -> BoxFuture<'a, Result<bool, Refusal>> {
        Box::pin(self.remove(name))
    }

    fn describe(&self) -> Vec<ExportView> {
        self.records().values().map(|record| self.view(record)).collect()
    }

    fn keeps(&self, name: &ExportName) -> bool {
        self.records().contains_key(name)
    }

    fn restore(&self, disks: &Disks) -> io::Result<()> {
        let files = state::sweep(&self.dir)?;
        if !files.is_empty() && self.portals.is_empty() {
            tracing::warn!(exports = files.len(), "exports_not_served: there is no --iscsi-listen");
        }
        for file in files {
            let restored =
                state::read_record::<ExportRecord>(&file).and_then(|record| match disks.find(&record.name) {
                    Some(exported) => self.serve(record, exported).map_err(|e| e.message),
                    None if disks.is_gone(&record.name) => {
                        tracing::info!(export = %record.name, "leftovers_removed: an unfinished destroy left an export");
                        fs::remove_file(&file).map_err(|e| e.to_string())
                    }
                    None => Err(format!("'{}' is not open", record.name)),
                });
            if let Err(reason) = restored {
                tracing::error!(file = %file.display(), reason, "export_not_restored");
            }
        }
        Ok(())
    }
}

fn iscsi_access(access: &ExportAccess) -> Result<&IscsiAccess, Refusal> {
    match access {
        ExportAccess::Iscsi(access) => Ok(access),
        other => Err(Refusal::internal(format!("a request for {} came to iSCSI", other.protocol()))),
    }
}

fn credentials(chap: &ChapSecret) -> Result<Credentials, Refusal> {
    Credentials::new(&chap.user, chap.secret.as_bytes()).map_err(|e| {
        Refusal::new(Code::BadSecret, format!("the secret of '{}': {e}", chap.user))
            .with_hint("'openssl rand -hex 8' makes one of 16 characters")
    })
}

/// Where a portal is reached on the node that is reached at `address`.
fn reached_at(portal: &SocketAddr, address: &str) -> String {
    match address.rsplit_once(':') {
        Some((host, _)) if portal.ip().is_unspecified() => format!("{host}:{}", portal.port()),
        _ => portal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_portal_at_every_address_is_told_as_the_node_is_reached() {
        let at = |portal: &str| reached_at(&portal.parse().unwrap(), "node1.example:7420");
        assert_eq!(at("0.0.0.0:3260"), "node1.example:3260");
        assert_eq!(at("[::]:3261"), "node1.example:3261");
        assert_eq!(at("192.0.2.1:3260"), "192.0.2.1:3260");
    }
}
