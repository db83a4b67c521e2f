//! The bodies of Volt's API.

use std::fmt;

use block::{ChunkHash, ImageId, ImageName, NodeName};
use planner::{Location, Placement, Role, Shape, Shaping};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::profile::ProfileOffer;

/// What an image is of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A disk: VMs' disks can stand on it. What all images were once.
    #[default]
    Disk,
    /// The memory of a guest.
    Memory,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ImageKind::Disk => "disk",
            ImageKind::Memory => "memory",
        })
    }
}

/// An image in the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageRecord {
    /// Name with tag.
    #[schema(value_type = String, example = "debian:12")]
    pub name: ImageName,
    /// BLAKE3 of the root page, 64 hexadecimal digits.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// What it is of.
    #[serde(default)]
    pub kind: ImageKind,
    /// The root page itself, base64.
    pub root_page: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Chunks that cover it.
    pub chunks: u64,
    /// Those of them that are all zero, and so neither stored nor sent.
    pub zero_chunks: u64,
    /// When the name was given.
    pub added_unix_ms: u64,
    /// The nodes that hold the whole image.
    #[schema(value_type = Vec<String>)]
    pub origins: Vec<NodeName>,
    /// How its hierarchy gets its shape, if that was said for this image: `"auto"`, or
    /// `{"fixed": {"fan_out": 4, "stripes": 4}}`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub shaping: Option<Shaping>,
}

/// Says how an image's hierarchy gets its shape from now on.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TuneImage {
    /// `"auto"`, or `{"fixed": {"fan_out": 4, "stripes": 4}}`.
    #[schema(value_type = Object)]
    pub shaping: Shaping,
}

/// Gives an image a name: said by the origin that holds it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RegisterImage {
    /// The root page, base64. Its hash is the image's id.
    pub root_page: String,
    /// What it is of.
    #[serde(default)]
    pub kind: ImageKind,
}

/// Asks for a join token.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// How long the token can be used; an hour if absent.
    pub valid_ms: Option<u64>,
    /// The only node that may use it. Such a token also replaces a node of that name.
    #[schema(value_type = Option<String>)]
    pub node: Option<NodeName>,
}

/// A one-time join token.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenIssued {
    /// What to give to `virtman compute --join`.
    pub token: String,
    /// When it stops working.
    pub expires_unix_ms: u64,
}

/// A node announces itself, after each start and each reconnect.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct RegisterNode {
    /// Where other nodes reach its port, as `host:port`.
    pub address: String,
    /// `zone/rack/host` label.
    #[schema(value_type = Object)]
    pub location: Location,
    /// Version of the program.
    pub version: String,
}

/// Volt's answer to a registration.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Registered {
    /// A node that is not heard of for so long is taken for dead.
    pub lease_ms: u64,
}

/// A node attaches an image.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AttachImage {
    /// Which image: its name with tag, or its id.
    pub image: String,
    /// Whether the node holds the whole image.
    #[schema(value_type = String)]
    pub role: Role,
    /// Where the node fetches it from at present: after a restart of Volt the hierarchy is rebuilt
    /// from these.
    #[schema(value_type = Object)]
    pub current: Option<Placement>,
}

/// Everything that a node needs to serve an image.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Attachment {
    /// The image, if it is in the catalog: an image whose name was removed lives on where it is used.
    pub image: Option<ImageRecord>,
    /// Where to fetch it from.
    #[schema(value_type = Object)]
    pub placement: Placement,
    /// What to fetch ahead of guests.
    #[serde(default)]
    pub profile: ProfileOffer,
}

/// A node gives an image up.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DetachImage {
    /// The image's id.
    #[schema(value_type = String)]
    pub image: ImageId,
}

/// What a node noticed about another.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum NodeReport {
    /// It sent bytes that are not the chunk's.
    Lied {
        /// The accused.
        #[schema(value_type = String)]
        parent: NodeName,
        /// The image.
        #[schema(value_type = String)]
        image: ImageId,
        /// The chunk.
        #[schema(value_type = String)]
        chunk: ChunkHash,
    },
    /// It cannot be reached.
    Lost {
        /// The parent that does not answer.
        #[schema(value_type = String)]
        parent: NodeName,
    },
    /// It can be reached again.
    Back {
        /// The parent.
        #[schema(value_type = String)]
        parent: NodeName,
    },
}

/// What Volt pushes to a node: one JSON object a line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Push {
    /// The node's place in an image's hierarchy is now this.
    Place {
        /// The image.
        #[schema(value_type = String)]
        image: ImageId,
        /// Its parents, per stripe.
        #[schema(value_type = Object)]
        placement: Placement,
    },
    /// The boot profile of an image that the node has attached is now this.
    Profile {
        /// The image.
        #[schema(value_type = String)]
        image: ImageId,
        /// What to fetch ahead of guests, and whether boots are recorded.
        offer: ProfileOffer,
    },
    /// The node asked for leave to give an image up, and has no place in its hierarchy any more.
    Released {
        /// The image.
        #[schema(value_type = String)]
        image: ImageId,
    },
    /// These nodes, and no others, were removed from the cluster: what they have open is closed, and they
    /// are refused. Said first, and whenever it changes.
    Removed {
        /// Their names.
        #[schema(value_type = Vec<String>)]
        nodes: Vec<NodeName>,
    },
}

/// A node's state in Volt's eyes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Its lease runs.
    Up,
    /// Its lease ran out or its connection broke.
    Down,
    /// It sent wrong bytes and has no children until it is pardoned.
    Quarantined,
}

/// A node as `virtman status` shows it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NodeRecord {
    /// The node.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// Where it is reached.
    pub address: String,
    /// `zone/rack/host` label.
    pub location: String,
    /// Whether it is there.
    pub state: NodeState,
    /// Version of its program.
    pub version: String,
}

/// The whole cluster at a glance.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VoltStatus {
    /// Version of the program.
    pub version: String,
    /// All nodes that ever joined and were not removed.
    pub nodes: Vec<NodeRecord>,
    /// The catalog.
    pub images: Vec<ImageRecord>,
}

/// One image's hierarchy.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TreeView {
    /// The image.
    pub image: ImageRecord,
    /// Its shape at present, if some node has it attached.
    #[schema(value_type = Option<Object>)]
    pub shape: Option<Shape>,
    /// One tree a stripe.
    pub stripes: Vec<Vec<TreeNode>>,
}

/// A node's place in the tree of one stripe. Parents come before their children, and each subtree is in
/// one piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TreeNode {
    /// The node.
    #[schema(value_type = String)]
    pub node: NodeName,
    /// Whom it fetches from; none for a root.
    #[schema(value_type = Option<String>)]
    pub parent: Option<NodeName>,
    /// Steps up to the root.
    pub depth: u32,
    /// `origin` or `relay`.
    #[schema(value_type = String)]
    pub role: Role,
}
