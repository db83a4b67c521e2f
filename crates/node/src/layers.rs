//! The layers of a node's disks: a forest whose roots stand on images.
//!
//! A layer is a directory with an overlay and a record of what it stands on. VMs, snapshots and derived images
//! *hold* layers; a layer that nobody holds and on which none stands is removed. VMs share what is frozen, so a
//! clone on the same node is a new layer on an old one and costs nothing.
//!
//! Consistency: the forest is in memory under one lock, with the number of those who hold each layer. Whoever makes a
//! layer holds it until a record that names it is written, and whoever gives one up has written its record before.
//! Crash: what no record names is swept away at the next start, unless a record cannot be read: then all that was
//! there stays as it is, since that record may name it, and neither goes nor is merged until a start at which all can.
//! A layer that was being made may be torn, its record too; nothing names it yet, so that is no damage.
//! Retries: none. Opening, making and removing block the thread.

mod forest;
mod id;
mod layer;
mod merging;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use block::{Disk, ImageId};
use image::OpenRemote;
use store::Overlay;
use tokio::sync::Notify;

use self::forest::{Damaged, Forest, Known};
pub(crate) use self::id::LayerId;
use self::layer::Record;
pub(crate) use self::layer::{Below, Layer, Older, Parent};
pub(super) use self::merging::{Merge, Settle, Stands, Way};
use super::files;
use super::images::{Attached, Images};
use control::api::now_unix_ms;

/// Most layers of one disk. A read looks through all of them, some 50 ns each.
pub(crate) const DEPTH_MAX: usize = 64;

const RECORD: &str = "layer.json";

/// All layers of a node.
pub(crate) struct Layers {
    dir: PathBuf,
    images: Arc<Images>,
    forest: Mutex<Forest>,
    /// Held while layers are opened, so that each is opened once.
    opening: Mutex<()>,
    /// Told when a layer may have become fit for merging.
    pub(super) merges: Notify,
    /// Told when a layer is to settle.
    pub(super) settles: Notify,
}

impl Layers {
    /// Reads which layers there are. What cannot be read is said.
    pub(crate) fn open(dir: PathBuf, images: Arc<Images>) -> std::io::Result<Layers> {
        let mut forest = Forest::default();
        let mut records = Vec::new();
        for dir in files::sweep(&dir)? {
            let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let id = name.parse::<LayerId>();
            let read = id.clone().and_then(|id| Ok((id, files::read_record(&dir.join(RECORD))?)));
            match read {
                Ok(record) => records.push(record),
                Err(_) if files::is_absent(&dir.join(RECORD)) => fs::remove_dir_all(&dir)?,
                Err(reason) => {
                    forest.damaged.push(Damaged { dir, is_needed: id.is_err(), id: id.ok(), reason });
                }
            }
        }
        // Twice, since a child may come before its parent.
        for (id, record) in &records {
            forest.insert(*id, Record::clone(record), 0);
        }
        for (id, record) in &records {
            if let Some(parent) = record.parent.layer()
                && let Some(parent) = forest.layers.get_mut(&parent)
            {
                parent.children.insert(*id);
            }
        }
        let (forest, opening) = (Mutex::new(forest), Mutex::new(()));
        Ok(Layers { dir, images, forest, opening, merges: Notify::new(), settles: Notify::new() })
    }

    /// Removes what nobody holds. To be called once all who hold layers have said so; `certain` says whether all
    /// of them could be asked.
    pub(crate) fn sweep(&self, certain: bool) {
        let mut forest = self.forest();
        let torn = if certain { forest.take_torn() } else { Vec::new() };
        for id in &torn {
            tracing::info!(layer = %id, "removing a layer that was being made");
        }
        for Damaged { dir, reason, .. } in &forest.damaged {
            tracing::error!(dir = %dir.display(), reason, "a layer cannot be used; no layer is removed until it is mended or moved away");
        }
        if !certain || !forest.damaged.is_empty() {
            tracing::warn!("all layers are kept as they are: some records that may name them cannot be read");
            forest.hold_all();
        }
        let all: Vec<LayerId> = forest.layers.keys().copied().collect();
        let unneeded: Vec<LayerId> = all.into_iter().flat_map(|id| forest.take_unneeded(id)).collect();
        drop(forest);
        self.remove(&torn);
        self.remove(&unneeded);
        self.merges.notify_one();
        self.settles.notify_one();
    }

    /// Opens the layer that a VM writes to.
    pub(crate) fn open_top(&self, id: LayerId) -> Result<Arc<Layer>, String> {
        self.open_chain(id)
    }

    /// Opens a layer that takes no changes.
    pub(crate) fn open_frozen(&self, id: LayerId) -> Result<Arc<Layer>, String> {
        let layer = self.open_chain(id)?;
        layer.overlay.set_frozen();
        Ok(layer)
    }

