//! A child and any parent: frames in and out of place, right and wrong chunks, cut anywhere, between new
//! requests, cancellations and silence.
//!
//! Checked: nothing comes out but the chunk that was asked for, verified; every request that was not
//! withdrawn gets one event; never more than the agreed number of requests is on the wire; the end comes once.

#![no_main]

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{Chunk, ChunkHash};
use bytes::{Buf, BytesMut};
use fuzz::Input;
use fuzz::frames::{
    CHUNKS, chunk, decode_foreign, decode_ours, frame, honest_payload, image, node, priority,
};
use link::limits::{BATCH_MAX, OUTSTANDING_MAX, QUEUED_MAX};
use link::wire::{Frame, Hello, LackReason, RequestId, VERSION};
use link::{ClientEnd, ClientEvent, ScopedStats, pack};

struct Run {
    child: ClientEnd,
    now: Duration,
    /// Bytes from the parent that have not arrived.
    on_the_way: BytesMut,
    /// What arrived, for a count of our own.
    arrived: BytesMut,
    /// Bytes to the parent.
    sent: BytesMut,
    /// What was asked for and neither answered nor withdrawn.
    asked: HashMap<RequestId, ChunkHash>,
    /// Requests that the parent has and did not answer yet, withdrawn ones included.
    on_the_wire: HashMap<RequestId, ChunkHash>,
    withdrawn: HashSet<RequestId>,
    ready: bool,
    lied: bool,
    closed_told: bool,
}

