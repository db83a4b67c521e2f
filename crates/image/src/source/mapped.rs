//! Reading a disk through `imago`: qcow2 with its backing chain, and flat vmdk.

use std::io;
use std::sync::Arc;

use block::{Extent, ExtentKind};
use imago::file::File;
use imago::{FormatAccess, Mapping, Storage};

/// A disk whose format maps ranges of it to ranges of files.
pub(crate) struct MappedReader(Arc<FormatAccess<File>>);

impl MappedReader {
    pub(crate) fn new(image: Arc<FormatAccess<File>>) -> MappedReader {
        MappedReader(image)
    }

    /// What begins at `offset`. Data is looked for only up to `end`, a hole may reach beyond it. Refuses with
    /// `UnexpectedEof` what [`check_within_file`] refuses.
    pub(crate) fn extent(&self, offset: u64, end: u64) -> io::Result<Extent> {
        let mut at = offset;
        while at < end {
            let (mapping, len) = self.0.get_mapping(at, end - at)?;
            if len == 0 {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("nothing is mapped at {at}")));
            }
            match mapping {
                Mapping::Zero { .. } if at == offset => {
                    let (_, len) = self.0.get_mapping(offset, self.0.size() - offset)?;
                    return Ok(Extent { len, kind: ExtentKind::Hole });
                }
                Mapping::Zero { .. } => break,
                other => check_within_file(&other, at, len)?,
            }
            at += len;
        }
        Ok(Extent { len: at - offset, kind: ExtentKind::Data })
    }

    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read(buf, offset)
    }
}

/// Refuses with `UnexpectedEof` what `len` bytes of a disk from `at` on are mapped to, if a file is too short for it.
/// The library reads zeroes there; but what the mapping promises was lost.
pub(super) fn check_within_file(mapping: &Mapping<'_, File>, at: u64, len: u64) -> io::Result<()> {
    let Mapping::Raw { storage, offset: stored, .. } = mapping else { return Ok(()) };
    let size = storage.size()?;
    if stored.checked_add(len).is_none_or(|stored_end| stored_end > size) {
        let reason = format!(
            "the disk's bytes from {at} on lie at {stored} in '{storage}', which has only {size} bytes"
        );
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
    }
    Ok(())
}
