//! What goes into the planner and what comes out of it.

use std::ops::Add;

use block::{ChunkHash, ImageId, NodeName};
use serde::{Deserialize, Serialize};

use crate::{Location, Shaping};

/// Time in milliseconds since whenever the caller began to count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Millis(pub u64);

impl Add for Millis {
    type Output = Millis;
    fn add(self, other: Millis) -> Millis {
        Millis(self.0.saturating_add(other.0))
    }
}

/// What the planner is told once.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a node lives without a heartbeat. Also how long a new planner waits for nodes to report
    /// where they are, and how long a child is kept away from a parent that it could not reach.
    pub lease: Millis,
    /// How every image's hierarchy gets its shape that was not [tuned](Event::Tune).
    pub shaping: Shaping,
}

/// What a node is for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// It holds the whole image: a root.
    Origin,
    /// It fetches from parents and serves children.
    Relay,
}

/// A node that chunks may be fetched from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, which its certificate must show.
    pub node: NodeName,
    /// Where its link server listens, as it registered it.
    pub address: String,
}

/// Whom a node fetches an image from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Per stripe: the parent, then alternates, then the origin as last resort. Empty for an origin,
    /// and for a relay that nobody can serve.
    pub stripes: Vec<Vec<Peer>>,
}

/// What happened. Events about nodes or images that the planner does not know change nothing.
#[derive(Debug, Clone)]
pub enum Event {
    /// A node registered, for the first time or after a restart. What it had attached is kept and
    /// expected to be attached again within a lease.
    NodeUp {
        /// Its name.
        node: NodeName,
        /// Where its link server listens.
        address: String,
        /// Where it stands.
        location: Location,
    },
    /// A node lives: renews its lease.
    Heartbeat {
        /// Which node.
        node: NodeName,
    },
    /// A node is gone: its push stream closed, or an operator removed it.
    NodeDown {
        /// Which node.
        node: NodeName,
    },
    /// A node wants an image, or says again that it has it. Always answered by [`Action::Place`] unless
    /// `current` is what the planner has in mind.
    Attach {
        /// Which node.
        node: NodeName,
        /// Which image.
        image: ImageId,
        /// What it is for this image from now on.
        role: Role,
        /// Whom it fetches from now. Kept where that makes a legal hierarchy.
        current: Option<Placement>,
    },
    /// A node no longer wants an image.
    Detach {
        /// Which node.
        node: NodeName,
        /// Which image.
        image: ImageId,
    },
    /// A node has no use for an image any more, but goes on serving it until it is [released](Action::Released):
    /// once everybody below it wants to leave too, or after a lease. Who attaches the image again stays.
    Leave {
        /// Which node.
        node: NodeName,
        /// Which image.
        image: ImageId,
    },
    /// A child cannot reach a peer that it was given.
    Lost {
        /// Who says so.
        by: NodeName,
        /// About whom.
        parent: NodeName,
    },
    /// A node was sent a chunk that does not hash to its name.
    Blame {
        /// Who says so.
        by: NodeName,
        /// Who sent it.
        liar: NodeName,
        /// Of which image.
        image: ImageId,
        /// Which chunk was asked for.
        chunk: ChunkHash,
    },
    /// A node may serve nobody until it is pardoned: an operator's word, or what a durable record says
    /// of an earlier [`Action::Quarantine`]. The node need not be known.
    Quarantine {
        /// Which node.
        node: NodeName,
    },
    /// An operator clears a node of all blame.
    Pardon {
        /// Which node.
        node: NodeName,
    },
    /// The image's hierarchy gets its shape in another way from now on, or as [`Settings`] say; where that
    /// makes another shape it is planned anew. The image need not be known.
    Tune {
        /// Which image.
        image: ImageId,
        /// How it gets its shape; as the settings say if absent.
        shaping: Option<Shaping>,
    },
    /// Time passed: leases run out, and a few leaves move up where there is room. Due a few times per
    /// lease.
    Tick,
}

/// What the caller has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell a node whom it fetches an image from, from now on.
    Place {
        /// Whom to tell.
        node: NodeName,
        /// Which image.
        image: ImageId,
        /// The whole placement; replaces the former one.
        placement: Placement,
    },
    /// A node that wants to [leave](Event::Leave) has no place in the image's hierarchy any more. Who fetched from it
    /// is told of other parents by the actions of the same event.
    Released {
        /// Whom to tell.
        node: NodeName,
        /// Which image.
        image: ImageId,
    },
    /// A node is not known: ask it to register and attach again.
    Unknown {
        /// Whom to ask.
        node: NodeName,
    },
    /// A registration was refused: there are [`NODES_MAX`](crate::NODES_MAX) nodes already.
    Refuse {
        /// Whose registration.
        node: NodeName,
    },
    /// A node left or its lease ran out. It is forgotten, and its children have other parents.
    Dead {
        /// Which node.
        node: NodeName,
    },
    /// Most of a node's children cannot reach it: for one lease it gets no new ones.
    Suspect {
        /// Which node.
        node: NodeName,
    },
    /// A node sent wrong bytes and serves nobody until it is pardoned. To be recorded durably.
    Quarantine {
        /// Which node.
        node: NodeName,
    },
}
