//! The connection to one parent, kept up by a task of its own.
//!
//! The task is the only owner of the stream and of the [`Child`] on it. Requests reach it through a shared
//! desk and are answered through a oneshot each; a oneshot that is dropped says that the link failed.
//!
//! Retries: the task dials when first asked, and again with growing waits as long as it lives, so that a
//! better parent comes back into use by itself. Requests are never repeated here; that is the
//! [`Fetcher`](crate::Fetcher)'s. Cancellation: dropping an [`Asked`] withdraws the request wherever it
//! is. While the link is down the desk takes no requests.

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

use crate::child::{Child, ChildEvent};
use crate::limits::{DIAL_MAX, DIAL_PATIENCE, QUEUED_MAX};
use crate::policy::{Circuit, PathId, Standing, Verdict};
use crate::session::Closed;
use crate::stats::Tally;
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
    tally: Tally,
    desk: Arc<Desk>,
    task: AbortHandle,
}

impl Drop for Uplink {
    fn drop(&mut self) {
        self.task.abort();
        self.paths.lock().remove(self.path);
    }
}

impl Uplink {
    pub(crate) fn spawn(uplinks: &Arc<Uplinks>, parent: ParentAddr, circuit: Circuit) -> Uplink {
        let paths = uplinks.paths().clone();
        let path = paths.lock().add(circuit);
        let tally = Tally::under(&uplinks.total);
        let desk = Arc::new(Desk::new(tally.clone()));
        let task = Task {
            // Weak, because the table that owns this uplink must be able to end while it lives.
            uplinks: Arc::downgrade(uplinks),
            clock: uplinks.clock,
            node: uplinks.node.clone(),
            parent: parent.clone(),
            path,
            paths: paths.clone(),
            tally: tally.clone(),
            desk: desk.clone(),
            lost: Reported::No,
        };
        Uplink { parent, path, paths, tally, desk, task: tokio::spawn(task.run()).abort_handle() }
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
            stats: self.tally.link.clone(),
        }
    }

    /// Dials now rather than at the first request.
    pub(crate) fn warm(&self) {
        self.desk.state().needed = Needed::Yes;
        self.desk.changed.notify_one();
    }

    /// Asks for a chunk; `None` comes if the link is down, fails meanwhile or takes no more requests.
    pub(crate) fn ask(&self, image: ImageId, chunk: ChunkHash, priority: Priority) -> Asked {
        let (reply, answer) = oneshot::channel();
        let mut state = self.desk.state();
        let id = state.withdrawn.take(image, chunk).unwrap_or_else(|| {
            state.last_id = RequestId(state.last_id.0.wrapping_add(1));
            state.last_id
        });
        if state.open == Open::Yes && state.wants.len() < QUEUED_MAX {
            state.wants.push_back(Want { id, image, chunk, priority, reply });
            state.needed = Needed::Yes;
            drop(state);
            self.desk.changed.notify_one();
        }
        Asked { desk: self.desk.clone(), id, image, chunk, answer, answered: Answered::No }
    }
}

/// A request that is on its way. Resolves to [`None`] if the link failed; dropping it withdraws the request.
pub(crate) struct Asked {
    desk: Arc<Desk>,
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
            self.desk.tally.add(|s| &s.chunks_received, 1);
            self.desk.tally.add(|s| &s.raw_bytes_received, chunk.bytes().len());
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
            self.desk.tally.add(|s| &s.chunks_in_vain, 1);
        }
        self.desk.withdraw(self.id, self.image, self.chunk);
    }
}

struct Want {
    id: RequestId,
    image: ImageId,
    chunk: ChunkHash,
    priority: Priority,
    reply: oneshot::Sender<Answer>,
}

/// Where requests are left for the task.
struct Desk {
    state: Mutex<DeskState>,
    changed: Notify,
    tally: Tally,
}

struct DeskState {
    open: Open,
    needed: Needed,
    last_id: RequestId,
    /// At most [`QUEUED_MAX`].
    wants: VecDeque<Want>,
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

impl Desk {
    fn new(tally: Tally) -> Desk {
        let state = DeskState {
            open: Open::Yes,
            needed: Needed::No,
            last_id: RequestId(0),
            wants: VecDeque::new(),
            withdrawn: Withdrawn::default(),
        };
        Desk { state: Mutex::new(state), changed: Notify::new(), tally }
    }

