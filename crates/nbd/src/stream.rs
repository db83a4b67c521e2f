//! Byte streams that the protocol runs over, and how TLS is put on one.

use std::io;
use std::sync::Arc;

use block::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection: a UNIX socket, TCP, TLS over either, or a pipe in memory.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection of some kind.
pub type BoxStream = Box<dyn Stream>;

/// Puts TLS on a connection, after `STARTTLS` was agreed. This crate knows no TLS: its user brings it,
/// and decides in it whom to trust.
pub type Upgrade = Arc<dyn Fn(BoxStream) -> BoxFuture<'static, io::Result<BoxStream>> + Send + Sync>;

/// Opens a connection to a server; called again whenever one was lost.
pub type Dial = Arc<dyn Fn() -> BoxFuture<'static, io::Result<BoxStream>> + Send + Sync>;
