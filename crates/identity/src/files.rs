//! The files of an authority or identity: written durably, read within a bound.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use store::durable::{Secrecy, replace};

use super::IdentityError;

/// Largest file that is read as a certificate or key, in bytes: a PEM chain of ours has about 2 KiB.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Makes `dir` with mode 0700 if it does not exist; its parents too.
pub(crate) fn create_private_dir(dir: &Path) -> Result<(), IdentityError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| IdentityError::io("create the directory", dir, e))
}

/// [Replaces](replace) `dir/name` by `text`.
pub(crate) fn write(dir: &Path, name: &str, text: &str, secrecy: Secrecy) -> Result<(), IdentityError> {
    let path = dir.join(name);
    replace(&path, text.as_bytes(), secrecy).map_err(|e| IdentityError::io("write", &path, e))
}

/// Reads a small text file.
pub(crate) fn read(dir: &Path, name: &str) -> Result<String, IdentityError> {
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
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt;

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
    fn an_oversized_file_is_refused_unread() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("ca.pem")).unwrap().set_len(1 << 40).unwrap();
        assert!(matches!(read(dir.path(), "ca.pem"), Err(IdentityError::Broken { .. })));
    }
}
