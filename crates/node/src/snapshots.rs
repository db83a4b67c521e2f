//! Snapshots of VMs' disks: taken of running guests, gone back to, and given up.
//!
//! A snapshot is a frozen layer with a name. Taking one holds up the guest's changes for as long as it takes to put
//! the VM's new record where the old one was; reads go on. What is not durable then becomes so while the guest goes on,
//! before its next flush is answered and before the snapshot is.
//!
//! Consistency: a snapshot holds all changes that were answered before it was taken, as after a power cut at that
//! moment; quiesced, the guest has written out its file systems before. Crash: the VM's record says what is true.
//! Cancellation: the caller runs these to their end. Retries: none.

use std::sync::Arc;
use std::time::Duration;

use block::{SnapshotName, VmName};

use super::entry::{Entry, Record, Snapshot};
use super::layers::{Below, DEPTH_MAX, Layer, LayerId};
use super::vms::{Vms, blocking};
use control::api::compute::{SnapshotTaken, SnapshotView, Vm};
use control::api::now_unix_ms;
use control::http::ApiError;
use qemu::FrozenGuest;
use store::durable::NewFile;

/// How long the guest may take to write out its file systems, and to go on afterwards.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(30);

/// A layer that was frozen, and is held by whoever asked for it.
pub(super) struct FrozenLayer {
    pub(super) layer: Arc<Layer>,
    /// How long the guest's changes waited.
    pub(super) pause: Duration,
}

/// Whether the guest writes out its file systems before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quiesce {
    /// It does.
    Yes,
    /// It does not.
    No,
}

