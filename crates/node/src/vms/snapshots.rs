//! Snapshots of VMs' disks: taken of running guests, gone back to, and given up.
//!
//! A snapshot is a frozen layer with a name. Taking one holds up the guest's changes for as long as it takes to put
//! the VM's new record where the old one was; reads go on. What is not durable then becomes so while the guest goes on,
//! before its next flush is answered and before the snapshot is.
//!
//! Consistency: a snapshot is crash-consistent: it holds all changes that were answered before it was taken. Quiesced,
//! the guest has written out its file systems before. Crash: the VM's record says what is true.
//! Cancellation: the caller runs these to their end. Retries: none.

use std::sync::Arc;
use std::time::Duration;

use block::{SnapshotName, VmName};

use super::{Snapshot, Vm, VmRecord, Vms, differences};
use crate::layers::{Below, DEPTH_MAX, HeldLayer, Layer, LayerId, Layers};
use crate::tasks::blocking;
use control::api::compute::{SnapshotTaken, SnapshotView, Vm as VmView};
use control::api::now_unix_ms;
use control::refusal::{Code, Refusal};
use qemu::FrozenGuest;

/// How long the guest may take to write out its file systems, and to go on afterwards.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(30);

/// A layer that was frozen.
pub(crate) struct FrozenLayer {
    pub(crate) layer: HeldLayer,
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

    /// Takes a snapshot of a VM's disk.
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

