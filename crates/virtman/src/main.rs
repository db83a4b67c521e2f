//! `virtman`: the one binary. Volt, the node and the command line.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    link::malloc::configure();
    cli::main()
}
