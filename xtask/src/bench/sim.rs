//! Storms in the simulator: sizes and speeds that no single machine can stage.
//!
//! Virtual time: what is measured does not depend on the machine, and every run of one build gives the same figures.

use clap::{Args, ValueEnum};
use sim::figures::{self, BOOT_CHUNKS, Storms};
use sim::{Shape, Shaping, Trace};

use super::Outcome;

/// The boot that the storm's guests replay as well.
const BOOT: &str = include_str!("../../testdata/debian12-boot.csv");

/// Simulate storms of many nodes on a flat network, then 100 hosts in 4 racks
#[derive(Debug, Args)]
pub(super) struct SimArgs {
    /// How many nodes; 10000 take some ten minutes for each speed and shape
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000], value_parser = clap::value_parser!(u32).range(1..=20_000))]
    sizes: Vec<u32>,
    /// Rates of a link in Gbit/s
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 25], value_parser = clap::value_parser!(u32).range(1..=400))]
    speeds: Vec<u32>,
    /// Shapes of the hierarchy
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Binary, Kind::Stripes, Kind::Auto])]
    shapes: Vec<Kind>,
    /// Chunks of the boot set; fewer take less time and fall more unevenly on the stripes
    #[arg(long, default_value_t = BOOT_CHUNKS, value_parser = clap::value_parser!(u32).range(1..=16_384))]
    chunks: u32,
    /// Print JSON instead of a table; the table's rows go to standard error meanwhile
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// One binary tree
    Binary,
    /// Four stripes, four children
    Stripes,
    /// As Volt chooses
    Auto,
}

impl Kind {
    fn shaping(self) -> Shaping {
        match self {
            Kind::Binary => Shaping::Fixed(Shape::BINARY),
            Kind::Stripes => Shaping::Fixed(Shape::new(4, 4).expect("a shape that is possible")),
            Kind::Auto => Shaping::Auto,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Binary => "binary",
            Kind::Stripes => "4 stripes",
            Kind::Auto => "auto",
        }
    }
}

pub(super) fn run(args: &SimArgs) -> Outcome {
    let show = |row: &figures::Row| {
        if args.json { eprintln!("{row}") } else { println!("{row}") }
    };
    if !args.json {
        println!("{}", figures::HEADS);
    }
    let boot = Trace::parse(BOOT)?;
    let storms = Storms {
        sizes: args.sizes.clone(),
        speeds: args.speeds.iter().map(|&gbits| f64::from(gbits)).collect(),
        shapes: args.shapes.iter().map(|kind| (kind.name().to_owned(), kind.shaping())).collect(),
        chunks: args.chunks,
    };
    let mut rows = figures::storms(&storms, show).map_err(|failure| failure.to_string())?;
    rows.extend(figures::racks(&boot, show).map_err(|failure| failure.to_string())?);
    if args.json {
        let text = serde_json::to_string_pretty(&rows).map_err(|e| format!("cannot print the rows: {e}"))?;
        println!("{text}");
    }
    Ok(())
}
