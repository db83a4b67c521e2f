//! The whole cluster on one thread, from one seed, in virtual time.
//!
//! What is real: Volt's planner, both ends of the link protocol with their bytes, the choice among parents with
//! its hedges, breakers and budgets, the verification of every chunk. What is modelled: the network (`net`),
//! the daemons' loops around the real parts (`coordinator`, `uplink`, `fetch`, `serve`), the cache group
//! (`node`), and who reads (`client`).
//!
//! Invariants:
//! - A run is a function of its [`Scenario`]: no clock, no threads, no order of a hash table.
//! - `check` looks at safety after every event. Liveness: once the faults of a run are over, every node that
//!   is there has the boot set, and every guest all it reads, within [`Scenario::patience`].
//!
//! Not here: files, so that crashes of a cache or an overlay are `store`'s own tests; several images; eviction.

mod check;
mod client;
mod content;
mod coordinator;
mod event;
mod event_queue;
mod fault;
mod fetch;
pub mod figures;
mod net;
mod node;
mod run;
mod scenario;
mod serve;
mod trace;
mod uplink;
mod world;

pub use planner::{Shape, Shaping};
pub use run::{Failure, Outcome, run};
pub use scenario::{Bug, Faults, Scenario};
pub use trace::Trace;
