//! A file that gets its name when it is complete.
//!
//! Crash: until then it has none and goes with the process that writes it, however that ends, where the file system
//! knows such files (`O_TMPFILE` of open(2)). Elsewhere it has a name that begins with `.virtman-part-`, which only a
//! killed process leaves behind.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::NamedTempFile;

/// As any new file: it is the process's mask that takes rights away.
const MODE: u32 = 0o666;

pub(crate) enum Unfinished {
    Nameless(File),
    Named(NamedTempFile),
}

impl Unfinished {
    /// An empty file in `dir`.
    pub(crate) fn create_in(dir: &Path) -> io::Result<Unfinished> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(dir, flags, Mode::from_raw_mode(MODE)) {
            Ok(file) => Ok(Unfinished::Nameless(file.into())),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Unfinished::create_named_in(dir),
            Err(error) => Err(error.into()),
        }
    }

    fn create_named_in(dir: &Path) -> io::Result<Unfinished> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".virtman-part-").permissions(Permissions::from_mode(MODE));
        Ok(Unfinished::Named(builder.tempfile_in(dir)?))
    }

    /// Where this process can open it once more.
    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Unfinished::Nameless(file) => PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
            Unfinished::Named(file) => file.path().to_owned(),
        }
    }

    /// Makes it durable and gives it its name, unless another file has that by now. The directory is the caller's to
    /// sync.
    pub(crate) fn publish(self, path: &Path) -> io::Result<File> {
        let place = self.path();
        match self {
            Unfinished::Nameless(file) => {
                file.sync_all()?;
                rustix::fs::linkat(CWD, &place, CWD, path, AtFlags::SYMLINK_FOLLOW)?;
                Ok(file)
            }
            Unfinished::Named(file) => {
                file.as_file().sync_all()?;
                file.persist_noclobber(path).map_err(|refused| refused.error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn it_has_its_name_when_it_is_complete_and_never_another_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let entries = || fs::read_dir(dir.path()).unwrap().count();
        for create in [Unfinished::create_in, Unfinished::create_named_in] {
            let (unfinished, late) = (create(dir.path()).unwrap(), create(dir.path()).unwrap());
            let hidden =
                [&unfinished, &late].iter().filter(|file| matches!(file, Unfinished::Named(_))).count();
            assert_eq!(entries(), hidden);
            fs::write(unfinished.path(), "complete").unwrap();
            let len = unfinished.publish(&path).unwrap().metadata().unwrap().len();
            assert_eq!((fs::read(&path).unwrap(), len), (b"complete".to_vec(), 8));
            assert_eq!(late.publish(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!((fs::read(&path).unwrap(), entries()), (b"complete".to_vec(), 1));
            fs::remove_file(&path).unwrap();
        }
        drop(Unfinished::create_in(dir.path()).unwrap());
        assert_eq!(entries(), 0);
        assert!(Unfinished::create_in(&path).is_err());
    }
}