impl Vms {
    /// Takes a snapshot of a VM's disk.
    pub(crate) async fn snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        quiesce: Quiesce,
    ) -> Result<SnapshotTaken, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        if entry.record().snapshots.iter().any(|known| known.name == *snapshot) {
            return Err(ApiError::conflict(
                "snapshot_exists",
                format!("'{name}' has a snapshot '{snapshot}' already"),
            )
            .with_hint(format!(
                "choose another name, or 'virtman snapshot delete {name} {snapshot}' first; 'virtman snapshot export' writes it to a file"
            )));
        }
        let frozen = self.freeze(&entry, quiesce, Some(snapshot)).await?;
        let view = self.view(&entry, snapshot)?;
        tracing::info!(vm = %name, %snapshot, pause = ?frozen.pause, "snapshot taken");
        Ok(SnapshotTaken {
            snapshot: view,
            pause_us: u64::try_from(frozen.pause.as_micros()).unwrap_or(u64::MAX),
        })
    }

    /// Freezes a VM's disk for others to stand on. The caller holds the layer.
    pub(super) async fn freeze_for_clones(
        &self,
        name: &VmName,
        quiesce: Quiesce,
    ) -> Result<(Record, Arc<Layer>), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        let frozen = self.freeze(&entry, quiesce, None).await?;
        tracing::info!(vm = %name, pause = ?frozen.pause, "disk frozen for clones");
        Ok((entry.record(), frozen.layer))
    }

    /// Freezes the top of a VM's disk and puts a new one above. The frozen layer is held by the snapshot if it gets a
    /// name, else by the caller. The caller has the VM's lock.
    pub(super) async fn freeze(
        &self,
        entry: &Entry,
        quiesce: Quiesce,
        snapshot: Option<&SnapshotName>,
    ) -> Result<FrozenLayer, ApiError> {
        let (record, top) = (entry.record(), entry.top());
        let name = &record.name;
        if self.layers.depth(top.id()) >= DEPTH_MAX {
            return Err(ApiError::conflict(
                "too_many_layers",
                format!("the disk of '{name}' has {DEPTH_MAX} layers already, and no more are taken"),
            )
            .with_hint(format!("delete some of its snapshots: 'virtman snapshot list {name}'")));
        }
        let mut changed = Record { top: LayerId::draw(), ..record };
        if let Some(snapshot) = snapshot {
            changed.snapshots.push(Snapshot {
                name: snapshot.clone(),
                layer: top.id(),
                created_unix_ms: now_unix_ms(),
                quiesced: quiesce == Quiesce::Yes,
            });
        }
        let pause = self.put_on_top(entry, changed, Below::Layer(Arc::clone(&top)), quiesce).await?;
        Ok(FrozenLayer { layer: top, pause })
    }

    /// Makes an empty layer of this new name, which the caller holds.
    pub(super) async fn make_above(
        &self,
        id: LayerId,
        below: Below,
        size_bytes: u64,
    ) -> Result<Arc<Layer>, ApiError> {
        let layers = Arc::clone(&self.layers);
        blocking(move || layers.make(id, below, size_bytes)).await
    }

    /// Freezes what is on top, writes `record` and lets the top that this names take the changes, a new layer on
    /// `below`. Says how long those waited. The hold on the old top goes over to the caller.
    async fn put_on_top(
        &self,
        entry: &Entry,
        record: Record,
        below: Below,
        quiesce: Quiesce,
    ) -> Result<Duration, ApiError> {
        // Begun before the layer, so that making that durable covers most of it.
        let unsynced = self.start_record(&record).await?;
        let next = self.make_above(record.top, below, record.size_bytes).await?;
        let prepared = async {
            let new =
                blocking(move || unsynced.sync().map_err(|e| format!("cannot write a VM's record: {e}")));
            Ok((new.await?, quiesced(entry, quiesce).await?))
        };
        let (new, quiet) = match prepared.await {
            Ok(prepared) => prepared,
            Err(error) => {
                self.layers.release(next.id());
                return Err(error);
            }
        };
        let disk = entry.disk.inner();
        let put = async {
            blocking(move || new.put().map_err(|e| format!("cannot replace a VM's record: {e}"))).await?;
            Ok::<_, ApiError>(Arc::clone(next.overlay()))
        };
        let frozen = disk.freeze(put).await;
        match frozen {
            Ok(_) => entry.become_known(record, next),
            Err(_) => self.layers.release(next.id()),
        }
        if let Some(quiet) = quiet
            && let Err(error) = quiet.thaw(QUIESCE_TIMEOUT).await
        {
            tracing::error!(vm = %entry.name(), %error, "guest_not_thawed: it was quiesced; it is tried again and again");
        }
        let pause = frozen?.pause;
        // If this fails, the hold on the old top is left to nobody: the old record may come back and name it.
        disk.settle().await.map_err(|error| {
            let error = ApiError::from(error);
            let message = format!(
                "the disk of '{}' was frozen, and that cannot be made durable: {}",
                entry.name(),
                error.message
            );
            ApiError { message, ..error }
        })?;
        Ok(pause)
    }

    /// Sets a VM's disk back to a snapshot. What was written since is gone, unless another snapshot has it.
    pub(crate) async fn revert(&self, name: &VmName, snapshot: &SnapshotName) -> Result<Vm, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        if entry.running().is_some() {
            return Err(ApiError::conflict(
                "running",
                format!("the guest of '{name}' runs, and its disk cannot change under it"),
            )
            .with_hint(format!("stop it first: 'virtman stop {name}'")));
        }
        let (record, old) = (entry.record(), entry.top());
        let layer = find(&record, snapshot)?.layer;
        let layer = self.open_frozen(layer).await?;
        // Whoever has the disk open must see that it is another: its connection ends.
        entry.close_export();
        let changed = Record { top: LayerId::draw(), ..record };
        let done = self.put_on_top(&entry, changed, Below::Layer(layer), Quiesce::No).await;
        entry.export_at(&self.disk_socket(name)).map_err(ApiError::internal)?;
        done?;
        self.release(old).await;
        tracing::info!(vm = %name, %snapshot, "disk set back to a snapshot");
        Ok(self.describe(&entry))
    }

    /// Gives a snapshot up. Giving up one that is not there is an error.
    pub(crate) async fn delete_snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
    ) -> Result<(), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        let layer = find(&entry.record(), snapshot)?.layer;
        self.forget_snapshot(&entry, layer).await
    }

    /// Gives up the snapshot that is this layer, unless somebody else did.
    pub(super) async fn give_up_snapshot(&self, name: &VmName, layer: LayerId) -> Result<(), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        match self.get(name) {
            Ok(entry) if entry.record().snapshots.iter().any(|known| known.layer == layer) => {
                self.forget_snapshot(&entry, layer).await
            }
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Takes a snapshot out of a VM's record, and gives its layer up. The caller has the VM's lock.
    async fn forget_snapshot(&self, entry: &Entry, layer: LayerId) -> Result<(), ApiError> {
        let mut record = entry.record();
        record.snapshots.retain(|known| known.layer != layer);
        self.save(&record).await?;
        entry.become_known(record, entry.top());
        self.give_up_hold(layer).await
    }

    /// The VM of which a snapshot is this layer.
    pub(super) fn snapshot_that_is(&self, layer: LayerId) -> Option<VmName> {
        let all = self.all();
        let vm = all.iter().find(|vm| vm.record().snapshots.iter().any(|known| known.layer == layer));
        vm.map(|vm| vm.name().clone())
    }

    /// Lets the snapshot of a VM that is the layer `old` be `new`, which reads the same, unless it was given up. Refused
    /// if others hold `old`.
    pub(super) async fn name_instead(
        &self,
        name: &VmName,
        old: LayerId,
        new: LayerId,
    ) -> Result<(), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let Ok(entry) = self.get(name) else { return Ok(()) };
        let mut record = entry.record();
        let Some(snapshot) = record.snapshots.iter_mut().find(|known| known.layer == old) else {
            return Ok(());
        };
        if !self.layers.is_held_by(old, 1) {
            return Err(ApiError::conflict("in_use", format!("layer {old} is in use")));
        }
        snapshot.layer = new;
        let unsynced = self.start_record(&record).await?;
        self.layers.hold(new);
        let put = blocking(move || {
            unsynced
                .sync()
                .and_then(NewFile::put_durably)
                .map_err(|e| format!("cannot replace a VM's record: {e}"))
        });
        // If this fails, both layers are held for as long as this daemon runs, since either may be named.
        put.await?;
        entry.become_known(record, entry.top());
        self.give_up_hold(old).await
    }

    /// The snapshots of a VM, from old to new.
    pub(crate) fn snapshots(&self, name: &VmName) -> Result<Vec<SnapshotView>, ApiError> {
        let entry = self.get(name)?;
        entry.record().snapshots.iter().map(|snapshot| self.view(&entry, &snapshot.name)).collect()
    }

    fn view(&self, entry: &Entry, snapshot: &SnapshotName) -> Result<SnapshotView, ApiError> {
        let record = entry.record();
        let found = find(&record, snapshot)?;
        // Open unless the disk was set back to an earlier one.
        let bytes = self.layers.open_frozen(found.layer).map(|layer| layer.overlay().allocated_bytes());
        Ok(SnapshotView {
            vm: record.name.clone(),
            name: found.name.clone(),
            created_unix_ms: found.created_unix_ms,
            quiesced: found.quiesced,
            private_bytes: bytes.map_err(ApiError::internal)?,
        })
    }

    async fn open_frozen(&self, layer: LayerId) -> Result<Arc<Layer>, ApiError> {
        let layers = Arc::clone(&self.layers);
        blocking(move || layers.open_frozen(layer)).await
    }

    /// The layer that a snapshot is, which the caller holds, and the record of its VM.
    pub(super) async fn hold_snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
    ) -> Result<(Record, Arc<Layer>), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let record = self.get(name)?.record();
        let layer = find(&record, snapshot)?.layer;
        Ok((record, self.hold_frozen(Ok(layer)).await?))
    }

    /// A frozen layer, which the caller holds.
    pub(super) async fn hold_frozen(&self, layer: Result<LayerId, String>) -> Result<Arc<Layer>, ApiError> {
        let id = layer.map_err(ApiError::internal)?;
        if !self.layers.hold(id) {
            return Err(ApiError::internal(format!("layer {id} is not there")));
        }
        let opened = async {
            let layer = self.open_frozen(id).await?;
            layer.make_durable().await?;
            Ok(layer)
        };
        let opened = opened.await;
        if opened.is_err() {
            self.layers.release(id);
        }
        opened
    }

    /// Gives up one hold on a layer.
    async fn give_up_hold(&self, layer: LayerId) -> Result<(), ApiError> {
        let layers = Arc::clone(&self.layers);
        blocking(move || {
            layers.release(layer);
            Ok(())
        })
        .await
    }

    /// Gives up a layer that the caller holds.
    pub(super) async fn release(&self, layer: Arc<Layer>) {
        let id = layer.id();
        drop(layer);
        self.release_all([id]).await;
    }

    /// Gives up layers that the caller holds, one after the other.
    pub(super) async fn release_all(&self, layers: impl IntoIterator<Item = LayerId>) {
        for id in layers {
            if let Err(error) = self.give_up_hold(id).await {
                tracing::warn!(%error, "a layer was not given up");
            }
        }
    }
}

