//! VMs: their disks, exports and guests.
//!
//! A VM is a directory. It exists once its `vm.json` is there, which is written last, and is gone once
//! `vm.json` is removed, which is done first; what lies around without one is swept away at the next
//! start. Its disk's [layers](super::layers) lie elsewhere, since VMs share them. Operations on one VM are
//! serialized by a lock that is picked by its name; others go on.
//!
//! Crash: layers are durable by themselves; exports are opened again under the same paths and guests
//! that outlived the daemon are adopted, so that their hypervisors reconnect and go on.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use block::{Disk, ImageId, ImageName, NodeName, VmName};

use super::entry::{Entry, Guest, Member, Record, watch};
use super::exports::ExportSocket;
use super::files::{self, Layout};
use super::images::Attached;
use super::iscsi::Exported;
use super::layers::{Below, Layer, LayerId, Layers};
use super::migrate::{self, IncomingRecord, Phase};
use super::profile::BootTap;
use control::api::compute::{StartVm, Vm, VmPaused, VmReady, VmStarted, VmState};
use control::api::{now_unix_ms, unix_ms};
use control::http::ApiError;
use futures_util::future::join_all;
use qemu::seed::SeedError;
use qemu::{Accel, AccelChoice, DirectBoot, Platform, Qemu, Ready, VmDisk, VmError, VmSpec, seed};
use store::durable::{NewFile, UnsyncedFile};

/// Locks that serialize operations on a VM. More than enough that two VMs seldom share one.
const LOCKS: usize = 64;

const RECORD: &str = "vm.json";

/// All VMs of a node.
pub(crate) struct Vms {
    pub(super) node: NodeName,
    pub(super) layout: Layout,
    pub(super) layers: Arc<Layers>,
    vms: RwLock<BTreeMap<VmName, Arc<Entry>>>,
    /// Those that belong to other nodes, which may not know it yet.
    moved: Mutex<BTreeMap<VmName, Record>>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
}

impl Vms {
    pub(crate) fn new(node: NodeName, layout: Layout, layers: Arc<Layers>) -> Vms {
        Vms {
            node,
            layout,
            layers,
            vms: RwLock::default(),
            moved: Mutex::default(),
            locks: std::array::from_fn(|_| tokio::sync::Mutex::default()),
        }
    }

    /// Opens the disks that were there when the daemon ended, and finds the guests that still run. What
    /// cannot be opened is said and left as it is.
    pub(crate) async fn restore(&self) -> std::io::Result<Restored> {
        let mut restored = Restored { complete: true, incoming: Vec::new() };
        let mut records = Vec::new();
        for dir in files::sweep(&self.layout.vms())? {
            if files::is_absent(&dir.join(RECORD)) {
                if files::is_absent(&dir.join(migrate::RECORD)) {
                    tracing::info!(dir = %dir.display(), "removing what an unfinished create or destroy left");
                    fs::remove_dir_all(&dir)?;
                    continue;
                }
                match files::read_record::<IncomingRecord>(&dir.join(migrate::RECORD)) {
                    Ok(coming) if coming.phase == Phase::Ready => {
                        for layer in coming.record.holds() {
                            self.layers.hold(layer);
                        }
                        restored.incoming.push(coming);
                    }
                    Ok(_) => {
                        tracing::info!(dir = %dir.display(), "removing what an unfinished move left");
                        migrate::end_guest(&dir).await;
                        fs::remove_dir_all(&dir)?;
                    }
                    Err(reason) => {
                        restored.complete = false;
                        tracing::error!(dir = %dir.display(), reason, "a VM that was coming cannot be opened; its files are left as they are");
                    }
                }
                continue;
            }
            match files::read_record::<Record>(&dir.join(RECORD)) {
                Ok(record) => {
                    for layer in record.holds() {
                        self.layers.hold(layer);
                    }
                    records.push(record);
                }
                Err(reason) => {
                    restored.complete = false;
                    tracing::error!(dir = %dir.display(), reason, "a VM cannot be opened; its files are left as they are");
                }
            }
        }
        let mut opened = Vec::new();
        for record in records {
            let name = record.name.clone();
            if record.moved_to.is_some() {
                migrate::end_guest(&self.dir(&name)).await;
                self.moved().insert(name, record);
                continue;
            }
            match self.open(record) {
                Ok(entry) => {
                    self.insert(Arc::clone(&entry));
                    opened.push(entry);
                }
                Err(reason) => {
                    tracing::error!(vm = %name, reason, "a VM's disk cannot be opened; its files are left as they are");
                }
            }
        }
        // Once all disks are there, since a guest that QEMU keeps takes some seconds; and all at once.
        join_all(opened.iter().map(|entry| self.let_arrived_go_on(entry))).await;
        Ok(restored)
    }

