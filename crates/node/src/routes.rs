//! A node's HTTP API: who may ask what, and what follows.
//!
//! Only administrators may: the one on this host through the UNIX socket, others by certificate. Nodes
//! have nothing to command each other; they speak over links. But a node takes a VM from the node that an administrator
//! named to it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use block::{DiskId, ImageName, SnapshotName, VmName};
use futures_util::{Stream, stream};
use image::ImportProgress;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::images::retention::Destroy;
use crate::node::Node;
use crate::service::origins::Force;
use crate::tasks::run_uncancelled;
use crate::vms::snapshots::Quiesce;
use control::api::compute::{
    AddImage, AddMedium, CloneVm, CommitVm, CreateVm, ExpectVm, HandOver, ImageVerified, MediumView,
    MigrateVm, Migrated, MovingState, NodeImage, NodeStatus, Progress, RemoveMedium, SnapshotTaken,
    SnapshotView, StartVm, StopVm, TakeSnapshot, Vm, VmReady, VmStarted, WaitReady,
};
use control::api::details::VmDetails;
use control::api::disk::DiskView;
use control::api::export::{ExportAccess, ExportName, ExportView};
use control::api::openapi_document;
use control::api::qcow2::{ExportSnapshot, ImportVm, SnapshotExported, VmImported};
use control::http::{Json, Path, Peer, Query, lines};
use control::refusal::{Code, Refusal};
use identity::Principal;

/// How often a long operation says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

type Shared = State<Arc<Node>>;
type Answer<T> = Result<Json<T>, Refusal>;

/// The routes of a node.
pub(crate) fn routes() -> OpenApiRouter<Arc<Node>> {
    OpenApiRouter::with_openapi(openapi_document("VirtMan node API"))
        .routes(routes!(status))
        .routes(routes!(cache, add_medium))
        .routes(routes!(remove_medium))
        .routes(routes!(images))
        .routes(routes!(add_image, remove_image))
        .routes(routes!(verify_image))
        .routes(routes!(attach_image, detach_image))
        .routes(routes!(vms))
        .routes(routes!(vm, create_vm, destroy_vm))
        .routes(routes!(vm_details))
        .routes(routes!(disks))
        .routes(routes!(disk))
        .routes(routes!(import_vm))
        .routes(routes!(last_start, start_vm))
        .routes(routes!(wait_vm))
        .routes(routes!(stop_vm))
        .routes(routes!(snapshots))
        .routes(routes!(take_snapshot, delete_snapshot))
        .routes(routes!(revert_vm))
        .routes(routes!(export_snapshot))
        .routes(routes!(clone_vm))
        .routes(routes!(commit_vm))
        .routes(routes!(migrate_vm))
        .routes(routes!(moving))
        .routes(routes!(expect_vm, forget_vm))
        .routes(routes!(receive_vm))
        .routes(routes!(promise_vm))
        .routes(routes!(take_vm))
        .routes(routes!(exports))
        .routes(routes!(add_export, remove_export))
}

/// The node at a glance.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = NodeStatus)))]
async fn status(State(node): Shared, peer: Peer) -> Answer<NodeStatus> {
    peer.must_be_admin()?;
    Ok(Json(node.details.status()))
}

/// The media of the node's cache group.
#[utoipa::path(get, path = "/v1/cache", responses((status = 200, body = Vec<MediumView>)))]
async fn cache(State(node): Shared, peer: Peer) -> Answer<Vec<MediumView>> {
    peer.must_be_admin()?;
    Ok(Json(node.cache.list()))
}

/// Adds a medium to the node's cache group, with the chunks that are on it.
///
/// Repeating it changes nothing.
#[utoipa::path(put, path = "/v1/cache", request_body = AddMedium,
    responses((status = 200, body = MediumView), (status = 400), (status = 409)))]
async fn add_medium(State(node): Shared, peer: Peer, Json(request): Json<AddMedium>) -> Answer<MediumView> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.cache.add(&request).await.map(Json) }).await
}

/// Removes a medium from the node's cache group; its file stays.
///
/// Answers with the medium if reads of it are still on their way, else with `null`. The path is in the body, as no
/// address holds every path; hence no `DELETE`.
#[utoipa::path(post, path = "/v1/cache/remove", request_body = RemoveMedium,
    responses((status = 200, body = Option<MediumView>), (status = 404), (status = 409)))]
async fn remove_medium(
    State(node): Shared,
    peer: Peer,
    Json(request): Json<RemoveMedium>,
) -> Answer<Option<MediumView>> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.cache.remove(&request).await.map(Json) }).await
}

