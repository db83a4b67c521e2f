//! What is remembered of a VM, in its directory.

use std::collections::BTreeMap;

use block::{DiskId, ImageId, ImageName, NodeName, SnapshotName, VmName};
use serde::{Deserialize, Serialize};

use crate::disks::DiskRecord;
use crate::layers::LayerId;
use control::api::compute::StartVm;

/// What is remembered of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "StoredVm")]
pub(crate) struct VmRecord {
    pub(crate) name: VmName,
    pub(crate) created_unix_ms: u64,
    /// One at least: the first is what its guest boots from.
    pub(crate) disks: Vec<DiskRecord>,
    /// From old to new.
    pub(crate) snapshots: Vec<Snapshot>,
    /// How its guest was started last.
    pub(crate) start: Option<StartVm>,
    /// The VM belongs to another node, which may not know it yet.
    pub(crate) moved_to: Option<Member>,
    /// Its guest came from another node, and stands still until it is told to go on.
    pub(crate) arrived: bool,
}

/// A node, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) node: NodeName,
    pub(crate) address: String,
}

/// What is remembered of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) name: SnapshotName,
    /// What each disk was that the VM had.
    pub(crate) layers: BTreeMap<DiskId, LayerId>,
    pub(crate) created_unix_ms: u64,
    /// Whether the guest had its file systems frozen.
    pub(crate) quiesced: bool,
}

impl Snapshot {
    /// Whether a disk was this layer.
    pub(crate) fn names(&self, layer: LayerId) -> bool {
        self.layers.values().any(|named| *named == layer)
    }
}

impl VmRecord {
    /// The disk that its guest boots from.
    pub(crate) fn boot_disk(&self) -> &DiskRecord {
        self.disks.first().expect("a VM has a disk")
    }

    /// All layers that the record names.
    pub(crate) fn layers(&self) -> impl Iterator<Item = LayerId> {
        let frozen = self.snapshots.iter().flat_map(|snapshot| snapshot.layers.values().copied());
        frozen.chain(self.disks.iter().map(|disk| disk.top))
    }
}

/// The layers that only the record `after` names, and those that only `before` does.
pub(crate) fn differences(before: &VmRecord, after: &VmRecord) -> (Vec<LayerId>, Vec<LayerId>) {
    let only = |one: &VmRecord, other: &VmRecord| {
        let mut others: Vec<LayerId> = other.layers().collect();
        let is_new = |id: &LayerId| match others.iter().position(|known| known == id) {
            Some(at) => {
                others.swap_remove(at);
                false
            }
            None => true,
        };
        one.layers().filter(is_new).collect()
    };
    (only(after, before), only(before, after))
}

/// A record as it lies on disk. Older ones have the VM's only disk in their own fields.
#[derive(Deserialize)]
struct StoredVm {
    name: VmName,
    created_unix_ms: u64,
    #[serde(default)]
    disks: Vec<DiskRecord>,
    #[serde(flatten)]
    only_disk: Option<OnlyDisk>,
    #[serde(default)]
    snapshots: Vec<StoredSnapshot>,
    #[serde(default)]
    start: Option<StartVm>,
    #[serde(default)]
    moved_to: Option<Member>,
    #[serde(default)]
    arrived: bool,
}

#[derive(Deserialize)]
struct OnlyDisk {
    serial: DiskId,
    image: ImageName,
    image_id: ImageId,
    size_bytes: u64,
    top: LayerId,
}

#[derive(Deserialize)]
struct StoredSnapshot {
    name: SnapshotName,
    #[serde(default)]
    layers: BTreeMap<DiskId, LayerId>,
    /// That of the only disk.
    #[serde(default)]
    layer: Option<LayerId>,
    created_unix_ms: u64,
    quiesced: bool,
}

impl TryFrom<StoredVm> for VmRecord {
    type Error = String;

    fn try_from(stored: StoredVm) -> Result<VmRecord, String> {
        let StoredVm { name, created_unix_ms, mut disks, only_disk, snapshots, start, moved_to, arrived } =
            stored;
        let only = only_disk.as_ref().map(|only| only.serial);
        disks.extend(only_disk.map(|OnlyDisk { serial, image, image_id, size_bytes, top }| DiskRecord {
            id: serial,
            image,
            image_id,
            size_bytes,
            top,
        }));
        if disks.is_empty() {
            return Err(format!("'{name}' has no disk"));
        }
        let snapshots = snapshots.into_iter().map(|stored| {
            let StoredSnapshot { name, mut layers, layer, created_unix_ms, quiesced } = stored;
            layers.extend(only.zip(layer));
            match layers.is_empty() {
                true => Err(format!("snapshot '{name}' has no layer")),
                false => Ok(Snapshot { name, layers, created_unix_ms, quiesced }),
            }
        });
        let snapshots = snapshots.collect::<Result<_, String>>()?;
        Ok(VmRecord { name, created_unix_ms, disks, snapshots, start, moved_to, arrived })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As it was before VMs had several disks.
    const ONE_DISK: &str = r#"{
        "name": "web1", "image": "debian:12",
        "image_id": "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        "size_bytes": 4096, "created_unix_ms": 7, "serial": "00112233445566778899aabbccddeeff",
        "top": "TOP",
        "snapshots": [{ "name": "s", "layer": "LOWER", "created_unix_ms": 8, "quiesced": true }],
        "start": null, "moved_to": null, "arrived": false
    }"#;

    fn one_disk(top: LayerId, lower: LayerId) -> String {
        ONE_DISK.replace("TOP", &top.to_string()).replace("LOWER", &lower.to_string())
    }

    #[test]
    fn a_record_of_a_vm_with_one_disk_is_read_and_written_as_one_with_a_list() {
        let (top, lower) = (LayerId::draw(), LayerId::draw());
        let record: VmRecord = serde_json::from_str(&one_disk(top, lower)).unwrap();
        let disk = record.boot_disk();
        assert_eq!((disk.top, disk.size_bytes), (top, 4096));
        assert_eq!(disk.id.to_string(), "00112233445566778899aabbccddeeff");
        assert_eq!(record.snapshots[0].layers, BTreeMap::from([(disk.id, lower)]));
        assert_eq!(record.layers().collect::<Vec<_>>(), [lower, top]);
        let json = serde_json::to_string(&record).unwrap();
        let again: VmRecord = serde_json::from_str(&json).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), json);
    }

    #[test]
    fn a_record_without_a_disk_or_a_layer_is_damaged() {
        let record = one_disk(LayerId::draw(), LayerId::draw());
        for missing in ["serial", "layer"] {
            let without = record.replace(&format!("\"{missing}\""), "\"something\"");
            assert!(serde_json::from_str::<VmRecord>(&without).is_err(), "without {missing}");
        }
    }
}
