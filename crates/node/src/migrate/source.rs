//! The node that a VM leaves.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{Disk, NodeName, VmName};
use image::ImportProgress;
use tokio::net::{UnixListener, UnixStream};

use super::super::clones::{Purpose, passing_name, union};
use super::super::entry::{Entry, Member, Record, Snapshot};
use super::super::layers::Layer;
use super::super::node::Node;
use super::super::snapshots::Quiesce;
use super::target::Stream;
use super::wire::{self, Cargo, Sender};
use control::api::compute::{
    HandOver, HandOverSnapshot, HandOverState, LiveGuest, MigrateVm, Migrated, MovingState, Vm,
};
use control::http::{ApiError, Client, ClientError, Target};
use identity::Principal;
use identity::tls::{self, Alpn, Expected};
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

/// What the other node may take for one step: it may have to start a hypervisor.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// What was sent of a VM's disk.
#[derive(Default)]
struct Sent {
    bytes: u64,
    rounds: u32,
}

impl Node {
    /// Moves a VM to another node.
    pub(crate) async fn migrate(
        self: &Arc<Self>,
        name: &VmName,
        request: MigrateVm,
        progress: Arc<ImportProgress>,
    ) -> Result<Migrated, ApiError> {
        let to = Member { node: request.to, address: request.address };
        let entry = self.vms.get_at_rest(name)?;
        if to.node == self.name {
            return Err(ApiError::bad_request(
                "same_node",
                format!("'{name}' is on node {} already", self.name),
            ));
        }
        self.must_not_be_exported(name)?;
        let moving = entry
            .begin_to_move(&to.node)
            .ok_or_else(|| ApiError::conflict("moving", format!("'{name}' is being moved already")))?;
        let began = Instant::now();
        let moved = Move { node: self, entry: &entry, to: &to, target: self.client_of(&to) };
        let outcome = moved.carry_out(progress).await;
        drop(moving);
        let mut migrated = outcome?;
        migrated.total_ms = millis(began.elapsed());
        tracing::info!(vm = %name, to = %to.node, pause_ms = migrated.pause_ms, "a VM was moved");
        Ok(migrated)
    }

    /// A client that speaks for this node.
    pub(super) fn client_of(&self, member: &Member) -> Client {
        let (address, principal) = (member.address.clone(), Principal::Node(member.node.clone()));
        let credentials = Arc::clone(&self.credentials);
        Client::new(Target::Tls { address, principal, credentials }).with_answer_time_max(STEP_TIMEOUT)
    }

    /// What becomes of a VM that another node is told to take.
    pub(crate) fn moving_state(&self, name: &VmName, to: &NodeName) -> MovingState {
        if self
            .vms
            .moved()
            .get(name)
            .and_then(|record| record.moved_to.as_ref())
            .is_some_and(|at| at.node == *to)
        {
            return MovingState::Moved;
        }
        match self.vms.get(name).ok().and_then(|entry| entry.moving()) {
            Some(moving) if moving == *to => MovingState::Moving,
            _ => MovingState::Not,
        }
    }

    /// Has the node that a VM belongs to take it, and forgets it here.
    async fn hand_over(&self, name: &VmName, to: &Member) -> Result<Vm, ClientError> {
        let vm: Vm = self.client_of(to).post(&format!("/v1/incoming/{name}/take"), &()).await?;
        self.reached("taken");
        self.vms.forget_moved(name).await;
        Ok(vm)
    }
}

/// Offers VMs that belong to other nodes to them, until dropped.
pub(crate) async fn hand_over_moved(node: &Node) {
    loop {
        tokio::time::sleep(OFFER_EVERY).await;
        let moved: Vec<Record> = node.vms.moved().values().cloned().collect();
        for record in moved {
            let Some(to) = &record.moved_to else { continue };
            match node.hand_over(&record.name, to).await {
                Ok(_) => tracing::info!(vm = %record.name, to = %to.node, "a VM was handed over"),
                Err(error) => {
                    tracing::warn!(vm = %record.name, to = %to.node, %error, "a VM cannot be handed over yet");
                }
            }
        }
    }
}

/// One VM on its way.
struct Move<'a> {
    node: &'a Arc<Node>,
    entry: &'a Arc<Entry>,
    to: &'a Member,
    target: Client,
}

