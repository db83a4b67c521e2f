//! The command line: its grammar and help texts. What each command does stands in the module beside it.

mod boot;
mod cache;
mod clone;
mod context;
mod details;
mod export;
mod image;
mod migrate;
mod output;
mod profile;
mod run;
mod show;
mod snapshot;
mod vm;

use std::path::PathBuf;

use block::{ImageName, NodeName, VmName};
use clap::{Args, Parser, Subcommand};

use control::units::ByteSize;
use node::config::ComputeArgs;
use volt::config::VoltArgs;

pub(crate) use run::main;

/// Boots tens to thousands of identical virtual machines in seconds, without copying their image first.
///
/// One host runs `virtman volt`, the coordinator. Every host runs `virtman compute`. One of them adds an
/// image; all of them can then give VMs disks on it.
#[derive(Debug, Parser)]
#[command(name = "virtman", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  virtman volt init && virtman volt                     start a cluster's coordinator
  virtman volt token                                    let one more host join
  virtman compute --join TOKEN --cache /srv/chunks=50G  run a host
  virtman image add debian:12 debian-12.qcow2           make this host the image's origin
  virtman boot --image debian:12 --count 40             boot 40 VMs, spread over all hosts
  virtman tree                                          see who fetches from whom";

/// Heading of the options that every command takes.
const GLOBAL: &str = "Options of every command";

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Directory of VirtMan's state on this host: `volt/`, `node/` and `admin/` lie in it
    #[arg(long, global = true, help_heading = GLOBAL, env = "VIRTMAN_HOME", default_value = "/var/lib/virtman", value_name = "DIR")]
    pub(crate) home: PathBuf,

    /// Directory of the node to talk to or to run, if it is not HOME/node
    #[arg(long, global = true, help_heading = GLOBAL, env = "VIRTMAN_NODE_DIR", value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,

    /// Talk to this node of the cluster, wherever it is, instead of the one on this host
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "NODE")]
    pub(crate) node: Option<NodeName>,

    /// Print JSON instead of tables
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,
}

