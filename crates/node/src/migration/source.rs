//! The node that a VM leaves.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{Disk, NodeName, SnapshotName, VmName};
use image::ImportProgress;
use tokio::net::{UnixListener, UnixStream};

use super::target::Stream;
use super::wire::{self, Cargo, Sender};
use super::{Peers, reached};
use crate::disks::DiskRecord;
use crate::exports::Exports;
use crate::layers::{HeldLayer, Layer};
use crate::service::clones::{Clones, Purpose, transfer_name, union};
use crate::service::origins::OriginService;
use crate::vms::snapshots::{Quiesce, Snapshots};
use crate::vms::{Member, Vm, VmRecord, Vms};
use control::api::compute::{
    HandOver, HandOverDisk, HandOverSnapshot, HandOverState, LiveGuest, MigrateVm, Migrated, MovingState,
    Vm as VmView,
};
use control::http::{Client, ClientError};
use control::refusal::{Code, Refusal};
use qemu::{MemoryProgress, Qemu};

/// Most rounds in which what a guest writes is sent after it. One that writes faster than that is left to the last.
pub(super) const ROUNDS_MAX: u32 = 60;

/// A round that sends no more than this was the last before the guest stands still: it takes some tens of
/// milliseconds.
const ROUND_BYTES_SMALL: u64 = 4 << 20;

/// Pause between two rounds while the guest's memory leaves.
const ROUND_EVERY: Duration = Duration::from_secs(1);

/// How often a VM that belongs to another node is offered to it.
const OFFER_EVERY: Duration = Duration::from_secs(2);

/// What was sent of a VM's disk.
#[derive(Default)]
struct Sent {
    bytes: u64,
    rounds: u32,
}

/// VMs that leave this node.
pub(crate) struct OutgoingVms {
    node: NodeName,
    vms: Arc<Vms>,
    services: Services,
    /// Those that belong to other nodes, which may not know it yet.
    moved: Mutex<BTreeMap<VmName, VmRecord>>,
}

/// What sending a VM takes.
pub(crate) struct Services {
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) clones: Arc<Clones>,
    pub(crate) origins: Arc<OriginService>,
    pub(crate) exports: Arc<Exports>,
    pub(crate) peers: Peers,
}

impl OutgoingVms {
    /// Those of this node.
    pub(crate) fn new(node: NodeName, vms: Arc<Vms>, services: Services) -> OutgoingVms {
        OutgoingVms { node, vms, services, moved: Mutex::default() }
    }

    /// A VM that belonged to another node when the daemon ended.
    pub(crate) fn restore(&self, record: VmRecord) {
        self.moved().insert(record.name.clone(), record);
    }

    fn moved(&self) -> MutexGuard<'_, BTreeMap<VmName, VmRecord>> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a VM to another node.
    pub(crate) async fn migrate(
        &self,
        name: &VmName,
        request: MigrateVm,
        progress: Arc<ImportProgress>,
    ) -> Result<Migrated, Refusal> {
        let to = Member { node: request.to, address: request.address };
        let vm = self.vms.get_at_rest(name)?;
        if to.node == self.node {
            return Err(Refusal::new(Code::SameNode, format!("'{name}' is on node {} already", self.node)));
        }
        self.services.exports.must_not_keep(name)?;
        let moving = vm
            .begin_to_move(&to.node)
            .ok_or_else(|| Refusal::new(Code::Moving, format!("'{name}' is being moved already")))?;
        let began = Instant::now();
        let moved = Move { outgoing: self, vm: &vm, to: &to, target: self.services.peers.client_of(&to) };
        let outcome = moved.carry_out(progress).await;
        drop(moving);
        let mut migrated = outcome?;
        migrated.total_ms = millis(began.elapsed());
        tracing::info!(vm = %name, to = %to.node, pause_ms = migrated.pause_ms, "vm_moved");
        Ok(migrated)
    }

