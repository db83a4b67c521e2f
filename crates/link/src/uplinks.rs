//! All parents of a node: one connection each, shared by all images.
//!
//! Consistency: a parent is known by name and address; whoever asks for the same gets the same connection.
//! Lifetime: an uplink lives as long as a plan names it; dropping the last reference ends its task and closes
//! its stream. Bans outlive that, so that a liar does not come back by leaving the plan for a moment.

pub(crate) mod uplink;

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use block::{BoxFuture, ChunkHash, ImageId, NodeName, Priority};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, watch};

use self::uplink::Uplink;
use crate::limits::REPORTS_MAX;
use crate::policy::{LinkState, Paths, Settings, Standing, in_flight_max};
use crate::stats::Stats;
use crate::stream::{Clock, Stream};

/// Where a parent is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParentAddr {
    /// Its name, which its certificate must bear.
    pub node: NodeName,
    /// What the dialer makes of it: host and port.
    pub address: String,
}

/// Opens streams to parents.
pub trait Dial: Send + Sync {
    /// Connects, and proves that the other end is `parent.node`. May be dropped at any await.
    fn dial<'a>(&'a self, parent: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>>;
}

/// What the coordinator should know about a parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// It sent bytes that are not this chunk.
    Lied {
        /// The parent.
        node: NodeName,
        /// The image of which it was asked.
        image: ImageId,
        /// The chunk that was asked for.
        chunk: ChunkHash,
    },
    /// It cannot be reached any more, or at the first try.
    Lost {
        /// The parent.
        node: NodeName,
    },
    /// It was lost and is back.
    Back {
        /// The parent.
        node: NodeName,
    },
}

/// The state of one uplink, for people.
#[derive(Debug, Clone)]
pub struct UplinkStatus {
    /// The parent.
    pub parent: ParentAddr,
    /// Whether requests go there.
    pub standing: Standing,
    /// What came over it.
    pub stats: Arc<Stats>,
}

/// All parents of a node. See the module's documentation.
pub struct Uplinks {
    pub(crate) node: NodeName,
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) total: Arc<Stats>,
    pub(crate) clock: Clock,
    reports: mpsc::Sender<Report>,
    /// Counts parents that came up, so that waiting requests try again at once.
    ups: watch::Sender<u64>,
    paths: Arc<SharedPaths>,
    /// How long a guest's fetch may take before it fails; [`None`] is for ever.
    pub(crate) fetch_timeout: Option<Duration>,
    /// Fetches in flight, by priority. Those that find it full wait in line.
    budgets: [Semaphore; PRIORITIES.len()],
    table: Mutex<Table>,
}

const PRIORITIES: [Priority; 3] = [Priority::Background, Priority::Profile, Priority::Guest];

/// What an administrator may choose for a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchSettings {
    /// Which parents are asked.
    pub paths: Settings,
    /// How long a guest's fetch may take before it fails; [`None`] is for ever.
    pub timeout: Option<Duration>,
}

/// The paths of a node. Each event is one call under the lock.
pub(crate) struct SharedPaths(Mutex<Paths>);

impl SharedPaths {
    /// The state stays whole whatever a holder of the lock does: each change is one call.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Paths> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Table {
    uplinks: HashMap<ParentAddr, Weak<Uplink>>,
    bans: HashMap<NodeName, Duration>,
}

impl Uplinks {
    /// No parents yet. `node` is our own name. The receiver gets what the coordinator should know; reports
    /// that find it full are dropped and counted.
    pub fn new(
        node: NodeName,
        dial: Arc<dyn Dial>,
        total: Arc<Stats>,
        settings: FetchSettings,
    ) -> (Arc<Uplinks>, mpsc::Receiver<Report>) {
        let (reports, receiver) = mpsc::channel(REPORTS_MAX);
        let paths = Paths::new(settings.paths, Arc::clone(&total));
        let uplinks = Uplinks {
            node,
            dial,
            total,
            clock: Clock::start(),
            reports,
            ups: watch::channel(0).0,
            paths: Arc::new(SharedPaths(Mutex::new(paths))),
            fetch_timeout: settings.timeout,
            budgets: PRIORITIES.map(|priority| Semaphore::new(in_flight_max(priority))),
            table: Mutex::default(),
        };
        (Arc::new(uplinks), receiver)
    }

    /// Waits in line for a place among the fetches in flight.
    pub(crate) async fn admit(&self, priority: Priority) -> SemaphorePermit<'_> {
        self.budgets[priority as usize].acquire().await.expect("the budgets are never closed")
    }

    /// The parents as requests see them.
    pub(crate) fn paths(&self) -> &Arc<SharedPaths> {
        &self.paths
    }

    /// Every parent that a plan names.
    pub fn status(&self) -> Vec<UplinkStatus> {
        let live: Vec<Arc<Uplink>> = self.table().uplinks.values().filter_map(Weak::upgrade).collect();
        live.iter().map(|uplink| uplink.status()).collect()
    }

    /// The uplink to `parent`, which is dialed when first asked. Must be called within a runtime.
    pub(crate) fn uplink(self: &Arc<Uplinks>, parent: &ParentAddr) -> Arc<Uplink> {
        let mut table = self.table();
        if let Some(uplink) = table.uplinks.get(parent).and_then(Weak::upgrade) {
            return uplink;
        }
        let now = self.clock.now();
        table.bans.retain(|_, until| *until > now);
        table.uplinks.retain(|_, uplink| uplink.strong_count() > 0);
        let mut hasher = DefaultHasher::new();
        (&self.node, parent).hash(&mut hasher);
        let link = match table.bans.get(&parent.node) {
            Some(until) => LinkState::banned(hasher.finish(), *until),
            None => LinkState::new(hasher.finish()),
        };
        let uplink = Arc::new(Uplink::spawn(self, parent.clone(), link));
        table.uplinks.insert(parent.clone(), Arc::downgrade(&uplink));
        uplink
    }

    pub(crate) fn ban(&self, node: &NodeName, until: Duration) {
        self.table().bans.insert(node.clone(), until);
    }

    pub(crate) fn report(&self, report: Report) {
        if self.reports.try_send(report).is_err() {
            self.total.reports_dropped.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    pub(crate) fn came_up(&self) {
        self.ups.send_modify(|count| *count += 1);
    }

    pub(crate) fn ups(&self) -> watch::Receiver<u64> {
        self.ups.subscribe()
    }

    /// The table stays whole whatever a holder of the lock does: each change is one call on a map.
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