impl Run {
    fn new() -> Run {
        let now = Duration::ZERO;
        Run {
            child: ClientEnd::new(&node("child"), node("parent"), ScopedStats::default(), now),
            now,
            on_the_way: BytesMut::new(),
            arrived: BytesMut::new(),
            sent: BytesMut::new(),
            asked: HashMap::new(),
            on_the_wire: HashMap::new(),
            withdrawn: HashSet::new(),
            ready: false,
            lied: false,
            closed_told: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 12 {
            0 => self.want(input.u8().into(), input),
            1 => {
                let first = u32::from(input.u16());
                (first..first + u32::from(input.u8())).for_each(|id| self.want(id, input));
            }
            2 => self.cancel(RequestId(input.u8().into())),
            3 => {
                let id = RequestId(input.u8().into());
                let priority = priority(input);
                self.child.raise(id, priority);
            }
            4 | 5 => {
                frame("parent", input).encode(&mut self.on_the_way);
                self.arrive(self.on_the_way.len());
            }
            6 => {
                let len = usize::from(input.u8());
                self.on_the_way.extend_from_slice(input.bytes(len));
            }
            7 => self.arrive(input.below(self.on_the_way.len() + 1)),
            8 => {
                if let Some(&id) = self.on_the_wire.keys().min() {
                    self.send_chunk(id, input);
                    self.arrive(self.on_the_way.len());
                }
            }
            9 => self.transmit(),
            10 => {
                self.now += Duration::from_millis(input.u16().into());
                self.child.tick(self.now);
            }
            _ => {
                if input.u8() == 255 {
                    self.child.ended();
                }
            }
        }
        self.take_events();
    }

    fn want(&mut self, id: u32, input: &mut Input<'_>) {
        let id = RequestId(id);
        let (image, chunk, priority) = (image(input), chunk(input).hash(), priority(input));
        if self.child.want(id, image, chunk, priority).is_ok() {
            assert_eq!(self.asked.insert(id, chunk), None, "{id:?} is in use");
            assert!(!self.on_the_wire.contains_key(&id), "{id:?} is still on the wire");
            assert!(self.asked.len() <= QUEUED_MAX + OUTSTANDING_MAX);
        }
    }

    fn cancel(&mut self, id: RequestId) {
        self.child.cancel(id);
        if self.asked.remove(&id).is_some() && self.on_the_wire.contains_key(&id) {
            self.withdrawn.insert(id);
        }
    }

    fn send_chunk(&mut self, id: RequestId, input: &mut Input<'_>) {
        let hash = self.on_the_wire[&id];
        let chunk = CHUNKS.iter().find(|chunk| chunk.hash() == hash).expect("only these are asked for");
        Frame::Have { id, payload: honest_payload(chunk, input) }.encode(&mut self.on_the_way);
    }

    fn send_lack(&mut self, id: RequestId) {
        Frame::Lack { id, reason: LackReason::NotHere }.encode(&mut self.on_the_way);
    }

    fn arrive(&mut self, len: usize) {
        if self.child.closed().is_some() {
            return;
        }
        let bytes = self.on_the_way.split_to(len);
        self.arrived.extend_from_slice(&bytes);
        for frame in decode_foreign(&mut self.arrived) {
            if let Frame::Have { id, .. } | Frame::Lack { id, .. } = frame {
                self.on_the_wire.remove(&id);
                self.withdrawn.remove(&id);
            }
        }
        self.child.feed(&bytes, self.now);
    }

    fn take_events(&mut self) {
        while let Some(event) = self.child.poll_event() {
            assert!(!self.closed_told, "{event:?} after the end");
            match event {
                ClientEvent::Ready => {
                    assert!(!self.ready, "ready twice");
                    self.ready = true;
                }
                ClientEvent::Arrived { id, chunk } => {
                    assert!(self.ready && !self.lied);
                    check_chunk(&chunk, self.asked.remove(&id));
                }
                ClientEvent::Lacking { id, reason } => {
                    assert!(self.ready && reason != LackReason::Cancelled);
                    self.asked.remove(&id).expect("only what was asked is answered");
                }
                ClientEvent::Liar { chunk, .. } => {
                    assert!(CHUNKS.iter().any(|known| known.hash() == chunk));
                    self.lied = true;
                }
                ClientEvent::Closed(_) => self.closed_told = true,
            }
        }
        assert_eq!(self.closed_told, self.child.closed().is_some());
        assert!(self.closed_told || !self.lied, "a liar is cut off");
        if !self.closed_told {
            assert!(self.child.inbox().len() < 2 * CHUNK_BYTES, "only a part of a frame waits");
        }
    }

    fn transmit(&mut self) {
        let Some(mut out) = self.child.poll_transmit(self.now) else { return };
        self.sent.extend_from_slice(&out.copy_to_bytes(out.remaining()));
        for frame in decode_ours(&mut self.sent) {
            match frame {
                Frame::Want { wants, .. } => {
                    assert!(wants.len() <= BATCH_MAX);
                    for (id, chunk) in wants {
                        assert_eq!(self.asked.get(&id), Some(&chunk), "{id:?} was not asked for");
                        assert_eq!(self.on_the_wire.insert(id, chunk), None, "{id:?} twice");
                    }
                }
                Frame::Cancel { ids } => {
                    assert!(ids.iter().all(|id| self.withdrawn.contains(id)));
                }
                Frame::Hello(_)
                | Frame::Raise { .. }
                | Frame::Ping { .. }
                | Frame::Pong { .. }
                | Frame::Bye { .. } => {}
                other => panic!("children do not send {other:?}"),
            }
        }
        assert!(self.sent.is_empty(), "whole frames are sent");
        assert!(self.on_the_wire.len() <= OUTSTANDING_MAX);
    }

    /// Lets the parent be honest from here on. Then everything is answered, unless the link is over or the
    /// stream was left in the middle of a frame.
    fn finish(mut self) {
        self.arrive(self.on_the_way.len());
        self.take_events();
        if !self.closed_told && self.arrived.is_empty() {
            if !self.ready {
                let hello = Hello { version: VERSION, features: 0, node: node("parent") };
                Frame::Hello(hello).encode(&mut self.on_the_way);
            }
            for _ in 0..=QUEUED_MAX / (OUTSTANDING_MAX / 2) {
                self.transmit();
                let mut ids: Vec<RequestId> = self.on_the_wire.keys().copied().collect();
                ids.sort();
                ids.into_iter().for_each(|id| self.send_lack(id));
                self.arrive(self.on_the_way.len());
                self.take_events();
            }
            assert!(self.asked.is_empty() && !self.closed_told, "{:?}", self.child.closed());
        }
        // The first silence brings a ping, the second the end.
        for _ in 0..2 {
            self.now = self.child.deadline().max(self.now);
            self.child.tick(self.now);
            self.take_events();
        }
        assert!(self.closed_told, "silence ends the link");
    }
}

/// The chunk is what was asked for, and its packed form is its own.
fn check_chunk(chunk: &Chunk, asked: Option<ChunkHash>) {
    assert_eq!(Some(chunk.hash()), asked, "what was asked for");
    assert_eq!(ChunkHash::of(chunk.bytes()), chunk.hash(), "an unverified chunk came out");
    if let Some(packed) = chunk.packed() {
        assert_eq!(pack::unpack(packed).as_ref(), Some(chunk.bytes()), "a foreign packed form");
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let mut run = Run::new();
    while !input.is_empty() && !run.closed_told {
        run.step(&mut input);
    }
    run.finish();
});
