//! `virtman`: the one binary. Volt, the node and the command line.

mod api;
mod cli;
mod compute;
mod coordinator;
mod daemon;
mod http;
mod identity;
mod units;

use std::process::ExitCode;

fn main() -> ExitCode {
    link::keep_freed_buffers();
    cli::main()
}
