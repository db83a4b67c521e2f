//! Clones of VMs' disks, and images made of them.
//!
//! A clone on the same node is a new layer on the frozen one. For all others the frozen state becomes a *derived
//! image*, of which only what differs from the VM's own image is new: nodes attach it like any image, read it at once,
//! and fetch what differs over the hierarchy. A clone elsewhere stands on a layer of its node that takes over that
//! difference in the background and then [settles](super::settle) on the VM's own image; from then on it needs
//! nobody but that image's origins.
//!
//! Consistency: what is cloned is what a power cut at that moment would leave on the disk; quiesced, the guest has
//! written out its file systems before. Crash: a frozen layer that nobody came to name is swept away. Cancellation:
//! deriving stops when its client hangs up; the rest runs to its end. Retries: none.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use block::{ImageId, ImageName, VmName};
use image::{DeriveRequest, ImportProgress, Novelty, RootPage};
use tokio::runtime::Handle;

use super::images::Attached;
use super::layers::{Below, Layer, LayerDisks, LayerId, Older, Parent};
use super::node::Node;
use super::routes::to_the_end;
use super::snapshots::Quiesce;
use super::unused::{Held, Stay};
use super::vms::{NewVm, blocking};
use control::api::compute::{CloneVm, CommitVm, NodeImage, Vm};
use control::http::ApiError;

/// How long a name stays in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Until somebody removes it.
    Kept,
    /// Until no other node uses it: it carries a VM's disk to others.
    Passing,
}

/// An image that was made and is not known to Volt yet.
pub(super) struct MadeImage {
    pub(super) id: ImageId,
    pub(super) root: RootPage,
    pub(super) novelty: Novelty,
}

