//! Nodes that serve and fetch over in-memory streams, and sources that behave well or badly.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{
    BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, NodeName, Priority, SlotHint, TryIo,
};
use link::{
    Dial, FetchSettings, Fetcher, ParentAddr, Report, ScopedStats, Sources, Stats, Stream, Uplinks, serve,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::{Notify, OnceCell, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

/// Virtual time after which a test is stuck rather than waiting.
const STUCK: Duration = Duration::from_secs(3600);

pub(crate) const GUEST: Priority = Priority::Guest;

pub(crate) fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

pub(crate) fn addr(node: &str) -> ParentAddr {
    ParentAddr { node: name(node), address: format!("{node}:1") }
}

pub(crate) fn image() -> ImageId {
    ImageId::from_bytes([1; 32])
}

pub(crate) fn chunk(n: u32) -> Chunk {
    Chunk::of((n + 1).to_le_bytes().repeat(CHUNK_BYTES / 4).into())
}

/// What a node does with a chunk that is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    Gives,
    /// Gives other bytes.
    Lies,
    /// Says that it has nothing.
    Denies,
    /// Never answers.
    Hangs,
}

/// A source with chunks in memory that counts what it is asked.
pub(crate) struct Memory {
    chunks: HashMap<ChunkHash, Chunk>,
    pub(crate) mood: watch::Sender<Mood>,
    asked: Mutex<HashMap<ChunkHash, u64>>,
    pub(crate) waiting: AtomicU64,
    changed: Notify,
}

impl Memory {
    pub(crate) fn new(mood: Mood) -> Arc<Memory> {
        Arc::new(Memory {
            chunks: (0..100).map(chunk).map(|chunk| (chunk.hash(), chunk)).collect(),
            mood: watch::channel(mood).0,
            asked: Mutex::default(),
            waiting: AtomicU64::new(0),
            changed: Notify::new(),
        })
    }

    pub(crate) fn asked(&self) -> u64 {
        self.asked.lock().unwrap().values().sum()
    }

    pub(crate) fn asked_at_most(&self) -> u64 {
        self.asked.lock().unwrap().values().copied().max().unwrap_or(0)
    }

    /// Waits until so many fetches hang here.
    pub(crate) async fn until_waiting(&self, count: u64) {
        let reached = async {
            loop {
                let changed = self.changed.notified();
                if self.waiting.load(Ordering::SeqCst) == count {
                    return;
                }
                changed.await;
            }
        };
        let waiting = || self.waiting.load(Ordering::SeqCst);
        assert!(timeout(STUCK, reached).await.is_ok(), "{} instead of {count} fetches wait", waiting());
    }

    async fn get(&self, hash: ChunkHash) -> Result<Chunk, FetchError> {
        *self.asked.lock().unwrap().entry(hash).or_default() += 1;
        let _waiting = Waiting::begin(self);
        let mut mood = self.mood.subscribe();
        let mood = *mood.wait_for(|mood| *mood != Mood::Hangs).await.unwrap();
        match self.chunks.get(&hash) {
            Some(chunk) if mood != Mood::Denies => Ok(chunk.clone()),
            _ => Err(FetchError::NotHere(hash)),
        }
    }
}

pub(crate) struct Waiting<'a>(&'a Memory);

impl Waiting<'_> {
    pub(crate) fn begin(memory: &Memory) -> Waiting<'_> {
        memory.waiting.fetch_add(1, Ordering::SeqCst);
        memory.changed.notify_waiters();
        Waiting(memory)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

impl ChunkSource for Memory {
    fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        Box::pin(self.get(chunk))
    }

    fn try_read(&self, hash: &ChunkHash, _: &SlotHint, _: usize, buf: &mut [u8]) -> TryIo {
        if *self.mood.borrow() != Mood::Lies {
            return TryIo::WouldBlock;
        }
        *self.asked.lock().unwrap().entry(*hash).or_default() += 1;
        buf.fill(0xee);
        TryIo::Done
    }
}

/// A source with one chunk at hand, which can be read but not fetched.
pub(crate) struct AtHand(pub(crate) Chunk);

