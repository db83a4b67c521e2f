//! The node that a VM goes to.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{Disk, ImageId, NodeName, SnapshotName, VmName};
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;

use super::wire::{self, Cargo};
use super::{Peers, reached};
use crate::disks::DiskRecord;
use crate::images::ImageGuard;
use crate::layers::{Below, HeldLayer, LayerId, Older};
use crate::service::clones::Clones;
use crate::service::images::ImageService;
use crate::state;
use crate::vms::guests::Guests;
use crate::vms::snapshots::Snapshots;
use crate::vms::{DISKS_MAX, Member, Snapshot, Vm, VmRecord, Vms, watch};
use control::api::compute::{
    ExpectVm, HandOver, HandOverDisk, HandOverSnapshot, HandOverState, MovingState, Vm as VmView,
};
use control::http::{OnConnection, Peer};
use control::refusal::{Code, Refusal};
use identity::Principal;
use qemu::{Qemu, RunState};

/// What is remembered of a VM that is coming.
pub(crate) const RECORD: &str = "incoming.json";

/// How long an administrator's word that a VM may come counts.
const EXPECTED_FOR: Duration = Duration::from_secs(600);

/// How often the source of a VM that is coming is asked what became of it.
const ASK_EVERY: Duration = Duration::from_secs(2);

/// A VM of which nothing was promised yet is forgotten when its source is silent for so long.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How long the guest may take to be here once its source has sent everything.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(60);

/// VMs that are on their way to this node.
pub(crate) struct IncomingVms {
    services: Services,
    expected: Mutex<BTreeMap<VmName, Expected>>,
    coming: Mutex<BTreeMap<VmName, Arc<Coming>>>,
    /// Held while a VM is taken over or forgotten.
    deciding: tokio::sync::Mutex<()>,
}

/// What bringing a VM here takes.
pub(crate) struct Services {
    pub(crate) node: NodeName,
    pub(crate) vms: Arc<Vms>,
    pub(crate) guests: Arc<Guests>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) images: Arc<ImageService>,
    pub(crate) clones: Arc<Clones>,
    pub(crate) peers: Peers,
}

/// A disk that is coming, with its layers, which no record names yet.
struct IncomingDisk {
    record: DiskRecord,
    top: HeldLayer,
    snapshots: Vec<IncomingSnapshot>,
}

/// What a disk was at a snapshot.
struct IncomingSnapshot {
    name: SnapshotName,
    layer: HeldLayer,
    /// The image that it came as.
    came_as: ImageId,
}

/// A layer that takes over a state of a disk.
struct ImportLayer {
    layer: HeldLayer,
    came_as: ImageId,
}

/// An administrator said that a VM may come.
struct Expected {
    from: Member,
    until: Instant,
}

/// A VM that is on its way.
struct Coming {
    from: Member,
    vm: Arc<Vm>,
    qemu: Option<Arc<Qemu>>,
    phase: Mutex<Phase>,
    /// What became of the guest's memory.
    arrived: watch::Sender<Option<Result<(), String>>>,
    /// When its source was last heard of.
    heard: Mutex<Instant>,
}

/// What was promised of a VM that is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Nothing: it may be forgotten.
    Arriving,
    /// That it can be taken over: its source decides.
    Ready,
}

/// What is remembered of a VM that is on its way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct IncomingRecord {
    pub(crate) from: Member,
    pub(crate) phase: Phase,
    pub(crate) record: VmRecord,
}

impl IncomingVms {
    /// None yet.
    pub(crate) fn new(services: Services) -> IncomingVms {
        let deciding = tokio::sync::Mutex::new(());
        IncomingVms { services, expected: Mutex::default(), coming: Mutex::default(), deciding }
    }

