//! The layers of a node's disks: a forest whose roots stand on images.
//!
//! A layer is a directory with an overlay and a record of what it stands on. VMs, snapshots and derived images
//! *hold* layers; a layer that nobody holds and on which none stands is removed. VMs share what is frozen, so a
//! clone on the same node is a new layer on an old one and costs nothing.
//!
//! Consistency: the forest is in memory under one lock, with the number of those who hold each layer: records on disk
//! that name it, and [values](HeldLayer) of those who work with it. Whoever makes a layer has such a value until a
//! record that names it is written.
//! Crash: what no record names is swept away at the next start, unless a record cannot be read: then all that was
//! there stays as it is, since that record may name it, and neither goes nor is merged until a start at which all can.
//! A layer that was being made may be torn, its record too; nothing names it yet, so that is not damage.
//! Retries: none. Opening, making and removing block the thread.

mod files;
mod forest;
mod hold;
mod id;
mod layer;
pub(crate) mod merging;
pub(crate) mod rebase;
mod transfer_disk;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use block::{Disk, ImageId};
use image::OpenRemote;
use store::Overlay;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use self::files::LayerFiles;
use self::forest::{Damaged, Forest, Known};
pub(crate) use self::hold::HeldLayer;
use self::hold::LayerHold;
pub(crate) use self::id::LayerId;
use self::layer::LayerRecord;
pub(crate) use self::layer::{Below, Layer, Older, Parent};
use crate::images::{Attached, Images};
use control::api::now_unix_ms;

/// Most layers of one disk. A read looks through all of them, some 50 ns each.
pub(crate) const DEPTH_MAX: usize = 64;

/// All layers of a node.
pub(crate) struct Layers {
    files: Arc<LayerFiles>,
    images: Arc<Images>,
    forest: Mutex<Forest>,
    /// Held while layers are opened, so that each is opened once.
    opening: Mutex<()>,
    /// Told when a layer may have become fit for merging.
    pub(crate) merges: Notify,
    /// Told when a layer is to be rebased.
    pub(crate) rebases: Notify,
    /// Where layers are removed that nobody needs any more.
    runtime: Handle,
}

impl Layers {
    /// Reads which layers there are in `dir`; what cannot be read is said. `images` makes the node's images, with what
    /// opens the layers that images were derived from: it opens none before this is done. To be called within a runtime.
    pub(crate) fn open(
        dir: PathBuf,
        images: impl FnOnce(Arc<dyn OpenRemote>) -> Images,
    ) -> std::io::Result<Arc<Layers>> {
        let files = LayerFiles::new(dir);
        let forest = Mutex::new(files.read()?);
        Ok(Arc::new_cyclic(|layers| Layers {
            files: Arc::new(files),
            images: Arc::new(images(Arc::new(LayerDisks(Weak::clone(layers))))),
            forest,
            opening: Mutex::new(()),
            merges: Notify::new(),
            rebases: Notify::new(),
            runtime: Handle::current(),
        }))
    }

    /// The images that layers stand on.
    pub(crate) fn images(&self) -> &Arc<Images> {
        &self.images
    }

    /// Removes what nobody holds. To be called once all records that name layers have been counted; `certain` says
    /// whether all of them could be read.
    pub(crate) fn sweep(&self, certain: bool) {
        let mut forest = self.forest();
        let torn = if certain { forest.take_torn() } else { Vec::new() };
        for id in &torn {
            tracing::info!(layer = %id, "leftovers_removed: a layer was being made");
        }
        for Damaged { dir, reason, .. } in &forest.damaged {
            tracing::error!(dir = %dir.display(), reason, "layer_damaged: no layer is removed until it is mended or moved away");
        }
        if !certain || !forest.damaged.is_empty() {
            tracing::warn!("layers_kept: some records that may name them cannot be read");
            forest.hold_all();
        }
        let all: Vec<LayerId> = forest.layers.keys().copied().collect();
        let unneeded: Vec<LayerId> = all.into_iter().flat_map(|id| forest.take_unneeded(id)).collect();
        drop(forest);
        self.files.remove(&torn);
        self.files.remove(&unneeded);
        self.merges.notify_one();
        self.rebases.notify_one();
    }

