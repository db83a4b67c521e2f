//! Reading a raw disk: a regular file, whose holes the file system tells, or a block device.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use block::{Extent, ExtentKind};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// A raw disk, or any other sparse file.
pub(crate) struct RawReader {
    file: Arc<File>,
    size_bytes: u64,
}

/// Length in bytes of a regular file or block device.
pub(crate) fn length(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

impl RawReader {
    pub(crate) fn new(file: Arc<File>, size_bytes: u64) -> RawReader {
        RawReader { file, size_bytes }
    }

    /// What begins at `offset`, asked of the file system. Where it cannot tell, all is data. Moves the file's
    /// position, which nothing else here depends on.
    pub(crate) fn extent(&self, offset: u64) -> io::Result<Extent> {
        let rest = self.size_bytes.saturating_sub(offset);
        let data = |len| Ok(Extent { len, kind: ExtentKind::Data });
        let hole = |len| Ok(Extent { len, kind: ExtentKind::Hole });
        match rustix::fs::seek(&*self.file, SeekFrom::Data(offset)) {
            Ok(at) if at > offset => hole(rest.min(at - offset)),
            Ok(_) => match rustix::fs::seek(&*self.file, SeekFrom::Hole(offset)) {
                Ok(end) if end > offset => data(rest.min(end - offset)),
                _ => data(rest),
            },
            // No data from here to the end, provided that the file has not become shorter.
            Err(Errno::NXIO) if length(&self.file)? >= self.size_bytes => hole(rest),
            Err(Errno::NXIO) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => data(rest),
        }
    }

    pub(crate) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}
