//! The images that a node serves: attaching, detaching, and where their chunks come from.
//!
//! An attached image is remembered on disk with its root page and its last placement, so that a node
//! that restarts while Volt is away serves and boots what it served before. Attaching is serialized:
//! it takes milliseconds, and two VMs that want the same image at once must find one attachment.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::{BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, ImageName, NodeName, Priority};
use image::{BootProfile, DerivedImage, ImageVolume, Kind, OriginImage, Remotes, RootPage};
use link::{Fetcher, Uplinks};
use planner::{Placement, Role};
use serde::{Deserialize, Serialize};
use store::CacheGroup;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::departing::Departing;
use super::exports::ExportSocket;
use super::files::{self, Layout};
use super::fill::Fill;
use super::layers::{LayerDisks, LayerId};
use super::profile::{Profile, Way};
use super::remote::RemoteDisks;
use super::unused::{Holders, KeepWarm, Stay, Usage};
use control::api::compute::NodeImage;
use control::api::profile::ProfileOffer;
use control::api::volt::ImageRecord;
use control::http::ApiError;
use control::units::ByteSize;

/// All images of a node.
pub(crate) struct Images {
    layout: Layout,
    cache: Arc<CacheGroup>,
    uplinks: Arc<Uplinks>,
    /// What opens the disks that images of this origin lie on.
    pub(super) remotes: Arc<RemoteDisks>,
    /// What opens the layers that images were derived from.
    pub(super) layers: Arc<LayerDisks>,
    pub(super) attached: RwLock<HashMap<ImageId, Arc<Attached>>>,
    /// Takes records of boots to Volt.
    records: mpsc::Sender<BootProfile>,
    pub(super) changed: Notify,
    /// Images that are detached but still served.
    pub(super) departing: Departing,
    /// How long an image that nobody uses stays attached.
    pub(super) keep_warm: KeepWarm,
    /// Told when it is to be looked what is used.
    pub(super) look: Notify,
    /// How many images are being attached.
    pub(super) attaching: AtomicUsize,
    /// What Volt pushed about the image that is being attached, before its answer was dealt with.
    early: Mutex<Option<Early>>,
    /// How many images could not be attached again when the daemon started. What they may need stays.
    unrestored: AtomicUsize,
    /// Held while an image is attached or detached.
    pub(super) changing: tokio::sync::Mutex<()>,
}

/// Pushes about one image.
struct Early {
    image: ImageId,
    placement: Option<Placement>,
    profile: Option<ProfileOffer>,
}

/// An image is being attached, as long as this is there.
#[must_use]
pub(crate) struct Attaching<'a>(&'a Images);

impl Drop for Attaching<'_> {
    fn drop(&mut self) {
        self.0.attaching.fetch_sub(1, Ordering::AcqRel);
        self.0.changed.notify_waiters();
    }
}

/// One attached image.
pub(crate) struct Attached {
    pub(crate) id: ImageId,
    pub(crate) root: RootPage,
    pub(crate) volume: Arc<ImageVolume>,
    /// The same for those that open it from outside, so that it is known whether anybody has.
    pub(super) exported: Arc<ImageVolume>,
    /// Its boot profile.
    pub(crate) profile: Arc<Profile>,
    upstream: Arc<Switch>,
    /// Its chunks, as children get them.
    pub(super) served: Arc<dyn ChunkSource>,
    /// How many stripes its placement has.
    stripes: watch::Sender<usize>,
    way: Way,
    since: Instant,
    pub(super) holders: Holders,
    pub(super) usage: Mutex<Usage>,
    state: Mutex<State>,
}

/// Where the cache group gets what it does not have.
#[derive(Clone)]
enum Upstream {
    Origin(Arc<OriginImage>),
    /// This node has what differs from another image, and serves the rest as it serves that.
    Derived(Arc<DerivedImage>),
    Relay(Arc<Fetcher>),
}

/// An upstream that can be replaced while VMs read through it: a relay becomes an origin, or an origin's
/// file moves, when the image is added again.
struct Switch(RwLock<Upstream>);

impl Switch {
    fn current(&self) -> Upstream {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What this node is for the image.
    fn role(&self) -> Role {
        match self.current() {
            Upstream::Origin(_) | Upstream::Derived(_) => Role::Origin,
            Upstream::Relay(_) => Role::Relay,
        }
    }
}

impl ChunkSource for Switch {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let current = self.current();
        Box::pin(async move {
            match current {
                Upstream::Origin(origin) => origin.fetch(chunk, priority).await,
                Upstream::Derived(derived) => derived.fetch(chunk, priority).await,
                Upstream::Relay(fetcher) => fetcher.fetch(chunk, priority).await,
            }
        })
    }
}

