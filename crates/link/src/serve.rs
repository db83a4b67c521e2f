//! The server side of one link on a stream: a [`ServerEnd`] whose requests are fetched from the node's sources.
//!
//! Each request is a task of its own, so that a chunk that the node itself still waits for is answered when
//! it arrives and keeps nothing else waiting; the [`ServerEnd`] bounds their number and keeps slots for guests.
//! A chunk that is here is copied out at once instead, without a task and without hashing: the node verified
//! it, and the child will.
//!
//! Cancellation: a withdrawn request, and the end of the link, drop the fetch. Dropping the future that
//! [`serve`] returns ends the link. Raising: the fetch is repeated with the higher priority beside the running
//! one, whichever ends first counts; joining the two is the source's business.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use block::{
    BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, NodeName, Priority, SlotHint, TryIo,
};
use bytes::BytesMut;
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio::time::sleep_until;

use crate::pack::{self, PackPolicy, Packing};
use crate::server_end::{Reply, ServerEnd, ServerEvent};
use crate::session::Closed;
use crate::stats::ScopedStats;
use crate::stream::{self, Clock, Exchanged, Stream};
use crate::wire::{LackReason, Payload, RequestId};

/// The images that a node serves to its children.
pub trait Sources: Send + Sync {
    /// The chunks of `image`, once the node has attached it; [`None`] if it does not serve the image. May
    /// wait for an attach that is under way; the implementer bounds that.
    fn source<'a>(&'a self, image: &'a ImageId) -> BoxFuture<'a, Option<Arc<dyn ChunkSource>>>;
}

/// Why serving ended other than by the child's leaving.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The stream broke.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
    /// The protocol ended it.
    #[error(transparent)]
    Closed(Closed),
    /// A source panicked. The link is given up, so that the child asks elsewhere.
    #[error("a source of chunks failed: {0}")]
    Source(JoinError),
}

/// Serves one child until it leaves. `own` is this node's name, `peer` the child's by its certificate.
pub async fn serve(
    stream: impl Stream,
    own: &NodeName,
    peer: NodeName,
    sources: Arc<dyn Sources>,
    stats: ScopedStats,
) -> Result<(), ServeError> {
    let clock = Clock::start();
    let mut server = Server {
        end: ServerEnd::new(own, peer, stats, clock.now()),
        sources,
        tasks: JoinSet::new(),
        running: HashMap::new(),
        packing: PackPolicy::default(),
        spare: BytesMut::new(),
    };
    let (mut reading, mut writing) = stream::halves(stream);
    loop {
        // Both free slots and take them, so until neither finds anything.
        loop {
            while let Some(done) = server.tasks.try_join_next_with_id() {
                server.finish(done)?;
            }
            while let Some(event) = server.end.poll_event() {
                if let ServerEvent::Closed(closed) = event {
                    if closed == Closed::Ended {
                        return Ok(());
                    }
                    writing.send_bye(server.end.poll_transmit()).await;
                    return Err(ServeError::Closed(closed));
                }
                server.apply(&event);
            }
            if !writing.is_empty() {
                break;
            }
            writing.refill(|| server.end.poll_transmit());
            if writing.is_empty() {
                server.packing.drained();
                break;
            }
            server.packing.writing(clock.now());
        }
        let deadline = clock.at(server.end.deadline());
        tokio::select! {
            biased;
            done = stream::exchange(&mut reading, server.end.inbox(), &mut writing) => {
                let Exchanged { read, written } = done?;
                match read {
                    Some(0) => server.end.ended(),
                    Some(_) => server.end.heard(clock.now()),
                    None => {}
                }
                server.packing.wrote(written, clock.now());
            }
            Some(done) = server.tasks.join_next_with_id() => server.finish(done)?,
            () = sleep_until(deadline) => server.end.tick(clock.now()),
        }
    }
}

struct Server {
    end: ServerEnd,
    sources: Arc<dyn Sources>,
    /// At most as many as the parent has active requests; dropping the set aborts them.
    tasks: JoinSet<Fetched>,
    running: HashMap<RequestId, Running>,
    packing: PackPolicy,
    /// A buffer of a chunk that turned out not to be here, for the next.
    spare: BytesMut,
}

struct Running {
    task: AbortHandle,
    priority: watch::Sender<Priority>,
}

/// What a task brings back.
struct Fetched {
    id: RequestId,
    reply: Reply,
    /// How much the chunk shrank, if that was tried.
    ratio: Option<f64>,
}

