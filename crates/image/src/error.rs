//! Why an image was not imported or derived, in words for the person who asked for it.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use block::ImageId;
use block::limits::DISK_BYTES_MAX;

use crate::Format;

/// Why an image was not imported or derived. Nothing is left behind, whichever it was.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The operating system does not let us read the file.
    #[error("cannot read '{}': {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// The path is a directory, a socket, or something else that is neither file nor block device.
    #[error("'{}' is neither a regular file nor a block device", .0.display())]
    NotAFile(PathBuf),
    /// A file, or one that it refers to, lies where the caller does not allow it.
    #[error(
        "'{}' lies outside the allowed directories ({}): move it into one of them, or allow its directory",
        path.display(),
        list(dirs)
    )]
    Outside {
        /// The file, with all symbolic links resolved.
        path: PathBuf,
        /// The directories that are allowed.
        dirs: Vec<PathBuf>,
    },
    /// A file that the image builds upon is not there.
    #[error("'{}' builds upon '{}', which does not exist: put it there, or `qemu-img rebase` the image", image.display(), missing.display())]
    BackingMissing {
        /// The image that refers to it.
        image: PathBuf,
        /// The file that is missing.
        missing: PathBuf,
    },
    /// The images that build upon each other go in a circle, or are too many.
    #[error("'{}' cannot be followed to its end: {reason}; flatten it with `qemu-img convert`", path.display())]
    Chain {
        /// The image at which following ended.
        path: PathBuf,
        /// Why it ended.
        reason: String,
    },
    /// The file ends before its own header says that it does.
    #[error("'{}' is truncated: {reason}; copy it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// What lies beyond its end.
        reason: String,
    },
    /// The file does not say which format it has, or says one that cannot be read here.
    #[error("'{}' {what}: {remedy}", path.display())]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// The file has another format than the one that was asked for.
    #[error("'{}' was said to be {told}, but its header says otherwise: leave the format out, or correct it", path.display())]
    WrongFormat {
        /// The file.
        path: PathBuf,
        /// The format that was asked for.
        told: Format,
    },
    /// The format is known, but the file uses a feature of it that cannot be read here.
    #[error("'{}' uses {what}, which cannot be read here: {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The feature.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// The file breaks its own format.
    #[error("'{}' is damaged: {reason}; check it with `qemu-img check`", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The disk has no bytes.
    #[error("'{}' holds an empty disk of 0 bytes: nothing can boot from it", .0.display())]
    Empty(PathBuf),
    /// The disk is larger than any that is supported.
    #[error("'{}' holds a disk of {size_bytes} bytes; at most {DISK_BYTES_MAX} are supported", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Size of the disk in bytes.
        size_bytes: u64,
    },
    /// The manifest of the image that another is to be derived from cannot be read.
    #[error("cannot read the manifest of image {id}: {reason}; try again when its chunks can be had")]
    Base {
        /// The base.
        id: ImageId,
        /// What its source said.
        reason: String,
    },
    /// The file was written to during the import.
    #[error("'{}' changed while it was read: stop what writes to it, and add it again", .0.display())]
    Changed(PathBuf),
    /// The caller asked to stop.
    #[error("the work on the image was cancelled")]
    Cancelled,
    /// There is no room for the image's directory.
    #[error("no space left in '{}': free some, or keep images elsewhere", .0.display())]
    NoSpace(PathBuf),
    /// The image's directory cannot be written.
    #[error("cannot write '{}': {reason}", path.display())]
    Unwritable {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        reason: String,
    },
}

fn list(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// What `qemu-img` turns everything into that can be read here.
pub(crate) const CONVERT: &str = "convert it with `qemu-img convert -O qcow2 OLD NEW`";

impl ImportError {
    pub(crate) fn unreadable(path: &Path, reason: impl Display) -> ImportError {
        ImportError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn truncated(path: &Path, reason: impl Display) -> ImportError {
        ImportError::Truncated { path: path.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn damaged(path: &Path, reason: impl Display) -> ImportError {
        ImportError::Damaged { path: path.to_owned(), reason: reason.to_string() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Display) -> ImportError {
        let remedy = CONVERT.to_owned();
        ImportError::Unsupported { path: path.to_owned(), what: what.to_string(), remedy }
    }

    /// An error from reading an image's content, told apart by its kind.
    pub(crate) fn reading(path: &Path, error: &io::Error) -> ImportError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => ImportError::truncated(path, error),
            io::ErrorKind::InvalidData => ImportError::damaged(path, error),
            _ => ImportError::unreadable(path, error),
        }
    }

    /// An error from writing the image's directory.
    pub(crate) fn writing(path: &Path, error: &io::Error) -> ImportError {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                ImportError::NoSpace(path.to_owned())
            }
            _ => ImportError::Unwritable { path: path.to_owned(), reason: error.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_told_apart_from_a_broken_one() {
        let writing =
            |errno| ImportError::writing(Path::new("/images"), &io::Error::from_raw_os_error(errno));
        let (no_space, over_quota, broken) = (28, 122, 5);
        assert!(matches!(writing(no_space), ImportError::NoSpace(_)));
        assert!(matches!(writing(over_quota), ImportError::NoSpace(_)));
        assert!(matches!(writing(broken), ImportError::Unwritable { .. }));
        assert!(writing(no_space).to_string().contains("'/images'"));
    }
}