impl ChunkSource for AtHand {
    fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        Box::pin(async move { Err(FetchError::NotHere(chunk)) })
    }

    fn try_read(&self, hash: &ChunkHash, _: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        if *hash != self.0.hash() {
            return TryIo::WouldBlock;
        }
        buf.copy_from_slice(&self.0.bytes()[offset..offset + buf.len()]);
        TryIo::Done
    }
}

/// A relay's cache: joins concurrent fetches of one chunk, keeps what came.
pub(crate) struct Joining {
    pub(crate) below: Fetcher,
    pub(crate) chunks: Mutex<HashMap<ChunkHash, Arc<OnceCell<Chunk>>>>,
}

impl ChunkSource for Joining {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let cell = self.chunks.lock().unwrap().entry(chunk).or_default().clone();
        Box::pin(async move { cell.get_or_try_init(|| self.below.fetch(chunk, priority)).await.cloned() })
    }
}

pub(crate) struct One(pub(crate) ImageId, pub(crate) Arc<dyn ChunkSource>);

impl Sources for One {
    fn source<'a>(&'a self, image: &'a ImageId) -> BoxFuture<'a, Option<Arc<dyn ChunkSource>>> {
        Box::pin(async move { (*image == self.0).then(|| self.1.clone()) })
    }
}

/// Who listens, and every connection that is served.
#[derive(Default)]
pub(crate) struct Net {
    listening: Mutex<HashMap<NodeName, Listener>>,
    served: Mutex<Vec<(NodeName, AbortHandle)>>,
    /// Streams that nobody serves.
    frozen: Mutex<Vec<tokio::io::DuplexStream>>,
    /// Nodes from which no byte gets out at the moment.
    stopped: watch::Sender<HashSet<NodeName>>,
}

#[derive(Clone)]
pub(crate) enum Listener {
    Serves(Arc<dyn Sources>, Arc<Stats>),
    /// Serves over a link of so many bytes per second.
    ServesSlowly(Arc<dyn Sources>, Arc<Stats>, usize),
    /// Accepts, and does nothing then.
    Frozen,
    /// Does not even accept.
    Unreachable,
}

impl Net {
    pub(crate) fn listen(&self, node: &str, source: Arc<dyn ChunkSource>) -> Arc<Stats> {
        let stats = Arc::<Stats>::default();
        self.set(node, Listener::Serves(Arc::new(One(image(), source)), stats.clone()));
        stats
    }

    pub(crate) fn set(&self, node: &str, listener: Listener) {
        self.listening.lock().unwrap().insert(name(node), listener);
    }

    /// Stops the node as SIGSTOP or a cut cable would: its connections stay and carry nothing.
    pub(crate) fn stop(&self, node: &str) {
        self.stopped.send_if_modified(|stopped| stopped.insert(name(node)));
    }

    /// Lets it go on.
    pub(crate) fn resume(&self, node: &str) {
        self.stopped.send_if_modified(|stopped| stopped.remove(&name(node)));
    }

    /// Ends the node and all its connections.
    pub(crate) fn kill(&self, node: &str) {
        self.listening.lock().unwrap().remove(&name(node));
        self.served.lock().unwrap().retain(|(served, task)| {
            let ours = *served == name(node);
            if ours {
                task.abort();
            }
            !ours
        });
    }

    pub(crate) fn serve(
        &self,
        node: &NodeName,
        peer: &NodeName,
        sources: Arc<dyn Sources>,
        total: &Arc<Stats>,
    ) -> Box<dyn Stream> {
        let (near, far) = duplex(CHUNK_BYTES);
        let (own, peer, stats) = (node.clone(), peer.clone(), ScopedStats::under(total));
        let task = tokio::spawn(async move { serve(far, &own, peer, sources, stats).await });
        self.served.lock().unwrap().push((node.clone(), task.abort_handle()));
        piped(Box::new(near), Pace::WhileRunning(node.clone(), self.stopped.subscribe()))
    }
}

/// When bytes go on.
enum Pace {
    /// Not faster than so many bytes per second.
    Rate(usize),
    /// While the node is not stopped.
    WhileRunning(NodeName, watch::Receiver<HashSet<NodeName>>),
}

impl Pace {
    async fn keep(&mut self, len: usize) {
        match self {
            Pace::Rate(rate) => sleep(Duration::from_secs_f64(len as f64 / *rate as f64)).await,
            Pace::WhileRunning(node, stopped) => {
                // The net outlives its connections, or nobody is left to read.
                let _ = stopped.wait_for(|stopped| !stopped.contains(node)).await;
            }
        }
    }
}

