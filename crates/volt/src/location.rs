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

/// A text is no location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no location: use up to {LABELS_MAX} labels (zone/rack/host), each of at most {NAME_BYTES_MAX} of a-z, A-Z, 0-9, '.', '_' and '-'"
)]
pub struct ParseLocationError(String);

#[cfg_attr(not(test), expect(dead_code))]
/// A place that a location lies in: everywhere, a zone, a rack or a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scope(Arc<str>);

impl Location {
    /// The location as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    #[cfg_attr(not(test), expect(dead_code))]
    /// The scopes that the location lies in, narrowest first; the last one is everywhere.
    pub(crate) fn scopes(&self) -> Vec<Scope> {
        let mut scopes = vec![Scope("".into())];
        let mut end = 0;
        for label in self.0.split('/') {
            end += label.len();
            if !label.is_empty() {
                scopes.push(Scope(self.0[..end].into()));
            }
            end += 1;
        }
        scopes.reverse();
        scopes
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

    fn scopes(text: &str) -> Vec<String> {
        let location: Location = text.parse().unwrap();
        location.scopes().iter().map(|s| s.0.to_string()).collect()
    }

    #[test]
    fn scopes_go_from_the_host_outwards_and_skip_unknown_labels() {
        assert_eq!(scopes("z/r/h"), ["z/r/h", "z/r", "z", ""]);
        assert_eq!(scopes("z//h"), ["z//h", "z", ""]);
        assert_eq!(scopes("/r"), ["/r", ""]);
        assert_eq!(scopes(""), [""]);
    }

    #[test]
    fn odd_labels_are_refused() {
        for bad in ["a/b/c/d", "a b", "ä", "a\n", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<Location>().is_err(), "{bad:?}");
        }
        assert_eq!("z/".parse::<Location>(), "z".parse());
    }
}
