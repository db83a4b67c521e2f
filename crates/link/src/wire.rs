//! The frames of the link and their bytes, version 1. `docs/formats/link.md` has the tables.
//!
//! Invariants:
//! - [`Frame::decode`] never panics, never allocates more than a frame's bound, and refuses what
//!   [`Frame::encode`] would not write, except for later bytes of a `Hello`, which are left to later versions.
//! - A frame that is too long is refused by its head, before its body is waited for.

use block::limits::{CHUNK_BYTES, NAME_BYTES_MAX};
use block::{ChunkHash, ImageId, NodeName, Priority};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::limits::BATCH_MAX;

/// The version that this crate speaks. Both ends speak the lower of theirs.
pub const VERSION: u16 = 1;

/// Feature bit of [`Hello`]: the sender can unpack [`Payload::Zstd`].
pub const FEATURE_ZSTD: u32 = 1;

/// Begins every `Hello`, so that a stray client is told apart from a broken one.
const MAGIC: [u8; 4] = *b"VMLK";

/// Bytes before the body: its length (u32) and the kind (u8).
const HEAD_BYTES: usize = 5;

/// Largest body of a `Hello` in bytes: what version 1 knows and as much again for what comes later.
const HELLO_BYTES_MAX: usize = 256;

/// A request of one link. The child chooses it; it is free again once answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u32);

/// The first frame in each direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The highest version that the sender speaks.
    pub version: u16,
    /// `FEATURE_*` bits; unknown ones are ignored.
    pub features: u32,
    /// The sender, as in its certificate.
    pub node: NodeName,
}

/// The bytes of a chunk as they travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// As they are: exactly [`CHUNK_BYTES`].
    Raw(Bytes),
    /// One zstd frame of less than [`CHUNK_BYTES`].
    Zstd(Bytes),
}

impl Payload {
    /// The bytes on the wire.
    pub fn bytes(&self) -> &Bytes {
        match self {
            Payload::Raw(bytes) | Payload::Zstd(bytes) => bytes,
        }
    }
}

/// Why a request is answered without a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LackReason {
    /// The parent does not serve this image, or not yet.
    NotAttached,
    /// The parent does not have the chunk and never will.
    NotHere,
    /// The parent could not get or read the chunk.
    Unreachable,
    /// The child cancelled the request.
    Cancelled,
}

/// Why an end closes the link. A link that is merely no longer needed ends without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByeReason {
    /// The peer's version is not spoken here.
    Version,
    /// The peer's name is not the one in its certificate, or not the one that was called.
    Name,
    /// A frame was malformed or out of place.
    Protocol,
    /// The peer exceeded a bound.
    Excess,
    /// The peer sent bytes that are not the chunk that they were said to be.
    Lied,
    /// Nothing was heard for too long.
    Silent,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Both ways, first and once.
    Hello(Hello),
    /// Child to parent: send these chunks of this image.
    Want {
        /// The image whose chunks they are.
        image: ImageId,
        /// How urgent all of them are.
        priority: Priority,
        /// One to [`BATCH_MAX`] requests.
        wants: Vec<(RequestId, ChunkHash)>,
    },
    /// Child to parent: these requests became more urgent. Answered ones are ignored.
    Raise {
        /// The new priority.
        priority: Priority,
        /// One to [`BATCH_MAX`] requests.
        ids: Vec<RequestId>,
    },
    /// Child to parent: do not send these. Each that was not answered yet is answered by
    /// [`LackReason::Cancelled`].
    Cancel {
        /// One to [`BATCH_MAX`] requests.
        ids: Vec<RequestId>,
    },
    /// Parent to child: the chunk.
    Have {
        /// The request.
        id: RequestId,
        /// The chunk's bytes.
        payload: Payload,
    },
    /// Parent to child: no chunk.
    Lack {
        /// The request.
        id: RequestId,
        /// Why.
        reason: LackReason,
    },
    /// Both ways: send this back.
    Ping {
        /// Any number.
        nonce: u64,
    },
    /// Both ways: the answer to a ping.
    Pong {
        /// The ping's number.
        nonce: u64,
    },
    /// Both ways, last.
    Bye {
        /// Why.
        reason: ByeReason,
    },
}