pub(super) struct State {
    pub(super) names: BTreeSet<ImageName>,
    placement: Placement,
    pub(super) exports: HashMap<ImageName, ExportSocket>,
    /// Gets all of it into the cache, if that is wanted.
    fill: Option<Fill>,
    /// Names that carry a VM's disk to other nodes, and go once those have it.
    passing: BTreeSet<ImageName>,
    pub(super) stay: Stay,
}

/// What is remembered of an attached image.
#[derive(Serialize, Deserialize)]
struct AttachedRecord {
    names: BTreeSet<ImageName>,
    root_page: String,
    placement: Placement,
    #[serde(default)]
    fill: bool,
    #[serde(default)]
    passing: BTreeSet<ImageName>,
    #[serde(default)]
    stay: Stay,
}

impl Images {
    /// No image yet. Records of boots go to `records`.
    pub(crate) fn new(
        layout: Layout,
        cache: Arc<CacheGroup>,
        uplinks: Arc<Uplinks>,
        remotes: Arc<RemoteDisks>,
        records: mpsc::Sender<BootProfile>,
        keep_warm: KeepWarm,
    ) -> Images {
        Images {
            layout,
            cache,
            uplinks,
            remotes,
            layers: Arc::default(),
            records,
            attached: RwLock::default(),
            changed: Notify::new(),
            departing: Departing::default(),
            keep_warm,
            look: Notify::new(),
            attaching: AtomicUsize::new(0),
            early: Mutex::new(None),
            unrestored: AtomicUsize::new(0),
            changing: tokio::sync::Mutex::new(()),
        }
    }

    /// Attaches again what was attached when the daemon ended. What cannot be is said and left out.
    pub(crate) fn restore(&self) -> std::io::Result<()> {
        image::sweep(&self.layout.images())?;
        let mut files = files::sweep(&self.layout.attached())?;
        // An image comes after the one that it was derived from, which may be derived itself.
        while !files.is_empty() {
            let (ready, waiting): (Vec<_>, Vec<_>) =
                files.into_iter().partition(|file| !self.waits_for_base(file));
            let stuck = ready.is_empty();
            for file in if stuck { &waiting } else { &ready } {
                if let Err(reason) = self.restore_one(file) {
                    self.unrestored.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(file = %file.display(), reason, "an image cannot be attached again");
                }
            }
            files = if stuck { Vec::new() } else { waiting };
        }
        remove_unrecorded(&self.layout)?;
        self.forget_unused_remotes()
    }

    /// Whether the image of this record was derived from one that is not attached yet.
    fn waits_for_base(&self, file: &Path) -> bool {
        let id = file.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        let kind = id.map(|id: ImageId| image::kind(&self.origin_dir(&id)));
        matches!(kind, Some(Ok(Kind::Derived { base, .. })) if self.by_id(&base).is_none())
    }

    /// The layers that images on this node were derived from; the error says that not all are known.
    pub(crate) fn derived_from(&self) -> Result<Vec<LayerId>, String> {
        let mut layers = Vec::new();
        for id in image::list(&self.layout.images()).map_err(|e| e.to_string())? {
            let kind = image::kind(&self.origin_dir(&id)).map_err(|e| e.to_string())?;
            if let Kind::Derived { location, .. } = kind {
                layers.push(LayerDisks::layer_at(&location)?);
            }
        }
        Ok(layers)
    }

    /// Whether another image on this node was derived from this one, or may have been: one that could not be
    /// attached again counts too.
    pub(crate) fn is_base(&self, id: &ImageId) -> bool {
        let is_derived_from_it = |image: &ImageId| match image::kind(&self.origin_dir(image)) {
            Ok(Kind::Derived { base, .. }) => base == *id,
            Ok(Kind::Imported) => false,
            Err(_) => true,
        };
        image::list(&self.layout.images()).map_or(true, |images| images.iter().any(is_derived_from_it))
    }

