//! Small files written so that a crash leaves the old one or the new one, never half.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::media::start_sync;

/// Who may read a file besides its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secrecy {
    /// 0600.
    Secret,
    /// 0644.
    Public,
}

/// Replaces a file, durably and in one step.
pub fn replace(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<()> {
    NewFile::write(path, bytes, secrecy)?.put_durably()
}

/// A file that is durable, but for its name: it is to replace what has that. Until then its own name begins with
/// `.new-`. Dropping it removes it.
pub struct NewFile {
    file: NamedTempFile,
    path: PathBuf,
}

/// The same before it is durable.
pub struct UnsyncedFile(NewFile);

impl UnsyncedFile {
    /// Waits until it is durable.
    pub fn sync(self) -> io::Result<NewFile> {
        self.0.file.as_file().sync_all()?;
        Ok(self.0)
    }
}

impl NewFile {
    /// Writes what is to be at `path`.
    pub fn write(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<NewFile> {
        NewFile::start(path, bytes, secrecy)?.sync()
    }

    /// The same without waiting until it is durable. It has its final mode before it has a byte of its content.
    pub fn start(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<UnsyncedFile> {
        let dir = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(dir)?;
        let mode = match secrecy {
            Secrecy::Secret => 0o600,
            Secrecy::Public => 0o644,
        };
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        start_sync(file.as_file());
        Ok(UnsyncedFile(NewFile { file, path: path.to_owned() }))
    }

    /// Puts it where it is to be, in one step. That is durable once the caller has synced the directory.
    pub fn put(self) -> io::Result<()> {
        self.file.persist(&self.path)?;
        Ok(())
    }

    /// Puts it where it is to be, durably.
    pub fn put_durably(self) -> io::Result<()> {
        let dir = self.path.parent().map(Path::to_owned);
        self.put()?;
        dir.map_or(Ok(()), |dir| sync_dir(&dir))
    }
}

/// Makes renames inside `dir` durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_new_file_is_the_old_one_until_it_is_put_and_leaves_nothing_if_it_never_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        fs::write(&path, "old").unwrap();
        let entries = || fs::read_dir(dir.path()).unwrap().count();
        let new = |text: &str| NewFile::start(&path, text.as_bytes(), Secrecy::Public).unwrap();
        let (given_up, never_put, put) = (new("1"), new("2").sync().unwrap(), new("3").sync().unwrap());
        assert_eq!((fs::read(&path).unwrap(), entries()), (b"old".to_vec(), 4));
        drop((given_up, never_put));
        assert_eq!(entries(), 2);
        put.put().unwrap();
        assert_eq!((fs::read(&path).unwrap(), entries()), (b"3".to_vec(), 1));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }
}