/// The images that the node has attached.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<NodeImage>)))]
async fn images(State(node): Shared, peer: Peer) -> Answer<Vec<NodeImage>> {
    peer.must_be_admin()?;
    Ok(Json(node.images.images.all().iter().map(|attached| node.images.describe(attached)).collect()))
}

/// Makes the node the origin of an image.
///
/// Answers with a line of progress now and then, the last of which says what came of it. A client that hangs up cancels
/// it.
#[utoipa::path(post, path = "/v1/images/{image}", params(("image" = String, Path,)), request_body = AddImage,
    responses((status = 200, body = Progress<NodeImage>, content_type = "application/x-ndjson")))]
async fn add_image(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ImageName>,
    Json(request): Json<AddImage>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| async move { node.origins.add(&name, request, progress).await }))
}

/// Reads an image of which the node is the origin again, and compares every chunk.
///
/// Answers like adding.
#[utoipa::path(post, path = "/v1/images/{image}/verify", params(("image" = String, Path,)),
    responses((status = 200, body = Progress<ImageVerified>, content_type = "application/x-ndjson")))]
async fn verify_image(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ImageName>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| async move { node.origins.verify(&name, progress).await }))
}

/// How an image is removed.
#[derive(Debug, Deserialize)]
struct Removal {
    #[serde(default)]
    force: bool,
}

/// Takes an image's name out of the catalog, and forgets what the node kept of it.
#[utoipa::path(delete, path = "/v1/images/{image}", params(("image" = String, Path,), ("force" = Option<bool>, Query,)),
    responses((status = 204), (status = 404), (status = 409)))]
async fn remove_image(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ImageName>,
    Query(removal): Query<Removal>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    let force = if removal.force { Force::Yes } else { Force::No };
    run_uncancelled(async move { node.origins.remove(&name, force).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How an image is attached.
#[derive(Debug, Deserialize)]
struct Attaching {
    /// Whether all of it is fetched, while nobody waits for it.
    #[serde(default)]
    fill: bool,
}

/// Attaches an image.
///
/// It stays attached until it is detached here.
#[utoipa::path(put, path = "/v1/attached/{image}", params(("image" = String, Path,), ("fill" = Option<bool>, Query,)),
    responses((status = 200, body = NodeImage), (status = 404), (status = 409), (status = 503)))]
async fn attach_image(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ImageName>,
    Query(attaching): Query<Attaching>,
) -> Answer<NodeImage> {
    peer.must_be_admin()?;
    run_uncancelled(async move {
        let attached = node.images.attach_to_stay(&name).await?;
        if attaching.fill {
            node.images.images.prefetch(&attached)?;
        }
        Ok(Json(node.images.describe(&attached)))
    })
    .await
}

/// Detaches an image that no VM of the node uses.
#[utoipa::path(delete, path = "/v1/attached/{image}", params(("image" = String, Path,)),
    responses((status = 204), (status = 404), (status = 409)))]
async fn detach_image(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ImageName>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.images.detach(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The node's VMs.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, body = Vec<Vm>)))]
async fn vms(State(node): Shared, peer: Peer) -> Answer<Vec<Vm>> {
    peer.must_be_admin()?;
    Ok(Json(node.vms.all().iter().map(|vm| node.vms.describe(vm)).collect()))
}

/// One VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", params(("vm" = String, Path,)),
    responses((status = 200, body = Vm), (status = 404)))]
async fn vm(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<Vm> {
    peer.must_be_admin()?;
    Ok(Json(node.vms.describe(&*node.vms.get(&name)?)))
}

/// The disks of all VMs.
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<DiskView>)))]
async fn disks(State(node): Shared, peer: Peer) -> Answer<Vec<DiskView>> {
    peer.must_be_admin()?;
    Ok(Json(node.vms.all().iter().flat_map(|vm| node.vms.describe_disks(vm)).collect()))
}

/// One disk, by its id.
#[utoipa::path(get, path = "/v1/disks/{disk}", params(("disk" = String, Path,)),
    responses((status = 200, body = DiskView), (status = 404)))]
async fn disk(State(node): Shared, peer: Peer, Path(id): Path<DiskId>) -> Answer<DiskView> {
    peer.must_be_admin()?;
    node.vms.describe_disk(&id).map(Json)
}

/// Everything about one VM.
#[utoipa::path(get, path = "/v1/vms/{vm}/details", params(("vm" = String, Path,)),
    responses((status = 200, body = VmDetails), (status = 404)))]