    /// What becomes of a VM that another node is told to take.
    pub(crate) fn moving_state(&self, name: &VmName, to: &NodeName) -> MovingState {
        if self.moved().get(name).and_then(|record| record.moved_to.as_ref()).is_some_and(|at| at.node == *to)
        {
            return MovingState::Moved;
        }
        match self.vms.get(name).ok().and_then(|vm| vm.moving()) {
            Some(moving) if moving == *to => MovingState::Moving,
            _ => MovingState::Not,
        }
    }

    /// Writes down that a VM belongs to another node, and ends what is here of its guest. If that fails it belongs to
    /// this node as before.
    async fn give_up(&self, vm: &Vm, to: &Member) -> Result<(), Refusal> {
        let name = vm.name();
        let _one_at_a_time = self.vms.lock(name).lock().await;
        let before = vm.record();
        let record = VmRecord { moved_to: Some(to.clone()), ..before.clone() };
        if let Err(error) = self.vms.save(&record).await {
            // It may be there all the same.
            self.vms.save(&before).await?;
            return Err(error);
        }
        self.moved().insert(name.clone(), record);
        self.vms.remove(name);
        vm.close_exports();
        if let Some(guest) = vm.running()
            && let Err(error) = guest.kill().await
        {
            tracing::error!(vm = %name, %error, "guest_not_ended: it was moved, and stands still here");
        }
        Ok(())
    }

    /// Has the node that a VM belongs to take it, and forgets it here.
    async fn hand_over(&self, name: &VmName, to: &Member) -> Result<VmView, ClientError> {
        let vm: VmView =
            self.services.peers.client_of(to).post(&format!("/v1/incoming/{name}/take"), &()).await?;
        reached(&self.vms.layout, "taken");
        let moved = self.moved().remove(name);
        if let Some(record) = moved
            && let Err(error) = self.vms.remove_files(record).await
        {
            tracing::warn!(vm = %name, %error, "leftovers_kept: a VM was moved, and its files cannot be removed");
        }
        Ok(vm)
    }

    /// Offers VMs that belong to other nodes to them, until dropped.
    pub(crate) async fn run(&self) {
        loop {
            tokio::time::sleep(OFFER_EVERY).await;
            let moved: Vec<VmRecord> = self.moved().values().cloned().collect();
            for record in moved {
                let Some(to) = &record.moved_to else { continue };
                match self.hand_over(&record.name, to).await {
                    Ok(_) => tracing::info!(vm = %record.name, to = %to.node, "vm_handed_over"),
                    Err(error) => {
                        tracing::warn!(vm = %record.name, to = %to.node, %error, "vm_not_handed_over: it is tried again and again");
                    }
                }
            }
        }
    }
}

/// One VM on its way.
struct Move<'a> {
    outgoing: &'a OutgoingVms,
    vm: &'a Arc<Vm>,
    to: &'a Member,
    target: Client,
}

