//! Where a node keeps what: the layout of its directory, and records that are whole or absent.
//!
//! ```text
//! DIR/api.sock            the node's API for this host's administrator
//! DIR/identity/           certificate and key
//! DIR/cache/              chunks, if no other media were named
//! DIR/cache.json          media that were added to the cache group or removed from it while the node ran
//! DIR/images/ID/          images whose origin this node is
//! DIR/attached/ID.json    images that this node serves, and from whom it fetches them
//! DIR/vms/NAME/vm.json    a VM; its seed and its hypervisor's files lie beside it
//! DIR/layers/ID/          a layer of VMs' disks
//! DIR/disks/NAME.sock     a VM's disk over NBD
//! DIR/volumes/NAME.sock   an image, read-only, over NBD
//! DIR/remotes/HASH.json   what opens the remote disk that an image lies on, by the hash of its address
//! DIR/exports/NAME.json   a VM's disk or an image over iSCSI: who may open it, with which secrets
//! ```
//!
//! Crash: a record is written to a file of its own, synced and renamed, so that it is old or new and
//! never torn. Only that of a new layer, which nothing names yet, is written in its place. A directory whose
//! name begins with `.` is unfinished and swept away at the next start.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::Serialize;
use serde::de::DeserializeOwned;

use control::refusal::{Code, Refusal};

pub(crate) use store::durable::sync_dir;
use store::durable::{NewFile, Secrecy, UnsyncedFile};

/// The layout of a node's directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    dir: PathBuf,
}

/// A UNIX socket's path has at most so many bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a socket's path has beyond DIR and a name, at most: the hypervisor's console is the longest.
const SOCKET_REST_BYTES: usize = "/vms/".len() + "/console.sock".len();

/// Directories that are synced at once.
const SYNC_THREADS: usize = 16;

/// A directory must leave room for names of so many bytes at least, or it is of no use.
const NAME_ROOM_BYTES_MIN: usize = 24;

impl Layout {
    /// Makes the directories that are missing.
    pub(crate) fn create(dir: &Path) -> Result<Layout, String> {
        let failed =
            |error: io::Error| format!("cannot use {} as a node's directory: {error}", dir.display());
        fs::create_dir_all(dir).map_err(failed)?;
        let dir = fs::canonicalize(dir).map_err(failed)?;
        let layout = Layout { dir };
        if layout.name_bytes_max() < NAME_ROOM_BYTES_MIN {
            return Err(format!(
                "the node's directory {} has too long a path for the sockets in it: use one of at most {} bytes",
                layout.dir.display(),
                SOCKET_PATH_BYTES_MAX - SOCKET_REST_BYTES - NAME_ROOM_BYTES_MIN
            ));
        }
        for sub in
            ["identity", "images", "attached", "vms", "layers", "disks", "volumes", "exports", "remotes"]
        {
            fs::create_dir_all(layout.dir.join(sub)).map_err(failed)?;
        }
        set_private(&layout.dir).map_err(failed)?;
        Ok(layout)
    }

    /// Whether the sockets that bear `name` can be opened here. To be asked before anything is made.
    pub(crate) fn check_socket_name_len(&self, name: &str) -> Result<(), Refusal> {
        let room = self.name_bytes_max();
        if name.len() <= room {
            return Ok(());
        }
        let message = format!(
            "'{name}' is too long for the sockets in {}: this node takes names of at most {room} bytes",
            self.dir.display()
        );
        Err(Refusal::new(Code::NameTooLong, message)
            .with_hint("use a shorter name, or a node whose directory has a shorter path"))
    }

    /// Longest name that the path leaves room for.
    fn name_bytes_max(&self) -> usize {
        SOCKET_PATH_BYTES_MAX.saturating_sub(SOCKET_REST_BYTES + self.dir.as_os_str().len())
    }

