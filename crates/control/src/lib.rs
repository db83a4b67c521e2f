//! The control plane: how Volt, the nodes and the command line talk to each other.
//!
//! - [`http`]: requests and answers over UNIX sockets and the cluster's TLS, both sides.
//! - [`api`]: the JSON bodies that both sides share.
//! - [`enroll`]: joining the cluster, and renewing certificates.
//! - [`daemon`]: what both daemons do when they start and stop.
//! - [`units`]: sizes and durations as people write them.
//!
//! What is served, and what a peer may do, is decided by the daemons.

pub mod api;
pub mod daemon;
pub mod enroll;
pub mod http;
pub mod refusal;
pub mod units;

/// The file in the directory of Volt, of an administrator and of a node that says where Volt is.
pub const VOLT_ADDRESS_FILE: &str = "volt";
