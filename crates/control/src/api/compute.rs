//! The bodies of a node's API.

use std::path::PathBuf;

use block::{DiskId, ImageId, ImageName, NodeName, SnapshotName, VmName};
use clap::ValueEnum;
use qemu::{Accel, Platform};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::export::{ChapSecret, IscsiAccess};
use super::profile::NodeProfile;
use super::volt::ImageKind;

/// Makes a node the origin of an image.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AddImage {
    /// The file or block device on the node, absolute, or the address of an iSCSI unit.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// `raw`, `qcow2`, `vmdk` or `vhdx`; detected if absent.
    pub format: Option<String>,
    /// Directories, beside the file's own, in which its backing files and extents may lie.
    #[schema(value_type = Vec<String>)]
    #[serde(default)]
    pub allow: Vec<PathBuf>,
    /// Whether the node keeps a copy or serves from the file in place.
    #[serde(default)]
    pub keep: KeepImage,
    /// What the node proves to an iSCSI target.
    pub chap: Option<ChapSecret>,
    /// What that target has to prove to the node.
    pub mutual_chap: Option<ChapSecret>,
}

/// Where an origin's bytes stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepImage {
    /// In the file that was named.
    #[default]
    InPlace,
    /// In a sparse raw copy in the node's directory.
    Copy,
}

/// One line of the answer to a long operation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Progress<T> {
    /// So much is done.
    Bytes {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// It is finished.
    Done {
        /// What came of it.
        result: T,
    },
    /// It failed, and left nothing behind.
    Failed {
        /// Why, and what to do.
        message: String,
    },
}

/// An image as its node sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeImage {
    /// The names under which it is attached.
    #[schema(value_type = Vec<String>)]
    pub names: Vec<ImageName>,
    /// BLAKE3 of its root page.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// What it is of.
    #[serde(default)]
    pub kind: ImageKind,
    /// Virtual size.
    pub size_bytes: u64,
    /// Chunks that cover it.
    pub chunks: u64,
    /// Those of them that are all zero, and so neither stored nor sent.
    pub zero_chunks: u64,
    /// `origin` or `relay`.
    pub role: String,
    /// Where the origin's bytes are, on an origin.
    pub source: Option<String>,
    /// The nodes from which it is fetched, best first, per stripe.
    #[schema(value_type = Vec<Vec<String>>)]
    pub parents: Vec<Vec<NodeName>>,
    /// NBD URI of the read-only image volume.
    pub export: String,
    /// VM disks on it.
    pub vms: usize,
    /// How far its boot profile is here, if it has one.
    #[serde(default)]
    pub profile: Option<NodeProfile>,
    /// How much of it is here, if all of it is to be.
    #[serde(default)]
    pub fill: Option<NodeFill>,
    /// When it is detached unless something uses it before: it was attached for VMs or exports, and there are none. It
    /// stays a little longer if other nodes fetch it from this one.
    #[serde(default)]
    pub detaches_in_ms: Option<u64>,
}

/// How far a node is with getting a whole image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeFill {
    /// Chunks that cover the image.
    pub chunks: u64,
    /// Those of them that are here: fetched, found in the cache, or all zero.
    pub resident: u64,
}

/// What `image verify` found.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ImageVerified {
    /// The image.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// Chunks with data that were read.
    pub chunks: u64,
    /// How many are not what they should be.
    pub wrong_chunks: u64,
    /// Byte offsets of the first of them.
    pub wrong_offsets: Vec<u64>,
}

/// Gives a VM its disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateVm {
    /// The image's name with tag.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// Size of the disk; the image's if absent. May be larger, not smaller.
    pub size_bytes: Option<u64>,
    /// Disks beside the one that its guest boots from.
    #[serde(default)]
    pub further_disks: Vec<CreateDisk>,
    /// Who may open it over iSCSI; nobody if absent.
    #[serde(default)]
    pub iscsi: Option<IscsiAccess>,
    /// The image is another VM's disk, which was made on this one: what differs is fetched and kept by the VM, so that
    /// it needs only this one in the end.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub settle_on: Option<ImageName>,
}

