//! The two ends of a link, wired through a pipe that cuts bytes at random places, in virtual time.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{Chunk, ChunkHash, ImageId, NodeName, Priority};
use bytes::{Buf, Bytes, BytesMut};
use link::limits::{
    ACTIVE_FOR_GUESTS, ACTIVE_MAX, BATCH_MAX, OUTSTANDING_FOR_GUESTS, OUTSTANDING_MAX, QUEUED_MAX,
    SILENCE_MAX_BUSY, SILENCE_MAX_IDLE, SILENCE_MAX_PARENT,
};
use link::wire::{ByeReason, Frame, Hello, LackReason, Payload, RequestId, VERSION};
use link::{ClientEnd, ClientEvent, Closed, Outgoing, Reply, ScopedStats, ServerEnd, ServerEvent, pack};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

const START: Duration = Duration::from_secs(1000);

fn name(text: &str) -> NodeName {
    text.parse().unwrap()
}

fn image() -> ImageId {
    ImageId::from_bytes([1; 32])
}

/// A chunk that packs well.
fn chunk(n: u32) -> Chunk {
    Chunk::of(n.to_le_bytes().repeat(CHUNK_BYTES / 4).into())
}

fn raw(chunk: &Chunk) -> Reply {
    Reply::Have(Payload::Raw(chunk.bytes().clone()))
}

fn child() -> ClientEnd {
    ClientEnd::new(&name("child"), name("parent"), ScopedStats::default(), START)
}

fn parent() -> ServerEnd {
    ServerEnd::new(&name("parent"), name("child"), ScopedStats::default(), START)
}

fn bytes(outgoing: Option<Outgoing>) -> Vec<u8> {
    outgoing.map_or_else(Vec::new, |mut out| out.copy_to_bytes(out.remaining()).to_vec())
}

fn frames(bytes: &[u8]) -> Vec<Frame> {
    let mut inbox = BytesMut::from(bytes);
    let frames = std::iter::from_fn(|| Frame::decode(&mut inbox).unwrap()).collect();
    assert!(inbox.is_empty(), "half a frame is left");
    frames
}

fn encoded(frames: &[Frame]) -> Vec<u8> {
    let mut out = BytesMut::new();
    frames.iter().for_each(|frame| frame.encode(&mut out));
    out.to_vec()
}

fn hello(node: &str) -> Frame {
    Frame::Hello(Hello { version: VERSION, features: 0, node: name(node) })
}

/// Moves everything that is ready, until neither end has more to say.
fn settle(
    child: &mut ClientEnd,
    parent: &mut ServerEnd,
    now: Duration,
) -> (Vec<ClientEvent>, Vec<ServerEvent>) {
    let (mut at_child, mut at_parent) = (Vec::new(), Vec::new());
    loop {
        let down = bytes(parent.poll_transmit());
        let up = bytes(child.poll_transmit(now));
        if !down.is_empty() {
            child.feed(&down, now);
        }
        if !up.is_empty() {
            parent.feed(&up, now);
        }
        at_child.extend(std::iter::from_fn(|| child.poll_event()));
        at_parent.extend(std::iter::from_fn(|| parent.poll_event()));
        if down.is_empty() && up.is_empty() {
            return (at_child, at_parent);
        }
    }
}

/// Both ends, greeted.
fn link() -> (ClientEnd, ServerEnd) {
    let (mut child, mut parent) = (child(), parent());
    let (at_child, at_parent) = settle(&mut child, &mut parent, START);
    assert_eq!((at_child, at_parent), (vec![ClientEvent::Ready], vec![ServerEvent::Ready]));
    (child, parent)
}

fn wanted(events: &[ServerEvent]) -> Vec<(RequestId, Priority)> {
    let wanted = |event: &ServerEvent| match event {
        ServerEvent::Wanted { id, priority, .. } => Some((*id, *priority)),
        _ => None,
    };
    events.iter().filter_map(wanted).collect()
}

fn want(child: &mut ClientEnd, ids: std::ops::Range<u32>, priority: Priority) {
    for id in ids {
        child.want(RequestId(id), image(), chunk(id).hash(), priority).unwrap();
    }
}

/// A random run: requests, raises and cancellations at random moments, answers in random order.
struct Run {
    rng: StdRng,
    chunks: Vec<Chunk>,
    child: ClientEnd,
    parent: ServerEnd,
    up: VecDeque<u8>,
    down: VecDeque<u8>,
    /// What the child asked for and neither got nor withdrew.
    open: HashMap<RequestId, ChunkHash>,
    not_found: HashSet<RequestId>,
    /// What the parent's caller holds.
    held: Vec<(RequestId, ChunkHash)>,
    now: Duration,
}

