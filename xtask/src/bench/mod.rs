//! Benchmarks of the release binary against foreign programs that do the same.
//!
//! What is measured is a ratio: ours and the peer take turns in one run, round by round, so that what else
//! the machine does weighs on both. A figure is the median of the rounds, with the lowest and the highest.
//! All files lie in one directory and all processes hang on guards, so that nothing outlives a run, whether
//! it ends well or not.

mod cluster;
mod create;
mod data;
mod fio;
mod http;
mod image_add;
mod iscsi;
mod life;
mod link;
mod machine;
mod nbd;
mod process;
mod report;
mod sim;
mod storm;
mod tools;
mod volt;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use tempfile::TempDir;

use self::process::Virtman;
use self::report::Report;

/// How a benchmark fails: what is wrong and what to do.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// What to measure, and how.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    large: Option<Large>,
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    what: What,
    /// How often ours and the peer take turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Local reads and writes through NBD, against qemu-storage-daemon
    Nbd,
    /// Local reads and writes through iSCSI, against tgtd, and beside hostile initiators
    Iscsi,
    /// Adding an image, against reading and hashing its file
    ImageAdd,
    /// Chunks over a link, against a bare TLS connection
    Link,
    /// Creating disks on one node, against qemu-img, and the node's memory
    Create,
    /// All of them
    All,
}

/// Benchmarks that take minutes and are set up in a way of their own.
#[derive(Debug, Subcommand)]
enum Large {
    Storm(Box<storm::StormArgs>),
    Life(life::LifeArgs),
    Sim(sim::SimArgs),
    Volt(volt::VoltArgs),
}

/// What every benchmark needs.
struct Bench {
    virtman: Virtman,
    dir: TempDir,
    rounds: u32,
}

impl Bench {
    /// Tells whoever waits at the terminal what goes on; the tables are for standard output.
    fn note(&self, what: &str) {
        eprintln!("bench: {what}");
    }
}

/// A directory for the files, in `dir` or where such directories are, removed in the end.
fn files_dir(prefix: &str, dir: Option<&Path>) -> Outcome<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    let made = match dir {
        Some(dir) => builder.tempdir_in(dir),
        None => builder.tempdir(),
    };
    made.map_err(|e| format!("cannot make a directory for the files: {e}"))
}

/// Measures what was asked for and prints it.
pub(crate) fn run(args: &BenchArgs) -> Outcome {
    match &args.large {
        Some(Large::Storm(args)) => return storm::run(args),
        Some(Large::Life(args)) => return life::run(args),
        Some(Large::Sim(args)) => return sim::run(args),
        Some(Large::Volt(args)) => return volt::run(args),
        None => {}
    }
    let wanted = |what| args.what == What::All || args.what == what;
    tools::check(&[
        (wanted(What::Nbd), &[tools::FIO, tools::QEMU_STORAGE_DAEMON]),
        (wanted(What::Iscsi), &[tools::ISCSI_PERF, tools::QEMU_IMG, tools::TGTD]),
        (wanted(What::ImageAdd), &[tools::B3SUM]),
        (wanted(What::Create), &[tools::QEMU_IMG]),
    ])?;
    let dir = files_dir("vmb", args.dir.as_deref())?;
    let virtman = Virtman::given_or_built(args.program.as_deref(), "bench")?;
    let bench = Bench { virtman, dir, rounds: args.rounds };

    let mut report = Report::new(machine::describe(bench.dir.path()), args.rounds);
    if wanted(What::Nbd) {
        report.tables.extend(nbd::run(&bench)?);
    }
    if wanted(What::Iscsi) {
        report.tables.extend(iscsi::run(&bench)?);
    }
    if wanted(What::ImageAdd) {
        report.tables.push(image_add::run(&bench)?);
    }
    if wanted(What::Link) {
        report.tables.push(link::run(&bench)?);
    }
    if wanted(What::Create) {
        report.tables.extend(create::run(&bench)?);
    }
    report.machine.load_after = machine::load();
    if args.json { report.print_json() } else { report.print() }
}
