//! What must never be so, looked at while a run goes on. The first violation ends the run.
//!
//! - No wrong chunk is kept, hence none served or read: what is kept is compared with the image, byte by byte.
//! - Nobody sends a wrong chunk but a liar of the plan of faults.
//! - The planned hierarchy has no circle, and no relay with too many children, all stripes together;
//!   and, once nothing has happened for a while, one child of the origin per stripe.
//! - Hedges stay within their budget; without faults no chunk is sent to a node twice, hedges aside.
//! - What waits to be sent has its bound.

use std::collections::{BTreeMap, BTreeSet};

use block::{ImageId, NodeName};
use bytes::Bytes;
use link::limits::{HEDGES_BURST, HEDGES_PER_SECOND, HEDGES_PERCENT};
use planner::{Planner, Role, Shape, Shaping, Tree};

use crate::content::{ChunkIx, Content};
use crate::net::UNSENT_BYTES;
use crate::node::Node;
use crate::scenario::{Scale, Scenario};

/// Bytes of the largest message: a chunk with its head and overhead, and control frames before it.
const MESSAGE_BYTES_MAX: usize = 140 * 1024;

/// The checkers, and what they found. See the module's documentation.
#[derive(Debug)]
pub(crate) struct Checks {
    scale: Scale,
    shape: Option<Shape>,
    liars: BTreeSet<NodeName>,
    pub(crate) violation: Option<String>,
}

impl Checks {
    pub(crate) fn new(scenario: &Scenario) -> Checks {
        let shape = match scenario.shaping {
            Shaping::Fixed(shape) => Some(shape),
            Shaping::Auto => None,
        };
        Checks { scale: scenario.scale, shape, liars: BTreeSet::new(), violation: None }
    }

