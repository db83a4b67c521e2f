//! VMs: their records, their disks and the exports of those.
//!
//! A VM is a directory. It exists once its `vm.json` is there, which is written last, and is gone once
//! `vm.json` is removed, which is done first; what lies around without one is swept away at the next
//! start. Its disk's [layers](crate::layers) lie elsewhere, since VMs share them. Operations on one VM are
//! serialized by a lock that is picked by its name; others go on.
//!
//! Consistency: a record on disk keeps the layers that it names. They are held or counted before it is written, and no
//! longer after it is durably replaced or gone; so a layer is only ever removed when no record can come back that names it.
//! Crash: layers are durable by themselves; exports are opened again under the same paths and guests
//! that outlived the daemon are adopted, so that their hypervisors reconnect and go on.

pub(crate) mod guests;
pub(crate) mod merge;
mod metered_disk;
pub(crate) mod snapshots;
mod vm;

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use block::{ImageId, ImageName, NodeName, VmName};

use self::vm::Guest;
pub(crate) use self::vm::{Member, Snapshot, Vm, VmRecord, watch};
use crate::images::Attached;
use crate::images::profile::BootTap;
use crate::layers::{Below, HeldLayer, Layer, LayerId, Layers};
use crate::nbd_socket::NbdSocket;
use crate::state::{self, Layout};
use crate::tasks::blocking;
use control::api::compute::{Vm as VmView, VmPaused, VmState};
use control::api::volt::ImageKind;
use control::api::{now_unix_ms, unix_ms};
use control::refusal::{Code, Refusal};
use store::durable::{NewFile, UnsyncedFile};

/// Locks that serialize operations on a VM. More than enough that two VMs seldom share one.
const LOCKS: usize = 64;

/// What is remembered of a VM, in its directory.
pub(crate) const RECORD: &str = "vm.json";

/// All VMs of a node.
pub(crate) struct Vms {
    pub(crate) node: NodeName,
    pub(crate) layout: Layout,
    pub(crate) layers: Arc<Layers>,
    vms: RwLock<BTreeMap<VmName, Arc<Vm>>>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
}

impl Vms {
    /// No VM yet.
    pub(crate) fn new(node: NodeName, layout: Layout, layers: Arc<Layers>) -> Vms {
        let locks = std::array::from_fn(|_| tokio::sync::Mutex::default());
        Vms { node, layout, layers, vms: RwLock::default(), locks }
    }

    /// All VMs, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Vm>> {
        self.vms.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The VM of this name.
    pub(crate) fn get(&self, name: &VmName) -> Result<Arc<Vm>, Refusal> {
        let found = self.vms.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        found.ok_or_else(|| {
            Refusal::new(
                Code::NoSuchVm,
                format!("there is no VM '{name}' on node {}; 'virtman list' shows all", self.node),
            )
        })
    }

    /// The VM of this name, if it may be changed.
    pub(crate) fn get_at_rest(&self, name: &VmName) -> Result<Arc<Vm>, Refusal> {
        let vm = self.get(name)?;
        match vm.moving() {
            None => Ok(vm),
            Some(to) => {
                let message =
                    format!("'{name}' is being moved to node {to}, and cannot be changed meanwhile");
                Err(Refusal::new(Code::Moving, message)
                    .with_hint("try again once the move has finished or failed"))
            }
        }
    }

    /// How many VM disks stand on an image.
    pub(crate) fn count_on(&self, id: &ImageId) -> usize {
        self.all().iter().filter(|vm| vm.top().chain().1.id == *id).count()
    }

    /// Creates a VM's disk on an attached image. Creating it again changes nothing.
    pub(crate) async fn create(
        &self,
        name: &VmName,
        image: &ImageName,
        attached: Arc<Attached>,
        size_bytes: Option<u64>,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        if attached.kind != ImageKind::Disk {
            return Err(Refusal::new(
                Code::WrongKind,
                format!(
                    "'{image}' is an image of kind {}, and a VM's disk needs one of kind disk",
                    attached.kind
                ),
            ));
        }
        let _one_at_a_time = self.lock(name).lock().await;
        let image_bytes = attached.root.size_bytes();
        if let Ok(vm) = self.get(name) {
            vm.must_be(attached.id, size_bytes)?;
            return Ok(self.describe(&vm));
        }
        self.layout.check_socket_name_len(name.as_str())?;
        let size_bytes = size_bytes.unwrap_or(image_bytes);
        if size_bytes < image_bytes {
            return Err(Refusal::new(
                Code::DiskTooSmall,
                format!(
                    "a disk of {size_bytes} bytes is smaller than image '{image}' of {image_bytes} bytes; leave --size out or use a larger one"
                ),
            ));
        }
        let new = NewVm { name: name.clone(), image: image.clone(), image_id: attached.id, size_bytes };
        // Only a new disk on an image shows a first boot.
        let base = BootTap::new(Arc::clone(&attached.volume), Arc::clone(&attached.profile));
        let layers = Arc::clone(&self.layers);
        let below = Below::Image(attached);
        let make = move |id| layers.make_over(id, below, size_bytes, Arc::new(base));
        let vm = self.add(new, LayerId::draw(), make, asked).await?;
        Ok(self.describe(&vm))
    }