/// Bytes that are no frame of version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed frame: {0}")]
pub struct WireError(pub(crate) &'static str);

/// Declares the code of each variant once, for both directions.
macro_rules! codes {
    ($type:ty, $to:ident, $from:ident, { $($code:literal => $variant:path),+ $(,)? }) => {
        fn $to(value: $type) -> u8 {
            match value { $($variant => $code),+ }
        }

        fn $from(code: u8) -> Result<$type, WireError> {
            match code {
                $($code => Ok($variant),)+
                _ => Err(WireError(concat!("unknown ", stringify!($type)))),
            }
        }
    };
}

codes!(Priority, priority_code, priority_from, {
    0 => Priority::Background, 1 => Priority::Profile, 2 => Priority::Guest,
});
codes!(LackReason, lack_code, lack_from, {
    0 => LackReason::NotAttached, 1 => LackReason::NotHere, 2 => LackReason::Unreachable,
    3 => LackReason::Cancelled,
});
codes!(ByeReason, bye_code, bye_from, {
    0 => ByeReason::Version, 1 => ByeReason::Name, 2 => ByeReason::Protocol, 3 => ByeReason::Excess,
    4 => ByeReason::Lied, 5 => ByeReason::Silent,
});

const KIND_HELLO: u8 = 0;
const KIND_WANT: u8 = 1;
const KIND_RAISE: u8 = 2;
const KIND_CANCEL: u8 = 3;
const KIND_HAVE: u8 = 4;
const KIND_LACK: u8 = 5;
const KIND_PING: u8 = 6;
const KIND_PONG: u8 = 7;
const KIND_BYE: u8 = 8;

const ENCODING_RAW: u8 = 0;
const ENCODING_ZSTD: u8 = 1;

/// The largest body of a kind in bytes.
fn body_bytes_max(kind: u8) -> Result<usize, WireError> {
    Ok(match kind {
        KIND_HELLO => HELLO_BYTES_MAX,
        KIND_WANT => 33 + 36 * BATCH_MAX,
        KIND_RAISE => 1 + 4 * BATCH_MAX,
        KIND_CANCEL => 4 * BATCH_MAX,
        KIND_HAVE => 5 + CHUNK_BYTES,
        KIND_LACK => 5,
        KIND_PING | KIND_PONG => 8,
        KIND_BYE => 1,
        _ => return Err(WireError("unknown kind")),
    })
}

impl Frame {
    /// Takes the first frame off `inbox`; `None` while it is incomplete.
    ///
    /// The bytes of a payload are not copied: they share the allocation of `inbox`.
    pub fn decode(inbox: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        if inbox.len() < HEAD_BYTES {
            return Ok(None);
        }
        let mut head = &inbox[..HEAD_BYTES];
        let len = head.get_u32_le() as usize;
        let kind = head.get_u8();
        if len > body_bytes_max(kind)? {
            return Err(WireError("longer than its kind may be"));
        }
        if inbox.len() < HEAD_BYTES + len {
            return Ok(None);
        }
        let mut frame = inbox.split_to(HEAD_BYTES + len);
        frame.advance(HEAD_BYTES);
        let mut body = Body(frame.freeze());
        let frame = body.frame(kind)?;
        // A later version may say more in its Hello; anything else ends where it should.
        if !body.0.is_empty() && kind != KIND_HELLO {
            return Err(WireError("bytes left over"));
        }
        Ok(Some(frame))
    }

    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Frame::Hello(hello) => {
                let name = hello.node.as_str().as_bytes();
                put_head(out, KIND_HELLO, 11 + name.len());
                out.put_slice(&MAGIC);
                out.put_u16_le(hello.version);
                out.put_u32_le(hello.features);
                out.put_u8(u8::try_from(name.len()).expect("a node name has at most 63 bytes"));
                out.put_slice(name);
            }
            Frame::Want { image, priority, wants } => {
                put_head(out, KIND_WANT, 33 + 36 * wants.len());
                out.put_slice(image.as_bytes());
                out.put_u8(priority_code(*priority));
                for (id, chunk) in wants {
                    out.put_u32_le(id.0);
                    out.put_slice(chunk.as_bytes());
                }
            }
            Frame::Raise { priority, ids } => {
                put_head(out, KIND_RAISE, 1 + 4 * ids.len());
                out.put_u8(priority_code(*priority));
                ids.iter().for_each(|id| out.put_u32_le(id.0));
            }
            Frame::Cancel { ids } => {
                put_head(out, KIND_CANCEL, 4 * ids.len());
                ids.iter().for_each(|id| out.put_u32_le(id.0));
            }
            Frame::Have { id, payload } => {
                encode_have_head(out, *id, payload);
                out.put_slice(payload.bytes());
            }
            Frame::Lack { id, reason } => {
                put_head(out, KIND_LACK, 5);
                out.put_u32_le(id.0);
                out.put_u8(lack_code(*reason));
            }
            Frame::Ping { nonce } => {
                put_head(out, KIND_PING, 8);
                out.put_u64_le(*nonce);
            }
            Frame::Pong { nonce } => {
                put_head(out, KIND_PONG, 8);
                out.put_u64_le(*nonce);
            }
            Frame::Bye { reason } => {
                put_head(out, KIND_BYE, 1);
                out.put_u8(bye_code(*reason));
            }
        }
    }
}

