//! One VM of a node: its record, its disk and its guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use block::{ImageId, ImageName, NodeName, SnapshotName, VmName};
use serde::{Deserialize, Serialize};
use store::Chain;

use super::metered_disk::MeteredDisk;
use crate::layers::{Layer, LayerId};
use crate::nbd_socket::{Clients, NbdSocket};
use crate::state::sync_dir;
use control::api::compute::{StartVm, VmReady};
use control::refusal::{Code, Refusal};
use qemu::Qemu;

/// What must be free on the file system before a guest that waits for room goes on: what it wrote last and some more,
/// or it would wait again at once.
const ROOM_BYTES_MIN: u64 = 16 << 20;

/// What is remembered of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VmRecord {
    pub(crate) name: VmName,
    pub(crate) image: ImageName,
    pub(crate) image_id: ImageId,
    pub(crate) size_bytes: u64,
    pub(crate) created_unix_ms: u64,
    /// The disk's serial number, which stays with it wherever it goes.
    pub(crate) serial: String,
    /// The layer that takes the guest's changes.
    pub(crate) top: LayerId,
    /// From old to new.
    #[serde(default)]
    pub(crate) snapshots: Vec<Snapshot>,
    /// How its guest was started last.
    #[serde(default)]
    pub(crate) start: Option<StartVm>,
    /// The VM belongs to another node, which may not know it yet.
    #[serde(default)]
    pub(crate) moved_to: Option<Member>,
    /// Its guest came from another node, and stands still until it is told to go on.
    #[serde(default)]
    pub(crate) arrived: bool,
}

/// A node, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) node: NodeName,
    pub(crate) address: String,
}

/// What is remembered of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) name: SnapshotName,
    pub(crate) layer: LayerId,
    pub(crate) created_unix_ms: u64,
    /// Whether the guest had its file systems frozen.
    pub(crate) quiesced: bool,
}

impl VmRecord {
    /// All layers that the record names.
    pub(crate) fn layers(&self) -> impl Iterator<Item = LayerId> {
        self.snapshots.iter().map(|snapshot| snapshot.layer).chain([self.top])
    }
}

/// One VM with its disk open and exported.
pub(crate) struct Vm {
    name: VmName,
    state: Mutex<CurrentState>,
    pub(crate) disk: Arc<MeteredDisk<Chain>>,
    guest: Mutex<Guest>,
    /// How long it took to make the disk, if this daemon did.
    disk_ms: OnceLock<u64>,
    /// How long its last boot took, if anybody waited for it.
    ready: Mutex<Option<VmReady>>,
    export: Mutex<Option<NbdSocket>>,
    /// Where it is being moved.
    moving: Mutex<Option<NodeName>>,
}

/// What is on disk of it, and open.
struct CurrentState {
    record: VmRecord,
    top: Arc<Layer>,
}

/// What became of a VM's guest since it was started.
pub(crate) enum Guest {
    /// It was never started by this daemon, nor found running.
    None,
    /// It runs.
    Running(Arc<Qemu>),
    /// Its hypervisor ended.
    Ended,
}

impl Vm {
    /// The VM of this record in `dir`, whose disk has `top` as its topmost layer. It is exported at `socket`.
    pub(crate) fn open(
        record: VmRecord,
        dir: &Path,
        top: Arc<Layer>,
        socket: &Path,
    ) -> Result<Arc<Vm>, String> {
        let (layers, _) = top.chain();
        let below = layers[1..].iter().map(|layer| Arc::clone(layer.overlay())).collect();
        let dir = dir.to_owned();
        let chain = Chain::new(Arc::clone(top.overlay()), below, Box::new(move || sync_dir(&dir)));
        let disk = Arc::new(MeteredDisk::new(chain));
        let vm = Vm {
            name: record.name.clone(),
            state: Mutex::new(CurrentState { record, top }),
            disk,
            guest: Mutex::new(Guest::None),
            disk_ms: OnceLock::new(),
            ready: Mutex::new(None),
            export: Mutex::new(None),
            moving: Mutex::new(None),
        };
        vm.export_at(socket)?;
        Ok(Arc::new(vm))
    }

    /// Exports the disk, if it is not.
    pub(crate) fn export_at(&self, socket: &Path) -> Result<(), String> {
        let mut export = self.export.lock().unwrap_or_else(PoisonError::into_inner);
        if export.is_none() {
            let opened = NbdSocket::open(
                socket.to_owned(),
                self.name.to_string(),
                Arc::clone(&self.disk) as _,
                Clients::default(),
            );
            let opened = opened.map_err(|e| format!("cannot open the socket {}: {e}", socket.display()))?;
            *export = Some(opened);
        }
        Ok(())
    }

