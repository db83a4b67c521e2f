//! Images of which this node is an origin: added, derived, verified, and removed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use block::limits::CHUNK_BYTES;
use block::{ImageId, ImageName};
use image::{ImportProgress, ImportRequest, Keep, Novelty, RemoteRequest, RootPage};
use planner::Role;
use tokio::runtime::Handle;

use super::images::ImageService;
use crate::images::origins::{self, Key};
use crate::images::{Attached, Images};
use crate::layers::{self, Layers};
use crate::tasks::{blocking, run_uncancelled};
use crate::volt::{VoltLink, from_volt};
use control::api::compute::{AddImage, ImageVerified, KeepImage, NodeImage};
use control::api::volt::{ImageKind, ImageRecord, RegisterImage};
use control::http::ClientError;
use control::refusal::{Code, Refusal};

/// How long an image that carries a VM's disk waits for the first node that wants it.
const TRANSFER_MIN: Duration = Duration::from_secs(30);

/// How often it is looked whether such an image is still wanted.
const TRANSFER_CHECK: Duration = Duration::from_secs(5);

/// Makes and removes the images of which a node is an origin.
pub(crate) struct OriginService {
    service: Arc<ImageService>,
    images: Arc<Images>,
    layers: Arc<Layers>,
    volt: Arc<VoltLink>,
}

/// An image that was made and is not known to Volt yet.
pub(crate) struct MadeImage {
    pub(crate) id: ImageId,
    pub(crate) root: RootPage,
    pub(crate) novelty: Novelty,
}

impl OriginService {
    /// Those of this service.
    pub(crate) fn new(service: Arc<ImageService>, layers: Arc<Layers>) -> OriginService {
        let (images, volt) = (Arc::clone(&service.images), Arc::clone(&service.volt));
        OriginService { service, images, layers, volt }
    }