impl Move<'_> {
    fn name(&self) -> &VmName {
        self.vm.name()
    }

    async fn carry_out(&self, progress: Arc<ImportProgress>) -> Result<Migrated, Refusal> {
        let guest = self.vm.running();
        let mut snapshots = Vec::new();
        for disk in &self.vm.record().disks {
            snapshots.push(self.carry_snapshots(disk, &progress).await?);
        }
        // All that is above these layers is still to be sent. They are held, so that they are not merged.
        let mut since = self.freeze().await?;
        let mut disks = Vec::new();
        for ((disk, snapshots), layer) in self.vm.record().disks.into_iter().zip(snapshots).zip(&since) {
            let state = self.carry(&disk, layer, Arc::clone(&progress)).await?;
            let DiskRecord { id, image, image_id, size_bytes, .. } = disk;
            disks.push(HandOverDisk { id, image, image_id, size_bytes, snapshots, state });
        }
        self.reached("carried");
        let offer = self.offer(guest.as_deref(), disks)?;
        self.with_target(guest.as_deref(), &offer, &mut since, &progress).await
    }

    fn reached(&self, step: &str) {
        reached(&self.outgoing.vms.layout, step);
    }

    /// Freezes the disks as they are.
    async fn freeze(&self) -> Result<Vec<HeldLayer>, Refusal> {
        let _one_at_a_time = self.outgoing.vms.lock(self.name()).lock().await;
        Ok(self.outgoing.services.snapshots.freeze(self.vm, Quiesce::No, None).await?.layers)
    }

    /// Makes images that carry what a disk was at the snapshots.
    async fn carry_snapshots(
        &self,
        disk: &DiskRecord,
        progress: &Arc<ImportProgress>,
    ) -> Result<Vec<(SnapshotName, HandOverState)>, Refusal> {
        let mut carried = Vec::new();
        for snapshot in self.vm.record().snapshots {
            if !snapshot.layers.contains_key(&disk.id) {
                continue;
            }
            let snapshots = &self.outgoing.services.snapshots;
            let frozen = snapshots.hold(self.name(), &snapshot.name, &disk.id).await?;
            let state = self.carry(disk, &frozen, Arc::clone(progress)).await?;
            carried.push((snapshot.name, state));
        }
        Ok(carried)
    }

    /// Makes an image that carries a frozen layer of a disk and what is below it, if that differs from the disk's own.
    async fn carry(
        &self,
        disk: &DiskRecord,
        frozen: &HeldLayer,
        progress: Arc<ImportProgress>,
    ) -> Result<HandOverState, Refusal> {
        let snapshots = self.vm.record().snapshots;
        let snapshot_of = |layer: &Arc<Layer>| snapshots.iter().find(|known| known.names(layer.id()));
        let on = frozen.chain().0[1..].iter().find_map(snapshot_of).map(|snapshot| snapshot.name.clone());
        let services = &self.outgoing.services;
        let held = self.outgoing.vms.layers.keep(frozen);
        let held = held.ok_or_else(|| Refusal::internal(format!("layer {} is gone", frozen.id())))?;
        let name = transfer_name("move")?;
        let image = services.clones.make_image(held, &name, Purpose::Transfer, progress).await?;
        if image.id == disk.image_id {
            return Ok(HandOverState { carried: None, on });
        }
        Ok(HandOverState { carried: Some(services.origins.name_for_others(&image, &name).await?), on })
    }

    async fn with_target(
        &self,
        guest: Option<&Qemu>,
        offer: &HandOver,
        since: &mut Vec<HeldLayer>,
        progress: &ImportProgress,
    ) -> Result<Migrated, Refusal> {
        let path = format!("/v1/incoming/{}", self.name());
        self.target.post::<()>(&format!("{path}/receive"), offer).await.map_err(|e| self.refused(e))?;
        self.reached("received");
        let moved = match guest {
            Some(guest) => self.live(guest, since, progress).await,
            None => self.still(since).await,
        };
        if moved.is_err() && !self.outgoing.moved().contains_key(self.name()) {
            // It asks us otherwise, and finds out.
            if let Err(error) = self.target.delete::<()>(&path).await {
                tracing::debug!(vm = %self.name(), %error, "the target could not be told that a VM does not come");
            }
        }
        moved
    }

    fn offer(&self, guest: Option<&Qemu>, disks: Vec<HandOverDisk>) -> Result<HandOver, Refusal> {
        let record = self.vm.record();
        let live = match guest {
            None => None,
            Some(guest) => {
                let spec = guest.spec().and_then(|spec| Some((spec.accel, spec.platform.clone()?)));
                let (accel, platform) = spec.ok_or_else(|| {
                    let message =
                        format!("the guest of '{}' was started by another version of VirtMan", record.name);
                    Refusal::new(Code::UnknownMachine, message).with_hint("stop it, and move it then")
                })?;
                Some(LiveGuest { accel, platform })
            }
        };
        let snapshots = record.snapshots.into_iter().map(|snapshot| HandOverSnapshot {
            name: snapshot.name,
            created_unix_ms: snapshot.created_unix_ms,
            quiesced: snapshot.quiesced,
        });
        Ok(HandOver {
            disks,
            snapshots: snapshots.collect(),
            created_unix_ms: record.created_unix_ms,
            start: record.start,
            live,
        })
    }

    /// Moves a VM whose guest does not run.
    async fn still(&self, since: &mut Vec<HeldLayer>) -> Result<Migrated, Refusal> {
        // Whoever has a disk open otherwise must not write any more.
        self.vm.close_exports();
        let began = Instant::now();
        let mut sent = Sent::default();
        let moved = async {
            self.round(since, &mut sent).await?;
            self.give_up_to_target(None).await
        };
        match moved.await {
            Ok(vm) => Ok(self.migrated(vm, began.elapsed(), &sent, 0)),
            Err(error) => {
                if self.outgoing.vms.get(self.name()).is_ok() {
                    self.vm.export().map_err(Refusal::internal)?;
                }
                Err(error)
            }
        }
    }

    /// Moves a VM whose guest runs on.
    async fn live(
        &self,
        guest: &Qemu,
        since: &mut Vec<HeldLayer>,
        progress: &ImportProgress,
    ) -> Result<Migrated, Refusal> {
        let failed = |e: qemu::VmError| {
            Refusal::new(Code::NotMoved, format!("'{}' stays on this node: {e}", self.name()))
        };
        let mut sent = Sent::default();
        self.rounds_until_small(since, &mut sent).await?;
        let socket = guest.memory_socket();
        let tunnel = self.tunnel(&socket).await?;
        let migration = guest.begin_migration(&socket, None).await.map_err(failed)?;
        let paused = {
            let report = |memory: MemoryProgress| {
                progress.begin(memory.transferred_bytes + memory.remaining_bytes);
                progress.add_done(memory.transferred_bytes);
            };
            let mut paused = pin!(migration.until_paused(report));
            loop {
                tokio::select! {
                    paused = &mut paused => break paused.map_err(failed)?,
                    () = tokio::time::sleep(ROUND_EVERY), if sent.rounds < ROUNDS_MAX => {
                        self.round(since, &mut sent).await?;
                    }
                }
            }
        };
        let began = Instant::now();
        tracing::info!(vm = %self.name(), progress = ?paused.progress(), rounds = sent.rounds, "move_paused_guest: the last of its disk is sent");
        self.reached("paused");
        if let Err(error) = self.round(since, &mut sent).await {
            if let Err(error) = paused.cancel().await {
                tracing::error!(vm = %self.name(), %error, "guest_not_resumed: cancelling its migration failed; it is tried again and again");
            }
            return Err(error);
        }
        self.reached("disk sent");
        let memory = paused.complete().await.map_err(failed)?;
        self.reached("memory sent");
        let moved = self.give_up_to_target(Some(guest)).await;
        tunnel.abort();
        moved.map(|vm| self.migrated(vm, began.elapsed(), &sent, memory.transferred_bytes))
    }

    /// Sends what was written after the layers `since`, until there is little left.
    async fn rounds_until_small(&self, since: &mut Vec<HeldLayer>, sent: &mut Sent) -> Result<(), Refusal> {
        let mut last = u64::MAX;
        loop {
            let before = sent.bytes;
            self.round(since, sent).await?;
            let bytes = sent.bytes - before;
            // Little enough, or a guest that writes as fast as that is sent.
            if bytes <= ROUND_BYTES_SMALL || bytes >= last || sent.rounds >= ROUNDS_MAX / 2 {
                return Ok(());
            }
            last = bytes;
        }
    }

    /// Freezes the disks and sends what was written after the layers `since`, which become those that were frozen.
    async fn round(&self, since: &mut Vec<HeldLayer>, sent: &mut Sent) -> Result<(), Refusal> {
        let frozen = self.freeze().await?;
        for (index, (frozen, since)) in (0..).zip(frozen.iter().zip(&*since)) {
            let (layers, _) = frozen.chain();
            let newer = layers.iter().take_while(|layer| layer.id() != since.id());
            let ranges = union(newer.map(|layer| layer.overlay().own_ranges()));
            sent.bytes += self.send(index, frozen, &ranges).await.map_err(|error| self.lost(&error))?;
        }
        sent.rounds += 1;
        *since = frozen;
        Ok(())
    }

    async fn send(&self, index: u8, layer: &Arc<Layer>, ranges: &[Range<u64>]) -> std::io::Result<u64> {
        let mut stream = self.connect(Cargo::Blocks(index)).await?;
        let mut sender = Sender::new(&mut stream);
        let mut buf = Vec::new();
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let len = (range.end - at).min(u64::from(wire::FRAME_BYTES_MAX));
                buf.resize(len as usize, 0);
                layer.read(at, &mut buf).await.map_err(std::io::Error::other)?;
                sender.send(at, &buf).await?;
                at += len;
            }
        }
        sender.finish().await
    }

    async fn connect(&self, cargo: Cargo) -> std::io::Result<impl Stream + Unpin + use<>> {
        let mut stream = self.outgoing.services.peers.connect(self.to).await?;
        wire::write_greeting(&mut stream, self.name(), cargo).await?;
        Ok(stream)
    }

    /// Listens at `socket` for the guest's memory, and carries it to the target.
    async fn tunnel(&self, socket: &Path) -> Result<tokio::task::JoinHandle<()>, Refusal> {
        let failed =
            |e: std::io::Error| Refusal::internal(format!("cannot listen at {}: {e}", socket.display()));
        match fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(socket).map_err(failed)?;
        let mut remote = self.connect(Cargo::Memory).await.map_err(|e| self.lost(&e))?;
        let name = self.name().clone();
        Ok(tokio::spawn(async move {
            let carried = async {
                let (mut local, _): (UnixStream, _) = listener.accept().await?;
                tokio::io::copy_bidirectional(&mut local, &mut remote).await
            };
            if let Err(error) = carried.await {
                tracing::warn!(vm = %name, %error, "memory_not_sent");
            }
        }))
    }

    /// Lets the target promise, gives the VM up, and lets the target take it. If that fails before the VM is given up,
    /// its guest goes on here.
    async fn give_up_to_target(&self, guest: Option<&Qemu>) -> Result<VmView, Refusal> {
        let promised = async {
            let path = format!("/v1/incoming/{}/promise", self.name());
            self.target.post::<()>(&path, &()).await.map_err(|e| self.refused(e))?;
            self.reached("promised");
            self.outgoing.give_up(self.vm, self.to).await
        };
        if let Err(error) = promised.await {
            if let Some(guest) = guest
                && let Err(error) = guest.resume().await
            {
                tracing::error!(vm = %self.name(), %error, "guest_not_resumed: its move failed and it stands still; it is tried again and again");
            }
            return Err(error);
        }
        self.reached("given up");
        let taken = self.outgoing.hand_over(self.name(), self.to).await;
        taken.map_err(|error| {
            let message = format!(
                "'{}' belongs to node {} now, which did not take it yet: {error}",
                self.name(),
                self.to.node
            );
            Refusal::new(Code::NotTaken, message)
                .with_hint("it does once it can be reached; nothing is to be done here")
        })
    }

    fn migrated(&self, vm: VmView, pause: Duration, sent: &Sent, memory_bytes: u64) -> Migrated {
        Migrated {
            vm,
            pause_ms: millis(pause),
            total_ms: 0,
            rounds: sent.rounds,
            disk_bytes: sent.bytes,
            memory_bytes,
        }
    }

    fn refused(&self, error: ClientError) -> Refusal {
        match error {
            ClientError::Refused(refusal) => refusal,
            other => Refusal::new(Code::NoTarget, format!("node {} cannot be asked: {other}", self.to.node))
                .with_hint(format!("'{}' stays where it is", self.name())),
        }
    }

    fn lost(&self, error: &std::io::Error) -> Refusal {
        let message =
            format!("what '{}' wrote cannot be sent to node {}: {error}", self.name(), self.to.node);
        Refusal::new(Code::NoTarget, message).with_hint("it stays where it is")
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