/// Has the guest write out and freeze its file systems, if that is wanted.
async fn quiesced(entry: &Entry, quiesce: Quiesce) -> Result<Option<FrozenGuest>, ApiError> {
    if quiesce == Quiesce::No {
        return Ok(None);
    }
    let name = entry.name();
    let guest = entry.running().ok_or_else(|| {
        let message = format!("'{name}' has no running guest that could be quiesced");
        ApiError::conflict("not_running", message).with_hint("leave --quiesce out")
    })?;
    let frozen = guest.freeze(QUIESCE_TIMEOUT).await.map_err(|error| {
        ApiError::conflict("not_quiesced", format!("'{name}' cannot be quiesced: {error}"))
            .with_hint("leave --quiesce out for what a power cut would leave")
    })?;
    tracing::info!(vm = %name, filesystems = frozen.filesystems(), "guest quiesced");
    Ok(Some(frozen))
}

fn find<'a>(record: &'a Record, snapshot: &SnapshotName) -> Result<&'a Snapshot, ApiError> {
    record.snapshots.iter().find(|known| known.name == *snapshot).ok_or_else(|| {
        let name = &record.name;
        ApiError::not_found("no_such_snapshot", format!("'{name}' has no snapshot '{snapshot}'"))
            .with_hint(format!("'virtman snapshot list {name}' shows those that there are"))
    })
}
