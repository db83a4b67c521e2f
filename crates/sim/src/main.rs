//! `sim`: runs of the simulated cluster from the command line.

use clap::{Parser, Subcommand};

use sim::{Scenario, run};

/// Runs a whole cluster in virtual time
#[derive(Debug, Parser)]
struct Args {
    /// What all chance comes from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Relays instead of what the seed says
    #[arg(long)]
    nodes: Option<u32>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures storms without faults
    Figures {
        /// How many nodes they have
        #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000])]
        sizes: Vec<u32>,
    },
}

fn main() {
    let args = Args::parse();
    if let Some(Command::Figures { sizes }) = &args.command {
        println!("{}", sim::figures::HEADS);
        let rows = sim::figures::storms(sizes, |row| println!("{row}"));
        if let Err(failure) = rows {
            eprintln!("{failure}");
            std::process::exit(1);
        }
        return;
    }
    let mut scenario = Scenario::random(args.seed);
    if let Some(nodes) = args.nodes {
        scenario.nodes = nodes;
    }
    println!("{scenario:?}");
    match run(&scenario) {
        Ok(outcome) => println!("{outcome:#?}"),
        Err(failure) => {
            eprintln!("{failure}");
            std::process::exit(1);
        }
    }
}
