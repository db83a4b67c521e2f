//! The nodes that were removed from the cluster, as a member knows from Volt.
//!
//! In memory only: a node that starts while Volt is away knows of no removal until it reaches Volt.

use std::collections::BTreeSet;
use std::sync::{PoisonError, RwLock};

use block::NodeName;
use tokio::sync::watch;

use super::Principal;
use super::tls::Admission;

/// The names whose certificates count no more, and who is to be told when they change.
#[derive(Debug, Default)]
pub struct Removed {
    nodes: RwLock<BTreeSet<NodeName>>,
    changed: watch::Sender<()>,
}

impl Removed {
    /// From now on these nodes are removed, and no others.
    pub fn replace(&self, nodes: Vec<NodeName>) {
        let nodes: BTreeSet<_> = nodes.into_iter().collect();
        let before = std::mem::replace(
            &mut *self.nodes.write().unwrap_or_else(PoisonError::into_inner),
            nodes.clone(),
        );
        if before != nodes {
            self.changed.send_replace(());
        }
    }

    /// Changes whenever the removed nodes do.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Whether a member with a valid certificate still is one.
    pub fn admit(&self, member: &Principal) -> Admission {
        match member {
            Principal::Node(node)
                if self.nodes.read().unwrap_or_else(PoisonError::into_inner).contains(node) =>
            {
                Admission::Revoked
            }
            Principal::Node(_) | Principal::Volt | Principal::Admin(_) => Admission::Admit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_refused_from_its_removal_until_its_name_joins_again() {
        let node: NodeName = "a".parse().unwrap();
        let member = Principal::Node(node.clone());
        let removed = Removed::default();
        let mut changes = removed.changes();
        assert_eq!(removed.admit(&member), Admission::Admit);
        removed.replace(vec![node.clone()]);
        assert_eq!(removed.admit(&member), Admission::Revoked);
        assert_eq!(removed.admit(&Principal::Volt), Admission::Admit);
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        removed.replace(vec![node]);
        assert!(!changes.has_changed().unwrap(), "the same again is not a change");
        removed.replace(Vec::new());
        assert_eq!(removed.admit(&member), Admission::Admit);
    }
}
