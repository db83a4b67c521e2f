//! Clones of VMs' disks, and images made of them.
//!
//! A clone on the same node is a new layer on the frozen one. For all others the frozen state becomes a *derived
//! image*, of which only what differs from the VM's own image is new: nodes attach it like any image, read it at once,
//! and fetch what differs over the hierarchy. A clone elsewhere stands on a layer of its node that takes over that
//! difference in the background and is then [rebased](crate::layers::rebase) onto the VM's own image; from then on it
//! needs nobody but that image's origins.
//!
//! Consistency: a clone is crash-consistent; quiesced, the guest has written out its file systems before. Crash: a
//! frozen layer that nobody came to name is swept away. Cancellation: deriving stops when its client hangs up; the rest
//! runs to its end. Retries: none.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use block::{ImageName, VmName};
use image::{DeriveRequest, ImportProgress};
use tokio::runtime::Handle;

use super::images::ImageService;
use super::origins::{MadeImage, OriginService};
use crate::images::retention::Retention;
use crate::images::{Attached, ImageGuard, Images};
use crate::layers::{self, Below, HeldLayer, Layer, LayerId, Layers, Older, Parent};
use crate::tasks::{blocking, run_uncancelled};
use crate::vms::snapshots::{Quiesce, Snapshots};
use crate::vms::{NewDisk, NewVm, Vms};
use control::api::compute::{CloneVm, CommitVm, NodeImage, Vm as VmView};
use control::refusal::{Code, Refusal};

/// How long a name stays in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Until somebody removes it.
    Kept,
    /// Until no other node uses it: it carries a VM's disk to others.
    Transfer,
}

/// How often a disk may be rebased while it is looked what it stands on: far more often than it has layers to rebase.
const REBASES_MAX: usize = 1000;

/// Clones the disks of a node's VMs.
pub(crate) struct Clones {
    images: Arc<Images>,
    service: Arc<ImageService>,
    origins: Arc<OriginService>,
    vms: Arc<Vms>,
    layers: Arc<Layers>,
    snapshots: Arc<Snapshots>,
    /// Held while it is decided which layer clones stand on.
    deciding: tokio::sync::Mutex<()>,
}

impl Clones {
    /// Those of these VMs.
    pub(crate) fn new(
        service: Arc<ImageService>,
        origins: Arc<OriginService>,
        vms: Arc<Vms>,
        snapshots: Arc<Snapshots>,
    ) -> Clones {
        let (images, layers) = (Arc::clone(&service.images), Arc::clone(&vms.layers));
        Clones { images, service, origins, vms, layers, snapshots, deciding: tokio::sync::Mutex::new(()) }
    }

