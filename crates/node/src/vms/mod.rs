//! VMs: their records, their disks and the exports of those.
//!
//! A VM is a directory. It exists once its `vm.json` is there, which is written last, and is gone once
//! `vm.json` is removed, which is done first; what lies around without one is swept away at the next
//! start. The [layers](crate::layers) of its disks lie elsewhere, since VMs share them. Operations on one VM are
//! serialized by a lock that is picked by its name; others go on.
//!
//! Consistency: a record on disk keeps the layers that it names. They are held or counted before it is written, and no
//! longer after it is durably replaced or gone; so a layer is only ever removed when no record can come back that names it.
//! Crash: layers are durable by themselves; exports are opened again under the same paths and guests
//! that outlived the daemon are adopted, so that their hypervisors reconnect and go on.

pub(crate) mod guests;
pub(crate) mod merge;
mod record;
pub(crate) mod snapshots;
mod vm;

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use block::{DiskId, ImageId, ImageName, NodeName, VmName};

pub(crate) use self::record::{Member, Snapshot, VmRecord, differences};
use self::vm::Guest;
pub(crate) use self::vm::{Vm, watch};
use crate::disks::{Disk, DiskRecord};
use crate::images::Attached;
use crate::images::profile::BootTap;
use crate::layers::{Below, HeldLayer, Layer, LayerId, Layers};
use crate::state::{self, Layout};
use crate::tasks::blocking;
use control::api::compute::{Vm as VmView, VmPaused, VmState};
use control::api::disk::DiskView;
use control::api::volt::ImageKind;
use control::api::{now_unix_ms, unix_ms};
use control::refusal::{Code, Refusal};
use store::durable::{NewFile, UnsyncedFile};

/// Locks that serialize operations on a VM. More than enough that two VMs seldom share one.
const LOCKS: usize = 64;

/// What is remembered of a VM, in its directory.
pub(crate) const RECORD: &str = "vm.json";

