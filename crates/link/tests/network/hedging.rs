//! What guests notice when a parent is slow or frozen, and what the others notice of the guests' impatience.

use std::sync::Arc;
use std::time::Duration;

use block::{ChunkSource, FetchError, Priority};
use futures_util::future::join_all;
use link::limits::{
    HEDGES_BURST, LAST_RESORT_BURST, LAST_RESORT_PER_SECOND, LATE_MIN, LATE_UNMEASURED, SILENCE_MAX_BUSY,
};
use link::{FetchSettings, Report};
use tokio::time::{Instant, sleep};

use crate::harness::{GUEST, Listener, Memory, Mood, Net, Node, One, chunk, image, name};

/// What a guest may notice at most of a parent that dies.
const STALL_MAX: Duration = Duration::from_millis(300);

#[tokio::test(start_paused = true)]
async fn a_parent_that_freezes_in_mid_stream_costs_guests_one_short_stall_and_comes_back() {
    let net = Arc::new(Net::default());
    let (parent, uncle) = (Memory::new(Mood::Gives), Memory::new(Mood::Gives));
    net.listen("parent", parent.clone());
    net.listen("uncle", uncle.clone());
    net.listen("origin", Memory::new(Mood::Gives));
    let mut node = Node::new(&net, "child", &["parent", "uncle", "origin"]);
    for n in 0..20 {
        node.get(n).await;
    }
    let streamed = (20..40).map(|n| node.fetcher.fetch(chunk(n).hash(), Priority::Profile));
    net.stop("parent");
    let begin = Instant::now();
    let (_, streamed) = tokio::join!(node.get(50), join_all(streamed));
    assert!(streamed.iter().all(Result::is_ok));
    assert!(begin.elapsed() < STALL_MAX, "all moved within {:?}", begin.elapsed());
    let begin = Instant::now();
    for n in 60..90 {
        node.get(n).await;
    }
    assert!(begin.elapsed() < LATE_MIN, "the next ones do not wait for it: {:?}", begin.elapsed());
    assert_eq!(node.report().await, Report::Lost { node: name("parent") });
    let asked = parent.asked();
    net.resume("parent");
    assert_eq!(node.report().await, Report::Back { node: name("parent") });
    node.get(91).await;
    assert_eq!(parent.asked(), asked + 1, "it is the planned one");
}

#[tokio::test(start_paused = true)]
async fn a_frozen_parent_that_goes_on_before_it_is_lost_is_used_again_at_once() {
    let net = Arc::new(Net::default());
    let parent = Memory::new(Mood::Gives);
    net.listen("parent", parent.clone());
    net.listen("uncle", Memory::new(Mood::Gives));
    net.listen("origin", Memory::new(Mood::Gives));
    let mut node = Node::new(&net, "child", &["parent", "uncle", "origin"]);
    node.get(0).await;
    net.stop("parent");
    node.get(1).await;
    sleep(SILENCE_MAX_BUSY / 2).await;
    net.resume("parent");
    sleep(Duration::from_millis(1)).await;
    let asked = parent.asked();
    node.get(2).await;
    assert_eq!((parent.asked(), node.reports.try_recv().is_err()), (asked + 1, true));
}

#[tokio::test(start_paused = true)]
async fn guests_overtake_a_parent_that_lives_and_does_not_answer() {
    let net = Arc::new(Net::default());
    let parent = Memory::new(Mood::Hangs);
    net.listen("parent", parent.clone());
    net.listen("uncle", Memory::new(Mood::Gives));
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["parent", "uncle", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_millis(), LATE_UNMEASURED.as_millis());
    parent.until_waiting(0).await;
    assert_eq!((node.counter(|s| &s.hedges), node.counter(|s| &s.hedge_wins)), (1, 1));
    for n in 1..30 {
        node.get(n).await;
    }
    assert!(parent.asked() < 10, "it is hardly asked any more: {}", parent.asked());
    assert_eq!(node.counter(|s| &s.breaker_openings), 1);
}