/// A disk that is as an image.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CreateDisk {
    /// The image's name with tag.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// Size of the disk; the image's if absent. May be larger, not smaller.
    pub size_bytes: Option<u64>,
}

/// Clones a VM's disk on its own node.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CloneVm {
    /// The new VMs.
    #[schema(value_type = Vec<String>)]
    pub clones: Vec<VmName>,
    /// Whether the guest's agent freezes its file systems meanwhile.
    #[serde(default)]
    pub quiesce: bool,
}

/// Makes an image of a VM's disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CommitVm {
    /// The name of the image.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// Whether the guest's agent freezes its file systems meanwhile.
    #[serde(default)]
    pub quiesce: bool,
    /// Whether it is removed once no other node uses it.
    #[serde(default)]
    pub passing: bool,
}

/// A VM and its disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    #[schema(value_type = String)]
    pub name: VmName,
    /// The node it is on.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// The image below its disk.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// That image's id.
    #[schema(value_type = String)]
    pub image_id: ImageId,
    /// Size of its disk.
    pub size_bytes: u64,
    /// Bytes that its private layers hold, those that it shares with clones included.
    pub private_bytes: u64,
    /// Private layers of its disk, which reads look through.
    pub layers: usize,
    /// Its snapshots, from old to new.
    #[schema(value_type = Vec<String>)]
    pub snapshots: Vec<SnapshotName>,
    /// NBD URI of its disk.
    pub disk: String,
    /// `disk` (no guest was started), `running` or `stopped`.
    pub state: VmState,
    /// Why its guest stands still, if it runs and does though nobody wants it to.
    #[serde(default)]
    pub paused: Option<VmPaused>,
    /// Process id of its hypervisor, if it runs.
    pub pid: Option<i32>,
    /// UNIX socket of its serial console on its node, if it runs.
    #[schema(value_type = Option<String>)]
    pub console: Option<PathBuf>,
    /// Time from the request until the disk could be opened. Known to the daemon that made it, until it ends.
    pub disk_ms: Option<u64>,
    /// When the disk was created.
    pub created_unix_ms: u64,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// It has a disk and was never started here.
    Disk,
    /// Its hypervisor runs.
    Running,
    /// Its hypervisor ended.
    Stopped,
}

/// A guest that stands still, and goes on once what keeps it is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmPaused {
    /// Since when, as far as its node's daemon knows.
    pub since_unix_ms: u64,
    /// Why.
    pub reason: String,
}

/// Starts a guest on a VM's disk.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct StartVm {
    /// Memory of the guest.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// cloud-init user data; the program's own if absent.
    pub user_data: Option<String>,
    /// Public keys for the default user.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// Direct kernel boot instead of the disk's own boot loader.
    pub kernel: Option<KernelBoot>,
    /// TCP ports of the guest that are forwarded from free loopback ports of the node.
    #[serde(default)]
    pub forward_ports: Vec<u16>,
    /// What happens when there is no room for what the guest writes.
    #[serde(default)]
    pub on_full: OnFull,
}

/// What happens when there is no room for what a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// The guest is paused, and goes on where it was once there is room.
    #[default]
    Pause,
    /// The guest is told, as by a physical disk that is broken.
    Report,
}

impl From<OnFull> for qemu::OnFull {
    fn from(on_full: OnFull) -> qemu::OnFull {
        match on_full {
            OnFull::Pause => qemu::OnFull::Pause,
            OnFull::Report => qemu::OnFull::Report,
        }
    }
}

/// Direct kernel boot.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct KernelBoot {
    /// The kernel on the node, absolute.
    #[schema(value_type = String)]
    pub kernel: PathBuf,
    /// The initial ramdisk.
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
}

/// A guest was started, or ran already.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VmStarted {
    /// The VM.
    pub vm: Vm,
    /// Which accelerator it uses and why.
    pub accelerator: String,
}

/// Waits until a guest is ready.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct WaitReady {
    /// `console:REGEX`, `agent` or `tcp:PORT`.
    pub ready: String,
    /// After this long the wait fails.
    pub timeout_ms: u64,
}