/// Carries bytes from `from` to the returned stream at that pace, and back.
fn piped(from: Box<dyn Stream>, mut pace: Pace) -> Box<dyn Stream> {
    let (near, far) = duplex(16 * 1024);
    let (mut from_reads, mut from_writes) = tokio::io::split(from);
    let (mut far_reads, mut far_writes) = tokio::io::split(far);
    tokio::spawn(async move {
        let _ = tokio::io::copy(&mut far_reads, &mut from_writes).await;
        let _ = from_writes.shutdown().await;
    });
    tokio::spawn(async move {
        let mut piece = vec![0; 16 * 1024];
        while let Ok(len @ 1..) = from_reads.read(&mut piece).await {
            pace.keep(len).await;
            if far_writes.write_all(&piece[..len]).await.is_err() {
                return;
            }
        }
        let _ = far_writes.shutdown().await;
    });
    Box::new(near)
}

/// Carries bytes from `from` to the returned stream and back, not faster than `rate` bytes per second.
pub(crate) fn throttled(from: Box<dyn Stream>, rate: usize) -> Box<dyn Stream> {
    piped(from, Pace::Rate(rate))
}

/// A node's way into the net.
pub(crate) struct Dialer(NodeName, Arc<Net>);

impl Dial for Dialer {
    fn dial<'a>(&'a self, parent: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        let listener = self.1.listening.lock().unwrap().get(&parent.node).cloned();
        Box::pin(async move {
            match listener {
                Some(Listener::Serves(sources, stats)) => {
                    Ok(self.1.serve(&parent.node, &self.0, sources, &stats))
                }
                Some(Listener::ServesSlowly(sources, stats, rate)) => {
                    Ok(throttled(self.1.serve(&parent.node, &self.0, sources, &stats), rate))
                }
                Some(Listener::Frozen) => {
                    let (near, far) = duplex(CHUNK_BYTES);
                    self.1.frozen.lock().unwrap().push(far);
                    Ok(Box::new(near) as Box<dyn Stream>)
                }
                Some(Listener::Unreachable) => std::future::pending().await,
                None => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        })
    }
}

/// A node that fetches.
pub(crate) struct Node {
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) uplinks: Arc<Uplinks>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) reports: mpsc::Receiver<Report>,
}

impl Node {
    pub(crate) fn new(net: &Arc<Net>, node: &str, parents: &[&str]) -> Node {
        Node::with(net, node, parents, FetchSettings::default())
    }

    pub(crate) fn with(net: &Arc<Net>, node: &str, parents: &[&str], settings: FetchSettings) -> Node {
        let stats = Arc::<Stats>::default();
        let dial = Arc::new(Dialer(name(node), net.clone()));
        let (uplinks, reports) = Uplinks::new(name(node), dial, stats.clone(), settings);
        let node =
            Node { fetcher: Arc::new(Fetcher::new(image(), uplinks.clone())), uplinks, stats, reports };
        node.plan(parents);
        node
    }

    pub(crate) fn plan(&self, parents: &[&str]) {
        self.fetcher.set_parents(&[parents.iter().map(|node| addr(node)).collect()]);
    }

    pub(crate) fn start(&self, n: u32) -> JoinHandle<Result<Chunk, FetchError>> {
        let fetcher = self.fetcher.clone();
        tokio::spawn(async move {
            let fetch = fetcher.fetch(chunk(n).hash(), GUEST);
            timeout(STUCK, fetch).await.expect("a fetch in time")
        })
    }

    pub(crate) async fn get(&self, n: u32) {
        assert_eq!(self.start(n).await.unwrap().unwrap(), chunk(n));
    }

    pub(crate) async fn report(&mut self) -> Report {
        timeout(STUCK, self.reports.recv()).await.expect("a report in time").unwrap()
    }

    pub(crate) fn counter(&self, counter: fn(&Stats) -> &AtomicU64) -> u64 {
        counter(&self.stats).load(Ordering::Relaxed)
    }
}

pub(crate) fn count(stats: &Stats, counter: fn(&Stats) -> &AtomicU64) -> u64 {
    counter(stats).load(Ordering::Relaxed)
}