    /// Opens the disk of a VM that is coming from another node, and finds its guest.
    pub(super) fn open_incoming(&self, record: Record) -> Result<(Arc<Entry>, Option<Qemu>), String> {
        let (dir, socket) = (self.dir(&record.name), self.disk_socket(&record.name));
        let top = self.layers.open_top(record.top)?;
        Ok((Entry::open(record, &dir, top, &socket)?, Qemu::adopt(&dir)))
    }

    /// Lets a guest that came from another node go on, if it was not told to.
    pub(super) async fn let_arrived_go_on(&self, entry: &Entry) {
        let record = entry.record();
        let Some(guest) = entry.running().filter(|_| record.arrived) else { return };
        if let Err(error) = guest.resume().await {
            tracing::error!(vm = %record.name, %error, "guest_not_resumed: it arrived and stands still; it is tried again and again");
            return;
        }
        let record = Record { arrived: false, ..record };
        match self.save(&record).await {
            Ok(()) => entry.become_known(record, entry.top()),
            // It is told to go on once more at the next start, which does no harm.
            Err(error) => {
                tracing::warn!(vm = %record.name, %error, "that a guest goes on cannot be remembered");
            }
        }
    }

    /// VMs that belong to other nodes, which may not know it yet.
    pub(super) fn moved(&self) -> MutexGuard<'_, BTreeMap<VmName, Record>> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes down that a VM belongs to another node, and ends what is here of its guest. If that fails it belongs to
    /// this node as before.
    pub(super) async fn give_up(&self, entry: &Entry, to: &Member) -> Result<(), ApiError> {
        let name = entry.name();
        let _one_at_a_time = self.lock(name).lock().await;
        let before = entry.record();
        let record = Record { moved_to: Some(to.clone()), ..before.clone() };
        if let Err(error) = self.save(&record).await {
            // It may be there all the same.
            self.save(&before).await?;
            return Err(error);
        }
        self.moved().insert(name.clone(), record);
        self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        entry.close_export();
        if let Some(guest) = entry.running()
            && let Err(error) = guest.kill().await
        {
            tracing::error!(vm = %name, %error, "a guest that was moved cannot be ended here; it stands still");
        }
        Ok(())
    }

    /// Removes what is here of a VM that another node has taken.
    pub(super) async fn forget_moved(&self, name: &VmName) {
        let Some(record) = self.moved().remove(name) else { return };
        if let Err(error) = self.remove_files(record).await {
            tracing::warn!(vm = %name, %error, "what is left of a VM that was moved cannot be removed");
        }
    }

    /// All VMs, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.vms.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// The VM of this name.
    pub(crate) fn get(&self, name: &VmName) -> Result<Arc<Entry>, ApiError> {
        let found = self.vms.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        found.ok_or_else(|| {
            ApiError::not_found(
                "no_such_vm",
                format!("there is no VM '{name}' on node {}; 'virtman list' shows all", self.node),
            )
        })
    }

    /// The VM of this name, if it may be changed.
    pub(super) fn get_at_rest(&self, name: &VmName) -> Result<Arc<Entry>, ApiError> {
        let entry = self.get(name)?;
        match entry.moving() {
            None => Ok(entry),
            Some(to) => {
                let message =
                    format!("'{name}' is being moved to node {to}, and cannot be changed meanwhile");
                Err(ApiError::conflict("moving", message)
                    .with_hint("try again when it is there, or not moved"))
            }
        }
    }

