//! Nodes over in-memory streams, with the clock paused.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

mod chaos;
mod failover;
mod harness;
mod hedging;
mod serving;
