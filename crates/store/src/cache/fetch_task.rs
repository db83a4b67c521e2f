//! What happens to a chunk from the first request for it to its slot.

use std::sync::Arc;

use block::{Chunk, ChunkHash, ChunkSource, FetchError, Priority, WrongChunk};

use super::shard::Reserved;
use super::singleflight::{Answer, SingleFlight};
use super::writer::{Admission, Store};
use super::{CacheGroup, add};

/// The task of a [`SingleFlight`].
pub(super) struct FetchTask {
    group: Arc<CacheGroup>,
    hash: ChunkHash,
    flight: Arc<SingleFlight>,
}

impl FetchTask {
    pub(super) fn new(group: Arc<CacheGroup>, hash: ChunkHash, flight: Arc<SingleFlight>) -> FetchTask {
        FetchTask { group, hash, flight }
    }

    pub(super) async fn run(self, upstream: Arc<dyn ChunkSource>) {
        let Some(answer) = self.ask(&*upstream).await else { return };
        let chunk = match answer {
            Ok(chunk) => chunk,
            Err(error) => {
                // Not found any more before it is told, so that who comes later asks anew.
                self.end();
                self.flight.answer(Err(error));
                return;
            }
        };
        let counters = &self.group.counters;
        add(&counters.fetched_chunks, 1);
        add(&counters.fetched_packed_bytes, chunk.packed().unwrap_or(chunk.bytes()).len() as u64);
        let admission = self.admission().await;
        self.flight.answer(Ok(chunk.clone()));
        match admission.and_then(|admission| self.reserve(chunk, admission)) {
            // The flight ends when the chunk is in its slot; until then it is found in memory.
            Some(store) => Arc::clone(&store.medium).queue.push(&self.group, store),
            None => {
                add(&counters.unstored, 1);
                self.end();
            }
        }
    }

    /// Asks upstream until there is an answer; `None` if nobody waits for it any more.
    async fn ask(&self, upstream: &dyn ChunkSource) -> Option<Answer> {
        loop {
            let Some(priority) = self.flight.wanted() else {
                if self.end_if_left() {
                    return None;
                }
                continue;
            };
            let answer = tokio::select! {
                biased;
                answer = upstream.fetch(self.hash, priority) => answer,
                () = self.flight.is_raised_or_left(priority) => continue,
            };
            return Some(answer.and_then(|chunk| match chunk.hash() {
                actual if actual == self.hash => Ok(chunk),
                actual => Err(WrongChunk::Hash { expected: self.hash, actual }.into()),
            }));
        }
    }

    /// Room on the way to the media. Those who wait for a prefetch wait for it too; a guest does not.
    async fn admission(&self) -> Option<Admission> {
        let priority = self.flight.wanted().unwrap_or(Priority::Background);
        let writer = &self.group.writer;
        match writer.try_admit(priority) {
            None if priority != Priority::Guest => tokio::select! {
                admission = writer.admit(priority) => admission,
                () = self.flight.is_raised_or_left(priority) => writer.try_admit(Priority::Guest),
            },
            admission => admission,
        }
    }

    fn reserve(&self, chunk: Chunk, admission: Admission) -> Option<Store> {
        let Reserved { medium, id, evicted } = self.group.reserve(&self.hash)?;
        add(&self.group.counters.evicted, evicted);
        Some(Store { medium, id, chunk, _admission: admission })
    }

    /// Takes the flight out of the index.
    fn end(&self) {
        self.group.shard(&self.hash).lock().flights.remove(&self.hash);
    }

    /// The same, unless somebody joined in the meantime.
    fn end_if_left(&self) -> bool {
        let mut index = self.group.shard(&self.hash).lock();
        let is_left = self.flight.wanted().is_none();
        if is_left {
            index.flights.remove(&self.hash);
        }
        is_left
    }
}

impl Drop for FetchTask {
    /// Leaves nobody waiting if the task was cut short: by a panic upstream, or by the end of the runtime.
    fn drop(&mut self) {
        if self.flight.is_answered() {
            return;
        }
        let mut index = self.group.shard(&self.hash).lock();
        if index.flights.get(&self.hash).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            index.flights.remove(&self.hash);
        }
        drop(index);
        self.flight.answer(Err(FetchError::Unreachable("the fetch was cut short".to_owned())));
    }
}
