//! A long answer of JSON values, one per line, that grows while the connection lives.
//!
//! An empty line is a sign of life: the sender writes one when it has nothing else to say, so that the
//! receiver can tell a quiet sender from a dead one. A sender that stops for good ends the answer in
//! good form; one that shuts down or dies breaks it off, and the receiver sees an error.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

/// How often a quiet sender shows that it lives.
const BEAT: Duration = Duration::from_secs(3);

/// How long a receiver waits for anything: three beats and some delay.
pub(crate) const SILENCE_TIME_MAX: Duration = Duration::from_secs(10);
const _: () = assert!(BEAT.as_secs() * 3 < SILENCE_TIME_MAX.as_secs());

/// Longest line in bytes. The largest are boot profiles of some 10,000 chunks.
pub(crate) const LINE_BYTES_MAX: usize = 4 << 20;

/// Answers with `values`, one per line, until they end. When `shutdown` is cancelled the answer breaks
/// off at once, so that it does not hold up a server that drains.
///
/// `values` is polled only as fast as the peer reads: its owner bounds what waits in it.
pub fn lines<T: Serialize>(
    values: impl Stream<Item = T> + Send + 'static,
    shutdown: CancellationToken,
) -> Response {
    lines_with_beat(values, shutdown, BEAT)
}

fn lines_with_beat<T: Serialize>(
    values: impl Stream<Item = T> + Send + 'static,
    shutdown: CancellationToken,
    beat: Duration,
) -> Response {
    let body = stream::try_unfold((Box::pin(values), shutdown), move |(mut values, shutdown)| async move {
        let line = tokio::select! {
            biased;
            () = shutdown.cancelled() => Err(io::Error::other("the server shuts down")),
            value = values.next() => match value {
                None => return Ok(None),
                Some(value) => line(&value),
            },
            () = tokio::time::sleep(beat) => Ok(Bytes::from_static(b"\n")),
        };
        line.map(|line| Some((line, (values, shutdown))))
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(body)).into_response()
}

fn line(value: &impl Serialize) -> io::Result<Bytes> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(io::Error::other(format!(
            "a line of {} bytes is longer than {LINE_BYTES_MAX}",
            line.len()
        )));
    }
    Ok(line.into())
}

/// Cuts a stream of bytes into lines.
#[derive(Debug, Default)]
pub(crate) struct LineCutter {
    bytes: BytesMut,
    /// How many bytes at the front are known to hold no line end.
    searched: usize,
}

/// A line exceeds [`LINE_BYTES_MAX`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LineTooLong;

impl LineCutter {
    /// Adds received bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole line that is not empty, without its end.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, LineTooLong> {
        loop {
            let Some(at) = self.bytes[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.bytes.len();
                return if self.searched < LINE_BYTES_MAX { Ok(None) } else { Err(LineTooLong) };
            };
            let line = self.bytes.split_to(self.searched + at).freeze();
            self.bytes.advance(1);
            self.searched = 0;
            if line.len() >= LINE_BYTES_MAX {
                return Err(LineTooLong);
            }
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }

    /// Whether the bytes end in the middle of a line.
    pub(crate) fn is_cut(&self) -> bool {
        !self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_the_same_however_the_bytes_arrive() {
        let text = b"{\"a\":1}\n\n\n[2]\n\"x\"\nrest";
        for step in 1..=text.len() {
            let (mut cutter, mut lines) = (LineCutter::default(), Vec::new());
            for part in text.chunks(step) {
                cutter.push(part);
                while let Some(line) = cutter.next().unwrap() {
                    lines.push(line);
                }
            }
            assert_eq!(lines, [&b"{\"a\":1}"[..], b"[2]", b"\"x\""], "{step} bytes at a time");
            assert!(cutter.is_cut());
        }
    }

    #[test]
    fn a_line_without_end_is_refused_at_the_bound() {
        let mut cutter = LineCutter::default();
        cutter.push(&vec![b'x'; LINE_BYTES_MAX - 1]);
        assert_eq!(cutter.next(), Ok(None));
        cutter.push(b"x");
        assert_eq!(cutter.next(), Err(LineTooLong));
    }

    #[tokio::test]
    async fn a_quiet_sender_shows_that_it_lives_and_breaks_off_at_shutdown() {
        let shutdown = CancellationToken::new();
        let response = lines_with_beat(stream::pending::<u32>(), shutdown.clone(), Duration::from_millis(1));
        let mut body = response.into_body().into_data_stream();
        assert_eq!(body.next().await.unwrap().unwrap(), "\n");
        shutdown.cancel();
        assert!(body.next().await.unwrap().is_err());
    }
}
