//! Volt's HTTP API for boot profiles.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::{ImageId, NodeName};
use image::{ProfileError, RootPage};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::Volt;
use crate::kept_profile::{KeptProfile, Recorded};
use crate::routes::{any_member, require_self};
use control::api::now_unix_ms;
use control::api::profile::{NewProfile, ProfileFile, ProfileSummary, ProfileView};
use control::api::volt::ImageRecord;
use control::http::{Json, Path, Peer};
use control::refusal::{Code, Refusal};

type Shared = State<Arc<Volt>>;
type Answer<T> = Result<Json<T>, Refusal>;

/// The routes about boot profiles.
pub(crate) fn routes() -> OpenApiRouter<Arc<Volt>> {
    OpenApiRouter::new()
        .routes(routes!(profile, import_profile, clear_profile))
        .routes(routes!(record_anew))
        .routes(routes!(add_record))
}

/// An image's boot profile.
#[utoipa::path(get, path = "/v1/images/{image}/profile", params(("image" = String, Path,)),
    responses((status = 200, body = ProfileView), (status = 404)))]
async fn profile(State(volt): Shared, peer: Peer, Path(image): Path<String>) -> Answer<ProfileView> {
    any_member(&peer)?;
    let image = volt.catalog.image(&image)?;
    view(&volt, image)
}

/// Takes a boot profile over.
///
/// Nodes use it from now on, and no boot is recorded until that is asked for.
#[utoipa::path(put, path = "/v1/images/{image}/profile", params(("image" = String, Path,)),
    request_body = NewProfile, responses((status = 200, body = ProfileView), (status = 400), (status = 404)))]
async fn import_profile(
    State(volt): Shared,
    peer: Peer,
    Path(image): Path<String>,
    Json(request): Json<NewProfile>,
) -> Answer<ProfileView> {
    peer.must_be_admin()?;
    let image = volt.catalog.image(&image)?;
    must_fit(&request.file, &image)?;
    tracing::info!(image = %image.name, by = %peer, chunks = request.file.0.chunks().len(), "profile_imported");
    change(&volt, &image.id, |kept| kept.import(request.file))?;
    view(&volt, image)
}

/// Forgets an image's boot profile and its records.
///
/// No boot is recorded until that is asked for.
#[utoipa::path(delete, path = "/v1/images/{image}/profile", params(("image" = String, Path,)),
    responses((status = 200, body = ProfileView), (status = 404)))]
async fn clear_profile(State(volt): Shared, peer: Peer, Path(image): Path<String>) -> Answer<ProfileView> {
    peer.must_be_admin()?;
    let image = volt.catalog.image(&image)?;
    tracing::info!(image = %image.name, by = %peer, "profile_cleared");
    change(&volt, &image.id, KeptProfile::clear)?;
    view(&volt, image)
}

/// Asks for fresh records from the next boots.
///
/// The profile stays until the first of them comes.
#[utoipa::path(post, path = "/v1/images/{image}/profile/record", params(("image" = String, Path,)),
    responses((status = 200, body = ProfileView), (status = 404)))]
async fn record_anew(State(volt): Shared, peer: Peer, Path(image): Path<String>) -> Answer<ProfileView> {
    peer.must_be_admin()?;
    let image = volt.catalog.image(&image)?;
    tracing::info!(image = %image.name, by = %peer, "profile_recording: the next boots are recorded");
    change(&volt, &image.id, KeptProfile::record_anew)?;
    view(&volt, image)
}

/// A node hands in the record of a boot.
///
/// One that is not needed any more is dropped.
#[utoipa::path(post, path = "/v1/nodes/{node}/records", params(("node" = String, Path,)),
    request_body = NewProfile, responses((status = 204), (status = 400), (status = 404), (status = 409)))]
async fn add_record(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(request): Json<NewProfile>,
) -> Result<StatusCode, Refusal> {
    require_self(&peer, &node)?;
    let id = request.file.0.image();
    let image = volt.catalog.image(&id.to_string())?;
    must_fit(&request.file, &image)?;
    if volt.cluster.placement(&node, &id).is_none() {
        let message = format!("node {node} has not attached '{}', so it cannot have booted it", image.name);
        return Err(Refusal::new(Code::NotAttached, message));
    }
    let chunks = request.file.0.chunks().len();
    if change(&volt, &id, |kept| kept.record(&node, request.file, now_unix_ms()))? == Recorded::Merged {
        tracing::info!(image = %image.name, %node, chunks, "boot_recorded");
    }
    Ok(StatusCode::NO_CONTENT)
}

fn change<T>(volt: &Volt, image: &ImageId, change: impl FnOnce(&mut KeptProfile) -> T) -> Result<T, Refusal> {
    Ok(volt.profiles.change(image, change, |offer| volt.cluster.push_profile(image, &offer))?)
}

fn view(volt: &Volt, image: ImageRecord) -> Answer<ProfileView> {
    let kept = volt.profiles.kept(&image.id)?;
    Ok(Json(ProfileView {
        name: image.name,
        image: image.id,
        recording: kept.recording,
        records: kept.records(),
        profile: kept.file.as_ref().map(ProfileSummary::of),
    }))
}

fn must_fit(file: &ProfileFile, image: &ImageRecord) -> Result<(), Refusal> {
    let damaged = |why: String| {
        Refusal::internal(format!("the root page of '{}' in the catalog is damaged: {why}", image.name))
    };
    let bytes = BASE64.decode(&image.root_page).map_err(|e| damaged(e.to_string()))?;
    let root = RootPage::decode(&bytes).map_err(|e| damaged(e.to_string()))?;
    file.0.must_fit(&root).map_err(|e: ProfileError| Refusal::new(Code::BadProfile, e.to_string()))
}