impl Run {
    const REQUESTS: u32 = 700;

    fn step(&mut self, next_id: &mut u32) {
        self.now += Duration::from_micros(self.rng.random_range(0..1000));
        match self.rng.random_range(0..10) {
            0..3 if *next_id < Self::REQUESTS => self.ask(next_id),
            3 => self.change(),
            4 => self.answer(),
            _ => {}
        }
        self.up.extend(bytes(self.child.poll_transmit(self.now)));
        if self.down.len() < 2 * CHUNK_BYTES {
            self.down.extend(bytes(self.parent.poll_transmit()));
        }
        let piece = self.piece(|run| &mut run.up, 3000);
        self.parent.feed(&piece, self.now);
        let piece = self.piece(|run| &mut run.down, 200_000);
        self.child.feed(&piece, self.now);
        self.take_events();
    }

    fn piece(&mut self, pipe: fn(&mut Run) -> &mut VecDeque<u8>, longest: usize) -> Vec<u8> {
        let len = self.rng.random_range(0..=longest).min(pipe(self).len());
        pipe(self).drain(..len).collect()
    }

    fn ask(&mut self, next_id: &mut u32) {
        for _ in 0..self.rng.random_range(1..60) {
            let id = RequestId(*next_id);
            // Equal chunks may be asked for under several ids.
            let hash = self.chunks.choose(&mut self.rng).unwrap().hash();
            let priority =
                *[Priority::Background, Priority::Profile, Priority::Guest].choose(&mut self.rng).unwrap();
            self.child.want(id, image(), hash, priority).unwrap();
            self.open.insert(id, hash);
            *next_id += 1;
        }
    }

    fn change(&mut self) {
        let ids: Vec<RequestId> = self.open.keys().copied().collect();
        let Some(id) = ids.choose(&mut self.rng) else { return };
        if self.rng.random() {
            self.child.raise(*id, Priority::Guest);
        } else {
            self.child.cancel(*id);
            self.open.remove(id);
        }
    }

