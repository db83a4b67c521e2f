//! Asking: one target, one kept connection, JSON both ways.
//!
//! Consistency: a request is sent at most once. A kept connection that turns out to be closed before the
//! request was handed to it is replaced by a new one; after that an error is the caller's to judge.
//! Concurrent requests get connections of their own, of which one is kept.
//!
//! Cancellation: dropping a request's future closes its connection; whether the server acted is unknown.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::header::{ACCEPT, CONTENT_TYPE, HOST};
use axum::http::{Method, Request, StatusCode, Uri};
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::error::refusal_in;
use super::lines::{LINE_BYTES_MAX, LineCutter, SILENCE_TIME_MAX};
use super::serve::HEAD_TIME_MAX;
use crate::refusal::Refusal;
use identity::tls::{self, Alpn, ConnectError, Expected, refusal};
use identity::{Credentials, Fingerprint, Principal};

/// How long an answer may take unless the caller says otherwise.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Longest answer in bytes: a list of 10,000 nodes or VMs has about 5 MB.
const ANSWER_BYTES_MAX: usize = 32 << 20;

/// How long a kept connection may have idled to be used again: well before the server closes it, so that
/// a request does not cross the closing.
const IDLE_TIME_MAX: Duration = Duration::from_secs(HEAD_TIME_MAX.as_secs() / 2);

/// Where requests go.
#[derive(Debug, Clone)]
pub enum Target {
    /// The daemon on this host that listens on this socket.
    Unix(PathBuf),
    /// A member of the cluster.
    Tls {
        /// `HOST:PORT`.
        address: String,
        /// Who must answer there.
        principal: Principal,
        /// As whom we ask.
        credentials: Arc<Credentials>,
    },
    /// Volt, from a host that has no certificate yet. It answers nothing but the join.
    Join {
        /// `HOST:PORT`.
        address: String,
        /// The CA that Volt must belong to.
        ca: Fingerprint,
    },
}

/// A request brought no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no connection, and the server did not act.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The connection broke. Whether the server acted is unknown.
    #[error("lost the connection to {target}: {why}")]
    Lost {
        /// To whom.
        target: String,
        /// What happened.
        why: String,
    },
    /// The answer is not what it should be: another version, or another program.
    #[error("{target} sent a wrong answer: {why}")]
    BadAnswer {
        /// Who.
        target: String,
        /// What is wrong with it.
        why: String,
    },
    /// The request could not be put into words: its path or body is not valid.
    #[error("cannot send this request: {0}")]
    BadRequest(String),
}

/// Sends requests to one target.
#[derive(Debug)]
pub struct Client {
    target: Target,
    answer_time_max: Duration,
    kept: Mutex<Option<Connection>>,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// A connection, closed when it is dropped.
#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    _driver: AbortOnDropHandle<()>,
    idle_since: Instant,
}

impl Client {
    /// Connects at the first request.
    pub fn new(target: Target) -> Self {
        Self { target, answer_time_max: ANSWER_TIME_MAX, kept: Mutex::new(None) }
    }

    /// Waits `limit` for each answer.
    pub fn with_answer_time_max(self, limit: Duration) -> Self {
        Self { answer_time_max: limit, ..self }
    }