/// Appends what precedes the payload of a `Have`, so that the payload itself need not be copied.
pub(crate) fn encode_have_head(out: &mut BytesMut, id: RequestId, payload: &Payload) {
    put_head(out, KIND_HAVE, 5 + payload.bytes().len());
    out.put_u32_le(id.0);
    out.put_u8(match payload {
        Payload::Raw(_) => ENCODING_RAW,
        Payload::Zstd(_) => ENCODING_ZSTD,
    });
}

fn put_head(out: &mut BytesMut, kind: u8, body_len: usize) {
    out.put_u32_le(u32::try_from(body_len).expect("every body is shorter than 128 KiB"));
    out.put_u8(kind);
}

/// The body of a frame, taken from the front.
struct Body(Bytes);

impl Body {
    fn frame(&mut self, kind: u8) -> Result<Frame, WireError> {
        Ok(match kind {
            KIND_HELLO => Frame::Hello(self.hello()?),
            KIND_WANT => Frame::Want {
                image: ImageId::from_bytes(self.hash()?),
                priority: priority_from(self.u8()?)?,
                wants: self.some(36, |body| Ok((body.id()?, ChunkHash::from_bytes(body.hash()?))))?,
            },
            KIND_RAISE => Frame::Raise { priority: priority_from(self.u8()?)?, ids: self.some(4, Body::id)? },
            KIND_CANCEL => Frame::Cancel { ids: self.some(4, Body::id)? },
            KIND_HAVE => Frame::Have { id: self.id()?, payload: self.payload()? },
            KIND_LACK => Frame::Lack { id: self.id()?, reason: lack_from(self.u8()?)? },
            KIND_PING => Frame::Ping { nonce: self.u64()? },
            KIND_PONG => Frame::Pong { nonce: self.u64()? },
            KIND_BYE => Frame::Bye { reason: bye_from(self.u8()?)? },
            _ => return Err(WireError("unknown kind")),
        })
    }

    fn hello(&mut self) -> Result<Hello, WireError> {
        if self.take(4)? != MAGIC[..] {
            return Err(WireError("this is not a link"));
        }
        let version = self.0.try_get_u16_le().map_err(too_short)?;
        let features = self.0.try_get_u32_le().map_err(too_short)?;
        let len = usize::from(self.u8()?);
        if len > NAME_BYTES_MAX {
            return Err(WireError("name too long"));
        }
        let name = self.take(len)?;
        let name = std::str::from_utf8(&name).map_err(|_| WireError("name is not text"))?;
        Ok(Hello { version, features, node: name.parse().map_err(|_| WireError("invalid node name"))? })
    }

    /// The rest as entries of `entry_len` bytes: 1 to [`BATCH_MAX`].
    fn some<T>(
        &mut self,
        entry_len: usize,
        mut entry: impl FnMut(&mut Body) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.0.len() / entry_len;
        if count == 0 || count > BATCH_MAX {
            return Err(WireError("too few or too many entries"));
        }
        (0..count).map(|_| entry(self)).collect()
    }

    fn payload(&mut self) -> Result<Payload, WireError> {
        let encoding = self.u8()?;
        let bytes = std::mem::take(&mut self.0);
        match encoding {
            ENCODING_RAW if bytes.len() == CHUNK_BYTES => Ok(Payload::Raw(bytes)),
            ENCODING_ZSTD if !bytes.is_empty() && bytes.len() < CHUNK_BYTES => Ok(Payload::Zstd(bytes)),
            ENCODING_RAW | ENCODING_ZSTD => Err(WireError("payload of a wrong length")),
            _ => Err(WireError("unknown encoding")),
        }
    }

