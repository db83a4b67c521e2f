//! A parent and any child: frames in and out of place, cut anywhere, between answers, writes and silence.
//!
//! Checked: every request is answered once and with what it was answered with here; nothing is handed out
//! that was not asked for; the bounds on requests in hand and on buffered bytes hold; the end comes once.

#![no_main]

use std::collections::HashMap;
use std::time::Duration;

use block::limits::CHUNK_BYTES;
use block::{ChunkHash, ImageId, Priority};
use bytes::{Buf, BytesMut};
use fuzz::Input;
use fuzz::frames::{CHUNKS, decode_foreign, decode_ours, frame, honest_payload, lack_reason, node};
use link::limits::{ACTIVE_MAX, CONTROL_BYTES_MAX, OUTSTANDING_MAX};
use link::wire::{Frame, LackReason, Payload, RequestId};
use link::{Reply, ScopedStats, ServerEnd, ServerEvent};

/// More than the head and the fixed fields of any frame.
const SLACK_BYTES: usize = 64;

struct Run {
    parent: ServerEnd,
    now: Duration,
    /// Bytes from the child that have not arrived.
    on_the_way: Vec<u8>,
    /// What arrived, for a count of our own.
    arrived: BytesMut,
    /// Bytes to the child.
    sent: BytesMut,
    /// What the child asked under each id, and was not answered.
    asked: HashMap<RequestId, Vec<(ImageId, ChunkHash)>>,
    in_hand: HashMap<RequestId, (ChunkHash, Priority)>,
    given: HashMap<RequestId, Payload>,
    closed_told: bool,
}

impl Run {
    fn new() -> Run {
        let now = Duration::ZERO;
        Run {
            parent: ServerEnd::new(&node("parent"), node("child"), ScopedStats::default(), now),
            now,
            on_the_way: Vec::new(),
            arrived: BytesMut::new(),
            sent: BytesMut::new(),
            asked: HashMap::new(),
            in_hand: HashMap::new(),
            given: HashMap::new(),
            closed_told: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 8 {
            0..=2 => {
                let mut bytes = BytesMut::new();
                frame("child", input).encode(&mut bytes);
                self.on_the_way.extend_from_slice(&bytes);
                self.arrive(self.on_the_way.len());
            }
            3 => {
                let len = usize::from(input.u8());
                self.on_the_way.extend_from_slice(input.bytes(len));
            }
            4 => self.arrive(input.below(self.on_the_way.len() + 1)),
            5 => self.answer(input),
            6 => self.transmit(),
            _ => {
                self.now += Duration::from_millis(input.u16().into());
                self.parent.tick(self.now);
            }
        }
        self.take_events();
    }

    fn arrive(&mut self, len: usize) {
        if self.parent.closed().is_some() {
            return;
        }
        let bytes: Vec<u8> = self.on_the_way.drain(..len).collect();
        self.arrived.extend_from_slice(&bytes);
        for frame in decode_foreign(&mut self.arrived) {
            if let Frame::Want { image, wants, .. } = frame {
                for (id, chunk) in wants {
                    self.asked.entry(id).or_default().push((image, chunk));
                }
            }
        }
        self.parent.feed(&bytes, self.now);
    }

    fn take_events(&mut self) {
        while let Some(event) = self.parent.poll_event() {
            assert!(!self.closed_told, "{event:?} after the end");
            match event {
                ServerEvent::Ready => {}
                ServerEvent::Wanted { id, image, chunk, priority } => {
                    assert!(self.asked[&id].contains(&(image, chunk)), "{chunk} was not asked for");
                    assert_eq!(self.in_hand.insert(id, (chunk, priority)), None, "{id:?} twice");
                    assert!(self.in_hand.len() <= ACTIVE_MAX);
                }
                ServerEvent::Raised { id, priority } => {
                    let old = self.in_hand.get_mut(&id).expect("only what is in hand is raised");
                    assert!(priority > old.1);
                    old.1 = priority;
                }
                ServerEvent::Cancelled { id } => {
                    self.in_hand.remove(&id).expect("only what is in hand is withdrawn");
                }
                ServerEvent::Closed(_) => self.closed_told = true,
            }
        }
        assert_eq!(self.closed_told, self.parent.closed().is_some());
        if !self.closed_told {
            assert!(self.parent.inbox().len() < 2 * CHUNK_BYTES, "only a part of a frame waits");
        }
    }

    fn answer(&mut self, input: &mut Input<'_>) {
        let Some(&id) = self.in_hand.keys().min() else { return };
        let (hash, _) = self.in_hand.remove(&id).expect("it was just seen");
        let known = CHUNKS.iter().find(|chunk| chunk.hash() == hash);
        let reply = match known.filter(|_| !input.u8().is_multiple_of(4)) {
            Some(chunk) => {
                let payload = honest_payload(chunk, input);
                self.given.insert(id, payload.clone());
                Reply::Have(payload)
            }
            None => Reply::Lack(lack_reason(input)),
        };
        self.parent.answer(id, reply);
    }

    fn transmit(&mut self) {
        let Some(mut out) = self.parent.poll_transmit() else { return };
        assert!(out.remaining() <= CONTROL_BYTES_MAX + CHUNK_BYTES + SLACK_BYTES);
        self.sent.extend_from_slice(&out.copy_to_bytes(out.remaining()));
        for frame in decode_ours(&mut self.sent) {
            match frame {
                Frame::Have { id, payload } => {
                    assert_eq!(self.given.remove(&id), Some(payload), "what was answered");
                    self.answered(id);
                }
                Frame::Lack { id, .. } => self.answered(id),
                Frame::Hello(_) | Frame::Pong { .. } | Frame::Bye { .. } => {}
                other => panic!("parents do not send {other:?}"),
            }
        }
        assert!(self.sent.is_empty(), "whole frames are sent");
    }

    fn answered(&mut self, id: RequestId) {
        let asked = self.asked.get_mut(&id).expect("only what was asked is answered");
        // Those of one id come one after another, so the oldest is the one that is answered.
        asked.remove(0);
        if asked.is_empty() {
            self.asked.remove(&id);
        }
    }

    /// Answers what is open; then nothing may be, unless the link is over.
    fn finish(mut self) {
        for _ in 0..=OUTSTANDING_MAX {
            for (id, _) in std::mem::take(&mut self.in_hand) {
                self.parent.answer(id, Reply::Lack(LackReason::NotHere));
            }
            self.transmit();
            self.take_events();
        }
        assert!(self.closed_told || self.asked.is_empty(), "unanswered: {:?}", self.asked);
        self.now = self.parent.deadline().max(self.now);
        self.parent.tick(self.now);
        self.take_events();
        assert!(self.closed_told, "silence ends the link");
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
