//! Where a node stands: labels from the outside in, such as `eu1/rack7/host3` (zone, rack, host).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use block::limits::NAME_BYTES_MAX;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Labels in a location: zone, rack and host.
const LABELS_MAX: usize = 3;

/// Where a node stands. Written `zone/rack/host`; trailing labels may be left out and inner ones may be
/// empty, both meaning *unknown*. The default knows nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location(String);

/// A text is not a location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a location: use up to {LABELS_MAX} labels (zone/rack/host), each of at most {NAME_BYTES_MAX} of a-z, A-Z, 0-9, '.', '_' and '-'"
)]
pub struct ParseLocationError(String);

/// A part of the world that nodes stand in: a rack, a zone, or everywhere.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scope(Arc<str>);

impl Location {
    /// The location as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The rack that a node at this location belongs to; or, where that is unknown, all of its
    /// zone without a known rack, or all that say nothing.
    pub(crate) fn rack(&self) -> Scope {
        let mut labels = self.0.split('/');
        let (zone, rack) = (labels.next().unwrap_or_default(), labels.next().unwrap_or_default());
        Scope(format!("{zone}/{rack}").into())
    }
}

impl Scope {
    /// The scope that all others lie in.
    pub(crate) fn everywhere() -> Scope {
        Scope("".into())
    }

    /// What a rack lies in, narrowest first: its zone if it is known, and everywhere.
    pub(crate) fn around_rack(&self) -> Vec<Scope> {
        let zone = self.0.split('/').next().filter(|zone| !zone.is_empty());
        zone.map(|zone| Scope(zone.into())).into_iter().chain([Scope::everywhere()]).collect()
    }
}

impl FromStr for Location {
    type Err = ParseLocationError;
    fn from_str(text: &str) -> Result<Self, ParseLocationError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let label_fits = |label: &str| label.len() <= NAME_BYTES_MAX && label.bytes().all(plain);
        if text.split('/').count() > LABELS_MAX || !text.split('/').all(label_fits) {
            return Err(ParseLocationError(text.chars().take(80).flat_map(char::escape_debug).collect()));
        }
        Ok(Location(text.trim_end_matches('/').to_owned()))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl Serialize for Location {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Location {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rack_is_named_by_what_is_known() {
        let rack = |text: &str| text.parse::<Location>().unwrap().rack();
        assert_eq!(rack("z/r/h"), rack("z/r"));
        assert_ne!(rack("z/r"), rack("z/q"));
        assert_ne!(rack("z/r"), rack("y/r"));
        assert_eq!(rack("z//h"), rack("z"));
        assert_ne!(rack("z"), rack(""));
        let zone = |text: &str| rack(text).around_rack();
        assert_eq!(zone("z/r"), [Scope("z".into()), Scope::everywhere()]);
        assert_eq!(zone("/r"), [Scope::everywhere()]);
    }

    #[test]
    fn odd_labels_are_refused() {
        for bad in ["a/b/c/d", "a b", "ä", "a\n", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<Location>().is_err(), "{bad:?}");
        }
        assert_eq!("z/".parse::<Location>(), "z".parse());
    }
}