async fn vm_details(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<VmDetails> {
    peer.must_be_admin()?;
    tokio::task::block_in_place(|| node.details.of_vm(&name)).map(Json)
}

/// Gives a new VM a disk that goes on where a qcow2 file ends.
///
/// Answers like adding an image.
#[utoipa::path(post, path = "/v1/vms/{vm}/import", params(("vm" = String, Path,)), request_body = ImportVm,
    responses((status = 200, body = Progress<VmImported>, content_type = "application/x-ndjson")))]
async fn import_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<ImportVm>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| {
        run_uncancelled(async move { node.qcow2.import_vm(&name, request, progress).await })
    }))
}

/// Gives a VM a private disk on an image.
///
/// Repeating it changes nothing.
#[utoipa::path(put, path = "/v1/vms/{vm}", params(("vm" = String, Path,)), request_body = CreateVm,
    responses((status = 200, body = Vm), (status = 404), (status = 409)))]
async fn create_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<CreateVm>,
) -> Answer<Vm> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.vm_service.create(&name, &request).await.map(Json) }).await
}

/// How a VM is destroyed.
#[derive(Debug, Deserialize)]
struct Destruction {
    /// Whether its image stays attached though nobody uses it.
    #[serde(default)]
    instance_only: bool,
}

/// Removes a VM with its disk.
///
/// A running guest is ended. An image that was attached for VMs and that nobody on the node uses any more is detached
/// after a while, unless only the instance is to go.
#[utoipa::path(delete, path = "/v1/vms/{vm}", params(("vm" = String, Path,), ("instance_only" = Option<bool>, Query,)),
    responses((status = 204), (status = 404)))]
async fn destroy_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Query(destruction): Query<Destruction>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    let destroy = if destruction.instance_only { Destroy::InstanceOnly } else { Destroy::WithImage };
    run_uncancelled(async move { node.vm_service.destroy(&name, destroy).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// How a VM's guest was started last, to start others in the same way.
#[utoipa::path(get, path = "/v1/vms/{vm}/start", params(("vm" = String, Path,)),
    responses((status = 200, body = StartVm), (status = 404), (status = 409)))]
async fn last_start(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<StartVm> {
    peer.must_be_admin()?;
    node.guests.last_start(&name).map(Json)
}

/// Starts a guest on a VM's disk.
///
/// If one runs, that is it.
#[utoipa::path(post, path = "/v1/vms/{vm}/start", params(("vm" = String, Path,)), request_body = StartVm,
    responses((status = 200, body = VmStarted), (status = 404)))]
async fn start_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<StartVm>,
) -> Answer<VmStarted> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.guests.start(&name, &request).await.map(Json) }).await
}

/// Waits until a VM's guest is ready.
#[utoipa::path(post, path = "/v1/vms/{vm}/wait", params(("vm" = String, Path,)), request_body = WaitReady,
    responses((status = 200, body = VmReady), (status = 404), (status = 409)))]
async fn wait_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<WaitReady>,
) -> Answer<VmReady> {
    peer.must_be_admin()?;
    node.guests.wait(&name, &request.ready, Duration::from_millis(request.timeout_ms)).await.map(Json)
}

/// Ends a VM's guest; its disk stays.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", params(("vm" = String, Path,)), request_body = StopVm,
    responses((status = 200, body = Vm), (status = 404)))]
async fn stop_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<StopVm>,
) -> Answer<Vm> {
    peer.must_be_admin()?;
    let grace = Duration::from_millis(request.grace_ms);
    run_uncancelled(async move { node.guests.stop(&name, grace).await.map(Json) }).await
}

/// The snapshots of a VM's disk, from old to new.
#[utoipa::path(get, path = "/v1/vms/{vm}/snapshots", params(("vm" = String, Path,)),
    responses((status = 200, body = Vec<SnapshotView>), (status = 404)))]
async fn snapshots(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<Vec<SnapshotView>> {
    peer.must_be_admin()?;
    tokio::task::block_in_place(|| node.snapshots.list(&name)).map(Json)
}

/// Takes a snapshot of a VM's disk, while its guest runs or not.
#[utoipa::path(put, path = "/v1/vms/{vm}/snapshots/{snapshot}",
    params(("vm" = String, Path,), ("snapshot" = String, Path,)), request_body = TakeSnapshot,
    responses((status = 200, body = SnapshotTaken), (status = 404), (status = 409)))]
async fn take_snapshot(
    State(node): Shared,
    peer: Peer,
    Path((name, snapshot)): Path<(VmName, SnapshotName)>,
    Json(request): Json<TakeSnapshot>,
) -> Answer<SnapshotTaken> {
    peer.must_be_admin()?;
    let quiesce = Quiesce::of(request.quiesce);
    run_uncancelled(async move { node.snapshots.take(&name, &snapshot, quiesce).await.map(Json) }).await
}

