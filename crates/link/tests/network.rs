//! Nodes over in-memory streams, with the clock paused: relays, failover, liars, changes of plan.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, NodeName, Priority, SlotHint};
use futures_util::future::join_all;
use link::limits::REPORTS_MAX;
use link::policy::Standing;
use link::wire::{ByeReason, RequestId};
use link::{
    Child, Closed, Dial, Fetcher, ParentAddr, Report, ServeError, Sources, Stats, Stream, Tally, Uplinks,
    serve,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::{Notify, OnceCell, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, timeout};

const GUEST: Priority = Priority::Guest;

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn addr(node: &str) -> ParentAddr {
    ParentAddr { node: name(node), address: format!("{node}:1") }
}

fn image() -> ImageId {
    ImageId::from_bytes([1; 32])
}

fn chunk(n: u32) -> Chunk {
    Chunk::of((n + 1).to_le_bytes().repeat(CHUNK_BYTES / 4).into())
}

/// What a node does with a chunk that is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mood {
    Gives,
    /// Gives other bytes.
    Lies,
    /// Says that it has nothing.
    Denies,
    /// Never answers.
    Hangs,
}

/// A source with chunks in memory that counts what it is asked.
struct Memory {
    chunks: HashMap<ChunkHash, Chunk>,
    mood: watch::Sender<Mood>,
    asked: Mutex<HashMap<ChunkHash, u64>>,
    waiting: AtomicU64,
    changed: Notify,
}

impl Memory {
    fn new(mood: Mood) -> Arc<Memory> {
        Arc::new(Memory {
            chunks: (0..100).map(chunk).map(|chunk| (chunk.hash(), chunk)).collect(),
            mood: watch::channel(mood).0,
            asked: Mutex::default(),
            waiting: AtomicU64::new(0),
            changed: Notify::new(),
        })
    }

    fn asked(&self) -> u64 {
        self.asked.lock().unwrap().values().sum()
    }

    fn asked_at_most(&self) -> u64 {
        self.asked.lock().unwrap().values().copied().max().unwrap_or(0)
    }

    /// Waits until so many fetches hang here.
    async fn until_waiting(&self, count: u64) {
        loop {
            let changed = self.changed.notified();
            if self.waiting.load(Ordering::SeqCst) == count {
                return;
            }
            changed.await;
        }
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

struct Waiting<'a>(&'a Memory);

impl Waiting<'_> {
    fn begin(memory: &Memory) -> Waiting<'_> {
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

    fn read_now(&self, hash: &ChunkHash, _: &SlotHint, _: usize, buf: &mut [u8]) -> bool {
        if *self.mood.borrow() != Mood::Lies {
            return false;
        }
        *self.asked.lock().unwrap().entry(*hash).or_default() += 1;
        buf.fill(0xee);
        true
    }
}

/// A source with one chunk at hand, which can be read but not fetched.
struct AtHand(Chunk);

impl ChunkSource for AtHand {
    fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        Box::pin(async move { Err(FetchError::NotHere(chunk)) })
    }

    fn read_now(&self, hash: &ChunkHash, _: &SlotHint, offset: usize, buf: &mut [u8]) -> bool {
        if *hash != self.0.hash() {
            return false;
        }
        buf.copy_from_slice(&self.0.bytes()[offset..offset + buf.len()]);
        true
    }
}

/// A relay's cache: joins concurrent fetches of one chunk, keeps what came.
struct Joining {
    below: Fetcher,
    chunks: Mutex<HashMap<ChunkHash, Arc<OnceCell<Chunk>>>>,
}

impl ChunkSource for Joining {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let cell = self.chunks.lock().unwrap().entry(chunk).or_default().clone();
        Box::pin(async move { cell.get_or_try_init(|| self.below.fetch(chunk, priority)).await.cloned() })
    }
}

struct One(ImageId, Arc<dyn ChunkSource>);

impl Sources for One {
    fn source<'a>(&'a self, image: &'a ImageId) -> BoxFuture<'a, Option<Arc<dyn ChunkSource>>> {
        Box::pin(async move { (*image == self.0).then(|| self.1.clone()) })
    }
}

