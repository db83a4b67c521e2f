//! Disks that VMs write to: the bodies of a node's API under `/v1/disks`.

use block::{DiskId, ImageId, ImageName, NodeName, VmName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskView {
    /// Its identity, which stays when it moves: also the serial number that guests and initiators see.
    #[schema(value_type = String)]
    pub id: DiskId,
    /// The node that it is on.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// The VM that it belongs to.
    #[schema(value_type = String)]
    pub vm: VmName,
    /// The image below it.
    #[schema(value_type = String)]
    pub image: ImageName,
    /// That image's id.
    #[schema(value_type = String)]
    pub image_id: ImageId,
    /// Its size.
    pub size_bytes: u64,
    /// Bytes that its private layers hold, those that it shares with clones included.
    pub private_bytes: u64,
    /// Its private layers, which reads look through.
    pub layers: usize,
    /// NBD URI of its socket.
    pub nbd: String,
}
