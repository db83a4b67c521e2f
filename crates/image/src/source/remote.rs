//! Reading a disk that lies elsewhere and is reached over a network: a logical unit of a storage array, say.
//!
//! This crate knows no network: whoever adds such an image brings the [`Disk`], and whoever opens it later brings
//! an [`OpenRemote`]. What is read in a thread of an import or of the blocking pool waits there on the runtime
//! that the disk belongs to.

use std::io;
use std::path::Path;
use std::sync::Arc;

use block::{Disk, Extent, ExtentKind};
use tokio::runtime::Handle;

use super::format::{DETECT_BYTES, Format};
use crate::ImportError;

/// Bytes whose extents are asked for at a time: an empty disk of terabytes is gone through in thousands of
/// questions, and none of them is about more than a server can look up at once.
const EXTENTS_BYTES: u64 = 1 << 30;

/// Opens the disks that images lie on, or were derived from, by the location under which they were added. Any
/// function that does so is one.
pub trait OpenRemote: Send + Sync {
    /// The disk at a location, or why it cannot be opened. Called in a thread that may block.
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String>;
}

impl<F: Fn(&str) -> Result<Arc<dyn Disk>, String> + Send + Sync> OpenRemote for F {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        self(location)
    }
}

/// How remote disks are reached.
#[derive(Clone)]
pub struct Remotes {
    /// Opens them.
    pub opener: Arc<dyn OpenRemote>,
    /// Where their operations are waited for.
    pub runtime: Handle,
}

/// A remote disk, and where to wait for it.
#[derive(Clone)]
pub(crate) struct RemoteReader {
    disk: Arc<dyn Disk>,
    runtime: Handle,
}

impl RemoteReader {
    pub(crate) fn new(disk: Arc<dyn Disk>, runtime: Handle) -> RemoteReader {
        RemoteReader { disk, runtime }
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    /// Refuses a disk whose content is anything but a raw image. What is told to be raw is.
    pub(super) fn check_raw(&self, told: Option<Format>, path: &Path) -> Result<(), ImportError> {
        let mut head = vec![0; DETECT_BYTES.min(usize::try_from(self.size_bytes()).unwrap_or(DETECT_BYTES))];
        if told.is_none() {
            self.read_at(0, &mut head).map_err(|e| ImportError::reading(path, &e))?;
        }
        let format = told.map_or_else(|| Format::settle(None, &head, self.size_bytes(), path), Ok)?;
        if format == Format::Raw {
            return Ok(());
        }
        Err(ImportError::Unsupported {
            path: path.to_owned(),
            what: format!("{format} on a remote disk"),
            remedy:
                "copy its content to a file, and add that; or give the format as raw, if its bytes are meant"
                    .to_owned(),
        })
    }

    /// What begins at `offset`; it may reach as far as the disk does.
    pub(super) fn extent(&self, offset: u64) -> io::Result<Extent> {
        let len = EXTENTS_BYTES.min(self.size_bytes() - offset);
        let extents = self.runtime.block_on(self.disk.extents(offset, len)).map_err(io::Error::other)?;
        let nothing_known = Extent { len, kind: ExtentKind::Data };
        let first = extents.first().copied().unwrap_or(nothing_known);
        let same = extents.iter().take_while(|extent| extent.kind == first.kind);
        Ok(Extent { len: same.map(|extent| extent.len).sum::<u64>().clamp(1, len), ..first })
    }

    pub(super) fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.runtime.block_on(self.disk.read(offset, buf)).map_err(io::Error::other)
    }
}