    /// Clones a VM's disks on this node.
    pub(crate) async fn clone_here(&self, name: &VmName, request: &CloneVm) -> Result<Vec<VmView>, Refusal> {
        let asked = Instant::now();
        for clone in &request.clones {
            self.vms.must_be_free(clone)?;
        }
        let (record, frozen) = self.snapshots.freeze_for_clones(name, Quiesce::of(request.quiesce)).await?;
        let mut vms = Vec::new();
        let mut failure = None;
        for clone in &request.clones {
            let new = NewVm::like(&record, clone.clone());
            let below = frozen.iter().map(|layer| Arc::clone(layer)).collect();
            match self.vms.create_on(new, below, asked).await {
                Ok(vm) => vms.push(vm),
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        failure.map_or(Ok(vms), Err)
    }

    /// Makes an image of the present state of a VM's disk. Refused for a VM with several: an image has one.
    pub(crate) async fn commit(
        self: &Arc<Self>,
        name: &VmName,
        request: CommitVm,
        progress: Arc<ImportProgress>,
    ) -> Result<NodeImage, Refusal> {
        let CommitVm { image, quiesce, passing } = request;
        self.images.check_name_len(&image)?;
        if self.service.volt.is_image(&image).await? {
            return Err(Refusal::new(Code::NameTaken, format!("there is an image '{image}' already"))
                .with_hint("choose another name"));
        }
        if self.vms.get(name)?.disks().len() > 1 {
            let message = format!("'{name}' has several disks, and an image is made of one");
            return Err(Refusal::new(Code::SeveralDisks, message)
                .with_hint("clone it on its own node, or move it to another"));
        }
        let (snapshots, vm) = (Arc::clone(&self.snapshots), name.clone());
        let frozen =
            run_uncancelled(async move { snapshots.freeze_for_clones(&vm, Quiesce::of(quiesce)).await });
        let (_, mut layers) = frozen.await?;
        let layer = layers.remove(0);
        let purpose = if passing { Purpose::Transfer } else { Purpose::Kept };
        let attached = self.make_image(layer, &image, purpose, progress).await?;
        Ok(self.service.describe(&attached))
    }

    /// Makes an image of a frozen layer and what is below it.
    pub(crate) async fn make_image(
        self: &Arc<Self>,
        layer: HeldLayer,
        name: &ImageName,
        purpose: Purpose,
        progress: Arc<ImportProgress>,
    ) -> Result<Arc<Attached>, Refusal> {
        // What the image is derived from must be there until it is served.
        let (made, base) = self.derive(&layer, progress).await?;
        let (clones, name) = (Arc::clone(self), name.clone());
        run_uncancelled(async move {
            let _base = base;
            let attached = match made {
                Some(made) => clones.publish_derived(&name, made, &layer).await?,
                None => unchanged(&layer, purpose)?,
            };
            if purpose == Purpose::Transfer && attached.derived().is_some() {
                clones.images.mark_as_transfer(&attached, &name).map_err(Refusal::internal)?;
            }
            Ok(attached)
        })
        .await
    }

    /// Derives an image from a frozen layer and what is below it; `None` if it does not differ from its image. That
    /// stays attached as long as the caller holds it.
    async fn derive(
        &self,
        layer: &HeldLayer,
        progress: Arc<ImportProgress>,
    ) -> Result<(Option<MadeImage>, ImageGuard), Refusal> {
        // If the disk is rebased between the two, the image that carried it goes, and the chain has another base.
        let guarded = (0..REBASES_MAX).find_map(|_| {
            let (layers, base) = layer.chain();
            Some((layers, self.images.guard(&base)?))
        });
        let (layers, base) =
            guarded.ok_or_else(|| Refusal::internal("the image of a disk is not attached"))?;
        let request = DeriveRequest {
            base: Arc::clone(&base.volume),
            disk: Arc::<Layer>::clone(layer) as _,
            runtime: Handle::current(),
            changed: union(layers.iter().map(|layer| layer.overlay().own_ranges())),
            location: layers::location_of(layer.id()),
        };
        let dir = self.images.local.dir().to_owned();
        let derived = tokio::task::spawn_blocking(move || image::derive(&request, &dir, &progress));
        let derived = derived.await.map_err(|e| Refusal::internal(e.to_string()))?;
        let derived = derived.map_err(|e| Refusal::internal(format!("cannot derive an image: {e}")))?;
        let made = |derived: image::Derived| MadeImage {
            id: derived.id,
            root: derived.root,
            novelty: derived.novelty,
        };
        Ok((derived.map(made), base))
    }

    /// Serves a derived image under a name. The image names the layer from then on, if it is derived from that.
    async fn publish_derived(
        &self,
        name: &ImageName,
        made: MadeImage,
        layer: &HeldLayer,
    ) -> Result<Arc<Attached>, Refusal> {
        let location_of = |image: &Attached| image.derived().map(|derived| derived.location().to_owned());
        let before = self.images.by_id(&made.id).and_then(|image| location_of(&image));
        let attached = self.origins.publish(name, &made).await?;
        let now = location_of(&attached);
        // The same content may have been derived from this layer before, or from another, or imported.
        if now == before {
            return Ok(attached);
        }
        if now == Some(layers::location_of(layer.id())) {
            self.layers.add_refs([layer.id()]);
            let replaced = before.and_then(|before| layers::layer_at(&before).ok());
            self.vms.release_refs(replaced.into_iter().collect()).await?;
        }
        Ok(attached)
    }

    /// Gives a VM a disk on an image that carries another VM's disk here. In the background the difference from that
    /// VM's own image is taken over, and the disk stands on that.
    pub(crate) async fn create_rebasing(
        &self,
        name: &VmName,
        from: Arc<Attached>,
        own: &ImageName,
        asked: Instant,
    ) -> Result<VmView, Refusal> {
        let to = self.service.attach(own).await?;
        let import = match from.derived() {
            // On the node where the disk is that it was made of, there is nothing to carry.
            Some(derived) => {
                let layer = layers::layer_at(derived.location()).map_err(Refusal::internal)?;
                self.snapshots.hold_durable(layer).await?
            }
            None => self.import_layer(&from, &to, None).await?,
        };
        let disk = NewDisk { image: own.clone(), image_id: to.id, size_bytes: from.root.size_bytes() };
        let new = NewVm { name: name.clone(), disks: vec![disk] };
        self.vms.create_on(new, vec![Arc::clone(&import)], asked).await
    }

    /// The layer that takes over a disk which comes as the image `from`, and is to stand on its image `to`, or `on` an
    /// older state of the disk.
    pub(crate) async fn import_layer(
        &self,
        from: &Arc<Attached>,
        to: &Arc<Attached>,
        on: Option<Older>,
    ) -> Result<HeldLayer, Refusal> {
        let _one_at_a_time = self.deciding.lock().await;
        if let Some(layer) = self.layers.hold_carried(Parent::Carried { image: from.id, base: to.id, on }) {
            return Ok(layer);
        }
        if from.retention() == Retention::WhileUsed {
            self.images.retain(from, Retention::UntilRebased).map_err(Refusal::internal)?;
        }
        let (layers, from, to) = (Arc::clone(&self.layers), Arc::clone(from), Arc::clone(to));
        blocking(move || {
            let size_bytes = from.root.size_bytes();
            let below = Below::Carried { image: from, base: to, on };
            let layer = layers.make(LayerId::draw(), below, size_bytes)?;
            layer.overlay().set_frozen();
            Ok(layer)
        })
        .await
    }
}

/// The disk is as its image. To carry it elsewhere that is good news.
fn unchanged(layer: &HeldLayer, purpose: Purpose) -> Result<Arc<Attached>, Refusal> {
    let (layers, base) = layer.chain();
    if purpose == Purpose::Transfer {
        return Ok(base);
    }
    if layers.last().is_some_and(|lowest| matches!(lowest.below(), Below::Carried { .. })) {
        let message = "the disk came from another node a moment ago, and not all of it is here yet";
        return Err(Refusal::new(Code::Settling, message)
            .with_hint("try again when 'virtman show' no longer says that it is taken over"));
    }
    let names: Vec<String> = base.names().iter().map(ToString::to_string).collect();
    let message = format!("the disk does not differ from its image, {}", names.join(", "));
    Err(Refusal::new(Code::NothingChanged, message).with_hint("use that image"))
}

/// A name for a transfer image, which nobody else would choose.
pub(crate) fn transfer_name(what: &str) -> Result<ImageName, Refusal> {
    let name = format!("{what}:{:016x}", rand::random::<u64>());
    name.parse().map_err(|e: block::NameError| Refusal::internal(e.to_string()))
}

/// The ranges that are in any of these lists, in order and apart from each other.
pub(crate) fn union(lists: impl Iterator<Item = Vec<Range<u64>>>) -> Vec<Range<u64>> {
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
