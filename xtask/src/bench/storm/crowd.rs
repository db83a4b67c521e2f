//! The guests of a storm: on each node some VMs, created and begun at once, until the last has finished.
//!
//! A VM whose node is killed waits for it, as a guest does; when the node stays away for good, its VMs are
//! given up. Whatever the storm is of, the crowd only needs to know how a VM of a node gets its disk.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::BoxFuture;
use nbd::client::Client;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::super::Outcome;
use super::replay::{Played, Script, play};

/// A place where VMs run: a node, or a client host of a baseline.
pub(super) trait Seat: Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;
    /// Gives a VM its disk and opens it.
    fn open<'a>(&'a self, vm: &'a str) -> BoxFuture<'a, Outcome<Client>>;
    /// Whether it is gone for good, as it changes.
    fn gone(&self) -> watch::Receiver<bool>;
}

/// How far a storm has come; read by whoever watches it.
pub(super) struct Progress {
    pub(super) begin: Instant,
    pub(super) reads: AtomicU64,
    pub(super) finished: AtomicUsize,
    /// When each seat had all that its guests read in a boot, since the beginning.
    pub(super) complete: Mutex<BTreeMap<String, Duration>>,
}

impl Progress {
    pub(super) fn new() -> Progress {
        Progress {
            begin: Instant::now(),
            reads: AtomicU64::new(0),
            finished: AtomicUsize::new(0),
            complete: Mutex::default(),
        }
    }

    /// Notes that a seat has the boot set; the first note counts.
    pub(super) fn note_complete(&self, seat: &str, at: Duration) {
        let mut complete = self.complete.lock().expect("no holder of this lock panics");
        complete.entry(seat.to_owned()).or_insert(at);
    }

    pub(super) fn completed(&self) -> usize {
        self.complete.lock().expect("no holder of this lock panics").len()
    }
}

/// What became of one VM.
pub(super) struct VmStory {
    pub(super) seat: String,
    /// From the beginning of the storm until its disk could be opened.
    pub(super) opened: Option<Duration>,
    /// From the beginning of the storm until its last request was answered.
    pub(super) finished: Option<Duration>,
    pub(super) played: Played,
}

/// What all VMs do, and under which names.
#[derive(Clone)]
pub(super) struct Cast {
    pub(super) script: Arc<Script>,
    pub(super) vms_per_seat: usize,
    /// Names of VMs begin with it; differs from run to run.
    pub(super) prefix: &'static str,
    pub(super) limit: Duration,
}

/// Runs `cast` on `seats`, and on those that arrive later, until all VMs ended or the time is up. VMs that had
/// not ended by then tell what they met so far.
pub(super) async fn run<S: Seat>(
    cast: &Cast,
    seats: Vec<Arc<S>>,
    mut arrivals: mpsc::Receiver<Arc<S>>,
    progress: &Arc<Progress>,
) -> Outcome<Vec<VmStory>> {
    let deadline = progress.begin + cast.limit;
    let mut vms = JoinSet::new();
    let mut number = 0;
    let mut start = |vms: &mut JoinSet<VmStory>, seat: &Arc<S>| {
        for _ in 0..cast.vms_per_seat {
            let name = format!("{}{number}", cast.prefix);
            vms.spawn(live(cast.clone(), Arc::clone(seat), name, number, Arc::clone(progress), deadline));
            number += 1;
        }
    };
    seats.iter().for_each(|seat| start(&mut vms, seat));
    let mut stories = Vec::new();
    let mut may_arrive = true;
    loop {
        tokio::select! {
            arrival = arrivals.recv(), if may_arrive => match arrival {
                Some(seat) => start(&mut vms, &seat),
                None => may_arrive = false,
            },
            Some(story) = vms.join_next() => {
                stories.push(story.map_err(|e| format!("a replaying guest ended early: {e}"))?);
            }
            else => return Ok(stories),
        }
    }
}

/// One VM's life.
async fn live<S: Seat>(
    cast: Cast,
    seat: Arc<S>,
    vm: String,
    number: u64,
    progress: Arc<Progress>,
    deadline: Instant,
) -> VmStory {
    let mut story =
        VmStory { seat: seat.name().to_owned(), opened: None, finished: None, played: Played::new() };
    let mut gone = seat.gone();
    let boot = async {
        let disk = open_patiently(&*seat, &vm).await;
        story.opened = Some(progress.begin.elapsed());
        play(&disk, &cast.script, number, &progress.reads, &mut story.played).await;
        let took = progress.begin.elapsed();
        story.finished = Some(took);
        progress.finished.fetch_add(1, Ordering::Relaxed);
        progress.note_complete(seat.name(), took);
        disk.close().await;
    };
    tokio::select! {
        () = boot => {}
        _ = gone.wait_for(|gone| *gone) => {}
        () = tokio::time::sleep_until(deadline) => {}
    }
    story
}

/// Opens a VM's disk, and tries again for as long as its node may come back: the storm's limit ends it.
async fn open_patiently<S: Seat>(seat: &S, vm: &str) -> Client {
    /// Between two tries: a node starts in less.
    const PAUSE: Duration = Duration::from_millis(200);
    loop {
        match seat.open(vm).await {
            Ok(disk) => return disk,
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
