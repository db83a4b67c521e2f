//! Bytes between a state machine and a stream: what child and parent share of the asynchronous side.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::Instant;

use crate::limits::{BYE_MAX, READ_BYTES, READ_BYTES_MIN};
use crate::session::Outgoing;

/// What a link runs over: TCP with TLS, or a pipe in tests. Set `TCP_NODELAY`: the link batches by itself.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Translates between the runtime's clock and the time that state machines are told.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn start() -> Clock {
        Clock(Instant::now())
    }

    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }

    pub(crate) fn at(&self, time: Duration) -> Instant {
        self.0 + time
    }
}

pub(crate) type Reading<S> = ReadHalf<S>;

pub(crate) fn halves<S: Stream>(stream: S) -> (Reading<S>, Writing<S>) {
    let (reading, writing) = tokio::io::split(stream);
    (reading, Writing { half: writing, out: None, unflushed: Unflushed::No })
}

/// What [`exchange`] did.
pub(crate) struct Exchanged {
    /// Bytes added to the inbox; `Some(0)` is the end of the stream.
    pub(crate) read: Option<usize>,
    /// Bytes taken from what there was to write.
    pub(crate) written: usize,
}

/// Waits until bytes can be read or written, and does both as far as possible, so that neither direction
/// starves the other. May be dropped at any await.
pub(crate) async fn exchange<S: Stream>(
    reading: &mut Reading<S>,
    inbox: &mut BytesMut,
    writing: &mut Writing<S>,
) -> io::Result<Exchanged> {
    if inbox.capacity() - inbox.len() < READ_BYTES_MIN {
        inbox.reserve(READ_BYTES);
    }
    let mut read = pin!(reading.read_buf(inbox));
    let mut write = pin!(writing.write());
    let (read, written) =
        poll_fn(|context| match (read.as_mut().poll(context), write.as_mut().poll(context)) {
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            both => Poll::Ready(both),
        })
        .await;
    // What was read before a failed write counts: it may say why.
    let read = match read {
        Poll::Ready(read) => Some(read?),
        Poll::Pending => None,
    };
    let written = match written {
        Poll::Ready(Ok(written)) => written,
        Poll::Ready(Err(error)) if read.is_none() => return Err(error),
        Poll::Ready(Err(_)) | Poll::Pending => 0,
    };
    Ok(Exchanged { read, written })
}

enum Unflushed {
    No,
    Yes,
}

/// The writing side, with what is being written.
pub(crate) struct Writing<S> {
    half: WriteHalf<S>,
    out: Option<Outgoing>,
    unflushed: Unflushed,
}

impl<S: Stream> Writing<S> {
    /// Takes the next bytes from `next` unless there are some already.
    pub(crate) fn refill(&mut self, next: impl FnOnce() -> Option<Outgoing>) {
        if self.out.is_none() {
            self.out = next();
        }
    }

    /// Whether all was handed to the stream and [`Writing::refill`] had nothing more.
    pub(crate) fn is_empty(&self) -> bool {
        self.out.is_none()
    }

    /// Writes some of what there is, or flushes when there is nothing, and says how much was written; never
    /// ends while there is nothing to do. May be dropped at any await.
    async fn write(&mut self) -> io::Result<usize> {
        if let Some(out) = &mut self.out {
            let written = self.half.write_buf(out).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            if !out.has_remaining() {
                self.out = None;
            }
            self.unflushed = Unflushed::Yes;
            return Ok(written);
        }
        match self.unflushed {
            Unflushed::No => std::future::pending().await,
            Unflushed::Yes => {
                self.half.flush().await?;
                self.unflushed = Unflushed::No;
                Ok(0)
            }
        }
    }

    /// Writes out what there is and `last`, and closes the stream, as far as that is possible within
    /// [`BYE_MAX`]. The link is over: whether the peer hears why changes nothing.
    pub(crate) async fn send_bye(mut self, last: Option<Outgoing>) {
        let goodbye = async {
            for mut out in self.out.take().into_iter().chain(last) {
                self.half.write_all_buf(&mut out).await?;
            }
            self.half.shutdown().await
        };
        within(BYE_MAX, goodbye).await;
    }
}

async fn within(limit: Duration, goodbye: impl Future<Output = io::Result<()>>) {
    match tokio::time::timeout(limit, goodbye).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the link closed before the last words were out"),
    }
}
