//! What people and the API get to see of the plan.

use block::{ImageId, NodeName};
use serde::Serialize;

use crate::{Location, Millis, Role, Shape};

/// How a node is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// Serves as planned.
    Good,
    /// Most of its children could not reach it: no new ones for a lease.
    Suspect,
    /// Sent wrong bytes: serves nobody until pardoned.
    Quarantined,
}

/// A live node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeView {
    /// Its name.
    pub node: NodeName,
    /// Where its link server listens.
    pub address: String,
    /// Where it stands.
    pub location: Location,
    /// When it dies unless it is heard of.
    pub lease_until: Millis,
    /// How it is trusted.
    pub standing: Standing,
    /// What it has attached, by id.
    pub images: Vec<ImageId>,
}

/// One node's place in the tree of one stripe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TreeNode {
    /// The node.
    pub node: NodeName,
    /// Whom it fetches from; none for a root.
    pub parent: Option<NodeName>,
    /// Steps up to the root of its tree.
    pub depth: u32,
    /// What it is for this image.
    pub role: Role,
}

/// The hierarchy of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tree {
    /// Its shape.
    pub shape: Shape,
    /// Per stripe: every node, each parent before its children and each subtree in one piece; roots and
    /// siblings by name. Origins that are quarantined are left out.
    pub stripes: Vec<Vec<TreeNode>>,
}
