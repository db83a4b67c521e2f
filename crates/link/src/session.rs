//! What both ends of a link have in common: bytes in, control frames out, the greeting, signs of life, the end.
//!
//! Time comes in as a [`Duration`] since any fixed moment; it never runs backwards.

use std::time::Duration;

use block::NodeName;
use bytes::{Buf, Bytes, BytesMut};

use crate::limits::CONTROL_BYTES_MAX;
use crate::stats::ScopedStats;
use crate::wire::{ByeReason, FEATURE_ZSTD, Frame, Hello, VERSION, WireError};

/// How a link ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// The peer ended the stream, or the stream broke.
    #[error("the peer ended the link")]
    Ended,
    /// The peer said why it closes.
    #[error("the peer closed the link: {0:?}")]
    ByPeer(ByeReason),
    /// We closed, because of what the peer sent.
    #[error("closed because of the peer: {reason:?}, {detail}")]
    ByUs {
        /// What the peer was told.
        reason: ByeReason,
        /// What it did, for the log.
        detail: &'static str,
    },
}

/// Bytes ready for the stream: a head and, without having been copied, a payload.
pub type Outgoing = bytes::buf::Chain<Bytes, Bytes>;

/// One end of a link, below what child and parent do differently.
#[derive(Debug)]
pub(crate) struct Session {
    inbox: BytesMut,
    control: BytesMut,
    expected: NodeName,
    /// What the peer said, once it did.
    peer: Option<Hello>,
    closed: Option<Closed>,
    heard_at: Duration,
    pub(crate) stats: ScopedStats,
}

impl Session {
    pub(crate) fn new(own: &NodeName, expected: NodeName, stats: ScopedStats, now: Duration) -> Session {
        let mut control = BytesMut::new();
        Frame::Hello(Hello { version: VERSION, features: FEATURE_ZSTD, node: own.clone() })
            .encode(&mut control);
        Session { inbox: BytesMut::new(), control, expected, peer: None, closed: None, heard_at: now, stats }
    }

    /// Where bytes from the stream go. Call [`Session::heard`] after adding some.
    pub(crate) fn inbox(&mut self) -> &mut BytesMut {
        &mut self.inbox
    }

    pub(crate) fn heard(&mut self, now: Duration) {
        self.heard_at = now;
    }

    pub(crate) fn heard_at(&self) -> Duration {
        self.heard_at
    }

    pub(crate) fn closed(&self) -> Option<Closed> {
        self.closed
    }

    /// Whether the peer can unpack.
    pub(crate) fn peer_unpacks(&self) -> bool {
        self.peer.as_ref().is_some_and(|hello| hello.features & FEATURE_ZSTD != 0)
    }

    /// The next frame that is not dealt with here. `Hello` comes out once, checked.
    pub(crate) fn next_frame(&mut self) -> Option<Frame> {
        loop {
            if self.closed.is_some() {
                return None;
            }
            let before = self.inbox.len();
            let frame = match Frame::decode(&mut self.inbox) {
                Ok(frame) => frame?,
                Err(WireError(detail)) => {
                    self.close(ByeReason::Protocol, detail);
                    return None;
                }
            };
            self.stats.add(|s| &s.wire_bytes_received, before - self.inbox.len());
            match frame {
                Frame::Hello(hello) => return self.greet(hello),
                Frame::Bye { reason } => {
                    self.closed = Some(Closed::ByPeer(reason));
                    return None;
                }
                _ if self.peer.is_none() => self.close(ByeReason::Protocol, "a frame before Hello"),
                Frame::Ping { nonce } => self.send(&Frame::Pong { nonce }),
                Frame::Pong { .. } => {}
                other => return Some(other),
            }
        }
    }

    fn greet(&mut self, hello: Hello) -> Option<Frame> {
        if self.peer.is_some() {
            self.close(ByeReason::Protocol, "a second Hello");
        } else if hello.version == 0 {
            self.close(ByeReason::Version, "version 0");
        } else if hello.node != self.expected {
            self.close(ByeReason::Name, "another node than expected");
        } else {
            self.peer = Some(hello.clone());
            return Some(Frame::Hello(hello));
        }
        None
    }

    /// Queues a control frame.
    pub(crate) fn send(&mut self, frame: &Frame) {
        if self.closed.is_some() {
            return;
        }
        frame.encode(&mut self.control);
        if self.control.len() > CONTROL_BYTES_MAX {
            self.control.clear();
            self.close(ByeReason::Excess, "sends without reading");
        }
    }

    /// Ends the link; the peer is told why with the last bytes out.
    pub(crate) fn close(&mut self, reason: ByeReason, detail: &'static str) {
        if self.closed.is_none() {
            Frame::Bye { reason }.encode(&mut self.control);
            self.closed = Some(Closed::ByUs { reason, detail });
        }
    }

    /// The stream ended.
    pub(crate) fn ended(&mut self) {
        self.closed.get_or_insert(Closed::Ended);
    }

    /// The control bytes that wait, taken out to be sent with `payload` after them; `None` if there is nothing.
    pub(crate) fn outgoing(&mut self, payload: Bytes) -> Option<Outgoing> {
        let head = self.control.split().freeze();
        let out = head.chain(payload);
        self.stats.add(|s| &s.wire_bytes_sent, out.remaining());
        out.has_remaining().then_some(out)
    }

    /// Where the head of a frame with a payload goes, just before [`Session::outgoing`].
    pub(crate) fn control(&mut self) -> &mut BytesMut {
        &mut self.control
    }
}
