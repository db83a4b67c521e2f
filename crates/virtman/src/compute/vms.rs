//! VMs: their disks, exports and guests.
//!
//! A VM is a directory. It exists once its `vm.json` is there, which is written last, and is gone once
//! `vm.json` is removed, which is done first; what lies around without one is swept away at the next
//! start. Operations on one VM are serialized by a lock that is picked by its name; others go on.
//!
//! Crash: overlays are durable by themselves; exports are opened again under the same paths and guests
//! that outlived the daemon are adopted, so that their hypervisors reconnect and go on.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use block::{Disk, ImageId, ImageName, NodeName, VmName};
use serde::{Deserialize, Serialize};
use store::Overlay;

use super::exports::{ExportSocket, WatchedDisk};
use super::files::{self, Layout};
use super::images::Attached;
use super::iscsi::Exported;
use super::profile::BootTap;
use crate::api::compute::{StartVm, Vm, VmReady, VmStarted, VmState};
use crate::api::{now_unix_ms, unix_ms};
use crate::http::ApiError;
use crate::vm::seed::SeedError;
use crate::vm::{AccelChoice, DirectBoot, Qemu, Ready, VmDisk, VmError, VmSpec, seed};

/// Locks that serialize operations on a VM. More than enough that two VMs seldom share one.
const LOCKS: usize = 64;

const RECORD: &str = "vm.json";

/// All VMs of a node.
pub(crate) struct Vms {
    node: NodeName,
    layout: Layout,
    vms: RwLock<BTreeMap<VmName, Arc<Entry>>>,
    locks: [tokio::sync::Mutex<()>; LOCKS],
}

/// One VM with its disk open and exported.
pub(crate) struct Entry {
    record: Record,
    disk: Arc<WatchedDisk<Overlay>>,
    guest: Mutex<Guest>,
    _export: ExportSocket,
}

/// What became of a VM's guest since it was started.
enum Guest {
    /// It was never started by this daemon, nor found running.
    None,
    /// It runs.
    Running(Arc<Qemu>),
    /// Its hypervisor ended.
    Ended,
}

/// What is remembered of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: VmName,
    image: ImageName,
    image_id: ImageId,
    size_bytes: u64,
    disk_ms: u64,
    created_unix_ms: u64,
}

impl Vms {
    pub(crate) fn new(node: NodeName, layout: Layout) -> Vms {
        Vms {
            node,
            layout,
            vms: RwLock::default(),
            locks: std::array::from_fn(|_| tokio::sync::Mutex::default()),
        }
    }

