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

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ImageId, Now};
use image::OpenRemote;
use serde::{Deserialize, Serialize};
use store::Overlay;
use tokio::sync::Notify;

use super::carried::Carried;
use super::files;
use super::images::{Attached, Images};
use crate::api::now_unix_ms;

/// Most layers of one disk. A read looks through all of them, some 50 ns each.
pub(crate) const DEPTH_MAX: usize = 64;

const RECORD: &str = "layer.json";

/// Names a layer on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct LayerId(u64);

impl LayerId {
    /// A name for a new layer.
    pub(crate) fn draw() -> LayerId {
        LayerId(rand::random())
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> String {
        id.to_string()
    }
}

impl FromStr for LayerId {
    type Err = String;

    fn from_str(text: &str) -> Result<LayerId, String> {
        let is_plain = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| is_plain);
        number.map(LayerId).ok_or_else(|| format!("'{}' names no layer", text.escape_debug()))
    }
}

impl TryFrom<String> for LayerId {
    type Error = String;

    fn try_from(text: String) -> Result<LayerId, String> {
        text.parse()
    }
}

/// What a layer stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Parent {
    /// Another layer, which is frozen.
    Layer(LayerId),
    /// An image.
    Image(ImageId),
    /// Another VM's disk, from elsewhere. The layer takes over in what that differs from its base, and is to stand on the
    /// base then.
    Carried {
        /// The image that it comes as.
        image: ImageId,
        /// The image that it was derived from.
        base: ImageId,
    },
}

impl Parent {
    /// The layer, if it is one.
    fn layer(self) -> Option<LayerId> {
        match self {
            Parent::Layer(id) => Some(id),
            Parent::Image(_) | Parent::Carried { .. } => None,
        }
    }
}

/// What is remembered of a layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    parent: Parent,
    made_unix_ms: u64,
}

/// An open layer.
pub(crate) struct Layer {
    id: LayerId,
    overlay: Arc<Overlay>,
    below: Mutex<Below>,
}

/// What an open layer stands on, kept open by it.
#[derive(Clone)]
pub(crate) enum Below {
    /// Another layer.
    Layer(Arc<Layer>),
    /// An image.
    Image(Arc<Attached>),
    /// Another VM's disk, from elsewhere; see [`Parent::Carried`].
    Carried { image: Arc<Attached>, base: Arc<Attached> },
}

