//! Storms in the simulator: sizes and speeds that no single machine can stage.
//!
//! Virtual time: what is measured does not depend on the machine, and every run of one build gives the same figures.

use clap::Args;
use sim::{Trace, figures};

use super::Outcome;

/// The boot that the storm's guests replay as well.
const BOOT: &str = include_str!("../../testdata/debian12-boot.csv");

/// Simulate storms of up to 10,000 nodes, and of 100 hosts in 4 racks; takes some minutes
#[derive(Debug, Args)]
pub(super) struct SimArgs {
    /// How many nodes the storms on a flat network have
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000, 10_000])]
    sizes: Vec<u32>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &SimArgs) -> Outcome {
    let show = |row: &figures::Row| {
        if args.json { eprintln!("{row}") } else { println!("{row}") }
    };
    if !args.json {
        println!("{}", figures::HEADS);
    }
    let boot = Trace::parse(BOOT)?;
    let mut rows = figures::storms(&args.sizes, show).map_err(|failure| failure.to_string())?;
    rows.extend(figures::racks(&boot, show).map_err(|failure| failure.to_string())?);
    if args.json {
        let text = serde_json::to_string_pretty(&rows).map_err(|e| format!("cannot print the rows: {e}"))?;
        println!("{text}");
    }
    Ok(())
}
