//! The shape of a hierarchy: how many trees, how many children a node serves, and who chooses that.

use serde::{Deserialize, Serialize};

/// Children that one node may be given. More would only queue on one uplink.
pub const FAN_OUT_MAX: u32 = 64;

/// Stripes of one image. Every stripe costs each node a parent's connection; beyond this the gain is nil.
pub const STRIPES_MAX: u32 = 16;

/// The shape of an image's hierarchy.
///
/// A relay has at most `fan_out` children, all stripes taken together; an origin is given one child per
/// stripe. So with as many stripes as children nobody sends more than it receives.
///
/// Invariant: `1 <= stripes <= fan_out <= FAN_OUT_MAX` and `stripes <= STRIPES_MAX`. With fewer children
/// per node than stripes, the nodes together could not serve each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Numbers")]
pub struct Shape {
    fan_out: u32,
    stripes: u32,
}

/// Numbers that make no hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// The fan-out is 0 or too large.
    #[error("a fan-out of {0} is not possible: use 1 to {FAN_OUT_MAX}")]
    FanOut(u32),
    /// The number of stripes is 0, too large or larger than the fan-out.
    #[error(
        "{stripes} stripes with a fan-out of {fan_out} are not possible: use 1 to {STRIPES_MAX} stripes and a fan-out that is no smaller"
    )]
    Stripes {
        /// The refused number of stripes.
        stripes: u32,
        /// The fan-out that came with it.
        fan_out: u32,
    },
}

/// A shape as it is read, before it is checked.
#[derive(Deserialize)]
struct Numbers {
    fan_out: u32,
    stripes: u32,
}

/// How an image's hierarchy gets its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shaping {
    /// The planner chooses by the number of relays: one tree for one relay, four stripes for many. It
    /// changes its mind only where few have to move.
    Auto,
    /// Always this shape.
    Fixed(Shape),
}

/// The shapes that the planner chooses from, each with the number of relays from which on it does. As many
/// children as stripes, so that nobody sends more than it receives; and no more stripes than there are
/// relays to serve them. More than four would win a level or two for thousands of nodes, and cost each node
/// more connections.
const AUTO: [(usize, Shape); 3] =
    [(0, Shape::BINARY), (2, Shape { fan_out: 2, stripes: 2 }), (4, Shape { fan_out: 4, stripes: 4 })];

impl Shape {
    /// One binary tree.
    pub const BINARY: Shape = Shape { fan_out: 2, stripes: 1 };

    /// A shape with at most `fan_out` children per node, and `stripes` trees.
    pub fn new(fan_out: u32, stripes: u32) -> Result<Shape, ShapeError> {
        if !(1..=FAN_OUT_MAX).contains(&fan_out) {
            return Err(ShapeError::FanOut(fan_out));
        }
        if !(1..=STRIPES_MAX.min(fan_out)).contains(&stripes) {
            return Err(ShapeError::Stripes { stripes, fan_out });
        }
        Ok(Shape { fan_out, stripes })
    }

    /// Children per node.
    pub fn fan_out(&self) -> u32 {
        self.fan_out
    }

    /// Number of trees. Each chunk travels along one of them.
    pub fn stripes(&self) -> u32 {
        self.stripes
    }
}

impl TryFrom<Numbers> for Shape {
    type Error = ShapeError;
    fn try_from(numbers: Numbers) -> Result<Shape, ShapeError> {
        Shape::new(numbers.fan_out, numbers.stripes)
    }
}

impl From<Shape> for Shaping {
    fn from(shape: Shape) -> Shaping {
        Shaping::Fixed(shape)
    }
}

impl Shaping {
    /// The shape for a node that comes first and reports a place in so many stripes, or none.
    pub(crate) fn first(self, reported: usize) -> Shape {
        self.reported(Shape::BINARY, reported)
    }

    /// The shape instead of `shape` where a node reports a place in so many stripes: an earlier planner's
    /// choice is kept.
    pub(crate) fn reported(self, shape: Shape, reported: usize) -> Shape {
        let like = |shape: &Shape| shape.stripes as usize == reported;
        match self {
            Shaping::Auto => AUTO.into_iter().map(|level| level.1).find(like).unwrap_or(shape),
            Shaping::Fixed(fixed) => fixed,
        }
    }

    /// The shape instead of `shape` as soon as there are so many relays.
    pub(crate) fn grown(self, shape: Shape, relays: usize) -> Shape {
        match self {
            Shaping::Auto => {
                let due = AUTO.into_iter().rfind(|level| level.0 <= relays).map_or(shape, |level| level.1);
                if due.stripes > shape.stripes { due } else { shape }
            }
            Shaping::Fixed(fixed) => fixed,
        }
    }

    /// The shape instead of `shape` for so many relays when there is time. It is given up only when half of
    /// the relays are gone that it was chosen for, so that one that comes and goes moves nobody.
    pub(crate) fn fitting(self, shape: Shape, relays: usize) -> Shape {
        match self {
            Shaping::Auto => {
                let kept = AUTO.into_iter().any(|level| level.1 == shape && level.0 <= relays * 2);
                if kept { self.grown(shape, relays) } else { self.grown(Shape::BINARY, relays) }
            }
            Shaping::Fixed(fixed) => fixed,
        }
    }
}
