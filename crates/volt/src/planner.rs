//! The planner itself: applies events and collects actions.

use block::{ImageId, NodeName};

use crate::{Action, Event, Millis, NodeView, Placement, Settings, Tree};

/// Nodes that one planner takes. Ten times what a cluster is planned for; bounds its memory.
pub const NODES_MAX: usize = 100_000;

/// Plans the hierarchies of all images.
#[derive(Debug)]
pub struct Planner {
    _settings: Settings,
}

impl Planner {
    /// A planner that knows nobody.
    pub fn new(settings: Settings) -> Planner {
        Planner { _settings: settings }
    }

    /// Takes note of what happened at `now` and says what to do, in order. Time never goes back: an
    /// earlier `now` than the last one counts as the last one.
    pub fn apply(&mut self, _now: Millis, _event: Event) -> Vec<Action> {
        Vec::new()
    }

    /// Whom `node` was last told to fetch `image` from.
    pub fn placement(&self, _node: &NodeName, _image: &ImageId) -> Option<&Placement> {
        None
    }

    /// The live nodes by name.
    pub fn nodes(&self) -> impl Iterator<Item = NodeView> {
        std::iter::empty()
    }

    /// One live node.
    pub fn node(&self, _name: &NodeName) -> Option<NodeView> {
        None
    }

    /// The images that some node has attached, by id.
    pub fn images(&self) -> impl Iterator<Item = ImageId> {
        std::iter::empty()
    }

    /// The hierarchy of `image`; none if nobody has it attached.
    pub fn tree(&self, _image: &ImageId) -> Option<Tree> {
        None
    }
}