    /// How many VM disks stand on an image.
    pub(crate) fn count_on(&self, id: &ImageId) -> usize {
        self.all().iter().filter(|entry| entry.top().chain().1.id == *id).count()
    }

    /// Creates a VM's disk on an attached image. Creating it again changes nothing.
    pub(crate) async fn create(
        &self,
        name: &VmName,
        image: &ImageName,
        attached: Arc<Attached>,
        size_bytes: Option<u64>,
        asked: Instant,
    ) -> Result<Vm, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let image_bytes = attached.root.size_bytes();
        if let Ok(entry) = self.get(name) {
            entry.must_be(attached.id, size_bytes)?;
            return Ok(self.describe(&entry));
        }
        self.layout.must_have_room_for(name.as_str())?;
        let size_bytes = size_bytes.unwrap_or(image_bytes);
        if size_bytes < image_bytes {
            return Err(ApiError::bad_request(
                "disk_too_small",
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
        let entry = self.add(new, LayerId::draw(), make, asked).await?;
        Ok(self.describe(&entry))
    }

    /// Creates a VM's disk on a frozen layer.
    pub(super) async fn create_on(
        &self,
        new: NewVm,
        below: Arc<Layer>,
        asked: Instant,
    ) -> Result<Vm, ApiError> {
        let _one_at_a_time = self.lock(&new.name).lock().await;
        if let Ok(entry) = self.get(&new.name) {
            entry.must_be(new.image_id, Some(new.size_bytes))?;
            return Ok(self.describe(&entry));
        }
        self.layout.must_have_room_for(new.name.as_str())?;
        let (layers, size_bytes) = (Arc::clone(&self.layers), new.size_bytes);
        let make = move |id| layers.make(id, Below::Layer(below), size_bytes);
        let entry = self.add(new, LayerId::draw(), make, asked).await?;
        Ok(self.describe(&entry))
    }

    /// Makes a VM with the layer `top`, which `make` makes, as the top of its disk. The caller has the lock of its name
    /// and knows that it is free.
    pub(super) async fn add(
        &self,
        new: NewVm,
        top: LayerId,
        make: impl FnOnce(LayerId) -> Result<Arc<Layer>, String> + Send + 'static,
        asked: Instant,
    ) -> Result<Arc<Entry>, ApiError> {
        let name = new.name.clone();
        let (dir, socket) = (self.dir(&name), self.disk_socket(&name));
        let (record, layers) = (new.record(&self.node, top), Arc::clone(&self.layers));
        let made = tokio::task::spawn_blocking(move || {
            let added = add_files(&dir, record, || make(top), &socket);
            if added.is_err() {
                layers.release(top);
            }
            added
        });
        let entry = made
            .await
            .map_err(|e| ApiError::internal(format!("creating '{name}' was interrupted: {e}")))?
            .map_err(|reason| ApiError::internal(format!("cannot create the disk of '{name}': {reason}")))?;
        entry.note_made(asked.elapsed());
        self.insert(Arc::clone(&entry));
        Ok(entry)
    }

    /// Removes a VM with its disk. A running guest is ended.
    pub(crate) async fn destroy(&self, name: &VmName) -> Result<(), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        if let Some(guest) = entry.running() {
            guest
                .kill()
                .await
                .map_err(|e| ApiError::internal(format!("cannot end the guest of '{name}': {e}")))?;
        }
        let removed = self.remove_files(entry.record()).await;
        // As long as its record is there, the VM is.
        if !self.has_files(name) {
            self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        }
        removed
    }

    async fn remove_files(&self, record: Record) -> Result<(), ApiError> {
        let (name, dir) = (record.name.clone(), self.dir(&record.name));
        let layers = Arc::clone(&self.layers);
        let removed = tokio::task::spawn_blocking(move || {
            fs::remove_file(dir.join(RECORD))?;
            files::sync_dir(&dir)?;
            for layer in record.holds() {
                layers.release(layer);
            }
            fs::remove_dir_all(&dir)
        });
        let removed = removed.await.map_err(|e| ApiError::internal(format!("destroying '{name}': {e}")))?;
        removed.map_err(|e| ApiError::internal(format!("cannot remove the files of '{name}': {e}")))
    }

    /// Starts a guest on a VM's disk. If one runs, that is it.
    pub(crate) async fn start(
        &self,
        name: &VmName,
        request: &StartVm,
        accel: &AccelChoice,
    ) -> Result<VmStarted, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        let accelerator = format!("{}: {}", accel.accel, accel.reason);
        if entry.running().is_some() {
            return Ok(VmStarted { vm: self.describe(&entry), accelerator });
        }
        let dir = self.dir(name);
        let spec = self.spec(&entry.record(), request, accel.accel, None)?;
        entry.boots_anew();
        let qemu = Qemu::start(&dir, &spec).await.map_err(|e| match e {
            VmError::Unfit(why) => ApiError::bad_request("bad_vm", why),
            other => ApiError::internal(format!("cannot start '{name}': {other}")),
        })?;
        tracing::info!(vm = %name, pid = qemu.pid(), "guest started");
        watch(&entry, Arc::new(qemu), dir);
        let record = Record { start: Some(request.clone()), ..entry.record() };
        self.save(&record).await?;
        entry.become_known(record, entry.top());
        Ok(VmStarted { vm: self.describe(&entry), accelerator })
    }