    /// Forgets what opens the remote disks that no image lies on. An image that could not be attached again may
    /// lie on any.
    pub(super) fn forget_unused_remotes(&self) -> std::io::Result<()> {
        if self.unrestored.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let origins: Vec<Arc<OriginImage>> = self.all().iter().filter_map(|image| image.origin()).collect();
        let used: Vec<PathBuf> = origins.iter().map(|origin| origin.describe().path).collect();
        self.remotes.retain(|location| used.iter().any(|path| path.as_os_str() == location))
    }

    fn restore_one(&self, file: &Path) -> Result<(), String> {
        let record: AttachedRecord = files::read_record(file)?;
        let root = decode_root(&record.root_page)?;
        let attached = self.make(root, record.placement, ProfileOffer::default(), Instant::now())?;
        for name in record.names {
            self.add_export(&attached, name)?;
        }
        if record.fill {
            attached.fill();
        }
        {
            let mut state = attached.state();
            (state.passing, state.stay) = (record.passing, record.stay);
        }
        self.insert(attached);
        Ok(())
    }

    /// The attached image of this name.
    pub(crate) fn by_name(&self, name: &ImageName) -> Option<Arc<Attached>> {
        self.all().into_iter().find(|attached| attached.state().names.contains(name))
    }

    /// The attached image of this id.
    pub(crate) fn by_id(&self, id: &ImageId) -> Option<Arc<Attached>> {
        self.attached.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All attached images, by id.
    pub(crate) fn all(&self) -> Vec<Arc<Attached>> {
        let mut all: Vec<_> =
            self.attached.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        all.sort_by_key(|attached| attached.id);
        all
    }

    /// Whether an image can be exported under `name` here. To be asked before anything is made.
    pub(crate) fn must_have_room_for(&self, name: &ImageName) -> Result<(), ApiError> {
        self.layout.must_have_room_for(&name.file_name())
    }

    /// To be called before Volt is asked to attach an image, and kept until that is done: forgets pushes from before,
    /// and lets children wait that ask for an image that is not attached.
    pub(crate) fn expect_pushes(&self) -> Attaching<'_> {
        *self.early.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.attaching.fetch_add(1, Ordering::AcqRel);
        Attaching(self)
    }

    /// Serves an image that was asked for at `asked` and that Volt placed this node for, or gives one that is
    /// served a further name. The caller holds `changing`.
    pub(crate) fn attach(
        &self,
        record: &ImageRecord,
        placement: Placement,
        profile: ProfileOffer,
        asked: Instant,
    ) -> Result<Arc<Attached>, String> {
        let root = decode_root(&record.root_page)?;
        if root.id() != record.id {
            return Err(format!(
                "Volt's catalog is damaged: the root page of '{}' is that of image {}, not {}",
                record.name,
                root.id().short(),
                record.id.short()
            ));
        }
        let attached = match self.by_id(&record.id) {
            Some(attached) => {
                let upstream = self.upstream(&attached.id, &placement)?;
                *attached.upstream.0.write().unwrap_or_else(PoisonError::into_inner) = upstream;
                attached.stripes.send_replace(placement.stripes.len());
                attached.state().placement = placement;
                attached.profile.offer(profile);
                attached
            }
            None => self.make(root, placement, profile, asked)?,
        };
        self.add_export(&attached, record.name.clone())?;
        // A push that overtook Volt's answer is newer than the answer. Under the lock, a push either finds
        // the image or leaves what it says here.
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        self.insert(Arc::clone(&attached));
        if let Some(early) = early.take().filter(|early| early.image == attached.id) {
            if let Some(placement) = early.placement {
                attached.place(placement);
            }
            if let Some(profile) = early.profile {
                attached.profile.offer(profile);
            }
        }
        drop(early);
        self.save(&attached)?;
        Ok(attached)
    }

    /// Gets all of an image into the cache, now and whenever the daemon starts. Asking again changes nothing.
    pub(crate) fn fill(&self, attached: &Attached) -> Result<(), ApiError> {
        let chunks = attached.root.chunk_count() - attached.root.zero_chunks();
        let room = self.cache.stats().capacity_chunks;
        if chunks > room {
            let bytes = |chunks: u64| ByteSize(chunks * block::limits::CHUNK_BYTES as u64);
            return Err(ApiError::conflict(
                "cache_too_small",
                format!(
                    "the image has {} of data, and the cache has room for {}",
                    bytes(chunks),
                    bytes(room)
                ),
            )
            .with_hint("give the node more room with 'virtman cache add' or --cache"));
        }
        attached.fill();
        self.save(attached).map_err(ApiError::internal)
    }

