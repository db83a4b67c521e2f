//! What a node does when it is asked: the operations behind its API, over images, VMs and Volt.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::{ImageName, NodeName, VmName};
use image::{ImportProgress, ImportRequest, Keep, RemoteRequest};
use link::Stats;
use planner::Role;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::cache::CacheMedia;
use super::clones::MadeImage;
use super::images::{Attached, Detached, Images};
use super::iscsi::{Exported, FindExported, IscsiExports};
use super::layers::LayerDisks;
use super::migrate::IncomingVms;
use super::remote;
use super::routes::to_the_end;
use super::unused::{Destroy, Held};
use super::vms::Vms;
use super::volt::VoltLink;
use control::api::compute::{
    AddImage, CacheStatus, CreateVm, ImageVerified, KeepImage, LinkStatus, NodeImage, NodeStatus, StartVm,
    Vm, VmReady, VmStarted,
};
use control::api::export::{ExportName, ExportView, IscsiAccess};
use control::api::volt::{ImageRecord, RegisterImage};
use control::http::{ApiError, ClientError};
use identity::Credentials;
use qemu::{AccelMode, Ready};

/// How long an image that carries a VM's disk waits for the first node that wants it.
const PASSING_MIN: Duration = Duration::from_secs(30);

/// How often it is looked whether such an image is still wanted.
pub(super) const PASSING_CHECK: Duration = Duration::from_secs(5);

/// One host that runs `virtman compute`.
pub(crate) struct Node {
    pub(crate) name: NodeName,
    pub(crate) address: String,
    pub(crate) images_dir: PathBuf,
    pub(crate) cache: CacheMedia,
    pub(crate) links: Arc<Stats>,
    pub(crate) images: Arc<Images>,
    pub(crate) vms: Vms,
    pub(crate) iscsi: IscsiExports,
    pub(crate) volt: VoltLink,
    pub(crate) accel: AccelMode,
    pub(super) credentials: Arc<Credentials>,
    /// VMs that other nodes bring.
    pub(super) incoming: IncomingVms,
    /// Held while it is decided which layer clones stand on.
    pub(super) landing: tokio::sync::Mutex<()>,
    pub(crate) shutdown: CancellationToken,
}

impl Node {
    /// The image of this name, attached now if it was not. It stays attached as long as the caller holds it.
    pub(super) async fn attach(&self, name: &ImageName) -> Result<Held, ApiError> {
        if let Some(held) = self.images.hold(name) {
            return Ok(held);
        }
        self.images.must_have_room_for(name)?;
        let _one_at_a_time = self.images.changing.lock().await;
        if let Some(held) = self.images.hold(name) {
            return Ok(held);
        }
        let _attaching = self.images.expect_pushes();
        let asked = tokio::time::Instant::now();
        let role = self.role_under(name).await?;
        let answer = self.volt.attach(name.to_string(), role, None).await.map_err(from_volt)?;
        let record = answer.image.ok_or_else(|| {
            ApiError::internal(format!("Volt placed this node for '{name}' without naming the image"))
        })?;
        tracing::info!(image = %name, id = %record.id.short(), "image attached");
        let attached = self.images.attach(&record, answer.placement, answer.profile, asked);
        attached.map(Held::new).map_err(ApiError::internal)
    }

    /// What this node is in the hierarchy of an image that it does not have under this name: an origin stays one when it
    /// attaches its image under a name that others gave it, or Volt would let it fetch from below itself.
    async fn role_under(&self, name: &ImageName) -> Result<Role, ApiError> {
        if self.images.all().iter().all(|attached| attached.role() == Role::Relay) {
            return Ok(Role::Relay);
        }
        let known = self.volt.image(name.as_str()).await.map_err(from_volt)?;
        Ok(self.images.by_id(&known.id).map_or(Role::Relay, |attached| attached.role()))
    }

    /// Takes an image out of service that no VM of this node uses.
    pub(crate) async fn detach(&self, name: &ImageName) -> Result<(), ApiError> {
        let _one_at_a_time = self.images.changing.lock().await;
        let attached = self.attached(name)?;
        if attached.role() == Role::Origin {
            return Err(ApiError::conflict("is_origin", format!("this node is an origin of '{name}'"))
                .with_hint("'virtman image remove' takes the image away altogether"));
        }
        self.must_be_unused(&attached, name)?;
        self.release(&attached, name).await
    }

