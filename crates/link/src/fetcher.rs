//! One image's chunks from its parents.
//!
//! Consistency: whatever comes was verified on the link it came over. Retries: a
//! [`RequestPolicy`](crate::policy::RequestPolicy) per request leads from parent to parent, without end unless all of
//! them, the origin included, say time and again that the
//! chunk is not to be had, or a guest's fetch exceeds the time that the administrator set. Cancellation:
//! dropping a `fetch` withdraws the request from the parents that have it. A change of plan takes effect on
//! requests in flight: one that waits for a parent that left its stripe is asked of the new ones at once.
//!
//! Two fetches of one chunk are two requests: joining them is the cache's business.

use std::sync::Arc;

use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, Priority};
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

use crate::inflight::InFlight;
use crate::policy::{Decision, PathId};
use crate::uplinks::uplink::Uplink;
use crate::uplinks::{ParentAddr, Uplinks};

/// One stripe's parents, the planned one first and the last resort last.
#[derive(Default)]
struct Route {
    uplinks: Vec<Arc<Uplink>>,
    paths: Vec<PathId>,
}

/// Per stripe; at least one.
type Routes = Arc<Vec<Arc<Route>>>;

/// One image's chunks from its parents. See the module's documentation.
pub struct Fetcher {
    image: ImageId,
    uplinks: Arc<Uplinks>,
    routes: watch::Sender<Routes>,
}

impl Fetcher {
    /// A source without parents: fetches wait until there are some.
    pub fn new(image: ImageId, uplinks: Arc<Uplinks>) -> Fetcher {
        let (routes, _) = watch::channel(Arc::new(vec![Arc::default()]));
        Fetcher { image, uplinks, routes }
    }

    /// Sets the plan: per stripe the parents in the order in which they are asked, the origin last. May be
    /// called at any time, within a runtime; the first parent of each stripe is dialed at once. A parent that
    /// is in the old plan or in another image's keeps its connection.
    pub fn set_parents(&self, stripes: &[Vec<ParentAddr>]) {
        let mut routes: Vec<Arc<Route>> =
            stripes.iter().map(|ranked| Arc::new(self.connect(ranked))).collect();
        if routes.is_empty() {
            routes.push(Arc::default());
        }
        for best in routes.iter().filter_map(|route| route.uplinks.first()) {
            best.warm();
        }
        self.routes.send_replace(Arc::new(routes));
    }

    fn connect(&self, ranked: &[ParentAddr]) -> Route {
        let mut uplinks: Vec<Arc<Uplink>> = Vec::with_capacity(ranked.len());
        for parent in ranked {
            // A parent is asked once a round, so naming it twice means its better rank.
            if uplinks.iter().all(|uplink| uplink.parent().node != parent.node) {
                uplinks.push(self.uplinks.uplink(parent));
            }
        }
        let paths = uplinks.iter().map(|uplink| uplink.path()).collect();
        Route { uplinks, paths }
    }

    async fn fetch_from_parents(&self, chunk: ChunkHash, priority: Priority) -> Result<Chunk, FetchError> {
        let _place = self.uplinks.admit(priority).await;
        let mut routes = self.routes.subscribe();
        let mut ups = self.uplinks.ups();
        let mut request = InFlight::new(&self.uplinks, priority);
        loop {
            let route = stripe(&routes.borrow_and_update(), chunk);
            ups.mark_unchanged();
            let until = match request.decide(&route.paths) {
                Decision::Ask { path } | Decision::Hedge { path } => {
                    let at = route.paths.iter().position(|ranked| *ranked == path);
                    let uplink = &route.uplinks[at.expect("a policy asks those that are ranked")];
                    request.push(path, uplink.ask(self.image, chunk, priority));
                    continue;
                }
                Decision::Withdraw { path } => {
                    request.withdraw(path);
                    continue;
                }
                Decision::Wait { until } => until,
                Decision::GiveUp => return Err(FetchError::NotHere(chunk)),
            };
            // Only the plan keeps the connections from now on.
            drop(route);
            tokio::select! {
                biased;
                (path, answer) = request.answer() => match answer {
                    Some(Ok(found)) => {
                        request.won(path);
                        return Ok(found);
                    }
                    Some(Err(reason)) => request.not_found(path, reason),
                    None => request.lost(path),
                },
                Ok(()) = routes.changed() => request.replanned(&stripe(&routes.borrow(), chunk).paths),
                _ = ups.changed() => {}
                () = sleep_until(self.uplinks.clock.at(until)) => {}
            }
        }
    }
}
/// The route of the chunk's stripe.
fn stripe(routes: &Routes, chunk: ChunkHash) -> Arc<Route> {
    let stripe = chunk.prefix() % routes.len() as u64;
    routes[usize::try_from(stripe).expect("less than a length")].clone()
}

impl ChunkSource for Fetcher {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        if chunk.is_zero() {
            return Box::pin(async { Ok(Chunk::zero()) });
        }
        match self.uplinks.fetch_timeout {
            Some(limit) if priority == Priority::Guest => Box::pin(async move {
                let in_time = timeout(limit, self.fetch_from_parents(chunk, priority)).await;
                in_time.unwrap_or_else(|_| {
                    Err(FetchError::Unreachable(format!(
                        "no parent delivered chunk {chunk} within {limit:?}"
                    )))
                })
            }),
            _ => Box::pin(self.fetch_from_parents(chunk, priority)),
        }
    }
}