    /// Takes a name from an image, and the image out of service with its last one. The caller holds
    /// `changing` and knows that nobody uses it.
    pub(crate) fn detach(&self, attached: &Attached, name: &ImageName) -> Result<Detached, String> {
        let detached = {
            let mut all = self.attached.write().unwrap_or_else(PoisonError::into_inner);
            let mut state = attached.state();
            let is_last = state.names.iter().all(|other| other == name);
            if is_last && attached.is_held() {
                return Ok(Detached::Held);
            }
            state.names.remove(name);
            state.passing.remove(name);
            state.exports.remove(name);
            if is_last {
                if attached.role() == Role::Relay {
                    self.departing.begin(attached.id, Arc::clone(&attached.served), Instant::now());
                }
                all.remove(&attached.id);
                Detached::Image
            } else {
                Detached::Name
            }
        };
        if detached == Detached::Name {
            self.save(attached)?;
            return Ok(detached);
        }
        let file = self.record_file(&attached.id);
        std::fs::remove_file(&file).map_err(|e| format!("cannot remove {}: {e}", file.display()))?;
        Ok(detached)
    }

    /// Volt moved this node in an image's hierarchy.
    pub(crate) fn place(&self, id: &ImageId, placement: Placement) {
        let Some(attached) = self.by_id_or(id, |early| early.placement = Some(placement.clone())) else {
            return;
        };
        if !attached.place(placement) {
            return;
        }
        if let Err(reason) = self.save(&attached) {
            tracing::error!(image = %id, reason, "a placement cannot be remembered; after a restart the old one is used until Volt is reached");
        }
    }

    /// Volt has another boot profile of an image.
    pub(crate) fn offer_profile(&self, id: &ImageId, offer: ProfileOffer) {
        if let Some(attached) = self.by_id_or(id, |early| early.profile = Some(offer.clone())) {
            attached.profile.offer(offer);
        }
    }

    /// The attached image of this id; else what was pushed about it is noted, in case it is being attached.
    fn by_id_or(&self, id: &ImageId, note: impl FnOnce(&mut Early)) -> Option<Arc<Attached>> {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        let attached = self.by_id(id);
        if attached.is_none() {
            let known = early.take().filter(|early| early.image == *id);
            note(early.insert(known.unwrap_or(Early { image: *id, placement: None, profile: None })));
        }
        attached
    }

    /// Where the directory of an image lies whose origin this node is.
    pub(crate) fn origin_dir(&self, id: &ImageId) -> PathBuf {
        self.layout.images().join(id.to_string())
    }

    fn make(
        &self,
        root: RootPage,
        placement: Placement,
        profile: ProfileOffer,
        asked: Instant,
    ) -> Result<Arc<Attached>, String> {
        let id = root.id();
        let upstream = Arc::new(Switch(RwLock::new(self.upstream(&id, &placement)?)));
        let source = self.cache.over(Arc::clone(&upstream) as _);
        let served = self.cache.over_for_children(Arc::clone(&upstream) as _);
        let volume = Arc::new(ImageVolume::new(root.clone(), Arc::clone(&source)));
        let exported = Arc::new(ImageVolume::new(root.clone(), Arc::clone(&source)));
        let stripes = watch::Sender::new(placement.stripes.len());
        let way = Way {
            volume: Arc::clone(&volume),
            source: Arc::clone(&source),
            cache: Arc::clone(&self.cache),
            stripes: stripes.subscribe(),
            role: {
                let upstream = Arc::clone(&upstream);
                Arc::new(move || upstream.role())
            },
        };
        let profile = Arc::new(Profile::new(way.clone(), profile, asked, self.records.clone()));
        let names = BTreeSet::new();
        let state = Mutex::new(State {
            names,
            placement,
            exports: HashMap::new(),
            fill: None,
            passing: BTreeSet::new(),
            stay: Stay::WhileUsed,
        });
        Ok(Arc::new(Attached {
            id,
            root,
            volume,
            exported,
            profile,
            upstream,
            served,
            stripes,
            way,
            since: Instant::now(),
            holders: Holders::default(),
            usage: Mutex::default(),
            state,
        }))
    }

