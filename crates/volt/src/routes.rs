//! Volt's HTTP API: who may ask what, and what follows.
//!
//! Every route stands once, with its path, its schema and its handler; the OpenAPI document is made from
//! the same table. Administrators may ask everything; a node may speak for itself alone.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::{ImageId, ImageName, NameError, NodeName};
use futures_util::stream;
use image::RootPage;
use planner::{Event, Role, Standing};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Volt;
use super::catalog::CatalogError;
use super::cluster::Notice;
use control::api::volt::{
    AttachImage, Attachment, DetachImage, ImageRecord, NewToken, NodeRecord, NodeReport, NodeState, Push,
    RegisterImage, RegisterNode, Registered, TokenIssued, TreeNode, TreeView, TuneImage, VoltStatus,
};
use control::api::{now_unix_ms, unix_ms};
use control::http::{Json, Path, Peer, lines};
use control::refusal::{Code, Refusal};
use identity::{Principal, TOKEN_LIFETIME};

/// How long a token may work at most: a week is longer than any roll-out.
const TOKEN_VALID_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

type Shared = State<Arc<Volt>>;
type Answer<T> = Result<Json<T>, Refusal>;

/// The routes for requests that carry a certificate or came through the local socket.
pub(crate) fn routes() -> OpenApiRouter<Arc<Volt>> {
    OpenApiRouter::with_openapi(control::api::openapi_document("VirtMan Volt API"))
        .routes(routes!(status))
        .routes(routes!(images))
        .routes(routes!(image, register_image, remove_image))
        .routes(routes!(tree))
        .routes(routes!(tune))
        .routes(routes!(new_token))
        .routes(routes!(register_node, remove_node))
        .routes(routes!(pardon))
        .routes(routes!(heartbeat))
        .routes(routes!(pushes))
        .routes(routes!(attach))
        .routes(routes!(detach))
        .routes(routes!(leave))
        .routes(routes!(report))
}

/// The whole cluster at a glance: nodes and images.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = VoltStatus)))]
async fn status(State(volt): Shared, peer: Peer) -> Answer<VoltStatus> {
    any_member(&peer)?;
    let nodes = volt.catalog.nodes()?;
    let nodes = nodes
        .into_iter()
        .map(|(node, record)| {
            let view = volt.cluster.with_planner(|planner| planner.node(&node));
            let state = match &view {
                None => NodeState::Down,
                Some(view) if view.standing == Standing::Quarantined => NodeState::Quarantined,
                Some(_) => NodeState::Up,
            };
            let (address, location, version) = (record.address, record.location, record.version);
            NodeRecord { node, address, location, state, version }
        })
        .collect();
    let images = volt.catalog.images()?;
    Ok(Json(VoltStatus { version: env!("CARGO_PKG_VERSION").to_owned(), nodes, images }))
}

/// Searches the catalog: all images.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<ImageRecord>)))]
async fn images(State(volt): Shared, peer: Peer) -> Answer<Vec<ImageRecord>> {
    any_member(&peer)?;
    Ok(Json(volt.catalog.images()?))
}

/// Searches the catalog: one image, by its name with tag or its id.
#[utoipa::path(get, path = "/v1/images/{image}", params(("image" = String, Path,)),
    responses((status = 200, body = ImageRecord), (status = 404)))]
async fn image(State(volt): Shared, peer: Peer, Path(image): Path<String>) -> Answer<ImageRecord> {
    any_member(&peer)?;
    Ok(Json(volt.catalog.image(&image)?))
}

/// Registers an image: gives it a name and notes that the node that asks holds it whole.
#[utoipa::path(put, path = "/v1/images/{image}", params(("image" = String, Path,)),
    request_body = RegisterImage, responses((status = 200, body = ImageRecord), (status = 409)))]
async fn register_image(
    State(volt): Shared,
    peer: Peer,
    Path(name): Path<String>,
    Json(request): Json<RegisterImage>,
) -> Answer<ImageRecord> {
    let Peer::Remote(Principal::Node(origin)) = peer else {
        return Err(Refusal::new(Code::NotANode, "only a node can register an image: it becomes its origin"));
    };
    let name: ImageName = name.parse().map_err(|e: NameError| Refusal::new(Code::BadName, e.to_string()))?;
    let bytes = BASE64
        .decode(&request.root_page)
        .map_err(|e| Refusal::new(Code::BadRootPage, format!("the root page is not base64: {e}")))?;
    let root = RootPage::decode(&bytes)
        .map_err(|e| Refusal::new(Code::BadRootPage, format!("the root page of '{name}' is refused: {e}")))?;
    let record = ImageRecord {
        name,
        id: root.id(),
        kind: request.kind,
        root_page: request.root_page,
        size_bytes: root.size_bytes(),
        chunks: root.chunk_count(),
        zero_chunks: root.zero_chunks(),
        added_unix_ms: now_unix_ms(),
        origins: Vec::new(),
        shaping: None,
    };
    let record = volt.catalog.add_image(&record, &origin)?;
    tracing::info!(image = %record.name, id = %record.id, %origin, "image_registered");
    Ok(Json(record))
}

