//! The images that this node is an origin of, as they lie in its directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::{ChunkSource, ImageId};
use image::{DerivedImage, Kind, OpenRemote, OriginImage, Remotes};
use tokio::runtime::Handle;

use super::origins::RemoteDisks;
use super::upstream::Upstream;

/// The directory of the images that were imported or derived here.
pub(crate) struct LocalImages {
    dir: PathBuf,
    /// What opens the remote disks that images lie on.
    pub(crate) remotes: Arc<RemoteDisks>,
    /// What opens the layers that images were derived from.
    layers: Arc<dyn OpenRemote>,
}

impl LocalImages {
    pub(crate) fn new(dir: PathBuf, remotes: Arc<RemoteDisks>, layers: Arc<dyn OpenRemote>) -> LocalImages {
        LocalImages { dir, remotes, layers }
    }

    /// Where they lie.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where one lies, if it is one of them.
    pub(super) fn dir_of(&self, id: &ImageId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    /// The image that one was derived from, if it was derived.
    pub(super) fn base_of(&self, id: &ImageId) -> Option<ImageId> {
        match image::kind(&self.dir_of(id)) {
            Ok(Kind::Derived { base, .. }) => Some(base),
            Ok(Kind::Imported) | Err(_) => None,
        }
    }

    /// Where the layers lie that images were derived from; the error says that not all are known.
    pub(crate) fn derived_from(&self) -> Result<Vec<String>, String> {
        let mut locations = Vec::new();
        for id in image::list(&self.dir).map_err(|e| e.to_string())? {
            let kind = image::kind(&self.dir_of(&id)).map_err(|e| e.to_string())?;
            if let Kind::Derived { location, .. } = kind {
                locations.push(location);
            }
        }
        Ok(locations)
    }

    /// Whether another image was derived from this one, or may have been: one that could not be attached again counts
    /// too.
    pub(crate) fn is_base(&self, id: &ImageId) -> bool {
        let is_derived_from_it = |image: &ImageId| match image::kind(&self.dir_of(image)) {
            Ok(Kind::Derived { base, .. }) => base == *id,
            Ok(Kind::Imported) => false,
            Err(_) => true,
        };
        image::list(&self.dir).map_or(true, |images| images.iter().any(is_derived_from_it))
    }

    /// Opens an image if it is one of them; `base` finds what chunks come from of the image that it was derived from.
    pub(super) fn open(
        &self,
        id: &ImageId,
        base: impl FnOnce(&ImageId) -> Option<Arc<dyn ChunkSource>>,
    ) -> Result<Option<Upstream>, String> {
        let dir = self.dir_of(id);
        if !dir.exists() {
            return Ok(None);
        }
        if let Kind::Derived { base: id, .. } = image::kind(&dir).map_err(|e| e.to_string())? {
            let source = base(&id)
                .ok_or_else(|| format!("it was derived from image {}, which is not attached", id.short()))?;
            let layers = Arc::clone(&self.layers);
            let opened = tokio::task::block_in_place(|| DerivedImage::open(&dir, layers, source));
            return Ok(Some(Upstream::Derived(Arc::new(opened.map_err(|e| e.to_string())?))));
        }
        let remotes = Remotes { opener: Arc::clone(&self.remotes) as _, runtime: Handle::current() };
        let opened = tokio::task::block_in_place(|| OriginImage::open_with(&dir, remotes));
        Ok(Some(Upstream::Origin(Arc::new(opened.map_err(|e| e.to_string())?))))
    }

    /// Removes the images that no record names: the daemon ended between an import and its registration, so that nobody
    /// can use them.
    pub(super) fn remove_unrecorded(&self, is_recorded: impl Fn(&ImageId) -> bool) -> io::Result<()> {
        for id in image::list(&self.dir)? {
            if !is_recorded(&id) {
                tracing::warn!(%id, "leftovers_removed: an image was imported and never registered");
                image::remove(&self.dir, id)?;
            }
        }
        Ok(())
    }
}