    /// Creates a VM's disk on a frozen layer.
    pub(crate) async fn create_on(
        &self,
        new: NewVm,
        below: Arc<Layer>,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.lock(&new.name).lock().await;
        if let Ok(vm) = self.get(&new.name) {
            vm.must_be(new.image_id, Some(new.size_bytes))?;
            return Ok(self.describe(&vm));
        }
        self.layout.check_socket_name_len(new.name.as_str())?;
        let (layers, size_bytes) = (Arc::clone(&self.layers), new.size_bytes);
        let make = move |id| layers.make(id, Below::Layer(below), size_bytes);
        let vm = self.add(new, LayerId::draw(), make, asked).await?;
        Ok(self.describe(&vm))
    }

    /// Makes a VM with the layer `top`, which `make` makes, as the top of its disk. The caller has the lock of its name
    /// and knows that it is free.
    pub(crate) async fn add(
        &self,
        new: NewVm,
        top: LayerId,
        make: impl FnOnce(LayerId) -> Result<HeldLayer, String> + Send + 'static,
        asked: Instant,
    ) -> Result<Arc<Vm>, Refusal> {
        let name = new.name.clone();
        let (dir, socket) = (self.dir(&name), self.disk_socket(&name));
        let (record, layers) = (new.record(&self.node, top), Arc::clone(&self.layers));
        let made =
            tokio::task::spawn_blocking(move || add_files(&dir, record, || make(top), &socket, &layers));
        let vm = made
            .await
            .map_err(|e| Refusal::internal(format!("creating '{name}' was interrupted: {e}")))?
            .map_err(|reason| Refusal::internal(format!("cannot create the disk of '{name}': {reason}")))?;
        vm.note_made(asked.elapsed());
        self.insert(Arc::clone(&vm));
        Ok(vm)
    }

    /// Removes what is on disk of a VM, and lets go of its layers.
    pub(crate) async fn remove_files(&self, record: VmRecord) -> Result<(), Refusal> {
        let (name, dir) = (record.name.clone(), self.dir(&record.name));
        let layers = Arc::clone(&self.layers);
        let removed = tokio::task::spawn_blocking(move || {
            fs::remove_file(dir.join(RECORD))?;
            state::sync_dir(&dir)?;
            layers.release_refs(record.layers());
            fs::remove_dir_all(&dir)
        });
        let removed = removed.await.map_err(|e| Refusal::internal(format!("destroying '{name}': {e}")))?;
        removed.map_err(|e| Refusal::internal(format!("cannot remove the files of '{name}': {e}")))
    }

    /// A VM as the API shows it.
    pub(crate) fn describe(&self, vm: &Vm) -> VmView {
        let record = vm.record();
        let (layers, _) = vm.top().chain();
        let running = vm.running();
        let state = match *vm.guest() {
            Guest::None => VmState::Disk,
            Guest::Running(_) => VmState::Running,
            Guest::Ended => VmState::Stopped,
        };
        VmView {
            name: record.name.clone(),
            node: self.node.clone(),
            image: record.image,
            image_id: record.image_id,
            size_bytes: record.size_bytes,
            private_bytes: layers.iter().map(|layer| layer.overlay().allocated_bytes()).sum(),
            layers: layers.len(),
            snapshots: record.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect(),
            disk: NbdSocket::uri(&self.disk_socket(&record.name), record.name.as_str()),
            state,
            paused: running.as_ref().and_then(|guest| guest.standstill()).map(|standstill| VmPaused {
                since_unix_ms: unix_ms(standstill.since),
                reason: standstill.cause.to_string(),
            }),
            pid: running.as_ref().map(|guest| guest.pid()),
            console: running.as_ref().map(|guest| guest.console_socket()),
            disk_ms: vm.disk_ms(),
            created_unix_ms: record.created_unix_ms,
        }
    }

    /// Whether a new VM can have this name here.
    pub(crate) fn must_be_free(&self, name: &VmName) -> Result<(), Refusal> {
        self.layout.check_socket_name_len(name.as_str())?;
        // One that is coming from another node or could not be opened has a directory too.
        if !self.dir(name).exists() {
            return Ok(());
        }
        let message = format!("there is a VM '{name}' on node {} already", self.node);
        Err(Refusal::new(Code::VmExists, message).with_hint("choose another name or destroy it first"))
    }

    /// Whether there is a VM of this name, open or not.
    pub(crate) fn has_files(&self, name: &VmName) -> bool {
        !state::is_absent(&self.dir(name).join(RECORD))
    }

    /// Changes what is remembered of a VM: on disk first. The caller has the VM's lock.
    pub(crate) async fn change(&self, vm: &Vm, record: VmRecord) -> Result<(), Refusal> {
        let (added, removed) = differences(&vm.record(), &record);
        // If this fails all of them stay counted for as long as this daemon runs, since either record may be named.
        self.layers.add_refs(added);
        self.save(&record).await?;
        vm.set_record(record);
        self.release_refs(removed).await
    }

