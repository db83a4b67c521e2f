//! Exports: how others than this node's guests open its disks and images.
//!
//! A protocol is a module of one shape, [`Protocol`]; [`Exports`] knows all of them.

mod iscsi;
mod nbd;

use std::io;
use std::sync::Arc;

use block::{BoxFuture, Disk, VmName};

pub(crate) use self::iscsi::{IscsiExports, Portals};
pub(crate) use self::nbd::{NbdExports, TcpExports};
use crate::images::Images;
use crate::vms::Vms;
use control::api::export::{ExportAccess, ExportName, ExportProtocol, ExportView};
use control::refusal::{Code, Refusal};

/// A protocol over which disks and images can be opened. All methods may be called at the same time.
pub(crate) trait Protocol: Send + Sync {
    /// What it is called.
    fn protocol(&self) -> ExportProtocol;

    /// Refuses an export that [`start`](Protocol::start) would refuse for what it says.
    fn check(&self, name: &ExportName, access: &ExportAccess) -> Result<(), Refusal>;

    /// Exports a disk, or changes who may open one that is exported, and remembers that. Repeating it changes nothing;
    /// what [`check`](Protocol::check) refuses is refused.
    fn start<'a>(
        &'a self,
        name: &'a ExportName,
        access: ExportAccess,
        disk: Exported,
    ) -> BoxFuture<'a, Result<ExportView, Refusal>>;

    /// Exports a disk no longer, and forgets that: whoever had it open has been disconnected when this answers. Whether
    /// it was exported.
    fn stop<'a>(&'a self, name: &'a ExportName) -> BoxFuture<'a, Result<bool, Refusal>>;

    /// All exports.
    fn describe(&self) -> Vec<ExportView>;

    /// Whether somebody had a disk exported, which keeps it here until that is ended.
    fn keeps(&self, name: &ExportName) -> bool;

    /// Exports again what was exported when the daemon ended. What cannot be is said and left out.
    fn restore(&self, disks: &Disks) -> io::Result<()>;
}

/// A disk to be exported.
pub(crate) struct Exported {
    pub(crate) disk: Arc<dyn Disk>,
    /// The same wherever and whenever the same disk is exported, and no other's.
    pub(crate) serial: String,
}

/// The disks and images of a node, by the names under which they are exported.
#[derive(Clone)]
pub(crate) struct Disks {
    pub(crate) images: Arc<Images>,
    pub(crate) vms: Arc<Vms>,
}

impl Disks {
    /// The disk, if it is open.
    pub(crate) fn find(&self, name: &ExportName) -> Option<Exported> {
        match name {
            ExportName::Vm(name) => {
                let vm = self.vms.get(name).ok()?;
                let disk = vm.boot_disk();
                Some(Exported { disk: Arc::clone(&disk.io) as _, serial: disk.id.to_string() })
            }
            ExportName::Image(name) => {
                let attached = self.images.by_name(name)?;
                // The same on every node: the nodes are so many paths to one disk.
                let serial = attached.id.to_string();
                Some(Exported { disk: Arc::clone(&attached.volume) as _, serial })
            }
        }
    }

    /// Whether it is gone for good, and not just not open.
    pub(crate) fn is_gone(&self, name: &ExportName) -> bool {
        match name {
            ExportName::Vm(name) => !self.vms.has_files(name),
            // An image is not detached while it is exported.
            ExportName::Image(_) => false,
        }
    }
}

/// The exports of a node over all protocols.
pub(crate) struct Exports {
    disks: Disks,
    protocols: Vec<Arc<dyn Protocol>>,
}

impl Exports {
    /// Those over these protocols.
    pub(crate) fn new(disks: Disks, protocols: Vec<Arc<dyn Protocol>>) -> Exports {
        Exports { disks, protocols }
    }

    /// Exports again what was exported when the daemon ended. What cannot be is said and left out.
    pub(crate) fn restore(&self) -> io::Result<()> {
        self.protocols.iter().try_for_each(|protocol| protocol.restore(&self.disks))
    }

    /// Refuses an export that [`start`](Exports::start) would refuse for what it says.
    pub(crate) fn check(&self, name: &ExportName, access: &ExportAccess) -> Result<(), Refusal> {
        self.by(access.protocol())?.check(name, access)
    }

    /// Exports a disk that is open, or changes who may open one that is exported.
    pub(crate) async fn start(&self, name: &ExportName, access: ExportAccess) -> Result<ExportView, Refusal> {
        let disk = self.disks.find(name);
        let disk = disk.ok_or_else(|| Refusal::internal(format!("'{name}' was removed meanwhile")))?;
        self.by(access.protocol())?.start(name, access, disk).await
    }

    /// Exports a disk no longer over any protocol that somebody asked for. Whether it was exported.
    pub(crate) async fn stop(&self, name: &ExportName) -> Result<bool, Refusal> {
        let mut was_exported = false;
        for protocol in &self.protocols {
            was_exported |= protocol.stop(name).await?;
        }
        Ok(was_exported)
    }

    /// All exports, by name.
    pub(crate) fn describe(&self) -> Vec<ExportView> {
        let mut all: Vec<ExportView> =
            self.protocols.iter().flat_map(|protocol| protocol.describe()).collect();
        all.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
        all
    }

    /// The protocol over which somebody had a disk exported, if there is one.
    pub(crate) fn kept_by(&self, name: &ExportName) -> Option<ExportProtocol> {
        let protocol = self.protocols.iter().find(|protocol| protocol.keeps(name));
        protocol.map(|protocol| protocol.protocol())
    }

    /// A VM that others have open cannot be moved from under them.
    pub(crate) fn must_not_keep(&self, name: &VmName) -> Result<(), Refusal> {
        let Some(protocol) = self.kept_by(&ExportName::Vm(name.clone())) else { return Ok(()) };
        let message = format!("'{name}' is exported over {protocol} by this node");
        Err(Refusal::new(Code::Exported, message)
            .with_hint(format!("'virtman export remove {name}' ends that")))
    }

    fn by(&self, wanted: ExportProtocol) -> Result<&dyn Protocol, Refusal> {
        let found = self.protocols.iter().find(|protocol| protocol.protocol() == wanted);
        found.map(|protocol| &**protocol).ok_or_else(|| {
            Refusal::new(Code::NoSuchProtocol, format!("this node exports nothing over {wanted}"))
        })
    }
}
