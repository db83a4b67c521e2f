//! A client that writes to a disk over NBD and remembers how long each write took.
//!
//! The same client writes to ours and to a peer, so that what it costs weighs on both. It is not fio because of single
//! writes it must be known when they were under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::Disk;
use nbd::{Client, NbdUri, Options, Retry};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::super::Outcome;

/// Bytes of one write.
const WRITE_BYTES: usize = 4096;

/// Writes that are under way at full speed: enough to keep a server busy.
const DEPTH: u64 = 16;

/// How fast a client writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// Not at all.
    Idle,
    /// So many writes in a second, one at a time.
    PerSecond(u32),
    /// As fast as they are answered.
    Full,
}

impl Pace {
    /// For people.
    pub(super) fn name(self) -> String {
        match self {
            Pace::Idle => "idle".to_owned(),
            Pace::PerSecond(rate) => format!("{rate} writes/s"),
            Pace::Full => format!("full speed, depth {DEPTH}"),
        }
    }
}

/// One write.
#[derive(Debug, Clone, Copy)]
pub(super) struct Write {
    pub(super) began: Instant,
    pub(super) took: Duration,
}

impl Write {
    /// Whether it was under way at some moment between these two.
    pub(super) fn was_within(&self, from: Instant, to: Instant) -> bool {
        self.began <= to && self.began + self.took >= from
    }

    pub(super) fn millis(&self) -> f64 {
        self.took.as_secs_f64() * 1e3
    }
}

/// A client at work, until it is stopped.
pub(super) struct Writer<'a> {
    runtime: &'a Runtime,
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Outcome<Vec<Write>>>>,
}

impl<'a> Writer<'a> {
    /// Writes 4 KiB at random places of the export at `uri` from now on.
    pub(super) fn start(runtime: &'a Runtime, uri: &str, pace: Pace) -> Outcome<Writer<'a>> {
        let stop = Arc::new(AtomicBool::new(false));
        let disk = Arc::new(runtime.block_on(open(uri))?);
        let (tasks, pause) = match pace {
            Pace::Idle => (0, Duration::ZERO),
            Pace::PerSecond(rate) => (1, Duration::from_secs(1) / rate),
            Pace::Full => (DEPTH, Duration::ZERO),
        };
        let start = |seed| runtime.spawn(write_on(Arc::clone(&disk), seed, pause, Arc::clone(&stop)));
        Ok(Writer { runtime, tasks: (0..tasks).map(start).collect(), stop })
    }

    /// Ends it and gives all of its writes.
    pub(super) fn stop(self) -> Outcome<Vec<Write>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut writes = Vec::new();
        for task in self.tasks {
            let done = self.runtime.block_on(task).map_err(|e| format!("a client broke off: {e}"))?;
            writes.extend(done?);
        }
        Ok(writes)
    }
}

/// Opens an export; an error is one that a guest would see.
pub(super) async fn open(uri: &str) -> Outcome<Client> {
    let parsed: NbdUri = uri.parse().map_err(|e| format!("{e}"))?;
    let options = Options { retry: Retry::For(Duration::ZERO), ..Options::default() };
    Client::connect_uri(&parsed, options).await.map_err(|e| format!("{uri}: {e}"))
}

async fn write_on(
    disk: Arc<Client>,
    seed: u64,
    pause: Duration,
    stop: Arc<AtomicBool>,
) -> Outcome<Vec<Write>> {
    let mut random = SmallRng::seed_from_u64(seed);
    let blocks = disk.size_bytes() / WRITE_BYTES as u64;
    let mut bytes = [0; WRITE_BYTES];
    random.fill_bytes(&mut bytes);
    let mut writes = Vec::new();
    let mut due = tokio::time::Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if !pause.is_zero() {
            tokio::time::sleep_until(due).await;
            // A late one does not make the next ones come all at once.
            due = (due + pause).max(tokio::time::Instant::now());
        }
        let at = random.random_range(0..blocks) * WRITE_BYTES as u64;
        let began = Instant::now();
        disk.write(at, &bytes).await.map_err(|e| format!("a write failed: {e}"))?;
        writes.push(Write { began, took: began.elapsed() });
    }
    Ok(writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_within_what_it_overlaps() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let write = Write { began: at(10), took: Duration::from_millis(5) };
        assert!(
            write.was_within(at(0), at(10))
                && write.was_within(at(12), at(13))
                && write.was_within(at(15), at(20))
        );
        assert!(!write.was_within(at(0), at(9)) && !write.was_within(at(16), at(20)));
    }
}
