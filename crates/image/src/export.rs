//! Writing a disk as a qcow2 file: whole, or only what differs from a backing file.
//!
//! The file is for other programs: a qcow2 of version 3 with clusters of 64 KiB and no features that old readers lack.
//! `imago` writes it; its files pass `qemu-img check`, and it writes as fast as the file system takes the bytes. What
//! is zero becomes a zero cluster over a backing file, and takes no space without one.
//!
//! - Consistency: the disk must not change meanwhile. What is not in the named ranges is not read.
//! - Retries: none.
//! - Cancellation: by [`ImportProgress::cancel`], also while a read is waited for.
//! - Crash: the file has its name once it is complete and synced; see [`unfinished`](crate::unfinished).

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use block::limits::CHUNK_BYTES;
use block::{Disk, DiskError};
use futures_util::StreamExt;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, StorageOpenOptions};
use tokio::runtime::Handle;

use crate::ImportProgress;
use crate::layout;
use crate::pieces::{Content, Touched};
use crate::unfinished::Unfinished;

/// Bytes of a cluster: what `qemu-img` takes if it is not told otherwise. A piece of a disk is a whole number of them.
const CLUSTER_BYTES: usize = CHUNK_BYTES;

/// Disks of other programs are whole numbers of sectors.
const SECTOR_BYTES: u64 = 512;

/// Longest name of a backing file in bytes; the format has no more room.
pub const BACKING_NAME_MAX: usize = 1023;

/// What to write, and where.
#[derive(Clone)]
pub struct Qcow2Request {
    /// The file, which must not exist.
    pub path: PathBuf,
    /// The disk, in a state that does not change any more. Its size, in whole sectors, is that of the disk in the file.
    pub disk: Arc<dyn Disk>,
    /// The runtime on which the disk is waited for.
    pub runtime: Handle,
    /// Ranges of bytes, in order, that must be in the file, as far as they are not zero. Everything else is left to
    /// the backing file, or is zero if there is none.
    pub data: Vec<Range<u64>>,
    /// What the file builds upon.
    pub backing: Option<Backing>,
}

/// A file that another builds upon, as it is named there. It is not opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name, as whoever opens the qcow2 will understand it: relative to the directory of the qcow2, or absolute.
    pub name: String,
    /// Its format in QEMU's words, such as `raw` or `qcow2`.
    pub format: String,
}

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// Size of the disk in the file.
    pub size_bytes: u64,
    /// Bytes of disk that were written as data.
    pub data_bytes: u64,
    /// Length of the file.
    pub file_bytes: u64,
}

/// Why a disk was not written to a file. Nothing is left behind, whichever it was.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file is there already.
    #[error("'{}' exists already: remove it, or give another name", .0.display())]
    Exists(PathBuf),
    /// The backing file cannot be named in a qcow2.
    #[error("a qcow2 file cannot name a backing file in {0} bytes: give a name of 1 to {BACKING_NAME_MAX}")]
    BackingName(usize),
    /// The disk has no bytes.
    #[error("the disk has 0 bytes: there is nothing to write")]
    Empty,
    /// The disk cannot be read.
    #[error("cannot read the disk: {0}")]
    Disk(#[source] DiskError),
    /// There is no room for the file.
    #[error("no space left in '{}': free some, or write to another directory", .0.display())]
    NoSpace(PathBuf),
    /// The file cannot be written.
    #[error("cannot write '{}': {reason}", path.display())]
    Unwritable {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// The caller asked to stop.
    #[error("the export was cancelled")]
    Cancelled,
}

impl ExportError {
    fn writing(path: &Path, error: &io::Error) -> ExportError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ExportError::NoSpace(dir_of(path).to_owned())
            }
            io::ErrorKind::AlreadyExists => ExportError::Exists(path.to_owned()),
            _ => ExportError::Unwritable { path: path.to_owned(), reason: error.to_string() },
        }
    }
}

