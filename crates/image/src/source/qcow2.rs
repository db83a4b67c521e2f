//! Opening a qcow2 image and the chain that it builds upon.
//!
//! `imago` reads the clusters; what it must not decide is which other files to open, so the backing file's name
//! is taken from the header here and judged by [`AllowedDirs`] first. And because `imago` reads zeroes beyond
//! the end of a file, a truncated mapping table would turn data into zeroes, and a truncated compressed cluster
//! could unpack to anything: both are checked against the file's length before it sees them. Plain clusters are
//! checked where they are read, in [`mapped`](super::mapped).
//! The layout is that of QEMU's `docs/interop/qcow2.rst`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use block::limits::DISK_BYTES_MAX;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Storage, StorageOpenOptions};

use super::allowed::AllowedDirs;
use super::format::Format;
use super::{FilePart, head_of, raw};
use crate::ImportError;

/// Longest chain of images that build upon each other. Real ones have a handful; each costs open files and a
/// table lookup per read.
const CHAIN_MAX: usize = 32;

/// Largest L1 table in bytes, QEMU's own bound.
const L1_BYTES_MAX: u64 = 32 << 20;

const HEAD_V2_BYTES: usize = 72;
const HEAD_BYTES: usize = 112;

/// Bits of the header's incompatible features.
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Set in an L2 entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// Compressed clusters are measured in sectors; the last one of a file need not fill its last sector.
const SECTOR_BYTES: u64 = 512;

/// The bits of an L1 entry that are the offset of an L2 table.
const L2_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Opens the image at the canonical `path` with everything below it, and lists the files in `parts`.
pub(super) fn open(
    path: &Path,
    allowed: &AllowedDirs,
    parts: &mut Vec<FilePart>,
) -> Result<FormatAccess<imago::file::File>, ImportError> {
    if parts.iter().any(|part| part.path == path) {
        let reason = "it builds upon itself".to_owned();
        return Err(ImportError::Chain { path: path.to_owned(), reason });
    }
    if parts.len() >= CHAIN_MAX {
        let reason = format!("more than {CHAIN_MAX} images build upon each other");
        return Err(ImportError::Chain { path: path.to_owned(), reason });
    }
    parts.push(FilePart::of(path)?);
    let mut image = open_alone(path)?;
    let backing = match image.implicit_backing_file().cloned() {
        Some(name) => {
            let format = image.implicit_backing_format().cloned();
            Some(open_backing(path, &name, format.as_deref(), allowed, parts)?)
        }
        None => None,
    };
    image.set_backing(backing);
    Ok(FormatAccess::new(image))
}

/// Opens the image at the canonical `path`, and nothing else: as long as it gets no backing file, what it does not
/// have itself is zero.
pub(super) fn open_alone(path: &Path) -> Result<Qcow2<imago::file::File>, ImportError> {
    check(path)?;
    let mut image = Qcow2::<imago::file::File>::open_image(storage(path)?, false)
        .map_err(|e| ImportError::damaged(path, e))?;
    image.set_data_file(None);
    image.set_backing(None);
    Ok(image)
}

fn open_backing(
    image: &Path,
    name: &str,
    format: Option<&str>,
    allowed: &AllowedDirs,
    parts: &mut Vec<FilePart>,
) -> Result<FormatAccess<imago::file::File>, ImportError> {
    if name.contains(':') && !name.starts_with('/') {
        return Err(ImportError::unsupported(image, format!("the backing file '{}'", name.escape_debug())));
    }
    let path = allowed.admit_reference(image, name)?;
    // Images from before QEMU 5.1 may not tell their backing file's format. It is then told by its magic,
    // which a guest may have written; all that this can do is name another file in an allowed directory.
    let (head, len) = head_of(&path)?;
    let told = format.map(str::parse).transpose();
    let told =
        told.map_err(|e| ImportError::unsupported(image, format!("a backing file of another format ({e})")))?;
    match Format::settle(told, &head, len, &path)? {
        Format::Qcow2 => open(&path, allowed, parts),
        Format::Raw => {
            let raw =
                Raw::open_image(storage(&path)?, false).map_err(|e| ImportError::unreadable(&path, e))?;
            parts.push(FilePart::of(&path)?);
            Ok(FormatAccess::new(raw))
        }
        other => Err(ImportError::unsupported(image, format!("a backing file in {other} format"))),
    }
}

/// A file as the library wants it, read-only.
pub(super) fn storage(path: &Path) -> Result<imago::file::File, ImportError> {
    imago::file::File::open(StorageOpenOptions::new().filename(path))
        .map_err(|e| ImportError::unreadable(path, e))
}

/// Refuses what cannot be read, and a file that is shorter than its tables say.
fn check(path: &Path) -> Result<(), ImportError> {
    let file = File::open(path).map_err(|e| ImportError::unreadable(path, e))?;
    let len = raw::length(&file).map_err(|e| ImportError::unreadable(path, e))?;
    let mut bytes = [0; HEAD_BYTES];
    let have = bytes.len().min(usize::try_from(len).unwrap_or(usize::MAX));
    file.read_exact_at(&mut bytes[..have], 0).map_err(|e| ImportError::reading(path, &e))?;
    let head = Head::parse(&bytes[..have]).map_err(|problem| problem.at(path))?;

    let beyond = |what: &str, end: u64| {
        ImportError::truncated(path, format!("{what} ends at {end}, but the file at {len}"))
    };
    let l1_end = head.l1_offset.saturating_add(head.l1_bytes);
    if l1_end > len {
        return Err(beyond("its L1 table", l1_end));
    }
    let table = |offset: u64, len_bytes: u64| {
        let mut bytes = vec![0; len_bytes as usize];
        file.read_exact_at(&mut bytes, offset).map_err(|e| ImportError::reading(path, &e))?;
        Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect::<Vec<u64>>())
    };
    for l1_entry in table(head.l1_offset, head.l1_bytes)? {
        let l2_offset = l1_entry & L2_OFFSET_MASK;
        if l2_offset == 0 {
            continue;
        }
        let l2_end = l2_offset + head.cluster_bytes;
        if l2_end > len {
            return Err(beyond("an L2 table", l2_end));
        }
        let compressed = table(l2_offset, head.cluster_bytes)?.into_iter().filter(|e| e & COMPRESSED != 0);
        if let Some(end) =
            compressed.map(|entry| head.compressed_end(entry)).find(|end| *end >= len + SECTOR_BYTES)
        {
            return Err(beyond("a compressed cluster", end));
        }
    }
    Ok(())
}