/// Removes an image's metadata.
///
/// Nodes that use it go on; nobody can attach it by this name any more.
#[utoipa::path(delete, path = "/v1/images/{image}", params(("image" = String, Path,)),
    responses((status = 200, body = ImageRecord), (status = 404)))]
async fn remove_image(State(volt): Shared, peer: Peer, Path(name): Path<String>) -> Answer<ImageRecord> {
    any_member(&peer)?;
    let name: ImageName = name.parse().map_err(|e: NameError| Refusal::new(Code::BadName, e.to_string()))?;
    let record = volt.catalog.image(name.as_str())?;
    if let Peer::Remote(Principal::Node(node)) = &peer
        && !record.origins.contains(node)
    {
        return Err(Refusal::new(Code::NotItsOrigin, "a node can only remove images whose origin it is"));
    }
    let record = volt.catalog.remove_image(&name)?;
    if matches!(volt.catalog.image(&record.id.to_string()), Err(CatalogError::NoImage(_))) {
        volt.profiles.forget(&record.id)?;
        volt.apply(Event::Tune { image: record.id, shaping: None });
    }
    tracing::info!(image = %name, by = %peer, "image_removed: it is no longer in the catalog");
    Ok(Json(record))
}

/// The hierarchy of an image: one tree a stripe.
#[utoipa::path(get, path = "/v1/images/{image}/tree", params(("image" = String, Path,)),
    responses((status = 200, body = TreeView), (status = 404)))]
async fn tree(State(volt): Shared, peer: Peer, Path(image): Path<String>) -> Answer<TreeView> {
    any_member(&peer)?;
    let image = volt.catalog.image(&image)?;
    let tree = volt.cluster.with_planner(|planner| planner.tree(&image.id));
    let shape = tree.as_ref().map(|tree| tree.shape);
    let place =
        |at: planner::TreeNode| TreeNode { node: at.node, parent: at.parent, depth: at.depth, role: at.role };
    let stripes = tree.map(|tree| tree.stripes).unwrap_or_default();
    let stripes = stripes.into_iter().map(|stripe| stripe.into_iter().map(place).collect()).collect();
    Ok(Json(TreeView { image, shape, stripes }))
}

/// Says how an image's hierarchy gets its shape.
///
/// Where that makes another shape, its nodes get new places.
#[utoipa::path(put, path = "/v1/images/{image}/shape", params(("image" = String, Path,)),
    request_body = TuneImage, responses((status = 200, body = ImageRecord), (status = 404)))]
async fn tune(
    State(volt): Shared,
    peer: Peer,
    Path(image): Path<String>,
    Json(request): Json<TuneImage>,
) -> Answer<ImageRecord> {
    peer.must_be_admin()?;
    let record = volt.catalog.tune_image(&image, request.shaping)?;
    volt.apply(Event::Tune { image: record.id, shaping: record.shaping });
    tracing::info!(%image, shaping = ?request.shaping, by = %peer, "image_tuned");
    Ok(Json(record))
}

/// Issues a one-time token with which a host can join.
#[utoipa::path(post, path = "/v1/tokens", request_body = NewToken,
    responses((status = 200, body = TokenIssued)))]
async fn new_token(State(volt): Shared, peer: Peer, Json(request): Json<NewToken>) -> Answer<TokenIssued> {
    peer.must_be_admin()?;
    let valid = request.valid_ms.map_or(TOKEN_LIFETIME, Duration::from_millis);
    if valid.is_zero() || valid > TOKEN_VALID_MAX {
        return Err(Refusal::new(
            Code::BadLifetime,
            format!(
                "a token cannot be valid for {} s: use at most {} days",
                valid.as_secs(),
                TOKEN_VALID_MAX.as_secs() / 86_400
            ),
        ));
    }
    let now = SystemTime::now();
    let expires = now + valid;
    let token = volt.new_join_token()?;
    volt.catalog.add_token(&token.grant(expires, request.node.clone()), now)?;
    tracing::info!(by = %peer, "join_token_issued");
    Ok(Json(TokenIssued { token: token.to_string(), expires_unix_ms: unix_ms(expires) }))
}

