//! The living state of the cluster: the planner, and the push streams of the nodes.
//!
//! One mutex owns both, and every change goes through [`Cluster::apply`]: an event enters the planner,
//! and the placements that come out are put on the streams of the nodes they concern before the lock is
//! released, so that a node sees its placements in the order in which they were decided. Nothing here
//! waits or touches a disk.
//!
//! Crash: all of this is lost with the process and rebuilt from what nodes report when they register
//! and attach again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block::{ImageId, NodeName};
use planner::{Action, Event, Millis, Placement, Planner, Settings};
use tokio::sync::mpsc;

use control::api::profile::ProfileOffer;
use control::api::volt::Push;

/// Pushes that may wait for a slow node. A node that falls further behind is disconnected; it
/// reconnects and is told its placements afresh.
const PUSHES_WAITING_MAX: usize = 1024;

/// How long a node without a push stream is still believed alive: long enough to reconnect after a
/// dropped connection, short enough that the children of a killed node are moved while their guests
/// notice nothing but latency.
const STREAM_GRACE: Duration = Duration::from_secs(1);

/// The planner and the streams.
pub(crate) struct Cluster {
    started: Instant,
    lease: Duration,
    inner: Mutex<Inner>,
}

struct Inner {
    planner: Planner,
    streams: HashMap<NodeName, Stream>,
    /// Nodes that were removed, which every other is told of.
    removed: BTreeSet<NodeName>,
    streams_opened: u64,
}

struct Stream {
    id: u64,
    sender: mpsc::Sender<Push>,
}

/// What the planner decided that is not a push.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The node is not registered: it must do that again.
    Unknown(NodeName),
    /// There are too many nodes for one more.
    Full(NodeName),
    /// The node serves nobody until it is pardoned. To be recorded.
    Quarantined(NodeName),
}

/// A node's end of its push stream; dropping it says that the node is gone, unless it comes back soon.
pub(crate) struct PushStream {
    pub(crate) receiver: mpsc::Receiver<Push>,
    cluster: Arc<Cluster>,
    node: NodeName,
    id: u64,
}

impl Cluster {
    /// A cluster that has no node yet, and once had the `removed` ones.
    pub(crate) fn new(settings: Settings, lease: Duration, removed: Vec<NodeName>) -> Arc<Cluster> {
        let inner = Inner {
            planner: Planner::new(settings),
            streams: HashMap::new(),
            removed: removed.into_iter().collect(),
            streams_opened: 0,
        };
        Arc::new(Cluster { started: Instant::now(), lease, inner: Mutex::new(inner) })
    }

    /// The lease of a node.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// Lets the planner see an event and tells the nodes what follows from it. Returns what the caller
    /// must see to itself.
    pub(crate) fn apply(&self, event: Event) -> Vec<Notice> {
        self.lock().apply(self.now(), event)
    }

    /// Takes a node out and tells all others.
    pub(crate) fn remove(&self, node: &NodeName) {
        let mut inner = self.lock();
        inner.removed.insert(node.clone());
        inner.push_removed();
        inner.apply(self.now(), Event::NodeDown { node: node.clone() });
    }

    /// A removed name joined again: all are told that it is welcome.
    pub(crate) fn readmit(&self, node: &NodeName) {
        let mut inner = self.lock();
        inner.removed.remove(node);
        inner.push_removed();
    }

    /// Looks at the planner.
    pub(crate) fn with_planner<T>(&self, look: impl FnOnce(&Planner) -> T) -> T {
        look(&self.lock().planner)
    }

    /// Where `node` is in the hierarchy of `image`.
    pub(crate) fn placement(&self, node: &NodeName, image: &ImageId) -> Option<Placement> {
        self.lock().planner.placement(node, image).cloned()
    }

    /// Opens a node's push stream. It begins with who was removed and every placement that the node has, so
    /// that whatever was decided while it was away reaches it.
    pub(crate) fn open_stream(self: &Arc<Self>, node: &NodeName) -> PushStream {
        let mut inner = self.lock();
        let (sender, receiver) = mpsc::channel(PUSHES_WAITING_MAX);
        sender.try_send(inner.removed_push()).expect("an empty channel whose receiver is here has room");
        let images = inner.planner.node(node).map(|view| view.images).unwrap_or_default();
        for image in images {
            if let Some(placement) = inner.planner.placement(node, &image).cloned() {
                // A node with more images than the stream has room for gets the rest as it attaches them.
                let _ = sender.try_send(Push::Place { image, placement });
            }
        }
        inner.streams_opened += 1;
        let id = inner.streams_opened;
        inner.streams.insert(node.clone(), Stream { id, sender });
        PushStream { receiver, cluster: Arc::clone(self), node: node.clone(), id }
    }

