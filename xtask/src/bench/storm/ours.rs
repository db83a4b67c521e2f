//! One run of VirtMan itself: all VMs of all nodes, or an attach of all nodes without VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use block::BoxFuture;
use nbd::client::{Client, Options};
use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::super::Outcome;
use super::churn::{self, Churn};
use super::crowd::{self, Cast, Progress, Seat};
use super::figures::{Percentiles, Run, Uplink};
use super::network::Traffic;
use super::plan::{Boot, ChurnKind, Plan, Profile};
use super::site::{Node, Site};
use super::watch as look;

/// Nodes that may join while a storm runs: they wait in a queue of so many.
const ARRIVALS_MAX: usize = 64;

/// Between two questions to a node whether it has its boot profile: ten a second from 32 nodes are nothing
/// beside a storm, and the answer holds the exact time.
const PROFILE_POLL: Duration = Duration::from_millis(200);

/// What a run is about.
pub(super) struct Task<'a> {
    pub(super) name: String,
    pub(super) plan: &'a Plan,
    pub(super) boot: &'a Boot,
    pub(super) cast: Cast,
    pub(super) caches: Caches,
    /// What happens meanwhile.
    pub(super) weather: Weather,
}

impl Task<'_> {
    /// About the time in which guests fetch: as long as they boot, or as the network needs.
    fn fetching(&self) -> Duration {
        let network = Duration::from_secs_f64(self.plan.bound_seconds(self.boot));
        network.max(self.boot.recorded.mul_f64(self.cast.script.think))
    }
}

/// What the nodes hold when a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caches {
    /// Nothing.
    Cold,
    /// All that the run before read.
    Warm,
}

/// Whether anything goes wrong during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weather {
    Calm,
    /// Faults of this kind, chosen by this seed.
    Churn {
        kind: ChurnKind,
        seed: u64,
    },
}

impl Seat for Node {
    fn name(&self) -> &str {
        &self.name
    }

    fn open<'a>(&'a self, vm: &'a str) -> BoxFuture<'a, Outcome<Client>> {
        Box::pin(async move {
            let uri = self.create_or_find(vm).await?;
            let uri = uri.parse().map_err(|e| format!("node {}: {e}", self.name))?;
            Client::connect_uri(&uri, Options::default()).await.map_err(|e| e.to_string())
        })
    }

    fn gone(&self) -> watch::Receiver<bool> {
        self.gone.subscribe()
    }
}

/// What was counted before a run.
struct Marks {
    origin: Traffic,
    uplinks: Vec<Traffic>,
    cpu_seconds: f64,
    origin_sent: u64,
    nodes: BTreeMap<String, Fetches>,
}

/// What a node counted.
#[derive(Debug, Clone, Copy, Default)]
struct Fetches {
    /// Chunks that came over links.
    received: u64,
    /// Chunks that its cache holds.
    held: u64,
    /// Fetches that went to a second parent.
    second: u64,
}

impl Fetches {
    fn of(status: &Value) -> Fetches {
        let links = &status["links"];
        Fetches {
            received: count(&links["received_chunks"]),
            held: count(&status["cache"]["resident_chunks"]),
            second: count(&links["hedges"]) + count(&links["failovers"]),
        }
    }

    /// What came on top of `before`. Nothing is evicted: the cache has room for the whole image.
    fn since(self, before: Fetches) -> Fetches {
        Fetches {
            received: self.received - before.received,
            held: self.held - before.held,
            second: self.second - before.second,
        }
    }
}