/// A node announces itself.
#[utoipa::path(put, path = "/v1/nodes/{node}", params(("node" = String, Path,)),
    request_body = RegisterNode, responses((status = 200, body = Registered)))]
async fn register_node(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(request): Json<RegisterNode>,
) -> Answer<Registered> {
    require_self(&peer, &node)?;
    let location = request.location;
    volt.catalog.update_node(&node, |record| {
        record.address.clone_from(&request.address);
        record.location = location.as_str().to_owned();
        record.version.clone_from(&request.version);
    })?;
    let notices =
        volt.apply(Event::NodeUp { node: node.clone(), address: request.address.clone(), location });
    if notices.contains(&Notice::Full(node.clone())) {
        return Err(Refusal::new(
            Code::ClusterFull,
            format!("the cluster has {} nodes and takes no more", planner::NODES_MAX),
        ));
    }
    tracing::info!(%node, address = request.address, "node_registered");
    Ok(Json(Registered { lease_ms: u64::try_from(volt.cluster.lease().as_millis()).unwrap_or(u64::MAX) }))
}

/// Removes a node from the cluster.
///
/// Its certificate is refused from now on, by all.
#[utoipa::path(delete, path = "/v1/nodes/{node}", params(("node" = String, Path,)),
    responses((status = 204), (status = 404)))]
async fn remove_node(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    volt.remove_node(&node)?;
    tracing::info!(%node, by = %peer, "node_removed");
    Ok(StatusCode::NO_CONTENT)
}

/// Clears a quarantined node of all blame.
#[utoipa::path(post, path = "/v1/nodes/{node}/pardon", params(("node" = String, Path,)),
    responses((status = 204), (status = 404)))]
async fn pardon(State(volt): Shared, peer: Peer, Path(node): Path<NodeName>) -> Result<StatusCode, Refusal> {
    peer.must_be_admin()?;
    volt.catalog.update_node(&node, |record| record.quarantined = false)?;
    volt.apply(Event::Pardon { node: node.clone() });
    tracing::info!(%node, by = %peer, "node_pardoned");
    Ok(StatusCode::NO_CONTENT)
}

/// Renews a node's lease. 409 asks the node to register again.
#[utoipa::path(post, path = "/v1/nodes/{node}/heartbeat", params(("node" = String, Path,)),
    responses((status = 204), (status = 409)))]
async fn heartbeat(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
) -> Result<StatusCode, Refusal> {
    require_self(&peer, &node)?;
    require_registered(&volt.apply(Event::Heartbeat { node: node.clone() }), &node)?;
    Ok(StatusCode::NO_CONTENT)
}

/// What Volt tells a node, as it happens: one JSON object a line, without end.
#[utoipa::path(get, path = "/v1/nodes/{node}/pushes", params(("node" = String, Path,)),
    responses((status = 200, body = Push, content_type = "application/x-ndjson")))]
async fn pushes(State(volt): Shared, peer: Peer, Path(node): Path<NodeName>) -> Result<Response, Refusal> {
    require_self(&peer, &node)?;
    let pushes = stream::unfold(volt.cluster.open_stream(&node), |mut stream| async move {
        let push = stream.receiver.recv().await?;
        Some((push, stream))
    });
    Ok(lines(pushes, volt.shutdown.clone()))
}

/// A node attaches an image, or says again that it has it attached.
#[utoipa::path(post, path = "/v1/nodes/{node}/attach", params(("node" = String, Path,)),
    request_body = AttachImage, responses((status = 200, body = Attachment), (status = 404), (status = 409)))]
async fn attach(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(request): Json<AttachImage>,
) -> Answer<Attachment> {
    require_self(&peer, &node)?;
    let (id, image) = match (request.image.parse::<ImageId>(), volt.catalog.image(&request.image)) {
        (_, Ok(image)) => (image.id, Some(image)),
        (Ok(id), Err(CatalogError::NoImage(_))) => (id, None),
        (_, Err(error)) => return Err(error.into()),
    };
    // It may have registered the same image under another name.
    if request.role == Role::Origin
        && image.is_some()
        && !volt.catalog.images()?.iter().any(|image| image.id == id && image.origins.contains(&node))
    {
        return Err(Refusal::new(
            Code::NotItsOrigin,
            format!("node {node} is not an origin of {}: it must register the image first", request.image),
        ));
    }
    let event = Event::Attach { node: node.clone(), image: id, role: request.role, current: request.current };
    require_registered(&volt.apply(event), &node)?;
    let placement = volt.cluster.placement(&node, &id).unwrap_or_default();
    tracing::info!(%node, image = request.image, role = ?request.role, "image_placed: a node attached it");
    // An image without a name has no profile either.
    let profile = image.as_ref().map(|image| volt.profiles.offer(&image.id)).unwrap_or_default();
    Ok(Json(Attachment { image, placement, profile }))
}

