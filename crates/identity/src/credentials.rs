//! What one member of the cluster is known by: its key, its certificate, and the CA that it trusts.
//!
//! In a directory of mode 0700 stand `key.pem` (0600), `ca.pem` and `cert.pem`.
//!
//! Crash: the certificate is written last, so a directory without it is one that did not finish joining.
//! A renewal keeps the key and replaces `cert.pem` alone, in one step: key and certificate can never
//! disagree. A key that may be known to others is replaced by removing the node and
//! joining again under another name.
//!
//! [`Credentials`] is the identity of a running daemon: connections made after a
//! [`replace`](Credentials::replace) use the new certificate, older ones go on.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::ca::{CERTIFICATE_LIFETIME, Ca};
use super::files;
use super::{IdentityError, Principal, principal, tls};
use store::durable::Secrecy;

const KEY_FILE: &str = "key.pem";
const CERTIFICATE_FILE: &str = "cert.pem";
const CA_FILE: &str = "ca.pem";

/// A certificate is renewed when less than this part of its life is left: four months for a year, so a
/// node may be away for a quarter and still come back by itself.
const RENEWAL_MARGIN: Duration = Duration::from_secs(CERTIFICATE_LIFETIME.as_secs() / 3);

/// A private key (ECDSA P-256), which never leaves its host.
pub struct Key(KeyPair);

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// [`IdentityError::Crypto`].
    pub fn generate() -> Result<Self, IdentityError> {
        KeyPair::generate().map(Self).map_err(|e| IdentityError::crypto("make a key", &e))
    }

    fn from_pem(pem: &str) -> Result<Self, rcgen::Error> {
        KeyPair::from_pem(pem).map(Self)
    }

    /// A certificate request (PKCS #10, PEM) that proves possession of this key and asks for no name:
    /// names are the authority's business.
    ///
    /// # Errors
    /// [`IdentityError::Crypto`].
    pub fn csr(&self) -> Result<String, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .serialize_request(&self.0)
            .and_then(|csr| csr.pem())
            .map_err(|e| IdentityError::crypto("sign a certificate request", &e))
    }

    pub(crate) fn pair(&self) -> &KeyPair {
        &self.0
    }

    fn duplicate(&self) -> Self {
        let pair = KeyPair::from_pem(&self.0.serialize_pem());
        Self(pair.expect("a key that was serialized a moment ago parses"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(hidden)")
    }
}

/// One member's key and certificate, which belong together and come from `ca`.
#[derive(Debug)]
pub struct Identity {
    principal: Principal,
    certificate_pem: String,
    key: Key,
    ca: Ca,
    certified: Arc<CertifiedKey>,
    expires: SystemTime,
}

impl Identity {
    /// Joins the parts, of which the certificate may have come from elsewhere.
    ///
    /// # Errors
    /// What does not fit together.
    pub fn new(certificate_pem: &str, key: Key, ca: Ca) -> Result<Self, String> {
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|e| format!("the certificate is not PEM: {e}"))?;
        let principal = Principal::of_certificate(&der).map_err(|e| e.to_string())?;
        if principal::public_key(&der).map_err(|e| e.to_string())? != key.0.der_bytes() {
            return Err("the certificate is for another key".to_owned());
        }
        let (begins, expires) = principal::validity(&der).map_err(|e| e.to_string())?;
        // Whether it is of this CA does not depend on today's date, about which peers will complain.
        let verifier =
            tls::chain_verifier(&ca).map_err(|e| format!("the CA certificate is unusable: {e}"))?;
        verifier
            .verify_client_cert(&der, &[], UnixTime::since_unix_epoch(Duration::from_secs(begins)))
            .map_err(|e| format!("the certificate is not of this CA: {e}"))?;

        let private = PrivateKeyDer::from_pem_slice(key.0.serialize_pem().as_bytes())
            .map_err(|e| format!("the key is not PEM: {e}"))?;
        let signing = tls::provider()
            .key_provider
            .load_private_key(private)
            .map_err(|e| format!("the key is unusable: {e}"))?;
        // The CA goes along: a joining node knows only its fingerprint.
        let certified = Arc::new(CertifiedKey::new(vec![der, ca.der().clone()], signing));
        let expires = UNIX_EPOCH + Duration::from_secs(expires);
        Ok(Self { principal, certificate_pem: certificate_pem.to_owned(), key, ca, certified, expires })
    }

    /// Reads the identity that [`save`](Self::save) wrote to `dir`.
    ///
    /// # Errors
    /// [`IdentityError::Missing`] if this host did not join; [`IdentityError::Broken`];
    /// [`IdentityError::Io`].
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let certificate = files::read(dir, CERTIFICATE_FILE)?;
        let key = Key::from_pem(&files::read(dir, KEY_FILE)?)
            .map_err(|e| IdentityError::broken(&dir.join(KEY_FILE), format!("is not a private key: {e}")))?;
        let ca = Ca::from_pem(&files::read(dir, CA_FILE)?)
            .map_err(|e| IdentityError::broken(&dir.join(CA_FILE), e))?;
        Self::new(&certificate, key, ca).map_err(|e| IdentityError::broken(dir, e))
    }

    /// Writes the identity to `dir`, durably.
    ///
    /// # Errors
    /// [`IdentityError::Exists`] if `dir` has the identity of another principal, cluster or key;
    /// [`IdentityError::Io`].
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        files::create_private_dir(dir)?;
        match Self::load(dir) {
            Ok(old) if old.same_member(self) && old.key.0.der_bytes() == self.key.0.der_bytes() => {}
            Ok(_) => return Err(IdentityError::Exists { path: dir.to_owned() }),
            Err(IdentityError::Missing { .. }) => {
                files::write(dir, KEY_FILE, &self.key.0.serialize_pem(), Secrecy::Secret)?;
                files::write(dir, CA_FILE, self.ca.pem(), Secrecy::Public)?;
            }
            Err(e) => return Err(e),
        }
        files::write(dir, CERTIFICATE_FILE, &self.certificate_pem, Secrecy::Public)
    }

    /// Who this is.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The CA that issued the certificate, and the only one that is trusted.
    pub fn ca(&self) -> &Ca {
        &self.ca
    }

    /// Whether it is time to ask Volt for a new certificate.
    pub fn needs_renewal(&self, now: SystemTime) -> bool {
        now + RENEWAL_MARGIN >= self.expires
    }

    /// The request with which this identity is renewed.
    ///
    /// # Errors
    /// [`IdentityError::Crypto`].
    pub fn csr(&self) -> Result<String, IdentityError> {
        self.key.csr()
    }

    /// The same member with a new certificate.
    ///
    /// # Errors
    /// [`IdentityError::Mismatch`] if the certificate is for another principal, key or cluster.
    pub fn renewed(&self, certificate_pem: &str) -> Result<Self, IdentityError> {
        let renewed = Self::new(certificate_pem, self.key.duplicate(), self.ca.clone())
            .map_err(IdentityError::Mismatch)?;
        if renewed.same_member(self) {
            Ok(renewed)
        } else {
            Err(IdentityError::Mismatch(format!(
                "the certificate is for {}, not for {}",
                renewed.principal, self.principal
            )))
        }
    }

    fn same_member(&self, other: &Self) -> bool {
        self.principal == other.principal && self.ca.der() == other.ca.der()
    }
}