    /// Makes this node the origin of an image under `name`. Blocks a thread while the file is read.
    pub(crate) async fn add_image(
        self: &Arc<Self>,
        name: &ImageName,
        request: AddImage,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, ApiError> {
        self.images.must_have_room_for(name)?;
        let format = request.format.as_deref().map(str::parse).transpose();
        let format = format
            .map_err(|e: image::ParseFormatError| ApiError::bad_request("bad_format", e.to_string()))?;
        if let Some(location) = remote::location_of(&request.file) {
            let key = remote::Key {
                location: location.to_owned(),
                chap: request.chap,
                mutual_chap: request.mutual_chap,
            };
            return self.add_remote(name, key, format, keep_of(request.keep), progress).await;
        }
        let mut allowed_dirs = request.allow;
        allowed_dirs.extend(request.file.parent().map(PathBuf::from));
        let keep = keep_of(request.keep);
        let import = ImportRequest { file: request.file, format, allowed_dirs, keep };
        let dir = self.images_dir.clone();
        let imported = tokio::task::spawn_blocking(move || image::import(&import, &dir, &progress));
        let imported = imported.await.map_err(|e| ApiError::internal(format!("adding '{name}': {e}")))?;
        let imported = imported.map_err(|e| ApiError::bad_request("bad_image", e.to_string()))?;

        let (node, name) = (Arc::clone(self), name.clone());
        to_the_end(async move {
            let attached = node.publish(&name, &imported.into()).await?;
            Ok(node.describe(&attached))
        })
        .await
    }

    /// The same with an image on a remote disk.
    async fn add_remote(
        self: &Arc<Self>,
        name: &ImageName,
        key: remote::Key,
        format: Option<image::Format>,
        keep: Keep,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, ApiError> {
        let refused = |why: String| ApiError::bad_request("bad_image", format!("{}: {why}", key.location));
        let disk = key.open().await.map_err(|e| refused(e.to_string()))?;
        let location = key.location.clone();
        let import = RemoteRequest { location, disk, runtime: Handle::current(), format, keep };
        let dir = self.images_dir.clone();
        let imported = tokio::task::spawn_blocking(move || image::import_remote(&import, &dir, &progress));
        let imported = imported.await.map_err(|e| ApiError::internal(format!("adding '{name}': {e}")))?;
        let imported = imported.map_err(|e| refused(e.to_string()))?;

        let (node, name) = (Arc::clone(self), name.clone());
        to_the_end(async move {
            if keep == Keep::InPlace {
                node.images.remotes.remember(&key).map_err(ApiError::internal)?;
            }
            let published = node.publish(&name, &imported.into()).await;
            if published.is_err() {
                node.forget_unused_remotes();
            }
            Ok(node.describe(&*published?))
        })
        .await
    }

    fn forget_unused_remotes(&self) {
        if let Err(error) = self.images.forget_unused_remotes() {
            tracing::warn!(%error, "what opens a remote disk that is not used any more cannot be removed");
        }
    }

    /// Serves an image that was made here under its name, or removes it.
    pub(super) async fn publish(
        &self,
        name: &ImageName,
        made: &MadeImage,
    ) -> Result<Arc<Attached>, ApiError> {
        let _one_at_a_time = self.images.changing.lock().await;
        let served = self.serve_made(name, made).await;
        if served.is_err() && made.novelty == image::Novelty::New {
            // Nobody can use what the catalog does not have; leave nothing behind.
            if let Err(error) = image::remove(&self.images_dir, made.id) {
                tracing::warn!(id = %made.id, %error, "cannot remove an image that could not be registered");
            }
        }
        served
    }

    async fn serve_made(&self, name: &ImageName, made: &MadeImage) -> Result<Arc<Attached>, ApiError> {
        let request = RegisterImage { root_page: BASE64.encode(made.root.encode()) };
        let record = self.volt.register_image(name.as_str(), &request).await.map_err(from_volt)?;
        let _attaching = self.images.expect_pushes();
        let asked = tokio::time::Instant::now();
        let answer = self.volt.attach(record.id.to_string(), Role::Origin, None).await.map_err(from_volt)?;
        let record = ImageRecord { name: name.clone(), ..record };
        let attached = self.images.attach(&record, answer.placement, answer.profile, asked);
        let attached = attached.map_err(ApiError::internal)?;
        tracing::info!(image = %name, id = %record.id, "this node is an origin of the image");
        Ok(attached)
    }

    /// Takes an image's name out of the catalog, and on its origin what was kept of it.
    pub(crate) async fn remove_image(&self, name: &ImageName, force: Force) -> Result<(), ApiError> {
        let _one_at_a_time = self.images.changing.lock().await;
        let attached = self.attached(name).map_err(|e| {
            e.with_hint(
                "images are removed on a node that is their origin: see 'virtman image show', and use --node",
            )
        })?;
        if attached.role() != Role::Origin {
            return Err(ApiError::conflict("not_its_origin", format!("this node is no origin of '{name}'"))
                .with_hint("see 'virtman image show', and use --node"));
        }
        self.must_be_unused(&attached, name)?;
        if force == Force::No {
            match self.volt.attached_elsewhere(name.as_str()).await {
                Ok(nodes) if !nodes.is_empty() && attached.names().len() == 1 => {
                    let nodes: Vec<String> = nodes.iter().map(|at| at.node.to_string()).collect();
                    return Err(ApiError::conflict(
                        "image_in_use",
                        format!(
                            "'{name}' is attached on {}: they would have nowhere to fetch it from",
                            nodes.join(", ")
                        ),
                    )
                    .with_hint("detach it there first, or use --force"));
                }
                Ok(_) => {}
                // Somebody removed the name already: what is left is ours.
                Err(ClientError::Refused(refusal)) if refusal.code == "no_such_image" => {}
                Err(error) => return Err(from_volt(error)),
            }
        }
        match self.volt.remove_image(name.as_str()).await {
            Ok(_) => {}
            Err(ClientError::Refused(refusal)) if refusal.code == "no_such_image" => {}
            Err(error) => return Err(from_volt(error)),
        }
        self.forget_image(&attached, name).await
    }

    /// Forgets a name of an image on its origin, and with the last one what was kept of it. The caller holds `changing`.
    async fn forget_image(&self, attached: &Attached, name: &ImageName) -> Result<(), ApiError> {
        let derived = attached.derived();
        self.release(attached, name).await?;
        if self.images.by_id(&attached.id).is_none() {
            image::remove(&self.images_dir, attached.id)
                .map_err(|e| ApiError::internal(format!("cannot remove what was kept of '{name}': {e}")))?;
            self.forget_unused_remotes();
            if let Some(Ok(layer)) = derived.map(|derived| LayerDisks::layer_at(derived.location())) {
                self.vms.layers.release(layer);
            }
        }
        Ok(())
    }

    /// Removes the images that carried VMs' disks to other nodes, once those have them.
    pub(super) async fn remove_passed(&self) {
        for attached in self.images.all().into_iter().filter(|image| image.derived().is_some()) {
            for name in attached.passing() {
                let goes = match self.volt.attached_elsewhere(name.as_str()).await {
                    // Other origins have it from elsewhere; and who fetches an image that has another name too finds it
                    // by that one.
                    Ok(nodes) => {
                        attached.is_older_than(PASSING_MIN)
                            && (nodes.iter().all(|at| at.role == Role::Origin)
                                || self.is_known_otherwise(&attached, &name).await)
                    }
                    Err(ClientError::Refused(refusal)) => refusal.code == "no_such_image",
                    Err(_) => false,
                };
                if !goes {
                    continue;
                }
                let removed = match self.remove_image(&name, Force::Yes).await {
                    // Another node gave its image this name, and takes it out of the catalog itself.
                    Err(error) if error.code == "not_its_origin" => {
                        let _one_at_a_time = self.images.changing.lock().await;
                        match self.must_be_unused(&attached, &name) {
                            Ok(()) => self.forget_image(&attached, &name).await,
                            in_use => in_use,
                        }
                    }
                    removed => removed,
                };
                match removed {
                    Ok(()) => tracing::info!(image = %name, "nobody needs the image any more"),
                    Err(error) => tracing::info!(image = %name, %error, "an image that is not needed stays"),
                }
            }
        }
    }

    /// Whether the catalog has an image by another name than this.
    async fn is_known_otherwise(&self, attached: &Attached, name: &ImageName) -> bool {
        for other in attached.names().iter().filter(|other| *other != name) {
            if self.volt.is_image(other).await.is_ok_and(|is_known| is_known) {
                return true;
            }
        }
        false
    }

    /// A name by which another node finds an attached image: `made` if it has that. Names that others gave it may be
    /// gone by now, so that else the catalog is asked.
    pub(crate) async fn name_for_others(
        &self,
        attached: &Attached,
        made: &ImageName,
    ) -> Result<ImageName, ApiError> {
        if attached.names().contains(made) {
            return Ok(made.clone());
        }
        let known = self.volt.image(&attached.id.to_string()).await.map_err(from_volt)?;
        Ok(known.name)
    }

    /// Reads an image of which this node is the origin again, and compares every chunk.
    pub(crate) async fn verify_image(
        &self,
        name: &ImageName,
        progress: Arc<ImportProgress>,
    ) -> Result<ImageVerified, ApiError> {
        let attached = self.attached(name)?;
        let origin = attached.origin().ok_or_else(|| {
            ApiError::conflict(
                "not_its_origin",
                format!("this node is no origin of '{name}'; what it has cached is verified as it is read"),
            )
            .with_hint("see 'virtman image show' for its origins, and use --node")
        })?;
        let verified = tokio::task::spawn_blocking(move || origin.verify(&progress));
        let report = verified.await.map_err(|e| ApiError::internal(format!("verifying '{name}': {e}")))?;
        let report = report.map_err(|e| ApiError::internal(e.to_string()))?;
        let chunk_bytes = block::limits::CHUNK_BYTES as u64;
        Ok(ImageVerified {
            id: attached.id,
            chunks: report.chunks_right + report.chunks_wrong,
            wrong_chunks: report.chunks_wrong + report.pages_wrong,
            wrong_offsets: report.wrong.iter().map(|index| index * chunk_bytes).collect(),
        })
    }

    /// An attached image as the API shows it.
    pub(crate) fn describe(&self, attached: &Attached) -> NodeImage {
        self.images.describe(attached, self.vms.count_on(&attached.id))
    }

    /// Gives a VM its disk, and exports it if that is asked for.
    pub(crate) async fn create(&self, name: &VmName, request: &CreateVm) -> Result<Vm, ApiError> {
        let asked = Instant::now();
        let export = ExportName::Vm(name.clone());
        if let Some(access) = &request.iscsi {
            self.iscsi.must_fit(&export, access)?;
        }
        let held = match &request.settle_on {
            Some(_) => self.attach_carried(&request.image).await?,
            None => self.attach(&request.image).await?,
        };
        let attached = Arc::clone(&held);
        let known = self.vms.get(name).is_ok();
        let vm = match &request.settle_on {
            Some(own) => self.create_settling(name, attached, own, asked).await?,
            None => self.vms.create(name, &request.image, attached, request.size_bytes, asked).await?,
        };
        match request.iscsi.clone() {
            Some(access) if known => drop(self.export(&export, access).await?),
            Some(access) => self.export_created(&export, name, access).await?,
            None => {}
        }
        Ok(vm)
    }

    /// Exports the disk of a VM that was just created. The VM goes again if that fails.
    pub(super) async fn export_created(
        &self,
        export: &ExportName,
        name: &VmName,
        access: IscsiAccess,
    ) -> Result<(), ApiError> {
        let exported = self.export(export, access).await;
        if exported.is_err() {
            self.vms.destroy(name).await?;
        }
        exported.map(drop)
    }

    /// Removes a VM with its disk and its exports. A running guest is ended.
    pub(crate) async fn destroy(&self, name: &VmName, destroy: Destroy) -> Result<(), ApiError> {
        let image = self.vms.get(name)?.top().chain().1.id;
        self.iscsi.remove(&ExportName::Vm(name.clone())).await?;
        // Before nobody uses it.
        if destroy == Destroy::InstanceOnly {
            self.note_destroy(&image, destroy).await;
        }
        self.vms.destroy(name).await?;
        if destroy == Destroy::WithImage {
            self.note_destroy(&image, destroy).await;
        }
        Ok(())
    }

    /// Tells tests that a step of something long was reached.
    pub(super) fn reached(&self, step: &str) {
        #[cfg(feature = "faults")]
        super::fault::reached(self.vms.layout.dir(), step);
        tracing::debug!(step, "reached");
    }

    /// A VM that initiators on the network have open cannot be moved from under them.
    pub(super) fn must_not_be_exported(&self, name: &VmName) -> Result<(), ApiError> {
        if !self.iscsi.contains(&ExportName::Vm(name.clone())) {
            return Ok(());
        }
        let message = format!("'{name}' is exported over iSCSI by node {}", self.name);
        Err(ApiError::conflict("exported", message)
            .with_hint(format!("'virtman export remove {name}' ends that")))
    }

    /// Lets initiators on the network open a disk.
    pub(crate) async fn export(
        &self,
        name: &ExportName,
        access: IscsiAccess,
    ) -> Result<ExportView, ApiError> {
        self.iscsi.must_fit(name, &access)?;
        let _held = match name {
            ExportName::Vm(vm) => self.vms.get(vm).map(|_| None)?,
            ExportName::Image(image) => Some(self.attach(image).await?),
        };
        let exported = Disks { images: &self.images, vms: &self.vms }.find(name);
        let exported =
            exported.ok_or_else(|| ApiError::internal(format!("'{name}' was removed meanwhile")))?;
        self.iscsi.add(name, access, exported).await
    }

    /// All ways to the disks and images of this node.
    pub(crate) fn exports(&self) -> Vec<ExportView> {
        let nbd = |name: ExportName, read_only: bool, address: String| ExportView {
            name,
            node: self.name.clone(),
            protocol: "nbd".to_owned(),
            read_only,
            addresses: vec![address],
            target: None,
            initiators: Vec::new(),
            authentication: "none".to_owned(),
            sessions: Vec::new(),
        };
        let vms = self.vms.all().into_iter().map(|entry| self.vms.describe(&entry));
        let images = self.images.all().into_iter().flat_map(|attached| {
            let names = attached.names().into_iter();
            names.map(|name| (self.images.export_uri(&name), name)).collect::<Vec<_>>()
        });
        let mut all: Vec<ExportView> = vms.map(|vm| nbd(ExportName::Vm(vm.name), false, vm.disk)).collect();
        all.extend(images.map(|(address, name)| nbd(ExportName::Image(name), true, address)));
        all.extend(self.iscsi.all());
        all.sort_by(|a, b| (&a.name, &a.protocol).cmp(&(&b.name, &b.protocol)));
        all
    }

    /// Starts a guest on a VM's disk.
    pub(crate) async fn start(&self, name: &VmName, request: &StartVm) -> Result<VmStarted, ApiError> {
        let accel = self.accel.decide().await.map_err(|e| ApiError::internal(e.to_string()))?;
        self.vms.start(name, request, &accel).await
    }

    /// Waits until a guest is ready.
    pub(crate) async fn wait(
        &self,
        name: &VmName,
        ready: &str,
        timeout: Duration,
    ) -> Result<VmReady, ApiError> {
        let ready: Ready = ready.parse().map_err(|why: String| ApiError::bad_request("bad_ready", why))?;
        self.vms.wait(name, &ready, timeout).await
    }

    /// The node at a glance.
    pub(crate) fn status(&self) -> NodeStatus {
        let vms = self.vms.all();
        NodeStatus {
            node: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: self.address.clone(),
            volt_connected: self.volt.is_connected(),
            memory_bytes: resident_bytes(),
            cache: self.cache_status(),
            links: self.link_status(),
            vms: vms.len(),
            running: vms.iter().filter(|vm| vm.running().is_some()).count(),
        }
    }

    pub(super) fn cache_status(&self) -> CacheStatus {
        let stats = self.cache.group().stats();
        let chunk_bytes = block::limits::CHUNK_BYTES as u64;
        CacheStatus {
            capacity_bytes: stats.capacity_chunks * chunk_bytes,
            resident_bytes: stats.resident_chunks * chunk_bytes,
            resident_chunks: stats.resident_chunks,
            fetched_chunks: stats.fetched_chunks,
            fetched_bytes: stats.fetched_bytes,
            hits: stats.hits,
            misses: stats.misses,
            evicted_chunks: stats.evicted_chunks,
            dropped_chunks: stats.dropped_chunks,
            unstored_chunks: stats.unstored_chunks,
            failed_media: self.cache.failed_media(),
        }
    }

    fn link_status(&self) -> LinkStatus {
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
        LinkStatus {
            received_chunks: get(&self.links.chunks_received),
            vain_chunks: get(&self.links.chunks_in_vain),
            received_wire_bytes: get(&self.links.wire_bytes_received),
            sent_chunks: get(&self.links.chunks_sent),
            sent_wire_bytes: get(&self.links.wire_bytes_sent),
            failovers: get(&self.links.failovers),
            hedges: get(&self.links.hedges),
            hedge_wins: get(&self.links.hedge_wins),
            late_fetches: get(&self.links.late_fetches),
            breaker_openings: get(&self.links.breaker_openings),
            last_resort_fetches: get(&self.links.last_resort_fetches),
            throttled: get(&self.links.throttled),
            lies: get(&self.links.lies),
        }
    }

    fn attached(&self, name: &ImageName) -> Result<Arc<Attached>, ApiError> {
        self.images.by_name(name).ok_or_else(|| {
            ApiError::not_found(
                "not_attached",
                format!("image '{name}' is not attached on node {}", self.name),
            )
        })
    }

    fn must_be_unused(&self, attached: &Attached, name: &ImageName) -> Result<(), ApiError> {
        if self.images.is_base(&attached.id) && attached.names().len() == 1 {
            return Err(ApiError::conflict(
                "image_in_use",
                format!("images on node {} were derived from '{name}' and need it", self.name),
            )
            .with_hint("remove those first; 'virtman image list --node' shows their sources"));
        }
        if self.vms.layers.need(&attached.id) && attached.names().len() == 1 {
            let vms = self.vms.count_on(&attached.id);
            return Err(ApiError::conflict(
                "image_in_use",
                format!("{vms} VM disks on node {} stand on '{name}'", self.name),
            )
            .with_hint("destroy those VMs first; 'virtman list' shows them"));
        }
        if attached.is_held() {
            return Err(ApiError::conflict("image_in_use", format!("'{name}' is about to be used")));
        }
        if self.iscsi.contains(&ExportName::Image(name.clone())) {
            return Err(ApiError::conflict(
                "image_in_use",
                format!("'{name}' is exported over iSCSI by node {}", self.name),
            )
            .with_hint(format!("'virtman export remove {name}' ends that")));
        }
        Ok(())
    }

    /// Takes a name from an image, and the image out of service with its last one: first Volt gives the node's
    /// children other parents, then the node lets go. The caller holds `changing`.
    pub(super) async fn release(&self, attached: &Attached, name: &ImageName) -> Result<(), ApiError> {
        // If Volt cannot be told it learns it when this node registers again and does not name the image.
        if attached.names() == [name.clone()]
            && let Err(error) = self.volt.detach(attached.id).await
        {
            tracing::warn!(image = %name, %error, "Volt could not be told of a detach");
        }
        match self.images.detach(attached, name).map_err(ApiError::internal)? {
            Detached::Name => {}
            Detached::Image => tracing::info!(image = %name, "image detached"),
            Detached::Held => {
                self.stay_attached(attached).await;
                return Err(ApiError::conflict("image_in_use", format!("'{name}' is about to be used")));
            }
        }
        Ok(())
    }
}

impl From<image::Imported> for MadeImage {
    fn from(imported: image::Imported) -> MadeImage {
        MadeImage { id: imported.id, root: imported.root, novelty: imported.novelty }
    }
}

fn keep_of(keep: KeepImage) -> Keep {
    match keep {
        KeepImage::InPlace => Keep::InPlace,
        KeepImage::Copy => Keep::Copy,
    }
}

/// The disks of a node, for exports of their own.
pub(super) struct Disks<'a> {
    pub(super) images: &'a Images,
    pub(super) vms: &'a Vms,
}

impl FindExported for Disks<'_> {
    fn find(&self, name: &ExportName) -> Option<Exported> {
        match name {
            ExportName::Vm(name) => self.vms.exported(name),
            ExportName::Image(name) => {
                let attached = self.images.by_name(name)?;
                // The same on every node: the nodes are so many paths to one disk.
                let serial = attached.id.to_string();
                Some(Exported { disk: Arc::clone(&attached.volume) as _, serial })
            }
        }
    }

    fn is_gone(&self, name: &ExportName) -> bool {
        match name {
            ExportName::Vm(name) => !self.vms.has_files(name),
            // An image is not detached while it is exported.
            ExportName::Image(_) => false,
        }
    }
}

/// Whether users of an image are taken into account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Force {
    /// They are.
    No,
    /// They are not.
    Yes,
}

/// What Volt's refusal or absence means to somebody who asked this node.
pub(super) fn from_volt(error: ClientError) -> ApiError {
    match error {
        ClientError::Refused(refusal) => refusal,
        other => ApiError::unavailable("no_volt", format!("Volt cannot be asked: {other}"))
            .with_hint("what is attached goes on; start Volt, then try again"),
    }
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
