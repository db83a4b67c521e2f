//! A regular file or block device as a medium.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use block::{ExtentKind, TryIo};
use rustix::fs::{Advice, FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use crate::Media;

/// Zeroes written at a time where a file system cannot punch holes.
const ZERO_PIECE_BYTES: usize = 64 * 1024;

/// A regular file or block device, used through the page cache.
///
/// The page cache is wanted: the bytes of an image that one VM read are in memory for the next, and
/// a guest's `flush` is what makes data durable, not the single write.
#[derive(Debug)]
pub struct FileMedia {
    file: File,
    is_device: bool,
    /// How [`Media::try_read_at`] asks not to wait.
    now: ReadWriteFlags,
}

/// The type that `statfs(2)` gives tmpfs. Its files are in memory, so reading them waits for no device; asked
/// not to wait it refuses altogether.
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// Another process, or another part of this one, holds the file.
#[derive(Debug)]
pub(crate) struct InUse;

impl FileMedia {
    /// Opens an existing file or block device for reading and writing.
    pub fn open(path: &Path) -> io::Result<FileMedia> {
        FileMedia::from_file(OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Opens the file for reading and writing and creates it, empty, if it is missing.
    pub fn open_or_create(path: &Path) -> io::Result<FileMedia> {
        FileMedia::from_file(
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?,
        )
    }

    fn from_file(file: File) -> io::Result<FileMedia> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let in_memory = rustix::fs::fstatfs(&file)?.f_type as i64 == TMPFS_MAGIC;
        let now = if in_memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
        Ok(FileMedia { file, is_device: kind.is_block_device(), now })
    }

    /// Takes the file for this `FileMedia` alone until it is dropped. Advisory: it holds among those who
    /// ask.
    pub(crate) fn lock(&self) -> io::Result<Result<(), InUse>> {
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Ok(())),
            Err(Errno::WOULDBLOCK) => Ok(Err(InUse)),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps the kernel from reading ahead: what is in memory then was written or asked for by this process.
    pub(crate) fn read_only_what_is_asked_for(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::Random)?)
    }

    /// See [`start_sync`].
    pub(crate) fn start_sync(&self) {
        start_sync(&self.file);
    }

    /// What the file system says of the open file, which may have lost its name.
    pub(crate) fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Whether this is a block device, whose size is given.
    pub(crate) fn is_device(&self) -> bool {
        self.is_device
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = [0; ZERO_PIECE_BYTES];
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(ZERO_PIECE_BYTES as u64);
            self.write_at(offset + done, &zeroes[..piece as usize])?;
            done += piece;
        }
        Ok(())
    }
}

/// Has the file system begin to write out what was written, without waiting for it. Files of which all are begun
/// before the first is synced take a journaling file system one commit instead of one each.
pub fn start_sync(file: &File) {
    // Linux begins to write out the pages that it is told to forget. It is a hint: the sync that follows counts.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}

impl Media for FileMedia {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo> {
        let len = buf.len();
        match rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(buf)], offset, self.now) {
            Ok(read) if read == len => Ok(TryIo::Done),
            // Part of the range is cached, or ends the file: the waiting read tells which.
            Ok(_) => Ok(TryIo::WouldBlock),
            // A file system without RWF_NOWAIT is one that always waits.
            Err(Errno::AGAIN | Errno::INTR | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                Ok(TryIo::WouldBlock)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.saturating_add(len).min(self.len_bytes()?);
        if offset >= end {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match rustix::fs::fallocate(&self.file, mode, offset, end - offset) {
                Ok(()) => Ok(()),
                Err(Errno::INTR) => continue,
                // EINVAL: a device that cannot discard at this alignment.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    self.write_zeroes(offset, end - offset)
                }
                Err(error) => Err(error.into()),
            };
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        if self.is_device {
            // The metadata of a device says 0. All reads and writes are positioned, so moving the
            // file's offset disturbs nobody.
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !self.is_device {
            return self.file.set_len(len);
        }
        if len > self.len_bytes()? {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "a block device cannot grow"));
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64, len: u64) -> io::Result<(ExtentKind, u64)> {
        let whole = |kind| Ok((kind, len));
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((ExtentKind::Hole, (data - offset).min(len))),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((ExtentKind::Data, (hole - offset).min(len))),
                Ok(_) | Err(_) => whole(ExtentKind::Data),
            },
            // No data up to the end of the file.
            Err(Errno::NXIO) => whole(ExtentKind::Hole),
            Err(_) => whole(ExtentKind::Data),
        }
    }
}
