//! Which disk of a VM it is, wherever that goes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The identity of a disk that a VM or a platform writes to: 16 bytes, written as 32 hexadecimal digits. It is the
/// serial number that guests and initiators see, and stays when the disk moves to another node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskId([u8; 16]);

/// A text does not have the form of a [`DiskId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a disk's id: use 32 hexadecimal digits, as 'virtman show' prints them")]
pub struct ParseDiskIdError(String);

impl DiskId {
    /// The identity of the disk that was made as `origin` says, which no other disk's origin does.
    pub fn derive(origin: &str) -> DiskId {
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(origin.as_bytes()).as_bytes()[..16]);
        DiskId(id)
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for DiskId {
    type Err = ParseDiskIdError;

    fn from_str(text: &str) -> Result<DiskId, ParseDiskIdError> {
        let is_hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let parsed = is_hex.then(|| u128::from_str_radix(text, 16).ok()).flatten();
        let refused = || ParseDiskIdError(text.chars().take(80).flat_map(char::escape_debug).collect());
        parsed.map(|id| DiskId(id.to_be_bytes())).ok_or_else(refused)
    }
}

impl Serialize for DiskId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DiskId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<DiskId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_printed_as_it_is_read_and_other_texts_are_refused() {
        let id = DiskId::derive("node/vm/image/1");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_ne!(id, DiskId::derive("node/vm/image/2"));
        assert_eq!("00000000000000000000000000000aBc".parse::<DiskId>().unwrap().to_string()[28..], *"0abc");
        for bad in ["", "0", &"g".repeat(32), &"0".repeat(33), "+0000000000000000000000000000001"] {
            assert!(bad.parse::<DiskId>().is_err(), "{bad}");
        }
        assert!("\u{1b}[2J".parse::<DiskId>().unwrap_err().to_string().contains("\\u{1b}"));
    }
}
