//! Serving: accept, know the peer, hand the connection to its router or handler.
//!
//! A listener is one task that owns its connections; when it is told to shut down it accepts no more,
//! lets the requests in flight finish for [`DRAIN_TIME_MAX`], and closes what is left.
//!
//! Full means wait: beyond [`CONNECTIONS_MAX`] connections wait in the kernel's queue.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use block::BoxFuture;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{ApiError, Peer};
use identity::Principal;
use identity::tls::{self, AcceptError, Accepted, Acceptor, Admission};

/// Connections of one listener: 10,000 nodes hold up to three each with Volt.
const CONNECTIONS_MAX: usize = 32 * 1024;

/// Connections whose peer has not proven itself yet. Each costs a signature of CPU and may hold its
/// place for the handshake's time limit, so a flood of them must not take all memory.
const UNPROVEN_MAX: usize = 256;

/// How long the head of a request may take, and how long a kept connection may idle between two.
pub(crate) const HEAD_TIME_MAX: Duration = Duration::from_secs(30);

/// How long a join may take in all: it is one small request of somebody who has proven nothing.
const JOIN_TIME_MAX: Duration = Duration::from_secs(20);

/// Longest request body in bytes: boot profiles and cloud-init user data fit many times.
const BODY_BYTES_MAX: usize = 4 << 20;

/// Most bytes of a request's head, and of what is read ahead.
const HEAD_BYTES_MAX: usize = 32 * 1024;

/// How long requests in flight may take to finish when the server shuts down.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Pause after `accept` failed for want of descriptors or memory: only time mends that.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that the kernel completes before we accept them.
const BACKLOG: i32 = 1024;

/// A bound UNIX socket; its file goes with it.
#[derive(Debug)]
pub struct UnixServer {
    listener: UnixListener,
    path: PathBuf,
}

/// Listens at `path` with mode 0600. A socket file on which nobody listens any more is replaced.
///
/// # Errors
/// `AddrInUse` if somebody listens there or the path is something else than a socket; what the system
/// says otherwise.
pub fn bind_unix(path: &Path) -> io::Result<UnixServer> {
    let in_use = |why: &str| io::Error::new(io::ErrorKind::AddrInUse, format!("{}: {why}", path.display()));
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(in_use("is there and is not a socket")),
        // Two daemons that start at once could both get here; the lock of their state keeps them apart.
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(in_use("another virtman listens here"));
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket: there is no moment at which others may connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixServer { listener: UnixListener::from_std(socket.into())?, path: path.to_owned() })
}

impl UnixServer {
    /// Serves `router` to [`Peer::Local`] until `shutdown`.
    pub async fn serve(self, router: Router, shutdown: CancellationToken) {
        let router = with_limits(router);
        let accept = |cx: &mut Context<'_>| self.listener.poll_accept(cx).map_ok(|(stream, _)| stream);
        each_connection(accept, &shutdown, |stream| {
            serve_http(stream, router.clone(), Some(Peer::Local), shutdown.clone())
        })
        .await;
    }
}

