//! `virtman volt init`: a new cluster, with its authority, Volt's identity and an administrator's.
//!
//! Repeating it changes nothing but what is missing or was asked for anew: the authority of a cluster is
//! never replaced, because every node trusts it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use control::VOLT_ADDRESS_FILE;
use identity::{AdminName, Authority, Identity, IdentityError, Principal, Token};
use store::durable::{Secrecy, replace};

/// Where the authority lies in Volt's directory.
pub fn authority_dir(dir: &Path) -> PathBuf {
    dir.join("authority")
}

/// Where Volt's own identity lies in its directory.
pub fn identity_dir(dir: &Path) -> PathBuf {
    dir.join("identity")
}

/// What `init` made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initialized {
    /// A new cluster.
    New,
    /// There was one; its address and what was missing were renewed.
    Again,
}

/// Creates a cluster whose state lies in `dir`, with an administrator's credentials in `admin_dir`.
pub fn init(dir: &Path, admin_dir: &Path, admin: &AdminName, address: &str) -> Result<Initialized, String> {
    let now = SystemTime::now();
    let describe = |e: IdentityError| e.to_string();
    let (authority, initialized) = match Authority::create(&authority_dir(dir), now) {
        Ok(authority) => (authority, Initialized::New),
        Err(IdentityError::Exists { .. }) => {
            (Authority::open(&authority_dir(dir)).map_err(describe)?, Initialized::Again)
        }
        Err(error) => return Err(describe(error)),
    };
    // A token is the strictest reader of addresses; better here than when the first node joins.
    Token::new(address, authority.ca().fingerprint()).map_err(|e| format!("--address {address}: {e}"))?;
    for (place, principal) in
        [(identity_dir(dir), Principal::Volt), (admin_dir.to_owned(), Principal::Admin(admin.clone()))]
    {
        match Identity::load(&place) {
            Ok(identity) if *identity.principal() == principal && !identity.needs_renewal(now) => {}
            _ => authority.issue(&principal, now).and_then(|new| new.save(&place)).map_err(describe)?,
        }
    }
    for place in [dir, admin_dir] {
        let file = place.join(VOLT_ADDRESS_FILE);
        replace(&file, format!("{address}\n").as_bytes(), Secrecy::Public)
            .map_err(|e| format!("cannot write {}: {e}", file.display()))?;
    }
    Ok(initialized)
}

/// Where nodes reach Volt.
pub fn read_address(dir: &Path) -> Result<String, String> {
    let file = dir.join(VOLT_ADDRESS_FILE);
    let text = fs::read_to_string(&file)
        .map_err(|e| format!("cannot read {}: {e}; run 'virtman volt init' first", file.display()))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initializing_again_keeps_the_authority_and_what_it_issued() {
        let tmp = tempfile::tempdir().unwrap();
        let (dir, admin_dir) = (tmp.path().join("volt"), tmp.path().join("admin"));
        let admin: AdminName = "root".parse().unwrap();
        let run = |address| init(&dir, &admin_dir, &admin, address);
        assert_eq!(run("127.0.0.1:1"), Ok(Initialized::New));
        let before = Identity::load(&admin_dir).unwrap().ca().fingerprint();
        let certificate = fs::read(admin_dir.join("cert.pem")).unwrap();
        assert_eq!(run("volt.example:7410"), Ok(Initialized::Again));
        assert_eq!(Identity::load(&admin_dir).unwrap().ca().fingerprint(), before);
        assert_eq!(fs::read(admin_dir.join("cert.pem")).unwrap(), certificate);
        assert_eq!(read_address(&dir), Ok("volt.example:7410".to_owned()));
        let error = run("no port").unwrap_err();
        assert!(error.contains("no port"), "{error}");
    }
}