impl Global {
    /// The directory of the node on this host.
    pub(crate) fn node_dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| self.home.join("node"))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the coordinator, or set up its cluster
    #[command(args_conflicts_with_subcommands = true)]
    Volt {
        #[command(subcommand)]
        command: Option<VoltCommand>,
        #[command(flatten)]
        args: VoltArgs,
    },
    /// Run this host's node: its cache, its links and its VMs' disks
    Compute(Box<ComputeArgs>),
    /// Add, list, check and remove images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Give a VM a private disk on an image and print where to open it
    Create(CreateArgs),
    /// Remove VMs with their disks
    ///
    /// An image that was attached because VMs needed it is detached from a node once nobody there uses it and the time
    /// of `compute --keep-warm` is over. What fetches it from that node gets other parents first.
    Destroy {
        /// The VMs
        #[arg(required = true)]
        vms: Vec<VmName>,
        /// Leave the image attached, for VMs to come: until `virtman image detach`, or until the next VM on it is
        /// destroyed on that node without this
        #[arg(long)]
        instance_only: bool,
    },
    /// List VMs
    List,
    /// Show everything about a VM: its disk's layers, snapshots, exports, and how it came up
    Show {
        /// The VM
        vm: VmName,
    },
    /// Make copies of a VM's disk, on its node or on others
    Clone(clone::CloneArgs),
    /// Move a VM to another node, while its guest runs or not
    Migrate(migrate::MigrateArgs),
    /// Make an image of a VM's disk
    Commit(clone::CommitArgs),
    /// Take snapshots of VMs' disks, go back to them, and give them up
    Snapshot(snapshot::SnapshotArgs),
    /// List the ways to disks and images, and export them over iSCSI
    #[command(subcommand)]
    Export(export::ExportCommand),
    /// List, add and remove the files and devices in which a node keeps chunks
    ///
    /// They may come and go while guests run. What `add` and `remove` say is remembered, and counts more than
    /// `compute --cache`, also at the next start.
    #[command(subcommand, after_help = cache::EXAMPLES)]
    Cache(cache::CacheCommand),
    /// Boot many VMs from an image, spread over the nodes, and wait until they are ready
    Boot(Box<boot::BootArgs>),
    /// Stop guests; their disks stay
    Stop(StopArgs),
    /// Attach this terminal to a VM's serial console; Ctrl-] leaves
    Console {
        /// The VM
        vm: VmName,
    },
    /// Show the nodes, images and caches of the cluster
    Status,
    /// Show who fetches from whom
    Tree {
        /// Only this image
        image: Option<ImageName>,
    },
    /// Print a completion script: `virtman completions bash > /etc/bash_completion.d/virtman`
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        out: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VoltCommand {
    /// Create the cluster: its certificate authority, Volt's own certificate and an administrator's
    Init {
        /// Name of the administrator whose credentials are put in HOME/admin
        #[arg(long, default_value = "admin")]
        admin: NodeName,
        /// Where nodes reach Volt, as HOST:PORT; goes into join tokens
        #[arg(long, default_value = "127.0.0.1:7410", value_name = "HOST:PORT")]
        address: String,
    },
    /// Print a one-time token with which one host can join
    Token {
        /// How long the token works, such as 10m or 2h
        #[arg(long, default_value = "1h", value_parser = control::units::parse_duration)]
        valid: std::time::Duration,
        /// Only for a node of this name; it then replaces the node that has the name
        #[arg(long = "for", value_name = "NODE")]
        node: Option<NodeName>,
    },
    /// Remove a node from the cluster; its certificate is refused from now on
    Remove {
        /// The node
        node: NodeName,
    },
    /// Let a node that was quarantined for sending wrong bytes serve others again
    Pardon {
        /// The node
        node: NodeName,
    },
    /// Print the OpenAPI document of Volt's HTTP API
    Openapi,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make a node the origin of an image; reads the file once to hash it and copies nothing
    Add {
        /// Name with tag, such as debian:12
        name: ImageName,
        /// The file or block device: raw, qcow2 (also compressed, also with backing files), vmdk, vhdx; or a logical
        /// unit as iscsi://HOST/TARGET/LUN, with USER@ before HOST and :PORT behind it where they are needed; or an export
        /// of an NBD server as nbd://HOST/EXPORT, with :PORT behind HOST if it is another than 10809, or as
        /// nbd+unix:///EXPORT?socket=PATH, with a socket on the node
        file: PathBuf,
        /// Its format, if it should not be detected
        #[arg(long, value_parser = ["raw", "qcow2", "vmdk", "vhdx"])]
        format: Option<String>,
        /// Backing files and extents may also lie in this directory (repeatable)
        #[arg(long, value_name = "DIR")]
        allow: Vec<PathBuf>,
        /// Keep a sparse raw copy, so that FILE may be changed or deleted afterwards
        #[arg(long)]
        copy: bool,
        #[command(flatten)]
        secrets: image::SecretArgs,
    },
    /// List the cluster's images, or with --node those that the node has attached
    List,
    /// Show an image: size, chunks, id, origins
    Show {
        /// Name with tag, or id
        image: String,
    },
    /// Take an image's name out of the catalog; on its origin, also forget what was kept of it
    Remove {
        /// Name with tag
        image: ImageName,
        /// Even if nodes have it attached
        #[arg(long)]
        force: bool,
    },
    /// Read an origin's image again and compare every chunk with the manifest
    Verify {
        /// Name with tag
        image: ImageName,
    },
    /// Say how an image is spread over its nodes: along how many trees, and to how many children each
    #[command(group = clap::ArgGroup::new("shape").required(true).multiple(true))]
    Tune {
        /// Name with tag, or id
        image: String,
        /// How many trees its chunks are spread over
        #[arg(long, group = "shape", value_parser = clap::value_parser!(u32).range(1..=i64::from(planner::STRIPES_MAX)), value_name = "N")]
        stripes: Option<u32>,
        /// How many children a node serves at most; no fewer than there are trees
        #[arg(long, group = "shape", value_parser = clap::value_parser!(u32).range(1..=i64::from(planner::FAN_OUT_MAX)), value_name = "N")]
        fan_out: Option<u32>,
        /// Let Volt choose both by the number of nodes
        #[arg(long, group = "shape", conflicts_with_all = ["stripes", "fan_out"])]
        auto: bool,
    },
    /// Show, record and exchange what guests read first
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Attach an image to a node without creating a VM; it stays until it is detached
    Attach {
        /// Name with tag
        image: ImageName,
        /// Fetch all of it while nobody waits for it, at most as fast as `compute --background-rate` says
        #[arg(long)]
        fill: bool,
    },
    /// Detach an image that no VM of the node uses
    Detach {
        /// Name with tag
        image: ImageName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Name of the VM
    pub(crate) vm: VmName,
    /// The image below its disk
    #[arg(long)]
    pub(crate) image: ImageName,
    /// Initialise the disk from this qcow2 overlay of IMAGE; its backing file is ignored
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
    /// Size of the disk, such as 20G; may exceed the image's
    #[arg(long, conflicts_with = "from")]
    pub(crate) size: Option<ByteSize>,
    /// Also let hypervisors elsewhere open it over this protocol; over NBD it can be opened anyway
    #[arg(long, value_name = "PROTOCOL", requires = "access")]
    pub(crate) export: Option<export::Protocol>,
    #[command(flatten)]
    pub(crate) access: export::AccessArgs,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// The VMs
    #[arg(required_unless_present = "all")]
    pub(crate) vms: Vec<VmName>,
    /// All VMs of all nodes
    #[arg(long, conflicts_with = "vms")]
    pub(crate) all: bool,
    /// How long a guest may take to power down before it is ended
    #[arg(long, default_value = "30s", value_parser = control::units::parse_duration)]
    pub(crate) grace: std::time::Duration,
    /// Pull the plug at once
    #[arg(long, conflicts_with = "grace")]
    pub(crate) now: bool,
}