    fn open_chain(&self, id: LayerId) -> Result<Arc<Layer>, String> {
        let _one_at_a_time = self.opening();
        let (closed, mut below) = self.first_open(id)?;
        for id in closed.into_iter().rev() {
            if let Below::Layer(parent) = &below {
                parent.overlay.set_frozen();
            }
            let overlay = Overlay::open(&self.layer_dir(id), below.disk()).map_err(|e| e.to_string())?;
            below = Below::Layer(self.enter(id, overlay, below));
        }
        match below {
            Below::Layer(layer) => Ok(layer),
            Below::Image(_) | Below::Carried { .. } => Err(format!("layer {id} is not there")),
        }
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

    /// Makes an empty layer of this new name, which the caller holds.
    pub(crate) fn make(&self, id: LayerId, below: Below, size_bytes: u64) -> Result<Arc<Layer>, String> {
        let base = below.disk();
        self.make_over(id, below, size_bytes, base)
    }

    /// The same; what it does not hold is read through `base`, which reads as what is below.
    pub(crate) fn make_over(
        &self,
        id: LayerId,
        below: Below,
        size_bytes: u64,
        base: Arc<dyn Disk>,
    ) -> Result<Arc<Layer>, String> {
        let record = Record { parent: below.parent(), made_unix_ms: now_unix_ms() };
        // What is to settle is opened as soon as it is known.
        let _not_before_it_is_made = record.parent.is_carried().then(|| self.opening());
        self.forest().insert(id, record.clone(), 1);
        let made = self.write(id, &record, size_bytes, base);
        match made {
            Ok(overlay) => {
                let layer = self.enter(id, overlay, below);
                if record.parent.is_carried() {
                    self.settles.notify_one();
                }
                Ok(layer)
            }
            Err(reason) => {
                self.release(id);
                Err(reason)
            }
        }
    }

    fn write(
        &self,
        id: LayerId,
        record: &Record,
        size_bytes: u64,
        base: Arc<dyn Disk>,
    ) -> Result<Overlay, String> {
        let dir = self.layer_dir(id);
        let failed = |e: std::io::Error| format!("{}: {e}", dir.display());
        fs::create_dir(&dir).map_err(failed)?;
        // Nobody names the layer yet, so that all of it is written before any of it is synced.
        let record = files::write_first_record(&dir.join(RECORD), record).map_err(failed)?;
        let overlay = Overlay::create(&dir, size_bytes, base).map_err(|e| e.to_string())?;
        record.sync_all().map_err(failed)?;
        let overlay = overlay.sync().map_err(|e| e.to_string())?;
        files::sync_dir(&dir).and_then(|()| files::sync_dir(&self.dir)).map_err(failed)?;
        Ok(overlay)
    }

    /// Notes that somebody names the layer. `false` if it is not there.
    pub(crate) fn hold(&self, id: LayerId) -> bool {
        self.forest().hold(id)
    }

    /// Notes that somebody names the layer no longer. What nobody needs then is removed.
    pub(crate) fn release(&self, id: LayerId) {
        let unneeded = {
            let mut forest = self.forest();
            if let Some(known) = forest.layers.get_mut(&id) {
                known.holders = known.holders.saturating_sub(1);
            }
            forest.take_unneeded(id)
        };
        self.remove(&unneeded);
        self.merges.notify_one();
    }

    /// How many layers the disk with this top has.
    pub(crate) fn depth(&self, top: LayerId) -> usize {
        let forest = self.forest();
        let up = |id: &LayerId| forest.layers.get(id)?.record.parent.layer();
        std::iter::successors(Some(top), up).take(forest.layers.len()).count()
    }

    /// The layers that somebody needs beside the one who holds `own`.
    pub(super) fn needed_beside(&self, own: &[LayerId]) -> BTreeSet<LayerId> {
        self.forest().needed_beside(own)
    }

    /// When a layer was made.
    pub(super) fn made_unix_ms(&self, id: LayerId) -> Option<u64> {
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
    pub(super) fn carried(&self, parent: Parent) -> Option<Arc<Layer>> {
        self.forest().layers.values().find(|known| known.record.parent == parent)?.open.upgrade()
    }

    fn remove(&self, layers: &[LayerId]) {
        for id in layers {
            let dir = self.layer_dir(*id);
            let removed = match fs::remove_file(dir.join(RECORD)) {
                // What has no record is swept away at the next start, whatever else is left of it.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => fs::remove_dir_all(&dir),
            };
            if let Err(error) = removed
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(dir = %dir.display(), %error, "a layer cannot be removed");
            }
        }
    }

    fn layer_dir(&self, id: LayerId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    fn opening(&self) -> MutexGuard<'_, ()> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forest(&self) -> MutexGuard<'_, Forest> {
        self.forest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the layers that images were derived from.
#[derive(Default)]
pub(crate) struct LayerDisks {
    /// Unset while the node starts, when nothing is read yet.
    layers: OnceLock<Weak<Layers>>,
}

/// How the place of a derived image's disk is written.
const SCHEME: &str = "layer:";

impl LayerDisks {
    /// The place of a layer, to be opened again.
    pub(crate) fn location(id: LayerId) -> String {
        format!("{SCHEME}{id}")
    }

    /// The layer at a place.
    pub(crate) fn layer_at(location: &str) -> Result<LayerId, String> {
        let id = location.strip_prefix(SCHEME);
        id.ok_or_else(|| format!("'{}' is no layer", location.escape_debug()))?.parse()
    }

    /// Opens layers of these from now on.
    pub(crate) fn are_in(&self, layers: &Arc<Layers>) {
        // A node has but one set of layers.
        let _ = self.layers.set(Arc::downgrade(layers));
    }
}

impl OpenRemote for LayerDisks {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        let layers = self.layers.get().and_then(Weak::upgrade).ok_or("the node is starting or stopping")?;
        let layer = layers.open_frozen(LayerDisks::layer_at(location)?)?;
        Ok(layer)
    }
}
