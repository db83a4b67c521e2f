//! Making an overlay durable: data first, then the map that points to it.
//!
//! Concurrent flushes share a round: who comes while a round runs needs the next one, and the first of
//! these runs it for all. A round runs on the blocking pool to its end, whoever drops the future.
//!
//! After a failed sync the kernel may have dropped the unwritten pages and report success the next time,
//! so the overlay answers every further flush with an error until it is opened again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::DiskError;
use tokio::sync::Mutex;

use super::log::{AppendError, MapLog};
use super::map::{BlockMap, Word};
use crate::Media;

/// A log below this size is not worth compacting: some 1,600 flushes, against which the two more syncs of
/// a compaction do not count.
const COMPACT_BYTES_MIN: u64 = 64 * 1024;

/// The log is compacted once it is this many times longer than it needs to be.
const COMPACT_RATIO: u64 = 4;

/// Everything that a round of flushing works on.
pub(super) struct Flusher {
    data: Arc<dyn Media>,
    map: Arc<BlockMap>,
    /// Whether the data file was changed since the last round took over.
    dirty: AtomicBool,
    rounds: Arc<Mutex<Rounds>>,
    rounds_begun: AtomicU64,
    rounds_done: AtomicU64,
    compactions: AtomicU64,
    map_bytes: AtomicU64,
}

struct Rounds {
    log: MapLog,
    /// The last round that made everything durable.
    last_good: u64,
    failure: Option<String>,
}

impl Flusher {
    pub(super) fn new(data: Arc<dyn Media>, map: Arc<BlockMap>, log: MapLog) -> Flusher {
        Flusher {
            data,
            map,
            // What an earlier process wrote and did not flush is there to read, so a flush must cover it.
            dirty: AtomicBool::new(true),
            map_bytes: AtomicU64::new(log.bytes()),
            rounds: Arc::new(Mutex::new(Rounds { log, last_good: 0, failure: None })),
            rounds_begun: AtomicU64::new(0),
            rounds_done: AtomicU64::new(0),
            compactions: AtomicU64::new(0),
        }
    }

    /// Notes that the data file was changed. To be called after the change and before it is answered.
    pub(super) fn mark_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    pub(super) fn rounds_done(&self) -> u64 {
        self.rounds_done.load(Ordering::Relaxed)
    }

    pub(super) fn compactions(&self) -> u64 {
        self.compactions.load(Ordering::Relaxed)
    }

    pub(super) fn map_bytes(&self) -> u64 {
        self.map_bytes.load(Ordering::Relaxed)
    }

    /// Makes everything that was answered before durable.
    pub(super) async fn flush(self: &Arc<Self>) -> Result<(), DiskError> {
        let needed = self.rounds_begun.load(Ordering::SeqCst) + 1;
        let rounds = Arc::clone(&self.rounds).lock_owned().await;
        if rounds.last_good >= needed {
            return Ok(());
        }
        let flusher = Arc::clone(self);
        let work = move || {
            let mut rounds = rounds;
            let round = flusher.rounds_begun.fetch_add(1, Ordering::SeqCst) + 1;
            flusher.run(&mut rounds)?;
            rounds.last_good = round;
            Ok(())
        };
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|error| DiskError::Io(format!("the flush was given up: {error}")))?
    }

    fn run(&self, rounds: &mut Rounds) -> Result<(), DiskError> {
        if let Some(failure) = &rounds.failure {
            return Err(DiskError::Io(format!(
                "an earlier flush failed, so what was written may be lost: {failure}"
            )));
        }
        let changed = self.dirty.swap(false, Ordering::AcqRel);
        if !changed && !self.map.has_pending() {
            return Ok(());
        }
        // The map is taken before the sync, so that it names only blocks whose bytes the sync covers.
        let pending = self.map.take_pending();
        let whole = self.is_compaction_due(&rounds.log).then(|| self.map.all());
        let done = match self.data.sync() {
            Ok(()) => self.write_map(rounds, &pending, whole.as_deref()),
            Err(error) => Err(fail(rounds, "syncing the data", &error)),
        };
        if done.is_err() {
            self.map.give_back(&pending);
            self.mark_dirty();
        }
        self.map_bytes.store(rounds.log.bytes(), Ordering::Relaxed);
        self.rounds_done.fetch_add(u64::from(done.is_ok()), Ordering::Relaxed);
        done
    }

    /// Whether most of the log is repetition.
    fn is_compaction_due(&self, log: &MapLog) -> bool {
        let needed = MapLog::bytes_of(self.map.live_words());
        log.bytes() > COMPACT_BYTES_MIN.max(COMPACT_RATIO * needed)
    }

    fn write_map(
        &self,
        rounds: &mut Rounds,
        pending: &[Word],
        whole: Option<&[Word]>,
    ) -> Result<(), DiskError> {
        let mut result = match whole {
            Some(words) => rounds.log.rewrite(words),
            None => rounds.log.append(pending),
        };
        match (&result, whole) {
            (Ok(()), Some(_)) => _ = self.compactions.fetch_add(1, Ordering::Relaxed),
            // No room for a second log beside the first; for a few more words there may be.
            (Err(AppendError::Intact(_)), Some(_)) => result = rounds.log.append(pending),
            _ => {}
        }
        result.map_err(|error| match error {
            AppendError::Intact(error) => error.into(),
            AppendError::Unknown(error) => fail(rounds, "syncing the map", &error),
        })
    }
}

/// Remembers that nothing can be relied on any more, and says so once.
fn fail(rounds: &mut Rounds, what: &str, error: &std::io::Error) -> DiskError {
    let failure = format!("{what} failed: {error}");
    tracing::error!(%failure, "overlay_failed: it can no longer be flushed; restart its VM from what is durable");
    rounds.failure = Some(failure.clone());
    DiskError::Io(failure)
}