    /// The machine that a VM's guest runs on, as it was asked for. Writes its seed disk.
    pub(super) fn spec(
        &self,
        record: &Record,
        request: &StartVm,
        accel: Accel,
        platform: Option<Platform>,
    ) -> Result<VmSpec, ApiError> {
        let name = &record.name;
        let seed = write_seed(&self.dir(name).join("seed.img"), record, request)?;
        Ok(VmSpec {
            name: name.clone(),
            disk: VmDisk { socket: self.disk_socket(name), export: name.to_string() },
            seed: Some(seed),
            memory_mib: request.memory_mib,
            cpus: request.cpus,
            accel,
            boot: request.kernel.as_ref().map(|k| DirectBoot {
                kernel: k.kernel.clone(),
                initrd: k.initrd.clone(),
                append: k.append.clone(),
            }),
            forward_ports: request.forward_ports.clone(),
            on_full: request.on_full.into(),
            platform,
        })
    }

    /// How a VM's guest was started last.
    pub(crate) fn last_start(&self, name: &VmName) -> Result<StartVm, ApiError> {
        self.get(name)?.record().start.ok_or_else(|| {
            ApiError::conflict(
                "never_started",
                format!("no guest was ever started on the disk of '{name}' by VirtMan"),
            )
            .with_hint("'virtman boot' starts guests")
        })
    }

    /// Waits until a VM's guest is ready.
    pub(crate) async fn wait(
        &self,
        name: &VmName,
        ready: &Ready,
        timeout: Duration,
    ) -> Result<VmReady, ApiError> {
        let entry = self.get(name)?;
        let guest = entry.running().ok_or_else(|| {
            let log = self.dir(name).join("qemu.log");
            ApiError::conflict("not_running", format!("'{name}' has no running guest; see {}", log.display()))
        })?;
        let ready = ready.wait(&guest, timeout).await.map_err(|e| {
            let log = self.dir(name).join("console.log");
            ApiError::conflict("not_ready", format!("'{name}': {e}; see {}", log.display()))
        })?;
        let started = unix_ms(guest.started());
        let first_read_ms = entry.disk.first_read_unix_ms().map(|ms| ms.saturating_sub(started));
        let ready_ms = u64::try_from(ready.as_millis()).unwrap_or(u64::MAX);
        let ready = VmReady { first_read_ms, ready_ms };
        entry.note_ready(ready);
        Ok(ready)
    }