    /// Ends all connections to the export.
    pub(crate) fn close_export(&self) {
        self.export.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Notes that the VM is being moved, until the answer is dropped. `None` if it is already.
    pub(crate) fn begin_to_move(self: &Arc<Self>, to: &NodeName) -> Option<Moving> {
        let mut moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        match *moving {
            Some(_) => None,
            None => {
                *moving = Some(to.clone());
                Some(Moving(Arc::clone(self)))
            }
        }
    }

    /// Where it is being moved, if it is.
    pub(crate) fn moving(&self) -> Option<NodeName> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The VM's name.
    pub(crate) fn name(&self) -> &VmName {
        &self.name
    }

    /// What is remembered of it at present.
    pub(crate) fn record(&self) -> VmRecord {
        self.state().record.clone()
    }

    /// The layer that takes the changes at present.
    pub(crate) fn top(&self) -> Arc<Layer> {
        Arc::clone(&self.state().top)
    }

    /// Knows what is on disk already.
    pub(crate) fn set_record(&self, record: VmRecord) {
        self.state().record = record;
    }

    /// The same, with another layer to take the changes.
    pub(crate) fn set_top(&self, record: VmRecord, top: Arc<Layer>) {
        *self.state() = CurrentState { record, top };
    }

    fn state(&self) -> MutexGuard<'_, CurrentState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest, if it runs.
    pub(crate) fn running(&self) -> Option<Arc<Qemu>> {
        match &*self.guest() {
            Guest::Running(guest) => Some(Arc::clone(guest)),
            Guest::None | Guest::Ended => None,
        }
    }

    /// Notes that this guest has ended, unless another took its place.
    pub(crate) fn ended(&self, which: &Arc<Qemu>) {
        let mut guest = self.guest();
        if matches!(&*guest, Guest::Running(running) if Arc::ptr_eq(running, which)) {
            *guest = Guest::Ended;
        }
    }

    pub(crate) fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what is known of boots so far: the next one counts.
    pub(crate) fn reset_boot_stats(&self) {
        self.disk.await_first_read();
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Notes how long it took to make the disk.
    pub(crate) fn note_made(&self, took: Duration) {
        // It is made once.
        let _ = self.disk_ms.set(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
    }

    /// How long it took to make the disk, in milliseconds, if this daemon did.
    pub(crate) fn disk_ms(&self) -> Option<u64> {
        self.disk_ms.get().copied()
    }

    /// Notes how long the boot took.
    pub(crate) fn note_ready(&self, ready: VmReady) {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(ready);
    }

    /// How long the last boot took, if anybody waited for it.
    pub(crate) fn last_ready(&self) -> Option<VmReady> {
        *self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn must_be(&self, image: ImageId, size_bytes: Option<u64>) -> Result<(), Refusal> {
        let VmRecord { name, image: own, image_id, size_bytes: own_bytes, .. } = self.record();
        if image_id != image {
            return Err(Refusal::new(
                Code::VmExists,
                format!(
                    "there is a VM '{name}' already, on image '{own}'; choose another name or destroy it first"
                ),
            ));
        }
        match size_bytes {
            Some(wanted) if wanted != own_bytes => Err(Refusal::new(
                Code::VmExists,
                format!(
                    "there is a VM '{name}' already, with a disk of {own_bytes} bytes instead of {wanted}"
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// A VM that is being moved; until this is dropped, nobody else changes it.
pub(crate) struct Moving(Arc<Vm>);

impl Drop for Moving {
    fn drop(&mut self) {
        *self.0.moving.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Notes that a VM's guest runs, and when it ends. Meanwhile it is let go on whenever it stands still for no good
/// reason; one that waits for room on the file system of `dir`, once there is some.
pub(crate) fn watch(vm: &Arc<Vm>, guest: Arc<Qemu>, dir: PathBuf) {
    *vm.guest() = Guest::Running(Arc::clone(&guest));
    let vm = Arc::downgrade(vm);
    // The task ends with the guest's process, or with the daemon.
    tokio::spawn(async move {
        guest.supervise(|| has_room(&dir)).await;
        if let Err(error) = guest.exited().await {
            tracing::warn!(vm = %guest.name(), %error, "guest_not_watched");
            return;
        }
        tracing::info!(vm = %guest.name(), "guest_ended");
        if let Some(vm) = vm.upgrade() {
            vm.ended(&guest);
        }
    });
}

fn has_room(dir: &Path) -> bool {
    rustix::fs::statvfs(dir).is_ok_and(|room| room.f_bavail * room.f_frsize >= ROOM_BYTES_MIN)
}
