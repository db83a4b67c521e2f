//! The server: serves the exports of one [`Exports`] over any number of connections.
//!
//! Consistency: a request that begins after another was answered sees its effect, on whatever connection.
//! Replies come in the order in which requests finish. Durability: `FLUSH` and `FUA` are the disk's
//! flush, which covers all connections. Cancellation: dropping the future of [`Server::serve`] closes the
//! connection and withdraws what it had under way; none of that was answered. Crash: the server keeps no
//! state of its own.
//!
//! What a client can cost is bounded by [`limits`](crate::limits), whether it is slow, silent or hostile.

mod buffers;
mod connection;
mod tasks;

use std::future::Future;
use std::io;
use std::sync::Arc;

use bytes::BufMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::export::Exports;
use crate::limits::{NEGOTIATION_TIME_MAX, OPTION_BYTES_MAX};
use crate::negotiate::{Event, Negotiation, NegotiationError, Session, Tls};
use crate::request::NotARequest;
use crate::stream::{BoxStream, Stream, Upgrade};

/// Serves exports to whoever connects.
#[derive(Clone)]
pub struct Server {
    exports: Arc<dyn Exports>,
    upgrade: Option<Upgrade>,
}

/// Why a connection ended otherwise than by the client's wish or a shutdown. In every case only this
/// connection is concerned; whoever called logs it.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// TLS could not be agreed on.
    #[error("no TLS with this client: {0}")]
    Tls(io::Error),
    /// The client did not negotiate properly.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// The client sent plain text where TLS had to begin; an attacker may have put it there.
    #[error("the client sent plain text behind STARTTLS")]
    Injected,
    /// The negotiation took longer than [`NEGOTIATION_TIME_MAX`].
    #[error("the client did not negotiate within {NEGOTIATION_TIME_MAX:?}")]
    TooSlow,
    /// The client sent something else than requests.
    #[error(transparent)]
    NotARequest(#[from] NotARequest),
    /// The client announced a payload beyond [`REQUEST_BYTES_MAX`](crate::limits::REQUEST_BYTES_MAX).
    #[error("the client announced a payload of {0} bytes")]
    PayloadTooLong(u64),
    /// The client did not take its last replies, or the disk did not finish its last requests, within
    /// [`DRAIN_TIME_MAX`](crate::limits::DRAIN_TIME_MAX).
    #[error("the connection could not be closed in order: requests or replies were left")]
    NotDrained,
    /// An operation on the disk panicked, so its request cannot be answered.
    #[error("an operation on the disk failed: {0}")]
    Disk(tokio::task::JoinError),
}

impl Server {
    /// A server of these exports, without TLS.
    pub fn new(exports: Arc<dyn Exports>) -> Server {
        Server { exports, upgrade: None }
    }

    /// The same server, with TLS required of every client.
    #[must_use]
    pub fn with_tls(self, upgrade: Upgrade) -> Server {
        Server { upgrade: Some(upgrade), ..self }
    }

    /// Serves one connection until its client disconnects or `shutdown` is ready. Requests that are under
    /// way then are finished, within [`DRAIN_TIME_MAX`](crate::limits::DRAIN_TIME_MAX).
    ///
    /// The caller bounds the number of connections.
    pub async fn serve(
        &self,
        stream: impl Stream + 'static,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let mut shutdown = std::pin::pin!(shutdown);
        let negotiation = tokio::time::timeout(NEGOTIATION_TIME_MAX, self.negotiate(Box::new(stream)));
        let agreed = tokio::select! {
            agreed = negotiation => agreed.map_err(|_| ServeError::TooSlow)??,
            () = &mut shutdown => return Ok(()),
        };
        match agreed {
            Some((stream, session, input)) => connection::run(stream, session, &input, shutdown).await,
            None => Ok(()),
        }
    }

    /// Negotiates; `None` if the client wanted no more than that. What the client sent beyond the
    /// negotiation comes along.
    async fn negotiate(
        &self,
        mut stream: BoxStream,
    ) -> Result<Option<(BoxStream, Session, Vec<u8>)>, ServeError> {
        let tls = if self.upgrade.is_some() { Tls::Required } else { Tls::Off };
        let mut negotiation = Negotiation::new(tls);
        stream.write_all(&Negotiation::greeting()).await?;
        let mut input = Vec::new();
        loop {
            let mut out = Vec::new();
            let fed = negotiation.feed(&input, &*self.exports, &mut out);
            stream.write_all(&out).await?;
            stream.flush().await?;
            let (used, event) = fed?;
            input.drain(..used);
            match event {
                Event::Continue => {}
                Event::Incomplete => {
                    // An incomplete message is shorter than an option may be, so this stays bounded.
                    if stream.read_buf(&mut (&mut input).limit(OPTION_BYTES_MAX)).await? == 0 {
                        return Ok(None);
                    }
                }
                Event::Abort => {
                    stream.shutdown().await?;
                    return Ok(None);
                }
                Event::StartTls => {
                    let upgrade = self.upgrade.as_ref().expect("TLS is agreed only where it is required");
                    if !input.is_empty() {
                        return Err(ServeError::Injected);
                    }
                    stream = upgrade(stream).await.map_err(ServeError::Tls)?;
                    negotiation.tls_is_up();
                }
                Event::Transmission(session) => return Ok(Some((stream, session, input))),
            }
        }
    }
}