/// The identity of a running daemon, shared by all that listens and dials.
#[derive(Debug)]
pub struct Credentials {
    current: RwLock<Arc<Identity>>,
}

impl Credentials {
    /// Starts with `identity`.
    pub fn new(identity: Identity) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(Arc::new(identity)) })
    }

    /// The identity as it is now.
    pub fn current(&self) -> Arc<Identity> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses `identity` from now on.
    ///
    /// # Errors
    /// [`IdentityError::Mismatch`] if it is that of another member: what verifies peers was built for
    /// this one.
    pub fn replace(&self, identity: Identity) -> Result<(), IdentityError> {
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if !current.same_member(&identity) {
            return Err(IdentityError::Mismatch(format!(
                "the new identity is {} of another cluster or name than {}",
                identity.principal, current.principal
            )));
        }
        *current = Arc::new(identity);
        Ok(())
    }
}

impl ResolvesServerCert for Credentials {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }
}

impl ResolvesClientCert for Credentials {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::Authority;
    use super::*;

    fn authority(dir: &Path) -> Authority {
        Authority::create(&dir.join("ca"), SystemTime::now()).unwrap()
    }

    fn node(name: &str) -> Principal {
        Principal::Node(name.parse().unwrap())
    }

    #[test]
    fn an_identity_survives_its_directory_and_its_key_is_readable_by_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let identity = authority(dir.path()).issue(&node("a"), SystemTime::now()).unwrap();
        let home = dir.path().join("node");
        assert!(matches!(Identity::load(&home), Err(IdentityError::Missing { .. })));
        identity.save(&home).unwrap();
        let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&home), 0o700);
        assert_eq!(mode(&home.join("key.pem")), 0o600);
        let loaded = Identity::load(&home).unwrap();
        assert_eq!(loaded.principal(), &node("a"));
        assert_eq!(loaded.ca(), identity.ca());
    }

    #[test]
    fn the_identity_of_another_member_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path());
        let home = dir.path().join("node");
        authority.issue(&node("a"), SystemTime::now()).unwrap().save(&home).unwrap();
        let other = authority.issue(&node("b"), SystemTime::now()).unwrap();
        assert!(matches!(other.save(&home), Err(IdentityError::Exists { .. })));
        assert_eq!(Identity::load(&home).unwrap().principal(), &node("a"));
    }

    #[test]
    fn files_that_do_not_belong_together_do_not_load() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path());
        let foreign = Authority::create(&dir.path().join("foreign"), SystemTime::now()).unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        authority.issue(&node("a"), SystemTime::now()).unwrap().save(&a).unwrap();
        foreign.issue(&node("a"), SystemTime::now()).unwrap().save(&b).unwrap();
        for file in [KEY_FILE, CERTIFICATE_FILE, CA_FILE] {
            let mixed = dir.path().join(format!("mixed-{file}"));
            fs::create_dir(&mixed).unwrap();
            for name in [KEY_FILE, CERTIFICATE_FILE, CA_FILE] {
                let from = if name == file { &b } else { &a };
                fs::copy(from.join(name), mixed.join(name)).unwrap();
            }
            assert!(matches!(Identity::load(&mixed), Err(IdentityError::Broken { .. })), "{file} exchanged");
        }
    }

    #[test]
    fn a_certificate_is_renewed_in_its_last_third_and_keeps_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path());
        let now = SystemTime::now();
        let identity = authority.issue(&node("a"), now).unwrap();
        let home = dir.path().join("node");
        identity.save(&home).unwrap();
        let later = now + CERTIFICATE_LIFETIME * 3 / 4;
        assert!(!identity.needs_renewal(now + CERTIFICATE_LIFETIME / 2));
        assert!(identity.needs_renewal(later));

        let pem = authority.sign_csr(&identity.csr().unwrap(), &node("a"), later).unwrap();
        let renewed = identity.renewed(&pem).unwrap();
        assert!(!renewed.needs_renewal(later));
        renewed.save(&home).unwrap();
        assert_eq!(Identity::load(&home).unwrap().expires, renewed.expires);

        let credentials = Credentials::new(identity);
        credentials.replace(renewed).unwrap();
        assert!(!credentials.current().needs_renewal(later));
        let stranger = authority.issue(&node("b"), now).unwrap();
        assert!(matches!(credentials.replace(stranger), Err(IdentityError::Mismatch(_))));
    }

    #[test]
    fn a_renewal_for_another_principal_or_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let authority = authority(dir.path());
        let now = SystemTime::now();
        let identity = authority.issue(&node("a"), now).unwrap();
        let other_name = authority.sign_csr(&identity.csr().unwrap(), &node("b"), now).unwrap();
        assert!(matches!(identity.renewed(&other_name), Err(IdentityError::Mismatch(_))));
        let other_key =
            authority.sign_csr(&Key::generate().unwrap().csr().unwrap(), &node("a"), now).unwrap();
        assert!(matches!(identity.renewed(&other_key), Err(IdentityError::Mismatch(_))));
    }
}
