//! What readers notice when parents fail, lie, fall silent or change: nothing but time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{ChunkSource, FetchError, ImageId, Priority};
use futures_util::future::join_all;
use link::limits::{
    DIAL_PATIENCE, LATE_UNMEASURED, NOT_HERE_ROUNDS_MAX, PATIENCE_OTHERS, REDIAL_MAX, REPORTS_MAX,
    SILENCE_MAX_BUSY,
};
use link::policy::Standing;
use link::{ParentAddr, Report};
use tokio::time::{Instant, sleep, timeout};

use crate::harness::{Listener, Memory, Mood, Net, Node, One, addr, chunk, image, name};

#[tokio::test(start_paused = true)]
async fn a_liar_is_reported_and_not_asked_again_and_readers_get_the_right_bytes() {
    let net = Arc::new(Net::default());
    let (liar, origin) = (Memory::new(Mood::Lies), Memory::new(Mood::Gives));
    net.listen("liar", liar.clone());
    net.listen("origin", origin.clone());
    let mut node = Node::new(&net, "child", &["liar", "origin"]);
    node.get(0).await;
    let lied = Report::Lied { node: name("liar"), image: image(), chunk: chunk(0).hash() };
    assert_eq!(node.report().await, lied);
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
    let fetches: Vec<_> = (0..30).map(|n| node.start(n)).collect();
    parent.until_waiting(30).await;
    net.kill("parent");
    for (fetched, n) in join_all(fetches).await.into_iter().zip(0..) {
        assert_eq!(fetched.unwrap().unwrap(), chunk(n));
    }
    assert!(begin.elapsed() < Duration::from_millis(10), "failover waits for no timer");
    assert_eq!((origin.asked(), node.counter(|s| &s.failovers)), (30, 30));
    assert_eq!(node.report().await, Report::Lost { node: name("parent") });
}

#[tokio::test(start_paused = true)]
async fn after_a_failover_the_better_parent_is_used_again_once_it_is_back() {
    let net = Arc::new(Net::default());
    let (parent, origin) = (Memory::new(Mood::Gives), Memory::new(Mood::Gives));
    net.listen("origin", origin.clone());
    let mut node = Node::new(&net, "child", &["parent", "origin"]);
    node.get(0).await;
    assert_eq!((parent.asked(), origin.asked()), (0, 1));
    assert_eq!(node.report().await, Report::Lost { node: name("parent") });
    net.listen("parent", parent.clone());
    assert_eq!(node.report().await, Report::Back { node: name("parent") });
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
    assert!(back.elapsed() <= REDIAL_MAX, "took {:?}", back.elapsed());
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
    assert_eq!(begin.elapsed().as_secs(), DIAL_PATIENCE.as_secs());
    assert_eq!(node.report().await, Report::Lost { node: name("frozen") });
    assert_eq!(begin.elapsed().as_secs(), SILENCE_MAX_BUSY.as_secs());

    let waiting = Memory::new(Mood::Hangs);
    net.listen("waiting", waiting.clone());
    node.plan(&["waiting"]);
    let fetch = node.start(1);
    waiting.until_waiting(1).await;
    sleep(SILENCE_MAX_BUSY * 2).await;
    assert_eq!(node.uplinks.status()[0].standing, Standing::Usable);
    waiting.mood.send_replace(Mood::Gives);
    assert_eq!(fetch.await.unwrap().unwrap(), chunk(1));
    assert_eq!(waiting.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn others_wait_longer_than_guests_for_a_parent_that_lives_but_never_answers() {
    let net = Arc::new(Net::default());
    let stuck = Memory::new(Mood::Hangs);
    net.listen("stuck", stuck.clone());
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["stuck", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_millis(), LATE_UNMEASURED.as_millis());
    stuck.until_waiting(0).await;
    let begin = Instant::now();
    assert!(node.fetcher.fetch(chunk(1).hash(), Priority::Profile).await.is_ok());
    assert_eq!(begin.elapsed().as_secs(), PATIENCE_OTHERS.as_secs());
}

#[tokio::test(start_paused = true)]
async fn requests_do_not_wait_long_for_a_parent_that_cannot_be_dialed() {
    let net = Arc::new(Net::default());
    net.set("gone", Listener::Unreachable);
    net.listen("origin", Memory::new(Mood::Gives));
    let node = Node::new(&net, "child", &["gone", "origin"]);
    let begin = Instant::now();
    node.get(0).await;
    assert_eq!(begin.elapsed().as_secs(), DIAL_PATIENCE.as_secs());
    let begin = Instant::now();
    node.get(1).await;
    assert!(begin.elapsed() < Duration::from_millis(10), "the second knows better");
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
    let rounds = u64::from(NOT_HERE_ROUNDS_MAX);
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