    /// Opens the layer that a VM writes to.
    pub(crate) fn open_top(&self, id: LayerId) -> Result<Arc<Layer>, String> {
        let _one_at_a_time = self.opening();
        let (closed, mut below) = self.first_open(id)?;
        for id in closed.into_iter().rev() {
            if let Below::Layer(parent) = &below {
                parent.overlay.set_frozen();
            }
            let overlay = self.files.open(id, below.disk())?;
            below = Below::Layer(self.enter(id, overlay, below));
        }
        match below {
            Below::Layer(layer) => Ok(layer),
            Below::Image(_) | Below::Carried { .. } => Err(format!("layer {id} is not there")),
        }
    }

    /// Opens a layer that takes no changes.
    pub(crate) fn open_frozen(&self, id: LayerId) -> Result<Arc<Layer>, String> {
        let layer = self.open_top(id)?;
        layer.overlay.set_frozen();
        Ok(layer)
    }

    /// The layers from `id` downwards that are not open, and what lies below them.
    fn first_open(&self, id: LayerId) -> Result<(Vec<LayerId>, Below), String> {
        let forest = self.forest();
        let mut closed = Vec::new();
        let mut at = id;
        loop {
            let known = forest.layers.get(&at).ok_or_else(|| format!("there is no layer {at}"))?;
            if let Some(layer) = known.open.upgrade() {
                return Ok((closed, Below::Layer(layer)));
            }
            if closed.len() >= forest.layers.len() {
                return Err(format!("layer {at} stands on itself"));
            }
            closed.push(at);
            match known.record.parent {
                Parent::Layer(parent) => at = parent,
                Parent::Image(image) => return Ok((closed, Below::Image(self.attached(&image)?))),
                Parent::Carried { image, base, on } => {
                    let (image, base) = (self.attached(&image)?, self.attached(&base)?);
                    return Ok((closed, Below::Carried { image, base, on }));
                }
            }
        }
    }

    fn attached(&self, id: &ImageId) -> Result<Arc<Attached>, String> {
        self.images.by_id(id).ok_or_else(|| format!("its image {} is not attached", id.short()))
    }

    fn enter(&self, id: LayerId, overlay: Overlay, below: Below) -> Arc<Layer> {
        let layer = Arc::new(Layer { id, overlay: Arc::new(overlay), below: Mutex::new(below) });
        if let Some(known) = self.forest().layers.get_mut(&id) {
            known.open = Arc::downgrade(&layer);
        }
        layer
    }

    /// Makes an empty layer of this new name. Blocks.
    pub(crate) fn make(
        self: &Arc<Self>,
        id: LayerId,
        below: Below,
        size_bytes: u64,
    ) -> Result<HeldLayer, String> {
        let base = below.disk();
        self.make_over(id, below, size_bytes, base)
    }

    /// The same; what it does not hold is read through `base`, which reads as what is below.
    pub(crate) fn make_over(
        self: &Arc<Self>,
        id: LayerId,
        below: Below,
        size_bytes: u64,
        base: Arc<dyn Disk>,
    ) -> Result<HeldLayer, String> {
        let record = LayerRecord { parent: below.parent(), made_unix_ms: now_unix_ms() };
        // What is to be rebased is opened as soon as it is known.
        let _not_before_it_is_made = record.parent.is_carried().then(|| self.opening());
        self.forest().insert(id, record.clone(), 1);
        let hold = LayerHold::new(Arc::clone(self), id);
        let overlay = self.files.create(id, &record, size_bytes, base)?;
        let layer = self.enter(id, overlay, below);
        if record.parent.is_carried() {
            self.rebases.notify_one();
        }
        Ok(HeldLayer::new(layer, hold))
    }

    /// Keeps a layer as long as the answer is there; `None` if there is no such layer.
    fn hold(self: &Arc<Self>, id: LayerId) -> Option<LayerHold> {
        self.forest().hold(id).then(|| LayerHold::new(Arc::clone(self), id))
    }

    /// Opens a layer that takes no changes, and keeps it as long as the answer is there. Blocks.
    pub(crate) fn hold_frozen(self: &Arc<Self>, id: LayerId) -> Result<HeldLayer, String> {
        let hold = self.hold(id).ok_or_else(|| format!("there is no layer {id}"))?;
        Ok(HeldLayer::new(self.open_frozen(id)?, hold))
    }

