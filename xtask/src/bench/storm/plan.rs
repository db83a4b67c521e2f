//! What a storm is asked to be: its options, and what follows from them.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use block::{ChunkIndex, ImageId};
use clap::{Args, ValueEnum};
use image::BootProfile;

use super::super::Outcome;
use super::super::tools;
use super::content::CHUNK;
use super::network::{Place, Rate};
use super::trace::Trace;

/// All links together must not be faster than this, in Mbit/s, or the machine's processors are measured.
const LINKS_MBIT_MAX: f64 = 3000.0;

/// Boot many VMs on many nodes at once, in network namespaces with links of a given speed (needs root)
#[derive(Debug, Clone, Args)]
pub(crate) struct StormArgs {
    /// Nodes, the origin aside
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=500))]
    nodes: u16,
    /// VMs on each node; with 0, images are only attached, which needs a boot profile
    #[arg(long, default_value_t = 10)]
    pub(super) vms: usize,
    /// Speed of each node's link in each direction
    #[arg(long, default_value_t = 90.0, value_name = "MBIT/S")]
    rate: f64,
    /// Racks over which the nodes are spread, each behind an uplink of its own; 1 means no racks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=50))]
    racks: u16,
    /// How much faster a rack's nodes are together than its uplink
    #[arg(long, default_value_t = 25.0)]
    oversubscription: f64,
    /// The boot that is replayed
    #[arg(long, value_enum, default_value_t = Guest::Debian)]
    guest: Guest,
    /// Replay only so many reads of it
    #[arg(long)]
    reads: Option<usize>,
    /// Factor of the recorded pauses between requests; 0 leaves them out
    #[arg(long, default_value_t = 1.0)]
    pub(super) think: f64,
    /// Whether Volt has a boot profile beforehand
    #[arg(long, value_enum, default_value_t = Profile::None)]
    profile: Profile,
    /// Shapes of the hierarchy, one run each: STRIPESxFAN-OUT, such as 1x2,4x4; auto leaves it to Volt
    #[arg(long = "shape", value_delimiter = ',', default_value = "auto")]
    pub(super) shapes: Vec<Shape>,
    /// Data in the image, in MiB: what the boot reads, and a rest that it does not
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    image_mib: u64,
    /// Let things go wrong during the cold run: all kinds, or only nodes that die; there is no warm run then
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "all", value_name = "KIND")]
    pub(super) churn: Option<ChurnKind>,
    /// Also run foreign programs in the same network under the same guests
    #[arg(long)]
    pub(super) baselines: bool,
    /// Also measure an attach at the end of a chain of eight nodes
    #[arg(long)]
    pub(super) attach: bool,
    /// How long a run may take, in seconds
    #[arg(long, default_value_t = 900)]
    pub(super) limit: u64,
    /// What all random choices follow from
    #[arg(long, default_value_t = 1)]
    pub(super) seed: u64,
    /// Run this program instead of building one
    #[arg(long, value_name = "FILE")]
    pub(super) program: Option<PathBuf>,
    /// Also write all figures to this file
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Draw the storm over time into this file
    #[arg(long, value_name = "FILE")]
    pub(super) svg: Option<PathBuf>,
    /// Keep what the daemons log in this directory, which must not lie below /run
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ChurnKind {
    /// Nodes die and join, links fail, Volt and the origin go away for a while
    All,
    /// A tenth of the nodes is killed: what parents' deaths alone cost
    Deaths,
}

/// A boot to replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Guest {
    /// A recorded boot of Debian 12
    Debian,
    /// A synthetic one in the shape of Windows': 70,000 reads, 560 MB
    Windows,
}

/// Where a boot profile comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Profile {
    /// There is none when the storm begins
    None,
    /// It was imported before, made from the boot that is replayed
    Trace,
}

/// Shape of the hierarchy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// As Volt chooses.
    Auto,
    /// As told.
    Told { stripes: u32, fan_out: u32 },
}

impl Shape {
    /// Each node below the one before.
    pub(super) const CHAIN: Shape = Shape::Told { stripes: 1, fan_out: 1 };

    /// For `virtman volt`.
    pub(super) fn options(self) -> Vec<String> {
        match self {
            Shape::Auto => Vec::new(),
            Shape::Told { stripes, fan_out } => {
                vec![format!("--stripes={stripes}"), format!("--fan-out={fan_out}")]
            }
        }
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        if text == "auto" {
            return Ok(Shape::Auto);
        }
        let numbers = text.split_once('x').and_then(|(s, f)| Some((s.parse().ok()?, f.parse().ok()?)));
        let (stripes, fan_out) = numbers
            .ok_or_else(|| format!("'{text}' is not a shape: use STRIPESxFAN-OUT, such as 4x4, or auto"))?;
        Ok(Shape::Told { stripes, fan_out })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Auto => write!(f, "auto"),
            Shape::Told { stripes, fan_out } => write!(f, "{stripes}x{fan_out}"),
        }
    }
}

