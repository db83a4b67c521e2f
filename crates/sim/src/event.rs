//! The names of things in a run, and all that can happen to them.

use link::policy::PathId;
use planner::Placement;

use crate::content::ChunkIx;
use crate::coordinator::ToVolt;

/// A node, and the host that it runs on. They count from 0; the origin is the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeIx(pub(crate) u32);

/// A link, in the order in which they were opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LinkId(pub(crate) u32);

/// One direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FlowId(pub(crate) u32);

/// Which end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Side {
    /// The child's.
    Client,
    /// The parent's.
    Server,
}

/// One end of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct End {
    pub(crate) link: LinkId,
    pub(crate) side: Side,
}

/// One incarnation of a node, from a start to a death: what was meant for an earlier one is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Incarnation {
    pub(crate) node: NodeIx,
    pub(crate) count: u32,
}

impl NodeIx {
    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }
}

impl LinkId {
    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }
}

impl FlowId {
    pub(crate) fn at(self) -> usize {
        self.0 as usize
    }

    /// The end that hears what comes along this flow. A link's flows are opened together, upward first.
    pub(crate) fn hearer(self) -> End {
        let side = if self.0.is_multiple_of(2) { Side::Server } else { Side::Client };
        End { link: LinkId(self.0 / 2), side }
    }

    /// The end that writes to this flow.
    pub(crate) fn writer(self) -> End {
        self.hearer().other()
    }
}

impl End {
    pub(crate) fn other(self) -> End {
        let side = match self.side {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        };
        End { side, ..self }
    }

    /// The flow that this end writes to.
    pub(crate) fn flow(self) -> FlowId {
        FlowId(self.link.0 * 2 + u32::from(self.side == Side::Server))
    }
}

/// What happens.
#[derive(Debug)]
pub(crate) enum Event {
    /// A host's link out is free.
    SentOut(NodeIx),
    /// The oldest message of a flow arrives.
    Arrives(FlowId),
    /// The stream of this end is over, because the other end closed it.
    Ends(End),
    /// An end's machine wants to know the time.
    Timer(End),
    /// Something happens to one node in that incarnation.
    Node(Incarnation, NodeEvent),
    /// A message reaches Volt, meant for that run of it.
    VoltHears(Incarnation, u32, ToVolt),
    /// Volt looks at its clock.
    VoltTicks(u32),
    /// A fault of the plan begins or ends.
    Fault(usize),
}

/// What happens to one node.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    /// A parent may be dialed now.
    Dials(PathId),
    /// A dial is answered, if there is somebody to answer.
    Dialed(PathId),
    /// A dial takes long.
    DialsLate(PathId),
    /// A dial is given up.
    DialFails(PathId),
    /// A fetch is due for a decision, unless one was made since: the number is that of the last one.
    Decides(ChunkIx, u64),
    /// A guest issues its next read.
    GuestReads(usize),
    /// A node begins to stream the boot profile.
    Streams,
    /// A node calls Volt.
    Calls,
    /// A node's heartbeat is due, in this session with Volt.
    Beats(u32),
    /// A placement reaches a node, from that run of Volt.
    Placed(u32, Box<Placement>),
    /// Leave to go reaches a node, from that run of Volt.
    Released(u32),
    /// A node that left ends.
    Departs,
    /// The node notices that this run of Volt is gone.
    VoltLost(u32),
}