    fn take(&mut self, len: usize) -> Result<Bytes, WireError> {
        if self.0.len() < len {
            return Err(WireError("too short"));
        }
        Ok(self.0.split_to(len))
    }

    fn hash(&mut self) -> Result<[u8; 32], WireError> {
        Ok(self.take(32)?[..].try_into().expect("32 bytes were taken"))
    }

    fn id(&mut self) -> Result<RequestId, WireError> {
        self.0.try_get_u32_le().map(RequestId).map_err(too_short)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.0.try_get_u8().map_err(too_short)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.0.try_get_u64_le().map_err(too_short)
    }
}

fn too_short<E>(_: E) -> WireError {
    WireError("too short")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn encoded(frame: &Frame) -> BytesMut {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        out
    }

    /// The golden bytes of `docs/formats/link.md`.
    #[test]
    fn every_frame_has_the_bytes_that_the_format_document_shows() {
        let image = ImageId::from_bytes([0xaa; 32]);
        let chunk = ChunkHash::from_bytes([0xbb; 32]);
        let ids = vec![RequestId(7), RequestId(8)];
        let golden = [
            (
                Frame::Hello(Hello { version: 1, features: FEATURE_ZSTD, node: "n1".parse().unwrap() }),
                "0d00000000564d4c4b010001000000026e31".to_owned(),
            ),
            (
                Frame::Want { image, priority: Priority::Guest, wants: vec![(RequestId(7), chunk)] },
                format!("4500000001{}0207000000{}", "aa".repeat(32), "bb".repeat(32)),
            ),
            (
                Frame::Raise { priority: Priority::Profile, ids: ids.clone() },
                "0900000002010700000008000000".to_owned(),
            ),
            (Frame::Cancel { ids }, "08000000030700000008000000".to_owned()),
            (
                Frame::Have { id: RequestId(7), payload: Payload::Zstd(Bytes::from_static(b"zz")) },
                "07000000040700000001".to_owned() + "7a7a",
            ),
            (
                Frame::Lack { id: RequestId(7), reason: LackReason::NotHere },
                "05000000050700000001".to_owned(),
            ),
            (Frame::Ping { nonce: 0x0102 }, "08000000060201000000000000".to_owned()),
            (Frame::Pong { nonce: 0x0102 }, "08000000070201000000000000".to_owned()),
            (Frame::Bye { reason: ByeReason::Lied }, "010000000804".to_owned()),
        ];
        for (frame, bytes) in golden {
            assert_eq!(hex(&encoded(&frame)), bytes, "{frame:?}");
        }
        let raw =
            Frame::Have { id: RequestId(7), payload: Payload::Raw(Bytes::from_static(&[9; CHUNK_BYTES])) };
        assert_eq!(hex(&encoded(&raw)[..12]), "050001000407000000000909");
    }

    #[test]
    fn a_later_version_may_say_more_in_its_hello() {
        let hello = Hello { version: 9, features: 0xff, node: "n1".parse().unwrap() };
        let mut bytes = encoded(&Frame::Hello(hello.clone()));
        bytes.put_slice(b"more");
        bytes[0] += 4;
        assert_eq!(Frame::decode(&mut bytes), Ok(Some(Frame::Hello(hello))));
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_by_its_head() {
        for kind in 0..=KIND_BYE {
            let too_long = u32::try_from(body_bytes_max(kind).unwrap() + 1).unwrap();
            let mut bytes = BytesMut::new();
            bytes.put_u32_le(too_long);
            bytes.put_u8(kind);
            assert!(Frame::decode(&mut bytes).is_err(), "kind {kind}");
        }
        assert!(Frame::decode(&mut BytesMut::from(&[0, 0, 0, 0, KIND_BYE + 1][..])).is_err());
    }

    #[test]
    fn what_is_not_of_version_1_is_refused() {
        for (bad, why) in [
            (&[0, 0, 0, 0, KIND_CANCEL][..], "an empty batch"),
            (&[5, 0, 0, 0, KIND_CANCEL, 1, 0, 0, 0, 9], "half an id"),
            (&[1, 0, 0, 0, KIND_BYE, 99], "an unknown reason"),
            (&[6, 0, 0, 0, KIND_HAVE, 1, 0, 0, 0, ENCODING_RAW, 9], "a raw chunk of one byte"),
            (&[5, 0, 0, 0, KIND_HAVE, 1, 0, 0, 0, ENCODING_ZSTD], "an empty payload"),
            (&[6, 0, 0, 0, KIND_HAVE, 1, 0, 0, 0, 2, 9], "an unknown encoding"),
            (&[2, 0, 0, 0, KIND_PING, 1, 1], "a short ping"),
        ] {
            assert!(Frame::decode(&mut BytesMut::from(bad)).is_err(), "{why}");
        }
        let named = |name: &[u8]| {
            let mut bytes = BytesMut::new();
            put_head(&mut bytes, KIND_HELLO, 11 + name.len());
            bytes.put_slice(b"VMLK\x01\x00\x00\x00\x00\x00");
            bytes.put_u8(u8::try_from(name.len()).unwrap());
            bytes.put_slice(name);
            Frame::decode(&mut bytes)
        };
        assert!(named(b"node-1").is_ok());
        for bad in [&b""[..], b"../x", b"\xff", &[b'a'; 64]] {
            assert!(named(bad).is_err(), "{bad:?}");
        }
    }

    fn priority() -> impl Strategy<Value = Priority> {
        prop_oneof![Just(Priority::Background), Just(Priority::Profile), Just(Priority::Guest)]
    }

    fn ids() -> impl Strategy<Value = Vec<RequestId>> {
        prop::collection::vec(any::<u32>().prop_map(RequestId), 1..=BATCH_MAX)
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let hash = || any::<[u8; 32]>();
        let id = || any::<u32>().prop_map(RequestId);
        let wants = prop::collection::vec((id(), hash().prop_map(ChunkHash::from_bytes)), 1..=BATCH_MAX);
        let zstd = prop::collection::vec(any::<u8>(), 1..300).prop_map(|b| Payload::Zstd(b.into()));
        let raw = any::<u8>().prop_map(|b| Payload::Raw(vec![b; CHUNK_BYTES].into()));
        prop_oneof![
            (any::<u16>(), any::<u32>(), "[a-z0-9][a-zA-Z0-9._-]{0,62}").prop_map(
                |(version, features, name)| {
                    Frame::Hello(Hello { version, features, node: name.parse().unwrap() })
                }
            ),
            (hash(), priority(), wants).prop_map(|(image, priority, wants)| Frame::Want {
                image: ImageId::from_bytes(image),
                priority,
                wants
            }),
            (priority(), ids()).prop_map(|(priority, ids)| Frame::Raise { priority, ids }),
            ids().prop_map(|ids| Frame::Cancel { ids }),
            (id(), prop_oneof![zstd, raw]).prop_map(|(id, payload)| Frame::Have { id, payload }),
            (id(), 0u8..4).prop_map(|(id, code)| Frame::Lack { id, reason: lack_from(code).unwrap() }),
            any::<u64>().prop_map(|nonce| Frame::Ping { nonce }),
            any::<u64>().prop_map(|nonce| Frame::Pong { nonce }),
            (0u8..6).prop_map(|code| Frame::Bye { reason: bye_from(code).unwrap() }),
        ]
    }

    fn decode_all(inbox: &mut BytesMut) -> Vec<Frame> {
        std::iter::from_fn(|| Frame::decode(inbox).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_they_are_cut(
            frames in prop::collection::vec(frame(), 1..6), cut in any::<prop::sample::Index>(),
        ) {
            let mut wire = BytesMut::new();
            frames.iter().for_each(|frame| frame.encode(&mut wire));
            let rest = wire.split_off(cut.index(wire.len()));
            let mut out = decode_all(&mut wire);
            wire.extend_from_slice(&rest);
            out.extend(decode_all(&mut wire));
            prop_assert!(wire.is_empty());
            prop_assert_eq!(out, frames);
        }

        #[test]
        fn foreign_bytes_are_refused_or_mean_what_they_encode_to(
            kind in 0u8..10, body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = BytesMut::new();
            put_head(&mut bytes, kind, body.len());
            bytes.put_slice(&body);
            let before = bytes.clone();
            if let Ok(Some(frame)) = Frame::decode(&mut bytes)
                && !matches!(frame, Frame::Hello(_))
            {
                prop_assert_eq!(encoded(&frame), before);
            }
        }
    }
}