/// A guest is ready.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
pub struct VmReady {
    /// Time from its hypervisor's start to its first read of the disk.
    pub first_read_ms: Option<u64>,
    /// Time from its hypervisor's start until it was ready.
    pub ready_ms: u64,
}

/// Stops a guest.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct StopVm {
    /// How long the guest may take to power down before it is ended; 0 pulls the plug.
    pub grace_ms: u64,
}

/// The node at a glance.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// The node.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// Version of the program.
    pub version: String,
    /// Where other nodes reach it.
    pub address: String,
    /// Whether it has a connection to Volt.
    pub volt_connected: bool,
    /// Resident memory of the daemon.
    pub memory_bytes: u64,
    /// Its cache group.
    pub cache: CacheStatus,
    /// Its links.
    pub links: LinkStatus,
    /// Number of VM disks.
    pub vms: usize,
    /// Number of running guests.
    pub running: usize,
}

/// A cache group in numbers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
pub struct CacheStatus {
    /// Room for chunks.
    pub capacity_bytes: u64,
    /// Room taken.
    pub resident_bytes: u64,
    /// Chunks that it holds. As long as none was evicted, dropped or left unstored, every fetch since the
    /// cache was empty left one: then each chunk was fetched once.
    pub resident_chunks: u64,
    /// Chunks that were fetched from a parent or the origin since the daemon started.
    pub fetched_chunks: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Reads that were served locally.
    pub hits: u64,
    /// Reads that had to wait for a fetch.
    pub misses: u64,
    /// Chunks that gave way to others.
    pub evicted_chunks: u64,
    /// Chunks that were not what they should be after a restart.
    pub dropped_chunks: u64,
    /// Chunks that arrived and could not be stored.
    pub unstored_chunks: u64,
    /// Media that failed and are not used.
    #[serde(default)]
    pub failed_media: u64,
}

/// Adds a medium to a node's cache group.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AddMedium {
    /// The file, created if missing, or block device on the node, absolute.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// How many bytes of it may be used, everything counted.
    pub size_bytes: u64,
}

/// Removes a medium from a node's cache group. Its file stays.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RemoveMedium {
    /// The path that it was added with.
    #[schema(value_type = String)]
    pub path: PathBuf,
}

/// A medium of a node's cache group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MediumView {
    /// The node.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// The file or block device.
    pub path: String,
    /// How many bytes of it may be used.
    pub size_bytes: u64,
    /// Room for chunks.
    pub capacity_bytes: u64,
    /// Room taken.
    pub resident_bytes: u64,
    /// Chunks on it.
    pub resident_chunks: u64,
    /// Whether it is used.
    pub state: MediumState,
    /// How many reads and writes of it failed or brought wrong bytes, since it was added or the daemon started.
    pub failures: u32,
    /// What went wrong last; that it is full is told here too, and is not a failure.
    pub reason: Option<String>,
}

/// What a medium is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MediumState {
    /// It is used.
    Healthy,
    /// It failed too often, or could not be opened, and is not used.
    Failed,
    /// It was removed and is not used, but reads of it are still on their way.
    Leaving,
}

/// Links in numbers, since the daemon started.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
pub struct LinkStatus {
    /// Chunks that came from parents and were wanted.
    pub received_chunks: u64,
    /// Chunks that came when nobody wanted them any more: another parent was faster, or whoever asked had gone.
    #[serde(default)]
    pub vain_chunks: u64,
    /// Their bytes on the wire.
    pub received_wire_bytes: u64,
    /// Chunks that went to children.
    pub sent_chunks: u64,
    /// Their bytes on the wire.
    pub sent_wire_bytes: u64,
    /// Requests that went to another parent because one failed.
    pub failovers: u64,
    /// Requests that were asked of another parent too because a guest waited too long.
    #[serde(default)]
    pub hedges: u64,
    /// Those in which the other parent was first.
    #[serde(default)]
    pub hedge_wins: u64,
    /// Answers that guests waited too long for, hedged or not.
    #[serde(default)]
    pub late_fetches: u64,
    /// Parents that were not asked for a while because they were late time and again.
    #[serde(default)]
    pub breaker_openings: u64,
    /// Requests to an origin because the planned parents failed.
    #[serde(default)]
    pub last_resort_fetches: u64,
    /// Requests that waited for a budget.
    #[serde(default)]
    pub throttled: u64,
    /// Wrong chunks that parents sent.
    pub lies: u64,
}