    /// The node's own copy if it is an origin of the image, else the parents that Volt named.
    fn upstream(&self, id: &ImageId, placement: &Placement) -> Result<Upstream, String> {
        let dir = self.origin_dir(id);
        if dir.exists() {
            if let Kind::Derived { base, .. } = image::kind(&dir).map_err(|e| e.to_string())? {
                return self.open_derived(&dir, &base);
            }
            let remotes = Remotes { opener: Arc::clone(&self.remotes) as _, runtime: Handle::current() };
            let opened = tokio::task::block_in_place(|| OriginImage::open_with(&dir, remotes));
            return Ok(Upstream::Origin(Arc::new(opened.map_err(|e| e.to_string())?)));
        }
        let fetcher = Arc::new(Fetcher::new(*id, Arc::clone(&self.uplinks)));
        fetcher.set_parents(&parents_of(placement));
        Ok(Upstream::Relay(fetcher))
    }

    fn open_derived(&self, dir: &Path, base: &ImageId) -> Result<Upstream, String> {
        let base = self
            .by_id(base)
            .ok_or_else(|| format!("it was derived from image {}, which is not attached", base.short()))?;
        // Not through the cache: that is asked before, and would wait for itself.
        let source = Arc::clone(&base.upstream) as _;
        let opener = Arc::clone(&self.layers) as _;
        let opened = tokio::task::block_in_place(|| DerivedImage::open(dir, opener, source));
        Ok(Upstream::Derived(Arc::new(opened.map_err(|e| e.to_string())?)))
    }

    /// Has a name of an image removed from the catalog once no other node uses it, if this one is an origin of it.
    pub(crate) fn let_pass(&self, attached: &Attached, name: &ImageName) -> Result<(), String> {
        attached.state().passing.insert(name.clone());
        self.save(attached)
    }

    fn add_export(&self, attached: &Attached, name: ImageName) -> Result<(), String> {
        let mut state = attached.state();
        if state.exports.contains_key(&name) {
            return Ok(());
        }
        let path = self.volume_socket(&name);
        let export = ExportSocket::open(path.clone(), name.to_string(), Arc::clone(&attached.exported) as _)
            .map_err(|e| format!("cannot open the socket {}: {e}", path.display()))?;
        state.exports.insert(name.clone(), export);
        state.names.insert(name);
        Ok(())
    }

    /// The NBD URI of an image's volume.
    pub(crate) fn export_uri(&self, name: &ImageName) -> String {
        ExportSocket::uri(&self.volume_socket(name), name.as_str())
    }

    fn volume_socket(&self, name: &ImageName) -> PathBuf {
        self.layout.volumes().join(format!("{}.sock", name.file_name()))
    }

    fn insert(&self, attached: Arc<Attached>) {
        self.departing.forget(&attached.id);
        self.attached.write().unwrap_or_else(PoisonError::into_inner).insert(attached.id, attached);
        self.changed.notify_waiters();
    }

    fn record_file(&self, id: &ImageId) -> PathBuf {
        record_file(&self.layout, id)
    }

    pub(super) fn save(&self, attached: &Attached) -> Result<(), String> {
        let record = {
            let state = attached.state();
            AttachedRecord {
                names: state.names.clone(),
                root_page: BASE64.encode(attached.root.encode()),
                placement: state.placement.clone(),
                fill: state.fill.is_some(),
                passing: state.passing.clone(),
                stay: state.stay,
            }
        };
        let file = self.record_file(&attached.id);
        tokio::task::block_in_place(|| files::write_record(&file, &record))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// An image as the API shows it.
    pub(crate) fn describe(&self, attached: &Attached, vms: usize) -> NodeImage {
        // Before the lock, which that takes too.
        let detaches_in_ms = attached.detaches_in_ms(self.keep_warm);
        let state = attached.state();
        let export = state.names.first().map(|name| self.export_uri(name));
        NodeImage {
            names: state.names.iter().cloned().collect(),
            id: attached.id,
            size_bytes: attached.root.size_bytes(),
            chunks: attached.root.chunk_count(),
            zero_chunks: attached.root.zero_chunks(),
            role: match attached.role() {
                Role::Origin => "origin".to_owned(),
                Role::Relay => "relay".to_owned(),
            },
            source: match attached.upstream.current() {
                Upstream::Origin(origin) => Some(origin.describe().path.display().to_string()),
                Upstream::Derived(derived) => {
                    Some(format!("{} on {}", derived.location(), derived.base().short()))
                }
                Upstream::Relay(_) => None,
            },
            parents: parent_names(&state.placement),
            export: export.unwrap_or_default(),
            vms,
            profile: attached.profile.describe(),
            fill: state.fill.as_ref().map(Fill::describe),
            detaches_in_ms,
        }
    }
}

/// What detaching a name led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Detached {
    /// The image has other names and stays in service.
    Name,
    /// The image is out of service.
    Image,
    /// Nothing: somebody is about to use it.
    Held,
}

