//! A source of chunks with the cache over it: what [`CacheGroup::over`] gives out.

use std::sync::Arc;

use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, Priority, SlotHint, TryIo};
use futures_util::FutureExt;

use super::set::SlotId;
use super::singleflight::Answer;
use super::{CacheGroup, Lookup, add, identity};

/// How often one fetch looks again after it found a chunk gone, wrong, or lost with another's upstream.
/// Each such turn is somebody's progress or a fault; beyond this many the caller asks upstream itself.
const TURNS_MAX: usize = 16;

/// A source with the cache over it.
pub(super) struct Cached {
    pub(super) group: Arc<CacheGroup>,
    pub(super) upstream: Arc<dyn ChunkSource>,
    pub(super) reader: Reader,
}

/// Who reads from a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// This node's own disks and streams.
    Own,
    /// Children, whose requests come from other nodes.
    Child,
}

impl Cached {
    async fn get(&self, hash: ChunkHash, priority: Priority) -> Answer {
        if hash.is_zero() {
            return Ok(Chunk::zero());
        }
        for _ in 0..TURNS_MAX {
            match self.group.locate(hash, priority, &self.upstream) {
                Lookup::Arrived(chunk) => return Ok(chunk),
                Lookup::Stored(medium, id, version) => {
                    if let Some(chunk) = self.group.read_chunk(hash, &medium, id, version).await {
                        return Ok(chunk);
                    }
                }
                // Our fetch for another image may wait for the child that asks, which has its place above us in that
                // image's hierarchy. In each hierarchy alone nobody waits for those below.
                Lookup::Coming(mut waiter)
                    if self.reader == Reader::Child && waiter.is_elsewhere(identity(&self.upstream)) =>
                {
                    tokio::select! {
                        biased;
                        Ok(chunk) = waiter.answer() => return Ok(chunk),
                        answer = self.upstream.fetch(hash, priority) => return answer,
                    }
                }
                Lookup::Coming(mut waiter) => match waiter.answer().await {
                    // Another upstream could not deliver; ours was not asked yet.
                    Err(_) if waiter.is_elsewhere(identity(&self.upstream)) => {}
                    answer => return answer,
                },
            }
        }
        self.upstream.fetch(hash, priority).await
    }
}

impl ChunkSource for Cached {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        self.get(chunk, priority).boxed()
    }

    fn try_read(&self, chunk: &ChunkHash, hint: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        if chunk.is_zero() {
            buf.fill(0);
            return TryIo::Done;
        }
        let (group, shard) = (&self.group, self.group.shard(chunk));
        if let Some(id) = SlotId::from_hint(hint.get())
            && group.try_copy(shard, id, chunk, offset, buf) == TryIo::Done
        {
            return TryIo::Done;
        }
        let (found, arrived) = {
            let mut index = shard.lock();
            match group.find(&mut index, chunk) {
                Some((id, _)) => (Some(id), None),
                None => (None, index.flights.get(chunk).and_then(|flight| flight.arrived())),
            }
        };
        match (found, arrived) {
            (Some(id), _) => {
                hint.set(id.to_hint());
                group.try_copy(shard, id, chunk, offset, buf)
            }
            (None, Some(arrived)) => {
                buf.copy_from_slice(&arrived.bytes()[offset..offset + buf.len()]);
                add(&shard.hits, 1);
                TryIo::Done
            }
            (None, None) => TryIo::WouldBlock,
        }
    }
}
