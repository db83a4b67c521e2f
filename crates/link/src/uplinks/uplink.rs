//! The connection to one parent, kept up by a task of its own.
//!
//! The task is the only owner of the stream and of the [`ClientEnd`] on it. Requests reach it through a shared
//! queue and are answered through a oneshot each; a oneshot that is dropped says that the link failed.
//!
//! Retries: the task dials when first asked, and again with growing waits as long as it lives, so that a
//! better parent comes back into use by itself. Requests are never repeated here; that is the
//! [`Fetcher`](crate::Fetcher)'s. Cancellation: dropping an [`Asked`] withdraws the request wherever it
//! is. While the link is down the queue takes no requests.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};

use block::{Chunk, ChunkHash, ImageId, NodeName, Priority};
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, timeout_at};

use crate::client_end::{ClientEnd, ClientEvent};
use crate::limits::{DIAL_MAX, DIAL_PATIENCE, QUEUED_MAX};
use crate::policy::{LinkState, PathId, Standing, Verdict};
use crate::session::Closed;
use crate::stats::ScopedStats;
use crate::stream::{self, Clock, Exchanged, Stream};
use crate::uplinks::{Dial, ParentAddr, Report, SharedPaths, UplinkStatus, Uplinks};
use crate::wire::{LackReason, RequestId};

/// What a parent answered.
pub(crate) type Answer = Result<Chunk, LackReason>;

/// Whom the answers go to.
type Replies = HashMap<RequestId, oneshot::Sender<Answer>>;

/// The connection to one parent. See the module's documentation.
pub(crate) struct Uplink {
    parent: ParentAddr,
    path: PathId,
    paths: Arc<SharedPaths>,
    stats: ScopedStats,
    queue: Arc<RequestQueue>,
    task: AbortHandle,
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.task.abort();
        self.paths.lock().remove(self.path);
    }
}

impl Uplink {
    pub(crate) fn spawn(uplinks: &Arc<Uplinks>, parent: ParentAddr, link: LinkState) -> Uplink {
        let paths = uplinks.paths().clone();
        let path = paths.lock().add(link);
        let stats = ScopedStats::under(&uplinks.total);
        let queue = Arc::new(RequestQueue::new(stats.clone()));
        let task = Task {
            // Weak, because the table that owns this uplink must be able to end while it lives.
            uplinks: Arc::downgrade(uplinks),
            clock: uplinks.clock,
            node: uplinks.node.clone(),
            parent: parent.clone(),
            path,
            paths: paths.clone(),
            stats: stats.clone(),
            queue: queue.clone(),
            lost: Reported::No,
        };
        Uplink { parent, path, paths, stats, queue, task: tokio::spawn(task.run()).abort_handle() }
    }

    pub(crate) fn parent(&self) -> &ParentAddr {
        &self.parent
    }

    pub(crate) fn path(&self) -> PathId {
        self.path
    }

    pub(crate) fn status(&self) -> UplinkStatus {
        UplinkStatus {
            parent: self.parent.clone(),
            standing: self.paths.lock().standing(self.path),
            stats: self.stats.link.clone(),
        }
    }

    /// Dials now rather than at the first request.
    pub(crate) fn warm(&self) {
        self.queue.state().needed = Needed::Yes;
        self.queue.changed.notify_one();
    }

    /// Asks for a chunk; `None` comes if the link is down, fails meanwhile or takes no more requests.
    pub(crate) fn ask(&self, image: ImageId, chunk: ChunkHash, priority: Priority) -> Asked {
        let (reply, answer) = oneshot::channel();
        let mut state = self.queue.state();
        let id = state.withdrawn.take(image, chunk).unwrap_or_else(|| {
            state.last_id = RequestId(state.last_id.0.wrapping_add(1));
            state.last_id
        });
        if state.open == Open::Yes && state.pending.len() < QUEUED_MAX {
            state.pending.push_back(PendingRequest { id, image, chunk, priority, reply });
            state.needed = Needed::Yes;
            drop(state);
            self.queue.changed.notify_one();
        }
        Asked { queue: self.queue.clone(), id, image, chunk, answer, answered: Answered::No }
    }
}

/// A request that is on its way. Resolves to [`None`] if the link failed; dropping it withdraws the request.
pub(crate) struct Asked {
    queue: Arc<RequestQueue>,
    id: RequestId,
    image: ImageId,
    chunk: ChunkHash,
    answer: oneshot::Receiver<Answer>,
    answered: Answered,
}

#[derive(PartialEq, Eq)]
enum Answered {
    No,
    Yes,
}

impl Future for Asked {
    type Output = Option<Answer>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Answer>> {
        let answer = std::task::ready!(Pin::new(&mut self.answer).poll(context));
        self.answered = Answered::Yes;
        if let Ok(Ok(chunk)) = &answer {
            self.queue.stats.add(|s| &s.chunks_received, 1);
            self.queue.stats.add(|s| &s.raw_bytes_received, chunk.bytes().len());
        }
        Poll::Ready(answer.ok())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.answered == Answered::Yes {
            return;
        }
        // From here on an answer is not taken any more, and whoever sends it counts it.
        self.answer.close();
        if let Ok(Ok(_)) = self.answer.try_recv() {
            self.queue.stats.add(|s| &s.chunks_in_vain, 1);
        }
        self.queue.withdraw(self.id, self.image, self.chunk);
    }
}

