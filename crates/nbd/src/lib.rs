//! Network Block Device: a server over any [`Disk`](block::Disk), and a client that is a `Disk`.
//!
//! Fixed newstyle negotiation as in the protocol document of the NBD project (`doc/proto.md`), over any
//! byte stream. `docs/nbd.md` lists what is supported.
//!
//! - [`Server`] serves [`Exports`]; [`Client`] is a disk that lies behind an [`NbdUri`] or any other stream.
//! - [`negotiate`], [`client::handshake`], [`request`] and [`reply`] are the protocol itself: pure, without
//!   sockets, fuzzed.
//!
//! What this crate does not know: images, the hierarchy, TLS (its user brings an [`Upgrade`]), listening
//! and logging.

pub mod client;
mod export;
#[doc(hidden)]
pub mod fuzz;
pub mod limits;
pub mod negotiate;
pub mod proto;
pub mod reply;
pub mod request;
mod server;
mod stream;
pub mod uri;

pub use client::{Client, ConnectError, Options, Retry};
pub use export::{Export, Exports, Lease, Listing};
pub use server::{ServeError, Server};
pub use stream::{BoxStream, Dial, Stream, Upgrade};
pub use uri::NbdUri;