impl Move<'_> {
    fn name(&self) -> &VmName {
        self.entry.name()
    }

    async fn carry_out(&self, progress: Arc<ImportProgress>) -> Result<Migrated, ApiError> {
        let guest = self.entry.running();
        let snapshots = self.carry_snapshots(&progress).await?;
        // All that is above this layer is still to be sent. It is held, so that it is not merged.
        let mut since = self.freeze().await?;
        let done = async {
            let state = self.carry(&since, Arc::clone(&progress)).await?;
            self.node.reached("carried");
            let offer = self.offer(guest.as_deref(), snapshots, state)?;
            self.with_target(guest.as_deref(), &offer, &mut since, &progress).await
        };
        let done = done.await;
        self.node.vms.release(since).await;
        done
    }

    /// Freezes the disk as it is; the layer is held.
    async fn freeze(&self) -> Result<Arc<Layer>, ApiError> {
        let vms = &self.node.vms;
        let _one_at_a_time = vms.lock(self.name()).lock().await;
        Ok(vms.freeze(self.entry, Quiesce::No, None).await?.layer)
    }

    /// Makes images that carry the snapshots.
    async fn carry_snapshots(
        &self,
        progress: &Arc<ImportProgress>,
    ) -> Result<Vec<HandOverSnapshot>, ApiError> {
        let mut carried = Vec::new();
        for Snapshot { name, created_unix_ms, quiesced, .. } in self.entry.record().snapshots {
            let (_, frozen) = self.node.vms.hold_snapshot(self.name(), &name).await?;
            let state = self.carry(&frozen, Arc::clone(progress)).await;
            self.node.vms.release(frozen).await;
            carried.push(HandOverSnapshot { name, created_unix_ms, quiesced, state: state? });
        }
        Ok(carried)
    }

    /// Makes an image that carries a frozen layer and what is below it, if that differs from the VM's own.
    async fn carry(
        &self,
        frozen: &Arc<Layer>,
        progress: Arc<ImportProgress>,
    ) -> Result<HandOverState, ApiError> {
        let snapshots = self.entry.record().snapshots;
        let snapshot_of = |layer: &Arc<Layer>| snapshots.iter().find(|known| known.layer == layer.id());
        let on = frozen.chain().0[1..].iter().find_map(snapshot_of).map(|snapshot| snapshot.name.clone());
        // The image's own.
        self.node.vms.layers.hold(frozen.id());
        let name = passing_name("move")?;
        let image = self.node.make_image(Arc::clone(frozen), &name, Purpose::Passing, progress).await?;
        if image.id == self.entry.record().image_id {
            return Ok(HandOverState { carried: None, on });
        }
        Ok(HandOverState { carried: Some(self.node.name_for_others(&image, &name).await?), on })
    }

    async fn with_target(
        &self,
        guest: Option<&Qemu>,
        offer: &HandOver,
        since: &mut Arc<Layer>,
        progress: &ImportProgress,
    ) -> Result<Migrated, ApiError> {
        let path = format!("/v1/incoming/{}", self.name());
        self.target.post::<()>(&format!("{path}/receive"), offer).await.map_err(|e| self.refused(e))?;
        self.node.reached("received");
        let moved = match guest {
            Some(guest) => self.live(guest, since, progress).await,
            None => self.still(since).await,
        };
        if moved.is_err() && !self.node.vms.moved().contains_key(self.name()) {
            // It asks us otherwise, and finds out.
            if let Err(error) = self.target.delete::<()>(&path).await {
                tracing::debug!(vm = %self.name(), %error, "the target could not be told that a VM does not come");
            }
        }
        moved
    }

    fn offer(
        &self,
        guest: Option<&Qemu>,
        snapshots: Vec<HandOverSnapshot>,
        state: HandOverState,
    ) -> Result<HandOver, ApiError> {
        let record = self.entry.record();
        let live = match guest {
            None => None,
            Some(guest) => {
                let spec = guest.spec().and_then(|spec| Some((spec.accel, spec.platform.clone()?)));
                let (accel, platform) = spec.ok_or_else(|| {
                    let message =
                        format!("the guest of '{}' was started by another version of VirtMan", record.name);
                    ApiError::conflict("unknown_machine", message).with_hint("stop it, and move it then")
                })?;
                Some(LiveGuest { accel, platform })
            }
        };
        Ok(HandOver {
            image: record.image,
            image_id: record.image_id,
            snapshots,
            state,
            size_bytes: record.size_bytes,
            created_unix_ms: record.created_unix_ms,
            serial: record.serial,
            start: record.start,
            live,
        })
    }

    /// Moves a VM whose guest does not run.
    async fn still(&self, since: &mut Arc<Layer>) -> Result<Migrated, ApiError> {
        // Whoever has the disk open otherwise must not write any more.
        self.entry.close_export();
        let began = Instant::now();
        let mut sent = Sent::default();
        let moved = async {
            self.round(since, &mut sent).await?;
            self.give_up_to_target(None).await
        };
        match moved.await {
            Ok(vm) => Ok(self.migrated(vm, began.elapsed(), &sent, 0)),
            Err(error) => {
                if self.node.vms.get(self.name()).is_ok() {
                    let socket = self.node.vms.disk_socket(self.name());
                    self.entry.export_at(&socket).map_err(ApiError::internal)?;
                }
                Err(error)
            }
        }
    }

    /// Moves a VM whose guest runs on.
    async fn live(
        &self,
        guest: &Qemu,
        since: &mut Arc<Layer>,
        progress: &ImportProgress,
    ) -> Result<Migrated, ApiError> {
        let failed = |e: qemu::VmError| {
            ApiError::conflict("not_moved", format!("'{}' stays on this node: {e}", self.name()))
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
        tracing::info!(vm = %self.name(), progress = ?paused.progress(), rounds = sent.rounds, "the guest stands still");
        self.node.reached("paused");
        if let Err(error) = self.round(since, &mut sent).await {
            if let Err(error) = paused.cancel().await {
                tracing::error!(vm = %self.name(), %error, "guest_not_resumed: cancelling its migration failed; it is tried again and again");
            }
            return Err(error);
        }
        self.node.reached("disk sent");
        let memory = paused.complete().await.map_err(failed)?;
        self.node.reached("memory sent");
        let moved = self.give_up_to_target(Some(guest)).await;
        tunnel.abort();
        moved.map(|vm| self.migrated(vm, began.elapsed(), &sent, memory.transferred_bytes))
    }

    /// Sends what was written after the layer `since`, until there is little left.
    async fn rounds_until_small(&self, since: &mut Arc<Layer>, sent: &mut Sent) -> Result<(), ApiError> {
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

    /// Freezes the disk and sends what was written after the layer `since`, which becomes the one that was frozen.
    async fn round(&self, since: &mut Arc<Layer>, sent: &mut Sent) -> Result<(), ApiError> {
        let frozen = self.freeze().await?;
        let (layers, _) = frozen.chain();
        let newer = layers.iter().take_while(|layer| layer.id() != since.id());
        let ranges = union(newer.map(|layer| layer.overlay().own_ranges()));
        match self.send(&frozen, &ranges).await {
            Ok(bytes) => {
                sent.bytes += bytes;
                sent.rounds += 1;
                self.node.vms.release(std::mem::replace(since, frozen)).await;
                Ok(())
            }
            Err(error) => {
                self.node.vms.release(frozen).await;
                Err(self.lost(&error))
            }
        }
    }

    async fn send(&self, layer: &Arc<Layer>, ranges: &[Range<u64>]) -> std::io::Result<u64> {
        let mut stream = self.connect(Cargo::Blocks).await?;
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
        let principal = Principal::Node(self.to.node.clone());
        let credentials = Arc::clone(&self.node.credentials);
        let expected = Expected::Member { credentials, principal };
        let stream = tls::connect(&self.to.address, &expected, Alpn::Move).await;
        let mut stream = stream.map_err(std::io::Error::other)?;
        wire::write_greeting(&mut stream, self.name(), cargo).await?;
        Ok(stream)
    }

    /// Listens at `socket` for the guest's memory, and carries it to the target.
    async fn tunnel(&self, socket: &Path) -> Result<tokio::task::JoinHandle<()>, ApiError> {
        let failed =
            |e: std::io::Error| ApiError::internal(format!("cannot listen at {}: {e}", socket.display()));
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
                tracing::warn!(vm = %name, %error, "a guest's memory does not arrive");
            }
        }))
    }

    /// Lets the target promise, gives the VM up, and lets the target take it. If that fails before the VM is given up,
    /// its guest goes on here.
    async fn give_up_to_target(&self, guest: Option<&Qemu>) -> Result<Vm, ApiError> {
        let promised = async {
            let path = format!("/v1/incoming/{}/promise", self.name());
            self.target.post::<()>(&path, &()).await.map_err(|e| self.refused(e))?;
            self.node.reached("promised");
            self.node.vms.give_up(self.entry, self.to).await
        };
        if let Err(error) = promised.await {
            if let Some(guest) = guest
                && let Err(error) = guest.resume().await
            {
                tracing::error!(vm = %self.name(), %error, "guest_not_resumed: its move failed and it stands still; it is tried again and again");
            }
            return Err(error);
        }
        self.node.reached("given up");
        let taken = self.node.hand_over(self.name(), self.to).await;
        taken.map_err(|error| {
            let message = format!(
                "'{}' belongs to node {} now, which did not take it yet: {error}",
                self.name(),
                self.to.node
            );
            ApiError::unavailable("not_taken", message)
                .with_hint("it does once it can be reached; nothing is to be done here")
        })
    }

    fn migrated(&self, vm: Vm, pause: Duration, sent: &Sent, memory_bytes: u64) -> Migrated {
        Migrated {
            vm,
            pause_ms: millis(pause),
            total_ms: 0,
            rounds: sent.rounds,
            disk_bytes: sent.bytes,
            memory_bytes,
        }
    }

    fn refused(&self, error: ClientError) -> ApiError {
        match error {
            ClientError::Refused(refusal) => refusal,
            other => {
                ApiError::unavailable("no_target", format!("node {} cannot be asked: {other}", self.to.node))
                    .with_hint(format!("'{}' stays where it is", self.name()))
            }
        }
    }

    fn lost(&self, error: &std::io::Error) -> ApiError {
        let message =
            format!("what '{}' wrote cannot be sent to node {}: {error}", self.name(), self.to.node);
        ApiError::unavailable("no_target", message).with_hint("it stays where it is")
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
