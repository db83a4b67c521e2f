//! What a node shows of itself: its state at a glance, and everything about one VM for `virtman show`.
//!
//! Consistency: each part is as it is at that moment; the parts need not be of the same. Nothing is changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use block::limits::CHUNK_BYTES;
use block::{NodeName, VmName};
use link::Stats;

use super::images::ImageService;
use crate::cache::CacheMedia;
use crate::exports::Exports;
use crate::layers::{Below, Layer, LayerId};
use crate::vms::snapshots::Snapshots;
use crate::vms::{Vm, VmRecord, Vms};
use control::api::compute::{CacheStatus, LinkStatus, NodeStatus};
use control::api::details::{BootTimeline, CarriedImage, LayerState, LayerView, VmDetails};
use control::api::export::ExportName;
use control::api::unix_ms;
use control::refusal::Refusal;

/// What is shown of a node.
pub(crate) struct Details {
    node: NodeName,
    address: String,
    vms: Arc<Vms>,
    snapshots: Arc<Snapshots>,
    images: Arc<ImageService>,
    exports: Arc<Exports>,
    cache: Arc<CacheMedia>,
    links: Arc<Stats>,
}

/// Where the details are taken from.
pub(crate) struct Sources {
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) images: Arc<ImageService>,
    pub(crate) exports: Arc<Exports>,
    pub(crate) cache: Arc<CacheMedia>,
    pub(crate) links: Arc<Stats>,
}

impl Details {
    /// Those of a node that is reached at `address`.
    pub(crate) fn new(node: NodeName, address: String, vms: Arc<Vms>, sources: Sources) -> Details {
        let Sources { snapshots, images, exports, cache, links } = sources;
        Details { node, address, vms, snapshots, images, exports, cache, links }
    }

    /// The node at a glance.
    pub(crate) fn status(&self) -> NodeStatus {
        let vms = self.vms.all();
        NodeStatus {
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            address: self.address.clone(),
            volt_connected: self.images.volt.is_connected(),
            memory_bytes: resident_bytes(),
            cache: self.cache_status(),
            links: self.link_status(),
            vms: vms.len(),
            running: vms.iter().filter(|vm| vm.running().is_some()).count(),
        }
    }

    fn cache_status(&self) -> CacheStatus {
        let stats = self.cache.group().stats();
        let chunk_bytes = CHUNK_BYTES as u64;
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
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
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

    /// Everything about a VM. Blocks.
    pub(crate) fn of_vm(&self, name: &VmName) -> Result<VmDetails, Refusal> {
        let vm = self.vms.get(name)?;
        let record = vm.record();
        let disk = record.boot_disk();
        let attached = self.images.images.by_id(&disk.image_id).ok_or_else(|| {
            Refusal::internal(format!("image '{}' of '{name}' is not attached", disk.image))
        })?;
        let chains: Vec<_> = vm.disks().iter().map(|disk| disk.top().chain().0).collect();
        let mut layers: Vec<_> = chains.iter().map(|chain| self.layer_views(&record, chain)).collect();
        let bytes = |shared| {
            let of_all = layers.iter().flatten().filter(|layer| layer.shared == shared);
            of_all.map(|layer| layer.bytes).sum()
        };
        let (own_bytes, shared_bytes) = (bytes(false), bytes(true));
        let export = ExportName::Vm(name.clone());
        Ok(VmDetails {
            vm: self.vms.describe(&vm),
            serial: disk.id.to_string(),
            disks: self.vms.describe_disks(&vm),
            layers: layers.swap_remove(0),
            own_bytes,
            shared_bytes,
            snapshots: self.snapshots.list(name)?,
            taking_over: chains.iter().find_map(|chain| carried(chain.last()?)),
            exports: self.exports.describe().into_iter().filter(|view| view.name == export).collect(),
            image: self.images.describe(&attached),
            cache: self.cache_status(),
            io: vm.boot_disk().io.io(),
            boot: boot_timeline(&vm),
        })
    }

    fn layer_views(&self, record: &VmRecord, chain: &[Arc<Layer>]) -> Vec<LayerView> {
        let own: Vec<LayerId> = record.layers().collect();
        let shared: BTreeSet<LayerId> = self.vms.layers.needed_beside(&own);
        let view = |layer: &Arc<Layer>| LayerView {
            id: layer.id().to_string(),
            bytes: layer.overlay().allocated_bytes(),
            made_unix_ms: self.vms.layers.made_unix_ms(layer.id()).unwrap_or_default(),
            state: if layer.overlay().is_frozen() { LayerState::Frozen } else { LayerState::Writable },
            snapshots: {
                let named = record.snapshots.iter().filter(|snapshot| snapshot.names(layer.id()));
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

fn boot_timeline(vm: &Vm) -> BootTimeline {
    let started_unix_ms = vm.running().map(|guest| unix_ms(guest.started()));
    let ready = vm.last_ready();
    let since_start = |at: u64| started_unix_ms.map(|started| at.saturating_sub(started));
    let first_read_ms = vm.boot_disk().io.first_read_unix_ms().and_then(since_start);
    BootTimeline {
        disk_ms: vm.disk_ms(),
        started_unix_ms,
        first_read_ms: first_read_ms.or(ready.and_then(|ready| ready.first_read_ms)),
        ready_ms: ready.map(|ready| ready.ready_ms),
    }
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
