//! Snapshots of VMs' disks: taken of running guests, gone back to, and given up.
//!
//! A snapshot is a frozen layer of each of the VM's disks, with a name. Taking one holds up the guest's changes for as
//! long as it takes to put the VM's new record where the old one was; reads go on. What is not durable then becomes so while the guest goes on,
//! before its next flush is answered and before the snapshot is.
//!
//! Consistency: a snapshot is crash-consistent, over all disks: it holds all changes that were answered before it was
//! taken, and none that was begun after. Quiesced,
//! the guest has written out its file systems before. Crash: the VM's record says what is true.
//! Cancellation: the caller runs these to their end. Retries: none.

use std::sync::Arc;
use std::time::Duration;

use block::{DiskId, SnapshotName, VmName};

use super::{Snapshot, Vm, VmRecord, Vms, differences};
use crate::disks::{Disk, freeze_all};
use crate::layers::{Below, DEPTH_MAX, HeldLayer, Layer, LayerId, Layers};
use crate::tasks::blocking;
use control::api::compute::{SnapshotTaken, SnapshotView, Vm as VmView};
use control::api::now_unix_ms;
use control::refusal::{Code, Refusal};
use qemu::FrozenGuest;

/// How long the guest may take to write out its file systems, and to go on afterwards.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(30);

/// A VM's disks at one point.
pub(crate) struct FrozenDisks {
    /// The layer of each disk that takes no changes any more.
    pub(crate) layers: Vec<HeldLayer>,
    /// How long the guest's changes waited.
    pub(crate) pause: Duration,
}

/// Whether the guest writes out its file systems before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quiesce {
    /// It does.
    Yes,
    /// It does not.
    No,
}

impl Quiesce {
    /// As a request says it.
    pub(crate) fn of(quiesce: bool) -> Quiesce {
        if quiesce { Quiesce::Yes } else { Quiesce::No }
    }
}

/// Takes and keeps the snapshots of a node's VMs.
pub(crate) struct Snapshots {
    vms: Arc<Vms>,
    layers: Arc<Layers>,
}

impl Snapshots {
    /// Those of these VMs.
    pub(crate) fn new(vms: Arc<Vms>) -> Snapshots {
        let layers = Arc::clone(&vms.layers);
        Snapshots { vms, layers }
    }

