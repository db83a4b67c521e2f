//! The images of a node as operations: attaching, and detaching what nobody uses.
//!
//! "Who uses this image?" is answered in one place, [`ImageService::use_of`], for people who detach and remove images,
//! and for the task that detaches idle ones.

use std::fmt;
use std::sync::Arc;

use block::{ImageName, NodeName};
use planner::Role;

use crate::exports::Exports;
use crate::images::retention::{Need, Retention};
use crate::images::{Attached, Detached, ImageGuard, Images};
use crate::vms::Vms;
use crate::volt::{VoltLink, from_volt};
use control::api::compute::NodeImage;
use control::api::export::{ExportName, ExportProtocol};
use control::refusal::{Code, Refusal};

/// Attaches and detaches the images of a node.
pub(crate) struct ImageService {
    node: NodeName,
    pub(crate) images: Arc<Images>,
    vms: Arc<Vms>,
    exports: Arc<Exports>,
    pub(crate) volt: Arc<VoltLink>,
}

/// Why an image, or one of its names, cannot go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ImageUse {
    /// Images on this node were derived from it.
    Base,
    /// So many VM disks stand on it; or layers that are of no VM, or that cannot be read and may.
    Disks(usize),
    /// Somebody is about to use it.
    Guarded,
    /// So many connections have it open over NBD.
    Open(usize),
    /// It is exported under this name.
    Exported(ImageName, ExportProtocol),
}

impl ImageService {
    /// Those of this node.
    pub(crate) fn new(
        node: NodeName,
        vms: Arc<Vms>,
        exports: Arc<Exports>,
        volt: Arc<VoltLink>,
    ) -> ImageService {
        let images = Arc::clone(vms.layers.images());
        ImageService { node, images, vms, exports, volt }
    }

    /// The image of this name, attached now if it was not. It stays attached as long as the caller holds it.
    pub(crate) async fn attach(&self, name: &ImageName) -> Result<ImageGuard, Refusal> {
        if let Some(held) = self.images.hold(name) {
            return Ok(held);
        }
        self.images.check_name_len(name)?;
        let _one_at_a_time = self.images.changing.lock().await;
        if let Some(held) = self.images.hold(name) {
            return Ok(held);
        }
        let _attaching = self.images.expect_pushes();
        let asked = tokio::time::Instant::now();
        let role = self.role_under(name).await?;
        let answer = self.volt.attach(name.to_string(), role, None).await.map_err(from_volt)?;
        let record = answer.image.ok_or_else(|| {
            Refusal::internal(format!("Volt placed this node for '{name}' without naming the image"))
        })?;
        tracing::info!(image = %name, id = %record.id.short(), "image_attached");
        let attached = self.images.attach(&record, answer.placement, answer.profile, asked);
        attached.map(ImageGuard::new).map_err(Refusal::internal)
    }

    /// What this node is in the hierarchy of an image that it does not have under this name: an origin stays one when it
    /// attaches its image under a name that others gave it, or Volt would let it fetch from below itself.
    async fn role_under(&self, name: &ImageName) -> Result<Role, Refusal> {
        if self.images.all().iter().all(|attached| attached.role() == Role::Relay) {
            return Ok(Role::Relay);
        }
        let known = self.volt.image(name.as_str()).await.map_err(from_volt)?;
        Ok(self.images.by_id(&known.id).map_or(Role::Relay, |attached| attached.role()))
    }

    /// Attaches an image that is to stay attached until it is detached by hand.
    pub(crate) async fn attach_to_stay(&self, name: &ImageName) -> Result<ImageGuard, Refusal> {
        let held = self.attach(name).await?;
        let _one_at_a_time = self.images.changing.lock().await;
        self.images.retain(&held, Retention::UntilDetached).map_err(Refusal::internal)?;
        Ok(held)
    }

    /// Attaches an image that carries a VM's disk from elsewhere. If this node is or becomes an origin of it, because it
    /// carries the same elsewhere, the image goes under this name too when nobody uses it any more.
    pub(crate) async fn attach_transfer(&self, name: &ImageName) -> Result<ImageGuard, Refusal> {
        let image = self.attach(name).await?;
        self.images.mark_as_transfer(&image, name).map_err(Refusal::internal)?;
        Ok(image)
    }

    /// Takes an image out of service that no VM of this node uses.
    pub(crate) async fn detach(&self, name: &ImageName) -> Result<(), Refusal> {
        let _one_at_a_time = self.images.changing.lock().await;
        let attached = self.get(name)?;
        if attached.role() == Role::Origin {
            return Err(Refusal::new(Code::IsOrigin, format!("this node is an origin of '{name}'"))
                .with_hint("'virtman image remove' takes the image away altogether"));
        }
        self.must_be_unused(&attached, name)?;
        self.release(&attached, name).await
    }