    /// Ends a VM's guest; its disk stays. Ending it again changes nothing.
    pub(crate) async fn stop(&self, name: &VmName, grace: Duration) -> Result<Vm, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get_at_rest(name)?;
        if let Some(guest) = entry.running() {
            let stopped = guest.stop(grace).await;
            let stopped = stopped.map_err(|e| ApiError::internal(format!("cannot stop '{name}': {e}")))?;
            entry.ended(&guest);
            tracing::info!(vm = %name, ?stopped, "guest stopped");
        }
        Ok(self.describe(&entry))
    }

    /// A VM as the API shows it.
    pub(crate) fn describe(&self, entry: &Entry) -> Vm {
        let record = entry.record();
        let (layers, _) = entry.top().chain();
        let running = entry.running();
        let state = match *entry.guest() {
            Guest::None => VmState::Disk,
            Guest::Running(_) => VmState::Running,
            Guest::Ended => VmState::Stopped,
        };
        Vm {
            name: record.name.clone(),
            node: self.node.clone(),
            image: record.image,
            image_id: record.image_id,
            size_bytes: record.size_bytes,
            private_bytes: layers.iter().map(|layer| layer.overlay().allocated_bytes()).sum(),
            layers: layers.len(),
            snapshots: record.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect(),
            disk: ExportSocket::uri(&self.disk_socket(&record.name), record.name.as_str()),
            state,
            paused: running.as_ref().and_then(|guest| guest.standstill()).map(|standstill| VmPaused {
                since_unix_ms: unix_ms(standstill.since),
                reason: standstill.cause.to_string(),
            }),
            pid: running.as_ref().map(|guest| guest.pid()),
            console: running.as_ref().map(|guest| guest.console_socket()),
            disk_ms: entry.disk_ms(),
            created_unix_ms: record.created_unix_ms,
        }
    }

    /// The disk behind a VM's name, for exports that carry many.
    pub(crate) fn disk(&self, name: &VmName) -> Option<Arc<dyn Disk>> {
        self.get(name).ok().map(|entry| Arc::clone(&entry.disk) as _)
    }

    /// The disk behind a VM's name with its serial number, for exports that carry one each.
    pub(crate) fn exported(&self, name: &VmName) -> Option<Exported> {
        let entry = self.get(name).ok()?;
        Some(Exported { disk: Arc::clone(&entry.disk) as _, serial: entry.record().serial })
    }

    /// Whether a new VM can have this name here.
    pub(super) fn must_be_free(&self, name: &VmName) -> Result<(), ApiError> {
        self.layout.must_have_room_for(name.as_str())?;
        // One that is coming from another node or could not be opened has a directory too.
        if !self.dir(name).exists() {
            return Ok(());
        }
        let message = format!("there is a VM '{name}' on node {} already", self.node);
        Err(ApiError::conflict("vm_exists", message).with_hint("choose another name or destroy it first"))
    }

    /// Whether there is a VM of this name, open or not.
    pub(crate) fn has_files(&self, name: &VmName) -> bool {
        !files::is_absent(&self.dir(name).join(RECORD))
    }

    fn open(&self, record: Record) -> Result<Arc<Entry>, String> {
        let dir = self.dir(&record.name);
        let socket = self.disk_socket(&record.name);
        let top = self.layers.open_top(record.top)?;
        let entry = Entry::open(record, &dir, top, &socket)?;
        if let Some(guest) = Qemu::adopt(&dir) {
            tracing::info!(vm = %entry.name(), pid = guest.pid(), "guest still runs");
            guest.recover();
            watch(&entry, Arc::new(guest), dir);
        }
        Ok(entry)
    }

    /// Writes what is to be remembered of a VM.
    pub(super) async fn save(&self, record: &Record) -> Result<(), ApiError> {
        let (file, record) = (self.dir(&record.name).join(RECORD), record.clone());
        blocking(move || {
            files::write_record(&file, &record).map_err(|e| format!("cannot write {}: {e}", file.display()))
        })
        .await
    }

    /// Begins to write what is to be remembered of a VM once it is put in its place.
    pub(super) async fn start_record(&self, record: &Record) -> Result<UnsyncedFile, ApiError> {
        let (file, record) = (self.dir(&record.name).join(RECORD), record.clone());
        blocking(move || {
            files::start_record(&file, &record).map_err(|e| format!("cannot write {}: {e}", file.display()))
        })
        .await
    }

    pub(super) fn insert(&self, entry: Arc<Entry>) {
        let name = entry.name().clone();
        self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(name, entry);
    }

    pub(super) fn dir(&self, name: &VmName) -> PathBuf {
        self.layout.vms().join(name.as_str())
    }

    pub(super) fn disk_socket(&self, name: &VmName) -> PathBuf {
        self.layout.disks().join(format!("{name}.sock"))
    }

    pub(super) fn lock(&self, name: &VmName) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        &self.locks[(hasher.finish() % LOCKS as u64) as usize]
    }
}