    /// The directory itself.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the records of VMs and layers durable as they are. A daemon that was killed may have replaced one and not
    /// synced that: with a power cut the one before would come back, and name what was removed since.
    pub(crate) fn sync_records(&self) -> io::Result<()> {
        let mut dirs = Vec::new();
        for parent in [self.vms(), self.layers()] {
            for entry in fs::read_dir(&parent)? {
                let path = entry?.path();
                if path.is_dir() {
                    dirs.push(path);
                }
            }
            dirs.push(parent);
        }
        // Side by side, since a disk flushes for many in the time that it needs for one.
        std::thread::scope(|scope| {
            let sync = |dirs: &[PathBuf]| dirs.iter().try_for_each(|dir| sync_dir(dir));
            let parts = dirs.chunks(dirs.len().div_ceil(SYNC_THREADS));
            let threads: Vec<_> = parts.map(|dirs| scope.spawn(move || sync(dirs))).collect();
            threads.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread that syncs ended")))
            })
        })
    }

    /// Keeps other daemons off the directory until dropped.
    pub(crate) fn lock(&self) -> Result<File, String> {
        let path = self.dir.join("lock");
        let failed = |error: io::Error| format!("cannot lock {}: {error}", path.display());
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(format!(
                "another 'virtman compute' runs in {}: stop it first, or use another --dir",
                self.dir.display()
            )),
            Err(error) => Err(failed(error.into())),
        }
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    pub(crate) fn identity(&self) -> PathBuf {
        self.dir.join("identity")
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    pub(crate) fn cache_record(&self) -> PathBuf {
        self.dir.join("cache.json")
    }

    pub(crate) fn attached(&self) -> PathBuf {
        self.dir.join("attached")
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.dir.join("vms")
    }

    pub(crate) fn layers(&self) -> PathBuf {
        self.dir.join("layers")
    }

    pub(crate) fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    pub(crate) fn volumes(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    pub(crate) fn exports(&self) -> PathBuf {
        self.dir.join("exports")
    }

    pub(crate) fn remotes(&self) -> PathBuf {
        self.dir.join("remotes")
    }
}

/// Only the owner may look into the directory: guests' data lie in it.
fn set_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// Writes a record so that it is there whole, or not at all, whatever happens.
pub(crate) fn write_record<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    start_record(path, record)?.sync()?.put_durably()
}

/// Begins to write a record that is still to be put at `path`.
pub(crate) fn start_record<T: Serialize>(path: &Path, record: &T) -> io::Result<UnsyncedFile> {
    NewFile::start(path, &to_json(record)?, Secrecy::Secret)
}

/// Writes a record where there is none. Until the caller has synced it and its directory, a crash may leave it torn:
/// nobody may rely on it before.
pub(crate) fn write_first_record<T: Serialize>(path: &Path, record: &T) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&to_json(record)?)?;
    store::start_sync(&file);
    Ok(file)
}

fn to_json<T: Serialize>(record: &T) -> io::Result<Vec<u8>> {
    let mut json = serde_json::to_vec_pretty(record)?;
    json.push(b'\n');
    Ok(json)
}

/// Reads a record; the error names the file.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| format!("{} is damaged: {error}", path.display()))
}

/// Whether a file is known not to be there: one that cannot be looked at may be.
pub(crate) fn is_absent(path: &Path) -> bool {
    matches!(path.try_exists(), Ok(false))
}

/// The entries of a directory that are finished, in order; unfinished ones are removed.
pub(crate) fn sweep(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut finished = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let unfinished = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        match (unfinished, path.is_dir()) {
            (false, _) => finished.push(path),
            (true, true) => fs::remove_dir_all(&path)?,
            (true, false) => fs::remove_file(&path)?,
        }
    }
    finished.sort();
    Ok(finished)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_too_long_for_sockets_is_refused_by_name() {
        let tmp = tempfile::tempdir().unwrap();
        let long = tmp.path().join("x".repeat(90));
        let error = Layout::create(&long).unwrap_err();
        assert!(error.contains("too long") && error.contains("xxx"), "{error}");
    }

    #[test]
    fn a_name_is_refused_only_if_the_directory_leaves_no_room_for_it() {
        let tmp = tempfile::tempdir().unwrap();
        let layout = Layout::create(&tmp.path().join("node")).unwrap();
        let room = layout.name_bytes_max();
        assert!(layout.check_socket_name_len(&"n".repeat(room)).is_ok());
        let error = layout.check_socket_name_len(&"n".repeat(room + 1)).unwrap_err();
        assert!(error.message.contains(&room.to_string()), "{error}");
        let longest = layout.vms().join("n".repeat(room)).join("console.sock");
        assert_eq!(longest.as_os_str().len(), SOCKET_PATH_BYTES_MAX);
    }

    #[test]
    fn unfinished_entries_are_swept_and_records_come_back() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join(".half")).unwrap();
        fs::write(tmp.path().join(".half/x"), "x").unwrap();
        fs::write(tmp.path().join(".tmp123"), "x").unwrap();
        write_record(&tmp.path().join("b.json"), &7).unwrap();
        assert_eq!(sweep(tmp.path()).unwrap(), [tmp.path().join("b.json")]);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
        assert_eq!(read_record::<u32>(&tmp.path().join("b.json")), Ok(7));
        fs::write(tmp.path().join("b.json"), "{").unwrap();
        let error = read_record::<u32>(&tmp.path().join("b.json")).unwrap_err();
        assert!(error.contains("b.json") && error.contains("damaged"), "{error}");
    }
}