/// A node gives an image up.
#[utoipa::path(post, path = "/v1/nodes/{node}/detach", params(("node" = String, Path,)),
    request_body = DetachImage, responses((status = 204)))]
async fn detach(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(request): Json<DetachImage>,
) -> Result<StatusCode, Refusal> {
    require_self(&peer, &node)?;
    volt.apply(Event::Detach { node, image: request.image });
    Ok(StatusCode::NO_CONTENT)
}

/// A node has no use for an image.
///
/// It keeps its place until a push releases it: once everybody below wants to leave as well, or after a lease, when its
/// children have other parents. Attaching the image again takes it back.
#[utoipa::path(post, path = "/v1/nodes/{node}/leave", params(("node" = String, Path,)),
    request_body = DetachImage, responses((status = 204), (status = 409)))]
async fn leave(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(request): Json<DetachImage>,
) -> Result<StatusCode, Refusal> {
    require_self(&peer, &node)?;
    require_registered(&volt.apply(Event::Leave { node: node.clone(), image: request.image }), &node)?;
    Ok(StatusCode::NO_CONTENT)
}

/// A node reports what it noticed about another.
#[utoipa::path(post, path = "/v1/nodes/{node}/report", params(("node" = String, Path,)),
    request_body = NodeReport, responses((status = 204)))]
async fn report(
    State(volt): Shared,
    peer: Peer,
    Path(node): Path<NodeName>,
    Json(report): Json<NodeReport>,
) -> Result<StatusCode, Refusal> {
    require_self(&peer, &node)?;
    match report {
        NodeReport::Lied { parent, image, chunk } => {
            tracing::error!(by = %node, %parent, %image, %chunk, "wrong_bytes_reported");
            volt.apply(Event::Blame { by: node, liar: parent, image, chunk });
        }
        NodeReport::Lost { parent } => {
            tracing::warn!(by = %node, %parent, "parent_unreachable: a node cannot reach its parent");
            volt.apply(Event::Lost { by: node, parent });
        }
        NodeReport::Back { parent } => {
            tracing::info!(by = %node, %parent, "parent_reachable: a node reaches its parent again");
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

pub(super) fn any_member(peer: &Peer) -> Result<(), Refusal> {
    match peer {
        Peer::Local | Peer::Remote(Principal::Admin(_) | Principal::Node(_)) => Ok(()),
        Peer::Remote(Principal::Volt) => {
            Err(Refusal::new(Code::NotAMember, "this is for nodes and administrators"))
        }
    }
}

pub(super) fn require_self(peer: &Peer, node: &NodeName) -> Result<(), Refusal> {
    match peer {
        Peer::Remote(Principal::Node(name)) if name == node => Ok(()),
        other => Err(Refusal::new(Code::NotItself, format!("{other} cannot speak for node {node}"))),
    }
}

fn require_registered(notices: &[Notice], node: &NodeName) -> Result<(), Refusal> {
    if notices.iter().any(|notice| matches!(notice, Notice::Unknown(who) if who == node)) {
        return Err(Refusal::new(
            Code::RegisterAgain,
            format!("node {node} is not registered: it must register again"),
        ));
    }
    Ok(())
}

/// How a refusal of the catalog is told.
impl From<CatalogError> for Refusal {
    fn from(error: CatalogError) -> Refusal {
        let text = error.to_string();
        match error {
            CatalogError::NameTaken { .. } => Refusal::new(Code::NameTaken, text)
                .with_hint("use another tag, or remove the name first with 'virtman image remove'"),
            CatalogError::OtherKind { .. } => Refusal::new(Code::WrongKind, text),
            CatalogError::NoImage(_) => Refusal::new(Code::NoSuchImage, text)
                .with_hint("'virtman image list' shows those that there are"),
            CatalogError::NoNode(_) => Refusal::new(Code::NoSuchNode, text)
                .with_hint("'virtman status' shows which nodes have joined"),
            CatalogError::TooManyTokens => Refusal::new(Code::TooManyTokens, text),
            CatalogError::Storage(_) => {
                tracing::error!(%text, "catalog_failed");
                Refusal::internal(text)
            }
        }
    }
}
