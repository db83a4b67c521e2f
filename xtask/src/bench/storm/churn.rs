//! Things that go wrong during a storm: chosen by a seed, done at their time, and what the guests felt of it.
//!
//! A tenth of the nodes is killed as by a power cut; every other one of these comes back, the rest stay dead
//! and their VMs are given up. Beside that one node loses its link, one gets a very slow one and one stops for
//! a while; Volt is killed and started again, the origin is killed and comes back, and nodes join.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::Outcome;
use super::crowd::VmStory;
use super::figures::Percentiles;
use super::network::Rate;
use super::ours::blocking;
use super::plan::ChurnKind;
use super::site::{Node, Site};

/// One node in so many is killed, and as many join.
const KILLED_ONE_IN: usize = 10;

/// How long a killed node, a stopped one, a cut link and a throttled link stay so.
const NODE_AWAY: Duration = Duration::from_secs(3);
const NODE_STOPPED: Duration = Duration::from_secs(5);
const LINK_DOWN: Duration = Duration::from_secs(10);
const LINK_SLOW: Duration = Duration::from_secs(10);
const VOLT_AWAY: Duration = Duration::from_secs(2);
const ORIGIN_AWAY: Duration = Duration::from_secs(5);

/// The rate of a throttled link.
const SLOW: Rate = Rate { mbit: 1.0 };

/// A read that is under way so long after a parent's death may have waited because of it.
const AFTERMATH: Duration = Duration::from_secs(5);

/// What happened, and what the guests felt of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Churn {
    pub(super) events: Vec<Event>,
    /// The longest read, in milliseconds, of each VM on a child of a killed node, from the death on. Children
    /// to which something happened themselves are left out.
    pub(super) parent_death_stall_ms: Option<Percentiles>,
    /// How many VMs that is about.
    pub(super) parent_death_vms: usize,
    /// Deaths that are left out of it: the origin was away too, and waiting for it is not a matter of healing.
    pub(super) parent_deaths_left_out: usize,
    #[serde(skip)]
    deaths: Vec<Death>,
    #[serde(skip)]
    origin_away: Option<(Instant, Instant)>,
    #[serde(skip)]
    restarted: BTreeSet<String>,
    #[serde(skip)]
    dead: BTreeSet<String>,
    /// Nodes to which anything happened.
    #[serde(skip)]
    struck: BTreeSet<String>,
}

/// One thing that went wrong.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Event {
    /// Since the first possible moment.
    pub(super) seconds: f64,
    pub(super) what: String,
}

/// A node's death and who fetched from it at that moment.
#[derive(Debug, Clone)]
struct Death {
    at: Instant,
    children: BTreeSet<String>,
}

/// A kind of fault and whom it strikes.
enum Fault {
    KillForAWhile(Arc<Node>),
    KillForGood(Arc<Node>),
    Unplug(Arc<Node>),
    Throttle(Arc<Node>),
    Stop(Arc<Node>),
    KillVolt,
    KillOrigin,
    Join,
}

impl Fault {
    /// The node that it strikes.
    fn node(&self) -> Option<&Node> {
        match self {
            Fault::KillForAWhile(node)
            | Fault::KillForGood(node)
            | Fault::Unplug(node)
            | Fault::Throttle(node)
            | Fault::Stop(node) => Some(node),
            Fault::KillVolt | Fault::KillOrigin | Fault::Join => None,
        }
    }

    /// The part of the span in which it may come: nodes die before the origin does, so that what the others feel
    /// of it is their parent's death alone.
    fn when(&self) -> Range<f64> {
        match self {
            Fault::KillForAWhile(_) | Fault::KillForGood(_) => 0.05..0.5,
            Fault::KillOrigin => 0.7..1.0,
            _ => 0.05..1.0,
        }
    }
}

/// What a fault left behind.
#[derive(Default)]
struct Trail {
    events: Vec<(Instant, String)>,
    death: Option<Death>,
    origin_away: Option<(Instant, Instant)>,
    restarted: Option<String>,
    dead: Option<String>,
}

impl Churn {
    /// The daemons that were killed and whose counters so begin again, dead ones included.
    pub(super) fn restarted(&self) -> BTreeSet<String> {
        self.restarted.union(&self.dead).cloned().collect()
    }

