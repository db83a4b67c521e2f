//! The project's own chores that are programs: `cargo xtask bench`.

mod bench;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "The project's own chores")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Measure the program against foreign ones that do the same on the same machine in the same run
    Bench(bench::BenchArgs),
}

fn main() -> ExitCode {
    // As the daemon does, whose links are measured here.
    link::malloc::configure();
    let Chore::Bench(args) = Cli::parse().chore;
    match bench::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("xtask: {reason}");
            ExitCode::FAILURE
        }
    }
}