impl Server {
    fn apply(&mut self, event: &ServerEvent) {
        match *event {
            ServerEvent::Wanted { id, image, chunk, priority } => self.wanted(id, image, chunk, priority),
            ServerEvent::Raised { id, priority } => {
                if let Some(running) = self.running.get(&id) {
                    running.priority.send_replace(priority);
                }
            }
            ServerEvent::Cancelled { id } => {
                if let Some(running) = self.running.remove(&id) {
                    running.task.abort();
                }
            }
            ServerEvent::Ready | ServerEvent::Closed(_) => {}
        }
    }

    fn wanted(&mut self, id: RequestId, image: ImageId, chunk: ChunkHash, priority: Priority) {
        let packing = if self.end.child_unpacks() { self.packing.choose() } else { Packing::Leave };
        // A link that compresses wants the chunk with its packed form, if there is one.
        if packing == Packing::Leave
            && let Some(reply) = self.try_read(&image, &chunk)
        {
            return self.end.answer(id, reply);
        }
        let (raised, raises) = watch::channel(priority);
        let request = Request {
            sources: self.sources.clone(),
            image,
            chunk,
            unpacks: if self.end.child_unpacks() { Unpacks::Yes } else { Unpacks::No },
            packing,
            raises,
        };
        let task = self.tasks.spawn(async move {
            let (reply, ratio) = request.run().await;
            Fetched { id, reply, ratio }
        });
        self.running.insert(id, Running { task, priority: raised });
    }

    /// The chunk's bytes, if they are here.
    fn try_read(&mut self, image: &ImageId, chunk: &ChunkHash) -> Option<Reply> {
        let source = self.sources.source(image).now_or_never()??;
        self.spare.resize(CHUNK_BYTES, 0);
        if source.try_read(chunk, &SlotHint::default(), 0, &mut self.spare) == TryIo::WouldBlock {
            return None;
        }
        Some(Reply::Have(Payload::Raw(std::mem::take(&mut self.spare).freeze())))
    }

    fn finish(&mut self, done: Result<(tokio::task::Id, Fetched), JoinError>) -> Result<(), ServeError> {
        match done {
            Ok((task, fetched)) => {
                // A task that was done when it was cancelled must not answer a later request of its id.
                if self.running.get(&fetched.id).is_some_and(|running| running.task.id() == task) {
                    self.running.remove(&fetched.id);
                    self.end.answer(fetched.id, fetched.reply);
                }
                if let Some(ratio) = fetched.ratio {
                    self.packing.tried(ratio);
                }
                Ok(())
            }
            Err(error) if error.is_cancelled() => Ok(()),
            Err(error) => Err(ServeError::Source(error)),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unpacks {
    No,
    Yes,
}

/// One request, as its task has it.
struct Request {
    sources: Arc<dyn Sources>,
    image: ImageId,
    chunk: ChunkHash,
    unpacks: Unpacks,
    packing: Packing,
    raises: watch::Receiver<Priority>,
}

impl Request {
    async fn run(mut self) -> (Reply, Option<f64>) {
        let Some(source) = self.sources.source(&self.image).await else {
            return (Reply::Lack(LackReason::NotAttached), None);
        };
        match self.fetch(&*source).await {
            Ok(chunk) => self.wrap(&chunk),
            Err(FetchError::NotHere(_)) => (Reply::Lack(LackReason::NotHere), None),
            Err(error) => {
                tracing::debug!(image = %self.image, chunk = %self.chunk, %error, "cannot serve a chunk");
                (Reply::Lack(LackReason::Unreachable), None)
            }
        }
    }

    async fn fetch(&mut self, source: &dyn ChunkSource) -> Result<Chunk, FetchError> {
        // As many as there are priorities at most.
        let mut fetches = FuturesUnordered::new();
        loop {
            let priority = *self.raises.borrow_and_update();
            fetches.push(source.fetch(self.chunk, priority));
            tokio::select! {
                biased;
                Some(result) = fetches.next() => return result,
                Ok(()) = self.raises.changed() => {}
            }
        }
    }

    fn wrap(&self, chunk: &Chunk) -> (Reply, Option<f64>) {
        if self.unpacks == Unpacks::Yes
            && let Some(packed) = chunk.packed()
        {
            return (Reply::Have(Payload::Zstd(packed.clone())), None);
        }
        if self.packing == Packing::Leave {
            return (Reply::Have(Payload::Raw(chunk.bytes().clone())), None);
        }
        let (ratio, packed) = pack::pack(chunk.bytes());
        let payload = packed.map_or_else(|| Payload::Raw(chunk.bytes().clone()), Payload::Zstd);
        (Reply::Have(payload), Some(ratio))
    }
}