    /// Where requests go.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `GET path`. An empty answer reads as JSON's `null`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.exchange(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST path` with `body` as JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = json(body)?;
        self.exchange(Method::POST, path, body).await
    }

    /// `PUT path` with `body` as JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = json(body)?;
        self.exchange(Method::PUT, path, body).await
    }

    /// `GET path` and the values of its answer, one per line, as they come. The stream ends when the
    /// server ends the answer, and with an error when the connection is lost, also if it is lost without
    /// a sign: then after [`SILENCE_TIME_MAX`]. It has a connection of its own, closed when it is dropped.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn stream_lines<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
    ) -> Result<BoxStream<'static, Result<T, ClientError>>, ClientError> {
        self.lines_of(Method::GET, path, Bytes::new()).await
    }

    /// `POST path` with `body` as JSON, answered by lines as with [`Client::stream_lines`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn post_lines<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<BoxStream<'static, Result<T, ClientError>>, ClientError> {
        self.lines_of(Method::POST, path, json(body)?).await
    }

    async fn lines_of<T: DeserializeOwned + Send + 'static>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<BoxStream<'static, Result<T, ClientError>>, ClientError> {
        let mut connection = self.connect().await?;
        let request = self.request(method, path, body)?;
        let sent = timeout(self.answer_time_max, connection.sender.send_request(request)).await;
        let answer = sent.map_err(|_| self.too_slow())?.map_err(|e| self.lost(&e))?;
        if !answer.status().is_success() {
            let (status, body) = self.read(answer).await?;
            return Err(refusal_in(status, &body).into());
        }
        let lines = Lines {
            target: self.target.clone(),
            body: answer.into_body(),
            cutter: LineCutter::default(),
            _connection: connection,
        };
        Ok(stream::unfold(Some(lines), async |lines| {
            let mut lines = lines?;
            match lines.next().await {
                Ok(None) => None,
                Ok(Some(value)) => Some((Ok(value), Some(lines))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed())
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let request = self.request(method, path, body)?;
        let exchanged = timeout(self.answer_time_max, self.send(request)).await;
        let (status, body) = exchanged.map_err(|_| self.too_slow())??;
        if !status.is_success() {
            return Err(refusal_in(status, &body).into());
        }
        let body = if body.is_empty() { &b"null"[..] } else { &body };
        serde_json::from_slice(body).map_err(|e| self.bad_answer(e.to_string()))
    }

    async fn send(&self, mut request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        if let Some(mut kept) = self.take_kept()
            // The last answer was read, but its connection may need a moment to take note of that.
            && kept.sender.ready().await.is_ok()
        {
            match kept.sender.try_send_request(request).await {
                Ok(answer) => return self.finish(kept, answer).await,
                Err(mut error) => match error.take_message() {
                    // It was closed meanwhile, and the request never left.
                    Some(unsent) => request = unsent,
                    None => return Err(self.lost(error.error())),
                },
            }
        }
        let mut fresh = self.connect().await?;
        let answer = fresh.sender.send_request(request).await.map_err(|e| self.lost(&e))?;
        self.finish(fresh, answer).await
    }

    /// Reads the answer and keeps the connection.
    async fn finish(
        &self,
        mut connection: Connection,
        answer: hyper::Response<Incoming>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let read = self.read(answer).await?;
        connection.idle_since = Instant::now();
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        Ok(read)
    }

    async fn read(&self, answer: hyper::Response<Incoming>) -> Result<(StatusCode, Bytes), ClientError> {
        let status = answer.status();
        match Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => {
                Err(self.bad_answer(format!("it is longer than {ANSWER_BYTES_MAX} bytes")))
            }
            Err(error) => Err(self.lost(&*error)),
        }
    }

    fn take_kept(&self) -> Option<Connection> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (!kept.sender.is_closed() && kept.idle_since.elapsed() < IDLE_TIME_MAX).then_some(kept)
    }

    async fn connect(&self) -> Result<Connection, ClientError> {
        let (expected, address, protocol) = match &self.target {
            Target::Unix(path) => {
                let unreachable = |source| ConnectError::Unreachable {
                    address: format!("{} (is the daemon running?)", path.display()),
                    source,
                };
                let stream = UnixStream::connect(path).await.map_err(unreachable)?;
                return self.speak(Box::new(stream)).await;
            }
            Target::Tls { address, principal, credentials } => (
                Expected::Member { principal: principal.clone(), credentials: credentials.clone() },
                address,
                Alpn::Http,
            ),
            Target::Join { address, ca } => (Expected::VoltOf(*ca), address, Alpn::Join),
        };
        self.speak(Box::new(tls::connect(address, &expected, protocol).await?)).await
    }

    async fn speak(&self, stream: Box<dyn Io>) -> Result<Connection, ClientError> {
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (sender, driver) = shaken.map_err(|e| self.lost(&e))?;
        // What ends the connection reaches the request in flight; without one nobody needs to know.
        let driver = tokio::spawn(async move { drop(driver.await) });
        Ok(Connection { sender, _driver: AbortOnDropHandle::new(driver), idle_since: Instant::now() })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, ClientError> {
        let bad = |e: &dyn Error| ClientError::BadRequest(format!("{}: {e}", path.escape_debug()));
        let uri: Uri = path.parse().map_err(|e: axum::http::uri::InvalidUri| bad(&e))?;
        let mut request = Request::builder().method(method).uri(uri).header(ACCEPT, "application/json");
        // Names play no part in whom we trust, but HTTP/1.1 demands one (RFC 9112 §3.2).
        request = match &self.target {
            Target::Unix(_) => request.header(HOST, "localhost"),
            Target::Tls { address, .. } | Target::Join { address, .. } => request.header(HOST, address),
        };
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        request.body(Full::new(body)).map_err(|e| bad(&e))
    }

    fn too_slow(&self) -> ClientError {
        lost(&self.target, format!("no answer within {:?}", self.answer_time_max))
    }

    fn lost(&self, error: &(dyn Error + 'static)) -> ClientError {
        explain(&self.target, error)
    }

    fn bad_answer(&self, why: String) -> ClientError {
        ClientError::BadAnswer { target: self.target.to_string(), why }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tls { address, principal, .. } => write!(f, "{principal} at {address}"),
            Self::Join { address, .. } => write!(f, "Volt at {address}"),
        }
    }
}

fn json(body: &impl Serialize) -> Result<Bytes, ClientError> {
    serde_json::to_vec(body).map(Bytes::from).map_err(|e| ClientError::BadRequest(e.to_string()))
}

fn lost(target: &Target, why: String) -> ClientError {
    ClientError::Lost { target: target.to_string(), why }
}

/// Tells a refusal of our certificate, which comes with the first answer, from a broken connection.
fn explain(target: &Target, error: &(dyn Error + 'static)) -> ClientError {
    let mut cause = Some(error);
    let mut last = error;
    while let Some(error) = cause {
        if let Some(why) = error.downcast_ref::<io::Error>().and_then(refusal) {
            return ConnectError::Refused { address: target.to_string(), why }.into();
        }
        last = error;
        cause = error.source();
    }
    lost(target, last.to_string())
}

/// An answer of lines in flight.
struct Lines {
    target: Target,
    body: Incoming,
    cutter: LineCutter,
    _connection: Connection,
}

impl Lines {
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ClientError> {
        let bad = |target: &Target, why| ClientError::BadAnswer { target: target.to_string(), why };
        loop {
            match self.cutter.next() {
                Ok(None) => {}
                Ok(Some(line)) => {
                    let value = serde_json::from_slice(&line);
                    return value.map(Some).map_err(|e| bad(&self.target, e.to_string()));
                }
                Err(_) => {
                    return Err(bad(&self.target, format!("a line is longer than {LINE_BYTES_MAX} bytes")));
                }
            }
            match timeout(SILENCE_TIME_MAX, self.body.frame()).await {
                Err(_) => return Err(lost(&self.target, format!("it was silent for {SILENCE_TIME_MAX:?}"))),
                Ok(Some(Err(error))) => return Err(explain(&self.target, &error)),
                Ok(Some(Ok(frame))) => self.cutter.push(frame.data_ref().map_or(&[][..], |data| data)),
                Ok(None) if self.cutter.is_cut() => {
                    return Err(bad(&self.target, "it ends within a line".to_owned()));
                }
                Ok(None) => return Ok(None),
            }
        }
    }
}