    /// Freezes a VM's disk for others to stand on.
    pub(crate) async fn freeze_for_clones(
        &self,
        name: &VmName,
        quiesce: Quiesce,
    ) -> Result<(VmRecord, HeldLayer), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        let frozen = self.freeze(&vm, quiesce, None).await?;
        tracing::info!(vm = %name, pause = ?frozen.pause, "disk_frozen: for clones");
        Ok((vm.record(), frozen.layer))
    }

    /// Freezes the top of a VM's disk and puts a new one above. With a name it is a snapshot. The caller has the VM's
    /// lock.
    pub(crate) async fn freeze(
        &self,
        vm: &Vm,
        quiesce: Quiesce,
        snapshot: Option<&SnapshotName>,
    ) -> Result<FrozenLayer, Refusal> {
        let (record, top) = (vm.record(), vm.top());
        let name = &record.name;
        if self.layers.depth(top.id()) >= DEPTH_MAX {
            return Err(Refusal::new(
                Code::TooManyLayers,
                format!("the disk of '{name}' has {DEPTH_MAX} layers already, and no more are taken"),
            )
            .with_hint(format!("delete some of its snapshots: 'virtman snapshot list {name}'")));
        }
        let mut changed = VmRecord { top: LayerId::draw(), ..record };
        if let Some(snapshot) = snapshot {
            changed.snapshots.push(Snapshot {
                name: snapshot.clone(),
                layer: top.id(),
                created_unix_ms: now_unix_ms(),
                quiesced: quiesce == Quiesce::Yes,
            });
        }
        let layer =
            self.layers.keep(&top).ok_or_else(|| Refusal::internal(format!("layer {} is gone", top.id())))?;
        let pause = self.put_on_top(vm, changed, Below::Layer(top), quiesce).await?;
        Ok(FrozenLayer { layer, pause })
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

    /// Freezes what is on top, writes `record` and lets the top that this names take the changes, a new layer on
    /// `below`. Says how long those waited.
    async fn put_on_top(
        &self,
        vm: &Vm,
        record: VmRecord,
        below: Below,
        quiesce: Quiesce,
    ) -> Result<Duration, Refusal> {
        // Begun before the layer, so that making that durable covers most of it.
        let unsynced = self.vms.start_record(&record).await?;
        let next = self.make_above(record.top, below, record.size_bytes).await?;
        let new =
            blocking(move || unsynced.sync().map_err(|e| format!("cannot write a VM's record: {e}"))).await?;
        let quiet = quiesced(vm, quiesce).await?;
        let (added, removed) = differences(&vm.record(), &record);
        self.layers.add_refs(added.iter().copied());
        let disk = vm.disk.inner();
        let put = async {
            blocking(move || new.put().map_err(|e| format!("cannot replace a VM's record: {e}"))).await?;
            Ok::<_, Refusal>(Arc::clone(next.overlay()))
        };
        let frozen = disk.freeze(put).await;
        let counted = match frozen {
            Ok(_) => {
                vm.set_top(record, Arc::clone(&next));
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
        let pause = frozen?.pause;
        counted?;
        // If this fails, the old top stays counted: the old record may come back and name it.
        disk.settle().await.map_err(|error| {
            let error = Refusal::from(error);
            let message = format!(
                "the disk of '{}' was frozen, and that cannot be made durable: {}",
                vm.name(),
                error.message
            );
            Refusal { message, ..error }
        })?;
        self.vms.release_refs(removed).await?;
        Ok(pause)
    }

    /// Sets a VM's disk back to a snapshot. What was written since is gone, unless another snapshot has it.
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
        let record = vm.record();
        let layer = find(&record, snapshot)?.layer;
        let layer = self.open_frozen(layer).await?;
        // Whoever has the disk open must see that it is another: its connection ends.
        vm.close_export();
        let changed = VmRecord { top: LayerId::draw(), ..record };
        let done = self.put_on_top(&vm, changed, Below::Layer(layer), Quiesce::No).await;
        vm.export_at(&self.vms.disk_socket(name)).map_err(Refusal::internal)?;
        done?;
        tracing::info!(vm = %name, %snapshot, "disk_reverted");
        Ok(self.vms.describe(&vm))
    }

    /// Deletes a snapshot. Deleting one that is not there is an error.
    pub(crate) async fn delete(&self, name: &VmName, snapshot: &SnapshotName) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let vm = self.vms.get_at_rest(name)?;
        let layer = find(&vm.record(), snapshot)?.layer;
        self.forget(&vm, layer).await
    }

    /// Deletes the snapshot that is this layer, unless somebody else did.
    pub(crate) async fn delete_if_there(&self, name: &VmName, layer: LayerId) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        match self.vms.get(name) {
            Ok(vm) if vm.record().snapshots.iter().any(|known| known.layer == layer) => {
                self.forget(&vm, layer).await
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Takes a snapshot out of a VM's record. The caller has the VM's lock.
    async fn forget(&self, vm: &Vm, layer: LayerId) -> Result<(), Refusal> {
        let mut record = vm.record();
        record.snapshots.retain(|known| known.layer != layer);
        self.vms.change(vm, record).await
    }

    /// The VM of which a snapshot is this layer.
    pub(crate) fn vm_of(&self, layer: LayerId) -> Option<VmName> {
        let all = self.vms.all();
        let vm = all.iter().find(|vm| vm.record().snapshots.iter().any(|known| known.layer == layer));
        vm.map(|vm| vm.name().clone())
    }

    /// Lets the snapshot of a VM that is the layer `old` be `new`, which reads the same, unless it was deleted. Refused
    /// if others hold `old`.
    pub(crate) async fn replace_layer(
        &self,
        name: &VmName,
        old: LayerId,
        new: LayerId,
    ) -> Result<(), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let Ok(vm) = self.vms.get(name) else { return Ok(()) };
        let mut record = vm.record();
        let Some(snapshot) = record.snapshots.iter_mut().find(|known| known.layer == old) else {
            return Ok(());
        };
        if !self.layers.is_held_by(old, 1) {
            return Err(Refusal::new(Code::InUse, format!("layer {old} is in use")));
        }
        snapshot.layer = new;
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
        let bytes = self.layers.open_frozen(found.layer).map(|layer| layer.overlay().allocated_bytes());
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

    /// The layer that a snapshot is, and the record of its VM.
    pub(crate) async fn hold(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
    ) -> Result<(VmRecord, HeldLayer), Refusal> {
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let record = self.vms.get(name)?.record();
        let layer = find(&record, snapshot)?.layer;
        Ok((record, self.hold_durable(layer).await?))
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