/// The cluster and network of a run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) nodes: usize,
    pub(super) vms: usize,
    pub(super) rate: Rate,
    /// None if 0.
    pub(super) racks: usize,
    pub(super) oversubscription: f64,
    pub(super) shape: Shape,
    pub(super) profile: Profile,
    pub(super) logs: Option<PathBuf>,
    pub(super) image_mib: u64,
    pub(super) seed: u64,
}

/// What a boot reads of the image.
#[derive(Debug, Clone)]
pub(super) struct Boot {
    /// In the order of the first touch, as indices.
    pub(super) chunks: Vec<u64>,
    /// How long it took when it was recorded.
    pub(super) recorded: Duration,
}

impl StormArgs {
    /// Refuses what cannot be run, before anything is built.
    pub(super) fn check(&self) -> Outcome {
        tools::check(&[
            (true, &[tools::IP, tools::TC, tools::UNSHARE, tools::SETPRIV, tools::NSENTER]),
            (self.baselines, &[tools::NBDKIT, tools::QEMU_NBD, tools::QEMU_STORAGE_DAEMON, tools::QEMU_IMG]),
            (self.baselines, &[tools::PYTHON, tools::CURL]),
        ])?;
        if self.vms == 0 && self.profile == Profile::None {
            return Err("without VMs nodes fetch nothing but a boot profile: use --profile trace".to_owned());
        }
        if f64::from(self.nodes) * self.rate > LINKS_MBIT_MAX {
            super::note(&format!(
                "all links together exceed {LINKS_MBIT_MAX} Mbit/s: processors may be the limit"
            ));
        }
        if let Some(logs) = &self.logs {
            fs::create_dir_all(logs).map_err(|e| format!("cannot make {}: {e}", logs.display()))?;
        }
        Ok(())
    }

    /// The boot to replay.
    pub(super) fn trace(&self) -> Outcome<Trace> {
        let whole = match self.guest {
            Guest::Debian => Trace::debian()?,
            Guest::Windows => Trace::windows(self.seed),
        };
        Ok(match self.reads {
            Some(reads) => whole.cut(reads),
            None => whole,
        })
    }

    pub(super) fn image_bytes(&self) -> u64 {
        self.image_mib << 20
    }

    pub(super) fn plan(&self, shape: Shape) -> Plan {
        Plan {
            nodes: self.nodes.into(),
            vms: self.vms,
            rate: Rate { mbit: self.rate },
            racks: if self.racks > 1 { self.racks.into() } else { 0 },
            oversubscription: self.oversubscription,
            shape,
            profile: self.profile,
            logs: self.logs.clone(),
            image_mib: self.image_mib,
            seed: self.seed,
        }
    }
}

impl Plan {
    /// Where the node of this number stands: racks are filled in turn.
    pub(super) fn place(&self, number: usize) -> Place {
        if self.racks == 0 { Place::Core } else { Place::Rack(number % self.racks) }
    }

    /// Speed of a rack's uplink.
    pub(super) fn uplink(&self) -> Rate {
        let nodes = self.nodes.div_ceil(self.racks.max(1)) as f64;
        Rate { mbit: self.rate.mbit * nodes / self.oversubscription }
    }

    /// The least time in which a link, or a rack's uplink where that is slower, carries what a boot reads.
    pub(super) fn bound_seconds(&self, boot: &Boot) -> f64 {
        let slowest =
            if self.racks == 0 { self.rate } else { Rate { mbit: self.rate.mbit.min(self.uplink().mbit) } };
        boot.bytes() as f64 / slowest.bytes_per_second()
    }

    /// Room for cached chunks on a node: the image, its manifest and some spare.
    pub(super) fn cache_mib(&self) -> u64 {
        self.image_mib + 512
    }
}

impl Boot {
    pub(super) fn of(trace: &Trace) -> Boot {
        let gaps_us = trace.steps.iter().map(|step| step.gap_us).sum();
        Boot { chunks: trace.chunks_in_order(), recorded: Duration::from_micros(gaps_us) }
    }

    /// Bytes of the chunks, which are all different and none of them zero: W.
    pub(super) fn bytes(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    /// Writes the boot profile of `image` that recording this boot would give.
    pub(super) fn write_profile(&self, path: &Path, image: ImageId) -> Outcome {
        let chunks = self.chunks.iter().map(|&chunk| ChunkIndex(chunk)).collect();
        let profile = BootProfile::new(image, chunks).map_err(|e| e.to_string())?;
        fs::write(path, profile.encode()).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }
}
