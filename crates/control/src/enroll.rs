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

use crate::http::{Client, ClientError, Json, Peer, Target};
use crate::refusal::{Code, Refusal};
use identity::{
    Authority, Ca, Identity, IdentityError, JoinRefusal, Key, Principal, Secret, SecretHash, Token,
    requested_key,
};

/// Where a node joins.
const JOIN_PATH: &str = "/v1/join";

/// Where a node renews its certificate.
const RENEW_PATH: &str = "/v1/renew";

/// Volt's memory of the tokens that it gave out.
pub trait Tokens: Send + Sync {
    /// Uses up the token with this hash so that `node` may join at `now`: finds its
    /// [`Grant`](identity::Grant), asks it ([`admits`](identity::Grant::admits)), refuses the name of an
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
) -> Result<Json<JoinAnswer>, Refusal> {
    // Whatever can be wrong with the request is found before the token is used up.
    requested_key(&request.csr)?;
    let now = SystemTime::now();
    tokens.redeem(&request.secret.hash(), &request.node, now).await?;
    let node = Principal::Node(request.node);
    let certificate = authority.sign_csr(&request.csr, &node, now)?;
    tracing::info!(%node, "member_certified");
    Ok(Json(JoinAnswer { certificate, ca: authority.ca().pem().to_owned() }))
}

async fn answer_renew(
    State(authority): State<Arc<Authority>>,
    peer: Peer,
    Json(request): Json<RenewRequest>,
) -> Result<Json<RenewAnswer>, Refusal> {
    let Peer::Remote(principal @ Principal::Node(_)) = peer else {
        // Who administers gets certificates from Volt's operator, each time by his decision.
        return Err(Refusal::new(Code::NotANode, "only nodes renew their certificates here"));
    };
    let certificate = authority.sign_csr(&request.csr, &principal, SystemTime::now())?;
    tracing::info!(node = %principal, "certificate_issued: renewed");
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
/// and replaces its [`Credentials`](identity::Credentials).
///
/// # Errors
/// [`EnrollError`]; the old certificate goes on until it expires.
pub async fn renew(volt: &Client, identity: &Identity) -> Result<Identity, EnrollError> {
    let answer: RenewAnswer = volt.post(RENEW_PATH, &RenewRequest { csr: identity.csr()? }).await?;
    Ok(identity.renewed(&answer.certificate)?)
}

impl From<JoinRefusal> for Refusal {
    fn from(refusal: JoinRefusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            JoinRefusal::UnknownToken => Self::new(Code::UnknownToken, message),
            JoinRefusal::Expired => Self::new(Code::TokenExpired, message),
            JoinRefusal::WrongName { .. } => Self::new(Code::WrongName, message),
            JoinRefusal::NameTaken(_) => Self::new(Code::NameTaken, message),
            JoinRefusal::Unavailable(_) => Self::new(Code::TokensUnavailable, message),
        }
    }
}