    fn expected(&self) -> MutexGuard<'_, BTreeMap<VmName, Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn coming(&self) -> MutexGuard<'_, BTreeMap<VmName, Arc<Coming>>> {
        self.coming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM that was ready when the daemon ended.
    pub(crate) fn restore(&self, coming: IncomingRecord) -> Result<(), String> {
        let IncomingRecord { from, record, .. } = coming;
        let vms = &self.services.vms;
        let name = record.name.clone();
        let vm = vms.open(record)?;
        let coming = Coming::new(from, vm, Qemu::adopt(&vms.dir(&name)), Phase::Ready);
        coming.arrived.send_replace(Some(Ok(())));
        self.coming().insert(name, Arc::new(coming));
        Ok(())
    }

    /// The VM that this node brings.
    fn of(&self, name: &VmName, from: &NodeName) -> Result<Arc<Coming>, Refusal> {
        let coming = self.coming().get(name).cloned().filter(|coming| coming.from.node == *from);
        let coming = coming.ok_or_else(|| {
            Refusal::new(Code::NotComing, format!("no VM '{name}' is coming from node {from}"))
        })?;
        *coming.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Ok(coming)
    }
}

impl Coming {
    fn new(from: Member, vm: Arc<Vm>, qemu: Option<Qemu>, phase: Phase) -> Coming {
        Coming {
            from,
            vm,
            qemu: qemu.map(Arc::new),
            phase: Mutex::new(phase),
            arrived: watch::Sender::new(None),
            heard: Mutex::new(Instant::now()),
        }
    }