    /// Opens the disks that were there when the daemon ended, and finds the guests that still run. What
    /// cannot be opened is said and left as it is. Blocks.
    pub(crate) fn restore(
        &self,
        attached: impl Fn(&ImageId) -> Option<Arc<Attached>>,
    ) -> std::io::Result<()> {
        for dir in files::sweep(&self.layout.vms())? {
            if !dir.join(RECORD).exists() {
                tracing::info!(dir = %dir.display(), "removing what an unfinished create or destroy left");
                fs::remove_dir_all(&dir)?;
                continue;
            }
            let restored = files::read_record::<Record>(&dir.join(RECORD)).and_then(|record| {
                let id = record.image_id;
                let attached =
                    attached(&id).ok_or_else(|| format!("its image {} is not attached", id.short()))?;
                self.open(record, &attached)
            });
            match restored {
                Ok(entry) => self.insert(entry),
                Err(reason) => {
                    tracing::error!(dir = %dir.display(), reason, "a VM's disk cannot be opened; its files are left as they are");
                }
            }
        }
        Ok(())
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

    /// How many VM disks stand on an image.
    pub(crate) fn count_on(&self, id: &ImageId) -> usize {
        self.all().iter().filter(|entry| entry.record.image_id == *id).count()
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
        let record = Record {
            name: name.clone(),
            image: image.clone(),
            image_id: attached.id,
            size_bytes,
            disk_ms: 0,
            created_unix_ms: now_unix_ms(),
        };
        let dir = self.dir(name);
        let made = tokio::task::spawn_blocking(move || make(&dir, record, &attached, asked));
        let (record, overlay) = made
            .await
            .map_err(|e| ApiError::internal(format!("creating '{name}' was interrupted: {e}")))?
            .map_err(|reason| ApiError::internal(format!("cannot create the disk of '{name}': {reason}")))?;
        let entry = self.export(record, overlay).map_err(|reason| {
            remove_unfinished(&self.dir(name));
            ApiError::internal(reason)
        })?;
        let vm = self.describe(&entry);
        self.insert(entry);
        Ok(vm)
    }

    /// Removes a VM with its disk. A running guest is ended.
    pub(crate) async fn destroy(&self, name: &VmName) -> Result<(), ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get(name)?;
        if let Some(guest) = entry.running() {
            guest
                .kill()
                .await
                .map_err(|e| ApiError::internal(format!("cannot end the guest of '{name}': {e}")))?;
        }
        let dir = self.dir(name);
        let removed = tokio::task::spawn_blocking(move || {
            fs::remove_file(dir.join(RECORD))?;
            files::sync_dir(&dir)?;
            fs::remove_dir_all(&dir)
        });
        let removed = removed.await.map_err(|e| ApiError::internal(format!("destroying '{name}': {e}")))?;
        self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(name);
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
        let entry = self.get(name)?;
        let accelerator = format!("{}: {}", accel.accel, accel.reason);
        if entry.running().is_some() {
            return Ok(VmStarted { vm: self.describe(&entry), accelerator });
        }
        let dir = self.dir(name);
        let seed = write_seed(&dir.join("seed.img"), &entry.record, request)?;
        let spec = VmSpec {
            name: name.clone(),
            disk: VmDisk { socket: self.disk_socket(name), export: name.to_string() },
            seed: Some(seed),
            memory_mib: request.memory_mib,
            cpus: request.cpus,
            accel: accel.accel,
            boot: request.kernel.as_ref().map(|k| DirectBoot {
                kernel: k.kernel.clone(),
                initrd: k.initrd.clone(),
                append: k.append.clone(),
            }),
            forward_ports: request.forward_ports.clone(),
            on_full: request.on_full,
            platform: None,
        };
        entry.disk.forget_first_read();
        let qemu = Qemu::start(&dir, &spec).await.map_err(|e| match e {
            VmError::Unfit(why) => ApiError::bad_request("bad_vm", why),
            other => ApiError::internal(format!("cannot start '{name}': {other}")),
        })?;
        tracing::info!(vm = %name, pid = qemu.pid(), "guest started");
        watch(&entry, qemu);
        Ok(VmStarted { vm: self.describe(&entry), accelerator })
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
        Ok(VmReady { first_read_ms, ready_ms: u64::try_from(ready.as_millis()).unwrap_or(u64::MAX) })
    }

    /// Ends a VM's guest; its disk stays. Ending it again changes nothing.
    pub(crate) async fn stop(&self, name: &VmName, grace: Duration) -> Result<Vm, ApiError> {
        let _one_at_a_time = self.lock(name).lock().await;
        let entry = self.get(name)?;
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
        let record = &entry.record;
        let running = entry.running();
        let state = match *entry.guest() {
            Guest::None => VmState::Disk,
            Guest::Running(_) => VmState::Running,
            Guest::Ended => VmState::Stopped,
        };
        Vm {
            name: record.name.clone(),
            node: self.node.clone(),
            image: record.image.clone(),
            image_id: record.image_id,
            size_bytes: record.size_bytes,
            private_bytes: entry.disk.inner().allocated_bytes(),
            disk: ExportSocket::uri(&self.disk_socket(&record.name), record.name.as_str()),
            state,
            pid: running.as_ref().map(|guest| guest.pid()),
            console: running.as_ref().map(|guest| guest.console_socket()),
            disk_ms: record.disk_ms,
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
        let Record { image_id, created_unix_ms, .. } = &entry.record;
        // A VM that is destroyed and created anew has another disk.
        let identity = format!("{}/{name}/{image_id}/{created_unix_ms}", self.node);
        let serial = blake3::hash(identity.as_bytes()).to_hex()[..32].to_owned();
        Some(Exported { disk: Arc::clone(&entry.disk) as _, serial })
    }

    /// Whether there is a VM of this name, open or not.
    pub(crate) fn has_files(&self, name: &VmName) -> bool {
        self.dir(name).join(RECORD).exists()
    }

    fn open(&self, record: Record, attached: &Attached) -> Result<Arc<Entry>, String> {
        let dir = self.dir(&record.name);
        let overlay = Overlay::open(&dir.join("overlay"), Arc::clone(&attached.volume) as _)
            .map_err(|e| e.to_string())?;
        let entry = self.export(record, overlay)?;
        if let Some(guest) = Qemu::adopt(&dir) {
            tracing::info!(vm = %entry.record.name, pid = guest.pid(), "guest still runs");
            watch(&entry, guest);
        }
        Ok(entry)
    }

    fn export(&self, record: Record, overlay: Overlay) -> Result<Arc<Entry>, String> {
        let disk = Arc::new(WatchedDisk::new(overlay));
        let socket = self.disk_socket(&record.name);
        let export = ExportSocket::open(socket.clone(), record.name.to_string(), Arc::clone(&disk) as _)
            .map_err(|e| format!("cannot open the socket {}: {e}", socket.display()))?;
        Ok(Arc::new(Entry { record, disk, guest: Mutex::new(Guest::None), _export: export }))
    }

    fn insert(&self, entry: Arc<Entry>) {
        let name = entry.record.name.clone();
        self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(name, entry);
    }

    fn dir(&self, name: &VmName) -> PathBuf {
        self.layout.vms().join(name.as_str())
    }

    fn disk_socket(&self, name: &VmName) -> PathBuf {
        self.layout.disks().join(format!("{name}.sock"))
    }

    fn lock(&self, name: &VmName) -> &tokio::sync::Mutex<()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        &self.locks[(hasher.finish() % LOCKS as u64) as usize]
    }
}

