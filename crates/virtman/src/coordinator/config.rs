//! The options of `virtman volt`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

use crate::units::parse_duration;

/// Options of the coordinator.
#[derive(Debug, Clone, Args)]
pub(crate) struct VoltArgs {
    /// Where to listen for nodes and administrators (TLS with client certificates)
    #[arg(long, default_value = "127.0.0.1:7410", value_name = "ADDRESS:PORT")]
    pub(crate) listen: SocketAddr,
    /// A node that is not heard of for so long is taken for dead
    #[arg(long, default_value = "3s", value_parser = parse_duration, value_name = "DURATION")]
    pub(crate) lease: Duration,
    /// How many children a node serves per stripe
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64), value_name = "N")]
    pub(crate) fan_out: u32,
    /// How many trees an image's chunks are spread over
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16), value_name = "N")]
    pub(crate) stripes: u32,
}
