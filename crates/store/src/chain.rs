//! A VM's layers as one disk: the topmost takes the changes, those below are frozen.
//!
//! Each layer is the base of the next, down to the image volume, so that reading needs only the top. What is done
//! here is changing the top while a guest uses the disk.
//!
//! Consistency: a change is carried out by one layer. One that meets a layer which was frozen meanwhile goes to the
//! layer that took its place. A frozen layer holds every change that was answered before, and none that was begun
//! after it was [frozen](Chain::freeze).
//! Durability: a flush covers the layers below too, and the record of which layer is on top. Both are made durable
//! after the top was replaced, so that no change waits for the medium, and once: see [`Chain::settle`]. Before, a power
//! cut may leave the old record or the new one, and of what no flush covered any part.
//! Crash: a killed process leaves the new record before the new layer takes its first change, so nothing that was
//! answered is lost. Whoever opens the disk again makes the record durable first, and takes no layer for durable.
//! Cancellation: a dropped freeze leaves everything as it was, or done; what settles goes on.
//! Retries: a layer that had no room for its map is tried again at the next flush. After a record could not be synced,
//! every flush fails.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use block::{Access, BoxFuture, Disk, DiskError, Extent, TryIo};
use futures_util::FutureExt;
use tokio::sync::Mutex;

use crate::{Overlay, asyncio};

/// Makes durable the record of which layer is on top. Blocks the thread.
pub type SyncRecord = Box<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The layers of one disk.
pub struct Chain {
    top: RwLock<Arc<Overlay>>,
    unsettled: Arc<Mutex<Unsettled>>,
}

/// What may not be durable yet, beside the top.
struct Unsettled {
    sync_record: SyncRecord,
    record: RecordState,
    /// Layers below the top.
    layers: Vec<Arc<Overlay>>,
}

enum RecordState {
    Durable,
    Written,
    /// It could not be made durable, and nobody can tell any more whether it is.
    Failed(String),
}

/// A layer was frozen, and another is on top of it.
pub struct Frozen {
    /// The layer that takes no change any more.
    pub layer: Arc<Overlay>,
    /// How long changes had to wait.
    pub pause: Duration,
}

impl Chain {
    /// The disk whose topmost layer is `top`, with those `below` it, none of which needs to be durable. The record of
    /// this is, and `sync_record` makes the next one so.
    pub fn new(top: Arc<Overlay>, below: Vec<Arc<Overlay>>, sync_record: SyncRecord) -> Chain {
        let unsettled = Unsettled { sync_record, record: RecordState::Durable, layers: below };
        Chain { top: RwLock::new(top), unsettled: Arc::new(Mutex::new(unsettled)) }
    }

    /// The layer that takes the changes at present.
    pub fn top(&self) -> Arc<Overlay> {
        Arc::clone(&self.top.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Freezes the top and puts the durable layer above it that `record` gives, which writes down that it is there, and
    /// leaves it to [`settle`](Chain::settle) to make that durable. Changes wait meanwhile; reads do not. If `record`
    /// fails, or what there is cannot be made durable before, all goes on as before.
    ///
    /// The new layer's base is the present top for a snapshot, and any other when the disk is set back to an earlier
    /// state; then whoever uses the disk must know. Freezings come one after the other.
    pub async fn freeze<E: From<DiskError>>(
        &self,
        record: impl Future<Output = Result<Arc<Overlay>, E>>,
    ) -> Result<Frozen, E> {
        // A medium that is full or broken shows here, and less is left for later.
        self.flush().await?;
        let layer = self.top();
        let freezing = layer.freeze().await;
        if layer.is_frozen() {
            return Err(DiskError::ReadOnly.into());
        }
        let mut unsettled = self.unsettled.lock().await;
        let next = record.await?;
        // In this order: who meets the new top in a flush finds what to settle before; and whoever is refused by the
        // old layer finds the new one.
        unsettled.layers.push(Arc::clone(&layer));
        unsettled.record = RecordState::Written;
        *self.top.write().unwrap_or_else(PoisonError::into_inner) = next;
        freezing.keep();
        let pause = freezing.elapsed();
        drop(freezing);
        Ok(Frozen { layer, pause })
    }

    /// Makes durable which layer is on top, and what lies below it.
    pub async fn settle(&self) -> Result<(), DiskError> {
        let mut unsettled = Arc::clone(&self.unsettled).lock_owned().await;
        if let RecordState::Written = unsettled.record {
            // It runs to its end, whoever drops this, so that a failure is not forgotten.
            let sync = move || {
                unsettled.record = match (unsettled.sync_record)() {
                    Ok(()) => RecordState::Durable,
                    Err(error) => RecordState::Failed(error.to_string()),
                };
                Ok(unsettled)
            };
            unsettled = asyncio::blocking(sync).await?;
        }
        if let RecordState::Failed(error) = &unsettled.record {
            return Err(DiskError::Io(format!(
                "the record of the disk's layers could not be made durable, so what was written may be lost: {error}"
            )));
        }
        while let Some(layer) = unsettled.layers.last() {
            layer.flush().await?;
            unsettled.layers.pop();
        }
        Ok(())
    }

    /// The top, if it is not the layer that refused a change because it was frozen.
    fn next_after(&self, refused: &Arc<Overlay>, error: DiskError) -> Result<Arc<Overlay>, DiskError> {
        let top = self.top();
        if matches!(error, DiskError::ReadOnly) && !Arc::ptr_eq(&top, refused) { Ok(top) } else { Err(error) }
    }

    /// Carries out a change, on another layer if the top is replaced meanwhile.
    async fn change(&self, change: Change<'_>) -> Result<(), DiskError> {
        let mut top = self.top();
        loop {
            let done = match change {
                Change::Write { offset, data } => top.write(offset, data).await,
                Change::Zeroes { offset, len } => top.write_zeroes(offset, len).await,
                Change::Discard { offset, len } => top.discard(offset, len).await,
            };
            match done {
                Ok(()) => return Ok(()),
                Err(error) => top = self.next_after(&top, error)?,
            }
        }
    }
}

/// What changes a disk.
enum Change<'a> {
    Write { offset: u64, data: &'a [u8] },
    Zeroes { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
}

impl Disk for Chain {
    fn size_bytes(&self) -> u64 {
        self.top().size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.top.read().unwrap_or_else(PoisonError::into_inner).try_read(offset, buf)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        let mut top = self.top();
        loop {
            match top.try_write(offset, data) {
                Ok(now) => return Ok(now),
                Err(error) => top = self.next_after(&top, error)?,
            }
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        let top = self.top();
        async move { top.read(offset, buf).await }.boxed()
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.change(Change::Write { offset, data }).boxed()
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.change(Change::Zeroes { offset, len }).boxed()
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.change(Change::Discard { offset, len }).boxed()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        async move {
            // First the top: a change that was answered before lies in it or below it.
            let top = self.top();
            self.settle().await?;
            top.flush().await
        }
        .boxed()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        async move { self.top().extents(offset, len).await }.boxed()
    }
}

#[cfg(test)]
mod tests;