    /// Takes a snapshot of a VM's disks.
    pub(crate) async fn take(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        quiesce: Quiesce,
    ) -> Result<SnapshotTaken, Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        if vm.record().snapshots.iter().any(|known| known.name == *snapshot) {
            return Err(Refusal::new(Code::SnapshotExists,
                format!("'{name}' has a snapshot '{snapshot}' already"),
            )
            .with_hint(format!(
                "choose another name, or 'virtman snapshot delete {name} {snapshot}' first; 'virtman snapshot export' writes it to a file"
            )));
        }
        let frozen = self.freeze(&vm, quiesce, Some(snapshot)).await?;
        let view = self.view(&vm, snapshot)?;
        tracing::info!(vm = %name, %snapshot, pause = ?frozen.pause, "snapshot_taken");
        Ok(SnapshotTaken {
            snapshot: view,
            pause_us: u64::try_from(frozen.pause.as_micros()).unwrap_or(u64::MAX),
        })
    }

    /// Freezes a VM's disks for others to stand on.
    pub(crate) async fn freeze_for_clones(
        &self,
        name: &VmName,
        quiesce: Quiesce,
    ) -> Result<(VmRecord, Vec<HeldLayer>), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        let frozen = self.freeze(&vm, quiesce, None).await?;
        tracing::info!(vm = %name, pause = ?frozen.pause, "disk_frozen: for clones");
        Ok((vm.record(), frozen.layers))
    }

    /// Freezes the tops of a VM's disks and puts new ones above. With a name they are a snapshot. The caller has the
    /// VM's lock.
    pub(crate) async fn freeze(
        &self,
        vm: &Vm,
        quiesce: Quiesce,
        snapshot: Option<&SnapshotName>,
    ) -> Result<FrozenDisks, Refusal> {
        let mut record = vm.record();
        if record.disks.iter().any(|disk| self.layers.depth(disk.top) >= DEPTH_MAX) {
            let name = &record.name;
            return Err(Refusal::new(
                Code::TooManyLayers,
                format!("the disk of '{name}' has {DEPTH_MAX} layers already, and no more are taken"),
            )
            .with_hint(format!("delete some of its snapshots: 'virtman snapshot list {name}'")));
        }
        if let Some(snapshot) = snapshot {
            record.snapshots.push(Snapshot {
                name: snapshot.clone(),
                layers: record.disks.iter().map(|disk| (disk.id, disk.top)).collect(),
                created_unix_ms: now_unix_ms(),
                quiesced: quiesce == Quiesce::Yes,
            });
        }
        let tops: Vec<Arc<Layer>> = vm.disks().iter().map(|disk| disk.top()).collect();
        let keep = |top: &Arc<Layer>| {
            let kept = self.layers.keep(top);
            kept.ok_or_else(|| Refusal::internal(format!("layer {} is gone", top.id())))
        };
        let layers = tops.iter().map(keep).collect::<Result<_, _>>()?;
        let below = record.disks.iter_mut().zip(tops).map(|(disk, top)| {
            disk.top = LayerId::draw();
            Some(Below::Layer(top))
        });
        let below = below.collect();
        let pause = self.put_on_top(vm, record, below, quiesce).await?;
        Ok(FrozenDisks { layers, pause })
    }

    /// Makes an empty layer of this new name.
    pub(crate) async fn make_above(
        &self,
        id: LayerId,
        below: Below,
        size_bytes: u64,
    ) -> Result<HeldLayer, Refusal> {
        let layers = Arc::clone(&self.layers);
        blocking(move || layers.make(id, below, size_bytes)).await
    }

    /// Freezes what is on top of the disks for which something is given in `below`, writes `record` and lets the tops
    /// that this names take the changes, new layers on what is below. Says how long those waited.
    async fn put_on_top(
        &self,
        vm: &Vm,
        record: VmRecord,
        below: Vec<Option<Below>>,
        quiesce: Quiesce,
    ) -> Result<Duration, Refusal> {
        // Begun before the layers, so that making those durable covers most of it.
        let unsynced = self.vms.start_record(&record).await?;
        let mut next = Vec::new();
        let mut tops: Vec<(Arc<Disk>, Arc<Layer>)> = Vec::new();
        for ((disk, known), below) in vm.disks().iter().zip(&record.disks).zip(below) {
            let Some(below) = below else { continue };
            let layer = self.make_above(known.top, below, known.size_bytes).await?;
            tops.push((Arc::clone(disk), Arc::clone(&layer)));
            next.push(layer);
        }
        let new =
            blocking(move || unsynced.sync().map_err(|e| format!("cannot write a VM's record: {e}"))).await?;
        let quiet = quiesced(vm, quiesce).await?;
        let (added, removed) = differences(&vm.record(), &record);
        self.layers.add_refs(added.iter().copied());
        let put = blocking(move || new.put().map_err(|e| format!("cannot replace a VM's record: {e}")));
        let frozen = freeze_all(&tops, Box::pin(put)).await;
        let counted = match frozen {
            Ok(_) => {
                vm.set_record(record);
                Ok(())
            }
            // The record was not put in its place.
            Err(_) => self.vms.release_refs(added).await,
        };
        if let Some(quiet) = quiet
            && let Err(error) = quiet.thaw(QUIESCE_TIMEOUT).await
        {
            tracing::error!(vm = %vm.name(), %error, "guest_not_thawed: it was quiesced; it is tried again and again");
        }
        let pause = frozen?;
        counted?;
        // If this fails, the old tops stay counted: the old record may come back and name them.
        for (disk, _) in &tops {
            disk.io.inner().settle().await.map_err(|error| {
                let error = Refusal::from(error);
                let message = format!(
                    "the disks of '{}' were frozen, and that cannot be made durable: {}",
                    vm.name(),
                    error.message
                );
                Refusal { message, ..error }
            })?;
        }
        self.vms.release_refs(removed).await?;
        Ok(pause)
    }

    /// Sets a VM's disks back to a snapshot. What was written since is gone, unless another snapshot has it.
    pub(crate) async fn revert(&self, name: &VmName, snapshot: &SnapshotName) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        if vm.running().is_some() {
            return Err(Refusal::new(
                Code::Running,
                format!("the guest of '{name}' runs, and its disk cannot change under it"),
            )
            .with_hint(format!("stop it first: 'virtman stop {name}'")));
        }
        let mut record = vm.record();
        let frozen = find(&record, snapshot)?.layers.clone();
        let mut below = Vec::new();
        for disk in &mut record.disks {
            // A disk that the VM did not have then stays as it is.
            let Some(&layer) = frozen.get(&disk.id) else {
                below.push(None);
                continue;
            };
            below.push(Some(Below::Layer(self.open_frozen(layer).await?)));
            disk.top = LayerId::draw();
        }
        // Whoever has a disk open must see that it is another: the connection ends.
        vm.close_exports();
        let done = self.put_on_top(&vm, record, below, Quiesce::No).await;
        vm.export().map_err(Refusal::internal)?;
        done?;
        tracing::info!(vm = %name, %snapshot, "disk_reverted");
        Ok(self.vms.describe(&vm))
    }

    /// Deletes a snapshot. Deleting one that is not there is an error.
    pub(crate) async fn delete(&self, name: &VmName, snapshot: &SnapshotName) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        find(&vm.record(), snapshot)?;
        self.forget(&vm, |known| known.name == *snapshot).await
    }

    /// Deletes the snapshot that names this layer, unless somebody else did.
    pub(crate) async fn delete_if_there(&self, name: &VmName, layer: LayerId) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        match self.vms.get(name) {
            Ok(vm) if vm.record().snapshots.iter().any(|known| known.names(layer)) => {
                self.forget(&vm, |known| known.names(layer)).await
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Takes a snapshot out of a VM's record. The caller has the VM's lock.
    async fn forget(&self, vm: &Vm, which: impl Fn(&Snapshot) -> bool) -> Result<(), Refusal> {
        let mut record = vm.record();
        record.snapshots.retain(|known| !which(known));
        self.vms.change(vm, record).await
    }

    /// The VM of which a snapshot names this layer.
    pub(crate) fn vm_of(&self, layer: LayerId) -> Option<VmName> {
        let all = self.vms.all();
        let vm = all.iter().find(|vm| vm.record().snapshots.iter().any(|known| known.names(layer)));
        vm.map(|vm| vm.name().clone())
    }

    /// Lets the snapshot of a VM that names the layer `old` name `new`, which reads the same, unless it was deleted.
    /// Refused if others hold `old`.
    pub(crate) async fn replace_layer(
        &self,
        name: &VmName,
        old: LayerId,
        new: LayerId,
    ) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let Ok(vm) = self.vms.get(name) else { return Ok(()) };
        let mut record = vm.record();
        let mut named = record.snapshots.iter_mut().flat_map(|known| known.layers.values_mut());
        let Some(named) = named.find(|layer| **layer == old) else {
            return Ok(());
        };
        if !self.layers.is_held_by(old, 1) {
            return Err(Refusal::new(Code::InUse, format!("layer {old} is in use")));
        }
        *named = new;
        self.vms.change(&vm, record).await
    }

    /// The snapshots of a VM, from old to new.
    pub(crate) fn list(&self, name: &VmName) -> Result<Vec<SnapshotView>, Refusal> {
        let vm = self.vms.get(name)?;
        vm.record().snapshots.iter().map(|snapshot| self.view(&vm, &snapshot.name)).collect()
    }

    fn view(&self, vm: &Vm, snapshot: &SnapshotName) -> Result<SnapshotView, Refusal> {
        let record = vm.record();
        let found = find(&record, snapshot)?;
        // Open unless the disk was set back to an earlier one.
        let bytes = |layer: &LayerId| Ok(self.layers.open_frozen(*layer)?.overlay().allocated_bytes());
        let bytes = found.layers.values().map(bytes).sum::<Result<u64, String>>();
        Ok(SnapshotView {
            vm: record.name.clone(),
            name: found.name.clone(),
            created_unix_ms: found.created_unix_ms,
            quiesced: found.quiesced,
            private_bytes: bytes.map_err(Refusal::internal)?,
        })
    }

    async fn open_frozen(&self, layer: LayerId) -> Result<Arc<Layer>, Refusal> {
        let layers = Arc::clone(&self.layers);
        blocking(move || layers.open_frozen(layer)).await
    }

    /// The layer that a disk was at a snapshot.
    pub(crate) async fn hold(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        disk: &DiskId,
    ) -> Result<HeldLayer, Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let record = self.vms.get(name)?.record();
        let layer = find(&record, snapshot)?.layers.get(disk).copied();
        let layer = layer.ok_or_else(|| {
            Refusal::internal(format!("snapshot '{snapshot}' of '{name}' does not have disk {disk}"))
        })?;
        self.hold_durable(layer).await
    }

    /// A frozen layer, which is durable with all below it.
    pub(crate) async fn hold_durable(&self, layer: LayerId) -> Result<HeldLayer, Refusal> {
        let layers = Arc::clone(&self.layers);
        let layer = blocking(move || layers.hold_frozen(layer)).await?;
        layer.make_durable().await?;
        Ok(layer)
    }
}

