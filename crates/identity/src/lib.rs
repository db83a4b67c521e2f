//! Who is who in the cluster, and how that is proven.
//!
//! Volt holds the cluster's certificate authority ([`Authority`]). A node joins once with a [`Token`]
//! and from then on is known by its own certificate ([`Identity`]); every connection beyond
//! a local socket is TLS 1.3 with certificates on both sides ([`tls`]).
//!
//! Invariants:
//! - Trust is in the cluster's CA alone: not in the system's CAs, DNS or addresses.
//! - Both sides of a connection know the [`Principal`] of the other before a byte of either's data is
//!   used. The one exception is a join, where the token stands in for the node's certificate.
//! - Private keys are made where they are used and never leave that host.
//! - Nothing that comes from a peer panics.
//!
//! What an authenticated principal may *do* is decided where it asks (the API, the link), not here.

mod authority;
mod ca;
mod credentials;
mod files;
mod principal;
mod removed;
pub mod tls;
mod token;

use std::io;
use std::path::{Path, PathBuf};

pub use authority::{Authority, requested_key};
pub use ca::{CERTIFICATE_LIFETIME, Ca};
pub use credentials::{Credentials, Identity, Key};
pub use principal::{AdminName, Principal, PrincipalError};
pub use removed::Removed;
pub use token::{Fingerprint, Grant, JoinRefusal, Secret, SecretHash, TOKEN_LIFETIME, Token};

/// An authority or identity could not be made, read or kept.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is one, which is never overwritten.
    #[error("{path:?} exists already and is not overwritten: remove it yourself if you no longer need it")]
    Exists {
        /// What is in the way.
        path: PathBuf,
    },
    /// There is none: `virtman volt init` or a join comes first.
    #[error("{path:?} does not exist: initialise Volt ('virtman volt init') or join this node first")]
    Missing {
        /// What was looked for.
        path: PathBuf,
    },
    /// The file is there and cannot be what it should be.
    #[error("{path:?} {why}: restore it from a backup, or remove it and join again")]
    Broken {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The file system failed.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A certificate request is not acceptable.
    #[error("the certificate request is refused: {0}")]
    Request(String),
    /// A certificate does not belong to its key, its principal or its cluster.
    #[error("refusing a certificate that does not fit: {0}")]
    Mismatch(String),
    /// The cryptographic library failed.
    #[error("cannot {action}: {why}")]
    Crypto {
        /// What was tried.
        action: &'static str,
        /// What the library said.
        why: String,
    },
}

impl IdentityError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    fn broken(path: &Path, why: String) -> Self {
        Self::Broken { path: path.to_owned(), why }
    }

    fn crypto(action: &'static str, error: &rcgen::Error) -> Self {
        Self::Crypto { action, why: error.to_string() }
    }
}
