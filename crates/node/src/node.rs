//! One host that runs `virtman compute`: its services, for the routes of its API.

use std::sync::Arc;

use block::NodeName;
use tokio_util::sync::CancellationToken;

use crate::cache::CacheMedia;
use crate::exports::Exports;
use crate::migration::source::OutgoingVms;
use crate::migration::target::IncomingVms;
use crate::service::clones::Clones;
use crate::service::details::Details;
use crate::service::images::ImageService;
use crate::service::origins::OriginService;
use crate::service::qcow2::Qcow2Files;
use crate::service::vms::VmService;
use crate::vms::Vms;
use crate::vms::guests::Guests;
use crate::vms::snapshots::Snapshots;

/// The services of a node.
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) cache: Arc<CacheMedia>,
    pub(crate) images: Arc<ImageService>,
    pub(crate) origins: Arc<OriginService>,
    pub(crate) vms: Arc<Vms>,
    pub(crate) vm_service: Arc<VmService>,
    pub(crate) guests: Arc<Guests>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) clones: Arc<Clones>,
    pub(crate) qcow2: Qcow2Files,
    pub(crate) exports: Arc<Exports>,
    pub(crate) incoming: Arc<IncomingVms>,
    pub(crate) outgoing: Arc<OutgoingVms>,
    pub(crate) details: Details,
    pub(crate) shutdown: CancellationToken,
}