#[tokio::test(start_paused = true)]
async fn a_parent_that_lives_and_never_delivers_is_reported_until_it_does() {
    let net = Arc::new(Net::default());
    let parent = Memory::new(Mood::Hangs);
    net.listen("parent", parent.clone());
    net.listen("uncle", Memory::new(Mood::Gives));
    net.listen("origin", Memory::new(Mood::Gives));
    let mut node = Node::new(&net, "child", &["parent", "uncle", "origin"]);
    // Reads go on until the breaker has opened often enough, and until it is closed again.
    for report in [Report::Lost { node: name("parent") }, Report::Back { node: name("parent") }] {
        let reported = loop {
            node.get(0).await;
            sleep(Duration::from_millis(100)).await;
            if let Ok(reported) = node.reports.try_recv() {
                break reported;
            }
        };
        assert_eq!(reported, report);
        parent.mood.send_replace(Mood::Gives);
    }
    assert_eq!(node.counter(|s| &s.losses), 0, "the connection was never lost");
}

#[tokio::test(start_paused = true)]
async fn when_all_parents_are_slow_requests_are_not_doubled() {
    let net = Arc::new(Net::default());
    let mut sent = Vec::new();
    for parent in ["parent", "uncle", "origin"] {
        let stats = Arc::default();
        let source = Arc::new(One(image(), Memory::new(Mood::Gives)));
        net.set(parent, Listener::ServesSlowly(source, Arc::clone(&stats), 500_000));
        sent.push(stats);
    }
    let node = Node::new(&net, "child", &["parent", "uncle", "origin"]);
    for round in 0..5 {
        let fetches: Vec<_> = (0..20).map(|n| node.start(round * 20 + n)).collect();
        assert!(join_all(fetches).await.into_iter().all(|fetched| fetched.unwrap().is_ok()));
    }
    let hedges = node.counter(|s| &s.hedges);
    assert!(hedges > 0 && hedges as f64 <= HEDGES_BURST + 40.0, "{hedges} hedges");
    let wants = node.counter(|s| &s.wants_sent);
    assert!(wants <= 100 + hedges, "{wants} requests for 100 chunks");
}

#[tokio::test(start_paused = true)]
async fn a_stampede_after_a_failure_stays_off_the_origin_and_everybody_is_served() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Gives);
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["dead", "origin"]);
    let begin = Instant::now();
    let fetches: Vec<_> = (0..96).map(|n| node.start(n)).collect();
    sleep(Duration::from_millis(10)).await;
    assert!(origin.asked() as f64 <= LAST_RESORT_BURST + 1.0, "{} at once", origin.asked());
    assert!(join_all(fetches).await.into_iter().all(|fetched| fetched.unwrap().is_ok()));
    let most = LAST_RESORT_BURST + begin.elapsed().as_secs_f64() * LAST_RESORT_PER_SECOND;
    assert!(96.0 <= most + 1.0, "96 chunks in {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(2), "took {:?}", begin.elapsed());
    assert!(node.counter(|s| &s.throttled) > 0);
}

#[tokio::test(start_paused = true)]
async fn profile_streaming_takes_no_place_from_guests() {
    let net = Arc::new(Net::default());
    let origin = Memory::new(Mood::Hangs);
    net.listen("origin", origin.clone());
    let node = Node::new(&net, "child", &["origin"]);
    let fetcher = node.fetcher.clone();
    let profile = join_all((0..90).map(|n| fetcher.fetch(chunk(n).hash(), Priority::Profile)));
    let guests = async {
        let slots = link::limits::ACTIVE_MAX - link::limits::ACTIVE_FOR_GUESTS;
        origin.until_waiting(slots as u64).await;
        let guests: Vec<_> = (90..95).map(|n| node.start(n)).collect();
        origin.until_waiting(slots as u64 + 5).await;
        guests.iter().for_each(tokio::task::JoinHandle::abort);
    };
    tokio::select! {
        _ = profile => panic!("the origin hangs"),
        () = guests => {}
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_on_fetches_ends_in_an_error_for_guests_and_only_then() {
    let net = Arc::new(Net::default());
    let limit = Duration::from_secs(30);
    let settings = FetchSettings { timeout: Some(limit), ..FetchSettings::default() };
    let node = Node::with(&net, "child", &["dead"], settings);
    let begin = Instant::now();
    let error = node.fetcher.fetch(chunk(0).hash(), GUEST).await.unwrap_err();
    assert!(matches!(error, FetchError::Unreachable(_)), "{error}");
    assert_eq!(begin.elapsed().as_secs(), limit.as_secs());
    let background = node.fetcher.fetch(chunk(0).hash(), Priority::Background);
    let patient = tokio::time::timeout(limit * 10, background).await;
    assert!(patient.is_err(), "nobody waits for the others");
}