    fn phase(&self) -> Phase {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn silent_for(&self) -> Duration {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Waits until the guest is here and stands still.
    async fn guest_is_here(&self) -> Result<(), String> {
        let Some(qemu) = &self.qemu else { return Ok(()) };
        let mut arrived = self.arrived.subscribe();
        let outcome = tokio::time::timeout(ARRIVAL_TIMEOUT, arrived.wait_for(Option::is_some)).await;
        let outcome = outcome.map_err(|_| "its memory does not arrive".to_owned())?;
        if let Some(Err(reason)) = &*outcome.map_err(|e| e.to_string())? {
            return Err(reason.clone());
        }
        match qemu.state().await.map_err(|e| e.to_string())? {
            RunState::Paused | RunState::Prelaunch | RunState::InMigrate => Ok(()),
            other => Err(format!("its guest is {other:?} instead of standing still")),
        }
    }

    async fn bring_memory(&self, stream: &mut (impl Stream + Unpin)) -> Result<(), String> {
        let qemu = self.qemu.as_ref().ok_or("its guest does not run")?;
        let incoming = qemu.incoming_listen().await.map_err(|e| e.to_string())?;
        let mut socket = UnixStream::connect(qemu.memory_socket()).await.map_err(|e| e.to_string())?;
        let copy = async { tokio::io::copy_bidirectional(stream, &mut socket).await };
        let arrive = async {
            let arrived = incoming.arrived().await.map_err(|e| e.to_string());
            self.arrived.send_replace(Some(arrived.clone()));
            arrived
        };
        let (copied, arrived) = tokio::join!(copy, arrive);
        arrived?;
        copied.map(drop).map_err(|e| e.to_string())
    }
}

/// What passes bytes in both directions.
pub(crate) trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send> Stream for T {}

/// Takes what connections of other nodes bring of VMs that are coming.
pub(crate) fn on_move(incoming: Arc<IncomingVms>) -> OnConnection {
    Arc::new(move |peer, mut stream| {
        let incoming = Arc::clone(&incoming);
        Box::pin(async move {
            let Principal::Node(from) = peer else {
                tracing::warn!(%peer, "vm_refused: only nodes bring VMs");
                return;
            };
            if let Err(reason) = bring(&incoming, &from, &mut stream).await {
                tracing::warn!(%from, reason, "vm_cargo_lost");
            }
        })
    })
}

async fn bring(
    incoming: &IncomingVms,
    from: &NodeName,
    stream: &mut (impl Stream + Unpin),
) -> Result<(), String> {
    let (vm, cargo) = wire::read_greeting(stream).await.map_err(|e| e.to_string())?;
    let coming = incoming.of(&vm, from).map_err(|e| e.to_string())?;
    if coming.phase() != Phase::Arriving {
        return Err(format!("'{vm}' has all that it needs"));
    }
    match cargo {
        Cargo::Memory => coming.bring_memory(stream).await,
        Cargo::Blocks(index) => {
            let disk = coming.vm.disks().get(usize::from(index));
            let disk = disk.ok_or_else(|| format!("'{vm}' has no disk {index}"))?;
            wire::receive(stream, &*disk.io).await.map_err(|e| e.to_string())
        }
    }
}

/// The node that asks.
fn node_of(peer: &Peer) -> Result<&NodeName, Refusal> {
    match peer {
        Peer::Remote(Principal::Node(node)) => Ok(node),
        other => Err(Refusal::new(Code::NotANode, format!("{other} is not a node"))),
    }
}

impl IncomingVms {
    /// Lets a VM come from a node. It has to come soon.
    pub(crate) fn expect(&self, name: &VmName, request: &ExpectVm) -> Result<(), Refusal> {
        self.services.vms.must_be_free(name)?;
        let from = Member { node: request.from.clone(), address: request.address.clone() };
        let mut expected = self.expected();
        expected.retain(|_, known| known.until > Instant::now());
        expected.insert(name.clone(), Expected { from, until: Instant::now() + EXPECTED_FOR });
        Ok(())
    }

    /// Prepares for a VM that its node brings.
    pub(crate) async fn receive(&self, peer: &Peer, name: &VmName, request: HandOver) -> Result<(), Refusal> {
        let node = node_of(peer)?;
        let from = {
            let expected = self.expected();
            let known = expected.get(name).filter(|known| known.until > Instant::now());
            known.filter(|known| known.from.node == *node).map(|known| known.from.clone())
        };
        let from = from.ok_or_else(|| {
            Refusal::new(
                Code::NotExpected,
                format!("no administrator said that '{name}' may come from {node}"),
            )
        })?;
        let _one_at_a_time = self.deciding.lock().await;
        self.services.vms.must_be_free(name)?;
        let (record, disks) = self.make_incoming(name, &request).await?;
        let coming = match self.open_incoming(from, record.clone(), &disks, &request).await {
            Ok(coming) => coming,
            Err(error) => {
                let dir = self.services.vms.dir(name);
                end_guest(&dir).await;
                remove_dir(&dir);
                return Err(error);
            }
        };
        self.services.vms.layers.add_refs(record.layers());
        self.expected().remove(name);
        self.coming().insert(name.clone(), Arc::new(coming));
        tracing::info!(vm = %name, %node, "vm_incoming");
        reached(&self.services.vms.layout, "receiving");
        Ok(())
    }

    /// Makes the disks of a VM that is coming: its record, and all layers that this names.
    async fn make_incoming(
        &self,
        name: &VmName,
        request: &HandOver,
    ) -> Result<(VmRecord, Vec<IncomingDisk>), Refusal> {
        let HandOver { disks, snapshots, created_unix_ms, start, .. } = request;
        if disks.is_empty() || disks.len() > DISKS_MAX {
            let message = format!("a VM has 1 to {DISKS_MAX} disks, not {}", disks.len());
            return Err(Refusal::new(Code::BadVm, message));
        }
        let mut made = Vec::new();
        for disk in disks {
            made.push(self.make_disk(disk).await?);
        }
        let snapshots = snapshots.iter().map(|HandOverSnapshot { name, created_unix_ms, quiesced }| {
            let layer_of = |disk: &IncomingDisk| {
                let older = disk.snapshots.iter().find(|older| older.name == *name)?;
                Some((disk.record.id, older.layer.id()))
            };
            Snapshot {
                name: name.clone(),
                layers: made.iter().filter_map(layer_of).collect(),
                created_unix_ms: *created_unix_ms,
                quiesced: *quiesced,
            }
        });
        let record = VmRecord {
            name: name.clone(),
            created_unix_ms: *created_unix_ms,
            disks: made.iter().map(|disk| disk.record.clone()).collect(),
            snapshots: snapshots.collect(),
            start: start.clone(),
            moved_to: None,
            arrived: false,
        };
        Ok((record, made))
    }

    /// Makes the layers of a disk that is coming: its top, and those that it was at snapshots.
    async fn make_disk(&self, disk: &HandOverDisk) -> Result<IncomingDisk, Refusal> {
        let HandOverDisk { id, image, image_id, size_bytes, .. } = disk;
        let own = self.services.images.attach(image).await?;
        if own.id != *image_id {
            let message = format!("'{image}' is image {} here, not {}", own.id.short(), image_id.short());
            return Err(Refusal::new(Code::OtherImage, message));
        }
        let services = &self.services.snapshots;
        let mut snapshots = Vec::new();
        for (name, state) in &disk.snapshots {
            let (layer, came_as) = match self.below_incoming(state, &own, &snapshots).await? {
                Some(ImportLayer { layer, came_as }) => (layer, came_as),
                None => {
                    let below = Below::Image(Arc::clone(&own));
                    let layer = services.make_above(LayerId::draw(), below, *size_bytes).await?;
                    layer.overlay().set_frozen();
                    (layer, own.id)
                }
            };
            snapshots.push(IncomingSnapshot { name: name.clone(), layer, came_as });
        }
        let import = self.below_incoming(&disk.state, &own, &snapshots).await?;
        let below = match &import {
            Some(import) => Below::Layer(Arc::clone(&import.layer)),
            None => Below::Image(Arc::clone(&own)),
        };
        let top = services.make_above(LayerId::draw(), below, *size_bytes).await?;
        let (image, image_id, size_bytes) = (image.clone(), *image_id, *size_bytes);
        let record = DiskRecord { id: *id, image, image_id, size_bytes, top: top.id() };
        Ok(IncomingDisk { record, top, snapshots })
    }

    /// The layer that takes over a state of a disk that is coming; [`None`] if that is as its image.
    async fn below_incoming(
        &self,
        state: &HandOverState,
        own: &ImageGuard,
        older: &[IncomingSnapshot],
    ) -> Result<Option<ImportLayer>, Refusal> {
        let Some(carried) = &state.carried else { return Ok(None) };
        let on = match &state.on {
            None => None,
            Some(name) => {
                let older = older
                    .iter()
                    .find(|older| older.name == *name)
                    .ok_or_else(|| Refusal::new(Code::BadVm, format!("no snapshot '{name}' comes before")))?;
                Some(Older { layer: older.layer.id(), image: older.came_as })
            }
        };
        let carried = self.services.images.attach_transfer(carried).await?;
        let layer = self.services.clones.import_layer(&carried, own, on).await?;
        Ok(Some(ImportLayer { layer, came_as: carried.id }))
    }

    async fn open_incoming(
        &self,
        from: Member,
        record: VmRecord,
        disks: &[IncomingDisk],
        request: &HandOver,
    ) -> Result<Coming, Refusal> {
        let name = record.name.clone();
        let dir = self.services.vms.dir(&name);
        fs::create_dir(&dir).map_err(|e| Refusal::internal(format!("{}: {e}", dir.display())))?;
        save(&dir, &from, Phase::Arriving, &record)?;
        let tops = disks.iter().map(|disk| Arc::clone(&disk.top)).collect();
        let vm = Vm::open(record, &dir, tops, &self.services.vms.layout.disks());
        let vm = vm.map_err(Refusal::internal)?;
        let qemu = match (&request.live, &request.start) {
            (Some(live), Some(start)) => {
                let platform = Some(live.platform.clone());
                let spec = self.services.guests.spec(&vm, start, live.accel, platform)?;
                let started = Qemu::start_incoming(&dir, &spec).await;
                Some(started.map_err(|e| {
                    Refusal::new(
                        Code::NotStartable,
                        format!("node {} cannot run the guest: {e}", self.services.node),
                    )
                })?)
            }
            (Some(_), None) => {
                return Err(Refusal::new(Code::BadVm, "a guest that was never started cannot run"));
            }
            (None, _) => None,
        };
        Ok(Coming::new(from, vm, qemu, Phase::Arriving))
    }

    /// Promises that a VM can be taken over: all of it is here that has to be. Its source decides from here on.
    pub(crate) async fn promise(&self, peer: &Peer, name: &VmName) -> Result<(), Refusal> {
        let coming = self.of(name, node_of(peer)?)?;
        coming.guest_is_here().await.map_err(|reason| {
            Refusal::new(
                Code::NotReady,
                format!("'{name}' cannot go on at node {}: {reason}", self.services.node),
            )
        })?;
        for disk in coming.vm.disks() {
            disk.io.flush().await?;
        }
        let _one_at_a_time = self.deciding.lock().await;
        // It may have been forgotten meanwhile.
        self.of(name, &coming.from.node)?;
        reached(&self.services.vms.layout, "promising");
        save(&self.services.vms.dir(name), &coming.from, Phase::Ready, &coming.vm.record())?;
        reached(&self.services.vms.layout, "has promised");
        *coming.phase.lock().unwrap_or_else(PoisonError::into_inner) = Phase::Ready;
        Ok(())
    }

    /// Takes a VM over: it is this node's from here on, and its guest goes on. Doing so again changes nothing.
    pub(crate) async fn take_over(&self, peer: &Peer, name: &VmName) -> Result<VmView, Refusal> {
        let from = node_of(peer)?;
        self.take(name, from).await
    }

    async fn take(&self, name: &VmName, from: &NodeName) -> Result<VmView, Refusal> {
        let _one_at_a_time = self.deciding.lock().await;
        let coming = match self.of(name, from) {
            Ok(coming) => coming,
            // It was taken over, and the answer was lost.
            Err(error) => {
                return self
                    .services
                    .vms
                    .get(name)
                    .map(|vm| self.services.vms.describe(&vm))
                    .map_err(|_| error);
            }
        };
        if coming.phase() != Phase::Ready {
            return Err(Refusal::new(Code::NotReady, format!("not all of '{name}' is here")));
        }
        let (vm, dir) = (Arc::clone(&coming.vm), self.services.vms.dir(name));
        let record = VmRecord { arrived: coming.qemu.is_some(), ..vm.record() };
        reached(&self.services.vms.layout, "taking");
        self.services.vms.save(&record).await?;
        reached(&self.services.vms.layout, "has taken");
        vm.set_record(record);
        self.services.vms.insert(Arc::clone(&vm));
        self.coming().remove(name);
        if let Err(error) = fs::remove_file(dir.join(RECORD)) {
            tracing::warn!(vm = %name, %error, "leftovers_kept: the record of a move cannot be removed");
        }
        if let Some(qemu) = &coming.qemu {
            watch(&vm, Arc::clone(qemu), dir);
            self.services.guests.let_arrived_go_on(&vm).await;
        }
        tracing::info!(vm = %name, %from, "vm_taken_over");
        Ok(self.services.vms.describe(&vm))
    }

    /// Forgets a VM that is coming, as its source says.
    pub(crate) async fn forget_for(&self, peer: &Peer, name: &VmName) -> Result<(), Refusal> {
        let from = node_of(peer)?;
        self.of(name, from)?;
        self.forget(name).await;
        Ok(())
    }

    async fn forget(&self, name: &VmName) {
        let _one_at_a_time = self.deciding.lock().await;
        let Some(coming) = self.coming().remove(name) else { return };
        if let Some(qemu) = &coming.qemu
            && let Err(error) = qemu.kill().await
        {
            tracing::warn!(vm = %name, %error, "guest_not_ended: its move was given up");
        }
        coming.vm.close_exports();
        remove_dir(&self.services.vms.dir(name));
        if let Err(error) = self.services.vms.release_refs(coming.vm.record().layers().collect()).await {
            tracing::warn!(vm = %name, %error, "leftovers_kept: layers of a VM that does not come stay until the next start");
        }
        tracing::info!(vm = %name, from = %coming.from.node, "vm_not_coming");
    }

    /// Asks the sources of VMs that are coming what became of them, until dropped.
    pub(crate) async fn run(&self) {
        loop {
            tokio::time::sleep(ASK_EVERY).await;
            let coming: Vec<(VmName, Arc<Coming>)> =
                self.coming().iter().map(|(name, coming)| (name.clone(), Arc::clone(coming))).collect();
            for (name, coming) in coming {
                let path = format!("/v1/vms/{name}/moving");
                match self.services.peers.client_of(&coming.from).get::<MovingState>(&path).await {
                    Ok(MovingState::Moving) => {
                        *coming.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
                    }
                    Ok(MovingState::Moved) => {
                        if let Err(error) = self.take(&name, &coming.from.node).await {
                            tracing::warn!(vm = %name, %error, "vm_not_taken_over: it is tried again and again");
                        }
                    }
                    Ok(MovingState::Not) => self.forget(&name).await,
                    Err(error) if coming.phase() == Phase::Arriving && coming.silent_for() > SILENCE_MAX => {
                        tracing::warn!(vm = %name, %error, "vm_source_silent");
                        self.forget(&name).await;
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

fn save(dir: &Path, from: &Member, phase: Phase, record: &VmRecord) -> Result<(), Refusal> {
    let record = IncomingRecord { from: from.clone(), phase, record: record.clone() };
    let file = dir.join(RECORD);
    tokio::task::block_in_place(|| state::write_record(&file, &record))
        .map_err(|e| Refusal::internal(format!("cannot write {}: {e}", file.display())))
}

/// Ends a guest of which only its files are known.
pub(crate) async fn end_guest(dir: &Path) {
    if let Some(qemu) = Qemu::adopt(dir)
        && let Err(error) = qemu.kill().await
    {
        tracing::warn!(dir = %dir.display(), %error, "guest_not_ended");
    }
}

fn remove_dir(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "leftovers_kept: files of a VM cannot be removed");
    }
}