    /// Makes this node the origin of an image under `name`. Blocks a thread while the file is read.
    pub(crate) async fn add(
        self: &Arc<Self>,
        name: &ImageName,
        request: AddImage,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, Refusal> {
        self.images.check_name_len(name)?;
        let format = request.format.as_deref().map(str::parse).transpose();
        let format =
            format.map_err(|e: image::ParseFormatError| Refusal::new(Code::BadFormat, e.to_string()))?;
        if let Some(location) = origins::location_of(&request.file) {
            let key =
                Key { location: location.to_owned(), chap: request.chap, mutual_chap: request.mutual_chap };
            return self.add_remote(name, key, format, keep_of(request.keep), progress).await;
        }
        let mut allowed_dirs = request.allow;
        allowed_dirs.extend(request.file.parent().map(PathBuf::from));
        let keep = keep_of(request.keep);
        let import = ImportRequest { file: request.file, format, allowed_dirs, keep };
        let dir = self.images.local.dir().to_owned();
        let imported = tokio::task::spawn_blocking(move || image::import(&import, &dir, &progress));
        let imported = imported.await.map_err(|e| Refusal::internal(format!("adding '{name}': {e}")))?;
        let imported = imported.map_err(|e| Refusal::new(Code::BadImage, e.to_string()))?;

        let (origin, name) = (Arc::clone(self), name.clone());
        run_uncancelled(async move {
            let attached = origin.publish(&name, &imported.into()).await?;
            Ok(origin.service.describe(&attached))
        })
        .await
    }

    /// The same with an image on a remote disk.
    async fn add_remote(
        self: &Arc<Self>,
        name: &ImageName,
        key: Key,
        format: Option<image::Format>,
        keep: Keep,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, Refusal> {
        let refused = |why: String| Refusal::new(Code::BadImage, format!("{}: {why}", key.location));
        let disk = key.open().await.map_err(|e| refused(e.to_string()))?;
        let location = key.location.clone();
        let import = RemoteRequest { location, disk, runtime: Handle::current(), format, keep };
        let dir = self.images.local.dir().to_owned();
        let imported = tokio::task::spawn_blocking(move || image::import_remote(&import, &dir, &progress));
        let imported = imported.await.map_err(|e| Refusal::internal(format!("adding '{name}': {e}")))?;
        let imported = imported.map_err(|e| refused(e.to_string()))?;

        let (origin, name) = (Arc::clone(self), name.clone());
        run_uncancelled(async move {
            if keep == Keep::InPlace {
                let remembered = tokio::task::block_in_place(|| origin.images.local.remotes.remember(&key));
                remembered.map_err(Refusal::internal)?;
            }
            let published = origin.publish(&name, &imported.into()).await;
            if published.is_err() {
                origin.forget_unused_remotes();
            }
            Ok(origin.service.describe(&*published?))
        })
        .await
    }

    fn forget_unused_remotes(&self) {
        if let Err(error) = tokio::task::block_in_place(|| self.images.forget_unused_remotes()) {
            tracing::warn!(%error, "leftovers_kept: what opens a remote disk that is not used any more cannot be removed");
        }
    }

    /// Serves an image that was made here under its name, or removes it.
    pub(crate) async fn publish(&self, name: &ImageName, made: &MadeImage) -> Result<Arc<Attached>, Refusal> {
        let _one_at_a_time = self.images.changing.lock().await;
        let served = self.serve_made(name, made).await;
        if served.is_err() && made.novelty == Novelty::New {
            // Nobody can use what the catalog does not have; leave nothing behind.
            let (dir, id) = (self.images.local.dir().to_owned(), made.id);
            let removed = blocking(move || image::remove(&dir, id).map_err(|e| e.to_string()));
            if let Err(error) = removed.await {
                tracing::warn!(id = %made.id, %error, "leftovers_kept: an image could not be registered, nor removed");
            }
        }
        served
    }

    async fn serve_made(&self, name: &ImageName, made: &MadeImage) -> Result<Arc<Attached>, Refusal> {
        let request = RegisterImage { root_page: BASE64.encode(made.root.encode()), kind: ImageKind::Disk };
        let record = self.volt.register_image(name.as_str(), &request).await.map_err(from_volt)?;
        let _attaching = self.images.expect_pushes();
        let asked = tokio::time::Instant::now();
        let answer = self.volt.attach(record.id.to_string(), Role::Origin, None).await.map_err(from_volt)?;
        let record = ImageRecord { name: name.clone(), ..record };
        let attached = self.images.attach(&record, answer.placement, answer.profile, asked);
        let attached = attached.map_err(Refusal::internal)?;
        tracing::info!(image = %name, id = %record.id, "origin_ready: this node is an origin of the image");
        Ok(attached)
    }

    /// Takes an image's name out of the catalog, and on its origin what was kept of it.
    pub(crate) async fn remove(&self, name: &ImageName, force: Force) -> Result<(), Refusal> {
        let _one_at_a_time = self.images.changing.lock().await;
        let attached = self.service.get(name).map_err(|e| {
            e.with_hint(
                "images are removed on a node that is their origin: see 'virtman image show', and use --node",
            )
        })?;
        if attached.role() != Role::Origin {
            return Err(Refusal::new(Code::NotItsOrigin, format!("this node is not an origin of '{name}'"))
                .with_hint("see 'virtman image show', and use --node"));
        }
        self.service.must_be_unused(&attached, name)?;
        if force == Force::No {
            match self.volt.attached_elsewhere(name.as_str()).await {
                Ok(nodes) if !nodes.is_empty() && attached.names().len() == 1 => {
                    let nodes: Vec<String> = nodes.iter().map(|at| at.node.to_string()).collect();
                    return Err(Refusal::new(
                        Code::ImageInUse,
                        format!(
                            "'{name}' is attached on {}: they would have nowhere to fetch it from",
                            nodes.join(", ")
                        ),
                    )
                    .with_hint("detach it there first, or use --force"));
                }
                Ok(_) => {}
                // Somebody removed the name already: what is left is ours.
                Err(ClientError::Refused(refusal)) if refusal.code == Code::NoSuchImage => {}
                Err(error) => return Err(from_volt(error)),
            }
        }
        match self.volt.remove_image(name.as_str()).await {
            Ok(_) => {}
            Err(ClientError::Refused(refusal)) if refusal.code == Code::NoSuchImage => {}
            Err(error) => return Err(from_volt(error)),
        }
        self.forget(&attached, name).await
    }

    /// Forgets a name of an image on its origin, and with the last one what was kept of it. The caller holds `changing`.
    async fn forget(&self, attached: &Attached, name: &ImageName) -> Result<(), Refusal> {
        let derived = attached.derived();
        self.service.release(attached, name).await?;
        if self.images.by_id(&attached.id).is_none() {
            let (dir, id) = (self.images.local.dir().to_owned(), attached.id);
            let layer = derived.and_then(|derived| layers::layer_at(derived.location()).ok());
            let layers = Arc::clone(&self.layers);
            blocking(move || {
                image::remove(&dir, id)
                    .map_err(|e| format!("cannot remove what was kept of an image: {e}"))?;
                layers.release_refs(layer);
                Ok(())
            })
            .await?;
            self.forget_unused_remotes();
        }
        Ok(())
    }

    /// Removes the images that carried VMs' disks to other nodes, once those have them.
    pub(crate) async fn remove_transferred(&self) {
        for attached in self.images.all().into_iter().filter(|image| image.derived().is_some()) {
            for name in attached.transfer_names() {
                let goes = match self.volt.attached_elsewhere(name.as_str()).await {
                    // Other origins have it from elsewhere; and who fetches an image that has another name too finds it
                    // by that one.
                    Ok(nodes) => {
                        attached.is_older_than(TRANSFER_MIN)
                            && (nodes.iter().all(|at| at.role == Role::Origin)
                                || self.is_known_otherwise(&attached, &name).await)
                    }
                    Err(ClientError::Refused(refusal)) => refusal.code == Code::NoSuchImage,
                    Err(_) => false,
                };
                if !goes {
                    continue;
                }
                let removed = match self.remove(&name, Force::Yes).await {
                    // Another node gave its image this name, and takes it out of the catalog itself.
                    Err(error) if error.code == Code::NotItsOrigin => {
                        let _one_at_a_time = self.images.changing.lock().await;
                        match self.service.must_be_unused(&attached, &name) {
                            Ok(()) => self.forget(&attached, &name).await,
                            in_use => in_use,
                        }
                    }
                    removed => removed,
                };
                match removed {
                    Ok(()) => tracing::info!(image = %name, "transfer_image_removed"),
                    Err(error) => tracing::info!(image = %name, %error, "transfer_image_kept"),
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
    ) -> Result<ImageName, Refusal> {
        if attached.names().contains(made) {
            return Ok(made.clone());
        }
        let known = self.volt.image(&attached.id.to_string()).await.map_err(from_volt)?;
        Ok(known.name)
    }

    /// Reads an image of which this node is the origin again, and compares every chunk.
    pub(crate) async fn verify(
        &self,
        name: &ImageName,
        progress: Arc<ImportProgress>,
    ) -> Result<ImageVerified, Refusal> {
        let attached = self.service.get(name)?;
        let origin = attached.origin().ok_or_else(|| {
            Refusal::new(
                Code::NotItsOrigin,
                format!(
                    "this node is not an origin of '{name}'; what it has cached is verified as it is read"
                ),
            )
            .with_hint("see 'virtman image show' for its origins, and use --node")
        })?;
        let verified = tokio::task::spawn_blocking(move || origin.verify(&progress));
        let report = verified.await.map_err(|e| Refusal::internal(format!("verifying '{name}': {e}")))?;
        let report = report.map_err(|e| Refusal::internal(e.to_string()))?;
        let chunk_bytes = CHUNK_BYTES as u64;
        Ok(ImageVerified {
            id: attached.id,
            chunks: report.chunks_right + report.chunks_wrong,
            wrong_chunks: report.chunks_wrong + report.pages_wrong,
            wrong_offsets: report.wrong.iter().map(|index| index * chunk_bytes).collect(),
        })
    }

    /// Removes images that carried VMs' disks to other nodes as soon as those have them, until dropped.
    pub(crate) async fn run(&self) {
        loop {
            tokio::time::sleep(TRANSFER_CHECK).await;
            self.remove_transferred().await;
        }
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

/// Whether users of an image are taken into account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Force {
    /// They are.
    No,
    /// They are not.
    Yes,
}
