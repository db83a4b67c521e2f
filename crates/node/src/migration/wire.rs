//! What passes on a connection that brings a VM: first which VM and what of it, then the guest's memory as QEMU sends
//! it, or blocks of its disk (`docs/formats/move.md`).
//!
//! Blocks come in frames and end with a hash of all of them, which the receiver compares before it answers. The
//! connection is TLS between two members; the hash tells apart what came whole and what did not.

use std::io;

use block::limits::BLOCK_BYTES;
use block::{Disk, VmName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest run of bytes in one frame: what the receiver has in memory.
pub(super) const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Longest reason of a receiver that failed, in bytes.
const REASON_BYTES_MAX: usize = 1000;

const HEAD_BYTES: usize = 13;
const DATA: u8 = 1;
const ZEROES: u8 = 2;
const END: u8 = 3;

const DONE: u8 = 0;
const FAILED: u8 = 1;

/// What a connection brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cargo {
    /// The guest's memory, in both directions as QEMU wants it.
    Memory,
    /// Blocks of the disk of this number, from 0.
    Blocks(u8),
}

/// Says what a connection brings.
pub(super) async fn write_greeting(
    stream: &mut (impl AsyncWrite + Unpin),
    vm: &VmName,
    cargo: Cargo,
) -> io::Result<()> {
    let name = vm.as_str().as_bytes();
    let len = u8::try_from(name.len()).map_err(io::Error::other)?;
    let greeting = match cargo {
        Cargo::Memory => [&[1, len], name].concat(),
        Cargo::Blocks(disk) => [&[2, len], name, &[disk]].concat(),
    };
    stream.write_all(&greeting).await?;
    stream.flush().await
}

