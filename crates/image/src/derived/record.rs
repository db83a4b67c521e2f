//! The content of `derived.json`: what a derived image is derived from.

use std::fs;
use std::io;
use std::path::Path;

use block::ImageId;
use serde::{Deserialize, Serialize};

use crate::OpenError;
use crate::layout;

/// The content of `derived.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DerivedRecord {
    /// Version of this file, and of the `pages` and `index` beside it.
    pub(crate) version: u32,
    /// The program that wrote it.
    pub(crate) tool: String,
    pub(crate) base: ImageId,
    pub(crate) location: String,
    /// Chunks that are read from the disk.
    pub(crate) chunks_changed: u64,
    /// Chunks that are zero, and are not so in the base.
    pub(crate) chunks_zeroed: u64,
}

impl DerivedRecord {
    pub(crate) const VERSION: u32 = 1;

    pub(crate) fn read(dir: &Path) -> Result<DerivedRecord, OpenError> {
        let parsed = fs::read(dir.join(layout::DERIVED)).and_then(|bytes| DerivedRecord::parse(&bytes));
        parsed.map_err(|e| OpenError::of(dir, layout::DERIVED, &e))
    }

    fn parse(bytes: &[u8]) -> io::Result<DerivedRecord> {
        let record: DerivedRecord = serde_json::from_slice(bytes)?;
        if record.version != DerivedRecord::VERSION {
            let reason = "its version is not known here: use a newer virtman";
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        Ok(record)
    }

    pub(crate) fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }
}

/// What kind of image a directory holds, and so how it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// An imported image: an [`OriginImage`](crate::OriginImage).
    Imported,
    /// A derived image: a [`DerivedImage`](crate::DerivedImage).
    Derived {
        /// The image that it is derived from, whose chunks are needed to serve it.
        base: ImageId,
        /// Where the disk is that holds what differs.
        location: String,
    },
}

/// What kind of image the directory holds, told from its small files alone.
pub fn kind(dir: &Path) -> Result<Kind, OpenError> {
    if layout::is_derived(dir) {
        let record = DerivedRecord::read(dir)?;
        return Ok(Kind::Derived { base: record.base, location: record.location });
    }
    if dir.is_dir() { Ok(Kind::Imported) } else { Err(OpenError::Missing(dir.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_version_1_are_as_documented() {
        let record = DerivedRecord {
            version: 1,
            tool: "virtman 0.1.0".to_owned(),
            base: ImageId::from_bytes([0xab; 32]),
            location: "snapshot of db at 3".to_owned(),
            chunks_changed: 300,
            chunks_zeroed: 7,
        };
        let golden = r#"{
  "version": 1,
  "tool": "virtman 0.1.0",
  "base": "abababababababababababababababababababababababababababababababab",
  "location": "snapshot of db at 3",
  "chunks_changed": 300,
  "chunks_zeroed": 7
}"#;
        assert_eq!(String::from_utf8(record.encode().unwrap()).unwrap(), golden);
        assert_eq!(DerivedRecord::parse(golden.as_bytes()).unwrap(), record);
        let refused = |text: String| DerivedRecord::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(refused(golden.replace("1,\n  \"tool", "2,\n  \"tool")).contains("newer virtman"));
        assert!(refused(golden.replace("tool", "more")).contains("more"));
        assert!(refused(golden.replace("abab", "xyxy")).contains("hash"));
    }
}