    /// Whether a node was killed and did not come back.
    pub(super) fn is_dead(&self, node: &str) -> bool {
        self.dead.contains(node)
    }

    /// Finds the longest read after each parent's death in what the VMs met.
    pub(super) fn judge(&mut self, stories: &[VmStory]) {
        let unharmed = |story: &&VmStory| !self.struck.contains(&story.seat);
        let mut longest = Vec::new();
        let healing = |death: &&Death| {
            self.origin_away.is_none_or(|(from, to)| death.at + AFTERMATH < from || death.at > to)
        };
        let deaths: Vec<&Death> = self.deaths.iter().filter(healing).collect();
        self.parent_deaths_left_out = self.deaths.len() - deaths.len();
        for death in deaths {
            for story in stories.iter().filter(unharmed).filter(|story| death.children.contains(&story.seat))
            {
                let waited =
                    story.played.slow.iter().filter(|read| {
                        read.began + read.took > death.at && read.began < death.at + AFTERMATH
                    });
                let from_death =
                    waited.map(|read| (read.began + read.took).duration_since(death.at.max(read.began)));
                longest.push(from_death.max().unwrap_or_default().as_secs_f64() * 1e3);
            }
        }
        self.parent_death_vms = longest.len();
        self.parent_death_stall_ms = Percentiles::of(longest);
    }
}

/// Lets everything go wrong once, each at a moment of `span`, and waits until all of it is over. New
/// nodes are told to `arrivals`.
pub(super) async fn make(
    site: &Arc<Site>,
    kind: ChurnKind,
    seed: u64,
    span: Duration,
    arrivals: mpsc::Sender<Arc<Node>>,
) -> Outcome<Churn> {
    let begin = Instant::now();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut faults = JoinSet::new();
    let mut struck = BTreeSet::new();
    for fault in choose(site, kind, &mut random) {
        let at = begin + span.mul_f64(random.random_range(fault.when()));
        struck.extend(fault.node().map(|node| node.name.clone()));
        faults.spawn(strike(fault, Arc::clone(site), at, arrivals.clone()));
    }
    drop(arrivals);
    let mut churn = Churn {
        events: Vec::new(),
        parent_death_stall_ms: None,
        parent_death_vms: 0,
        parent_deaths_left_out: 0,
        deaths: Vec::new(),
        origin_away: None,
        restarted: BTreeSet::new(),
        dead: BTreeSet::new(),
        struck,
    };
    while let Some(trail) = faults.join_next().await {
        let trail = trail.map_err(|e| format!("a fault ended early: {e}"))??;
        let since = |at: Instant| at.duration_since(begin).as_secs_f64();
        churn.events.extend(trail.events.into_iter().map(|(at, what)| Event { seconds: since(at), what }));
        churn.deaths.extend(trail.death);
        churn.origin_away = churn.origin_away.or(trail.origin_away);
        churn.restarted.extend(trail.restarted);
        churn.dead.extend(trail.dead);
    }
    churn.events.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    Ok(churn)
}

/// Whom each fault strikes: no node is struck twice.
fn choose(site: &Site, kind: ChurnKind, random: &mut SmallRng) -> Vec<Fault> {
    let mut nodes = site.nodes();
    nodes.shuffle(random);
    let killed = (nodes.len() / KILLED_ONE_IN).max(2);
    let mut nodes = nodes.into_iter();
    let mut faults: Vec<Fault> = nodes
        .by_ref()
        .take(killed)
        .enumerate()
        .map(|(n, node)| if n % 2 == 0 { Fault::KillForAWhile(node) } else { Fault::KillForGood(node) })
        .collect();
    if kind == ChurnKind::Deaths {
        return faults;
    }
    faults.extend(nodes.next().map(Fault::Unplug));
    faults.extend(nodes.next().map(Fault::Throttle));
    faults.extend(nodes.next().map(Fault::Stop));
    faults.extend([Fault::KillVolt, Fault::KillOrigin]);
    faults.extend((0..killed.div_ceil(2)).map(|_| Fault::Join));
    faults
}

