//! Reading a disk through a library that gives a `Read + Seek` view: vhdx and sparse vmdk.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use ::vmdk::{VmdkError, VmdkFileReader};
use vhdx::{VhdxError, VhdxReader};

use crate::ImportError;

trait ReadSeek: Read + Seek + Send {}
impl<T: Read + Seek + Send> ReadSeek for T {}

/// A disk behind a cursor: every user needs one of its own.
pub(crate) struct StreamReader(Box<dyn ReadSeek>);

impl StreamReader {
    /// Opens a vhdx; gives the reader and the disk's size in bytes.
    pub(crate) fn open_vhdx(path: &Path) -> Result<(StreamReader, u64), ImportError> {
        let reader = VhdxReader::open(path).map_err(|error| match error {
            VhdxError::Io(error) => ImportError::reading(path, &error),
            VhdxError::DifferencingNotSupported => {
                ImportError::unsupported(path, "a parent disk (differencing vhdx)")
            }
            VhdxError::ContainerTooSmall(_) | VhdxError::OffsetOutOfBounds => {
                ImportError::truncated(path, error)
            }
            other => ImportError::damaged(path, other),
        })?;
        let size_bytes = reader.virtual_disk_size();
        Ok((StreamReader(Box::new(reader)), size_bytes))
    }

    /// Opens a sparse vmdk, one binary file or several under a descriptor whose extents were
    /// [admitted](super::vmdk::admit_extents); gives the reader and the disk's size in bytes.
    pub(crate) fn open_vmdk(path: &Path) -> Result<(StreamReader, u64), ImportError> {
        let reader = VmdkFileReader::open_path(path).map_err(|error| match error {
            VmdkError::Io(error) => ImportError::reading(path, &error),
            VmdkError::FileTooSmall => ImportError::truncated(path, error),
            VmdkError::UnsupportedVersion(_)
            | VmdkError::CompressedNotSupported
            | VmdkError::UnsupportedDiskType(_) => ImportError::unsupported(path, error),
            other => ImportError::damaged(path, other),
        })?;
        if !matches!(reader.parent_cid(), 0 | NO_PARENT) {
            return Err(ImportError::unsupported(path, "a parent disk (vmdk snapshot)"));
        }
        let size_bytes = reader.virtual_disk_size();
        Ok((StreamReader(Box::new(reader)), size_bytes))
    }

    pub(crate) fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.seek(SeekFrom::Start(offset))?;
        self.0.read_exact(buf)
    }
}

/// The `parentCID` of a vmdk that stands alone.
pub(crate) const NO_PARENT: u32 = 0xffff_ffff;
