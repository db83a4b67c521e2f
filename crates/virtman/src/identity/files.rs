//! Small files, secret and public, written so that a crash leaves the old one or the new one, never half.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use store::start_sync;
use tempfile::NamedTempFile;

use super::IdentityError;

/// Largest file that is read as a certificate or key, in bytes: a PEM chain of ours has about 2 KiB.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Who may read a file besides its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// 0600.
    Secret,
    /// 0644.
    Public,
}

/// Makes `dir` with mode 0700 if it does not exist; its parents too.
pub(super) fn create_private_dir(dir: &Path) -> Result<(), IdentityError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| IdentityError::io("create the directory", dir, e))
}

/// Replaces a file, durably and in one step.
pub(crate) fn replace(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<()> {
    NewFile::write(path, bytes, secrecy)?.put_durably()
}

/// A file that is durable, but for its name: it is to replace what has that. Until then its own name begins with
/// `.new-`. Dropping it removes it.
pub(crate) struct NewFile {
    file: NamedTempFile,
    path: PathBuf,
}

/// The same before it is durable.
pub(crate) struct UnsyncedFile(NewFile);

impl UnsyncedFile {
    /// Waits until it is durable.
    pub(crate) fn sync(self) -> io::Result<NewFile> {
        self.0.file.as_file().sync_all()?;
        Ok(self.0)
    }
}

impl NewFile {
    /// Writes what is to be at `path`.
    pub(crate) fn write(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<NewFile> {
        NewFile::start(path, bytes, secrecy)?.sync()
    }

    /// The same without waiting until it is durable. It has its final mode before it has a byte of its content.
    pub(crate) fn start(path: &Path, bytes: &[u8], secrecy: Secrecy) -> io::Result<UnsyncedFile> {
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
    pub(crate) fn put(self) -> io::Result<()> {
        self.file.persist(&self.path)?;
        Ok(())
    }

    /// Puts it where it is to be, durably.
    pub(crate) fn put_durably(self) -> io::Result<()> {
        let dir = self.path.parent().map(Path::to_owned);
        self.put()?;
        dir.map_or(Ok(()), |dir| sync_dir(&dir))
    }
}

/// [Replaces](replace) `dir/name` by `text`.
pub(super) fn write(dir: &Path, name: &str, text: &str, secrecy: Secrecy) -> Result<(), IdentityError> {
    let path = dir.join(name);
    replace(&path, text.as_bytes(), secrecy).map_err(|e| IdentityError::io("write", &path, e))
}

/// Makes renames inside `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads a small text file.
pub(super) fn read(dir: &Path, name: &str) -> Result<String, IdentityError> {
    let path = dir.join(name);
    let wrong = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing { path: path.clone() },
        _ => IdentityError::io("read", &path, e),
    };
    let bytes = fs::metadata(&path).map_err(wrong)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(IdentityError::broken(&path, format!("has {bytes} bytes, more than {FILE_BYTES_MAX}")));
    }
    fs::read_to_string(&path).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_file_is_readable_by_its_owner_alone_even_when_it_replaces_an_open_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("key.pem"), "old").unwrap();
        write(dir.path(), "key.pem", "new", Secrecy::Secret).unwrap();
        let path = dir.path().join("key.pem");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(dir.path(), "key.pem").unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

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

    #[test]
    fn an_oversized_file_is_refused_unread() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("ca.pem")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(read(dir.path(), "ca.pem"), Err(IdentityError::Broken { .. })));
    }
}