/// Who listens, and every connection that is served.
#[derive(Default)]
struct Net {
    listening: Mutex<HashMap<NodeName, Listener>>,
    served: Mutex<Vec<(NodeName, AbortHandle)>>,
    /// Streams that nobody serves.
    frozen: Mutex<Vec<tokio::io::DuplexStream>>,
}

#[derive(Clone)]
enum Listener {
    Serves(Arc<dyn Sources>, Arc<Stats>),
    /// Serves over a link of so many bytes per second.
    ServesSlowly(Arc<dyn Sources>, Arc<Stats>, usize),
    /// Accepts, and does nothing then.
    Frozen,
    /// Does not even accept.
    Unreachable,
}

impl Net {
    fn listen(&self, node: &str, source: Arc<dyn ChunkSource>) -> Arc<Stats> {
        let stats = Arc::<Stats>::default();
        self.set(node, Listener::Serves(Arc::new(One(image(), source)), stats.clone()));
        stats
    }

    fn set(&self, node: &str, listener: Listener) {
        self.listening.lock().unwrap().insert(name(node), listener);
    }

    /// Ends the node and all its connections.
    fn kill(&self, node: &str) {
        self.listening.lock().unwrap().remove(&name(node));
        self.served.lock().unwrap().retain(|(served, task)| {
            let ours = *served == name(node);
            if ours {
                task.abort();
            }
            !ours
        });
    }

    fn serve(
        &self,
        node: &NodeName,
        peer: &NodeName,
        sources: Arc<dyn Sources>,
        total: &Arc<Stats>,
    ) -> Box<dyn Stream> {
        let (near, far) = duplex(CHUNK_BYTES);
        let (own, peer, tally) = (node.clone(), peer.clone(), Tally::under(total));
        let task = tokio::spawn(async move { serve(far, &own, peer, sources, tally).await });
        self.served.lock().unwrap().push((node.clone(), task.abort_handle()));
        Box::new(near)
    }
}

/// Carries bytes from `from` to the returned stream and back, not faster than `rate` bytes per second.
fn throttled(from: Box<dyn Stream>, rate: usize) -> Box<dyn Stream> {
    let (near, far) = duplex(16 * 1024);
    let (mut from_reads, mut from_writes) = tokio::io::split(from);
    let (mut far_reads, mut far_writes) = tokio::io::split(far);
    tokio::spawn(async move { tokio::io::copy(&mut far_reads, &mut from_writes).await });
    tokio::spawn(async move {
        let mut piece = vec![0; 16 * 1024];
        while let Ok(len @ 1..) = from_reads.read(&mut piece).await {
            sleep(Duration::from_secs_f64(len as f64 / rate as f64)).await;
            if far_writes.write_all(&piece[..len]).await.is_err() {
                break;
            }
        }
    });
    Box::new(near)
}

/// A node's way into the net.
struct Dialer(NodeName, Arc<Net>);

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
struct Node {
    fetcher: Arc<Fetcher>,
    uplinks: Arc<Uplinks>,
    stats: Arc<Stats>,
    reports: mpsc::Receiver<Report>,
}

impl Node {
    fn new(net: &Arc<Net>, node: &str, parents: &[&str]) -> Node {
        let stats = Arc::<Stats>::default();
        let dial = Arc::new(Dialer(name(node), net.clone()));
        let (uplinks, reports) = Uplinks::new(name(node), dial, stats.clone());
        let node =
            Node { fetcher: Arc::new(Fetcher::new(image(), uplinks.clone())), uplinks, stats, reports };
        node.plan(parents);
        node
    }

    fn plan(&self, parents: &[&str]) {
        self.fetcher.set_parents(&[parents.iter().map(|node| addr(node)).collect()]);
    }

    fn start(&self, n: u32) -> JoinHandle<Result<Chunk, FetchError>> {
        let fetcher = self.fetcher.clone();
        tokio::spawn(async move { fetcher.fetch(chunk(n).hash(), GUEST).await })
    }

    async fn get(&self, n: u32) {
        assert_eq!(self.fetcher.fetch(chunk(n).hash(), GUEST).await.unwrap(), chunk(n));
    }

    fn counter(&self, counter: fn(&Stats) -> &AtomicU64) -> u64 {
        counter(&self.stats).load(Ordering::Relaxed)
    }
}

