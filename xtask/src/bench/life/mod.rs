//! The life of a VM after its boot: snapshots, layers, clones and moves, as distributions.
//!
//! Everything is real: Volt and nodes as released, on loopback, with their files in one directory, and guests under
//! QEMU. What a guest would notice is measured where it would: at the NBD client that writes while a snapshot is taken,
//! and at the console of a guest that moves. Where a foreign program does the same, it does so in the same run.

mod carry;
mod crowd;
mod depth;
mod figures;
mod guests;
mod load;
mod moves;
mod pause;
mod site;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use self::figures::Sheet;
use self::guests::Guest;
use super::process::Virtman;
use super::report::Table;
use super::{Outcome, machine, tools};

/// How long guests may take to boot: many at once, without KVM.
const BOOT_TIME_MAX: &str = "60m";

/// Measure snapshots, layers, clones and moves of VMs (minutes; with --debian many of them)
#[derive(Debug, Args)]
pub(super) struct LifeArgs {
    /// What to measure; everything if absent
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// How often each thing is done: disks of ten snapshots each, clones, crowds of counting guests
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// Also boot, clone and move Debian: the image that `scripts/guest-image` built, with what lies beside it
    #[arg(long, value_name = "FILE")]
    debian: Option<PathBuf>,
    /// Memory of each Debian guest
    #[arg(long, default_value = "160M", value_name = "SIZE")]
    memory: String,
    /// How many clones of a running VM
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(2..=1000))]
    clones: u16,
    /// Where the files go: a directory with 8 GiB of room and a path of at most 16 bytes, because sockets
    /// lie in it; the system's directory for temporary files if absent
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Measure this program, such as an earlier build, instead of building one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

/// A part of a VM's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// How long a snapshot holds up writes, against qemu-storage-daemon
    Pause,
    /// Reads and writes through many layers, against one layer
    Depth,
    /// What a clone moves to another node, against what its VM wrote
    Carry,
    /// Many clones of a running VM, against booting as many from its image
    Crowd,
    /// Live migration
    Moves,
}

/// What every part needs.
struct Life {
    virtman: Virtman,
    dir: TempDir,
    rounds: u32,
    debian: Option<Guest>,
    runtime: Runtime,
}

impl Life {
    /// Tells whoever waits at the terminal what goes on; tables are for standard output.
    fn note(&self, what: &str) {
        eprintln!("life: {what}");
    }
}

/// Measures what `args` ask for and prints it.
pub(super) fn run(args: &LifeArgs) -> Outcome {
    let wanted = |part| args.parts.is_empty() || args.parts.contains(&part);
    tools::check(&[
        (wanted(Part::Pause), &[tools::QEMU_STORAGE_DAEMON, tools::QEMU_IMG]),
        (wanted(Part::Depth), &[tools::FIO]),
        (wanted(Part::Crowd) || wanted(Part::Moves), &[tools::QEMU_SYSTEM]),
    ])?;
    let dir = super::files_dir("vml", args.dir.as_deref())?;
    let virtman = Virtman::given_or_built(args.program.as_deref(), "life")?;
    let debian = args.debian.as_ref().map(|image| Guest::debian(image, &args.memory)).transpose()?;
    let runtime = Runtime::new().map_err(|e| format!("cannot start the runtime: {e}"))?;
    let life = Life { virtman, dir, rounds: args.rounds, debian, runtime };
    let mut machine = machine::describe(life.dir.path());
    let (mut tables, mut sheets) = (Vec::new(), Vec::new());
    if wanted(Part::Pause) {
        sheets.push(pause::run(&life)?);
    }
    if wanted(Part::Depth) {
        tables.push(depth::run(&life)?);
    }
    if wanted(Part::Carry) {
        sheets.push(carry::run(&life)?);
    }
    if wanted(Part::Crowd) {
        sheets.push(crowd::run(&life, usize::from(args.clones))?);
    }
    if wanted(Part::Moves) {
        sheets.push(moves::run(&life)?);
    }
    machine.load_after = machine::load();
    if args.json {
        let report = serde_json::json!({ "machine": machine, "tables": tables, "sheets": sheets });
        println!("{report:#}");
    } else {
        machine.print();
        tables.iter().for_each(Table::print);
        sheets.iter().for_each(Sheet::print);
    }
    Ok(())
}
