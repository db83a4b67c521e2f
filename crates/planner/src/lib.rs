//! The hierarchy planner: who fetches which image from whom.
//!
//! A pure function of events. Time is an argument, nothing is random, and the same events give the same
//! actions, so that the simulator and the daemon run the same code. `docs/design/0001-hierarchy.md` and
//! `0003-racks.md` say why it plans as it does.
//!
//! - [`Planner`]: events in, actions out; leases, learning after a restart.
//! - `membership`: who is there, and whom one may ask.
//! - `hierarchy`: one image; where a node hangs and what it is told.
//! - `hierarchy::plan`: the nodes of one rack, or the racks among each other; who serves in which stripe.
//! - `forest`: one stripe of a plan; the trees, and which place is the best.
//! - [`Shape`]: how many stripes and children, and who chooses that.
//!
//! Not here: sockets, files, clocks, durability, and what makes a node's event authentic.

mod events;
mod forest;
mod hierarchy;
mod location;
mod membership;
mod planner;
mod shape;
#[cfg(test)]
mod tests;
mod view;

pub use events::{Action, Event, Millis, Peer, Placement, Role, Settings};
pub use location::{Location, ParseLocationError};
pub use planner::{NODES_MAX, Planner};
pub use shape::{FAN_OUT_MAX, STRIPES_MAX, Shape, ShapeError, Shaping};
pub use view::{NodeView, Standing, Tree, TreeNode};