fn count(stats: &Stats, counter: fn(&Stats) -> &AtomicU64) -> u64 {
    counter(stats).load(Ordering::Relaxed)
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_twenty_children_ask_for_leaves_the_origin_once() {
    let (net, origin) = (Arc::new(Net::default()), Memory::new(Mood::Hangs));
    let sent = net.listen("origin", origin.clone());
    let mut relays = Vec::new();
    for (relay, parent) in [("a", "origin"), ("b", "a")] {
        let node = Node::new(&net, relay, &[]);
        node.plan(&[parent]);
        let below = Fetcher::new(image(), node.uplinks.clone());
        below.set_parents(&[vec![addr(parent)]]);
        net.listen(relay, Arc::new(Joining { below, chunks: Mutex::default() }));
        relays.push(node);
    }
    let children: Vec<Node> = (0..20).map(|n| Node::new(&net, &format!("child{n}"), &["b"])).collect();
    let fetches: Vec<_> = children.iter().flat_map(|child| (0..10).map(|n| child.start(n))).collect();
    origin.until_waiting(10).await;
    origin.mood.send_replace(Mood::Gives);
    for (at, fetched) in join_all(fetches).await.into_iter().enumerate() {
        assert_eq!(fetched.unwrap().unwrap(), chunk(u32::try_from(at % 10).unwrap()));
    }
    assert_eq!((origin.asked(), origin.asked_at_most()), (10, 1));
    assert_eq!(count(&sent, |s| &s.chunks_sent), 10);
    assert!(relays.iter().all(|relay| relay.counter(|s| &s.chunks_received) == 10));
}

#[tokio::test(start_paused = true)]
async fn a_liar_is_reported_and_not_asked_again_and_readers_get_the_right_bytes() {
    let net = Arc::new(Net::default());
    let (liar, origin) = (Memory::new(Mood::Lies), Memory::new(Mood::Gives));
    net.listen("liar", liar.clone());
    net.listen("origin", origin.clone());
    let mut node = Node::new(&net, "child", &["liar", "origin"]);
    node.get(0).await;
    let lied = Report::Lied { node: name("liar"), chunk: chunk(0).hash() };
    assert_eq!(node.reports.recv().await, Some(lied));
    // Neither time short of the ban nor leaving the plan makes it trusted again.
    for n in 1..20 {
        sleep(Duration::from_secs(10)).await;
        node.plan(if n % 2 == 0 { &["liar", "origin"] } else { &["origin"] });
        node.get(n).await;
    }
    assert_eq!((liar.asked(), origin.asked()), (1, 20));
    assert_eq!(node.counter(|s| &s.lies), 1);
    assert!(node.reports.try_recv().is_err(), "one lie is one report");
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_dies_in_the_middle_of_a_transfer_costs_no_error() {
    let net = Arc::new(Net::default());
    let (parent, origin) = (Memory::new(Mood::Hangs), Memory::new(Mood::Gives));
    net.listen("parent", parent.clone());
    net.listen("origin", origin.clone());
    let mut node = Node::new(&net, "child", &["parent", "origin"]);
    let begin = Instant::now();
    let fetches: Vec<_> = (0..40).map(|n| node.start(n)).collect();
    parent.until_waiting(40).await;
    net.kill("parent");
    for (fetched, n) in join_all(fetches).await.into_iter().zip(0..) {
        assert_eq!(fetched.unwrap().unwrap(), chunk(n));
    }
    assert!(begin.elapsed() < Duration::from_millis(10), "failover waits for no timer");
    assert_eq!((origin.asked(), node.counter(|s| &s.failovers)), (40, 40));
    assert_eq!(node.reports.recv().await, Some(Report::Lost { node: name("parent") }));
}

#[tokio::test(start_paused = true)]
async fn after_a_failover_the_better_parent_is_used_again_once_it_is_back() {
    let net = Arc::new(Net::default());
    let (parent, origin) = (Memory::new(Mood::Gives), Memory::new(Mood::Gives));
    net.listen("origin", origin.clone());
    let mut node = Node::new(&net, "child", &["parent", "origin"]);
    node.get(0).await;
    assert_eq!((parent.asked(), origin.asked()), (0, 1));
    assert_eq!(node.reports.recv().await, Some(Report::Lost { node: name("parent") }));
    net.listen("parent", parent.clone());
    assert_eq!(node.reports.recv().await, Some(Report::Back { node: name("parent") }));
    node.get(1).await;
    assert_eq!((parent.asked(), origin.asked()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn reads_wait_while_all_parents_are_down_and_complete_when_one_is_back() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Gives);
    let node = Node::new(&net, "child", &["parent", "origin"]);
    let mut fetch = node.start(0);
    assert!(timeout(Duration::from_secs(600), &mut fetch).await.is_err(), "it must wait");
    net.listen("origin", origin);
    let back = Instant::now();
    assert_eq!(fetch.await.unwrap().unwrap(), chunk(0));
    assert!(back.elapsed() <= link::limits::REDIAL_MAX, "took {:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_fetch_waits_for_parents_and_follows_changes_of_plan_in_flight() {
    let net = Arc::new(Net::default());
    let (stuck, origin) = (Memory::new(Mood::Hangs), Memory::new(Mood::Gives));
    net.listen("stuck", stuck.clone());
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &[]);
    let fetch = node.start(0);
    tokio::task::yield_now().await;
    let begin = Instant::now();
    node.plan(&["stuck"]);
    stuck.until_waiting(1).await;
    node.plan(&["stuck", "origin"]);
    tokio::task::yield_now().await;
    assert_eq!(stuck.waiting.load(Ordering::SeqCst), 1, "a parent that stays keeps its requests");
    node.plan(&["origin"]);
    assert_eq!(fetch.await.unwrap().unwrap(), chunk(0));
    stuck.until_waiting(0).await;
    assert!(begin.elapsed() < Duration::from_millis(10), "changes of plan wait for no timer");
    assert_eq!(node.uplinks.status().len(), 1, "a parent that left the plan is let go");
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_falls_silent_is_dropped_and_one_that_waits_itself_is_not() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Gives);
    net.set("frozen", Listener::Frozen);
    net.listen("origin", origin);
    let mut node = Node::new(&net, "child", &["frozen", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_secs(), link::limits::SILENCE_MAX_BUSY.as_secs());
    assert_eq!(node.reports.recv().await, Some(Report::Lost { node: name("frozen") }));

    let waiting = Memory::new(Mood::Hangs);
    net.listen("waiting", waiting.clone());
    node.plan(&["waiting"]);
    let fetch = node.start(1);
    waiting.until_waiting(1).await;
    sleep(link::limits::SILENCE_MAX_BUSY * 2).await;
    assert_eq!(node.uplinks.status()[0].standing, Standing::Usable);
    waiting.mood.send_replace(Mood::Gives);
    assert_eq!(fetch.await.unwrap().unwrap(), chunk(1));
    assert_eq!(waiting.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_lives_but_never_answers_is_passed_over_in_the_end() {
    let net = Arc::new(Net::default());
    let stuck = Memory::new(Mood::Hangs);
    net.listen("stuck", stuck.clone());
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["stuck", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_secs(), link::limits::PATIENCE_GUEST.as_secs());
    stuck.until_waiting(0).await;
}

#[tokio::test(start_paused = true)]
async fn requests_do_not_wait_long_for_a_parent_that_cannot_be_dialed() {
    let net = Arc::new(Net::default());
    net.set("gone", Listener::Unreachable);
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["gone", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_secs(), link::limits::DIAL_PATIENCE.as_secs());
    let begin = Instant::now();
    node.get(1).await;
    assert!(begin.elapsed() < Duration::from_millis(10), "the second knows better");
}

#[tokio::test(start_paused = true)]
async fn dropping_a_fetch_withdraws_it_from_the_parent_and_from_nobody_else() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Hangs);
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["origin"]);
    let (kept, dropped) = (node.start(0), node.start(1));
    origin.until_waiting(2).await;
    dropped.abort();
    origin.until_waiting(1).await;
    origin.mood.send_replace(Mood::Gives);
    assert_eq!(kept.await.unwrap().unwrap(), chunk(0));
    assert_eq!(node.counter(|s| &s.cancels_sent), 1);
    assert_eq!(node.counter(|s| &s.chunks_received), 1);
}

#[tokio::test(start_paused = true)]
async fn a_chunk_that_nobody_has_is_an_error_only_after_all_said_so_several_times() {
    let net = Arc::new(Net::default());
    let (parent, origin) = (Memory::new(Mood::Denies), Memory::new(Mood::Denies));
    net.listen("parent", parent.clone());
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["parent", "origin"]);
    let error = node.start(0).await.unwrap().unwrap_err();
    assert!(matches!(error, FetchError::NotHere(missing) if missing == chunk(0).hash()), "{error}");
    let rounds = u64::from(link::limits::NOT_HERE_ROUNDS_MAX);
    assert_eq!((parent.asked(), origin.asked()), (rounds, rounds));
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_does_not_serve_the_image_is_passed_over_at_once() {
    let net = Arc::new(Net::default());
    let elsewhere = One(ImageId::from_bytes([2; 32]), Memory::new(Mood::Gives));
    net.set("parent", Listener::Serves(Arc::new(elsewhere), Arc::default()));
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["parent", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert!(begin.elapsed() < Duration::from_millis(10));
    assert_eq!(node.counter(|s| &s.lacks_received), 1);
}

#[tokio::test(start_paused = true)]
async fn images_share_one_connection_and_stripes_spread_over_parents() {
    let net = Arc::new(Net::default());
    let (left, right) = (Memory::new(Mood::Gives), Memory::new(Mood::Gives));
    net.listen("left", left.clone());
    net.listen("right", right.clone());
    let node = Node::new(&net, "child", &[]);
    let stripes = [vec![addr("left"), addr("right")], vec![addr("right"), addr("left")]];
    let second = Fetcher::new(image(), node.uplinks.clone());
    node.fetcher.set_parents(&stripes);
    second.set_parents(&stripes);
    for n in 0..50 {
        node.get(n).await;
        assert!(second.fetch(chunk(n).hash(), GUEST).await.is_ok());
    }
    let even = (0..50).filter(|n| chunk(*n).hash().prefix().is_multiple_of(2)).count() as u64;
    assert_eq!((left.asked(), right.asked()), (2 * even, 2 * (50 - even)));
    assert_eq!(node.counter(|s| &s.dials), 2);
}

#[tokio::test(start_paused = true)]
async fn guests_do_not_wait_for_background_requests() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Hangs);
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["origin"]);
    let fetcher = node.fetcher.clone();
    let background = join_all((0..500).map(|n| fetcher.fetch(chunk(n % 90).hash(), Priority::Background)));
    let guest = async {
        let slots = link::limits::ACTIVE_MAX - link::limits::ACTIVE_FOR_GUESTS;
        origin.until_waiting(slots as u64).await;
        let guest = node.start(95);
        origin.until_waiting(slots as u64 + 1).await;
        guest.abort();
    };
    tokio::select! {
        _ = background => panic!("the origin hangs"),
        () = guest => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_chunk_at_hand_is_served_without_a_fetch() {
    let net = Arc::new(Net::default());
    net.listen("parent", Arc::new(AtHand(chunk(0))));
    let node = Node::new(&net, "child", &["parent"]);
    node.get(0).await;
    assert!(node.start(1).await.unwrap().is_err(), "the other is not at hand");
    node.get(0).await;
}

/// A source that never answers and tells how urgently it is asked.
struct Urgency(mpsc::UnboundedSender<Priority>);

impl ChunkSource for Urgency {
    fn fetch(&self, _: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        self.0.send(priority).unwrap();
        Box::pin(std::future::pending())
    }
}

#[tokio::test(start_paused = true)]
async fn a_raised_request_is_raised_at_the_source() {
    let (urgencies, mut seen) = mpsc::unbounded_channel();
    let (mut near, far) = duplex(CHUNK_BYTES);
    let sources = Arc::new(One(image(), Arc::new(Urgency(urgencies))));
    let served =
        tokio::spawn(
            async move { serve(far, &name("parent"), name("child"), sources, Tally::default()).await },
        );
    let mut child = Child::new(&name("child"), name("parent"), Tally::default(), Duration::ZERO);
    child.want(RequestId(1), image(), chunk(0).hash(), Priority::Background).unwrap();
    near.write_all_buf(&mut child.poll_transmit(Duration::ZERO).unwrap()).await.unwrap();
    assert_eq!(seen.recv().await, Some(Priority::Background));
    child.raise(RequestId(1), Priority::Guest);
    near.write_all_buf(&mut child.poll_transmit(Duration::ZERO).unwrap()).await.unwrap();
    assert_eq!(seen.recv().await, Some(Priority::Guest));
    drop(near);
    assert!(served.await.unwrap().is_ok(), "a child that leaves is no error");
    assert_eq!(seen.recv().await, None, "the end of the link drops what it fetched");
}

#[tokio::test(start_paused = true)]
async fn reports_that_nobody_takes_are_bounded_and_counted() {
    let net = Arc::new(Net::default());
    let node = Node::new(&net, "child", &[]);
    let parents: Vec<String> = (0..300).map(|n| format!("gone{n}")).collect();
    // One stripe each, because the best of each stripe is dialed at once.
    let stripes: Vec<Vec<ParentAddr>> = parents.iter().map(|parent| vec![addr(parent)]).collect();
    node.fetcher.set_parents(&stripes);
    sleep(Duration::from_millis(1)).await;
    let dropped = node.counter(|s| &s.reports_dropped);
    assert_eq!((node.reports.len(), dropped), (REPORTS_MAX, 300 - REPORTS_MAX as u64));
}

#[tokio::test(start_paused = true)]
async fn chunks_are_compressed_on_a_slow_link_and_passed_on_as_they_came() {
    let net = Arc::new(Net::default());
    let stats = Arc::<Stats>::default();
    let origin = Arc::new(One(image(), Memory::new(Mood::Gives)));
    net.set("origin", Listener::ServesSlowly(origin, stats.clone(), 10_000_000));
    let relay = Node::new(&net, "relay", &["origin"]);
    let fetches = (0..100).map(|n| relay.fetcher.fetch(chunk(n).hash(), Priority::Background));
    let fetched: Vec<Chunk> = join_all(fetches).await.into_iter().map(Result::unwrap).collect();
    let packed = fetched.iter().filter(|chunk| chunk.packed().is_some()).count();
    assert!(packed > 0 && packed < 100, "{packed} of 100: some went before the rate was known");
    assert!(count(&stats, |s| &s.wire_bytes_sent) < count(&stats, |s| &s.raw_bytes_sent));

    let one = fetched.into_iter().find(|chunk| chunk.packed().is_some()).unwrap();
    let kept = Joining { below: Fetcher::new(image(), relay.uplinks.clone()), chunks: Mutex::default() };
    kept.chunks.lock().unwrap().insert(one.hash(), Arc::new(OnceCell::from(one.clone())));
    net.listen("relay", Arc::new(kept));
    let child = Node::new(&net, "child", &["relay"]);
    let passed_on = child.fetcher.fetch(one.hash(), GUEST).await.unwrap();
    assert_eq!(passed_on.packed(), one.packed(), "also on a link that is not slow");
}

#[tokio::test(start_paused = true)]
async fn a_child_whose_name_is_not_its_certificates_gets_nothing() {
    let (near, far) = duplex(CHUNK_BYTES);
    let origin = Memory::new(Mood::Gives);
    let sources = Arc::new(One(image(), origin.clone()));
    let served = tokio::spawn(async move {
        serve(far, &name("origin"), name("certified"), sources, Tally::default()).await
    });
    struct Given(Mutex<Option<Box<dyn Stream>>>);
    impl Dial for Given {
        fn dial<'a>(&'a self, _: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
            let stream = self.0.lock().unwrap().take();
            Box::pin(async move { stream.ok_or_else(|| io::ErrorKind::ConnectionRefused.into()) })
        }
    }
    let dial = Arc::new(Given(Mutex::new(Some(Box::new(near)))));
    let (uplinks, mut reports) = Uplinks::new(name("impostor"), dial, Arc::default());
    let fetcher = Arc::new(Fetcher::new(image(), uplinks));
    fetcher.set_parents(&[vec![addr("origin")]]);
    let fetch = tokio::spawn(async move { fetcher.fetch(chunk(0).hash(), GUEST).await });
    assert_eq!(reports.recv().await, Some(Report::Lost { node: name("origin") }));
    let error = served.await.unwrap().unwrap_err();
    assert!(matches!(error, ServeError::Closed(Closed::ByUs { reason: ByeReason::Name, .. })), "{error}");
    assert_eq!(origin.asked(), 0);
    fetch.abort();
}