impl From<IdentityError> for Refusal {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Request(_) => Self::new(Code::BadCertificateRequest, error.to_string()),
            // The rest is about Volt's own files: for its log, not for its peers.
            _ => {
                tracing::error!(%error, "certificate_refused");
                Self::internal("Volt cannot certify now: its log says why")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::path::Path;
    use std::sync::Mutex;
    use std::time::Duration;

    use tokio::net::TcpListener;
    use tokio::task::JoinHandle;
    use tokio_util::sync::{CancellationToken, DropGuard};

    use super::*;
    use crate::http::TlsServer;
    use identity::tls::{Accept, Acceptor, Admission};
    use identity::{Credentials, Fingerprint, Grant, TOKEN_LIFETIME};

    /// Tokens in memory, with one member that was there before.
    struct Book {
        grants: Mutex<Vec<Grant>>,
        member: NodeName,
    }

    impl Tokens for Book {
        fn redeem<'a>(
            &'a self,
            secret: &'a SecretHash,
            node: &'a NodeName,
            now: SystemTime,
        ) -> BoxFuture<'a, Result<(), JoinRefusal>> {
            Box::pin(async move {
                let mut grants = self.grants.lock().unwrap();
                let at = grants.iter().position(|g| g.secret_hash == *secret);
                let at = at.ok_or(JoinRefusal::UnknownToken)?;
                grants[at].admits(node, now)?;
                if grants[at].node.is_none() && *node == self.member {
                    return Err(JoinRefusal::NameTaken(node.clone()));
                }
                grants.remove(at);
                Ok(())
            })
        }
    }

    /// A Volt on a port of its own, which ends with it.
    struct Volt {
        authority: Arc<Authority>,
        book: Arc<Book>,
        address: SocketAddr,
        _served: JoinHandle<()>,
        _shutdown: DropGuard,
    }

    impl Volt {
        async fn start(dir: &Path) -> Self {
            let now = SystemTime::now();
            let authority = Arc::new(Authority::create(&dir.join("ca"), now).unwrap());
            let book = Arc::new(Book { grants: Mutex::default(), member: name("member") });
            let credentials = Credentials::new(authority.issue(&Principal::Volt, now).unwrap());
            let acceptor =
                Acceptor::new(&credentials, Accept::MembersAndJoins, |_| Admission::Admit).unwrap();
            let server = TlsServer::new(acceptor, renew_router(authority.clone()))
                .with_join(join_router(authority.clone(), book.clone()));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let shutdown = CancellationToken::new();
            let served = tokio::spawn(server.serve(listener, shutdown.clone()));
            Self { authority, book, address, _served: served, _shutdown: shutdown.drop_guard() }
        }

        fn give_token(&self, expires: SystemTime, node: Option<NodeName>) -> Token {
            let token = Token::new(&self.address.to_string(), self.authority.ca().fingerprint()).unwrap();
            self.book.grants.lock().unwrap().push(token.grant(expires, node));
            token
        }

        fn client(&self, identity: Identity) -> Client {
            Client::new(Target::Tls {
                address: self.address.to_string(),
                principal: Principal::Volt,
                credentials: Credentials::new(identity),
            })
        }
    }

    fn name(text: &str) -> NodeName {
        text.parse().unwrap()
    }

    fn in_an_hour() -> SystemTime {
        SystemTime::now() + TOKEN_LIFETIME
    }

    fn code(result: Result<Identity, EnrollError>) -> String {
        match result {
            Err(EnrollError::Client(ClientError::Refused(error))) => error.code.word().to_owned(),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_node_joins_once_with_a_token_and_renews_with_its_certificate() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let token: Token = volt.give_token(in_an_hour(), None).to_string().parse().unwrap();

        let identity = join(&token, &name("a")).await.unwrap();
        assert_eq!(*identity.principal(), Principal::Node(name("a")));
        identity.save(&dir.path().join("a")).unwrap();
        assert_eq!(code(join(&token, &name("b")).await), "unknown_token");

        let client = volt.client(Identity::load(&dir.path().join("a")).unwrap());
        let renewed = renew(&client, &identity).await.unwrap();
        assert_eq!(renewed.principal(), identity.principal());
        assert!(!renewed.needs_renewal(SystemTime::now()));
        renewed.save(&dir.path().join("a")).unwrap();
    }

    #[tokio::test]
    async fn of_two_that_join_at_once_with_one_token_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let token = volt.give_token(in_an_hour(), None);
        let (a, b) = (name("a"), name("b"));
        let (a, b) = tokio::join!(join(&token, &a), join(&token, &b));
        let refused = if a.is_ok() { b } else { a };
        assert_eq!(code(refused), "unknown_token");
    }

    #[tokio::test]
    async fn an_expired_token_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let token = volt.give_token(SystemTime::now() - Duration::from_secs(1), None);
        assert_eq!(code(join(&token, &name("a")).await), "token_expired");
    }

    #[tokio::test]
    async fn a_token_for_one_name_serves_no_other_and_is_not_used_up_by_the_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let token = volt.give_token(in_an_hour(), Some(name("a")));
        assert_eq!(code(join(&token, &name("b")).await), "wrong_name");
        join(&token, &name("a")).await.unwrap();
    }

    #[tokio::test]
    async fn the_name_of_a_member_is_taken_unless_the_token_is_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let open = volt.give_token(in_an_hour(), None);
        assert_eq!(code(join(&open, &name("member")).await), "name_taken");
        let named = volt.give_token(in_an_hour(), Some(name("member")));
        join(&named, &name("member")).await.unwrap();
    }

    #[tokio::test]
    async fn the_secret_is_not_shown_to_a_volt_of_another_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let right = volt.give_token(in_an_hour(), None);
        let wrong = Token::new(right.address(), Fingerprint::of(b"another CA")).unwrap();
        volt.book.grants.lock().unwrap().push(wrong.grant(in_an_hour(), None));
        let error = join(&wrong, &name("a")).await.unwrap_err();
        assert!(matches!(error, EnrollError::Client(ClientError::Connect(_))), "{error}");
        // Had the secret arrived, its grant would be gone.
        assert_eq!(volt.book.grants.lock().unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_bad_request_does_not_use_up_the_token() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let token = volt.give_token(in_an_hour(), None);
        let client = Client::new(Target::Join { address: token.address().to_owned(), ca: token.ca() });
        let request =
            JoinRequest { secret: *token.secret(), node: name("a"), csr: "not a request".to_owned() };
        let error = client.post::<JoinAnswer>(JOIN_PATH, &request).await.unwrap_err();
        assert!(
            matches!(&error, ClientError::Refused(e) if e.code == Code::BadCertificateRequest),
            "{error}"
        );
        let escaping = serde_json::json!({ "secret": token.secret(), "node": "../a", "csr": "" });
        let error = client.post::<JoinAnswer>(JOIN_PATH, &escaping).await.unwrap_err();
        assert!(matches!(&error, ClientError::Refused(e) if e.code.word() == "bad_body"), "{error}");
        join(&token, &name("a")).await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_without_certificate_reaches_nothing_but_the_join() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let ca = volt.authority.ca().fingerprint();
        let client = Client::new(Target::Join { address: volt.address.to_string(), ca });
        let request = RenewRequest { csr: Key::generate().unwrap().csr().unwrap() };
        let error = client.post::<RenewAnswer>(RENEW_PATH, &request).await.unwrap_err();
        assert!(matches!(&error, ClientError::Refused(e) if e.code.word() == "no_such_path"), "{error}");
    }

    #[tokio::test]
    async fn an_administrator_does_not_renew_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let volt = Volt::start(dir.path()).await;
        let eve = Principal::Admin("eve".parse().unwrap());
        let issue = || volt.authority.issue(&eve, SystemTime::now()).unwrap();
        assert_eq!(code(renew(&volt.client(issue()), &issue()).await), "not_a_node");
    }
}