    pub(crate) fn violated(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// From now on the node may send wrong chunks.
    pub(crate) fn expect_lies(&mut self, liar: &NodeName) {
        self.liars.insert(liar.clone());
    }

    pub(crate) fn stored(&mut self, content: &Content, node: &NodeName, chunk: ChunkIx, bytes: &Bytes) {
        if self.scale == Scale::Checked && content.bytes(chunk) != bytes {
            self.violated(format!("{node} keeps wrong bytes as chunk {}", chunk.0));
        }
    }

    pub(crate) fn lied(&mut self, parent: &Node) {
        if !self.liars.contains(&parent.name) {
            self.violated(format!("{} sent a wrong chunk", parent.name));
        }
    }

    pub(crate) fn queued(&mut self, bytes: usize) {
        if bytes > UNSENT_BYTES + MESSAGE_BYTES_MAX {
            self.violated(format!("{bytes} bytes wait to be sent on one link"));
        }
    }

    pub(crate) fn planned(&mut self, planner: &Planner, image: &ImageId) {
        if let Some(tree) = planner.tree(image)
            && let Err(what) = check_tree(&tree, self.shape)
        {
            self.violated(what);
        }
    }

    /// What must hold at the end, when nothing has happened for a while. Who has lied is kept from serving, by
    /// Volt or by single children, so that an origin may have to.
    pub(crate) fn settled(&mut self, planner: &Planner, image: &ImageId) {
        if self.liars.is_empty()
            && let Some(tree) = planner.tree(image)
            && let Err(what) = check_origin(&tree)
        {
            self.violated(what);
        }
    }

    /// `seconds` is how long the node may have earned hedges.
    pub(crate) fn hedged(&mut self, node: &Node, hedges: u64, seconds: f64) {
        // Each incarnation of a node begins with a full budget.
        let incarnations = f64::from(node.incarnation + 1);
        let earned = node.guest_requests as f64 * HEDGES_PERCENT / 100.0 + seconds * HEDGES_PER_SECOND;
        if hedges as f64 > incarnations * HEDGES_BURST + earned + 1.0 {
            self.violated(format!("{} made {hedges} hedges and had earned {earned:.0}", node.name));
        }
    }
}

/// The rules that hold after every event. `shape` is what it should be, if that is fixed.
fn check_tree(tree: &Tree, shape: Option<Shape>) -> Result<(), String> {
    let shape = shape.unwrap_or(tree.shape);
    if tree.stripes.len() != shape.stripes() as usize {
        return Err(format!("{} stripes instead of {}", tree.stripes.len(), shape.stripes()));
    }
    let mut children: BTreeMap<&NodeName, u32> = BTreeMap::new();
    for (stripe, rows) in tree.stripes.iter().enumerate() {
        let mut depths: BTreeMap<&NodeName, (u32, Role)> = BTreeMap::new();
        for row in rows {
            if let Some(parent) = &row.parent {
                // Parents stand before their children, so that a circle has no beginning.
                let Some(&(depth, role)) = depths.get(parent) else {
                    return Err(format!("{} hangs below {parent}, which hangs nowhere", row.node));
                };
                if row.depth != depth + 1 {
                    return Err(format!("{} is {} steps down, its parent {depth}", row.node, row.depth));
                }
                if role == Role::Relay {
                    *children.entry(parent).or_default() += 1;
                }
            }
            if depths.insert(&row.node, (row.depth, row.role)).is_some() {
                return Err(format!("{} has two places in stripe {stripe}", row.node));
            }
        }
    }
    for (parent, count) in children {
        if count > shape.fan_out() {
            return Err(format!("{parent} has {count} children, more than {}", shape.fan_out()));
        }
    }
    Ok(())
}

/// An origin sends each chunk once, where there are relays enough to serve each other.
fn check_origin(tree: &Tree) -> Result<(), String> {
    for (stripe, rows) in tree.stripes.iter().enumerate() {
        let relays = rows.iter().filter(|row| row.role == Role::Relay).count();
        if relays < 2 * tree.stripes.len() {
            continue;
        }
        for origin in rows.iter().filter(|row| row.role == Role::Origin) {
            let children = rows.iter().filter(|row| row.parent.as_ref() == Some(&origin.node)).count();
            if children > 1 {
                return Err(format!("{} has {children} children in stripe {stripe}", origin.node));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use planner::TreeNode;

    /// A tree of one stripe from (node, parent, depth).
    fn tree(rows: &[(&str, &str, u32)]) -> Tree {
        let row = |&(node, parent, depth): &(&str, &str, u32)| TreeNode {
            node: node.parse().unwrap(),
            parent: parent.parse().ok(),
            depth,
            role: if depth == 0 { Role::Origin } else { Role::Relay },
        };
        Tree { shape: Shape::BINARY, stripes: vec![rows.iter().map(row).collect()] }
    }

    #[test]
    fn a_good_tree_passes() {
        let good = tree(&[("o", "", 0), ("a", "o", 1), ("b", "a", 2), ("c", "a", 2)]);
        assert_eq!(check_tree(&good, None), Ok(()));
        assert_eq!(check_origin(&good), Ok(()));
    }

    #[test]
    fn a_third_child_of_a_binary_tree_is_found() {
        let rows = [("o", "", 0), ("a", "o", 1), ("b", "a", 2), ("c", "a", 2), ("d", "a", 2)];
        assert!(check_tree(&tree(&rows), None).unwrap_err().contains("3 children"));
    }

    #[test]
    fn a_circle_is_found() {
        let rows = [("o", "", 0), ("a", "b", 1), ("b", "a", 2)];
        assert!(check_tree(&tree(&rows), None).unwrap_err().contains("hangs nowhere"));
    }

    #[test]
    fn children_in_all_stripes_count_together() {
        let mut both = tree(&[("o", "", 0), ("a", "o", 1), ("b", "a", 2)]);
        let c = TreeNode { node: "c".parse().unwrap(), ..both.stripes[0][2].clone() };
        both.stripes[0].push(c);
        both.stripes.push(both.stripes[0].clone());
        both.shape = Shape::new(2, 2).unwrap();
        assert!(check_tree(&both, None).unwrap_err().contains("4 children"));
    }

    #[test]
    fn a_second_child_of_the_origin_is_found() {
        let rows = [("o", "", 0), ("a", "o", 1), ("b", "o", 1), ("c", "a", 2)];
        assert!(check_origin(&tree(&rows)).unwrap_err().contains("2 children"));
    }
}