    /// Keeps an open layer as long as the answer is there; `None` if it was removed.
    pub(crate) fn keep(self: &Arc<Self>, layer: &Arc<Layer>) -> Option<HeldLayer> {
        Some(HeldLayer::new(Arc::clone(layer), self.hold(layer.id)?))
    }

    /// Counts a record that is on disk, or is about to be, and names these layers.
    pub(crate) fn add_refs(&self, layers: impl IntoIterator<Item = LayerId>) {
        let mut forest = self.forest();
        for id in layers {
            forest.hold(id);
        }
    }

    /// Counts a record no longer that named these layers and is durably gone or replaced. What nobody needs then is
    /// removed. Blocks.
    pub(crate) fn release_refs(&self, layers: impl IntoIterator<Item = LayerId>) {
        let unneeded: Vec<LayerId> = {
            let mut forest = self.forest();
            layers.into_iter().flat_map(|id| forest.let_go(id)).collect()
        };
        self.files.remove(&unneeded);
        self.merges.notify_one();
    }

    /// Lets go of a layer that a value kept, from wherever that is dropped.
    fn let_go(&self, id: LayerId) {
        let unneeded = self.forest().let_go(id);
        if !unneeded.is_empty() {
            let files = Arc::clone(&self.files);
            // What is not removed before the daemon ends is swept away at its next start.
            self.runtime.spawn_blocking(move || files.remove(&unneeded));
        }
        self.merges.notify_one();
    }

    /// How many layers the disk with this top has.
    pub(crate) fn depth(&self, top: LayerId) -> usize {
        let forest = self.forest();
        let up = |id: &LayerId| forest.layers.get(id)?.record.parent.layer();
        std::iter::successors(Some(top), up).take(forest.layers.len()).count()
    }

    /// Whether that many hold a layer.
    pub(crate) fn is_held_by(&self, id: LayerId, holders: usize) -> bool {
        self.forest().layers.get(&id).is_some_and(|known| known.holders == holders)
    }

    /// The layers that somebody needs beside the one whose record names `own`.
    pub(crate) fn needed_beside(&self, own: &[LayerId]) -> BTreeSet<LayerId> {
        self.forest().needed_beside(own)
    }

    /// When a layer was made.
    pub(crate) fn made_unix_ms(&self, id: LayerId) -> Option<u64> {
        self.forest().layers.get(&id).map(|known| known.record.made_unix_ms)
    }

    /// Whether layers stand on the image, or are to, as far as is known: one whose record cannot be read may.
    pub(crate) fn need(&self, image: &ImageId) -> bool {
        let needs = |known: &Known| match known.record.parent {
            Parent::Layer(_) => false,
            Parent::Image(id) => id == *image,
            Parent::Carried { image: id, base, on } => {
                id == *image || base == *image || on.is_some_and(|older| older.image == *image)
            }
        };
        let forest = self.forest();
        !forest.damaged.is_empty() || forest.layers.values().any(needs)
    }

    /// The layer that takes over another VM's disk, if there is one.
    pub(crate) fn hold_carried(self: &Arc<Self>, parent: Parent) -> Option<HeldLayer> {
        let mut forest = self.forest();
        let (id, known) = forest.layers.iter().find(|(_, known)| known.record.parent == parent)?;
        let (id, layer) = (*id, known.open.upgrade()?);
        forest.hold(id).then(|| HeldLayer::new(layer, LayerHold::new(Arc::clone(self), id)))
    }

    fn opening(&self) -> MutexGuard<'_, ()> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forest(&self) -> MutexGuard<'_, Forest> {
        self.forest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the place of a derived image's disk is written.
const SCHEME: &str = "layer:";

/// The place of a layer that an image is derived from, to be opened again.
pub(crate) fn location_of(id: LayerId) -> String {
    format!("{SCHEME}{id}")
}

/// The layer at a place.
pub(crate) fn layer_at(location: &str) -> Result<LayerId, String> {
    let id = location.strip_prefix(SCHEME);
    id.ok_or_else(|| format!("'{}' is not a layer's place", location.escape_debug()))?.parse()
}

/// Opens the layers that images were derived from.
struct LayerDisks(Weak<Layers>);

impl OpenRemote for LayerDisks {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        let layers = self.0.upgrade().ok_or("the node is stopping")?;
        Ok(layers.open_frozen(layer_at(location)?)?)
    }
}