impl Attached {
    /// What this node is for the image.
    pub(crate) fn role(&self) -> Role {
        self.upstream.role()
    }

    /// The origin's side of the image, on an origin.
    pub(crate) fn origin(&self) -> Option<Arc<OriginImage>> {
        match self.upstream.current() {
            Upstream::Origin(origin) => Some(origin),
            Upstream::Derived(_) | Upstream::Relay(_) => None,
        }
    }

    /// What differs from the image that it was derived from, on the node that derived it.
    pub(crate) fn derived(&self) -> Option<Arc<DerivedImage>> {
        match self.upstream.current() {
            Upstream::Derived(derived) => Some(derived),
            Upstream::Origin(_) | Upstream::Relay(_) => None,
        }
    }

    /// Whether it was attached so long ago, or before the daemon started.
    pub(crate) fn is_older_than(&self, age: Duration) -> bool {
        self.since.elapsed() > age
    }

    /// Its names that go once no other node uses them.
    pub(crate) fn passing(&self) -> Vec<ImageName> {
        self.state().passing.iter().cloned().collect()
    }

    /// Where its chunks come from and go to.
    pub(super) fn way(&self) -> &Way {
        &self.way
    }

    fn fill(&self) {
        let mut state = self.state();
        if state.fill.is_none() {
            state.fill = Some(Fill::begin(self.way.clone()));
        }
    }

    /// Whom it is fetched from at present.
    pub(crate) fn placement(&self) -> Placement {
        self.state().placement.clone()
    }

    /// The names under which it is attached.
    pub(crate) fn names(&self) -> Vec<ImageName> {
        self.state().names.iter().cloned().collect()
    }

    /// Uses other parents from now on; whether that was a change.
    fn place(&self, placement: Placement) -> bool {
        let mut state = self.state();
        if state.placement == placement {
            return false;
        }
        tracing::info!(image = %self.id.short(), parents = ?parent_names(&placement), "new parents");
        if let Upstream::Relay(fetcher) = self.upstream.current() {
            fetcher.set_parents(&parents_of(&placement));
        }
        self.stripes.send_replace(placement.stripes.len());
        state.placement = placement;
        true
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record_file(layout: &Layout, id: &ImageId) -> PathBuf {
    layout.attached().join(format!("{id}.json"))
}

/// Removes the images that no record names: the daemon ended between an import and its registration, so
/// nobody can use them. A record counts even if it is damaged.
fn remove_unrecorded(layout: &Layout) -> std::io::Result<()> {
    for id in image::list(&layout.images())? {
        if files::is_absent(&record_file(layout, &id)) {
            tracing::warn!(%id, "removing an image that was imported and never registered");
            image::remove(&layout.images(), id)?;
        }
    }
    Ok(())
}

fn decode_root(base64: &str) -> Result<RootPage, String> {
    let bytes = BASE64.decode(base64).map_err(|e| format!("the image's root page is not base64: {e}"))?;
    RootPage::decode(&bytes).map_err(|e| format!("the image's root page is damaged: {e}"))
}

fn parents_of(placement: &Placement) -> Vec<Vec<link::ParentAddr>> {
    let address =
        |peer: &planner::Peer| link::ParentAddr { node: peer.node.clone(), address: peer.address.clone() };
    placement.stripes.iter().map(|stripe| stripe.iter().map(address).collect()).collect()
}

fn parent_names(placement: &Placement) -> Vec<Vec<NodeName>> {
    placement.stripes.iter().map(|stripe| stripe.iter().map(|peer| peer.node.clone()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn an_image_without_a_record_is_removed_and_one_with_a_damaged_record_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let layout = Layout::create(&tmp.path().join("n")).unwrap();
        let [lost, damaged] = [b"lost", b"kept"].map(|root| ImageId::of_root_page(root));
        for id in [lost, damaged] {
            fs::create_dir(layout.images().join(id.to_string())).unwrap();
        }
        fs::write(record_file(&layout, &damaged), "{").unwrap();
        remove_unrecorded(&layout).unwrap();
        assert_eq!(image::list(&layout.images()).unwrap(), [damaged]);
        assert!(record_file(&layout, &damaged).exists());
    }
}
