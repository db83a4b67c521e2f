//! Everything about one VM, gathered for `virtman show`.
//!
//! Consistency: each part is as it is at that moment; the parts need not be of the same. Nothing is changed.

use std::collections::BTreeSet;
use std::sync::Arc;

use block::VmName;

use super::entry::{Entry, Record};
use super::layers::{Below, Layer, LayerId};
use super::node::Node;
use control::api::details::{BootTimeline, CarriedImage, LayerState, LayerView, VmDetails};
use control::api::export::ExportName;
use control::api::unix_ms;
use control::http::ApiError;

impl Node {
    /// Everything about a VM. Blocks.
    pub(crate) fn details(&self, name: &VmName) -> Result<VmDetails, ApiError> {
        let entry = self.vms.get(name)?;
        let (record, top) = (entry.record(), entry.top());
        let attached = self.images.by_id(&record.image_id).ok_or_else(|| {
            ApiError::internal(format!("image '{}' of '{name}' is not attached", record.image))
        })?;
        let (chain, _) = top.chain();
        let layers = self.layer_views(&record, &chain);
        let bytes =
            |shared| layers.iter().filter(|layer| layer.shared == shared).map(|layer| layer.bytes).sum();
        let export = ExportName::Vm(name.clone());
        Ok(VmDetails {
            vm: self.vms.describe(&entry),
            serial: record.serial,
            own_bytes: bytes(false),
            shared_bytes: bytes(true),
            layers,
            snapshots: self.vms.snapshots(name)?,
            taking_over: chain.last().and_then(|lowest| carried(lowest)),
            exports: self.exports().into_iter().filter(|view| view.name == export).collect(),
            image: self.describe(&attached),
            cache: self.cache_status(),
            io: entry.disk.io(),
            boot: boot_timeline(&entry),
        })
    }

    fn layer_views(&self, record: &Record, chain: &[Arc<Layer>]) -> Vec<LayerView> {
        let own: Vec<LayerId> = record.holds().collect();
        let shared: BTreeSet<LayerId> = self.vms.layers.needed_beside(&own);
        let view = |layer: &Arc<Layer>| LayerView {
            id: layer.id().to_string(),
            bytes: layer.overlay().allocated_bytes(),
            made_unix_ms: self.vms.layers.made_unix_ms(layer.id()).unwrap_or_default(),
            state: if layer.overlay().is_frozen() { LayerState::Frozen } else { LayerState::Writable },
            snapshots: {
                let named = record.snapshots.iter().filter(|snapshot| snapshot.layer == layer.id());
                named.map(|snapshot| snapshot.name.clone()).collect()
            },
            shared: shared.contains(&layer.id()),
        };
        chain.iter().map(view).collect()
    }
}

/// The image that a layer takes over another VM's disk from.
fn carried(lowest: &Layer) -> Option<CarriedImage> {
    match lowest.below() {
        Below::Carried { image, .. } => Some(CarriedImage { names: image.names(), id: image.id }),
        Below::Layer(_) | Below::Image(_) => None,
    }
}

fn boot_timeline(entry: &Entry) -> BootTimeline {
    let started_unix_ms = entry.running().map(|guest| unix_ms(guest.started()));
    let ready = entry.last_ready();
    let since_start = |at: u64| started_unix_ms.map(|started| at.saturating_sub(started));
    let first_read_ms = entry.disk.first_read_unix_ms().and_then(since_start);
    BootTimeline {
        disk_ms: entry.disk_ms(),
        started_unix_ms,
        first_read_ms: first_read_ms.or(ready.and_then(|ready| ready.first_read_ms)),
        ready_ms: ready.map(|ready| ready.ready_ms),
    }
}
