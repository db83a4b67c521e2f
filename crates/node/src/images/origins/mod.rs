//! Where images lie that this node is an origin of, other than files: the scheme of a location picks the protocol.
//!
//! A secret is kept in a file of its own beside the images, because what opens an image again knows only where it
//! lies. Retries: a disk that cannot be reached just now is tried until it can, so that guests above it wait and
//! see no error; one that refuses us is an error at once.

mod iscsi;
mod nbd;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use block::{BoxFuture, Disk};
use image::OpenRemote;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;

use crate::state;
use control::api::export::ChapSecret;

/// Pause before a disk that cannot be reached is tried again.
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
        state::write_record(&file, key).map_err(|e| format!("cannot write {}: {e}", file.display()))
    }

    /// Forgets what opens disks that are not used any more.
    pub(crate) fn retain(&self, is_used: impl Fn(&str) -> bool) -> io::Result<()> {
        for file in state::sweep(&self.dir)? {
            match state::read_record::<Key>(&file) {
                Ok(key) if is_used(&key.location) => {}
                Ok(_) => fs::remove_file(&file)?,
                Err(reason) => tracing::error!(reason, "remote_record_damaged"),
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
        let scheme = scheme_of(&self.location);
        let protocol = scheme.and_then(protocol_of).ok_or_else(|| {
            OpenError::Unusable(format!("'{}' is not the location of a remote disk", self.location))
        })?;
        if self.has_secrets() && protocol.secrets == Secrets::None {
            return Err(OpenError::Unusable(format!(
                "{} takes no CHAP secrets: leave --chap-file and a user's name out",
                self.location
            )));
        }
        (protocol.open)(self).await
    }

    fn has_secrets(&self) -> bool {
        self.chap.is_some() || self.mutual_chap.is_some()
    }
}

/// A disk that is being opened.
type Opening<'a> = BoxFuture<'a, Result<Arc<dyn Disk>, OpenError>>;

/// A protocol over which a remote disk can be opened.
struct Protocol {
    /// How locations begin, without `://`.
    schemes: &'static [&'static str],
    secrets: Secrets,
    open: fn(&Key) -> Opening<'_>,
}

/// What opens a disk beside its location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Secrets {
    None,
    Chap,
}

/// All that there are. A location without one of these schemes is the path of a file.
const PROTOCOLS: [Protocol; 2] = [iscsi::PROTOCOL, nbd::PROTOCOL];

fn protocol_of(scheme: &str) -> Option<&'static Protocol> {
    PROTOCOLS.iter().find(|protocol| protocol.schemes.contains(&scheme))
}

fn scheme_of(location: &str) -> Option<&str> {
    location.split_once("://").map(|(scheme, _)| scheme)
}

/// Why a remote disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// It may be there later.
    #[error("{0}")]
    Unreachable(String),
    /// Somebody has to change something first.
    #[error("{0}")]
    Unusable(String),
}

impl OpenRemote for RemoteDisks {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        let file = self.file(location);
        let key: Key = state::read_record(&file)?;
        self.runtime.block_on(async {
            loop {
                match key.open().await {
                    Ok(disk) => return Ok(disk),
                    Err(OpenError::Unusable(reason)) => return Err(reason),
                    Err(OpenError::Unreachable(reason)) => {
                        tracing::warn!(
                            location,
                            reason,
                            "remote_disk_away: it cannot be opened; trying again"
                        );
                        tokio::time::sleep(RETRY_PAUSE).await;
                    }
                }
            }
        })
    }
}

/// The location of a remote disk; `None` if it is a file's path.
pub fn location_of(source: &Path) -> Option<&str> {
    source.to_str().filter(|text| scheme_of(text).and_then(protocol_of).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(location: &str) -> Key {
        Key { location: location.to_owned(), chap: None, mutual_chap: None }
    }

    #[test]
    fn the_scheme_of_a_location_says_whether_it_is_a_remote_disk() {
        for remote in
            ["iscsi://host/iqn.2026-11.x:y/0", "nbd://host/", "nbds://host/a", "nbd+unix:///a?socket=/b"]
        {
            assert_eq!(location_of(Path::new(remote)), Some(remote));
        }
        for file in ["/srv/a.qcow2", "nbd", "ftp://host/a", "/srv/iscsi://x"] {
            assert_eq!(location_of(Path::new(file)), None, "{file}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_told_apart_from_what_can_later() {
        let absent = key("nbd+unix:///a?socket=/nonexistent/socket").open().await;
        assert!(matches!(absent, Err(OpenError::Unreachable(_))));
        for bad in
            ["nbd://", "nbd://host/a?tls-certificates=x", "iscsi://host", "ftp://host/a", "nbds://host/a"]
        {
            assert!(matches!(key(bad).open().await, Err(OpenError::Unusable(_))), "{bad}");
        }
        let chap = Some(ChapSecret { user: "u".to_owned(), secret: "s".to_owned() });
        let secret = Key { chap, ..key("nbd+unix:///a?socket=/nonexistent/socket") };
        let error = secret.open().await.err().expect("NBD has no CHAP").to_string();
        assert!(error.contains("CHAP"), "{error}");
    }
}
