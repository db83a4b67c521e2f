//! One VM of a node: its record, its disks and its guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use block::{ImageId, NodeName, VmName};

use super::record::VmRecord;
use crate::disks::{Disk, DiskRecord};
use crate::layers::Layer;
use control::api::compute::VmReady;
use control::refusal::{Code, Refusal};
use qemu::Qemu;

/// What must be free on the file system before a guest that waits for room goes on: what it wrote last and some more,
/// or it would wait again at once.
const ROOM_BYTES_MIN: u64 = 16 << 20;

/// One VM with its disks open and exported.
pub(crate) struct Vm {
    name: VmName,
    record: Mutex<VmRecord>,
    /// In the order of the record.
    disks: Vec<Arc<Disk>>,
    guest: Mutex<Guest>,
    /// How long it took to make the disk, if this daemon did.
    disk_ms: OnceLock<u64>,
    /// How long its last boot took, if anybody waited for it.
    ready: Mutex<Option<VmReady>>,
    /// Where it is being moved.
    moving: Mutex<Option<NodeName>>,
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
    /// The VM of this record in `dir`, whose disks have these `tops`. They are exported at sockets in `sockets`.
    pub(crate) fn open(
        record: VmRecord,
        dir: &Path,
        tops: Vec<Arc<Layer>>,
        sockets: &Path,
    ) -> Result<Arc<Vm>, String> {
        let open = |(index, (disk, top)): (usize, (&DiskRecord, Arc<Layer>))| {
            let name = disk_name(&record.name, index);
            Ok(Arc::new(Disk::open(disk.id, top, dir, name, sockets)?))
        };
        let disks = record.disks.iter().zip(tops).enumerate().map(open).collect::<Result<_, String>>()?;
        Ok(Arc::new(Vm {
            name: record.name.clone(),
            record: Mutex::new(record),
            disks,
            guest: Mutex::new(Guest::None),
            disk_ms: OnceLock::new(),
            ready: Mutex::new(None),
            moving: Mutex::new(None),
        }))
    }

    /// Its disks, that which its guest boots from first.
    pub(crate) fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The disk that its guest boots from.
    pub(crate) fn boot_disk(&self) -> &Arc<Disk> {
        self.disks.first().expect("a VM has a disk")
    }

    /// Exports its disks, if they are not.
    pub(crate) fn export(&self) -> Result<(), String> {
        self.disks.iter().try_for_each(|disk| disk.export())
    }

    /// Ends all connections to its disks.
    pub(crate) fn close_exports(&self) {
        self.disks.iter().for_each(|disk| disk.close_export());
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
        self.lock_record().clone()
    }

    /// Knows what is on disk already.
    pub(crate) fn set_record(&self, record: VmRecord) {
        *self.lock_record() = record;
    }

    fn lock_record(&self) -> MutexGuard<'_, VmRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.boot_disk().io.await_first_read();
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

    /// Whether its disks stand on these images, with these sizes where they are given.
    pub(crate) fn must_be(&self, disks: &[(ImageId, Option<u64>)]) -> Result<(), Refusal> {
        let VmRecord { name, disks: own, .. } = self.record();
        let refused = |why: String| {
            let refusal = Refusal::new(Code::VmExists, format!("there is a VM '{name}' already, {why}"));
            Err(refusal.with_hint("choose another name or destroy it first"))
        };
        if own.len() != disks.len() {
            return refused(format!("with {} disks instead of {}", own.len(), disks.len()));
        }
        for (own, (image_id, size_bytes)) in own.iter().zip(disks) {
            if own.image_id != *image_id {
                return refused(format!("on image '{}'", own.image));
            }
            if let Some(wanted) = size_bytes.filter(|wanted| *wanted != own.size_bytes) {
                return refused(format!("with a disk of {} bytes instead of {wanted}", own.size_bytes));
            }
        }
        Ok(())
    }
}

/// What a VM's disk is called over NBD: the first as the VM, and `+` is in no VM's name.
fn disk_name(vm: &VmName, index: usize) -> String {
    if index == 0 { vm.to_string() } else { format!("{vm}+{index}") }
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
