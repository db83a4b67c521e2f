//! Remote disks that images lie on: logical units of iSCSI targets, and the secrets that open them.
//!
//! A secret is kept in a file of its own beside the images, because what opens an image again knows only where it
//! lies. Retries: a unit that cannot be reached just now is tried until it can, so that guests above it wait and
//! see no error; one that refuses us is an error at once.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::Disk;
use image::OpenRemote;
use iscsi::Credentials;
use iscsi::initiator::{Address, AddressError, ConnectError, Initiator, Options, Secrets};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use super::files;
use control::api::export::ChapSecret;

/// How the address of a remote disk begins.
pub(crate) const SCHEME: &str = "iscsi://";

/// Pause before a unit that cannot be reached is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// The remote disks of a node.
pub(crate) struct RemoteDisks {
    /// Where secrets are kept.
    dir: PathBuf,
    runtime: Handle,
}

/// What opens a remote disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Key {
    /// Where it is.
    pub(crate) location: String,
    /// What we prove to its target.
    pub(crate) chap: Option<ChapSecret>,
    /// What its target proves to us.
    pub(crate) mutual_chap: Option<ChapSecret>,
}

impl RemoteDisks {
    /// Secrets lie in `dir`. To be called within a runtime.
    pub(crate) fn new(dir: PathBuf) -> RemoteDisks {
        RemoteDisks { dir, runtime: Handle::current() }
    }

    /// Opens the disk again later, too.
    pub(crate) fn remember(&self, key: &Key) -> Result<(), String> {
        let file = self.file(&key.location);
        files::write_record(&file, key).map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// Forgets what opens disks that are not used any more.
    pub(crate) fn retain(&self, is_used: impl Fn(&str) -> bool) -> io::Result<()> {
        for file in files::sweep(&self.dir)? {
            match files::read_record::<Key>(&file) {
                Ok(key) if is_used(&key.location) => {}
                Ok(_) => fs::remove_file(&file)?,
                Err(reason) => tracing::error!(reason, "what opens a remote disk cannot be read"),
            }
        }
        Ok(())
    }

    fn file(&self, location: &str) -> PathBuf {
        // An address has characters that no file's name may have.
        self.dir.join(format!("{}.json", &blake3::hash(location.as_bytes()).to_hex()[..32]))
    }
}

impl Key {
    /// Opens the disk. Tried once.
    pub(crate) async fn open(&self) -> Result<Arc<dyn Disk>, OpenError> {
        let address: Address =
            self.location.parse().map_err(|e: AddressError| OpenError::Wrong(e.to_string()))?;
        let credentials = |secret: &Option<ChapSecret>| {
            let made = secret.as_ref().map(|s| Credentials::new(&s.user, s.secret.as_bytes())).transpose();
            made.map_err(|e| OpenError::Wrong(e.to_string()))
        };
        let secrets =
            Secrets { initiator: credentials(&self.chap)?, target: credentials(&self.mutual_chap)? };
        let opened = Initiator::connect(&address, secrets, Options::default()).await;
        Ok(Arc::new(opened.map_err(|error| match error {
            ConnectError::Io(_) | ConnectError::TooSlow | ConnectError::Unready(_) => {
                OpenError::Unreachable(error.to_string())
            }
            other => OpenError::Wrong(other.to_string()),
        })?))
    }
}

/// Why a remote disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// It may be there later.
    #[error("{0}")]
    Unreachable(String),
    /// Somebody has to change something first.
    #[error("{0}")]
    Wrong(String),
}

impl OpenRemote for RemoteDisks {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        let file = self.file(location);
        let key: Key = files::read_record(&file)?;
        self.runtime.block_on(async {
            loop {
                match key.open().await {
                    Ok(disk) => return Ok(disk),
                    Err(OpenError::Wrong(reason)) => return Err(reason),
                    Err(OpenError::Unreachable(reason)) => {
                        tracing::warn!(location, reason, "a remote disk cannot be opened; trying again");
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                }
            }
        })
    }
}

/// The address of a remote disk, if it is one and no file.
pub fn location_of(source: &Path) -> Option<&str> {
    source.to_str().filter(|text| text.starts_with(SCHEME))
}
