//! A VM's layers as one disk: the topmost takes the changes, those below are frozen.
//!
//! Each layer is the base of the next, down to the image volume, so that reading needs only the top. What is done
//! here is changing the top while a guest uses the disk.
//!
//! Consistency: a change is carried out by one layer. One that meets a layer which was frozen meanwhile goes to the
//! layer that took its place. A frozen layer holds every change that was answered before, and none that was begun
//! after it was [frozen](Chain::freeze).
//! Durability: a frozen layer is durable, and the caller has made durable which layer is on top, before that one
//! takes a change. So a flush need only concern the present top.
//! Cancellation: a dropped freeze leaves everything as it was, or done.
//! Retries: none. Crash: nothing is written here.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use block::{Access, BoxFuture, Disk, DiskError, Extent, Now};
use futures_util::FutureExt;

use crate::Overlay;

/// The layers of one disk.
pub struct Chain {
    top: RwLock<Arc<Overlay>>,
}

/// A layer was frozen, and another is on top of it.
pub struct Frozen {
    /// The layer that takes no change any more.
    pub layer: Arc<Overlay>,
    /// How long changes had to wait.
    pub pause: Duration,
}

impl Chain {
    /// The disk whose topmost layer is `top`.
    pub fn new(top: Arc<Overlay>) -> Chain {
        Chain { top: RwLock::new(top) }
    }

    /// The layer that takes the changes at present.
    pub fn top(&self) -> Arc<Overlay> {
        Arc::clone(&self.top.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Freezes the top and puts the layer above it that `commit` gives, which makes durable that it is there.
    /// Changes wait meanwhile; reads do not. If `commit` fails, all goes on as before.
    ///
    /// The new layer's base is the present top for a snapshot, and any other when the disk is set back to an earlier
    /// state; then whoever uses the disk must know.
    pub async fn freeze<E: From<DiskError>>(
        &self,
        commit: impl Future<Output = Result<Arc<Overlay>, E>>,
    ) -> Result<Frozen, E> {
        let layer = self.top();
        let freezing = layer.freeze().await?;
        if layer.is_frozen() {
            return Err(DiskError::ReadOnly.into());
        }
        let next = commit.await?;
        // In this order: whoever is refused by the old layer finds the new one.
        *self.top.write().unwrap_or_else(PoisonError::into_inner) = next;
        freezing.keep();
        let pause = freezing.elapsed();
        drop(freezing);
        Ok(Frozen { layer, pause })
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

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<Now, DiskError> {
        self.top.read().unwrap_or_else(PoisonError::into_inner).read_now(offset, buf)
    }

    fn write_now(&self, offset: u64, data: &[u8]) -> Result<Now, DiskError> {
        let mut top = self.top();
        loop {
            match top.write_now(offset, data) {
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
        async move { self.top().flush().await }.boxed()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        async move { self.top().extents(offset, len).await }.boxed()
    }
}

#[cfg(test)]
mod tests;
