//! TLS 1.3 between members of the cluster, with certificates on both sides.
//!
//! - [`Acceptor`] is the listening half, [`connect()`] the dialling half.
//! - What is spoken inside is agreed by ALPN ([`Alpn`]), so one port serves the API and the link.
//! - Chains are verified by webpki against the cluster's CA alone; then the peer's [`Principal`](super::Principal) is read
//!   from its certificate and compared or handed on.
//!
//! No session is resumed: every handshake verifies certificates, expiry and revocation anew. Members
//! keep their connections, so that costs nothing that shows.

mod accept;
mod connect;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use socket2::SockRef;
use tokio::net::TcpStream;

pub use accept::{Accept, AcceptError, Accepted, Acceptor, Admission};
pub use connect::{ConnectError, Expected, connect, refusal};

use super::Ca;

/// How long a peer may take for its handshake: three round trips around the world, retransmitted once,
/// and a busy host. An honest peer needs milliseconds.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);

/// How long dialling may take in all: short enough that a dead parent is noticed before a guest's own
/// disk timeout (30 s), long enough for one lost SYN (1 s) and a second (2 s).
pub const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// What is spoken inside a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// The API.
    Http,
    /// Chunks between nodes.
    Link,
    /// What a VM writes and has in memory, from the node that it leaves to the one that it goes to.
    Move,
    /// A node that has no certificate yet; HTTP with nothing but the join in it.
    Join,
}

impl Alpn {
    /// The name on the wire (RFC 7301).
    pub fn name(self) -> &'static [u8] {
        match self {
            Self::Http => b"http/1.1",
            Self::Link => b"virtman-link/1",
            Self::Move => b"virtman-move/2",
            Self::Join => b"virtman-join/1",
        }
    }
}

/// How long sent bytes may stay unacknowledged before the connection counts as lost; the kernel's own
/// limit is a quarter of an hour.
const UNACKNOWLEDGED_TIME_MAX: Duration = Duration::from_secs(20);

/// Bytes that may lie unsent in a socket: two chunks, which keep a link busy until the next are handed over.
/// What lies there cannot be overtaken by a chunk that a guest waits for; without a bound it grows to megabytes.
const UNSENT_BYTES_MAX: u32 = 128 * 1024;

/// Sets what every connection between members has: no Nagle's delay, an end when the peer is gone, and little
/// that waits in the socket.
///
/// # Errors
/// What the system says.
pub fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let millis = u32::try_from(UNACKNOWLEDGED_TIME_MAX.as_millis()).expect("some seconds fit");
    rustix::net::sockopt::set_tcp_user_timeout(tcp, millis)?;
    SockRef::from(tcp).set_tcp_notsent_lowat(UNSENT_BYTES_MAX)
}

/// The one cryptographic library, named explicitly: no process-wide default decides what we trust.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
    PROVIDER.clone()
}

/// Verifies that a certificate is a valid member's of the cluster of `ca`.
pub(crate) fn chain_verifier(ca: &Ca) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let roots = roots(ca).map_err(|e| e.to_string())?;
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|e| e.to_string())
}

fn roots(ca: &Ca) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    Ok(roots)
}