/// Takes a snapshot.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct TakeSnapshot {
    /// Whether the guest's agent freezes its file systems meanwhile.
    #[serde(default)]
    pub quiesce: bool,
}

/// A snapshot of a VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotView {
    /// The VM.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// Its name.
    #[schema(value_type = String)]
    pub name: SnapshotName,
    /// When it was taken.
    pub created_unix_ms: u64,
    /// Whether the guest had its file systems frozen.
    pub quiesced: bool,
    /// Bytes that were written between the snapshot before and this one.
    pub private_bytes: u64,
}

/// A snapshot was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotTaken {
    /// The snapshot.
    #[serde(flatten)]
    pub snapshot: SnapshotView,
    /// For how long the guest's writes had to wait, in microseconds.
    pub pause_us: u64,
}

/// Lets a VM come from another node.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ExpectVm {
    /// The node that has it.
    #[schema(value_type = String)]
    pub from: NodeName,
    /// Where that is reached.
    pub address: String,
}

/// Moves a VM to another node, which expects it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct MigrateVm {
    /// The node.
    #[schema(value_type = String)]
    pub to: NodeName,
    /// Where it is reached.
    pub address: String,
}

/// What a node tells another of a VM that it brings.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HandOver {
    /// Its disks, the one that its guest boots from first.
    pub disks: Vec<HandOverDisk>,
    /// Its snapshots, from old to new.
    #[serde(default)]
    pub snapshots: Vec<HandOverSnapshot>,
    /// When it was created.
    pub created_unix_ms: u64,
    /// How its guest was started last.
    pub start: Option<StartVm>,
    /// What its guest runs on, if it runs.
    pub live: Option<LiveGuest>,
}

/// A disk that a node brings to another.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HandOverDisk {
    /// Its identity.
    #[schema(value_type = String)]
    pub id: DiskId,
    /// The image below it.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// That image's id.
    #[schema(value_type = String)]
    pub image_id: ImageId,
    /// Its size.
    pub size_bytes: u64,
    /// What it was at the VM's snapshots, older ones before those that stand on them.
    #[serde(default)]
    #[schema(value_type = Object)]
    pub snapshots: Vec<(SnapshotName, HandOverState)>,
    /// What it is.
    pub state: HandOverState,
}

/// A state of a disk that a node brings to another.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HandOverState {
    /// The image that carries what was written, if anything was.
    #[schema(value_type = Option<String>)]
    pub carried: Option<ImageName>,
    /// The snapshot that it was written after, if there is one.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub on: Option<SnapshotName>,
}

/// A snapshot that a node brings to another with its VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HandOverSnapshot {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SnapshotName,
    /// When it was taken.
    pub created_unix_ms: u64,
    /// Whether the guest had its file systems frozen.
    pub quiesced: bool,
}

/// What a running guest runs on.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LiveGuest {
    /// How its instructions are run.
    #[schema(value_type = String)]
    pub accel: Accel,
    /// The machine that it sees.
    #[schema(value_type = Object)]
    pub platform: Platform,
}

/// What becomes of a VM that another node was told to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MovingState {
    /// It is on its way.
    Moving,
    /// It belongs to the other node.
    Moved,
    /// It is not moved there.
    Not,
}

/// A VM was moved.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Migrated {
    /// The VM at its new node.
    pub vm: Vm,
    /// For how long its guest stood still.
    pub pause_ms: u64,
    /// How long all of it took.
    pub total_ms: u64,
    /// Rounds in which was sent what it wrote meanwhile.
    pub rounds: u32,
    /// Bytes that were sent in these.
    pub disk_bytes: u64,
    /// Bytes of its guest's memory that were sent.
    pub memory_bytes: u64,
}
