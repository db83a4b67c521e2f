//! The hierarchy planner: who fetches which image from whom.
//!
//! A pure function of events: time is an argument, and the same events give the same actions.

mod location;
mod planner;
mod view;
mod words;

pub use location::{Location, ParseLocationError};
pub use planner::{NODES_MAX, Planner};
pub use view::{NodeView, Standing, Tree, TreeNode};
pub use words::{
    Action, Event, FAN_OUT_MAX, Millis, Peer, Placement, Role, STRIPES_MAX, Settings, Shape, ShapeError,
};