struct PendingRequest {
    id: RequestId,
    image: ImageId,
    chunk: ChunkHash,
    priority: Priority,
    reply: oneshot::Sender<Answer>,
}

/// Where requests are left for the task.
struct RequestQueue {
    state: Mutex<QueueState>,
    changed: Notify,
    stats: ScopedStats,
}

struct QueueState {
    open: Open,
    needed: Needed,
    last_id: RequestId,
    /// At most [`QUEUED_MAX`].
    pending: VecDeque<PendingRequest>,
    /// Requests that the task took and nobody wants any more: no more than it took.
    withdrawn: Withdrawn,
}

/// Requests that nobody wants any more. One that is wanted again before the parent was told goes on under its
/// number: a cache that becomes more urgent asks anew, and the chunk may be on its way already.
#[derive(Default)]
struct Withdrawn(Vec<(RequestId, ImageId, ChunkHash)>);

impl Withdrawn {
    fn take(&mut self, image: ImageId, chunk: ChunkHash) -> Option<RequestId> {
        let at = self.0.iter().position(|(_, of, what)| (*of, *what) == (image, chunk))?;
        Some(self.0.swap_remove(at).0)
    }
}

/// Whether requests are taken: as long as the standing of the path is usable.
#[derive(PartialEq, Eq)]
enum Open {
    No,
    Yes,
}

#[derive(PartialEq, Eq)]
enum Needed {
    No,
    Yes,
}

impl RequestQueue {
    fn new(stats: ScopedStats) -> RequestQueue {
        let state = QueueState {
            open: Open::Yes,
            needed: Needed::No,
            last_id: RequestId(0),
            pending: VecDeque::new(),
            withdrawn: Withdrawn::default(),
        };
        RequestQueue { state: Mutex::new(state), changed: Notify::new(), stats }
    }

    /// The state stays whole whatever a holder of the lock does: each change is one call.
    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn withdraw(&self, id: RequestId, image: ImageId, chunk: ChunkHash) {
        let mut state = self.state();
        if let Some(at) = state.pending.iter().position(|request| request.id == id) {
            state.pending.remove(at);
        } else if state.open == Open::Yes {
            state.withdrawn.0.push((id, image, chunk));
            drop(state);
            self.changed.notify_one();
        }
    }

    fn open(&self) {
        self.state().open = Open::Yes;
    }

    /// No request may go there any more; those in the queue fail.
    fn close(&self) {
        let mut state = self.state();
        state.open = Open::No;
        state.pending.clear();
        state.withdrawn.0.clear();
    }
}

#[derive(PartialEq, Eq)]
enum Reported {
    No,
    Yes,
}

/// Keeps the connection up.
struct Task {
    uplinks: Weak<Uplinks>,
    clock: Clock,
    /// Our own name.
    node: NodeName,
    parent: ParentAddr,
    path: PathId,
    paths: Arc<SharedPaths>,
    stats: ScopedStats,
    queue: Arc<RequestQueue>,
    /// Whether the coordinator was told that the parent is lost.
    lost: Reported,
}

impl Task {
    /// Ends only by being aborted, or with the table that it belongs to.
    async fn run(mut self) {
        while self.queue.state().needed == Needed::No {
            self.queue.changed.notified().await;
        }
        loop {
            let dial_at = self.paths.lock().dial_at(self.path);
            sleep_until(self.clock.at(dial_at)).await;
            let Some(uplinks) = self.uplinks.upgrade() else { return };
            let dial = uplinks.dial.clone();
            drop(uplinks);
            self.stats.add(|s| &s.dials, 1);
            match self.dial(&*dial).await {
                Ok(stream) => self.drive(stream).await,
                Err(error) => self.fail(&error),
            }
        }
    }

    /// Dials, and lets the requests go elsewhere if that takes long.
    async fn dial(&self, dial: &dyn Dial) -> io::Result<Box<dyn Stream>> {
        let begin = self.clock.now();
        let mut dialing = dial.dial(&self.parent);
        if let Ok(result) = timeout_at(self.clock.at(begin + DIAL_PATIENCE), &mut dialing).await {
            return result;
        }
        self.paths.lock().dials_late(self.path, self.clock.now());
        if self.paths.lock().standing(self.path) == Standing::Down {
            self.queue.close();
        }
        timeout_at(self.clock.at(begin + DIAL_MAX), dialing).await?
    }

    fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.paths.lock().failed(self.path, self.clock.now());
        self.queue.close();
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        if self.lost == Reported::No {
            self.lost = Reported::Yes;
            tracing::info!(parent = %self.parent.node, %why, "parent_lost");
            uplinks.report(Report::Lost { node: self.parent.node.clone() });
        } else {
            tracing::debug!(parent = %self.parent.node, %why, "the parent is still lost");
        }
    }

    fn blame(&mut self, image: ImageId, chunk: ChunkHash) {
        let until = self.paths.lock().lied(self.path, self.clock.now());
        self.queue.close();
        tracing::warn!(parent = %self.parent.node, %chunk, "parent_banned: it sent a wrong chunk");
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        uplinks.ban(&self.parent.node, until);
        uplinks.report(Report::Lied { node: self.parent.node.clone(), image, chunk });
    }

    fn greeted(&mut self) {
        self.paths.lock().greeted(self.path, self.clock.now());
        self.queue.open();
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        tracing::info!(parent = %self.parent.node, "parent_up");
        if self.lost == Reported::Yes {
            self.lost = Reported::No;
            uplinks.report(Report::Back { node: self.parent.node.clone() });
        }
        uplinks.came_up();
    }

    /// Tells the coordinator of a parent that lives and does not deliver, and when it does again.
    fn update_health(&mut self) {
        let (lost, report) = match (self.paths.lock().verdict(self.path), &self.lost) {
            (Verdict::Beaten, Reported::No) => {
                (Reported::Yes, Report::Lost { node: self.parent.node.clone() })
            }
            (Verdict::Fair, Reported::Yes) => (Reported::No, Report::Back { node: self.parent.node.clone() }),
            _ => return,
        };
        self.lost = lost;
        tracing::info!(parent = %self.parent.node, ?report, "parent_changed: it does not deliver, or does again");
        if let Some(uplinks) = self.uplinks.upgrade() {
            uplinks.report(report);
        }
    }

    /// Runs the protocol until the link ends. Every reply that is still open is dropped then, which tells
    /// those who wait.
    async fn drive(&mut self, stream: Box<dyn Stream>) {
        let mut client =
            ClientEnd::new(&self.node, self.parent.node.clone(), self.stats.clone(), self.clock.now());
        let mut replies = Replies::new();
        let (mut reading, mut writing) = stream::halves(stream);
        let mut lie = None;
        loop {
            self.take_in(&mut client, &mut replies);
            self.update_health();
            while let Some(event) = client.poll_event() {
                match event {
                    ClientEvent::Ready => self.greeted(),
                    ClientEvent::Arrived { id, chunk } => self.reply(&mut replies, id, Ok(chunk)),
                    ClientEvent::Lacking { id, reason } => self.reply(&mut replies, id, Err(reason)),
                    ClientEvent::Liar { image, chunk } => lie = Some((image, chunk)),
                    ClientEvent::Closed(closed) => {
                        match lie {
                            Some((image, chunk)) => self.blame(image, chunk),
                            None => self.fail(&closed),
                        }
                        self.stats.add(|s| &s.losses, 1);
                        // Those who wait ask another now; the last words can wait.
                        drop(replies);
                        if closed != Closed::Ended {
                            writing.send_bye(client.poll_transmit(self.clock.now())).await;
                        }
                        return;
                    }
                }
            }
            let now = self.clock.now();
            writing.refill(|| client.poll_transmit(now));
            let deadline = self.clock.at(client.deadline());
            // The stream first: what has come counts as a sign of life even if we were late to look.
            tokio::select! {
                biased;
                done = stream::exchange(&mut reading, client.inbox(), &mut writing) => match done {
                    Ok(Exchanged { read: Some(0), .. }) => client.ended(),
                    Ok(Exchanged { read: Some(_), .. }) => {
                        let now = self.clock.now();
                        client.heard(now);
                        self.paths.lock().heard(self.path, now);
                    }
                    Ok(Exchanged { read: None, .. }) => {}
                    Err(error) => {
                        tracing::debug!(parent = %self.parent.node, %error, "the link broke");
                        client.ended();
                    }
                },
                () = self.queue.changed.notified() => {}
                () = sleep_until(deadline) => client.tick(self.clock.now()),
            }
        }
    }

    /// Takes what is in the queue.
    fn take_in(&self, client: &mut ClientEnd, replies: &mut Replies) {
        let (pending, withdrawn) = {
            let mut state = self.queue.state();
            (std::mem::take(&mut state.pending), std::mem::take(&mut state.withdrawn))
        };
        for request in pending {
            if let Some(reply) = replies.get_mut(&request.id) {
                client.raise(request.id, request.priority);
                *reply = request.reply;
                continue;
            }
            // A refused request drops its reply, which tells whoever waits to ask another.
            if client.want(request.id, request.image, request.chunk, request.priority).is_ok() {
                replies.insert(request.id, request.reply);
            }
        }
        for (id, ..) in withdrawn.0 {
            client.cancel(id);
            replies.remove(&id);
        }
    }

    fn reply(&self, replies: &mut Replies, id: RequestId, answer: Answer) {
        // Whoever asked may have gone meanwhile.
        if let Some(reply) = replies.remove(&id)
            && let Err(Ok(_)) = reply.send(answer)
        {
            self.stats.add(|s| &s.chunks_in_vain, 1);
        }
    }
}
