//! Which parent is asked for a chunk, and when another is asked too. Pure: events and time in, decisions out,
//! so that the daemon and a simulator run the same code. Time is a [`Duration`](std::time::Duration) since any fixed moment, the same
//! for all.
//!
//! - [`Paths`] are all parents of a node, with what the node knows of each: its connection ([`LinkState`]), whether
//!   it answers ([`CircuitBreaker`]), how fast ([`Latency`]); and the budgets that all requests of the node share.
//! - A [`RequestPolicy`] is one request's way through the ranked parents of its stripe. Whoever drives it calls
//!   [`RequestPolicy::decide`] after each event and does what it says, until it says to wait.
//! - [`Multipath`] says which of several good parents gets the next request.
//!
//! What a driver tells: the [`RequestPolicy`] of each answer, refusal and loss of its own requests, and its end; the
//! [`Paths`] of each connection's life: [`greeted`](Paths::greeted), [`heard`](Paths::heard) at any byte,
//! [`failed`](Paths::failed). Nothing else passes between the two.
//!
//! Retries have no end, except when every ranked parent said for several rounds that the chunk is not to be had:
//! since the last resort is an origin, waiting longer would help nobody. Whatever else fails, the reader waits.

mod budget;
mod choice;
mod circuit_breaker;
mod latency;
mod link_state;
mod paths;
mod request;

#[cfg(test)]
mod tests;

pub use budget::{HedgeBudget, TokenBucket, in_flight_max};
pub use choice::{Multipath, Service, UnknownMultipath};
pub use circuit_breaker::{CircuitBreaker, Strike};
pub use latency::Latency;
pub use link_state::{LinkState, Standing};
pub use paths::{PathId, Paths, Settings, Verdict};
pub use request::{Decision, RequestPolicy};
