//! One image's boot profile on this node: streamed ahead of guests, and recorded while they boot.
//!
//! Volt says what the profile is when the image is attached, and whenever it changes. One task per image, however
//! many VMs it has, fetches the profile's chunks into the cache ([`stream`]). While Volt wants records, new VMs are
//! watched from their first read until they have booted ([`record`]), and what they touched is handed to Volt.
//!
//! Consistency: a profile is a hint; nothing that a guest reads depends on it. Retries: chunks that could not be had
//! are tried again a few times, then when Volt is connected anew. Cancellation: all of it ends when the image is
//! detached, and the stream also when the profile is cleared. Crash: nothing is written; a node that starts again is
//! told the profile when it reaches Volt, and passes over what the cache holds.

mod record;
mod stream;
mod windows;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::Priority;
use image::{BootProfile, ImageVolume};
use planner::Role;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use self::record::BootTap;
use self::record::{RECORD_CHUNKS_MIN, Recording};
pub(crate) use self::stream::FetchPath;
use control::api::profile::{NodeProfile, ProfileOffer};

/// Boots of one image that a node records at a time: as many as Volt wants in all. Each takes 192 KiB.
const RECORDINGS_MAX: usize = 4;

/// How often a profile is gone through before chunks that cannot be had are left to guests' own reads.
const PASSES_MAX: u32 = 4;

/// Pause between two passes: somebody has to mend something first.
const PASS_PAUSE: Duration = Duration::from_secs(5);

/// One image's boot profile on this node.
pub(crate) struct Profile {
    volume: Arc<ImageVolume>,
    offer: watch::Sender<ProfileOffer>,
    streamed: Arc<Mutex<Streamed>>,
    recordings: Arc<Semaphore>,
    /// Takes records to Volt.
    records: mpsc::Sender<BootProfile>,
    stop: CancellationToken,
    _stop: DropGuard,
}

/// How far the stream is.
struct Streamed {
    /// When the image was attached or, if that was later, the profile came.
    began: Instant,
    chunks: usize,
    resident: usize,
    complete_after: Option<Duration>,
}

impl Streamed {
    /// All chunks are here; says how long that took.
    fn complete(&mut self) -> Duration {
        *self.complete_after.insert(self.began.elapsed())
    }
}

impl Profile {
    /// The profile of an image that was asked for at `asked`, as Volt offers it so far; records of boots go to
    /// `records`. To be called within a runtime.
    pub(super) fn new(
        path: FetchPath,
        offer: ProfileOffer,
        asked: Instant,
        records: mpsc::Sender<BootProfile>,
    ) -> Profile {
        let streamed = Streamed { began: asked, chunks: 0, resident: 0, complete_after: None };
        let streamed = Arc::new(Mutex::new(streamed));
        let stop = CancellationToken::new();
        let profile = Profile {
            volume: Arc::clone(&path.volume),
            offer: watch::Sender::new(ProfileOffer::default()),
            streamed: Arc::clone(&streamed),
            recordings: Arc::new(Semaphore::new(RECORDINGS_MAX)),
            records,
            stop: stop.clone(),
            _stop: stop.clone().drop_guard(),
        };
        profile.offer(offer);
        let streamer = Streamer { path, offers: profile.offer.subscribe(), streamed };
        tokio::spawn(async move { stop.run_until_cancelled(streamer.run()).await });
        profile
    }

    /// Volt says what the profile is. Saying it again goes on with a stream that is not complete.
    pub(super) fn offer(&self, offer: ProfileOffer) {
        if let Some(file) = &offer.file
            && let Err(error) = file.0.must_fit(self.volume.root())
        {
            tracing::warn!(%error, "profile_refused: it does not fit its image");
            return;
        }
        self.offer.send_replace(offer);
    }

    /// How far the profile is here; `None` if there is none.
    pub(super) fn describe(&self) -> Option<NodeProfile> {
        let streamed = lock(&self.streamed);
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        (streamed.chunks > 0).then(|| NodeProfile {
            chunks: streamed.chunks as u64,
            resident: streamed.resident as u64,
            complete: streamed.resident == streamed.chunks,
            elapsed_ms: streamed.complete_after.map(millis),
        })
    }

    /// Begins to record the boot of a VM, if that is wanted. To be called within a runtime.
    fn begin_recording(&self) -> Option<Recording> {
        if self.offer.borrow().recording == control::api::profile::Recording::Off {
            return None;
        }
        let place = Arc::clone(&self.recordings).try_acquire_owned().ok()?;
        let (recording, recorder, gone) = Recording::new();
        let (volume, records, stop) = (Arc::clone(&self.volume), self.records.clone(), self.stop.clone());
        let record = async move {
            record::until_over(&recorder, &gone).await;
            let chunks = record::recorded(&recorder, &volume).await;
            drop(place);
            if chunks.len() < RECORD_CHUNKS_MIN {
                tracing::debug!(chunks = chunks.len(), "too little was read for a boot: not recorded");
                return;
            }
            match BootProfile::new(volume.id(), chunks) {
                // Full means that records wait for Volt already: it has no need of one more.
                Ok(record) => drop(records.try_send(record)),
                Err(error) => tracing::warn!(%error, "boot_record_dropped"),
            }
        };
        tokio::spawn(async move { stop.run_until_cancelled(record).await });
        Some(recording)
    }
}

fn lock(streamed: &Mutex<Streamed>) -> MutexGuard<'_, Streamed> {
    streamed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task that streams an image's profile.
struct Streamer {
    path: FetchPath,
    offers: watch::Receiver<ProfileOffer>,
    streamed: Arc<Mutex<Streamed>>,
}

impl Streamer {
    async fn run(mut self) {
        let mut current = self.offered();
        lock(&self.streamed).chunks = chunks_in(current.as_deref());
        loop {
            let complete = lock(&self.streamed).complete_after.is_some();
            if let Some(profile) = current.as_deref().filter(|_| !complete) {
                let mut offers = self.offers.clone();
                tokio::select! {
                    () = self.stream(profile) => {}
                    // Cleared. Another profile waits for the end of this one, with which it has much in common.
                    _ = offers.wait_for(|offer| offer.file.is_none()) => {}
                }
            }
            if self.offers.changed().await.is_err() {
                return;
            }
            let offered = self.offered();
            if offered != current {
                let chunks = chunks_in(offered.as_deref());
                *lock(&self.streamed) =
                    Streamed { began: Instant::now(), chunks, resident: 0, complete_after: None };
                current = offered;
            }
        }
    }

    fn offered(&mut self) -> Option<Arc<BootProfile>> {
        self.offers.borrow_and_update().file.as_ref().map(|file| Arc::clone(&file.0))
    }

    async fn stream(&self, profile: &BootProfile) {
        if (self.path.role)() == Role::Origin {
            lock(&self.streamed).resident = profile.chunks().len();
            return;
        }
        for _ in 0..PASSES_MAX {
            lock(&self.streamed).resident = 0;
            let here = || lock(&self.streamed).resident += 1;
            let failed = self.path.stream(profile.chunks(), Priority::Profile, here).await;
            if failed == 0 {
                let took = lock(&self.streamed).complete();
                tracing::info!(image = %profile.image().short(), chunks = profile.chunks().len(), ?took, "profile_fetched");
                return;
            }
            tracing::info!(image = %profile.image().short(), failed, "profile_incomplete: some chunks cannot be had yet");
            tokio::time::sleep(PASS_PAUSE).await;
        }
    }
}

fn chunks_in(profile: Option<&BootProfile>) -> usize {
    profile.map_or(0, |profile| profile.chunks().len())
}

#[cfg(test)]
mod tests;