impl Node {
    /// Clones a VM's disk on this node.
    pub(crate) async fn clone_here(&self, name: &VmName, request: &CloneVm) -> Result<Vec<Vm>, ApiError> {
        let asked = Instant::now();
        for clone in &request.clones {
            self.vms.must_be_free(clone)?;
        }
        let (record, layer) = self.vms.freeze_for_clones(name, quiesce_of(request.quiesce)).await?;
        let mut vms = Vec::new();
        let mut failure = None;
        for clone in &request.clones {
            let new = NewVm {
                name: clone.clone(),
                image: record.image.clone(),
                image_id: record.image_id,
                size_bytes: record.size_bytes,
            };
            match self.vms.create_on(new, Arc::clone(&layer), asked).await {
                Ok(vm) => vms.push(vm),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        self.vms.release(layer).await;
        failure.map_or(Ok(vms), Err)
    }

    /// Makes an image of the present state of a VM's disk.
    pub(crate) async fn commit(
        self: &Arc<Self>,
        name: &VmName,
        request: CommitVm,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, ApiError> {
        let CommitVm { image, quiesce, passing } = request;
        self.images.must_have_room_for(&image)?;
        if self.volt.is_image(&image).await? {
            return Err(ApiError::conflict("name_taken", format!("there is an image '{image}' already"))
                .with_hint("choose another name"));
        }
        let (node, vm) = (Arc::clone(self), name.clone());
        let frozen = to_the_end(async move { node.vms.freeze_for_clones(&vm, quiesce_of(quiesce)).await });
        let (_, layer) = frozen.await?;
        let purpose = if passing { Purpose::Passing } else { Purpose::Kept };
        let attached = self.make_image(layer, &image, purpose, progress).await?;
        Ok(self.describe(&attached))
    }

    /// Makes an image of a frozen layer and what is below it. The caller's hold on the layer goes over to the image,
    /// or is given up.
    pub(super) async fn make_image(
        self: &Arc<Self>,
        layer: Arc<Layer>,
        name: &ImageName,
        purpose: Purpose,
        progress: Arc<ImportProgress>,
    ) -> Result<Arc<Attached>, ApiError> {
        let made = self.derive(&layer, progress).await;
        let (node, name) = (Arc::clone(self), name.clone());
        to_the_end(async move {
            let published = match made {
                Ok(Some(made)) => node.publish_derived(&name, made, &layer).await,
                Ok(None) => node.unchanged(&layer, purpose),
                Err(error) => Err(error),
            };
            match published {
                Ok(attached) => {
                    if purpose == Purpose::Passing && attached.derived().is_some() {
                        node.images.let_pass(&attached, &name).map_err(ApiError::internal)?;
                    }
                    Ok(attached)
                }
                Err(error) => {
                    node.vms.release(layer).await;
                    Err(error)
                }
            }
        })
        .await
    }

    /// The disk is as its image. To carry it elsewhere that is good news.
    fn unchanged(&self, layer: &Arc<Layer>, purpose: Purpose) -> Result<Arc<Attached>, ApiError> {
        let (layers, base) = layer.chain();
        if purpose == Purpose::Passing {
            self.vms.layers.release(layer.id());
            return Ok(base);
        }
        if layers.last().is_some_and(|lowest| matches!(lowest.below(), Below::Carried { .. })) {
            let message = "the disk came from another node a moment ago, and not all of it is here yet";
            return Err(ApiError::conflict("settling", message)
                .with_hint("try again when 'virtman show' no longer says that it is taken over"));
        }
        let names: Vec<String> = base.names().iter().map(ToString::to_string).collect();
        let message = format!("the disk does not differ from its image, {}", names.join(", "));
        Err(ApiError::conflict("nothing_changed", message).with_hint("use that image"))
    }

    /// Derives an image from a frozen layer and what is below it; `None` if it does not differ from its image.
    async fn derive(
        &self,
        layer: &Arc<Layer>,
        progress: Arc<ImportProgress>,
    ) -> Result<Option<MadeImage>, ApiError> {
        let (layers, base) = layer.chain();
        let request = DeriveRequest {
            base: Arc::clone(&base.volume),
            disk: Arc::clone(layer) as _,
            runtime: Handle::current(),
            changed: union(layers.iter().map(|layer| layer.overlay().own_ranges())),
            location: LayerDisks::location(layer.id()),
        };
        let dir = self.images_dir.clone();
        let derived = tokio::task::spawn_blocking(move || image::derive(&request, &dir, &progress));
        let derived = derived.await.map_err(|e| ApiError::internal(e.to_string()))?;
        let derived = derived.map_err(|e| ApiError::internal(format!("cannot derive an image: {e}")))?;
        let made = |derived: image::Derived| MadeImage {
            id: derived.id,
            root: derived.root,
            novelty: derived.novelty,
        };
        Ok(derived.map(made))
    }

    /// Serves a derived image under a name. The hold on the layer goes over to the image, or is given up.
    async fn publish_derived(
        &self,
        name: &ImageName,
        made: MadeImage,
        layer: &Arc<Layer>,
    ) -> Result<Arc<Attached>, ApiError> {
        let before = self.images.by_id(&made.id).and_then(|image| image.derived());
        let attached = self.publish(name, &made).await?;
        // The same content may have been derived from another layer before, or imported.
        let holds_this =
            attached.derived().is_some_and(|now| now.location() == LayerDisks::location(layer.id()));
        let replaced =
            before.filter(|before| holds_this && before.location() != LayerDisks::location(layer.id()));
        if let Some(Ok(old)) = replaced.map(|before| LayerDisks::layer_at(before.location())) {
            self.vms.layers.release(old);
        }
        if !holds_this {
            self.vms.release(Arc::clone(layer)).await;
        }
        Ok(attached)
    }

    /// Attaches an image that carries a VM's disk from elsewhere. If this node is or becomes an origin of it, because it
    /// carries the same elsewhere, the image goes under this name too when nobody uses it any more.
    pub(super) async fn attach_carried(&self, name: &ImageName) -> Result<Held, ApiError> {
        let image = self.attach(name).await?;
        self.images.let_pass(&image, name).map_err(ApiError::internal)?;
        Ok(image)
    }

    /// Gives a VM a disk on an image that carries another VM's disk here. In the background the difference from that
    /// VM's own image is taken over, and the disk stands on that.
    pub(super) async fn create_settling(
        &self,
        name: &VmName,
        from: Arc<Attached>,
        own: &ImageName,
        asked: Instant,
    ) -> Result<Vm, ApiError> {
        let to = self.attach(own).await?;
        let landing = match from.derived() {
            // On the node where the disk is that it was made of, there is nothing to carry.
            Some(derived) => self.vms.hold_frozen(LayerDisks::layer_at(derived.location())).await?,
            None => self.landing(&from, &to, None).await?,
        };
        let size_bytes = from.root.size_bytes();
        let new = NewVm { name: name.clone(), image: own.clone(), image_id: to.id, size_bytes };
        let created = self.vms.create_on(new, Arc::clone(&landing), asked).await;
        self.vms.release(landing).await;
        created
    }

    /// The layer that takes over a disk which comes as the image `from`, and is to stand on its image `to`, or `on` an
    /// older state of the disk. Held for the caller.
    pub(super) async fn landing(
        &self,
        from: &Arc<Attached>,
        to: &Arc<Attached>,
        on: Option<Older>,
    ) -> Result<Arc<Layer>, ApiError> {
        let _one_at_a_time = self.landing.lock().await;
        if let Some(landing) = self.vms.layers.carried(Parent::Carried { image: from.id, base: to.id, on })
            && self.vms.layers.hold(landing.id())
        {
            return Ok(landing);
        }
        if from.stay() == Stay::WhileUsed {
            self.images.let_stay(from, Stay::UntilSettled).map_err(ApiError::internal)?;
        }
        let (layers, from, to) = (Arc::clone(&self.vms.layers), Arc::clone(from), Arc::clone(to));
        blocking(move || {
            let size_bytes = from.root.size_bytes();
            let below = Below::Carried { image: from, base: to, on };
            let landing = layers.make(LayerId::draw(), below, size_bytes)?;
            landing.overlay().set_frozen();
            Ok(landing)
        })
        .await
    }
}

pub(super) fn quiesce_of(quiesce: bool) -> Quiesce {
    if quiesce { Quiesce::Yes } else { Quiesce::No }
}

/// A name for an image that passes, which nobody else would choose.
pub(super) fn passing_name(what: &str) -> Result<ImageName, ApiError> {
    let name = format!("{what}:{:016x}", rand::random::<u64>());
    name.parse().map_err(|e: block::NameError| ApiError::internal(e.to_string()))
}

/// The ranges that are in any of these lists, in order and apart from each other.
pub(super) fn union(lists: impl Iterator<Item = Vec<Range<u64>>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = lists.flatten().collect();
    all.sort_by_key(|range| range.start);
    let mut union: Vec<Range<u64>> = Vec::new();
    for range in all {
        match union.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => union.push(range),
        }
    }
    union
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_union_covers_each_byte_once_and_in_order() {
        let lists = [vec![10..20, 30..40], vec![0..5, 15..31, 50..60], vec![5..6, 8..9]];
        assert_eq!(union(lists.into_iter()), [0..6, 8..9, 10..40, 50..60]);
    }
}
