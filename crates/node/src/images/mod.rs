//! The images that a node serves: attaching, detaching, and where their chunks come from.
//!
//! An attached image is remembered on disk with its root page and its last placement, so that a node
//! that restarts while Volt is away serves and boots what it served before. Attaching is serialized:
//! it takes milliseconds, and two VMs that want the same image at once must find one attachment.

mod attached;
pub(crate) mod draining;
mod local;
pub(crate) mod origins;
mod prefetch;
pub(crate) mod profile;
pub(crate) mod restore;
pub(crate) mod retention;
mod upstream;

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::limits::CHUNK_BYTES;
use block::{ImageId, ImageName};
use image::{BootProfile, ImageVolume, OriginImage, RootPage};
use link::{Fetcher, Uplinks};
use planner::{Placement, Role};
use serde::{Deserialize, Serialize};
use store::CacheGroup;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

pub(crate) use self::attached::Attached;
use self::attached::{AttachedState, parents_of};
use self::draining::Draining;
pub(crate) use self::local::LocalImages;
use self::profile::{FetchPath, Profile};
pub(crate) use self::retention::ImageGuard;
use self::retention::{Holders, IdleTimeout, Retention};
use self::upstream::{SwappableUpstream, Upstream};
use crate::nbd_socket::{Clients, NbdSocket};
use crate::state::{self, Layout};
use control::api::compute::NodeImage;
use control::api::profile::ProfileOffer;
use control::api::volt::{ImageKind, ImageRecord};
use control::refusal::{Code, Refusal};
use control::units::ByteSize;

/// All images of a node.
pub(crate) struct Images {
    layout: Layout,
    cache: Arc<CacheGroup>,
    uplinks: Arc<Uplinks>,
    /// Those of which this node is an origin.
    pub(crate) local: LocalImages,
    attached: RwLock<HashMap<ImageId, Arc<Attached>>>,
    /// Takes records of boots to Volt.
    records: mpsc::Sender<BootProfile>,
    changed: Notify,
    /// Images that are detached but still served.
    pub(crate) draining: Draining,
    /// How long an image that nobody uses stays attached.
    pub(crate) idle_timeout: IdleTimeout,
    /// Told when it is to be looked what is used.
    pub(crate) look: Notify,
    /// How many images are being attached.
    attaching: AtomicUsize,
    /// What Volt pushed about the image that is being attached, before its answer was dealt with.
    early: Mutex<Option<Early>>,
    /// How many images could not be attached again when the daemon started. What they may need stays.
    unrestored: AtomicUsize,
    /// Held while an image is attached or detached.
    pub(crate) changing: tokio::sync::Mutex<()>,
}

/// What the images of a node are fetched through and kept in.
pub(crate) struct Surroundings {
    pub(crate) layout: Layout,
    pub(crate) cache: Arc<CacheGroup>,
    pub(crate) uplinks: Arc<Uplinks>,
    /// Takes records of boots to Volt.
    pub(crate) records: mpsc::Sender<BootProfile>,
    pub(crate) idle_timeout: IdleTimeout,
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

/// What is remembered of an attached image.
#[derive(Serialize, Deserialize)]
struct AttachedRecord {
    names: BTreeSet<ImageName>,
    #[serde(default)]
    kind: ImageKind,
    root_page: String,
    placement: Placement,
    #[serde(default, rename = "fill")]
    prefetch: bool,
    #[serde(default, rename = "passing")]
    transfer_names: BTreeSet<ImageName>,
    #[serde(default, rename = "stay")]
    retention: Retention,
}

impl Images {
    /// No image yet.
    pub(crate) fn new(surroundings: Surroundings, local: LocalImages) -> Images {
        let Surroundings { layout, cache, uplinks, records, idle_timeout } = surroundings;
        Images {
            layout,
            cache,
            uplinks,
            local,
            records,
            attached: RwLock::default(),
            changed: Notify::new(),
            draining: Draining::default(),
            idle_timeout,
            look: Notify::new(),
            attaching: AtomicUsize::new(0),
            early: Mutex::new(None),
            unrestored: AtomicUsize::new(0),
            changing: tokio::sync::Mutex::new(()),
        }
    }

