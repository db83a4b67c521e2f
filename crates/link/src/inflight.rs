//! One request with the answers that it waits for: what ties a [`RequestPolicy`] to the connections.
//!
//! Cancellation: dropping it ends its policy and withdraws the request wherever it is.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

use block::Priority;

use crate::policy::{Decision, PathId, RequestPolicy};
use crate::uplinks::Uplinks;
use crate::uplinks::uplink::{Answer, Asked};
use crate::wire::LackReason;

/// One request on its way. See the module's documentation.
pub(crate) struct InFlight<'a> {
    uplinks: &'a Uplinks,
    policy: RequestPolicy,
    /// One for each attempt of the policy.
    asked: Vec<(PathId, Asked)>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.policy.end(&mut self.uplinks.paths().lock());
    }
}

impl<'a> InFlight<'a> {
    pub(crate) fn new(uplinks: &'a Uplinks, priority: Priority) -> InFlight<'a> {
        InFlight { uplinks, policy: RequestPolicy::new(priority), asked: Vec::new() }
    }

    pub(crate) fn decide(&mut self, ranked: &[PathId]) -> Decision {
        self.policy.decide(&mut self.uplinks.paths().lock(), ranked, self.uplinks.clock.now())
    }

    pub(crate) fn push(&mut self, path: PathId, asked: Asked) {
        self.asked.push((path, asked));
    }

    pub(crate) fn withdraw(&mut self, path: PathId) {
        self.asked.retain(|(asked, _)| *asked != path);
    }

    /// The next answer, and from whom; [`None`] is a connection that failed. Never ends while nobody is asked.
    pub(crate) async fn answer(&mut self) -> (PathId, Option<Answer>) {
        poll_fn(|context| {
            for at in 0..self.asked.len() {
                if let Poll::Ready(answer) = Pin::new(&mut self.asked[at].1).poll(context) {
                    return Poll::Ready((self.asked.swap_remove(at).0, answer));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// `path` delivered the chunk.
    pub(crate) fn won(&mut self, path: PathId) {
        self.policy.answered(&mut self.uplinks.paths().lock(), path, self.uplinks.clock.now());
    }

    pub(crate) fn not_found(&mut self, path: PathId, reason: LackReason) {
        self.policy.not_found(&mut self.uplinks.paths().lock(), path, reason, self.uplinks.clock.now());
    }

    pub(crate) fn lost(&mut self, path: PathId) {
        self.policy.lost(&mut self.uplinks.paths().lock(), path);
    }

    /// The plan changed.
    pub(crate) fn replanned(&mut self, ranked: &[PathId]) {
        let left = self.policy.replanned(&mut self.uplinks.paths().lock(), ranked);
        self.asked.retain(|(path, _)| !left.contains(path));
    }
}