    /// Tells the nodes that have an image attached what its boot profile is now.
    pub(crate) fn push_profile(&self, image: &ImageId, offer: &ProfileOffer) {
        let mut inner = self.lock();
        let nodes: Vec<NodeName> = inner.streams.keys().cloned().collect();
        for node in nodes {
            if inner.planner.placement(&node, image).is_some() {
                inner.push(&node, Push::Profile { image: *image, offer: offer.clone() });
            }
        }
    }

    fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic in the planner is a bug, but the hierarchy that it left is still the best there is.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The stream with this id ended. If no other took its place in time, its node is dead.
    async fn stream_ended(&self, node: NodeName, id: u64) {
        tokio::time::sleep(STREAM_GRACE).await;
        let mut inner = self.lock();
        if inner.streams.get(&node).is_some_and(|stream| stream.id == id) {
            inner.streams.remove(&node);
            tracing::warn!(%node, "node_lost: its connection ended and did not come back");
            inner.apply(self.now(), Event::NodeDown { node });
        }
    }
}

impl Inner {
    fn apply(&mut self, now: Millis, event: Event) -> Vec<Notice> {
        let mut notices = Vec::new();
        for action in self.planner.apply(now, event) {
            match action {
                Action::Place { node, image, placement } => {
                    tracing::debug!(%node, %image, ?placement, "placed");
                    self.push(&node, Push::Place { image, placement });
                }
                Action::Released { node, image } => {
                    tracing::info!(%node, %image, "image_left");
                    self.push(&node, Push::Released { image });
                }
                Action::Dead { node } => tracing::warn!(%node, "node_expired: its children were moved"),
                Action::Suspect { node } => {
                    tracing::warn!(%node, "node_suspected: most children cannot reach it; it gets no new ones for now");
                }
                Action::Quarantine { node } => {
                    tracing::error!(
                        %node,
                        "node_quarantined: it sent wrong bytes and serves nobody from now on; check its disks and memory, then run 'virtman volt pardon'"
                    );
                    notices.push(Notice::Quarantined(node));
                }
                Action::Unknown { node } => notices.push(Notice::Unknown(node)),
                Action::Refuse { node } => notices.push(Notice::Full(node)),
            }
        }
        notices
    }

    fn removed_push(&self) -> Push {
        Push::Removed { nodes: self.removed.iter().cloned().collect() }
    }

    fn push_removed(&mut self) {
        let nodes: Vec<NodeName> = self.streams.keys().cloned().collect();
        for node in nodes {
            self.push(&node, self.removed_push());
        }
    }

    fn push(&mut self, node: &NodeName, push: Push) {
        let Some(stream) = self.streams.get(node) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = stream.sender.try_send(push) {
            tracing::warn!(%node, "node_disconnected: it does not read its pushes, and has to start afresh");
            self.streams.remove(node);
        }
    }
}

impl Drop for PushStream {
    fn drop(&mut self) {
        let (cluster, node, id) = (Arc::clone(&self.cluster), self.node.clone(), self.id);
        // Outside a runtime the process is ending, and so is the cluster's state.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { cluster.stream_ended(node, id).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use planner::Shape;

    use super::*;

    #[tokio::test]
    async fn every_stream_begins_with_who_was_removed_and_hears_of_each_change() {
        let [a, b, c] = ["a", "b", "c"].map(|n| n.parse::<NodeName>().unwrap());
        let settings = Settings { lease: Millis(1000), shaping: Shape::BINARY.into() };
        let cluster = Cluster::new(settings, Duration::from_secs(1), vec![a.clone()]);
        let mut early = cluster.open_stream(&c);
        cluster.remove(&b);
        let mut late = cluster.open_stream(&c);
        cluster.readmit(&a);
        let removed = |nodes: &[&NodeName]| Push::Removed { nodes: nodes.iter().copied().cloned().collect() };
        assert_eq!(early.receiver.recv().await, Some(removed(&[&a])));
        assert_eq!(early.receiver.recv().await, Some(removed(&[&a, &b])));
        assert_eq!(late.receiver.recv().await, Some(removed(&[&a, &b])));
        assert_eq!(late.receiver.recv().await, Some(removed(&[&b])));
    }
}
