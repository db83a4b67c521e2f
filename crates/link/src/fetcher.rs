//! One image's chunks from its parents.
//!
//! Consistency: whatever comes was verified on the link it came over. Retries: a [`Hunt`] per request leads
//! from parent to parent, without end unless all of them, the origin included, say time and again that the
//! chunk is not to be had. Cancellation: dropping a `fetch` withdraws the request from the parent that has
//! it. A change of plan takes effect on requests in flight: one that waits for a parent that left its stripe
//! is asked of the new ones at once.
//!
//! Two fetches of one chunk are two requests: joining them is the cache's business.

use std::sync::Arc;

use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, Priority};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until};

use crate::policy::{Decision, Hunt};
use crate::uplink::{Answer, Uplink};
use crate::uplinks::{ParentAddr, Uplinks};

/// Per stripe the ranked uplinks, the best first; at least one stripe.
type Routes = Arc<Vec<Vec<Arc<Uplink>>>>;

/// One image's chunks from its parents. See the module's documentation.
pub struct Fetcher {
    image: ImageId,
    uplinks: Arc<Uplinks>,
    routes: watch::Sender<Routes>,
}

impl Fetcher {
    /// A source without parents: fetches wait until there are some.
    pub fn new(image: ImageId, uplinks: Arc<Uplinks>) -> Fetcher {
        let (routes, _) = watch::channel(Arc::new(vec![Vec::new()]));
        Fetcher { image, uplinks, routes }
    }

    /// Sets the plan: per stripe the parents in the order in which they are asked, the origin last. May be
    /// called at any time, within a runtime; the first parent of each stripe is dialed at once. A parent that
    /// is in the old plan or in another image's keeps its connection.
    pub fn set_parents(&self, stripes: &[Vec<ParentAddr>]) {
        let mut routes: Vec<Vec<Arc<Uplink>>> = stripes.iter().map(|ranked| self.connect(ranked)).collect();
        if routes.is_empty() {
            routes.push(Vec::new());
        }
        for best in routes.iter().filter_map(|ranked| ranked.first()) {
            best.warm();
        }
        self.routes.send_replace(Arc::new(routes));
    }

    fn connect(&self, ranked: &[ParentAddr]) -> Vec<Arc<Uplink>> {
        let mut uplinks: Vec<Arc<Uplink>> = Vec::with_capacity(ranked.len());
        for parent in ranked {
            // A parent is asked once a round, so naming it twice means its better rank.
            if uplinks.iter().all(|uplink| uplink.parent().node != parent.node) {
                uplinks.push(self.uplinks.uplink(parent));
            }
        }
        uplinks
    }

    async fn hunt(&self, chunk: ChunkHash, priority: Priority) -> Result<Chunk, FetchError> {
        let mut routes = self.routes.subscribe();
        let mut ups = self.uplinks.ups();
        let mut hunt = Hunt::new(priority);
        loop {
            let ranked = ranked(&routes.borrow_and_update(), chunk);
            ups.mark_unchanged();
            let standings = ranked.iter().map(|uplink| (&uplink.parent().node, uplink.standing()));
            match hunt.decide(standings, self.uplinks.clock.now()) {
                Decision::Ask { rank, patience } => {
                    let uplink = ranked[rank].clone();
                    // Only the request itself keeps the uplink from now on, and not beyond the plan.
                    drop(ranked);
                    let asked = uplink.ask(self.image, chunk, priority);
                    let outcome = tokio::select! {
                        biased;
                        answer = asked => answer.map_or(Outcome::Failed, Outcome::Answered),
                        () = left_out(&mut routes, chunk, &uplink) => Outcome::LeftOut,
                        () = sleep(patience) => Outcome::Failed,
                    };
                    match outcome {
                        Outcome::Answered(Ok(found)) => return Ok(found),
                        Outcome::Answered(Err(reason)) => hunt.lacked(reason),
                        Outcome::LeftOut => hunt.replanned(),
                        Outcome::Failed => {}
                    }
                    uplink.failed_over();
                }
                Decision::Wait { until } => {
                    tokio::select! {
                        () = sleep_until(self.uplinks.clock.at(until)) => {}
                        _ = ups.changed() => {}
                        _ = routes.changed() => hunt.replanned(),
                    }
                }
                Decision::GiveUp => return Err(FetchError::NotHere(chunk)),
            }
        }
    }
}

enum Outcome {
    Answered(Answer),
    /// The link failed or the parent took too long.
    Failed,
    /// The plan does not name the parent for this stripe any more.
    LeftOut,
}

/// The ranked uplinks of the chunk's stripe.
fn ranked(routes: &Routes, chunk: ChunkHash) -> Vec<Arc<Uplink>> {
    let stripe = chunk.prefix() % routes.len() as u64;
    routes[usize::try_from(stripe).expect("less than a length")].clone()
}

/// Waits until the plan leaves `uplink` out.
async fn left_out(routes: &mut watch::Receiver<Routes>, chunk: ChunkHash, uplink: &Arc<Uplink>) {
    loop {
        // The sender lives as long as the fetcher that is borrowed here.
        if routes.changed().await.is_err() {
            return std::future::pending().await;
        }
        let routes = routes.borrow_and_update();
        if !ranked(&routes, chunk).iter().any(|other| Arc::ptr_eq(other, uplink)) {
            return;
        }
    }
}

impl ChunkSource for Fetcher {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        if chunk.is_zero() {
            return Box::pin(async { Ok(Chunk::zero()) });
        }
        Box::pin(self.hunt(chunk, priority))
    }
}