/// Most disks of one VM. Each takes a socket here, and a device in its guest.
pub(crate) const DISKS_MAX: usize = 16;

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
        let all = self.all();
        let disks = all.iter().flat_map(|vm| vm.disks());
        disks.filter(|disk| disk.top().chain().1.id == *id).count()
    }

    /// Creates a VM whose disks, at most [`DISKS_MAX`], stand on attached images. Creating it again changes nothing.
    pub(crate) async fn create(
        &self,
        name: &VmName,
        disks: Vec<ImageDisk>,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        for ImageDisk { image, attached, .. } in &disks {
            if attached.kind != ImageKind::Disk {
                let kind = attached.kind;
                let message =
                    format!("'{image}' is an image of kind {kind}, and a VM's disk needs one of kind disk");
                return Err(Refusal::new(Code::WrongKind, message));
            }
        }
        let _one_at_a_time = self.lock(name).lock().await;
        if let Ok(vm) = self.get(name) {
            let disks: Vec<_> = disks.iter().map(|disk| (disk.attached.id, disk.size_bytes)).collect();
            vm.must_be(&disks)?;
            return Ok(self.describe(&vm));
        }
        self.layout.check_socket_name_len(name.as_str())?;
        let new = NewVm {
            name: name.clone(),
            disks: disks.iter().map(ImageDisk::describe).collect::<Result<_, _>>()?,
        };
        let layers = Arc::clone(&self.layers);
        let make = move |tops: &[DiskRecord]| {
            let make_top = |(index, (top, disk)): (usize, (&DiskRecord, ImageDisk))| {
                let below = Below::Image(Arc::clone(&disk.attached));
                if index > 0 {
                    return layers.make(top.top, below, top.size_bytes);
                }
                // Only a new disk on an image shows a first boot.
                let attached = &disk.attached;
                let base = BootTap::new(Arc::clone(&attached.volume), Arc::clone(&attached.profile));
                layers.make_over(top.top, below, top.size_bytes, Arc::new(base))
            };
            tops.iter().zip(disks).enumerate().map(make_top).collect()
        };
        let vm = self.add(new, None, make, asked).await?;
        Ok(self.describe(&vm))
    }

    /// Creates a VM whose disks stand on frozen layers, one for each.
    pub(crate) async fn create_on(
        &self,
        new: NewVm,
        below: Vec<Arc<Layer>>,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.lock(&new.name).lock().await;
        if let Ok(vm) = self.get(&new.name) {
            let disks: Vec<_> = new.disks.iter().map(|disk| (disk.image_id, Some(disk.size_bytes))).collect();
            vm.must_be(&disks)?;
            return Ok(self.describe(&vm));
        }
        self.layout.check_socket_name_len(new.name.as_str())?;
        let layers = Arc::clone(&self.layers);
        let make = move |tops: &[DiskRecord]| {
            let make_top =
                |(top, below): (&DiskRecord, _)| layers.make(top.top, Below::Layer(below), top.size_bytes);
            tops.iter().zip(below).map(make_top).collect()
        };
        let vm = self.add(new, None, make, asked).await?;
        Ok(self.describe(&vm))
    }

    /// Makes a VM. `make` makes the top of each disk, of the name that its record says: that of the only disk is `top`,
    /// if that is given. The caller has the lock of the VM's name and knows that it is free.
    pub(crate) async fn add(
        &self,
        new: NewVm,
        top: Option<LayerId>,
        make: impl FnOnce(&[DiskRecord]) -> Result<Vec<HeldLayer>, String> + Send + 'static,
        asked: Instant,
    ) -> Result<Arc<Vm>, Refusal> {
        let name = new.name.clone();
        let (dir, sockets, layers) = (self.dir(&name), self.layout.disks(), Arc::clone(&self.layers));
        let record = new.record(&self.node, top);
        let made = tokio::task::spawn_blocking(move || add_files(&dir, record, make, &sockets, &layers));
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
        let (record, disk) = (vm.record(), vm.boot_disk());
        let running = vm.running();
        let state = match *vm.guest() {
            Guest::None => VmState::Disk,
            Guest::Running(_) => VmState::Running,
            Guest::Ended => VmState::Stopped,
        };
        VmView {
            name: record.name.clone(),
            node: self.node.clone(),
            image: record.boot_disk().image.clone(),
            image_id: record.boot_disk().image_id,
            size_bytes: record.boot_disk().size_bytes,
            private_bytes: vm.disks().iter().map(|disk| disk.private_bytes()).sum(),
            layers: disk.top().chain().0.len(),
            snapshots: record.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect(),
            disk: disk.uri(),
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

    /// A VM's disks as the API shows them.
    pub(crate) fn describe_disks(&self, vm: &Vm) -> Vec<DiskView> {
        let record = vm.record();
        let view = |(disk, record): (&Arc<Disk>, &DiskRecord)| DiskView {
            id: disk.id,
            node: self.node.clone(),
            vm: vm.name().clone(),
            image: record.image.clone(),
            image_id: record.image_id,
            size_bytes: record.size_bytes,
            private_bytes: disk.private_bytes(),
            layers: disk.top().chain().0.len(),
            nbd: disk.uri(),
        };
        vm.disks().iter().zip(&record.disks).map(view).collect()
    }

    /// The disk of this id as the API shows it.
    pub(crate) fn describe_disk(&self, id: &DiskId) -> Result<DiskView, Refusal> {
        let disks = self.all().into_iter().flat_map(|vm| self.describe_disks(&vm));
        disks.into_iter().find(|disk| disk.id == *id).ok_or_else(|| {
            Refusal::new(Code::NoSuchDisk, format!("there is no disk {id} on node {}", self.node))
                .with_hint("'virtman show VM' prints the id of a VM's disk as its serial number")
        })
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

    /// Opens the disks of a VM that has a record. Blocks.
    pub(crate) fn open(&self, record: VmRecord) -> Result<Arc<Vm>, String> {
        let tops = record.disks.iter().map(|disk| self.layers.open_top(disk.top));
        let tops = tops.collect::<Result<_, _>>()?;
        let dir = self.dir(&record.name);
        Vm::open(record, &dir, tops, &self.layout.disks())
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

    /// Held while something is done with the VM of this name.
    pub(crate) fn lock(&self, name: &VmName) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        &self.locks[(hasher.finish() % LOCKS as u64) as usize]
    }
}

/// A new disk that is as an image.
pub(crate) struct ImageDisk {
    pub(crate) image: ImageName,
    pub(crate) attached: Arc<Attached>,
    /// The image's if absent.
    pub(crate) size_bytes: Option<u64>,
}

impl ImageDisk {
    fn describe(&self) -> Result<NewDisk, Refusal> {
        let ImageDisk { image, attached, size_bytes } = self;
        let image_bytes = attached.root.size_bytes();
        let size_bytes = size_bytes.unwrap_or(image_bytes);
        if size_bytes < image_bytes {
            return Err(Refusal::new(
                Code::DiskTooSmall,
                format!(
                    "a disk of {size_bytes} bytes is smaller than image '{image}' of {image_bytes} bytes; leave --size out or use a larger one"
                ),
            ));
        }
        Ok(NewDisk { image: image.clone(), image_id: attached.id, size_bytes })
    }
}

/// What a VM is made from.
pub(crate) struct NewVm {
    pub(crate) name: VmName,
    /// One at least.
    pub(crate) disks: Vec<NewDisk>,
}

/// What a VM's disk is made from.
pub(crate) struct NewDisk {
    pub(crate) image: ImageName,
    pub(crate) image_id: ImageId,
    pub(crate) size_bytes: u64,
}

impl NewVm {
    /// The same disks for a VM of another name.
    pub(crate) fn like(record: &VmRecord, name: VmName) -> NewVm {
        let disk = |disk: &DiskRecord| NewDisk {
            image: disk.image.clone(),
            image_id: disk.image_id,
            size_bytes: disk.size_bytes,
        };
        NewVm { name, disks: record.disks.iter().map(disk).collect() }
    }

    /// The record of a new VM of this node. If `top` is given, its first disk has it.
    fn record(self, node: &NodeName, mut top: Option<LayerId>) -> VmRecord {
        let NewVm { name, disks } = self;
        let created_unix_ms = now_unix_ms();
        let mut record = |(index, disk): (usize, NewDisk)| {
            let NewDisk { image, image_id, size_bytes } = disk;
            // A VM that is destroyed and created anew has other disks.
            let id = DiskId::derive(&format!("{node}/{name}/{index}/{image_id}/{created_unix_ms}"));
            DiskRecord { id, image, image_id, size_bytes, top: top.take().unwrap_or_else(LayerId::draw) }
        };
        let disks = disks.into_iter().enumerate().map(&mut record).collect();
        VmRecord {
            name,
            created_unix_ms,
            disks,
            snapshots: Vec::new(),
            start: None,
            moved_to: None,
            arrived: false,
        }
    }
}

/// Makes a VM's directory with its record, the tops of its disks, which `make` makes, and their exports. Leaves nothing
/// behind if it fails.
fn add_files(
    dir: &Path,
    record: VmRecord,
    make: impl FnOnce(&[DiskRecord]) -> Result<Vec<HeldLayer>, String>,
    sockets: &Path,
    layers: &Layers,
) -> Result<Arc<Vm>, String> {
    // A directory that is there belongs to a VM that could not be opened: it is not ours to touch.
    fs::create_dir(dir).map_err(|e| format!("{}: {e}; see the node's log", dir.display()))?;
    // Kept until nothing on disk names it, if this fails.
    let mut tops = Vec::new();
    let add = || {
        let file = dir.join(RECORD);
        let failed = |e: std::io::Error| format!("{}: {e}", file.display());
        // Begun before the layers, so that making those durable covers most of it.
        let unsynced = state::start_record(&file, &record).map_err(failed)?;
        tops = make(&record.disks)?;
        let vm = Vm::open(record, dir, tops.iter().map(|top| Arc::clone(top)).collect(), sockets)?;
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
        // Its record may be there, and names the layers.
        layers.add_refs(tops.iter().map(|top| top.id()));
    }
    added
}
