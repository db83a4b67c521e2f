//! Layers that come to stand on others: two are merged, or one that took over another VM's disk is rebased.
//!
//! What is done here is choosing, and changing records; the bytes are copied by [`merge`](crate::vms::merge) and
//! [`rebase`](super::rebase).

use std::sync::{Arc, PoisonError};

use block::Disk;
use store::Overlay;

use super::forest::Forest;
use super::layer::{Below, Layer, LayerRecord, Parent};
use super::{LayerId, Layers};
use crate::images::Attached;

/// A layer that is to be merged with the only one that stands on it.
pub(crate) struct Merge {
    pub(crate) lower: Arc<Layer>,
    pub(crate) upper: Arc<Layer>,
    pub(crate) direction: MergeDirection,
}

/// Which of two layers takes over what the other holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MergeDirection {
    /// The upper, which then stands on what the lower stands on.
    Up,
    /// The lower, on which then all stands that stands on the upper, and which snapshots name instead.
    Down,
}

/// A lower layer of so many bytes is always worth copying.
const SMALL_BYTES: u64 = 64 << 20;

/// Most layers that are moved from one to another at once, each of which takes some syncs.
const MOVES_MAX: usize = 8;

impl MergeDirection {
    /// The one that copies less, if what stands on the upper `can_move`. `None` while it is better to wait: the upper
    /// takes changes, so that it cannot be left out, and would have to take over much more than it holds.
    fn of(lower: &Overlay, upper: &Overlay, can_move: bool) -> Option<MergeDirection> {
        if lower.allocated_bytes() <= upper.allocated_bytes().max(SMALL_BYTES) {
            return Some(MergeDirection::Up);
        }
        if !upper.is_frozen() {
            return None;
        }
        let can_go_down = can_move && lower.size_bytes() == upper.size_bytes();
        Some(if can_go_down { MergeDirection::Down } else { MergeDirection::Up })
    }
}

/// A layer that takes over another VM's disk and is to be rebased then; see [`Parent::Carried`].
pub(crate) struct Rebase {
    pub(crate) layer: Arc<Layer>,
    pub(crate) image: Arc<Attached>,
    /// What the image differs from in what is to be taken over.
    pub(crate) base: Arc<Attached>,
    /// What the layer is to stand on then, and reads as `base`.
    stand_on: Below,
}

/// What became of a layer that was to stand on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stands {
    /// It does.
    Anew,
    /// Nobody needed it any more, and it was removed meanwhile.
    Gone,
}

/// A layer that can be merged and `may` be, if both it and the one above it are open.
pub(crate) fn next_merge(layers: &Layers, may: impl Fn(LayerId) -> bool) -> Option<Merge> {
    let forest = layers.forest();
    forest.layers.iter().filter(|(lower, _)| may(**lower)).find_map(|(_, known)| {
        let above = forest.layers.get(&forest.merges_into(known)?)?;
        let (lower, upper) = (known.open.upgrade()?, above.open.upgrade()?);
        let is_open = |id: &LayerId| forest.layers.get(id).is_some_and(|known| known.open.strong_count() > 0);
        let can_move = above.children.len() <= MOVES_MAX
            && above.children.iter().all(|id| is_open(id) && !forest.is_carried(id));
        let direction = MergeDirection::of(&lower.overlay, &upper.overlay, can_move)?;
        Some(Merge { lower, upper, direction })
    })
}

/// A layer that takes over another VM's disk; opened if nobody has it open, as may be with a snapshot's.
pub(crate) fn next_rebase(layers: &Layers) -> Option<Rebase> {
    let carried: Vec<LayerId> = {
        let forest = layers.forest();
        forest.layers.keys().filter(|id| forest.is_carried(id)).copied().collect()
    };
    carried.into_iter().find_map(|id| match rebase_of(layers, id) {
        Ok(rebase) => rebase,
        Err(reason) => {
            tracing::debug!(layer = %id, reason, "a layer that is to be rebased cannot be opened now");
            None
        }
    })
}

/// Lets `upper`, which holds all that `lower` does, stand on what `lower` stands on; `lower` is removed. Refused if
/// somebody came to need `lower` meanwhile.
pub(crate) fn merged_up(layers: &Layers, Merge { lower, upper, .. }: &Merge) -> Result<Stands, String> {
    let unneeded = {
        let mut forest = layers.forest();
        let Some(known) = forest.layers.get(&lower.id) else { return Ok(Stands::Gone) };
        if forest.merges_into(known) != Some(upper.id) {
            return Err(format!("layer {} is needed by itself now", lower.id));
        }
        if let Stands::Gone = stand(layers, &mut forest, upper, lower.below())? {
            return Ok(Stands::Gone);
        }
        if let Some(known) = forest.layers.get_mut(&lower.id) {
            known.children.remove(&upper.id);
        }
        forest.take_unneeded(lower.id)
    };
    layers.files.remove(&unneeded);
    layers.merges.notify_one();
    Ok(Stands::Anew)
}

/// Lets all that stands on `upper` stand on `lower`, which holds all that `upper` does. `upper` is removed unless
/// somebody names it.
pub(crate) fn merged_down(layers: &Layers, Merge { lower, upper, .. }: &Merge) -> Result<Stands, String> {
    let unneeded = {
        let mut forest = layers.forest();
        let Some(known) = forest.layers.get(&upper.id) else { return Ok(Stands::Gone) };
        for id in known.children.clone() {
            if forest.is_carried(&id) {
                return Err(format!("layer {id} is yet to be rebased onto it"));
            }
            let Some(child) = forest.layers.get(&id).and_then(|known| known.open.upgrade()) else {
                return Err(format!("layer {id} is not open"));
            };
            stand(layers, &mut forest, &child, Below::Layer(Arc::clone(lower)))?;
            if let Some(known) = forest.layers.get_mut(&upper.id) {
                known.children.remove(&id);
            }
        }
        forest.take_unneeded(upper.id)
    };
    layers.files.remove(&unneeded);
    layers.merges.notify_one();
    Ok(Stands::Anew)
}

/// Lets a layer that has taken over another VM's disk stand on what both have in common.
pub(crate) fn rebased(layers: &Layers, rebase: &Rebase) -> Result<Stands, String> {
    let stands = stand(layers, &mut layers.forest(), &rebase.layer, rebase.stand_on.clone())?;
    layers.merges.notify_one();
    Ok(stands)
}

fn rebase_of(layers: &Layers, id: LayerId) -> Result<Option<Rebase>, String> {
    let layer = layers.open_frozen(id)?;
    let Below::Carried { image, base, on } = layer.below() else { return Ok(None) };
    let (base, stand_on) = match on {
        None => (Arc::clone(&base), Below::Image(base)),
        Some(older) => (layers.attached(&older.image)?, Below::Layer(layers.open_frozen(older.layer)?)),
    };
    Ok(Some(Rebase { layer, image, base, stand_on }))
}

/// Changes what a layer stands on: on disk first. Under the lock, so that nobody removes the layer meanwhile.
fn stand(layers: &Layers, forest: &mut Forest, layer: &Arc<Layer>, below: Below) -> Result<Stands, String> {
    let parent = below.parent();
    let Some(known) = forest.layers.get_mut(&layer.id) else { return Ok(Stands::Gone) };
    let record = LayerRecord { parent, made_unix_ms: known.record.made_unix_ms };
    tokio::task::block_in_place(|| layers.files.save(layer.id, &record))?;
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
