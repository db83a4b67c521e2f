//! The formats that can be imported, and telling them by their first bytes.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ImportError;
use crate::error::CONVERT;

/// The format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU's format, version 2 or 3, also with compressed clusters and backing files.
    Qcow2,
    /// VMware's format: a flat extent under a descriptor, sparse, or stream-optimised.
    Vmdk,
    /// Hyper-V's format, fixed or dynamic.
    Vhdx,
}

/// Bytes that detection looks at.
pub(crate) const DETECT_BYTES: usize = 512;

impl Format {
    const ALL: [(Format, &'static str); 4] =
        [(Format::Raw, "raw"), (Format::Qcow2, "qcow2"), (Format::Vmdk, "vmdk"), (Format::Vhdx, "vhdx")];

    /// Whether a file that begins with `head` can have this format. Anything can be raw.
    pub(super) fn fits(self, head: &[u8]) -> bool {
        match self {
            Format::Raw => true,
            Format::Qcow2 => head.starts_with(b"QFI\xfb") && head.get(4..8) != Some(&[0, 0, 0, 1]),
            Format::Vmdk => {
                [&b"KDMV"[..], b"COWD", b"# Disk DescriptorFile"].iter().any(|magic| head.starts_with(magic))
            }
            Format::Vhdx => head.starts_with(b"vhdxfile"),
        }
    }

    /// The format of a file of `len` bytes that begins with `head`: the one that was told, if it fits, else the
    /// one that its magic names. Without a known magic it is raw, unless it looks like something that nobody
    /// would boot from.
    pub(crate) fn settle(
        told: Option<Format>,
        head: &[u8],
        len: u64,
        path: &Path,
    ) -> Result<Format, ImportError> {
        if let Some(told) = told {
            let wrong = || ImportError::WrongFormat { path: path.to_owned(), told };
            return told.fits(head).then_some(told).ok_or_else(wrong);
        }
        if let Some(format) = [Format::Qcow2, Format::Vmdk, Format::Vhdx].into_iter().find(|f| f.fits(head)) {
            return Ok(format);
        }
        let unknown = |what: String, remedy: &str| {
            Err(ImportError::UnknownFormat { path: path.to_owned(), what, remedy: remedy.to_owned() })
        };
        if let Some((_, _, name)) =
            FOREIGN.iter().find(|(at, magic, _)| head[(*at).min(head.len())..].starts_with(magic))
        {
            return unknown(format!("is a {name} image"), CONVERT);
        }
        if let Some((_, name)) = PACKED.iter().find(|(magic, _)| head.starts_with(magic)) {
            return unknown(format!("is packed with {name}"), "unpack it first");
        }
        if !len.is_multiple_of(SECTOR_BYTES) {
            let what = format!("has no known header, and its {len} bytes are no whole number of sectors");
            return unknown(what, "if it is a raw disk all the same, give the format as raw");
        }
        Ok(Format::Raw)
    }
}

const SECTOR_BYTES: u64 = 512;

/// Formats that exist but cannot be read here: where the magic stands, the magic, the name.
const FOREIGN: [(usize, &[u8], &str); 7] = [
    (0, b"QFI\xfb\0\0\0\x01", "qcow (version 1)"),
    (0, b"QED\0", "qed"),
    (0, b"conectix", "vhd (vpc)"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "LUKS-encrypted"),
];

/// What images are often packed with for download.
const PACKED: [(&[u8], &str); 5] = [
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
];

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Format::ALL.iter().find(|(format, _)| format == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

/// A word is not the name of a format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an image format that can be read here: use raw, qcow2, vmdk or vhdx")]
pub struct ParseFormatError(String);

impl FromStr for Format {
    type Err = ParseFormatError;
    fn from_str(text: &str) -> Result<Format, ParseFormatError> {
        let found = Format::ALL.iter().find(|(_, name)| *name == text);
        found
            .map(|(format, _)| *format)
            .ok_or_else(|| ParseFormatError(text.chars().take(40).flat_map(char::escape_debug).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_told_by_its_magic_and_a_wrong_word_is_refused() {
        let settle = |told, head: &[u8], len| Format::settle(told, head, len, Path::new("x"));
        assert!(matches!(settle(None, b"QFI\xfb\0\0\0\x03", 1024), Ok(Format::Qcow2)));
        assert!(matches!(settle(None, b"KDMV\x01", 1024), Ok(Format::Vmdk)));
        assert!(matches!(settle(None, b"vhdxfile", 1024), Ok(Format::Vhdx)));
        assert!(matches!(settle(None, &[0; 512], 1024), Ok(Format::Raw)));
        assert!(matches!(settle(Some(Format::Raw), b"QFI\xfb\0\0\0\x03", 7), Ok(Format::Raw)));
        assert!(matches!(settle(Some(Format::Qcow2), &[0; 512], 512), Err(ImportError::WrongFormat { .. })));
        let packed = PACKED.iter().map(|&(magic, name)| (0, magic, name));
        for (at, magic, name) in FOREIGN.into_iter().chain(packed) {
            let head = [&vec![0; at], magic].concat();
            let error = settle(None, &head, 1024).expect_err("cannot be read here").to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(matches!(settle(None, b"hello", 5), Err(ImportError::UnknownFormat { .. })));
    }

    #[test]
    fn names_of_formats_survive_their_text_form() {
        for (format, name) in Format::ALL {
            assert_eq!(format.to_string(), name);
            assert_eq!(name.parse(), Ok(format));
        }
        assert!("vdi".parse::<Format>().is_err());
    }
}
