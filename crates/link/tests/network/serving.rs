//! What children get: each chunk once, by urgency, compressed where it helps, and only if they are who they say.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use block::limits::CHUNK_BYTES;
use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, Priority};
use futures_util::future::join_all;
use link::limits::{ACTIVE_FOR_GUESTS, ACTIVE_MAX};
use link::wire::{ByeReason, RequestId};
use link::{
    ClientEnd, Closed, Dial, FetchSettings, Fetcher, ParentAddr, Report, ScopedStats, ServeError, Stats,
    Stream, Uplinks, serve,
};
use tokio::io::{AsyncWriteExt, duplex};
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::harness::{
    AtHand, GUEST, Joining, Listener, Memory, Mood, Net, Node, One, addr, chunk, count, image, name,
};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_parent_sent_was_taken_or_came_in_vain() {
    let net = Arc::new(Net::default());
    let sent = net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["origin"]);
    for round in 0..2000 {
        let fetches: Vec<_> = (0..10).map(|n| node.start((round + n) % 100)).collect();
        // The readers go at any moment between asking and having their chunks.
        let moment = Instant::now() + Duration::from_micros(u64::from(round));
        while Instant::now() < moment {
            tokio::task::yield_now().await;
        }
        fetches.iter().for_each(JoinHandle::abort);
    }
    let counts = || [node.counter(|s| &s.chunks_received), node.counter(|s| &s.chunks_in_vain)];
    let is_settled = async {
        while counts().iter().sum::<u64>() != count(&sent, |s| &s.chunks_sent) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let settled = timeout(Duration::from_secs(240), is_settled).await;
    assert!(settled.is_ok(), "{:?} of {} that were sent", counts(), count(&sent, |s| &s.chunks_sent));
    assert!(counts().iter().all(|&count| count > 0), "{:?}", counts());
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
    let background = join_all((0..500).map(|n| {
        let priority = if n % 2 == 0 { Priority::Background } else { Priority::Profile };
        fetcher.fetch(chunk(n % 90).hash(), priority)
    }));
    let guest = async {
        let slots = ACTIVE_MAX - ACTIVE_FOR_GUESTS;
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
    let served = tokio::spawn(async move {
        serve(far, &name("parent"), name("child"), sources, ScopedStats::default()).await
    });
    let mut child = ClientEnd::new(&name("child"), name("parent"), ScopedStats::default(), Duration::ZERO);
    child.want(RequestId(1), image(), chunk(0).hash(), Priority::Background).unwrap();
    near.write_all_buf(&mut child.poll_transmit(Duration::ZERO).unwrap()).await.unwrap();
    assert_eq!(seen.recv().await, Some(Priority::Background));
    child.raise(RequestId(1), Priority::Guest);
    near.write_all_buf(&mut child.poll_transmit(Duration::ZERO).unwrap()).await.unwrap();
    assert_eq!(seen.recv().await, Some(Priority::Guest));
    drop(near);
    assert!(served.await.unwrap().is_ok(), "a child that leaves is not an error");
    assert_eq!(seen.recv().await, None, "the end of the link drops what it fetched");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_is_begun_anew_more_urgently_is_raised_and_not_sent_twice() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Hangs);
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["origin"]);
    let hash = chunk(0).hash();
    tokio::select! {
        _ = node.fetcher.fetch(hash, Priority::Profile) => panic!("the origin hangs"),
        () = origin.until_waiting(1) => {}
    }
    // The source gets the raised one beside the first.
    let release = async {
        origin.until_waiting(2).await;
        origin.mood.send_replace(Mood::Gives);
    };
    let (fetched, ()) = tokio::join!(node.fetcher.fetch(hash, GUEST), release);
    assert_eq!(fetched.unwrap(), chunk(0));
    assert_eq!((node.counter(|s| &s.wants_sent), node.counter(|s| &s.cancels_sent)), (1, 0));
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
        serve(far, &name("origin"), name("certified"), sources, ScopedStats::default()).await
    });
    struct Given(Mutex<Option<Box<dyn Stream>>>);
    impl Dial for Given {
        fn dial<'a>(&'a self, _: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
            let stream = self.0.lock().unwrap().take();
            Box::pin(async move { stream.ok_or_else(|| io::ErrorKind::ConnectionRefused.into()) })
        }
    }
    let dial = Arc::new(Given(Mutex::new(Some(Box::new(near)))));
    let (uplinks, mut reports) =
        Uplinks::new(name("impostor"), dial, Arc::default(), FetchSettings::default());
    let fetcher = Arc::new(Fetcher::new(image(), uplinks));
    fetcher.set_parents(&[vec![addr("origin")]]);
    let fetch = tokio::spawn(async move { fetcher.fetch(chunk(0).hash(), GUEST).await });
    assert_eq!(reports.recv().await, Some(Report::Lost { node: name("origin") }));
    let error = served.await.unwrap().unwrap_err();
    assert!(matches!(error, ServeError::Closed(Closed::ByUs { reason: ByeReason::Name, .. })), "{error}");
    assert_eq!(origin.asked(), 0);
    fetch.abort();
}
