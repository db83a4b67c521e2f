//! Chunks, and frames of a link that the input chooses.
//!
//! Numbers are few and small, so that frames often speak of the same requests, chunks and nodes.

use std::sync::LazyLock;

use block::limits::CHUNK_BYTES;
use block::{Chunk, ImageId, NodeName, Priority};
use bytes::{Bytes, BytesMut};
use link::pack;
use link::wire::{ByeReason, Frame, Hello, LackReason, Payload, RequestId};

use crate::Input;

/// The chunks that there are.
pub static CHUNKS: LazyLock<[Chunk; 4]> = LazyLock::new(|| {
    let stripes = (0..CHUNK_BYTES).map(|i| (i / 97) as u8).collect::<Vec<u8>>();
    let mut noise = vec![0; CHUNK_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    [vec![7; CHUNK_BYTES], stripes, noise, vec![0; CHUNK_BYTES]].map(|bytes| Chunk::of(bytes.into()))
});

/// The packed form of each chunk that has one.
static PACKED: LazyLock<[Option<Bytes>; 4]> =
    LazyLock::new(|| CHUNKS.each_ref().map(|chunk| pack::pack(chunk.bytes()).1));

/// More than a chunk when unpacked.
static BOMB: LazyLock<Bytes> =
    LazyLock::new(|| pack::pack(&vec![0; 4 * CHUNK_BYTES]).1.expect("zeroes shrink"));

/// The name of a node of these tests. Panics unless `text` is a node name.
pub fn node(text: &str) -> NodeName {
    text.parse().expect("the tests use valid names")
}

/// One of two images.
pub fn image(input: &mut Input<'_>) -> ImageId {
    ImageId::from_bytes([input.u8() % 2; 32])
}

/// One of the [`CHUNKS`].
pub fn chunk(input: &mut Input<'_>) -> &'static Chunk {
    &CHUNKS[input.below(CHUNKS.len())]
}

/// Any priority.
pub fn priority(input: &mut Input<'_>) -> Priority {
    input.pick(&[Priority::Guest, Priority::Profile, Priority::Background])
}

/// Any reason for an answer without a chunk.
pub fn lack_reason(input: &mut Input<'_>) -> LackReason {
    input.pick(&[
        LackReason::NotAttached,
        LackReason::NotHere,
        LackReason::Unreachable,
        LackReason::Cancelled,
    ])
}

/// A chunk as an honest parent sends it, packed if the input says so and it shrinks.
pub fn honest_payload(chunk: &Chunk, input: &mut Input<'_>) -> Payload {
    let place = CHUNKS.iter().position(|known| known == chunk);
    match place.and_then(|place| PACKED[place].clone()) {
        Some(packed) if input.u8().is_multiple_of(2) => Payload::Zstd(packed),
        _ => Payload::Raw(chunk.bytes().clone()),
    }
}

fn payload(input: &mut Input<'_>) -> Payload {
    match input.u8() % 4 {
        0 => {
            let chunk = chunk(input);
            honest_payload(chunk, input)
        }
        1 => Payload::Zstd(BOMB.clone()),
        2 => Payload::Zstd(Bytes::copy_from_slice(input.bytes(40))),
        _ => {
            let mut bytes = chunk(input).bytes().to_vec();
            bytes[usize::from(input.u16())] ^= 1;
            Payload::Raw(bytes.into())
        }
    }
}

fn ids(input: &mut Input<'_>) -> Vec<RequestId> {
    let first = u32::from(input.u8());
    let count = u32::from(input.u8()) % 64 + 1;
    (first..first + count).map(RequestId).collect()
}

/// A frame of any kind, in place or not. `sender` is who an honest `Hello` is from.
pub fn frame(sender: &str, input: &mut Input<'_>) -> Frame {
    match input.u8() % 10 {
        0 => Frame::Hello(Hello {
            version: input.pick(&[1, 2, 0]),
            features: u32::from(input.u8()),
            node: node(input.pick(&[sender, sender, "stranger"])),
        }),
        1 | 2 => {
            let (image, priority) = (image(input), priority(input));
            let chunk = chunk(input).hash();
            Frame::Want { image, priority, wants: ids(input).into_iter().map(|id| (id, chunk)).collect() }
        }
        3 => Frame::Raise { priority: priority(input), ids: ids(input) },
        4 => Frame::Cancel { ids: ids(input) },
        5 => Frame::Have { id: RequestId(input.u8().into()), payload: payload(input) },
        6 => Frame::Lack { id: RequestId(input.u8().into()), reason: lack_reason(input) },
        7 => Frame::Ping { nonce: input.u64() },
        8 => Frame::Pong { nonce: input.u64() },
        _ => Frame::Bye { reason: input.pick(&[ByeReason::Silent, ByeReason::Lied, ByeReason::Version]) },
    }
}

/// The frames of a stream that is known to be well-formed, for as far as it is whole.
///
/// # Panics
/// The stream is malformed.
pub fn decode_ours(stream: &mut BytesMut) -> Vec<Frame> {
    std::iter::from_fn(|| Frame::decode(stream).expect("what we send is well-formed")).collect()
}

/// The frames of a foreign stream, up to where it is malformed or incomplete.
pub fn decode_foreign(stream: &mut BytesMut) -> Vec<Frame> {
    std::iter::from_fn(|| Frame::decode(stream).ok().flatten()).collect()
}