    /// The state stays whole whatever a holder of the lock does: each change is one call.
    fn state(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn withdraw(&self, id: RequestId, image: ImageId, chunk: ChunkHash) {
        let mut state = self.state();
        if let Some(at) = state.wants.iter().position(|want| want.id == id) {
            state.wants.remove(at);
        } else if state.open == Open::Yes {
            state.withdrawn.0.push((id, image, chunk));
            drop(state);
            self.changed.notify_one();
        }
    }

    fn open(&self) {
        self.state().open = Open::Yes;
    }

    /// No request may go there any more; those on the desk fail.
    fn close(&self) {
        let mut state = self.state();
        state.open = Open::No;
        state.wants.clear();
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
    tally: Tally,
    desk: Arc<Desk>,
    /// Whether the coordinator was told that the parent is lost.
    lost: Reported,
}

impl Task {
    /// Ends only by being aborted, or with the table that it belongs to.
    async fn run(mut self) {
        while self.desk.state().needed == Needed::No {
            self.desk.changed.notified().await;
        }
        loop {
            let dial_at = self.paths.lock().dial_at(self.path);
            sleep_until(self.clock.at(dial_at)).await;
            let Some(uplinks) = self.uplinks.upgrade() else { return };
            let dial = uplinks.dial.clone();
            drop(uplinks);
            self.tally.add(|s| &s.dials, 1);
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
            self.desk.close();
        }
        timeout_at(self.clock.at(begin + DIAL_MAX), dialing).await?
    }

    fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.paths.lock().failed(self.path, self.clock.now());
        self.desk.close();
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        if self.lost == Reported::No {
            self.lost = Reported::Yes;
            tracing::info!(parent = %self.parent.node, %why, "the parent is lost");
            uplinks.report(Report::Lost { node: self.parent.node.clone() });
        } else {
            tracing::debug!(parent = %self.parent.node, %why, "the parent is still lost");
        }
    }

    fn blame(&mut self, image: ImageId, chunk: ChunkHash) {
        let until = self.paths.lock().lied(self.path, self.clock.now());
        self.desk.close();
        tracing::warn!(parent = %self.parent.node, %chunk, "the parent sent a wrong chunk and is banned");
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        uplinks.ban(&self.parent.node, until);
        uplinks.report(Report::Lied { node: self.parent.node.clone(), image, chunk });
    }

    fn greeted(&mut self) {
        self.paths.lock().greeted(self.path, self.clock.now());
        self.desk.open();
        let Some(uplinks) = self.uplinks.upgrade() else { return };
        tracing::info!(parent = %self.parent.node, "the parent is up");
        if self.lost == Reported::Yes {
            self.lost = Reported::No;
            uplinks.report(Report::Back { node: self.parent.node.clone() });
        }
        uplinks.came_up();
    }

    /// Tells the coordinator of a parent that lives and does not deliver, and when it does again.
    fn judge(&mut self) {
        let (lost, report) = match (self.paths.lock().verdict(self.path), &self.lost) {
            (Verdict::Beaten, Reported::No) => {
                (Reported::Yes, Report::Lost { node: self.parent.node.clone() })
            }
            (Verdict::Fair, Reported::Yes) => (Reported::No, Report::Back { node: self.parent.node.clone() }),
            _ => return,
        };
        self.lost = lost;
        tracing::info!(parent = %self.parent.node, ?report, "the parent does not deliver, or does again");
        if let Some(uplinks) = self.uplinks.upgrade() {
            uplinks.report(report);
        }
    }

    /// Runs the protocol until the link ends. Every reply that is still open is dropped then, which tells
    /// those who wait.
    async fn drive(&mut self, stream: Box<dyn Stream>) {
        let mut child =
            Child::new(&self.node, self.parent.node.clone(), self.tally.clone(), self.clock.now());
        let mut replies = Replies::new();
        let (mut reading, mut writing) = stream::halves(stream);
        let mut lie = None;
        loop {
            self.take_in(&mut child, &mut replies);
            self.judge();
            while let Some(event) = child.poll_event() {
                match event {
                    ChildEvent::Ready => self.greeted(),
                    ChildEvent::Arrived { id, chunk } => self.reply(&mut replies, id, Ok(chunk)),
                    ChildEvent::Lacking { id, reason } => self.reply(&mut replies, id, Err(reason)),
                    ChildEvent::Liar { image, chunk } => lie = Some((image, chunk)),
                    ChildEvent::Closed(closed) => {
                        match lie {
                            Some((image, chunk)) => self.blame(image, chunk),
                            None => self.fail(&closed),
                        }
                        self.tally.add(|s| &s.losses, 1);
                        // Those who wait ask another now; the last words can wait.
                        drop(replies);
                        if closed != Closed::Ended {
                            writing.farewell(child.poll_transmit(self.clock.now())).await;
                        }
                        return;
                    }
                }
            }
            let now = self.clock.now();
            writing.refill(|| child.poll_transmit(now));
            let deadline = self.clock.at(child.deadline());
            // The stream first: what has come counts as a sign of life even if we were late to look.
            tokio::select! {
                biased;
                done = stream::exchange(&mut reading, child.inbox(), &mut writing) => match done {
                    Ok(Exchanged { read: Some(0), .. }) => child.ended(),
                    Ok(Exchanged { read: Some(_), .. }) => {
                        let now = self.clock.now();
                        child.heard(now);
                        self.paths.lock().heard(self.path, now);
                    }
                    Ok(Exchanged { read: None, .. }) => {}
                    Err(error) => {
                        tracing::debug!(parent = %self.parent.node, %error, "the link broke");
                        child.ended();
                    }
                },
                () = self.desk.changed.notified() => {}
                () = sleep_until(deadline) => child.tick(self.clock.now()),
            }
        }
    }

    /// Takes what is on the desk.
    fn take_in(&self, child: &mut Child, replies: &mut Replies) {
        let (wants, withdrawn) = {
            let mut state = self.desk.state();
            (std::mem::take(&mut state.wants), std::mem::take(&mut state.withdrawn))
        };
        for want in wants {
            if let Some(reply) = replies.get_mut(&want.id) {
                child.raise(want.id, want.priority);
                *reply = want.reply;
                continue;
            }
            // A refused request drops its reply, which tells whoever waits to ask another.
            if child.want(want.id, want.image, want.chunk, want.priority).is_ok() {
                replies.insert(want.id, want.reply);
            }
        }
        for (id, ..) in withdrawn.0 {
            child.cancel(id);
            replies.remove(&id);
        }
    }

    fn reply(&self, replies: &mut Replies, id: RequestId, answer: Answer) {
        // Whoever asked may have gone meanwhile.
        if let Some(reply) = replies.remove(&id)
            && let Err(Ok(_)) = reply.send(answer)
        {
            self.tally.add(|s| &s.chunks_in_vain, 1);
        }
    }
}
