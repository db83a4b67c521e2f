//! Where the chunks of an attached image come from that the cache group does not have.

use std::sync::{Arc, PoisonError, RwLock};

use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, Priority};
use image::{DerivedImage, OriginImage};
use link::Fetcher;
use planner::Role;

/// Where the cache group gets what it does not have.
#[derive(Clone)]
pub(super) enum Upstream {
    Origin(Arc<OriginImage>),
    /// This node has what differs from another image, and serves the rest as it serves that.
    Derived(Arc<DerivedImage>),
    Relay(Arc<Fetcher>),
}

/// An upstream that can be replaced while VMs read through it: a relay becomes an origin, or an origin's
/// file moves, when the image is added again.
pub(super) struct SwappableUpstream(RwLock<Upstream>);

impl SwappableUpstream {
    pub(super) fn new(upstream: Upstream) -> SwappableUpstream {
        SwappableUpstream(RwLock::new(upstream))
    }

    /// What is read from at present.
    pub(super) fn current(&self) -> Upstream {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads from another from now on.
    pub(super) fn replace(&self, upstream: Upstream) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = upstream;
    }

    /// What this node is for the image.
    pub(super) fn role(&self) -> Role {
        match self.current() {
            Upstream::Origin(_) | Upstream::Derived(_) => Role::Origin,
            Upstream::Relay(_) => Role::Relay,
        }
    }
}

impl ChunkSource for SwappableUpstream {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let current = self.current();
        Box::pin(async move {
            match current {
                Upstream::Origin(origin) => origin.fetch(chunk, priority).await,
                Upstream::Derived(derived) => derived.fetch(chunk, priority).await,
                Upstream::Relay(fetcher) => fetcher.fetch(chunk, priority).await,
            }
        })
    }
}