    /// Counts layers no longer that a durably replaced record named.
    pub(crate) async fn release_refs(&self, removed: Vec<LayerId>) -> Result<(), Refusal> {
        if removed.is_empty() {
            return Ok(());
        }
        let layers = Arc::clone(&self.layers);
        blocking(move || {
            layers.release_refs(removed);
            Ok(())
        })
        .await
    }

    /// Writes what is to be remembered of a VM.
    pub(crate) async fn save(&self, record: &VmRecord) -> Result<(), Refusal> {
        let (file, record) = (self.dir(&record.name).join(RECORD), record.clone());
        blocking(move || {
            state::write_record(&file, &record).map_err(|e| format!("cannot write {}: {e}", file.display()))
        })
        .await
    }

    /// Begins to write what is to be remembered of a VM once it is put in its place.
    pub(crate) async fn start_record(&self, record: &VmRecord) -> Result<UnsyncedFile, Refusal> {
        let (file, record) = (self.dir(&record.name).join(RECORD), record.clone());
        blocking(move || {
            state::start_record(&file, &record).map_err(|e| format!("cannot write {}: {e}", file.display()))
        })
        .await
    }

    /// Knows a VM from now on.
    pub(crate) fn insert(&self, vm: Arc<Vm>) {
        let name = vm.name().clone();
        self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(name, vm);
    }

    /// Knows a VM no longer. Its files stay.
    pub(crate) fn remove(&self, name: &VmName) {
        self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// The directory of a VM.
    pub(crate) fn dir(&self, name: &VmName) -> PathBuf {
        self.layout.vms().join(name.as_str())
    }

    /// Where a VM's disk is open over NBD.
    pub(crate) fn disk_socket(&self, name: &VmName) -> PathBuf {
        self.layout.disks().join(format!("{name}.sock"))
    }

    /// Held while something is done with the VM of this name.
    pub(crate) fn lock(&self, name: &VmName) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        &self.locks[(hasher.finish() % LOCKS as u64) as usize]
    }
}

/// The layers that only the record `after` names, and those that only `before` does.
pub(crate) fn differences(before: &VmRecord, after: &VmRecord) -> (Vec<LayerId>, Vec<LayerId>) {
    let only = |one: &VmRecord, other: &VmRecord| {
        let mut others: Vec<LayerId> = other.layers().collect();
        let is_new = |id: &LayerId| match others.iter().position(|known| known == id) {
            Some(at) => {
                others.swap_remove(at);
                false
            }
            None => true,
        };
        one.layers().filter(is_new).collect()
    };
    (only(after, before), only(before, after))
}

/// What a VM is made from.
pub(crate) struct NewVm {
    pub(crate) name: VmName,
    pub(crate) image: ImageName,
    pub(crate) image_id: ImageId,
    pub(crate) size_bytes: u64,
}

impl NewVm {
    /// The record of a VM of this node whose disk has this top.
    pub(crate) fn record(self, node: &NodeName, top: LayerId) -> VmRecord {
        let NewVm { name, image, image_id, size_bytes } = self;
        let created_unix_ms = now_unix_ms();
        // A VM that is destroyed and created anew has another disk.
        let identity = format!("{node}/{name}/{image_id}/{created_unix_ms}");
        let serial = blake3::hash(identity.as_bytes()).to_hex()[..32].to_owned();
        VmRecord {
            name,
            image,
            image_id,
            size_bytes,
            created_unix_ms,
            serial,
            top,
            snapshots: Vec::new(),
            start: None,
            moved_to: None,
            arrived: false,
        }
    }
}

/// Makes a VM's directory with its record, the top of its disk, which `make` makes, and its export. Leaves nothing
/// behind if it fails.
fn add_files(
    dir: &Path,
    record: VmRecord,
    make: impl FnOnce() -> Result<HeldLayer, String>,
    socket: &Path,
    layers: &Layers,
) -> Result<Arc<Vm>, String> {
    // A directory that is there belongs to a VM that could not be opened: it is not ours to touch.
    fs::create_dir(dir).map_err(|e| format!("{}: {e}; see the node's log", dir.display()))?;
    // Kept until nothing on disk names it, if this fails.
    let mut top = None;
    let add = || {
        let file = dir.join(RECORD);
        let failed = |e: std::io::Error| format!("{}: {e}", file.display());
        // Begun before the layer, so that making that durable covers most of it.
        let unsynced = state::start_record(&file, &record).map_err(failed)?;
        let vm = Vm::open(record, dir, Arc::clone(top.insert(make()?)), socket)?;
        unsynced.sync().and_then(NewFile::put_durably).map_err(failed)?;
        let parent = dir.parent().unwrap_or(dir);
        state::sync_dir(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
        layers.add_refs(vm.record().layers());
        Ok(vm)
    };
    let added = add();
    if added.is_err()
        && let Err(error) = fs::remove_dir_all(dir)
    {
        tracing::warn!(dir = %dir.display(), %error, "leftovers_kept: an unfinished VM cannot be removed");
        // Its record may be there, and names the layer.
        layers.add_refs(top.map(|top| top.id()));
    }
    added
}
