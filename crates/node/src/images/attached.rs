//! One attached image: its chunks, its exports, and how long it stays.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use block::{ChunkSource, ImageId, ImageName, NodeName};
use image::{DerivedImage, ImageVolume, OriginImage, RootPage};
use planner::{Placement, Role};
use tokio::sync::watch;
use tokio::time::Instant;

use super::prefetch::Prefetch;
use super::profile::{FetchPath, Profile};
use super::retention::{Holders, IdleTimeout, Retention, Usage};
use super::upstream::{SwappableUpstream, Upstream};
use crate::nbd_socket::{Clients, NbdSocket};
use control::api::compute::NodeImage;
use control::api::volt::ImageKind;

/// One attached image.
pub(crate) struct Attached {
    pub(crate) id: ImageId,
    /// What it is of.
    pub(crate) kind: ImageKind,
    pub(crate) root: RootPage,
    pub(crate) volume: Arc<ImageVolume>,
    /// Connections from outside that have it open over NBD.
    pub(super) clients: Clients,
    /// Its boot profile.
    pub(crate) profile: Arc<Profile>,
    pub(super) upstream: Arc<SwappableUpstream>,
    /// Its chunks, as children get them.
    pub(super) served: Arc<dyn ChunkSource>,
    /// How many stripes its placement has.
    pub(super) stripes: watch::Sender<usize>,
    pub(super) path: FetchPath,
    pub(super) since: Instant,
    pub(super) holders: Holders,
    pub(super) usage: Mutex<Usage>,
    pub(super) state: Mutex<AttachedState>,
}

/// What changes while an image is attached.
pub(super) struct AttachedState {
    pub(super) names: BTreeSet<ImageName>,
    pub(super) placement: Placement,
    /// A socket for each name.
    pub(super) sockets: HashMap<ImageName, NbdSocket>,
    /// Gets all of it into the cache, if that is wanted.
    pub(super) prefetch: Option<Prefetch>,
    /// Names that carry a VM's disk to other nodes, and go once those have it.
    pub(super) transfer_names: BTreeSet<ImageName>,
    pub(super) retention: Retention,
}

impl Attached {
    /// What this node is for the image.
    pub(crate) fn role(&self) -> Role {
        self.upstream.role()
    }

    /// The origin's side of the image, on an origin.
    pub(crate) fn origin(&self) -> Option<Arc<OriginImage>> {
        match self.upstream.current() {
            Upstream::Origin(origin) => Some(origin),
            Upstream::Derived(_) | Upstream::Relay(_) => None,
        }
    }

    /// What differs from the image that it was derived from, on the node that derived it.
    pub(crate) fn derived(&self) -> Option<Arc<DerivedImage>> {
        match self.upstream.current() {
            Upstream::Derived(derived) => Some(derived),
            Upstream::Origin(_) | Upstream::Relay(_) => None,
        }
    }

    /// Whether it was attached so long ago, or before the daemon started.
    pub(crate) fn is_older_than(&self, age: Duration) -> bool {
        self.since.elapsed() > age
    }

    /// Its names that go once no other node uses them.
    pub(crate) fn transfer_names(&self) -> Vec<ImageName> {
        self.state().transfer_names.iter().cloned().collect()
    }

    /// How its chunks come here.
    pub(crate) fn path(&self) -> &FetchPath {
        &self.path
    }

    /// Gets all of it into the cache from now on. To be called within a runtime.
    pub(super) fn prefetch(&self) {
        let mut state = self.state();
        if state.prefetch.is_none() {
            state.prefetch = Some(Prefetch::begin(self.path.clone()));
        }
    }

    /// Whom it is fetched from at present.
    pub(crate) fn placement(&self) -> Placement {
        self.state().placement.clone()
    }

    /// The names under which it is attached.
    pub(crate) fn names(&self) -> Vec<ImageName> {
        self.state().names.iter().cloned().collect()
    }

    /// Uses other parents from now on; whether that was a change.
    pub(super) fn place(&self, placement: Placement) -> bool {
        let mut state = self.state();
        if state.placement == placement {
            return false;
        }
        tracing::info!(image = %self.id.short(), parents = ?parent_names(&placement), "parents_changed");
        if let Upstream::Relay(fetcher) = self.upstream.current() {
            fetcher.set_parents(&parents_of(&placement));
        }
        self.stripes.send_replace(placement.stripes.len());
        state.placement = placement;
        true
    }

    pub(super) fn state(&self) -> MutexGuard<'_, AttachedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps it attached.
    pub(crate) fn retention(&self) -> Retention {
        self.state().retention
    }

    /// Since when nobody uses it.
    pub(crate) fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody is about to use it.
    pub(crate) fn is_held(&self) -> bool {
        self.holders.load(Ordering::Acquire) > 0
    }

    /// How many connections from outside have it open over NBD.
    pub(crate) fn clients(&self) -> usize {
        self.clients.count()
    }

    /// The image for a connection from outside, which is counted until it ends.
    pub(crate) fn export(&self, description: &str) -> nbd::Export {
        nbd::Export {
            disk: Arc::clone(&self.volume) as _,
            description: description.to_owned(),
            lease: Some(self.clients.enter()),
        }
    }

    /// As the API shows it: with the URI of one of its sockets, the VM disks on it, and how long an idle image stays.
    pub(super) fn describe(
        &self,
        export: Option<String>,
        vms: usize,
        idle_timeout: IdleTimeout,
    ) -> NodeImage {
        let idle_timeout = self.retention().idle_timeout(idle_timeout);
        let detaches_in = self.usage().goes_in(idle_timeout, Instant::now());
        let state = self.state();
        NodeImage {
            names: state.names.iter().cloned().collect(),
            id: self.id,
            kind: self.kind,
            size_bytes: self.root.size_bytes(),
            chunks: self.root.chunk_count(),
            zero_chunks: self.root.zero_chunks(),
            role: match self.role() {
                Role::Origin => "origin".to_owned(),
                Role::Relay => "relay".to_owned(),
            },
            source: match self.upstream.current() {
                Upstream::Origin(origin) => Some(origin.describe().path.display().to_string()),
                Upstream::Derived(derived) => {
                    Some(format!("{} on {}", derived.location(), derived.base().short()))
                }
                Upstream::Relay(_) => None,
            },
            parents: parent_names(&state.placement),
            export: export.unwrap_or_default(),
            vms,
            profile: self.profile.describe(),
            fill: state.prefetch.as_ref().map(Prefetch::describe),
            detaches_in_ms: detaches_in.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

pub(super) fn parents_of(placement: &Placement) -> Vec<Vec<link::ParentAddr>> {
    let address =
        |peer: &planner::Peer| link::ParentAddr { node: peer.node.clone(), address: peer.address.clone() };
    placement.stripes.iter().map(|stripe| stripe.iter().map(address).collect()).collect()
}

fn parent_names(placement: &Placement) -> Vec<Vec<NodeName>> {
    placement.stripes.iter().map(|stripe| stripe.iter().map(|peer| peer.node.clone()).collect()).collect()
}