/// Gives a snapshot up.
#[utoipa::path(delete, path = "/v1/vms/{vm}/snapshots/{snapshot}",
    params(("vm" = String, Path,), ("snapshot" = String, Path,)), responses((status = 204), (status = 404)))]
async fn delete_snapshot(
    State(node): Shared,
    peer: Peer,
    Path((name, snapshot)): Path<(VmName, SnapshotName)>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.snapshots.delete(&name, &snapshot).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sets a VM's disk back to a snapshot.
///
/// Its guest must not run; whoever has the disk open is disconnected.
#[utoipa::path(post, path = "/v1/vms/{vm}/snapshots/{snapshot}/revert",
    params(("vm" = String, Path,), ("snapshot" = String, Path,)),
    responses((status = 200, body = Vm), (status = 404), (status = 409)))]
async fn revert_vm(
    State(node): Shared,
    peer: Peer,
    Path((name, snapshot)): Path<(VmName, SnapshotName)>,
) -> Answer<Vm> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.snapshots.revert(&name, &snapshot).await.map(Json) }).await
}

/// Writes a snapshot as a qcow2 file on the node, and takes it first if that is asked for.
///
/// Answers like adding an image.
#[utoipa::path(post, path = "/v1/vms/{vm}/snapshots/{snapshot}/export",
    params(("vm" = String, Path,), ("snapshot" = String, Path,)), request_body = ExportSnapshot,
    responses((status = 200, body = Progress<SnapshotExported>, content_type = "application/x-ndjson")))]
async fn export_snapshot(
    State(node): Shared,
    peer: Peer,
    Path((name, snapshot)): Path<(VmName, SnapshotName)>,
    Json(request): Json<ExportSnapshot>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| {
        run_uncancelled(async move { node.qcow2.export_snapshot(&name, &snapshot, request, progress).await })
    }))
}

/// Clones a VM's disk on the node, while its guest runs or not.
#[utoipa::path(post, path = "/v1/vms/{vm}/clones", params(("vm" = String, Path,)), request_body = CloneVm,
    responses((status = 200, body = Vec<Vm>), (status = 404), (status = 409)))]
async fn clone_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<CloneVm>,
) -> Answer<Vec<Vm>> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.clones.clone_here(&name, &request).await.map(Json) }).await
}

/// Makes an image of the present state of a VM's disk, whose origin the node is.
///
/// Answers like adding an image.
#[utoipa::path(post, path = "/v1/vms/{vm}/commit", params(("vm" = String, Path,)), request_body = CommitVm,
    responses((status = 200, body = Progress<NodeImage>, content_type = "application/x-ndjson")))]
async fn commit_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<CommitVm>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| async move { node.clones.commit(&name, request, progress).await }))
}

/// Moves a VM to another node, which was told to expect it; its guest runs on there if it runs.
///
/// Answers like adding an image. A client that hangs up cancels it as long as the disk is hashed; from then on it is
/// carried out.
#[utoipa::path(post, path = "/v1/vms/{vm}/migrate", params(("vm" = String, Path,)), request_body = MigrateVm,
    responses((status = 200, body = Progress<Migrated>, content_type = "application/x-ndjson")))]
async fn migrate_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<MigrateVm>,
) -> Result<Response, Refusal> {
    peer.must_be_admin()?;
    let shutdown = node.shutdown.clone();
    Ok(with_progress(shutdown, |progress| {
        run_uncancelled(async move { node.outgoing.migrate(&name, request, progress).await })
    }))
}

/// What becomes of a VM that the node that asks was told to take.
#[utoipa::path(get, path = "/v1/vms/{vm}/moving", params(("vm" = String, Path,)),
    responses((status = 200, body = MovingState)))]
async fn moving(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<MovingState> {
    match peer {
        Peer::Remote(Principal::Node(to)) => Ok(Json(node.outgoing.moving_state(&name, &to))),
        other => Err(Refusal::new(Code::NotANode, format!("{other} is not a node"))),
    }
}

/// Lets a VM come from another node, within ten minutes.
#[utoipa::path(put, path = "/v1/incoming/{vm}", params(("vm" = String, Path,)), request_body = ExpectVm,
    responses((status = 204), (status = 409)))]
async fn expect_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<ExpectVm>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    node.incoming.expect(&name, &request)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Prepares for a VM.
///
/// For the node that brings it, as are the next three.
#[utoipa::path(post, path = "/v1/incoming/{vm}/receive", params(("vm" = String, Path,)), request_body = HandOver,
    responses((status = 204), (status = 403), (status = 409)))]