impl Marks {
    fn take(site: &Site) -> Outcome<Marks> {
        let mut nodes = BTreeMap::new();
        for node in site.nodes().iter().filter(|node| !node.is_gone()) {
            nodes.insert(node.name.clone(), Fetches::of(&node.status()?));
        }
        Ok(Marks {
            origin: site.network.traffic(site.origin.host()),
            uplinks: site.network.uplinks(),
            cpu_seconds: site.cpu_seconds()?,
            origin_sent: count(&site.origin.status()?["links"]["sent_wire_bytes"]),
            nodes,
        })
    }
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Runs the task on a site.
pub(super) async fn run(task: &Task<'_>, site: &Arc<Site>) -> Outcome<Run> {
    let before = Marks::take(site)?;
    let nodes = site.nodes();
    let progress = Arc::new(Progress::new());
    let hosts = nodes.iter().map(|node| node.host().clone()).collect();
    let watcher =
        look::watch(Arc::clone(&site.network), site.origin.host().clone(), hosts, Arc::clone(&progress));
    let mut polls = JoinSet::new();
    if task.plan.vms == 0 {
        nodes
            .iter()
            .for_each(|node| drop(polls.spawn(attach_whole(Arc::clone(node), Arc::clone(&progress)))));
    } else if task.plan.profile == Profile::Trace && task.caches == Caches::Cold {
        nodes.iter().for_each(|node| drop(polls.spawn(whole(Arc::clone(node), Arc::clone(&progress)))));
    }
    let (arrivals, arriving) = mpsc::channel(ARRIVALS_MAX);
    let storm = crowd::run(&task.cast, nodes.clone(), arriving, &progress);
    let (stories, churn) = match task.weather {
        Weather::Calm => {
            drop(arrivals);
            (storm.await?, None)
        }
        Weather::Churn { kind, seed } => {
            let (stories, churn) =
                tokio::join!(storm, churn::make(site, kind, seed, task.fetching(), arrivals));
            (stories?, Some(churn?))
        }
    };
    // Without VMs, the nodes' answers are the run.
    let deadline = progress.begin + task.cast.limit;
    if task.plan.vms == 0 {
        while let Ok(Some(done)) = tokio::time::timeout_at(deadline, polls.join_next()).await {
            done.map_err(|e| format!("waiting for a node ended early: {e}"))??;
        }
    }
    let complete = progress.complete.lock().expect("no holder of this lock panics").clone();
    let last = complete.values().max().copied().unwrap_or_else(|| progress.begin.elapsed());
    let end = if task.plan.vms == 0 { last } else { progress.begin.elapsed() };
    polls.shutdown().await;
    // Nothing holds the network any more after this.
    let points = watcher.end().await;

    let mut run = Run::of_stories(task.name.clone(), nodes.len(), &stories, end.as_secs_f64());
    run.points = points;
    let after = Marks::take(site)?;
    let boot_bytes = task.boot.bytes() as f64;
    run.origin_wire_ratio = (after.origin - before.origin).sent as f64 / boot_bytes;
    let restarted = churn.as_ref().map(Churn::restarted).unwrap_or_default();
    // A daemon that was killed counts from nothing again.
    if !restarted.contains(&site.origin.name) {
        run.origin_sent_ratio = Some((after.origin_sent - before.origin_sent) as f64 / boot_bytes);
    }
    run.uplinks = (after.uplinks.iter().zip(&before.uplinks))
        .map(|(after, before)| *after - *before)
        .map(|moved| Uplink { up: moved.sent as f64 / boot_bytes, down: moved.received as f64 / boot_bytes })
        .collect();
    run.cpu_seconds = Some(after.cpu_seconds - before.cpu_seconds);
    let fetches = fetches(&before, &after, &restarted);
    let per_chunk = fetches.iter().filter(|f| f.held > 0).map(|f| f.received as f64 / f.held as f64);
    run.fetches_per_chunk = per_chunk.reduce(f64::max);
    run.refetched_chunks = Some(fetches.iter().map(|f| f.received.saturating_sub(f.held)).sum());
    run.second_fetches = Some(fetches.iter().map(|f| f.second).sum());
    if task.caches == Caches::Cold && (complete.len() >= nodes.len() || churn.is_some()) {
        run.boot_set_seconds = Percentiles::of(complete.values().map(Duration::as_secs_f64));
        run.boot_set_ratio = run.boot_set_seconds.map(|p| p.scaled(1.0 / task.plan.bound_seconds(task.boot)));
    }
    if let Some(mut churn) = churn {
        churn.judge(&stories);
        run.give_up(&stories, |seat| churn.is_dead(seat));
        run.churn = Some(churn);
    }
    run.note_part_done(&task.cast.script.trace, &progress);
    Ok(run)
}

/// What each node fetched that was there all the time.
fn fetches(before: &Marks, after: &Marks, restarted: &BTreeSet<String>) -> Vec<Fetches> {
    let stayed = after.nodes.iter().filter(|(node, _)| !restarted.contains(*node));
    stayed.map(|(node, now)| now.since(before.nodes.get(node).copied().unwrap_or_default())).collect()
}

/// Attaches the image on a node and waits until it has the whole boot profile.
async fn attach_whole(node: Arc<Node>, progress: Arc<Progress>) -> Outcome {
    let begun = progress.begin.elapsed();
    let attaching = Arc::clone(&node);
    blocking(move || attaching.attach()).await?;
    poll_profile(node, progress, begun).await
}

/// Waits until a node whose VMs are being created has the whole boot profile.
async fn whole(node: Arc<Node>, progress: Arc<Progress>) -> Outcome {
    poll_profile(node, progress, Duration::ZERO).await
}

/// `attached` is when the attach was asked for, since the beginning: the node counts from about there.
async fn poll_profile(node: Arc<Node>, progress: Arc<Progress>, attached: Duration) -> Outcome {
    loop {
        tokio::time::sleep(PROFILE_POLL).await;
        let asked = Arc::clone(&node);
        // A node that was killed does not answer until it is back.
        let Ok(Some(image)) = blocking(move || asked.image()).await else { continue };
        if image["profile"]["complete"] == true {
            let took = image["profile"]["elapsed_ms"].as_u64().map(Duration::from_millis);
            let at = took.map_or_else(|| progress.begin.elapsed(), |took| attached + took);
            progress.note_complete(&node.name, at);
            return Ok(());
        }
    }
}

/// Runs what blocks on a thread for such things.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Outcome<T> + Send + 'static,
) -> Outcome<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| format!("a thread ended early: {e}"))?
}
