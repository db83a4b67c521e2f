//! Everything about one VM: the body of a node's API behind `virtman show`.

use block::{ImageId, ImageName, SnapshotName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::compute::{CacheStatus, NodeImage, SnapshotView, Vm};
use super::disk::DiskView;
use super::export::ExportView;

/// Everything about a VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VmDetails {
    /// What lists show of it.
    pub vm: Vm,
    /// The serial number of its disk.
    pub serial: String,
    /// All its disks: first the one that its guest boots from, which the rest of this is about.
    #[serde(default)]
    pub disks: Vec<DiskView>,
    /// The layers of its disk, from top to bottom.
    pub layers: Vec<LayerView>,
    /// Bytes in layers of all disks that only this VM needs.
    pub own_bytes: u64,
    /// Bytes in layers of all disks that other VMs or images need too.
    pub shared_bytes: u64,
    /// Its snapshots, from old to new.
    pub snapshots: Vec<SnapshotView>,
    /// The image that its disk is taken over from, as long as it is.
    pub taking_over: Option<CarriedImage>,
    /// The ways to its disk.
    pub exports: Vec<ExportView>,
    /// Its image on this node, with the parents that it is fetched from.
    pub image: NodeImage,
    /// The node's cache group, which serves all of its VMs.
    pub cache: CacheStatus,
    /// What was done with its disk since the daemon started.
    pub io: DiskIo,
    /// Its last boot.
    pub boot: BootTimeline,
}

/// A layer of a VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerView {
    /// Its name on its node.
    pub id: String,
    /// Bytes that it holds, zeroed and discarded ones included.
    pub bytes: u64,
    /// When it was made.
    pub made_unix_ms: u64,
    /// Whether it takes changes.
    pub state: LayerState,
    /// The VM's snapshots that are this layer with what is below it.
    #[schema(value_type = Vec<String>)]
    pub snapshots: Vec<SnapshotName>,
    /// Whether other VMs or images need it too.
    pub shared: bool,
}

/// Whether a layer takes changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LayerState {
    /// It is on top of its disk.
    Writable,
    /// It never changes.
    Frozen,
}

/// An image that carries another VM's disk to this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CarriedImage {
    /// Its names on this node.
    #[schema(value_type = Vec<String>)]
    pub names: Vec<ImageName>,
    /// Its id.
    #[schema(value_type = String)]
    pub id: ImageId,
}

/// What was done with a disk since its node's daemon started, by whatever way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskIo {
    /// Reads.
    pub reads: u64,
    /// Bytes that they asked for.
    pub read_bytes: u64,
    /// Writes of data.
    pub writes: u64,
    /// Bytes that they brought.
    pub written_bytes: u64,
    /// Ranges that were zeroed or discarded.
    pub clears: u64,
    /// Flushes.
    pub flushes: u64,
}

/// How a VM came up last, as far as the node's daemon saw it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BootTimeline {
    /// Time from the request until the disk could be opened. Known to the daemon that made it, until it ends.
    pub disk_ms: Option<u64>,
    /// When the guest's hypervisor was started, if it runs.
    pub started_unix_ms: Option<u64>,
    /// Time from then to its first read of the disk.
    pub first_read_ms: Option<u64>,
    /// Time from then until it was ready, if anybody waited for that.
    pub ready_ms: Option<u64>,
}