async fn receive_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
    Json(request): Json<HandOver>,
) -> Result<StatusCode, Refusal> {
    run_uncancelled(async move { node.incoming.receive(&peer, &name, request).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Promises that a VM can be taken over.
#[utoipa::path(post, path = "/v1/incoming/{vm}/promise", params(("vm" = String, Path,)),
    responses((status = 204), (status = 404), (status = 409)))]
async fn promise_vm(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<VmName>,
) -> Result<StatusCode, Refusal> {
    run_uncancelled(async move { node.incoming.promise(&peer, &name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Takes a VM over.
#[utoipa::path(post, path = "/v1/incoming/{vm}/take", params(("vm" = String, Path,)),
    responses((status = 200, body = Vm), (status = 404), (status = 409)))]
async fn take_vm(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Answer<Vm> {
    run_uncancelled(async move { node.incoming.take_over(&peer, &name).await.map(Json) }).await
}

/// Forgets a VM that does not come.
#[utoipa::path(delete, path = "/v1/incoming/{vm}", params(("vm" = String, Path,)),
    responses((status = 204), (status = 404)))]
async fn forget_vm(State(node): Shared, peer: Peer, Path(name): Path<VmName>) -> Result<StatusCode, Refusal> {
    run_uncancelled(async move { node.incoming.forget_for(&peer, &name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// All ways to the disks and images of the node.
#[utoipa::path(get, path = "/v1/exports", responses((status = 200, body = Vec<ExportView>)))]
async fn exports(State(node): Shared, peer: Peer) -> Answer<Vec<ExportView>> {
    peer.must_be_admin()?;
    Ok(Json(node.exports.describe()))
}

/// Exports a VM's disk, or an image, read-only, over a protocol.
///
/// An image is attached first. Other access than before ends the sessions that there are; repeating it changes nothing.
#[utoipa::path(put, path = "/v1/exports/{name}", params(("name" = String, Path,)), request_body = ExportAccess,
    responses((status = 200, body = ExportView), (status = 400), (status = 404), (status = 409)))]
async fn add_export(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ExportName>,
    Json(request): Json<ExportAccess>,
) -> Answer<ExportView> {
    peer.must_be_admin()?;
    run_uncancelled(async move { node.vm_service.export(&name, request).await.map(Json) }).await
}

/// Ends the export of a VM's disk or an image, but for NBD's.
///
/// Its sessions have ended when this answers.
#[utoipa::path(delete, path = "/v1/exports/{name}", params(("name" = String, Path,)),
    responses((status = 204), (status = 404)))]
async fn remove_export(
    State(node): Shared,
    peer: Peer,
    Path(name): Path<ExportName>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    run_uncancelled(async move {
        match node.exports.stop(&name).await? {
            true => Ok(()),
            false => Err(Refusal::new(
                Code::NoSuchExport,
                format!("'{name}' is not exported by node {}", node.name),
            )
            .with_hint("'virtman export list' shows all exports")),
        }
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Cancels the work when it is dropped before its end: whoever asked has hung up.
struct CancelOnDrop(Arc<ImportProgress>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Answers with lines that say how far `work` is, the last of which is its result.
fn with_progress<T, W>(shutdown: CancellationToken, work: impl FnOnce(Arc<ImportProgress>) -> W) -> Response
where
    T: Serialize + Send + 'static,
    W: Future<Output = Result<T, Refusal>> + Send + 'static,
{
    let progress = Arc::new(ImportProgress::default());
    lines(reported(work(Arc::clone(&progress)), progress), shutdown)
}

/// Turns work into a stream of how far it is, with its result as the last value.
fn reported<T: Serialize + Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
    progress: Arc<ImportProgress>,
) -> impl Stream<Item = Progress<T>> + Send {
    type Work<T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send>>;
    let work: Work<T> = Box::pin(work);
    let guard = CancelOnDrop(progress);
    stream::unfold(Some((work, guard)), |state| async move {
        let (mut work, guard) = state?;
        match tokio::time::timeout(PROGRESS_EVERY, &mut work).await {
            Ok(Ok(result)) => Some((Progress::Done { result }, None)),
            Ok(Err(error)) => Some((Progress::Failed { message: error.to_string() }, None)),
            Err(_) => {
                let (done, total) = (guard.0.bytes_done(), guard.0.bytes_total());
                Some((Progress::Bytes { done, total }, Some((work, guard))))
            }
        }
    })
}
