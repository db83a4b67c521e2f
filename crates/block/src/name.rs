//! Names that come from outside, checked before they get near a path or a command line.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::limits::NAME_BYTES_MAX;

/// A name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{name}' is not a valid {what}: use 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter or digit{hint}"
)]
pub struct NameError {
    what: &'static str,
    name: String,
    hint: &'static str,
}

fn is_plain(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    text.len() <= NAME_BYTES_MAX
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(allowed)
}

/// Makes an offending name safe to print: no control characters, bounded length.
fn printable(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $hint:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The name as it was given.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                let normal: Option<String> = $check(text);
                normal.map(Self).ok_or_else(|| NameError { what: $what, name: printable(text), hint: $hint })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

fn plain(text: &str) -> Option<String> {
    is_plain(text).then(|| text.to_owned())
}

/// `name` or `name:tag`; without a tag `:latest` is meant. Both parts share the length bound.
fn tagged(text: &str) -> Option<String> {
    let full = if text.contains(':') { text.to_owned() } else { format!("{text}:latest") };
    let (name, tag) = full.split_once(':')?;
    (is_plain(name) && is_plain(tag) && full.len() <= NAME_BYTES_MAX).then_some(full)
}

name_type!(
    /// The name of a node, unique in its cluster; also the common name of its certificate.
    NodeName, "node name", "", plain
);
name_type!(
    /// The name of a VM, unique on its node; also the name of its disk and of its exports.
    VmName, "VM name", "", plain
);
name_type!(
    /// The name of a snapshot, unique for its VM.
    SnapshotName, "snapshot name", "", plain
);
name_type!(
    /// The human name of an image with its tag, such as `debian:12`; `debian` means `debian:latest`.
    ImageName, "image name", ", with an optional ':tag' of the same characters", tagged
);

impl ImageName {
    /// The name with `:` replaced, fit for a file or socket name. Unique, because `:` is the only
    /// character of an image name that a file name here lacks, and `+` is in neither.
    pub fn file_name(&self) -> String {
        self.0.replace(':', "+")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_their_directory_or_option_are_refused() {
        for bad in
            ["", ".", "..", "../x", "a/b", "-rf", "a b", "a\n", "a;b", "a\0b", "ä", "a:b", &"a".repeat(64)]
        {
            assert!(bad.parse::<VmName>().is_err(), "{bad:?} as a VM name");
            assert!(bad.parse::<NodeName>().is_err(), "{bad:?} as a node name");
        }
        for bad in ["", ":", "a:", ":12", "a:b:c", "a/b:12", "debian:../12", &"a".repeat(60)] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?} as an image name");
        }
    }

    #[test]
    fn an_image_name_without_tag_is_the_latest() {
        assert_eq!("debian".parse::<ImageName>(), "debian:latest".parse::<ImageName>());
        assert_eq!("debian:12".parse::<ImageName>().map(|n| n.file_name()), Ok("debian+12".to_owned()));
    }

    #[test]
    fn the_error_shows_the_name_without_its_control_characters() {
        let error = "a\x1b[31m".parse::<VmName>().expect_err("an escape sequence is not a name");
        assert!(!error.to_string().contains('\x1b'), "{error}");
        assert!(error.to_string().contains("VM name"), "{error}");
    }
}
