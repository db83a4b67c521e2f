//! Opening a vmdk of several files: a descriptor in text, and extents in files of their own.
//!
//! Flat extents are read by `imago`, which asks a gate before it opens one; ours holds the path against
//! [`AllowedDirs`]. Sparse ones are read as a stream; their paths are held against it beforehand.

use std::io;
use std::path::Path;

use ::vmdk::VmdkFileReader;
use imago::file::File;
use imago::format::gate::ImplicitOpenGate;
use imago::vmdk::Vmdk;
use imago::{FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::allowed::AllowedDirs;
use super::qcow2::storage;
use super::stream::NO_PARENT;
use super::{FilePart, raw};
use crate::ImportError;

/// Longest descriptor in bytes: the library's own bound.
const DESCRIPTOR_BYTES_MAX: u64 = 2 << 20;

/// Opens the extents of one image, as far as they lie where they may.
struct Gate<'a> {
    image: &'a Path,
    allowed: &'a AllowedDirs,
    parts: &'a mut Vec<FilePart>,
    refused: &'a mut Option<ImportError>,
}

impl Gate<'_> {
    fn admit(&mut self, options: &StorageOpenOptions) -> Result<File, ImportError> {
        let name = options.get_filename().and_then(Path::to_str);
        let name = name.ok_or_else(|| ImportError::damaged(self.image, "an extent's name is not text"))?;
        let path = self.allowed.admit_reference(self.image, name)?;
        self.parts.push(FilePart::of(&path)?);
        storage(&path)
    }
}

impl ImplicitOpenGate<File> for Gate<'_> {
    fn open_format<F: FormatDriverBuilder<File>>(&mut self, _builder: F) -> io::Result<FormatAccess<File>> {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "an extent may not be an image of its own"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<File> {
        self.admit(&options).map_err(|error| {
            let text = error.to_string();
            *self.refused = Some(error);
            io::Error::new(io::ErrorKind::PermissionDenied, text)
        })
    }
}

/// Opens the flat vmdk with the [checked](check_descriptor) descriptor at the canonical `path`, and lists its files in `parts`.
pub(super) fn open_flat(
    path: &Path,
    allowed: &AllowedDirs,
    parts: &mut Vec<FilePart>,
) -> Result<FormatAccess<File>, ImportError> {
    parts.push(FilePart::of(path)?);
    let mut image =
        Vmdk::<File>::open_image(storage(path)?, false).map_err(|e| ImportError::unsupported(path, e))?;
    let mut refused = None;
    let gate = Gate { image: path, allowed, parts, refused: &mut refused };
    let opened = image.open_implicit_dependencies_gated(gate);
    match (opened, refused) {
        (_, Some(refused)) => Err(refused),
        (Err(error), None) => Err(ImportError::damaged(path, error)),
        (Ok(()), None) => Ok(FormatAccess::new(image)),
    }
}

/// What a descriptor's extents are.
pub(super) enum Extents {
    /// The disk's bytes as they are.
    Flat,
    /// Each a sparse vmdk of its own.
    Sparse,
}

/// Tells what the extents are, and refuses a snapshot: `imago` does not look at parents, so that one would read
/// as if it stood alone.
pub(super) fn check_descriptor(path: &Path) -> Result<Extents, ImportError> {
    let unreadable = |error: io::Error| ImportError::unreadable(path, error);
    let file = std::fs::File::open(path).map_err(unreadable)?;
    if raw::length(&file).map_err(unreadable)? > DESCRIPTOR_BYTES_MAX {
        return Err(ImportError::damaged(path, "its descriptor is far too long"));
    }
    let text = std::fs::read(path).map_err(unreadable)?;
    let text = String::from_utf8_lossy(&text);
    let value_of = |name: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let parent = value_of("parentCID").map(|value| u32::from_str_radix(value, 16));
    if !matches!(parent, None | Some(Ok(NO_PARENT))) {
        return Err(ImportError::unsupported(path, "a parent disk (vmdk snapshot)"));
    }
    let kind = value_of("createType").unwrap_or_default();
    Ok(if kind.contains("Sparse") { Extents::Sparse } else { Extents::Flat })
}

/// Holds the extents that a descriptor names against the allowed directories, and lists all files in `parts`.
pub(super) fn admit_extents(
    path: &Path,
    allowed: &AllowedDirs,
    parts: &mut Vec<FilePart>,
) -> Result<(), ImportError> {
    parts.push(FilePart::of(path)?);
    let extents = VmdkFileReader::extent_dependencies(path).map_err(|e| ImportError::damaged(path, e))?;
    for extent in extents {
        let name =
            extent.to_str().ok_or_else(|| ImportError::damaged(path, "an extent's name is not text"))?;
        parts.push(FilePart::of(&allowed.admit_reference(path, name)?)?);
    }
    Ok(())
}