impl Drop for UnixServer {
    fn drop(&mut self) {
        // Should it fail, the next start replaces the file.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes over a connection that is not HTTP; the connection is closed when the future is dropped at shutdown.
pub type OnConnection = Arc<dyn Fn(Principal, TlsStream<TcpStream>) -> BoxFuture<'static, ()> + Send + Sync>;

/// What one TLS port serves.
pub struct TlsServer {
    acceptor: Acceptor,
    api: Router,
    join: Option<Router>,
    link: Option<OnConnection>,
    moves: Option<OnConnection>,
    removals: Option<watch::Receiver<()>>,
}

impl TlsServer {
    /// Serves `api` to members; its handlers find [`Peer::Remote`].
    pub fn new(acceptor: Acceptor, api: Router) -> Self {
        Self { acceptor, api: with_limits(api), join: None, link: None, moves: None, removals: None }
    }

    /// Serves `join` to connections without a certificate that ask for nothing else. The acceptor must
    /// accept such ones. Its handlers have no [`Peer`].
    pub fn with_join(self, join: Router) -> Self {
        Self { join: Some(with_limits(join)), ..self }
    }

    /// Hands link connections to `link`.
    pub fn with_link(self, link: OnConnection) -> Self {
        Self { link: Some(link), ..self }
    }

    /// Hands connections that bring a VM to `moves`.
    pub fn with_moves(self, moves: OnConnection) -> Self {
        Self { moves: Some(moves), ..self }
    }

    /// Whenever `removals` changes, asks the acceptor again about everybody connected, and closes the
    /// connections of members that are no longer admitted.
    pub fn with_removals(self, removals: watch::Receiver<()>) -> Self {
        Self { removals: Some(removals), ..self }
    }

    /// Serves until `shutdown`.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let shared = Arc::new(self);
        let unproven = Arc::new(Semaphore::new(UNPROVEN_MAX));
        let accept = |cx: &mut Context<'_>| listener.poll_accept(cx).map_ok(|(stream, _)| stream);
        each_connection(accept, &shutdown, |stream| {
            shared.clone().serve_one(stream, unproven.clone(), shutdown.clone())
        })
        .await;
    }

    async fn serve_one(
        self: Arc<Self>,
        tcp: TcpStream,
        unproven: Arc<Semaphore>,
        shutdown: CancellationToken,
    ) {
        let accepted = async {
            // The permit covers the handshake, and a join to its end.
            let permit = unproven.acquire().await.expect("nobody closes this semaphore");
            tls::prepare(&tcp)?;
            Ok::<_, AcceptError>((permit, self.acceptor.accept(tcp).await?))
        };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = accepted => accepted,
        };
        match accepted {
            Err(error) => debug!(%error, "refused a connection"),
            Ok((_permit, Accepted::Join { stream })) => {
                let Some(join) = self.join.clone() else { return };
                let served = serve_http(stream, join, None, shutdown);
                if tokio::time::timeout(JOIN_TIME_MAX, served).await.is_err() {
                    debug!("closed a join that took longer than {JOIN_TIME_MAX:?}");
                }
            }
            Ok((permit, Accepted::Http { peer, stream })) => {
                drop(permit);
                let served = serve_http(stream, self.api.clone(), Some(Peer::Remote(peer.clone())), shutdown);
                self.while_admitted(&peer, served).await;
            }
            Ok((permit, Accepted::Link { peer, stream })) => {
                drop(permit);
                self.hand_over(self.link.as_ref(), peer, stream, shutdown).await;
            }
            Ok((permit, Accepted::Move { peer, stream })) => {
                drop(permit);
                self.hand_over(self.moves.as_ref(), peer, stream, shutdown).await;
            }
        }
    }

    async fn hand_over(
        &self,
        to: Option<&OnConnection>,
        peer: Principal,
        stream: TlsStream<TcpStream>,
        shutdown: CancellationToken,
    ) {
        let Some(to) = to else { return };
        let served = to(peer.clone(), stream);
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.while_admitted(&peer, served) => {}
        }
    }

    /// Serves until done, or until `peer` is removed: then all that it has open is dropped.
    async fn while_admitted(&self, peer: &Principal, served: impl Future<Output = ()>) {
        let removed = async {
            let Some(mut removals) = self.removals.clone() else { return std::future::pending().await };
            // Asked before the first wait too: the removal may have come during the handshake.
            while self.acceptor.admits(peer) == Admission::Admit {
                if removals.changed().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        tokio::select! {
            () = served => {}
            () = removed => info!(%peer, "closed a connection of a removed member"),
        }
    }
}

/// A router whose every answer has our form and whose bodies are bounded.
fn with_limits(router: Router) -> Router {
    router
        .fallback(async |uri: Uri| {
            ApiError::new(StatusCode::NOT_FOUND, "no_such_path", format!("there is no {}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            let message = format!("{} does not take {method}", uri.path());
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", message)
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

/// Accepts connections and runs `serve` for each, until `shutdown` and then until they are done.
async fn each_connection<S, F>(
    mut accept: impl FnMut(&mut Context<'_>) -> Poll<io::Result<S>>,
    shutdown: &CancellationToken,
    serve: impl Fn(S) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(done) = open.join_next() => log_panic(done),
            accepted = std::future::poll_fn(&mut accept), if open.len() < CONNECTIONS_MAX => match accepted {
                Ok(stream) => {
                    open.spawn(serve(stream));
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    warn!("cannot accept connections: {e}; trying again in {ACCEPT_PAUSE:?}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    let drained = async {
        while let Some(done) = open.join_next().await {
            log_panic(done);
        }
    };
    if tokio::time::timeout(DRAIN_TIME_MAX, drained).await.is_err() {
        debug!(connections = open.len(), "closing what did not finish within {DRAIN_TIME_MAX:?}");
        open.shutdown().await;
    }
}

fn log_panic(done: Result<(), tokio::task::JoinError>) {
    if let Err(error) = done {
        error!(%error, "a connection's task failed");
    }
}

pub(crate) async fn serve_http<S>(stream: S, router: Router, peer: Option<Peer>, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let inner = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        if let Some(peer) = &peer {
            request.extensions_mut().insert(peer.clone());
        }
        inner.call(request)
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
    );
    let served = tokio::select! {
        served = &mut connection => served,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        debug!(%error, "an HTTP connection ended early");
    }
}
