//! The decoder of the link's frames: however a stream is cut, the same frames come out of it, and each of
//! them encodes to the bytes that it came from.

#![no_main]

use bytes::BytesMut;
use link::wire::{Frame, WireError};

/// All frames of a stream that arrives in two pieces, and why there are no more.
fn decode(first: &[u8], second: &[u8]) -> (Vec<Frame>, Option<WireError>) {
    let mut frames = Vec::new();
    let mut stream = BytesMut::new();
    for piece in [first, second] {
        stream.extend_from_slice(piece);
        loop {
            let before = stream.clone();
            match Frame::decode(&mut stream) {
                Ok(Some(frame)) => {
                    check_bytes(&frame, &before[..before.len() - stream.len()]);
                    frames.push(frame);
                }
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

fn check_bytes(frame: &Frame, bytes: &[u8]) {
    // A Hello of a later version may say more than is understood here.
    if !matches!(frame, Frame::Hello(_)) {
        let mut again = BytesMut::new();
        frame.encode(&mut again);
        assert_eq!(again, bytes, "a frame has one form only");
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((&cut, stream)) = input.split_first() else { return };
    let (first, second) = stream.split_at(usize::from(cut).min(stream.len()));
    assert_eq!(decode(first, second), decode(stream, &[]), "the cut makes a difference");
});