    /// The attached image of this name.
    pub(crate) fn get(&self, name: &ImageName) -> Result<Arc<Attached>, Refusal> {
        self.images.by_name(name).ok_or_else(|| {
            Refusal::new(Code::NotAttached, format!("image '{name}' is not attached on node {}", self.node))
        })
    }

    /// Why an image cannot lose these names, or go if it has no other.
    fn use_of(&self, attached: &Attached, names: &[ImageName]) -> Option<ImageUse> {
        let goes = attached.names().iter().all(|name| names.contains(name));
        if goes && self.images.local.is_base(&attached.id) {
            return Some(ImageUse::Base);
        }
        if goes && self.vms.layers.need(&attached.id) {
            return Some(ImageUse::Disks(self.vms.count_on(&attached.id)));
        }
        if attached.is_held() {
            return Some(ImageUse::Guarded);
        }
        if goes && attached.clients() > 0 {
            return Some(ImageUse::Open(attached.clients()));
        }
        names.iter().find_map(|name| {
            let protocol = self.exports.kept_by(&ExportName::Image(name.clone()))?;
            Some(ImageUse::Exported(name.clone(), protocol))
        })
    }

    /// Whether something on this node keeps an image attached, for as long as it does.
    pub(crate) fn need(&self, attached: &Attached) -> Need {
        let stays = attached.role() == Role::Origin
            || !matches!(attached.retention(), Retention::WhileUsed | Retention::UntilRebased);
        if stays || self.use_of(attached, &attached.names()).is_some() { Need::Used } else { Need::Unused }
    }

    /// Refuses to take a name from an image that is used under it.
    pub(crate) fn must_be_unused(&self, attached: &Attached, name: &ImageName) -> Result<(), Refusal> {
        let Some(image_use) = self.use_of(attached, std::slice::from_ref(name)) else { return Ok(()) };
        let hint = match &image_use {
            ImageUse::Base => {
                Some("remove those first; 'virtman image list --node' shows their sources".to_owned())
            }
            ImageUse::Disks(_) => Some("destroy those VMs first; 'virtman list' shows them".to_owned()),
            ImageUse::Guarded => None,
            ImageUse::Open(_) => Some("end what reads it first".to_owned()),
            ImageUse::Exported(name, _) => Some(format!("'virtman export remove {name}' ends that")),
        };
        let message = format!("'{name}' is used on node {}: {image_use}", self.node);
        let refusal = Refusal::new(Code::ImageInUse, message);
        Err(match hint {
            Some(hint) => refusal.with_hint(hint),
            None => refusal,
        })
    }

    /// Takes a name from an image, and the image out of service with its last one: first Volt gives the node's
    /// children other parents, then the node lets go. The caller holds `changing`.
    pub(crate) async fn release(&self, attached: &Attached, name: &ImageName) -> Result<(), Refusal> {
        // If Volt cannot be told it learns it when this node registers again and does not name the image.
        if attached.names() == [name.clone()]
            && let Err(error) = self.volt.detach(attached.id).await
        {
            tracing::warn!(image = %name, %error, "detach_not_told: Volt learns it when this node registers again");
        }
        match self.images.detach(attached, name).map_err(Refusal::internal)? {
            Detached::Name => {}
            Detached::Image => tracing::info!(image = %name, "image_detached"),
            Detached::InUse => {
                self.stay_attached(attached).await;
                return Err(Refusal::new(Code::ImageInUse, format!("'{name}' is about to be used")));
            }
        }
        Ok(())
    }

    /// Tells Volt that the node has not left after all. If that fails it is done at the next look, or when this node
    /// registers again.
    pub(crate) async fn stay_attached(&self, attached: &Attached) {
        match self.volt.attach_again(attached).await {
            Ok(answer) => self.images.place(&attached.id, answer.placement),
            Err(error) => {
                tracing::debug!(image = attached.id.short(), %error, "Volt has yet to hear that an image is used again");
            }
        }
    }

    /// An attached image as the API shows it.
    pub(crate) fn describe(&self, attached: &Attached) -> NodeImage {
        self.images.describe(attached, self.vms.count_on(&attached.id))
    }
}

impl fmt::Display for ImageUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageUse::Base => f.write_str("images were derived from it and need it"),
            ImageUse::Disks(0) => f.write_str("layers of disks stand on it, or may"),
            ImageUse::Disks(1) => f.write_str("1 VM disk stands on it"),
            ImageUse::Disks(count) => write!(f, "{count} VM disks stand on it"),
            ImageUse::Guarded => f.write_str("an operation is about to use it"),
            ImageUse::Open(1) => f.write_str("1 connection has it open over NBD"),
            ImageUse::Open(count) => write!(f, "{count} connections have it open over NBD"),
            ImageUse::Exported(_, protocol) => write!(f, "it is exported over {protocol}"),
        }
    }
}