/// What the header tells that matters here.
struct Head {
    cluster_bytes: u64,
    l1_offset: u64,
    l1_bytes: u64,
}

/// Why a header is refused.
enum Problem {
    Truncated,
    Damaged(String),
    Unsupported(&'static str),
    /// Found before the tables are read: those of a disk that is larger than any may be could be read for hours.
    TooLarge(u64),
}

impl Problem {
    fn at(self, path: &Path) -> ImportError {
        match self {
            Problem::Truncated => ImportError::truncated(path, "it is shorter than its header"),
            Problem::Damaged(reason) => ImportError::damaged(path, reason),
            Problem::Unsupported(what) => ImportError::unsupported(path, what),
            Problem::TooLarge(size_bytes) => ImportError::TooLarge { path: path.to_owned(), size_bytes },
        }
    }
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Head, Problem> {
        let u32_at =
            |at: usize| bytes.get(at..at + 4).and_then(|b| Some(u32::from_be_bytes(b.try_into().ok()?)));
        let u64_at =
            |at: usize| bytes.get(at..at + 8).and_then(|b| Some(u64::from_be_bytes(b.try_into().ok()?)));
        let known = |value: Option<u32>| value.ok_or(Problem::Truncated);
        if bytes.len() < HEAD_V2_BYTES {
            return Err(Problem::Truncated);
        }
        let features = match known(u32_at(4))? {
            2 => 0,
            3 => u64_at(72).ok_or(Problem::Truncated)?,
            other => return Err(Problem::Damaged(format!("qcow2 has no version {other}"))),
        };
        if known(u32_at(32))? != 0 {
            return Err(Problem::Unsupported("encryption"));
        }
        if features & EXTERNAL_DATA != 0 {
            return Err(Problem::Unsupported("an external data file"));
        }
        if features & COMPRESSION_TYPE != 0 && bytes.get(104) != Some(&0) {
            return Err(Problem::Unsupported("zstd compression"));
        }
        if features & EXTENDED_L2 != 0 {
            return Err(Problem::Unsupported("subclusters (extended L2 entries)"));
        }
        if features & CORRUPT != 0 {
            return Err(Problem::Damaged("it is marked as corrupt".to_owned()));
        }
        let cluster_bits = known(u32_at(20))?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Problem::Damaged(format!("its clusters have 2^{cluster_bits} bytes")));
        }
        let cluster_bytes = 1u64 << cluster_bits;
        let size_bytes = u64_at(24).ok_or(Problem::Truncated)?;
        if size_bytes > DISK_BYTES_MAX {
            return Err(Problem::TooLarge(size_bytes));
        }
        let l1_offset = u64_at(40).ok_or(Problem::Truncated)?;
        let l1_bytes = u64::from(known(u32_at(36))?) * 8;
        let covered = u128::from(l1_bytes / 8) * u128::from(cluster_bytes / 8) * u128::from(cluster_bytes);
        if l1_bytes > L1_BYTES_MAX || covered < u128::from(size_bytes) {
            return Err(Problem::Damaged(format!("its L1 table of {l1_bytes} bytes does not fit its size")));
        }
        // What a longer table has behind the end of the disk is never looked at.
        let l1_bytes = 8 * size_bytes.div_ceil(cluster_bytes / 8 * cluster_bytes);
        Ok(Head { cluster_bytes, l1_offset, l1_bytes })
    }

    /// Where the compressed cluster of an L2 entry ends, rounded up to a sector.
    fn compressed_end(&self, entry: u64) -> u64 {
        let offset_bits = 62 - (self.cluster_bytes.trailing_zeros() - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        (offset / SECTOR_BYTES + 1 + more_sectors) * SECTOR_BYTES
    }
}

/// Parses the header of a qcow2, for fuzzing.
pub(crate) fn parse_any(bytes: &[u8]) {
    if let Ok(head) = Head::parse(bytes) {
        assert!(head.l1_bytes <= L1_BYTES_MAX && head.cluster_bytes.is_power_of_two());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_too_large_is_refused_by_its_header() {
        let header = |size_bytes: u64| {
            let mut header = [0; HEAD_V2_BYTES];
            header[7] = 2;
            header[23] = 21;
            header[24..32].copy_from_slice(&size_bytes.to_be_bytes());
            header[36..40].copy_from_slice(&1024u32.to_be_bytes());
            header
        };
        assert!(Head::parse(&header(DISK_BYTES_MAX)).is_ok());
        let refused = Head::parse(&header(DISK_BYTES_MAX + 1));
        assert!(matches!(refused, Err(Problem::TooLarge(size_bytes)) if size_bytes == DISK_BYTES_MAX + 1));
    }
}