fn dir_of(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a disk to a new qcow2 file. Blocks for as long as reading and writing takes, in a thread that may block:
/// not one of the runtime's workers.
pub fn write_qcow2(request: &Qcow2Request, progress: &ImportProgress) -> Result<Exported, ExportError> {
    check(request)?;
    let path = &request.path;
    let unwritable = |error: io::Error| ExportError::writing(path, &error);
    let unfinished = Unfinished::create_in(dir_of(path)).map_err(unwritable)?;
    let qcow2 = create(&unfinished.path(), request).map_err(unwritable)?;
    let size_bytes = qcow2.size();
    let touched = Touched::new(&request.data, request.disk.size_bytes());
    progress.begin(touched.bytes());
    let work = copy(request, &touched, &qcow2, progress);
    let done = request.runtime.block_on(progress.unless_cancelled(work));
    let data_bytes = done.ok_or(ExportError::Cancelled)??;
    qcow2.flush().map_err(unwritable)?;
    drop(qcow2);
    let file_bytes = publish(unfinished, path).map_err(unwritable)?;
    Ok(Exported { size_bytes, data_bytes, file_bytes })
}

/// Refuses what needs no reading to be refused.
fn check(request: &Qcow2Request) -> Result<(), ExportError> {
    let path = &request.path;
    // Whether the name is still free is judged again, without a gap, when the file gets it.
    if path.symlink_metadata().is_ok() {
        return Err(ExportError::Exists(path.clone()));
    }
    if request.disk.size_bytes() == 0 {
        return Err(ExportError::Empty);
    }
    match request.backing.as_ref().map(|backing| backing.name.len()) {
        None | Some(1..=BACKING_NAME_MAX) => Ok(()),
        Some(len) => Err(ExportError::BackingName(len)),
    }
}

/// An empty qcow2 in a file that exists. What it builds upon is not opened, and needs not be: only whole clusters are
/// written.
fn create(path: &Path, request: &Qcow2Request) -> io::Result<FormatAccess<imago::file::File>> {
    let open = || {
        let options = StorageOpenOptions::new().filename(path).write(true);
        <imago::file::File as imago::Storage>::open(options)
    };
    let size_bytes = request.disk.size_bytes().next_multiple_of(SECTOR_BYTES);
    let new =
        Qcow2::<imago::file::File>::create_builder(open()?).size(size_bytes).cluster_size(CLUSTER_BYTES);
    match request.backing.clone() {
        Some(backing) => new.backing(backing.name, backing.format).create()?,
        None => new.create()?,
    }
    let mut qcow2 = Qcow2::<imago::file::File>::open_image(open()?, true)?;
    qcow2.set_data_file(None);
    qcow2.set_backing(None);
    Ok(FormatAccess::new(qcow2))
}

/// Copies the touched clusters, and gives how many bytes were data.
async fn copy(
    request: &Qcow2Request,
    touched: &Touched,
    qcow2: &FormatAccess<imago::file::File>,
    progress: &ImportProgress,
) -> Result<u64, ExportError> {
    let unwritable = |error: io::Error| ExportError::writing(&request.path, &error);
    let mut pieces = pin!(touched.read(&request.disk, runs_of));
    let mut data_bytes = 0;
    while let Some(read) = pieces.next().await {
        let (piece, (content, runs)) = read.map_err(ExportError::Disk)?;
        // The last cluster is padded in memory; the disk in the file ends with a sector.
        let bytes_end = qcow2.size() - piece.offset();
        for run in runs {
            let range = run.range.start..run.range.end.min(bytes_end as usize);
            let offset = piece.offset() + range.start as u64;
            let written = match (&content.bytes, run.is_zero, &request.backing) {
                (_, true, None) => Ok(()),
                (None, ..) | (_, true, _) => qcow2.write_zeroes(offset, range.len() as u64),
                (Some(bytes), false, _) => {
                    data_bytes += range.len() as u64;
                    qcow2.write(&bytes[range], offset)
                }
            };
            written.map_err(unwritable)?;
        }
        progress.add_done(piece.len_bytes);
        // While no read has to be waited for, a cancellation is noticed only here.
        if progress.is_cancelled() {
            return Err(ExportError::Cancelled);
        }
    }
    Ok(data_bytes)
}

/// Clusters of one kind, as a range of bytes of a piece.
struct Run {
    range: Range<usize>,
    is_zero: bool,
}

/// Finds out which clusters of a piece are zero.
fn runs_of(content: Content) -> (Content, Vec<Run>) {
    let mut runs: Vec<Run> = Vec::new();
    let all_zero = [0; CLUSTER_BYTES];
    for cluster in 0..content.piece.chunks as usize {
        let range = cluster * CLUSTER_BYTES..(cluster + 1) * CLUSTER_BYTES;
        let is_zero = content.bytes.as_ref().is_none_or(|bytes| bytes[range.clone()] == all_zero);
        match runs.last_mut() {
            Some(last) if last.is_zero == is_zero => last.range.end = range.end,
            _ => runs.push(Run { range, is_zero }),
        }
    }
    (content, runs)
}

/// Gives the finished file its name, unless another has it by now; gives its length.
fn publish(unfinished: Unfinished, path: &Path) -> io::Result<u64> {
    let file = unfinished.publish(path)?;
    layout::sync_dir(dir_of(path))?;
    Ok(file.metadata()?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_told_apart_from_a_broken_one() {
        let writing =
            |errno| ExportError::writing(Path::new("/exports/a"), &io::Error::from_raw_os_error(errno));
        let (no_space, over_quota, broken, exists) = (28, 122, 5, 17);
        assert!(matches!(writing(no_space), ExportError::NoSpace(_)));
        assert!(matches!(writing(over_quota), ExportError::NoSpace(_)));
        assert!(matches!(writing(broken), ExportError::Unwritable { .. }));
        assert!(matches!(writing(exists), ExportError::Exists(_)));
        assert!(writing(no_space).to_string().contains("'/exports'"));
    }
}
