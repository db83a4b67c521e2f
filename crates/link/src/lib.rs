//! The node-to-node chunk protocol.
//!
//! - [`Child`] and [`Parent`] are the two ends of a link as state machines: no socket, no clock, no runtime.
//!   [`wire`] is their frames; `docs/formats/link.md` describes the bytes.
//! - [`policy`] says which parent to ask next and when to try a failed one again: pure as well.
//! - [`serve()`] puts a `Parent` on a stream; [`Uplinks`] keeps one `Child` per parent, for all images; a
//!   [`Fetcher`] is one image's [`ChunkSource`](block::ChunkSource) over them.
//!
//! Invariants:
//! - No chunk leaves this crate upward unless it was verified by this node.
//! - Foreign bytes end a link at worst; they never panic and never cost more than the bounds in [`limits`].
//! - This crate knows no TLS and no addresses: streams come from a [`Dial`] or are handed to [`serve()`], with
//!   the peer's name proven.

mod chase;
mod child;
mod fetcher;
mod heap;
pub mod limits;
pub mod pack;
mod parent;
pub mod policy;
mod serve;
mod session;
mod stats;
mod stream;
mod uplink;
mod uplinks;
pub mod wire;

pub use child::{Child, ChildEvent, Refused};
pub use fetcher::Fetcher;
pub use heap::keep_freed_buffers;
pub use parent::{Parent, ParentEvent, Reply};
pub use serve::{ServeError, Sources, serve};
pub use session::{Closed, Outgoing};
pub use stats::{Stats, Tally};
pub use stream::Stream;
pub use uplinks::{Dial, FetchSettings, ParentAddr, Report, UplinkStatus, Uplinks};