impl Entry {
    /// The VM's name.
    pub(crate) fn name(&self) -> &VmName {
        &self.record.name
    }

    /// The guest, if it runs.
    pub(crate) fn running(&self) -> Option<Arc<Qemu>> {
        match &*self.guest() {
            Guest::Running(guest) => Some(Arc::clone(guest)),
            Guest::None | Guest::Ended => None,
        }
    }

    /// Notes that this guest has ended, unless another took its place.
    fn ended(&self, which: &Arc<Qemu>) {
        let mut guest = self.guest();
        if matches!(&*guest, Guest::Running(running) if Arc::ptr_eq(running, which)) {
            *guest = Guest::Ended;
        }
    }

    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn must_be(&self, image: ImageId, size_bytes: Option<u64>) -> Result<(), ApiError> {
        let Record { name, image: own, size_bytes: own_bytes, .. } = &self.record;
        if self.record.image_id != image {
            return Err(ApiError::conflict(
                "vm_exists",
                format!(
                    "there is a VM '{name}' already, on image '{own}'; choose another name or destroy it first"
                ),
            ));
        }
        match size_bytes {
            Some(wanted) if wanted != *own_bytes => Err(ApiError::conflict(
                "vm_exists",
                format!(
                    "there is a VM '{name}' already, with a disk of {own_bytes} bytes instead of {wanted}"
                ),
            )),
            _ => Ok(()),
        }
    }
}

/// Notes that an entry's guest runs, and when it ends.
fn watch(entry: &Arc<Entry>, guest: Qemu) {
    let guest = Arc::new(guest);
    *entry.guest() = Guest::Running(Arc::clone(&guest));
    let entry = Arc::downgrade(entry);
    // The task ends with the guest's process, or with the daemon.
    tokio::spawn(async move {
        if let Err(error) = guest.exited().await {
            tracing::warn!(vm = %guest.name(), %error, "cannot watch a guest's process");
            return;
        }
        tracing::info!(vm = %guest.name(), "guest ended");
        if let Some(entry) = entry.upgrade() {
            entry.ended(&guest);
        }
    });
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

/// Makes a VM's directory with its overlay, the record last. Leaves nothing behind if it fails.
fn make(
    dir: &Path,
    record: Record,
    attached: &Attached,
    asked: Instant,
) -> Result<(Record, Overlay), String> {
    // A directory that is there belongs to a VM that could not be opened: it is not ours to touch.
    fs::create_dir(dir).map_err(|e| format!("{}: {e}; see the node's log", dir.display()))?;
    let filled = fill(dir, record, attached, asked);
    if filled.is_err() {
        remove_unfinished(dir);
    }
    filled
}

fn remove_unfinished(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove an unfinished VM");
    }
}

fn fill(
    dir: &Path,
    mut record: Record,
    attached: &Attached,
    asked: Instant,
) -> Result<(Record, Overlay), String> {
    // Only a new disk shows a first boot.
    let base = BootTap::new(Arc::clone(&attached.volume), Arc::clone(&attached.profile));
    let overlay = Overlay::create(&dir.join("overlay"), record.size_bytes, Arc::new(base))
        .map_err(|e| e.to_string())?;
    record.disk_ms = u64::try_from(asked.elapsed().as_millis()).unwrap_or(u64::MAX);
    let file = dir.join(RECORD);
    files::write_record(&file, &record).map_err(|e| format!("{}: {e}", file.display()))?;
    let parent = dir.parent().unwrap_or(dir);
    files::sync_dir(parent).map_err(|e| format!("{}: {e}", parent.display()))?;
    Ok((record, overlay))
}