/// Runs what blocks its thread on one that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work);
    done.await.map_err(|e| ApiError::internal(e.to_string()))?.map_err(ApiError::internal)
}

/// Writes the NoCloud seed disk from which the guest learns who it is.
fn write_seed(file: &Path, record: &Record, request: &StartVm) -> Result<PathBuf, ApiError> {
    let unfit = |e: SeedError| match e {
        SeedError::Unfit(why) => ApiError::bad_request("bad_seed", why),
        SeedError::Io(_) => ApiError::internal(e.to_string()),
    };
    // A VM that is destroyed and created anew is another instance, and configures itself anew.
    let instance = format!("i-{}", record.created_unix_ms).parse::<VmName>();
    let instance = instance.map_err(|e| ApiError::internal(e.to_string()))?;
    let mut identity = seed::Identity::new(&record.name, &instance, &request.ssh_keys).map_err(unfit)?;
    if let Some(user_data) = &request.user_data {
        identity = identity.with_user_data(user_data.as_bytes()).map_err(unfit)?;
    }
    let disk = identity.disk().map_err(unfit)?;
    tokio::task::block_in_place(|| fs::write(file, disk))
        .map_err(|e| ApiError::internal(format!("cannot write {}: {e}", file.display())))?;
    Ok(file.to_owned())
}

/// What was found when the daemon started.
pub(crate) struct Restored {
    /// Whether all records could be read: if so, the VMs hold all layers that they need.
    pub(crate) complete: bool,
    /// VMs that other nodes were about to bring.
    pub(super) incoming: Vec<IncomingRecord>,
}

/// What a VM is made from.
pub(super) struct NewVm {
    pub(super) name: VmName,
    pub(super) image: ImageName,
    pub(super) image_id: ImageId,
    pub(super) size_bytes: u64,
}

impl NewVm {
    fn record(self, node: &NodeName, top: LayerId) -> Record {
        let NewVm { name, image, image_id, size_bytes } = self;
        let created_unix_ms = now_unix_ms();
        // A VM that is destroyed and created anew has another disk.
        let identity = format!("{node}/{name}/{image_id}/{created_unix_ms}");
        let serial = blake3::hash(identity.as_bytes()).to_hex()[..32].to_owned();
        Record {
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
/// behind but that layer if it fails.
fn add_files(
    dir: &Path,
    record: Record,
    make: impl FnOnce() -> Result<Arc<Layer>, String>,
    socket: &Path,
) -> Result<Arc<Entry>, String> {
    // A directory that is there belongs to a VM that could not be opened: it is not ours to touch.
    fs::create_dir(dir).map_err(|e| format!("{}: {e}; see the node's log", dir.display()))?;
    let add = || {
        let file = dir.join(RECORD);
        let failed = |e: std::io::Error| format!("{}: {e}", file.display());
        // Begun before the layer, so that making that durable covers most of it.
        let unsynced = files::start_record(&file, &record).map_err(failed)?;
        let entry = Entry::open(record, dir, make()?, socket)?;
        unsynced.sync().and_then(NewFile::put_durably).map_err(failed)?;
        let parent = dir.parent().unwrap_or(dir);
        files::sync_dir(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
        Ok(entry)
    };
    let added = add();
    if added.is_err()
        && let Err(error) = fs::remove_dir_all(dir)
    {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove an unfinished VM");
    }
    added
}
