//! What children are served: images that are attached, and detached ones that some children have yet to leave.
//!
//! Volt gives the children other parents before the node lets go of an image, but a child learns of that a moment
//! later, or much later if its connection to Volt is down. Until nobody has asked for a while, what was served is
//! served on, through the parents that the node had.
//!
//! Consistency: chunks are verified as ever. Crash: children ask elsewhere, as of any node that dies. Bounds: no image
//! drains for longer than [`DRAIN_TIME_MAX`].

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{BoxFuture, ChunkSource, ImageId};
use tokio::time::Instant;

use super::Images;

/// How long nobody must have asked. A child whose connection to Volt broke has another and its new parents well
/// within that.
const QUIET: Duration = Duration::from_secs(10);

/// How long a child that does not learn of its new parents is served. Then it is told that the image is not attached,
/// and asks the others that it knows.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(60);

/// How long a child's request waits for this node to attach the image. A child may be told of its parent
/// a moment before the parent learns that it is one; much later, the child had better ask another.
const ATTACH_WAIT: Duration = Duration::from_secs(5);

/// The images that are on their way out.
#[derive(Default)]
pub(crate) struct Draining(Mutex<HashMap<ImageId, Drained>>);

struct Drained {
    source: Arc<dyn ChunkSource>,
    since: Instant,
    asked: Instant,
}

impl Draining {
    /// Serves an image on that is detached `now`.
    pub(super) fn begin(&self, id: ImageId, source: Arc<dyn ChunkSource>, now: Instant) {
        self.all().insert(id, Drained { source, since: now, asked: now });
    }

    /// The chunks of an image that somebody asks for `now`.
    pub(super) fn source(&self, id: &ImageId, now: Instant) -> Option<Arc<dyn ChunkSource>> {
        let mut all = self.all();
        let drained = all.get_mut(id)?;
        drained.asked = now;
        Some(Arc::clone(&drained.source))
    }

    /// The image is attached again.
    pub(super) fn forget(&self, id: &ImageId) {
        self.all().remove(id);
    }

    /// Lets those go that nobody asks for any more.
    pub(crate) fn sweep(&self, now: Instant) {
        let stays = |drained: &Drained| {
            now.duration_since(drained.asked) < QUIET && now.duration_since(drained.since) < DRAIN_TIME_MAX
        };
        self.all().retain(|_, drained| stays(drained));
    }

    fn all(&self) -> MutexGuard<'_, HashMap<ImageId, Drained>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What children ask this node for.
impl link::Sources for Images {
    fn source<'a>(&'a self, id: &'a ImageId) -> BoxFuture<'a, Option<Arc<dyn ChunkSource>>> {
        Box::pin(async move {
            let attached = async {
                loop {
                    // Registered before the look, so that a change in between is not missed.
                    let changed = self.changed.notified();
                    if let Some(attached) = self.by_id(id) {
                        return Some(Arc::clone(&attached.served));
                    }
                    if let Some(source) = self.draining.source(id, Instant::now()) {
                        return Some(source);
                    }
                    // Volt names a parent while that attaches the image, and not before.
                    if self.attaching.load(Ordering::Acquire) == 0 {
                        return None;
                    }
                    changed.await;
                }
            };
            tokio::time::timeout(ATTACH_WAIT, attached).await.ok()?
        })
    }
}

#[cfg(test)]
mod tests {
    use block::{Chunk, ChunkHash, FetchError, Priority};

    use super::*;

    struct Nothing;

    impl ChunkSource for Nothing {
        fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
            Box::pin(async move { Err(FetchError::NotHere(chunk)) })
        }
    }

    #[test]
    fn an_image_goes_when_nobody_asks_any_more_and_at_last_whoever_asks() {
        let (quiet, busy) = (ImageId::from_bytes([1; 32]), ImageId::from_bytes([2; 32]));
        let draining = Draining::default();
        let begun = Instant::now();
        for id in [quiet, busy] {
            draining.begin(id, Arc::new(Nothing), begun);
        }
        let mut now = begun;
        while now + QUIET / 2 < begun + DRAIN_TIME_MAX {
            now += QUIET / 2;
            draining.sweep(now);
            assert!(draining.source(&busy, now).is_some(), "{:?}", now - begun);
        }
        assert!(draining.source(&quiet, now).is_none());
        draining.sweep(begun + DRAIN_TIME_MAX);
        assert!(draining.source(&busy, now).is_none());
    }

    #[test]
    fn an_image_that_is_attached_again_departs_no_more() {
        let id = ImageId::from_bytes([1; 32]);
        let draining = Draining::default();
        draining.begin(id, Arc::new(Nothing), Instant::now());
        draining.forget(&id);
        assert!(draining.source(&id, Instant::now()).is_none());
    }
}
