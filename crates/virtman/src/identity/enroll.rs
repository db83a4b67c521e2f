//! Joining the cluster and renewing certificates, over HTTP: both ends of both.
//!
//! A joining node knows Volt by the CA fingerprint in its token, and makes its key itself. Volt uses up
//! the token and certifies the key in that order: should the answer be lost, the operator needs a new
//! token, but no token ever serves twice.
//!
//! Nothing is retried here.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::routing::post;
use block::{BoxFuture, NodeName};
use serde::{Deserialize, Serialize};

use super::authority::requested_key;
use super::{Authority, Ca, Identity, IdentityError, JoinRefusal, Key, Principal, Secret, SecretHash, Token};
use crate::http::{ApiError, Client, ClientError, Json, Peer, Target};

/// Where a node joins.
const JOIN_PATH: &str = "/v1/join";

/// Where a node renews its certificate.
const RENEW_PATH: &str = "/v1/renew";

/// Volt's memory of the tokens that it gave out.
pub trait Tokens: Send + Sync {
    /// Uses up the token with this hash so that `node` may join at `now`: finds its
    /// [`Grant`](super::Grant), asks it ([`admits`](super::Grant::admits)), refuses the name of an
    /// existing node unless the grant is for that very name, and forgets it. All in one step, and durable
    /// before it returns: of two that come with one token, one is refused, also across a crash.
    fn redeem<'a>(
        &'a self,
        secret: &'a SecretHash,
        node: &'a NodeName,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<(), JoinRefusal>>;
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JoinRequest {
    secret: Secret,
    node: NodeName,
    csr: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct JoinAnswer {
    certificate: String,
    ca: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RenewRequest {
    csr: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct RenewAnswer {
    certificate: String,
}

/// A node got no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Volt could not be asked, or refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// What Volt sent does not fit, or our own key fails.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// The routes for peers that have a token and no certificate.
pub fn join_router(authority: Arc<Authority>, tokens: Arc<dyn Tokens>) -> Router {
    Router::new().route(JOIN_PATH, post(answer_join)).with_state((authority, tokens))
}

/// The routes for nodes whose certificate is about to end.
pub fn renew_router(authority: Arc<Authority>) -> Router {
    Router::new().route(RENEW_PATH, post(answer_renew)).with_state(authority)
}

async fn answer_join(
    State((authority, tokens)): State<(Arc<Authority>, Arc<dyn Tokens>)>,
    Json(request): Json<JoinRequest>,
) -> Result<Json<JoinAnswer>, ApiError> {
    // Whatever can be wrong with the request is found before the token is used up.
    requested_key(&request.csr)?;
    let now = SystemTime::now();
    tokens.redeem(&request.secret.hash(), &request.node, now).await?;
    let node = Principal::Node(request.node);
    let certificate = authority.sign_csr(&request.csr, &node, now)?;
    tracing::info!(%node, "certified a new member");
    Ok(Json(JoinAnswer { certificate, ca: authority.ca().pem().to_owned() }))
}

async fn answer_renew(
    State(authority): State<Arc<Authority>>,
    peer: Peer,
    Json(request): Json<RenewRequest>,
) -> Result<Json<RenewAnswer>, ApiError> {
    let Peer::Remote(principal @ Principal::Node(_)) = peer else {
        // Who administers gets certificates from Volt's operator, each time by his decision.
        return Err(ApiError::forbidden("not_a_node", "only nodes renew their certificates here"));
    };
    let certificate = authority.sign_csr(&request.csr, &principal, SystemTime::now())?;
    tracing::info!(node = %principal, "renewed a certificate");
    Ok(Json(RenewAnswer { certificate }))
}

/// Joins the cluster of `token` as `node`. The caller saves the identity; the token is used up.
///
/// # Errors
/// [`EnrollError`]. With [`ClientError::Lost`] the token may be used up too.
pub async fn join(token: &Token, node: &NodeName) -> Result<Identity, EnrollError> {
    let key = Key::generate()?;
    let client = Client::new(Target::Join { address: token.address().to_owned(), ca: token.ca() });
    let request = JoinRequest { secret: *token.secret(), node: node.clone(), csr: key.csr()? };
    let answer: JoinAnswer = client.post(JOIN_PATH, &request).await?;

    let ca = Ca::from_pem(&answer.ca).map_err(IdentityError::Mismatch)?;
    if ca.fingerprint() != token.ca() {
        return Err(IdentityError::Mismatch("Volt sent another CA than the token's".to_owned()).into());
    }
    let identity = Identity::new(&answer.certificate, key, ca).map_err(IdentityError::Mismatch)?;
    if *identity.principal() != Principal::Node(node.clone()) {
        let why = format!("Volt certified {} instead of node {node}", identity.principal());
        return Err(IdentityError::Mismatch(why).into());
    }
    Ok(identity)
}

/// Gets a new certificate for `identity` through `volt`, to which it is still known. The caller saves it
/// and replaces its [`Credentials`](super::Credentials).
///
/// # Errors
/// [`EnrollError`]; the old certificate goes on until it expires.
pub async fn renew(volt: &Client, identity: &Identity) -> Result<Identity, EnrollError> {
    let answer: RenewAnswer = volt.post(RENEW_PATH, &RenewRequest { csr: identity.csr()? }).await?;
    Ok(identity.renewed(&answer.certificate)?)
}

impl From<JoinRefusal> for ApiError {
    fn from(refusal: JoinRefusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            JoinRefusal::UnknownToken => Self::forbidden("unknown_token", message),
            JoinRefusal::Expired => Self::forbidden("token_expired", message),
            JoinRefusal::WrongName { .. } => Self::forbidden("wrong_name", message),
            JoinRefusal::NameTaken(_) => Self::conflict("name_taken", message),
            JoinRefusal::Unavailable(_) => Self::unavailable("tokens_unavailable", message),
        }
    }
}

impl From<IdentityError> for ApiError {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Request(_) => Self::bad_request("bad_certificate_request", error.to_string()),
            // The rest is about Volt's own files: for its log, not for its peers.
            _ => {
                tracing::error!(%error, "cannot certify");
                Self::internal("Volt cannot certify now: its log says why")
            }
        }
    }
}