impl Below {
    /// As a disk.
    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        match self {
            Below::Layer(layer) => Arc::clone(layer) as _,
            Below::Image(image) => Arc::clone(&image.volume) as _,
            Below::Carried { image, base } => {
                Arc::new(Carried::new(Arc::clone(&image.volume), Arc::clone(&base.volume)))
            }
        }
    }

    fn parent(&self) -> Parent {
        match self {
            Below::Layer(layer) => Parent::Layer(layer.id),
            Below::Image(image) => Parent::Image(image.id),
            Below::Carried { image, base } => Parent::Carried { image: image.id, base: base.id },
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
    pub(super) async fn make_durable(self: &Arc<Layer>) -> Result<(), DiskError> {
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

    fn read_now(&self, offset: u64, buf: &mut [u8]) -> Result<Now, DiskError> {
        self.overlay.read_now(offset, buf)
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

#[derive(Default)]
struct Forest {
    layers: BTreeMap<LayerId, Known>,
    /// Layers whose records cannot be read. While the node starts, they may be some that were being made.
    damaged: Vec<Damaged>,
}

struct Damaged {
    dir: PathBuf,
    /// `None` if its directory has another name than a layer's.
    id: Option<LayerId>,
    reason: String,
    /// Somebody names it, or may.
    is_needed: bool,
}

struct Known {
    record: Record,
    /// How many VMs, snapshots and derived images name it.
    holders: usize,
    children: BTreeSet<LayerId>,
    open: Weak<Layer>,
}

impl Forest {
    fn insert(&mut self, id: LayerId, record: Record, holders: usize) {
        if let Parent::Layer(parent) = record.parent
            && let Some(parent) = self.layers.get_mut(&parent)
        {
            parent.children.insert(id);
        }
        self.layers.insert(id, Known { record, holders, children: BTreeSet::new(), open: Weak::new() });
    }

    /// The layers that are held beside one hold for each time that `own` names them, and all below those.
    fn needed_beside(&self, own: &[LayerId]) -> BTreeSet<LayerId> {
        let mut needed = BTreeSet::new();
        for (id, known) in &self.layers {
            if known.holders <= own.iter().filter(|own| *own == id).count() {
                continue;
            }
            let mut at = Some(*id);
            while let Some(id) = at.filter(|id| needed.insert(*id)) {
                at = self.layers.get(&id).and_then(|known| known.record.parent.layer());
            }
        }
        needed
    }

    /// Notes that somebody names the layer. `false` if it is not there.
    fn hold(&mut self, id: LayerId) -> bool {
        for damaged in self.damaged.iter_mut().filter(|damaged| damaged.id == Some(id)) {
            damaged.is_needed = true;
        }
        let known = self.layers.get_mut(&id);
        known.map(|known| known.holders += 1).is_some()
    }

    /// Takes out the layers that were being made when the daemon ended, if all that cannot be read are such.
    fn take_torn(&mut self) -> Vec<LayerId> {
        let parents: BTreeSet<LayerId> =
            self.layers.values().filter_map(|known| known.record.parent.layer()).collect();
        let is_parent = |id: LayerId| parents.contains(&id);
        // What one that is needed stands on is not known, and may be any other.
        if self.damaged.iter().any(|damaged| damaged.is_needed || damaged.id.is_some_and(is_parent)) {
            return Vec::new();
        }
        self.damaged.drain(..).filter_map(|damaged| damaged.id).collect()
    }

    /// Holds every layer once more, for those whose records cannot be read.
    fn hold_all(&mut self) {
        for known in self.layers.values_mut() {
            known.holders += 1;
        }
    }

    /// Whether a layer can be merged into the only one that stands on it, and which that is.
    fn merges_into(&self, known: &Known) -> Option<LayerId> {
        let mut children = known.children.iter();
        let (Some(upper), None, 0) = (children.next(), children.next(), known.holders) else {
            return None;
        };
        // One that is to settle does that first.
        let settles = matches!(known.record.parent, Parent::Carried { .. });
        (!settles).then_some(*upper)
    }

    /// Takes out a layer that nobody needs, and those below it that nobody needs without it.
    fn take_unneeded(&mut self, from: LayerId) -> Vec<LayerId> {
        let mut unneeded = Vec::new();
        let mut at = Some(from);
        while let Some(id) = at.take() {
            let is_unneeded = |known: &Known| known.holders == 0 && known.children.is_empty();
            if !self.layers.get(&id).is_some_and(is_unneeded) {
                break;
            }
            let known = self.layers.remove(&id).expect("it was just looked at");
            unneeded.push(id);
            if let Parent::Layer(parent) = known.record.parent {
                if let Some(parent) = self.layers.get_mut(&parent) {
                    parent.children.remove(&id);
                }
                at = Some(parent);
            }
        }
        unneeded
    }
}

/// A layer that is to be merged into the only one that stands on it.
pub(super) struct Merge {
    pub(super) lower: Arc<Layer>,
    pub(super) upper: Arc<Layer>,
}

/// A layer that takes over another VM's disk; see [`Parent::Carried`].
pub(super) struct Settle {
    pub(super) layer: Arc<Layer>,
    pub(super) image: Arc<Attached>,
    pub(super) base: Arc<Attached>,
}

/// What became of a layer that was to stand on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stands {
    /// It does.
    Anew,
    /// Nobody needed it any more, and it was removed meanwhile.
    Gone,
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
            if let Parent::Layer(parent) = record.parent
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
        let _one_at_a_time = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
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
                Parent::Carried { image, base } => {
                    let (image, base) = (self.attached(&image)?, self.attached(&base)?);
                    return Ok((closed, Below::Carried { image, base }));
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
        self.forest().insert(id, record.clone(), 1);
        let made = self.write(id, &record, size_bytes, base);
        match made {
            Ok(overlay) => {
                let layer = self.enter(id, overlay, below);
                if matches!(record.parent, Parent::Carried { .. }) {
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
            Parent::Carried { image: id, base } => id == *image || base == *image,
        };
        let forest = self.forest();
        !forest.damaged.is_empty() || forest.layers.values().any(needs)
    }

    /// The layer that takes over another VM's disk, if there is one.
    pub(super) fn carried(&self, image: ImageId, base: ImageId) -> Option<Arc<Layer>> {
        let parent = Parent::Carried { image, base };
        self.forest().layers.values().find(|known| known.record.parent == parent)?.open.upgrade()
    }

    /// A layer that can be merged and `may` be, if both it and the one above it are open.
    pub(super) fn next_merge(&self, may: impl Fn(LayerId) -> bool) -> Option<Merge> {
        let forest = self.forest();
        forest.layers.iter().filter(|(lower, _)| may(**lower)).find_map(|(_, known)| {
            let upper = forest.layers.get(&forest.merges_into(known)?)?.open.upgrade()?;
            Some(Merge { lower: known.open.upgrade()?, upper })
        })
    }

    /// A layer that takes over another VM's disk.
    pub(super) fn next_settle(&self) -> Option<Settle> {
        self.forest().layers.values().find_map(|known| {
            let layer = known.open.upgrade()?;
            let Below::Carried { image, base } = layer.below() else { return None };
            Some(Settle { layer, image, base })
        })
    }

    /// Lets `upper`, which holds all that `lower` does, stand on what `lower` stands on; `lower` is removed. Refused if
    /// somebody came to need `lower` meanwhile.
    pub(super) fn merged(&self, Merge { lower, upper }: &Merge) -> Result<Stands, String> {
        let unneeded = {
            let mut forest = self.forest();
            let Some(known) = forest.layers.get(&lower.id) else { return Ok(Stands::Gone) };
            if forest.merges_into(known) != Some(upper.id) {
                return Err(format!("layer {} is needed by itself now", lower.id));
            }
            if let Stands::Gone = self.stand(&mut forest, upper, lower.below())? {
                return Ok(Stands::Gone);
            }
            if let Some(known) = forest.layers.get_mut(&lower.id) {
                known.children.remove(&upper.id);
            }
            forest.take_unneeded(lower.id)
        };
        self.remove(&unneeded);
        self.merges.notify_one();
        Ok(Stands::Anew)
    }

    /// Lets a layer that has taken over another VM's disk stand on the image that both have in common.
    pub(super) fn settled(&self, settle: &Settle) -> Result<Stands, String> {
        let stands = self.stand(&mut self.forest(), &settle.layer, Below::Image(Arc::clone(&settle.base)))?;
        self.merges.notify_one();
        Ok(stands)
    }

    /// Changes what a layer stands on: on disk first. Under the lock, so that nobody removes the layer meanwhile.
    fn stand(&self, forest: &mut Forest, layer: &Arc<Layer>, below: Below) -> Result<Stands, String> {
        let parent = below.parent();
        let Some(known) = forest.layers.get_mut(&layer.id) else { return Ok(Stands::Gone) };
        let record = Record { parent, made_unix_ms: known.record.made_unix_ms };
        let file = self.layer_dir(layer.id).join(RECORD);
        tokio::task::block_in_place(|| files::write_record(&file, &record))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))?;
        known.record = record;
        if let Parent::Layer(parent) = parent
            && let Some(parent) = forest.layers.get_mut(&parent)
        {
            parent.children.insert(layer.id);
        }
        layer.overlay.set_base(below.disk());
        *layer.below.lock().unwrap_or_else(PoisonError::into_inner) = below;
        Ok(Stands::Anew)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn record(parent: Parent) -> Record {
        Record { parent, made_unix_ms: 0 }
    }

    fn image() -> Parent {
        Parent::Image(ImageId::of_root_page(b"image"))
    }

    #[test]
    fn what_nobody_needs_is_taken_out_down_to_what_somebody_does() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..5).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 0);
        forest.insert(ids[3], record(Parent::Layer(ids[2])), 1);
        forest.insert(ids[4], record(Parent::Layer(ids[0])), 1);
        assert!(forest.take_unneeded(ids[3]).is_empty(), "it is held");
        forest.layers.get_mut(&ids[3]).unwrap().holders = 0;
        assert_eq!(forest.take_unneeded(ids[3]), [ids[3], ids[2]]);
        forest.layers.get_mut(&ids[1]).unwrap().holders = 0;
        assert_eq!(forest.take_unneeded(ids[1]), [ids[1]]);
        assert_eq!(forest.layers.keys().copied().collect::<Vec<_>>(), [ids[0], ids[4]]);
    }

    #[test]
    fn a_layer_is_shared_if_somebody_else_holds_it_or_one_that_stands_on_it() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..6).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 1);
        forest.insert(ids[3], record(Parent::Layer(ids[1])), 2);
        forest.insert(ids[4], record(Parent::Layer(ids[0])), 1);
        let needed = |own: &[LayerId]| forest.needed_beside(own).into_iter().collect::<Vec<_>>();
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[3], ids[4]]), []);
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[3]]), [ids[0], ids[4]]);
        assert_eq!(needed(&[ids[1], ids[2], ids[3], ids[4]]), [ids[0], ids[1], ids[3]]);
    }

    #[test]
    fn while_a_record_cannot_be_read_what_it_may_name_neither_goes_nor_is_merged() {
        let mut forest = Forest::default();
        let ids: Vec<LayerId> = (0..3).map(LayerId).collect();
        forest.insert(ids[0], record(image()), 0);
        forest.insert(ids[1], record(Parent::Layer(ids[0])), 1);
        let merges_into = |forest: &Forest, id| forest.merges_into(&forest.layers[&id]);
        assert_eq!(merges_into(&forest, ids[0]), Some(ids[1]));

        forest.hold_all();
        assert_eq!(merges_into(&forest, ids[0]), None);
        forest.layers.get_mut(&ids[1]).unwrap().holders -= 1;
        assert!(forest.take_unneeded(ids[1]).is_empty(), "what was there when the record could not be read");
        forest.insert(ids[2], record(Parent::Layer(ids[1])), 0);
        assert_eq!(forest.take_unneeded(ids[2]), [ids[2]], "what was made since");
    }

    #[test]
    fn a_torn_record_is_what_a_killed_daemon_was_making_only_if_nobody_may_name_it() {
        let torn = |id| Damaged {
            dir: PathBuf::new(),
            id: Some(LayerId(id)),
            reason: "it is torn".to_owned(),
            is_needed: false,
        };
        let forest = || {
            let mut forest = Forest::default();
            forest.insert(LayerId(0), record(image()), 1);
            forest.damaged.extend([torn(1), torn(2)]);
            forest
        };
        let mut unnamed = forest();
        assert_eq!(unnamed.take_torn(), [LayerId(1), LayerId(2)]);
        assert!(unnamed.damaged.is_empty());

        let mut held = forest();
        assert!(!held.hold(LayerId(2)));
        let mut below = forest();
        below.insert(LayerId(3), record(Parent::Layer(LayerId(1))), 1);
        let mut foreign = forest();
        foreign.damaged.push(Damaged { id: None, is_needed: true, ..torn(4) });
        for mut forest in [held, below, foreign] {
            let damaged = forest.damaged.len();
            assert!(forest.take_torn().is_empty(), "what the damaged one stands on may be any other");
            assert_eq!(forest.damaged.len(), damaged);
        }
    }

    #[test]
    fn a_layer_name_is_sixteen_digits_and_nothing_else() {
        let id = LayerId(0xab);
        assert_eq!(id.to_string(), "00000000000000ab");
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in ["", "ab", "../../etc/passwd", "00000000000000ag", "+0000000000000ab"] {
            assert!(bad.parse::<LayerId>().is_err(), "{bad}");
        }
    }
}
