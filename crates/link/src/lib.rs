//! The node-to-node chunk protocol.
//!
//! - [`ClientEnd`] and [`ServerEnd`] are the two ends of a link as state machines: no socket, no clock, no runtime.
//!   [`wire`] is their frames; `docs/formats/link.md` describes the bytes.
//! - [`policy`] says which parent to ask next and when to try a failed one again: pure as well.
//! - [`serve()`] puts a `ServerEnd` on a stream; [`Uplinks`] keeps one `ClientEnd` per parent, for all images; a
//!   [`Fetcher`] is one image's [`ChunkSource`](block::ChunkSource) over them.
//!
//! Invariants:
//! - No chunk leaves this crate upward unless it was verified by this node.
//! - Foreign bytes end a link at worst; they never panic and never cost more than the bounds in [`limits`].
//! - This crate knows no TLS and no addresses: streams come from a [`Dial`] or are handed to [`serve()`], with
//!   the peer's name proven.

mod client_end;
mod fetcher;
mod inflight;
pub mod limits;
pub mod malloc;
pub mod pack;
pub mod policy;
mod serve;
mod server_end;
mod session;
mod stats;
mod stream;
mod uplinks;
pub mod wire;

pub use client_end::{ClientEnd, ClientEvent, Refused};
pub use fetcher::Fetcher;
pub use serve::{ServeError, Sources, serve};
pub use server_end::{Reply, ServerEnd, ServerEvent};
pub use session::{Closed, Outgoing};
pub use stats::{ScopedStats, Stats};
pub use stream::Stream;
pub use uplinks::{Dial, FetchSettings, ParentAddr, Report, UplinkStatus, Uplinks};