/// Reads what a connection brings.
pub(super) async fn read_greeting(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(VmName, Cargo)> {
    let kind = stream.read_u8().await?;
    let mut name = vec![0; usize::from(stream.read_u8().await?)];
    stream.read_exact(&mut name).await?;
    let name = std::str::from_utf8(&name).ok().and_then(|name| name.parse().ok());
    let name = name.ok_or_else(|| invalid("it names no VM".to_owned()))?;
    match kind {
        1 => Ok((name, Cargo::Memory)),
        2 => Ok((name, Cargo::Blocks(stream.read_u8().await?))),
        other => Err(invalid(format!("nothing of a VM is of kind {other}"))),
    }
}

/// Sends blocks, and hashes what it sends.
pub(super) struct Sender<'a, S> {
    stream: &'a mut S,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Sender<'a, S> {
    pub(super) fn new(stream: &'a mut S) -> Sender<'a, S> {
        Sender { stream, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// Sends a run of at most [`FRAME_BYTES_MAX`] bytes as it is on the disk.
    pub(super) async fn send(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let is_zero = |block: &&[u8]| block.iter().all(|&byte| byte == 0);
        let blocks: Vec<&[u8]> = data.chunks(BLOCK_BYTES).collect();
        let mut at = 0;
        for alike in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let len: usize = alike.iter().map(|block| block.len()).sum();
            let kind = if is_zero(&alike[0]) { ZEROES } else { DATA };
            self.frame(kind, offset + at as u64, &data[at..at + len]).await?;
            at += len;
        }
        Ok(())
    }

    async fn frame(&mut self, kind: u8, offset: u64, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(data.len()).map_err(io::Error::other)?;
        let head = head(kind, offset, len);
        self.hasher.update(&head);
        self.stream.write_all(&head).await?;
        self.bytes += HEAD_BYTES as u64;
        if kind == DATA {
            self.hasher.update(data);
            self.stream.write_all(data).await?;
            self.bytes += data.len() as u64;
        }
        Ok(())
    }

    /// Ends, and waits until the receiver has all of it on its disk, flushed. Says how many bytes were sent.
    pub(super) async fn finish(mut self) -> io::Result<u64> {
        self.frame(END, 0, &[]).await?;
        self.stream.write_all(self.hasher.finalize().as_bytes()).await?;
        self.stream.flush().await?;
        match self.stream.read_u8().await? {
            DONE => Ok(self.bytes),
            _ => {
                let mut reason = Vec::new();
                self.stream.take(REASON_BYTES_MAX as u64).read_to_end(&mut reason).await?;
                let reason = String::from_utf8_lossy(&reason);
                Err(io::Error::other(reason.escape_debug().to_string()))
            }
        }
    }
}

/// Writes the blocks that come to `disk`, flushes it, and answers.
pub(super) async fn receive(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    disk: &dyn Disk,
) -> io::Result<()> {
    match receive_all(stream, disk).await {
        Ok(()) => stream.write_u8(DONE).await?,
        Err(error) => {
            let reason = error.to_string();
            let reason = &reason.as_bytes()[..reason.len().min(REASON_BYTES_MAX)];
            stream.write_all(&[&[FAILED], reason].concat()).await?;
            stream.flush().await?;
            return Err(error);
        }
    }
    stream.flush().await
}

async fn receive_all(stream: &mut (impl AsyncRead + Unpin), disk: &dyn Disk) -> io::Result<()> {
    let mut hasher = blake3::Hasher::new();
    let mut data = Vec::new();
    loop {
        let mut head = [0; HEAD_BYTES];
        stream.read_exact(&mut head).await?;
        hasher.update(&head);
        let offset = u64::from_le_bytes(head[1..9].try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(head[9..].try_into().expect("four bytes"));
        if len > FRAME_BYTES_MAX {
            return Err(invalid(format!("a run of {len} bytes is longer than {FRAME_BYTES_MAX}")));
        }
        match head[0] {
            DATA => {
                data.resize(len as usize, 0);
                stream.read_exact(&mut data).await?;
                hasher.update(&data);
                disk.write(offset, &data).await.map_err(io::Error::other)?;
            }
            ZEROES => disk.write_zeroes(offset, u64::from(len)).await.map_err(io::Error::other)?,
            END => {
                let mut hash = [0; blake3::OUT_LEN];
                stream.read_exact(&mut hash).await?;
                if hasher.finalize() != blake3::Hash::from_bytes(hash) {
                    return Err(invalid("what came is not what was sent".to_owned()));
                }
                return disk.flush().await.map_err(io::Error::other);
            }
            other => return Err(invalid(format!("there is no frame of kind {other}"))),
        }
    }
}

fn head(kind: u8, offset: u64, len: u32) -> [u8; HEAD_BYTES] {
    let mut head = [kind; HEAD_BYTES];
    head[1..9].copy_from_slice(&offset.to_le_bytes());
    head[9..].copy_from_slice(&len.to_le_bytes());
    head
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use block::Access;
    use proptest::prelude::*;
    use testkit::memory_disk::{MemoryDisk, Pace};

    use super::*;

    const SIZE: usize = 3 << 20;

    fn disk() -> Arc<MemoryDisk> {
        MemoryDisk::with(vec![7; SIZE], Pace::Later, Access::ReadWrite)
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    proptest! {
        #[test]
        fn what_was_sent_is_there(runs in prop::collection::vec((0..SIZE, 1..9000usize, 0..3u8), 0..8)) {
            runtime().block_on(async {
                let (disk, expected) = (disk(), disk());
                let (mut ours, mut theirs) = tokio::io::duplex(1000);
                let send = async {
                    let mut sender = Sender::new(&mut ours);
                    for (offset, len, byte) in runs {
                        let data = vec![byte; len.min(SIZE - offset)];
                        expected.write(offset as u64, &data).await.unwrap();
                        sender.send(offset as u64, &data).await.unwrap();
                    }
                    sender.finish().await.unwrap()
                };
                let (_, received) = tokio::join!(send, receive(&mut theirs, &*disk));
                received.unwrap();
                assert!(*disk.bytes.lock().unwrap() == *expected.bytes.lock().unwrap());
            });
        }

        #[test]
        fn foreign_bytes_are_refused_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            runtime().block_on(async {
                let _ = read_greeting(&mut &bytes[..]).await;
                let mut reply = Vec::new();
                let mut stream = tokio::io::join(&bytes[..], &mut reply);
                assert!(receive(&mut stream, &*disk()).await.is_err());
            });
        }
    }

    #[tokio::test]
    async fn a_greeting_has_its_golden_bytes_and_comes_back() {
        let mut bytes = Vec::new();
        write_greeting(&mut bytes, &"web1".parse().unwrap(), Cargo::Blocks(3)).await.unwrap();
        assert_eq!(bytes, b"\x02\x04web1\x03");
        let (vm, cargo) = read_greeting(&mut &bytes[..]).await.unwrap();
        assert_eq!((vm.as_str(), cargo), ("web1", Cargo::Blocks(3)));
        assert!(read_greeting(&mut &b"\x02\x04../x\x00"[..]).await.is_err());
    }

    #[tokio::test]
    async fn what_came_wrong_or_does_not_fit_is_told_to_the_sender() {
        for (offset, flipped) in [(SIZE as u64 - 10, false), (0, true)] {
            let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
            let (disk, mut between) = (disk(), Vec::new());
            let mut sender = Sender::new(&mut ours);
            sender.send(offset, &[1; 100]).await.unwrap();
            let send = sender.finish();
            let relay = async {
                // Two frames, 100 bytes and a hash.
                between.resize(2 * HEAD_BYTES + 100 + blake3::OUT_LEN, 0);
                theirs.read_exact(&mut between).await.unwrap();
                between[50] ^= u8::from(flipped);
                let mut reply = Vec::new();
                receive(&mut tokio::io::join(&between[..], &mut reply), &*disk).await.unwrap_err();
                theirs.write_all(&reply).await.unwrap();
                drop(theirs);
            };
            let (sent, ()) = tokio::join!(send, relay);
            let said = sent.unwrap_err().to_string();
            let expected = if flipped { "not what was sent" } else { "do not lie on this disk" };
            assert!(said.contains(expected), "{said}");
        }
    }
}