    /// Forgets what opens the remote disks that no image lies on. An image that could not be attached again may
    /// lie on any.
    pub(crate) fn forget_unused_remotes(&self) -> std::io::Result<()> {
        if self.unrestored.load(Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let origins: Vec<Arc<OriginImage>> = self.all().iter().filter_map(|image| image.origin()).collect();
        let used: Vec<PathBuf> = origins.iter().map(|origin| origin.describe().path).collect();
        self.local.remotes.retain(|location| used.iter().any(|path| path.as_os_str() == location))
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

    /// The attached image of this name, which stays attached as long as the caller holds it.
    pub(crate) fn hold(&self, name: &ImageName) -> Option<ImageGuard> {
        // Under the lock: whoever detaches sees the holder, or this does not find the image.
        let all = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.values().find(|attached| attached.state().names.contains(name))?;
        Some(ImageGuard::new(Arc::clone(found)))
    }

    /// Keeps an image attached as long as the answer is there; `None` if it was detached meanwhile.
    pub(crate) fn guard(&self, attached: &Arc<Attached>) -> Option<ImageGuard> {
        let all = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.get(&attached.id).filter(|found| Arc::ptr_eq(found, attached))?;
        Some(ImageGuard::new(Arc::clone(found)))
    }

    /// Whether an image can be exported under `name` here. To be asked before anything is made.
    pub(crate) fn check_name_len(&self, name: &ImageName) -> Result<(), Refusal> {
        self.layout.check_socket_name_len(&name.file_name())
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
                attached.upstream.replace(upstream);
                attached.stripes.send_replace(placement.stripes.len());
                attached.state().placement = placement;
                attached.profile.offer(profile);
                attached
            }
            None => self.make(root, record.kind, placement, profile, asked)?,
        };
        self.add_name(&attached, record.name.clone())?;
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
    pub(crate) fn prefetch(&self, attached: &Attached) -> Result<(), Refusal> {
        let chunks = attached.root.chunk_count() - attached.root.zero_chunks();
        let room = self.cache.stats().capacity_chunks;
        if chunks > room {
            let bytes = |chunks: u64| ByteSize(chunks * CHUNK_BYTES as u64);
            return Err(Refusal::new(
                Code::CacheTooSmall,
                format!(
                    "the image has {} of data, and the cache has room for {}",
                    bytes(chunks),
                    bytes(room)
                ),
            )
            .with_hint("give the node more room with 'virtman cache add' or --cache"));
        }
        attached.prefetch();
        self.save(attached).map_err(Refusal::internal)
    }

    /// Takes a name from an image, and the image out of service with its last one. The caller holds
    /// `changing` and knows that nobody uses it.
    pub(crate) fn detach(&self, attached: &Attached, name: &ImageName) -> Result<Detached, String> {
        let detached = {
            let mut all = self.attached.write().unwrap_or_else(PoisonError::into_inner);
            let mut state = attached.state();
            let is_last = state.names.iter().all(|other| other == name);
            if is_last && attached.is_held() {
                return Ok(Detached::InUse);
            }
            state.names.remove(name);
            state.transfer_names.remove(name);
            state.sockets.remove(name);
            if is_last {
                if attached.role() == Role::Relay {
                    self.draining.begin(attached.id, Arc::clone(&attached.served), Instant::now());
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
        let file = record_file(&self.layout, &attached.id);
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
            tracing::error!(image = %id, reason, "placement_not_recorded: after a restart the old one is used until Volt is reached");
        }
    }

    /// Volt has another boot profile of an image.
    pub(crate) fn offer_profile(&self, id: &ImageId, offer: ProfileOffer) {
        if let Some(attached) = self.by_id_or(id, |early| early.profile = Some(offer.clone())) {
            attached.profile.offer(offer);
        }
    }

    /// Volt let this node leave an image's hierarchy.
    pub(crate) fn released(&self, id: &ImageId) {
        if let Some(attached) = self.by_id(id) {
            attached.usage().released();
            self.look.notify_one();
        }
    }

    /// Says what keeps an image attached. The caller holds `changing`.
    pub(crate) fn retain(&self, attached: &Attached, retention: Retention) -> Result<(), String> {
        if attached.retention() == retention {
            return Ok(());
        }
        attached.state().retention = retention;
        self.save(attached)
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

    fn make(
        &self,
        root: RootPage,
        kind: ImageKind,
        placement: Placement,
        profile: ProfileOffer,
        asked: Instant,
    ) -> Result<Arc<Attached>, String> {
        let id = root.id();
        let upstream = Arc::new(SwappableUpstream::new(self.upstream(&id, &placement)?));
        let source = self.cache.over(Arc::clone(&upstream) as _);
        let served = self.cache.over_for_children(Arc::clone(&upstream) as _);
        let volume = Arc::new(ImageVolume::new(root.clone(), Arc::clone(&source)));
        let stripes = watch::Sender::new(placement.stripes.len());
        let path = FetchPath {
            volume: Arc::clone(&volume),
            source: Arc::clone(&source),
            cache: Arc::clone(&self.cache),
            stripes: stripes.subscribe(),
            role: {
                let upstream = Arc::clone(&upstream);
                Arc::new(move || upstream.role())
            },
        };
        let profile = Arc::new(Profile::new(path.clone(), profile, asked, self.records.clone()));
        let state = Mutex::new(AttachedState {
            names: BTreeSet::new(),
            placement,
            sockets: HashMap::new(),
            prefetch: None,
            transfer_names: BTreeSet::new(),
            retention: Retention::WhileUsed,
        });
        Ok(Arc::new(Attached {
            id,
            kind,
            root,
            volume,
            clients: Clients::default(),
            profile,
            upstream,
            served,
            stripes,
            path,
            since: Instant::now(),
            holders: Holders::default(),
            usage: Mutex::default(),
            state,
        }))
    }

    /// The node's own copy if it is an origin of the image, else the parents that Volt named.
    fn upstream(&self, id: &ImageId, placement: &Placement) -> Result<Upstream, String> {
        // Not through the cache: that is asked before, and would wait for itself.
        let base = |id: &ImageId| Some(Arc::clone(&self.by_id(id)?.upstream) as _);
        if let Some(local) = self.local.open(id, base)? {
            return Ok(local);
        }
        let fetcher = Arc::new(Fetcher::new(*id, Arc::clone(&self.uplinks)));
        fetcher.set_parents(&parents_of(placement));
        Ok(Upstream::Relay(fetcher))
    }

    /// Has a name of an image removed from the catalog once no other node uses it, if this one is an origin of it.
    pub(crate) fn mark_as_transfer(&self, attached: &Attached, name: &ImageName) -> Result<(), String> {
        attached.state().transfer_names.insert(name.clone());
        self.save(attached)
    }

    fn add_name(&self, attached: &Attached, name: ImageName) -> Result<(), String> {
        let mut state = attached.state();
        if state.sockets.contains_key(&name) {
            return Ok(());
        }
        let path = volume_socket(&self.layout, &name);
        let export = NbdSocket::open(
            path.clone(),
            name.to_string(),
            Arc::clone(&attached.volume) as _,
            attached.clients.clone(),
        )
        .map_err(|e| format!("cannot open the socket {}: {e}", path.display()))?;
        state.sockets.insert(name.clone(), export);
        state.names.insert(name);
        Ok(())
    }

    /// The NBD URI of an image's volume.
    pub(crate) fn export_uri(&self, name: &ImageName) -> String {
        NbdSocket::uri(&volume_socket(&self.layout, name), name.as_str())
    }

    fn insert(&self, attached: Arc<Attached>) {
        self.draining.forget(&attached.id);
        self.attached.write().unwrap_or_else(PoisonError::into_inner).insert(attached.id, attached);
        self.changed.notify_waiters();
    }

    fn save(&self, attached: &Attached) -> Result<(), String> {
        let record = {
            let state = attached.state();
            AttachedRecord {
                names: state.names.clone(),
                kind: attached.kind,
                root_page: BASE64.encode(attached.root.encode()),
                placement: state.placement.clone(),
                prefetch: state.prefetch.is_some(),
                transfer_names: state.transfer_names.clone(),
                retention: state.retention,
            }
        };
        let file = record_file(&self.layout, &attached.id);
        tokio::task::block_in_place(|| state::write_record(&file, &record))
            .map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// An image as the API shows it.
    pub(crate) fn describe(&self, attached: &Attached, vms: usize) -> NodeImage {
        let export = attached.names().first().map(|name| self.export_uri(name));
        attached.describe(export, vms, self.idle_timeout)
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
    InUse,
}

fn volume_socket(layout: &Layout, name: &ImageName) -> PathBuf {
    layout.volumes().join(format!("{}.sock", name.file_name()))
}

fn record_file(layout: &Layout, id: &ImageId) -> PathBuf {
    layout.attached().join(format!("{id}.json"))
}

fn decode_root(base64: &str) -> Result<RootPage, String> {
    let bytes = BASE64.decode(base64).map_err(|e| format!("the image's root page is not base64: {e}"))?;
    RootPage::decode(&bytes).map_err(|e| format!("the image's root page is damaged: {e}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct NoLayers;

    impl image::OpenRemote for NoLayers {
        fn open(&self, location: &str) -> Result<Arc<dyn block::Disk>, String> {
            Err(format!("there is no {location}"))
        }
    }

    #[tokio::test]
    async fn an_image_without_a_record_is_removed_and_one_with_a_damaged_record_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let layout = Layout::create(&tmp.path().join("n")).unwrap();
        let [lost, damaged] = [b"lost", b"kept"].map(|root| ImageId::of_root_page(root));
        for id in [lost, damaged] {
            fs::create_dir(layout.images().join(id.to_string())).unwrap();
        }
        fs::write(record_file(&layout, &damaged), "{").unwrap();
        let remotes = Arc::new(origins::RemoteDisks::new(layout.remotes()));
        let local = LocalImages::new(layout.images(), remotes, Arc::new(NoLayers));
        local.remove_unrecorded(|id| !state::is_absent(&record_file(&layout, id))).unwrap();
        assert_eq!(image::list(&layout.images()).unwrap(), [damaged]);
        assert!(record_file(&layout, &damaged).exists());
    }
}
