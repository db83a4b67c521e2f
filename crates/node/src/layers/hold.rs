//! What keeps a layer while somebody works with it: values that let go of it when they are dropped.
//!
//! Records on disk keep layers too; they are counted with [`Layers::add_refs`] and [`Layers::release_refs`] by those who
//! write the records, since a record outlives the daemon and a value does not.

use std::ops::Deref;
use std::sync::Arc;

use super::{Layer, LayerId, Layers};

/// A layer that is not removed as long as this is there.
pub(super) struct LayerHold {
    layers: Arc<Layers>,
    id: LayerId,
}

impl LayerHold {
    /// The caller has counted it.
    pub(super) fn new(layers: Arc<Layers>, id: LayerId) -> LayerHold {
        LayerHold { layers, id }
    }
}

impl Drop for LayerHold {
    fn drop(&mut self) {
        self.layers.let_go(self.id);
    }
}

/// An open layer that is not removed as long as this is there.
pub(crate) struct HeldLayer {
    // Closed before it is let go of.
    layer: Arc<Layer>,
    _hold: LayerHold,
}

impl HeldLayer {
    /// The two are of one layer.
    pub(super) fn new(layer: Arc<Layer>, hold: LayerHold) -> HeldLayer {
        debug_assert_eq!(layer.id, hold.id, "a hold on one layer keeps no other");
        HeldLayer { layer, _hold: hold }
    }
}

impl Deref for HeldLayer {
    type Target = Arc<Layer>;
    fn deref(&self) -> &Arc<Layer> {
        &self.layer
    }
}
