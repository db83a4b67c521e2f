//! Where the files of an image may lie.
//!
//! An image's header can name other files, and headers come from strangers. Every file that is opened on an
//! image's behalf is first resolved to its canonical path, symbolic links and all, and that must lie in an
//! allowed directory.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::ImportError;

/// Canonical directories that an image's files may lie in.
#[derive(Debug, Clone)]
pub(crate) struct AllowedDirs(Vec<PathBuf>);

impl AllowedDirs {
    /// The given directories, or, if there are none, the one that the (canonical) `image` lies in.
    pub(crate) fn new(dirs: &[PathBuf], image: &Path) -> Result<AllowedDirs, ImportError> {
        if dirs.is_empty() {
            let own = image.parent().unwrap_or(Path::new("/"));
            return Ok(AllowedDirs(vec![own.to_owned()]));
        }
        let canonical = |dir: &PathBuf| dir.canonicalize().map_err(|e| ImportError::unreadable(dir, e));
        dirs.iter().map(canonical).collect::<Result<_, _>>().map(AllowedDirs)
    }

    pub(crate) fn dirs(&self) -> &[PathBuf] {
        &self.0
    }

    /// The canonical path of an image that the caller named.
    pub(crate) fn admit(&self, path: &Path) -> Result<PathBuf, ImportError> {
        let found = path.canonicalize().map_err(|e| ImportError::unreadable(path, e))?;
        if !self.0.iter().any(|dir| found.starts_with(dir)) {
            return Err(ImportError::Outside { path: found, dirs: self.0.clone() });
        }
        let kind = found.metadata().map_err(|e| ImportError::unreadable(&found, e))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImportError::NotAFile(found));
        }
        Ok(found)
    }

    /// The canonical path of the file that `image` refers to as `name`, which is relative to the image.
    pub(crate) fn admit_reference(&self, image: &Path, name: &str) -> Result<PathBuf, ImportError> {
        let path = image.parent().unwrap_or(Path::new("/")).join(name);
        // The directory is judged first: whether a file outside exists is nobody's business.
        let dir = path.parent().and_then(|dir| dir.canonicalize().ok());
        if let Some(dir) = dir.filter(|dir| !self.0.iter().any(|allowed| dir.starts_with(allowed))) {
            return Err(ImportError::Outside {
                path: dir.join(path.file_name().unwrap_or_default()),
                dirs: self.0.clone(),
            });
        }
        match path.canonicalize() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ImportError::BackingMissing { image: image.to_owned(), missing: path })
            }
            _ => self.admit(&path),
        }
    }
}
