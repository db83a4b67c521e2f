//! The options of `virtman volt`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use planner::{Shape, ShapeError, Shaping};

use control::units::parse_duration;

/// Options of the coordinator.
#[derive(Debug, Clone, Args)]
pub struct VoltArgs {
    /// Where to listen for nodes and administrators (TLS with client certificates)
    #[arg(long, default_value = "127.0.0.1:7410", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// A node that is not heard of for so long is taken for dead
    #[arg(long, default_value = "3s", value_parser = parse_duration, value_name = "DURATION")]
    pub lease: Duration,
    /// How many children a node serves at most, instead of choosing by the number of nodes
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(planner::FAN_OUT_MAX)), value_name = "N")]
    pub fan_out: Option<u32>,
    /// How many trees an image's chunks are spread over, instead of choosing by the number of nodes
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(planner::STRIPES_MAX)), value_name = "N")]
    pub stripes: Option<u32>,
}

impl VoltArgs {
    /// How images that are not tuned get their shape.
    pub fn shaping(&self) -> Result<Shaping, ShapeError> {
        shaping(self.fan_out, self.stripes)
    }
}

/// What two numbers ask for, of which each may be absent: the planner's choice without any. One stripe if
/// only the fan-out is given; if only the stripes are, as many children, so that nobody sends more than it
/// receives, or two for one stripe.
pub fn shaping(fan_out: Option<u32>, stripes: Option<u32>) -> Result<Shaping, ShapeError> {
    let shape = match (fan_out, stripes) {
        (None, None) => return Ok(Shaping::Auto),
        (Some(fan_out), stripes) => Shape::new(fan_out, stripes.unwrap_or(1)),
        (None, Some(stripes)) => Shape::new(stripes.max(2), stripes),
    };
    shape.map(Shaping::Fixed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_is_not_given_follows_from_the_other() {
        let fixed = |fan_out, stripes| Ok(Shaping::Fixed(Shape::new(fan_out, stripes).unwrap()));
        assert_eq!(shaping(None, None), Ok(Shaping::Auto));
        assert_eq!(shaping(Some(3), None), fixed(3, 1));
        assert_eq!(shaping(None, Some(1)), fixed(2, 1));
        assert_eq!(shaping(None, Some(4)), fixed(4, 4));
        assert_eq!(shaping(Some(8), Some(4)), fixed(8, 4));
        assert!(shaping(Some(2), Some(4)).is_err());
    }
}