/// Lets one thing go wrong, and puts it right again where it is to be.
async fn strike(
    fault: Fault,
    site: Arc<Site>,
    at: Instant,
    arrivals: mpsc::Sender<Arc<Node>>,
) -> Outcome<Trail> {
    tokio::time::sleep_until(at).await;
    let mut trail = Trail::default();
    match fault {
        Fault::KillForAWhile(node) => {
            trail.death = Some(kill(&site, &node, &mut trail.events).await?);
            trail.restarted = Some(node.name.clone());
            tokio::time::sleep(NODE_AWAY).await;
            restart(&site, &node, &mut trail.events).await?;
        }
        Fault::KillForGood(node) => {
            trail.death = Some(kill(&site, &node, &mut trail.events).await?);
            trail.dead = Some(node.name.clone());
            node.declare_gone();
        }
        Fault::KillOrigin => {
            let death = kill(&site, &site.origin, &mut trail.events).await?;
            trail.restarted = Some(site.origin.name.clone());
            tokio::time::sleep(ORIGIN_AWAY).await;
            restart(&site, &site.origin, &mut trail.events).await?;
            trail.origin_away = Some((death.at, Instant::now()));
        }
        Fault::KillVolt => {
            let volt = Arc::clone(&site);
            blocking(move || volt.kill_volt()).await?;
            trail.note("Volt is killed");
            tokio::time::sleep(VOLT_AWAY).await;
            let volt = Arc::clone(&site);
            blocking(move || volt.start_volt()).await?;
            trail.note("Volt is back");
        }
        Fault::Unplug(node) => {
            site.network.unplug(node.host())?;
            trail.note(format!("the link of {} is cut", node.name));
            tokio::time::sleep(LINK_DOWN).await;
            site.network.plug(node.host())?;
            trail.note(format!("the link of {} is back", node.name));
        }
        Fault::Throttle(node) => {
            let rate = site.rate();
            site.network.throttle(node.host(), SLOW)?;
            trail.note(format!("the link of {} is throttled to {} Mbit/s", node.name, SLOW.mbit));
            tokio::time::sleep(LINK_SLOW).await;
            site.network.throttle(node.host(), rate)?;
            trail.note(format!("the link of {} is fast again", node.name));
        }
        Fault::Stop(node) => {
            node.signal(Signal::STOP)?;
            trail.note(format!("{} stops", node.name));
            tokio::time::sleep(NODE_STOPPED).await;
            node.signal(Signal::CONT)?;
            trail.note(format!("{} goes on", node.name));
        }
        Fault::Join => {
            let node = site.plug_in()?;
            // While Volt is away nobody can join; whoever joins then tries again.
            loop {
                let (site, joining) = (Arc::clone(&site), Arc::clone(&node));
                match blocking(move || site.join_late(&joining)).await {
                    Ok(()) => break,
                    Err(_) if at.elapsed() < VOLT_AWAY * 5 => tokio::time::sleep(VOLT_AWAY / 2).await,
                    Err(error) => return Err(error),
                }
            }
            trail.note(format!("{} joined", node.name));
            // A storm that is over wants no more nodes.
            let _ = arrivals.send(node).await;
        }
    }
    Ok(trail)
}

impl Trail {
    fn note(&mut self, what: impl Into<String>) {
        self.events.push((Instant::now(), what.into()));
    }
}

/// Kills a node, and tells who fetched from it.
async fn kill(site: &Arc<Site>, node: &Arc<Node>, events: &mut Vec<(Instant, String)>) -> Outcome<Death> {
    let (asked, killed) = (Arc::clone(site), Arc::clone(node));
    let (at, children) = blocking(move || {
        let children = asked.children(&killed.name);
        killed.kill()?;
        Ok((Instant::now(), children))
    })
    .await?;
    events.push((at, format!("{} is killed", node.name)));
    Ok(Death { at, children })
}

async fn restart(site: &Arc<Site>, node: &Arc<Node>, events: &mut Vec<(Instant, String)>) -> Outcome {
    let (site, back) = (Arc::clone(site), Arc::clone(node));
    blocking(move || site.restart(&back)).await?;
    events.push((Instant::now(), format!("{} is back", node.name)));
    Ok(())
}