/// Has the guest write out and freeze its file systems, if that is wanted.
async fn quiesced(vm: &Vm, quiesce: Quiesce) -> Result<Option<FrozenGuest>, Refusal> {
    if quiesce == Quiesce::No {
        return Ok(None);
    }
    let name = vm.name();
    let guest = vm.running().ok_or_else(|| {
        let message = format!("'{name}' has no running guest that could be quiesced");
        Refusal::new(Code::NotRunning, message).with_hint("leave --quiesce out")
    })?;
    let frozen = guest.freeze(QUIESCE_TIMEOUT).await.map_err(|error| {
        Refusal::new(Code::NotQuiesced, format!("'{name}' cannot be quiesced: {error}"))
            .with_hint("omit --quiesce for a crash-consistent snapshot")
    })?;
    tracing::info!(vm = %name, filesystems = frozen.filesystems(), "guest_quiesced");
    Ok(Some(frozen))
}

fn find<'a>(record: &'a VmRecord, snapshot: &SnapshotName) -> Result<&'a Snapshot, Refusal> {
    record.snapshots.iter().find(|known| known.name == *snapshot).ok_or_else(|| {
        let name = &record.name;
        Refusal::new(Code::NoSuchSnapshot, format!("'{name}' has no snapshot '{snapshot}'"))
            .with_hint(format!("'virtman snapshot list {name}' shows those that there are"))
    })
}
