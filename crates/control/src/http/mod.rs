//! The HTTP transport of the control plane: HTTP/1.1 with JSON, over a UNIX socket for callers on the
//! same host and over the cluster's TLS for all others.
//!
//! - [`UnixServer`] and [`TlsServer`] serve an `axum::Router`; [`Peer`] tells its handlers who asks.
//! - [`Client`] asks, keeps its connection, and follows a long answer of JSON lines ([`lines()`]), with
//!   which Volt pushes changes to nodes.
//! - A [`Refusal`](crate::refusal::Refusal) is answered in one form, and comes back from it on the other side.
//!
//! Invariants:
//! - A handler that asks for its [`Peer`] runs only for authenticated ones.
//! - Every message, wait and number of connections is bounded; what exceeds its bound is refused with an
//!   answer where one can still be given, else the connection is closed.
//!
//! What a peer may do is decided by the handlers. Nothing here retries a request that may have reached
//! the server: the caller knows what may be repeated.

mod client;
mod error;
mod extract;
mod lines;
mod serve;
#[cfg(test)]
mod tests;

pub use client::{Client, ClientError, Target};
pub use error::ApiError;
pub use extract::{Json, Path, Peer, Query};
pub use lines::lines;
pub use serve::{OnConnection, TlsServer, UnixServer, bind_unix};
