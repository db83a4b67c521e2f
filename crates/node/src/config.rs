//! The options of `virtman compute`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use block::NodeName;
use clap::Args;
use link::FetchSettings;
use link::policy::{Multipath, Settings};
use planner::Location;

use crate::images::retention::IdleTimeout;
use control::units::ByteSize;

/// A file or block device for the cache group.
#[derive(Debug, Clone)]
pub struct CacheMedium {
    /// Where it is.
    pub path: PathBuf,
    /// How many bytes of it may be used, everything counted.
    pub size_bytes: u64,
}

impl FromStr for CacheMedium {
    type Err = String;
    fn from_str(text: &str) -> Result<CacheMedium, String> {
        let (path, size) = text
            .rsplit_once('=')
            .ok_or_else(|| format!("'{text}' names no size: use PATH=SIZE, such as /srv/chunks=50G"))?;
        let size: ByteSize = size.parse()?;
        Ok(CacheMedium { path: path.into(), size_bytes: size.0 })
    }
}

/// Options of a node.
#[derive(Debug, Clone, Args)]
pub struct ComputeArgs {
    /// Join a cluster with a token from `virtman volt token`; needed once
    #[arg(long, env = "VIRTMAN_JOIN", hide_env_values = true, value_name = "TOKEN")]
    pub join: Option<String>,
    /// Name of this node in the cluster; the host's name if absent. Only read when joining
    #[arg(long, value_name = "NODE")]
    pub name: Option<NodeName>,
    /// Where to listen for children and administrators (TLS with client certificates)
    #[arg(long, default_value = "0.0.0.0:7420", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// Where the other nodes reach this one, if not at the address it listens on
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// A file or block device for cached chunks and how much of it to use (repeatable); one file of
    /// 10G in the node's directory if absent. What `virtman cache add` and `virtman cache remove` said last
    /// counts more, also at the next start
    #[arg(long, value_name = "PATH=SIZE")]
    pub cache: Vec<CacheMedium>,
    /// Idle time before an automatically attached image is detached (0s: at once; `forever`: never). A VM that is
    /// created meanwhile finds the image with all that was fetched of it. What `virtman image attach` attached stays
    /// until `virtman image detach`
    #[arg(long, default_value = "10m", value_name = "TIME")]
    pub keep_warm: IdleTimeout,
    /// Where this host stands, as ZONE/RACK/HOST
    #[arg(long, default_value = "", value_name = "LABEL")]
    pub location: Location,
    /// How a parent is chosen among those that work: planned, round-robin, service-time or queue-length
    #[arg(long, default_value_t, value_name = "CHOICE")]
    pub multipath: Multipath,
    /// How long a guest's read may wait for a chunk before it fails, such as 5m; for ever if absent
    #[arg(long, value_parser = control::units::parse_duration, value_name = "TIME")]
    pub fetch_timeout: Option<Duration>,
    /// Bandwidth limit of background fetches per second, such as 10M; unlimited if absent
    #[arg(long, value_name = "SIZE")]
    pub background_rate: Option<ByteSize>,
    /// Also export disks and images over NBD on this TCP address (TLS with client certificates)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub nbd_listen: Option<SocketAddr>,
    /// Serve iSCSI exports on this TCP address, such as 0.0.0.0:3260 (repeatable: each is a portal)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub iscsi_listen: Vec<SocketAddr>,
    /// How guests are run: `auto` uses KVM where a probe shows that it works
    #[arg(long, default_value = "auto", value_parser = ["auto", "kvm", "tcg"], env = "VIRTMAN_ACCEL")]
    pub accel: String,
    /// What to do wrong, for tests
    #[cfg(feature = "faults")]
    #[arg(long, hide = true)]
    pub fault: Option<super::fault::Fault>,
}

impl ComputeArgs {
    /// How chunks are fetched.
    pub fn fetch_settings(&self) -> FetchSettings {
        let paths = Settings {
            multipath: self.multipath,
            background_bytes_per_second: self.background_rate.map(|rate| rate.0),
        };
        FetchSettings { paths, timeout: self.fetch_timeout }
    }
}
