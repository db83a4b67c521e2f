//! One layer: what is remembered of it, and what it reads as while it is open.

use std::sync::{Arc, Mutex, PoisonError};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ImageId, TryIo};
use serde::{Deserialize, Serialize};
use store::Overlay;

use super::LayerId;
use super::transfer_disk::TransferDisk;
use crate::images::Attached;

/// What a layer stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Parent {
    /// Another layer, which is frozen.
    Layer(LayerId),
    /// An image.
    Image(ImageId),
    /// Another VM's disk, from elsewhere. The layer takes over in what that differs from its base, or from the disk that
    /// it is to be `on`, and is to stand there then.
    Carried {
        /// The image that it comes as.
        image: ImageId,
        /// The image that it was derived from.
        base: ImageId,
        /// An older state of the same disk.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        on: Option<Older>,
    },
}

/// An older state of a disk that comes from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Older {
    /// The layer that reads as it.
    pub(crate) layer: LayerId,
    /// The image that it came as.
    pub(crate) image: ImageId,
}

impl Parent {
    /// The layer that is needed below, if there is one.
    pub(super) fn layer(self) -> Option<LayerId> {
        match self {
            Parent::Layer(id) => Some(id),
            Parent::Carried { on, .. } => on.map(|older| older.layer),
            Parent::Image(_) => None,
        }
    }

    /// Whether the layer on it has yet to take over another VM's disk.
    pub(super) fn is_carried(self) -> bool {
        matches!(self, Parent::Carried { .. })
    }
}

/// What is remembered of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) parent: Parent,
    pub(super) made_unix_ms: u64,
}

/// An open layer.
pub(crate) struct Layer {
    pub(super) id: LayerId,
    pub(super) overlay: Arc<Overlay>,
    pub(super) below: Mutex<Below>,
}

/// What an open layer stands on, kept open by it.
#[derive(Clone)]
pub(crate) enum Below {
    /// Another layer.
    Layer(Arc<Layer>),
    /// An image.
    Image(Arc<Attached>),
    /// Another VM's disk, from elsewhere; see [`Parent::Carried`].
    Carried { image: Arc<Attached>, base: Arc<Attached>, on: Option<Older> },
}

impl Below {
    /// As a disk.
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        match self {
            Below::Layer(layer) => Arc::clone(layer) as _,
            Below::Image(image) => Arc::clone(&image.volume) as _,
            Below::Carried { image, base, .. } => {
                Arc::new(TransferDisk::new(Arc::clone(&image.volume), Arc::clone(&base.volume)))
            }
        }
    }

    pub(super) fn parent(&self) -> Parent {
        match self {
            Below::Layer(layer) => Parent::Layer(layer.id),
            Below::Image(image) => Parent::Image(image.id),
            Below::Carried { image, base, on } => Parent::Carried { image: image.id, base: base.id, on: *on },
        }
    }
}

impl Layer {
    pub(crate) fn id(&self) -> LayerId {
        self.id
    }

    pub(crate) fn overlay(&self) -> &Arc<Overlay> {
        &self.overlay
    }

    /// What it stands on.
    pub(crate) fn below(&self) -> Below {
        self.below.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes it and the layers below durable: those that a daemon froze when it was killed may not be.
    pub(crate) async fn make_durable(self: &Arc<Layer>) -> Result<(), DiskError> {
        for layer in self.chain().0 {
            layer.overlay.flush().await?;
        }
        Ok(())
    }

    /// The layers of the disk whose top it is, and the image below them all.
    pub(crate) fn chain(self: &Arc<Layer>) -> (Vec<Arc<Layer>>, Arc<Attached>) {
        let mut layers = vec![Arc::clone(self)];
        loop {
            let below = layers.last().expect("it begins with this layer").below();
            match below {
                Below::Layer(layer) => layers.push(layer),
                Below::Image(image) | Below::Carried { image, .. } => return (layers, image),
            }
        }
    }
}

/// What a frozen layer reads as. Whoever has this has the layer, which so is opened once.
impl Disk for Layer {
    fn size_bytes(&self) -> u64 {
        self.overlay.size_bytes()
    }

    fn access(&self) -> Access {
        self.overlay.access()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.overlay.try_read(offset, buf)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.overlay.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.overlay.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.overlay.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.overlay.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        self.overlay.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.overlay.extents(offset, len)
    }
}
