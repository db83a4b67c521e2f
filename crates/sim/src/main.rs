//! `sim`: runs of the simulated cluster from the command line.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::{Parser, Subcommand};

use sim::{Scenario, run};

/// Runs a whole cluster in virtual time, from one seed
#[derive(Debug, Parser)]
struct Args {
    /// What all chance comes from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Relays, instead of what the seed says
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    nodes: Option<u32>,
    /// Chunks of the boot set, instead of what the seed says
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs one seed after the other until one fails or the time is over
    Search {
        /// How long, in seconds
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The first seed; from the clock if absent
        #[arg(long)]
        first: Option<u64>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.command {
        None => one(&args),
        Some(Command::Search { seconds, first }) => search(Duration::from_secs(seconds), first),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("sim: {what}");
            ExitCode::FAILURE
        }
    }
}

fn one(args: &Args) -> Result<(), String> {
    let mut scenario = Scenario::random(args.seed);
    scenario.nodes = args.nodes.unwrap_or(scenario.nodes);
    scenario.chunks = args.chunks.unwrap_or(scenario.chunks);
    println!("{scenario:#?}");
    let outcome = run(&scenario).map_err(|failure| failure.to_string())?;
    println!("{outcome:#?}");
    Ok(())
}

fn search(time: Duration, first: Option<u64>) -> Result<(), String> {
    let seconds = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let first = first.unwrap_or_else(seconds);
    println!("sim: seeds from {first} on, for {} s", time.as_secs());
    let begin = Instant::now();
    let (mut runs, mut events, mut healed) = (0, 0, Duration::ZERO);
    while begin.elapsed() < time {
        let seed = first.wrapping_add(runs);
        let outcome = run(&Scenario::random(seed)).map_err(|failure| {
            format!("{failure}\nrepeat it with: cargo run --release -p sim -- --seed {seed}")
        })?;
        runs += 1;
        events += outcome.events;
        healed = healed.max(outcome.healed);
    }
    println!(
        "sim: {runs} runs with {events} events kept all promises; the longest took {:.1} s to heal",
        healed.as_secs_f64()
    );
    Ok(())
}
