//! Faults on purpose, for system tests: a node that lies, and one that dies at a certain step. Compiled with the feature
//! `faults` alone.

use std::fs;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use clap::ValueEnum;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Shortest write in bytes that counts as a chunk: longer than every frame without one, shorter than most
/// compressed chunks.
const CHUNK_WRITE_BYTES_MIN: usize = 1024;

/// What a node does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Each chunk that it serves has a flipped bit.
    FlipBits,
}

/// File in a node's directory that names the step at which it dies, once.
const DIE_AT: &str = "die-at";

/// Ends the daemon as a power cut would, if it was told to at this step.
pub(super) fn reached(dir: &Path, step: &str) {
    let file = dir.join(DIE_AT);
    if fs::read_to_string(&file).is_ok_and(|told| told == step) && fs::remove_file(&file).is_ok() {
        std::process::abort();
    }
}

/// A link's stream with a fault in what is sent.
pub(super) struct Faulty<S> {
    pub(super) stream: S,
    pub(super) fault: Option<Fault>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Faulty<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Faulty<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut wrong;
        let sent = match self.fault {
            Some(Fault::FlipBits) if buf.len() >= CHUNK_WRITE_BYTES_MIN => {
                wrong = buf.to_vec();
                wrong[buf.len() / 2] ^= 1;
                &wrong
            }
            _ => buf,
        };
        Pin::new(&mut self.stream).poll_write(cx, sent)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn one_bit_of_a_chunk_is_flipped_and_none_of_a_short_frame() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut faulty = Faulty { stream: ours, fault: Some(Fault::FlipBits) };
        let (frame, chunk) = ([7; 100], [7; CHUNK_WRITE_BYTES_MIN]);
        faulty.write_all(&frame).await.unwrap();
        faulty.write_all(&chunk).await.unwrap();
        drop(faulty);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).await.unwrap();
        let differ = sent.iter().map(|byte| (byte ^ 7).count_ones());
        assert_eq!(sent.len(), frame.len() + chunk.len());
        assert_eq!(differ.clone().take(frame.len()).sum::<u32>(), 0);
        assert_eq!(differ.sum::<u32>(), 1);
    }
}