    fn answer(&mut self) {
        for _ in 0..self.rng.random_range(0..self.held.len() + 1) {
            let (id, hash) = self.held.swap_remove(self.rng.random_range(0..self.held.len()));
            let chunk = self.chunks.iter().find(|chunk| chunk.hash() == hash).unwrap().clone();
            let reply = match self.rng.random_range(0..4) {
                0 => Reply::Lack(LackReason::Unreachable),
                1 => Reply::Have(Payload::Zstd(pack::pack(chunk.bytes()).1.unwrap())),
                _ => raw(&chunk),
            };
            self.parent.answer(id, reply);
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.parent.poll_event() {
            match event {
                ServerEvent::Wanted { id, chunk, .. } => self.held.push((id, chunk)),
                ServerEvent::Cancelled { id } => self.held.retain(|(held, _)| *held != id),
                ServerEvent::Ready | ServerEvent::Raised { .. } => {}
                ServerEvent::Closed(closed) => panic!("the parent closed: {closed}"),
            }
            assert!(self.held.len() <= ACTIVE_MAX);
        }
        while let Some(event) = self.child.poll_event() {
            match event {
                ClientEvent::Arrived { id, chunk } => assert_eq!(self.open.remove(&id), Some(chunk.hash())),
                ClientEvent::Lacking { id, reason } => {
                    assert_eq!(reason, LackReason::Unreachable);
                    assert!(self.open.remove(&id).is_some() && self.not_found.insert(id));
                }
                ClientEvent::Ready => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn everything_asked_is_answered_exactly_once_however_bytes_are_cut() {
    for seed in 0..20 {
        let (child, parent) = (child(), parent());
        let mut run = Run {
            rng: StdRng::seed_from_u64(seed),
            chunks: (0..50).map(chunk).collect(),
            child,
            parent,
            up: VecDeque::new(),
            down: VecDeque::new(),
            open: HashMap::new(),
            not_found: HashSet::new(),
            held: Vec::new(),
            now: START,
        };
        let mut next_id = 0;
        for step in 0.. {
            run.step(&mut next_id);
            if next_id >= Run::REQUESTS && run.open.is_empty() && run.up.is_empty() && run.down.is_empty() {
                break;
            }
            assert!(step < 100_000, "seed {seed}: {} requests were never answered", run.open.len());
        }
        assert!(run.held.is_empty(), "seed {seed}: cancelled requests stay with the parent");
    }
}

#[test]
fn an_urgent_answer_overtakes_those_that_wait_to_be_written() {
    let (mut child, mut parent) = link();
    want(&mut child, 0..40, Priority::Background);
    let (_, events) = settle(&mut child, &mut parent, START);
    assert_eq!(wanted(&events).len(), 40);
    (0..40).for_each(|id| parent.answer(RequestId(id), raw(&chunk(id))));
    want(&mut child, 40..41, Priority::Guest);
    parent.feed(&bytes(child.poll_transmit(START)), START);
    let event = parent.poll_event().unwrap();
    assert_eq!(wanted(&[event]), [(RequestId(40), Priority::Guest)]);
    parent.answer(RequestId(40), raw(&chunk(40)));
    child.raise(RequestId(20), Priority::Profile);
    parent.feed(&bytes(child.poll_transmit(START)), START);
    assert_eq!(parent.poll_event(), None);
    let order: Vec<RequestId> = (0..4)
        .flat_map(|_| frames(&bytes(parent.poll_transmit())))
        .map(|frame| match frame {
            Frame::Have { id, .. } => id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order, [40, 20, 0, 1].map(RequestId), "guest, raised, then in the order of their answers");
}

#[test]
fn an_urgent_request_is_sent_and_handed_out_before_those_that_wait() {
    let (mut child, mut parent) = link();
    want(&mut child, 0..100, Priority::Background);
    want(&mut child, 100..110, Priority::Guest);
    want(&mut child, 110..120, Priority::Profile);
    let (_, events) = settle(&mut child, &mut parent, START);
    let order: Vec<u32> = wanted(&events).iter().map(|(id, _)| id.0).collect();
    let expected: Vec<u32> = (100..120).chain(0..100).take(ACTIVE_MAX - ACTIVE_FOR_GUESTS).collect();
    assert_eq!(order, expected);
}

#[test]
fn background_requests_leave_slots_for_guests_at_both_ends() {
    let (mut child, mut parent) = link();
    want(&mut child, 0..1000, Priority::Background);
    let out = frames(&bytes(child.poll_transmit(START)));
    let mut sent = 0;
    for frame in &out {
        let Frame::Want { wants, .. } = frame else { panic!("{frame:?}") };
        assert!(wants.len() <= BATCH_MAX);
        sent += wants.len();
    }
    assert_eq!(sent, OUTSTANDING_MAX - OUTSTANDING_FOR_GUESTS);
    parent.feed(&encoded(&out), START);
    let events: Vec<ServerEvent> = std::iter::from_fn(|| parent.poll_event()).collect();
    assert_eq!(wanted(&events).len(), ACTIVE_MAX - ACTIVE_FOR_GUESTS);
    want(&mut child, 1000..1100, Priority::Guest);
    let (_, events) = settle(&mut child, &mut parent, START);
    assert_eq!(wanted(&events).len(), ACTIVE_FOR_GUESTS);
    assert!(wanted(&events).iter().all(|(_, priority)| *priority == Priority::Guest));
    assert_eq!((child.closed(), parent.closed()), (None, None), "neither takes the other for broken");
}

#[test]
fn a_full_queue_refuses_and_stays_in_order() {
    let mut child = child();
    let full = u32::try_from(QUEUED_MAX).unwrap();
    want(&mut child, 0..full, Priority::Background);
    assert!(child.want(RequestId(full), image(), chunk(0).hash(), Priority::Guest).is_err());
    child.cancel(RequestId(0));
    assert!(child.want(RequestId(1), image(), chunk(0).hash(), Priority::Guest).is_err(), "an id in use");
    assert!(child.want(RequestId(full), image(), chunk(0).hash(), Priority::Guest).is_ok());
}

#[test]
fn a_cancelled_answer_is_not_sent() {
    let (mut child, mut parent) = link();
    want(&mut child, 0..2, Priority::Profile);
    settle(&mut child, &mut parent, START);
    parent.answer(RequestId(0), raw(&chunk(0)));
    child.cancel(RequestId(0));
    child.cancel(RequestId(1));
    let cancel = bytes(child.poll_transmit(START));
    assert_eq!(frames(&cancel), [Frame::Cancel { ids: vec![RequestId(0), RequestId(1)] }]);
    parent.feed(&cancel, START);
    assert_eq!(parent.poll_event(), Some(ServerEvent::Cancelled { id: RequestId(1) }));
    parent.answer(RequestId(1), raw(&chunk(1)));
    let confirmed = [0, 1].map(|id| Frame::Lack { id: RequestId(id), reason: LackReason::Cancelled });
    assert_eq!(frames(&bytes(parent.poll_transmit())), confirmed);
    assert_eq!(parent.poll_transmit().map(|out| out.remaining()), None);
}

#[test]
fn a_chunk_that_crosses_its_cancellation_disturbs_nothing() {
    let (mut child, mut parent) = link();
    want(&mut child, 0..1, Priority::Profile);
    settle(&mut child, &mut parent, START);
    parent.answer(RequestId(0), raw(&chunk(0)));
    let have = bytes(parent.poll_transmit());
    child.cancel(RequestId(0));
    let cancel = bytes(child.poll_transmit(START));
    child.feed(&have, START);
    parent.feed(&cancel, START);
    assert_eq!(settle(&mut child, &mut parent, START), (vec![], vec![]));
    want(&mut child, 0..1, Priority::Profile);
    assert_eq!(wanted(&settle(&mut child, &mut parent, START).1).len(), 1, "the id is free again");
}

#[test]
fn a_packed_chunk_arrives_with_its_packed_form() {
    let (mut child, mut parent) = link();
    want(&mut child, 7..8, Priority::Guest);
    settle(&mut child, &mut parent, START);
    let packed = pack::pack(chunk(7).bytes()).1.unwrap();
    parent.answer(RequestId(7), Reply::Have(Payload::Zstd(packed.clone())));
    let (events, _) = settle(&mut child, &mut parent, START);
    let [ClientEvent::Arrived { chunk: arrived, .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(arrived, &chunk(7));
    assert_eq!(arrived.packed(), Some(&packed));
}

#[test]
fn a_wrong_chunk_is_told_and_ends_the_link() {
    let other = pack::pack(chunk(8).bytes()).1.unwrap();
    for payload in [
        Payload::Raw(chunk(8).bytes().clone()),
        Payload::Zstd(other),
        Payload::Zstd(Bytes::from_static(b"this does not unpack")),
    ] {
        let (mut child, mut parent) = link();
        want(&mut child, 7..9, Priority::Guest);
        settle(&mut child, &mut parent, START);
        parent.answer(RequestId(7), Reply::Have(payload));
        let (at_child, at_parent) = settle(&mut child, &mut parent, START);
        let [ClientEvent::Liar { chunk: asked, .. }, ClientEvent::Closed(Closed::ByUs { reason, .. })] =
            &at_child[..]
        else {
            panic!("{at_child:?}")
        };
        assert_eq!((*asked, *reason), (chunk(7).hash(), ByeReason::Lied));
        assert_eq!(at_parent, [ServerEvent::Closed(Closed::ByPeer(ByeReason::Lied))]);
    }
}

/// Feeds frames to a parent and says how it closed.
fn parent_after(input: &[Frame]) -> Option<ByeReason> {
    let mut parent = parent();
    parent.feed(&encoded(input), START);
    while parent.poll_event().is_some() {}
    let reason = match parent.closed()? {
        Closed::ByUs { reason, .. } => reason,
        other => panic!("{other}"),
    };
    let told = frames(&bytes(parent.poll_transmit()));
    assert_eq!(told.last(), Some(&Frame::Bye { reason }), "the child is told why");
    Some(reason)
}

fn batch(ids: std::ops::Range<u32>) -> Frame {
    let wants = ids.map(|id| (RequestId(id), chunk(0).hash())).collect();
    Frame::Want { image: image(), priority: Priority::Guest, wants }
}

#[test]
fn a_parent_closes_links_whose_child_breaks_the_rules() {
    let old = Frame::Hello(Hello { version: 0, features: 0, node: name("child") });
    let have = Frame::Have { id: RequestId(0), payload: Payload::Zstd(Bytes::from_static(b"x")) };
    let batches = || (0..4).map(|n| batch(n * 64..(n + 1) * 64));
    let within = [vec![hello("child")], batches().collect()].concat();
    let beyond = [within.clone(), vec![batch(256..257)]].concat();
    let flood = [vec![hello("child")], vec![Frame::Ping { nonce: 0 }; 6000]].concat();
    for (input, expected, what) in [
        (&within[..], None, "as many requests as are allowed"),
        (&beyond, Some(ByeReason::Excess), "one request more"),
        (&flood, Some(ByeReason::Excess), "pings without end, and reads no answer"),
        (&[hello("other")], Some(ByeReason::Name), "another name than the certificate's"),
        (&[old], Some(ByeReason::Version), "an unknown version"),
        (&[batch(0..1)], Some(ByeReason::Protocol), "a request before Hello"),
        (&[hello("child"), hello("child")], Some(ByeReason::Protocol), "Hello twice"),
        (&[hello("child"), have], Some(ByeReason::Protocol), "a parent's frame"),
        (&[hello("child"), batch(0..1), batch(0..1)], Some(ByeReason::Protocol), "an id twice"),
    ] {
        assert_eq!(parent_after(input), expected, "{what}");
    }
}

#[test]
fn a_child_closes_links_whose_parent_breaks_the_rules() {
    let unasked = Frame::Have { id: RequestId(9), payload: Payload::Raw(chunk(9).bytes().clone()) };
    let lack = |id, reason| Frame::Lack { id: RequestId(id), reason };
    for (input, what) in [
        (unasked, "a chunk that nobody asked for"),
        (lack(9, LackReason::NotHere), "an answer without a question"),
        (lack(0, LackReason::Cancelled), "a cancellation that nobody asked for"),
        (batch(0..1), "a child's frame"),
    ] {
        let (mut child, mut parent) = link();
        want(&mut child, 0..1, Priority::Guest);
        settle(&mut child, &mut parent, START);
        child.feed(&encoded(&[input]), START);
        let event = child.poll_event();
        assert!(
            matches!(event, Some(ClientEvent::Closed(Closed::ByUs { reason: ByeReason::Protocol, .. }))),
            "{what}: {event:?}"
        );
    }
    let mut called = child();
    called.feed(&encoded(&[hello("impostor")]), START);
    let closed = called.poll_event();
    assert!(matches!(closed, Some(ClientEvent::Closed(Closed::ByUs { reason: ByeReason::Name, .. }))));
}

/// Lets time pass for a child until it closes or `end`; `alive` says whether the parent hears and answers.
fn closed_at(child: &mut ClientEnd, mut alive: Option<&mut ServerEnd>, end: Duration) -> Option<Duration> {
    loop {
        let now = child.deadline();
        if now > end {
            return None;
        }
        child.tick(now);
        match &mut alive {
            Some(parent) => drop(settle(child, parent, now)),
            None => drop(bytes(child.poll_transmit(now))),
        }
        if child.closed().is_some() {
            return Some(now);
        }
    }
}

#[test]
fn a_silent_parent_is_given_up_and_a_living_one_is_not() {
    let hour = Duration::from_secs(3600);
    let (mut idle, _parent) = link();
    assert_eq!(closed_at(&mut idle, None, START + hour), Some(START + SILENCE_MAX_IDLE));

    let (mut busy, _parent) = link();
    let asked = START + Duration::from_secs(5);
    want(&mut busy, 0..1, Priority::Guest);
    drop(busy.poll_transmit(asked));
    assert_eq!(closed_at(&mut busy, None, START + hour), Some(asked + SILENCE_MAX_BUSY));

    let (mut waiting, mut parent) = link();
    want(&mut waiting, 0..1, Priority::Guest);
    assert_eq!(closed_at(&mut waiting, Some(&mut parent), START + hour), None, "it answers pings");
}

#[test]
fn a_parent_gives_up_a_child_that_does_not_even_ping() {
    let (_child, mut parent) = link();
    parent.tick(START + SILENCE_MAX_PARENT - Duration::from_millis(1));
    assert_eq!(parent.closed(), None);
    parent.tick(START + SILENCE_MAX_PARENT);
    assert!(matches!(parent.closed(), Some(Closed::ByUs { reason: ByeReason::Silent, .. })));
}

proptest! {
    #[test]
    fn foreign_bytes_never_panic_at_either_end(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..10),
        kinds in prop::collection::vec(0u8..10, 10),
    ) {
        let (mut child, mut parent) = link();
        want(&mut child, 0..5, Priority::Guest);
        settle(&mut child, &mut parent, START);
        for (piece, kind) in pieces.iter().zip(kinds) {
            let mut frame = u32::try_from(piece.len()).unwrap().to_le_bytes().to_vec();
            frame.push(kind);
            frame.extend_from_slice(piece);
            parent.feed(&frame, START);
            child.feed(&frame, START);
            while parent.poll_event().is_some() || child.poll_event().is_some() {}
            drop((parent.poll_transmit(), child.poll_transmit(START)));
        }
    }
}
