//! The certificate authority of the cluster, which Volt holds.
//!
//! Invariants:
//! - An authority is created once and never overwritten: with it go all certificates that it issued.
//! - The private keys of nodes never come here; of a request only the public key is used. Subject,
//!   names, purposes and validity are always ours.
//! - An issued certificate cannot issue others.
//!
//! Crash: the directory of an authority appears complete, by one rename, or not at all.
//!
//! All functions block on small files; call them at startup or off the async threads.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};

use super::ca::{CERTIFICATE_LIFETIME, Ca};
use super::credentials::{Identity, Key};
use super::files;
use super::{IdentityError, Principal};
use store::durable::{Secrecy, sync_dir};

/// How long the CA is valid: its renewal means that every node joins again.
pub(crate) const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);

/// How far the validity is backdated: clocks of fresh hosts may lag Volt's by a time zone's mistake.
const BACKDATED: Duration = Duration::from_secs(24 * 3600);

/// Longest certificate request in bytes; one for a P-256 key has less than 1 KiB.
pub(crate) const REQUEST_BYTES_MAX: usize = 8 * 1024;

/// Bytes of an uncompressed point on P-256, the only kind of key that is certified.
const PUBLIC_KEY_BYTES: usize = 65;

const KEY_FILE: &str = "ca-key.pem";
const CERTIFICATE_FILE: &str = "ca.pem";

/// The certificate authority of one cluster.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca: Ca,
}

impl Authority {
    /// Makes the authority of a new cluster in the directory `dir`, which it has for itself.
    ///
    /// # Errors
    /// [`IdentityError::Exists`] if `dir` exists and is not empty; [`IdentityError::Io`].
    pub fn create(dir: &Path, now: SystemTime) -> Result<Self, IdentityError> {
        if fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(IdentityError::Exists { path: dir.to_owned() });
        }
        let parent = match dir.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        files::create_private_dir(parent)?;
        let fresh = tempfile::Builder::new()
            .prefix(".ca-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent)
            .map_err(|e| IdentityError::io("create a directory in", parent, e))?;

        let key = KeyPair::generate().map_err(|e| IdentityError::crypto("make the key of the CA", &e))?;
        let certificate = authority_params(now)
            .self_signed(&key)
            .map_err(|e| IdentityError::crypto("sign the certificate of the CA", &e))?;
        files::write(fresh.path(), KEY_FILE, &key.serialize_pem(), Secrecy::Secret)?;
        files::write(fresh.path(), CERTIFICATE_FILE, &certificate.pem(), Secrecy::Public)?;
        match fs::rename(fresh.path(), dir) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory) => {
                return Err(IdentityError::Exists { path: dir.to_owned() });
            }
            Err(e) => return Err(IdentityError::io("create", dir, e)),
        }
        sync_dir(parent).map_err(|e| IdentityError::io("sync", parent, e))?;
        Self::open(dir)
    }

    /// Opens the authority that [`create`](Self::create) made in `dir`.
    ///
    /// # Errors
    /// [`IdentityError::Missing`] if there is none; [`IdentityError::Broken`]; [`IdentityError::Io`].
    pub fn open(dir: &Path) -> Result<Self, IdentityError> {
        let broken = |name: &str, why: String| IdentityError::broken(&dir.join(name), why);
        let ca =
            Ca::from_pem(&files::read(dir, CERTIFICATE_FILE)?).map_err(|e| broken(CERTIFICATE_FILE, e))?;
        let key = KeyPair::from_pem(&files::read(dir, KEY_FILE)?)
            .map_err(|e| broken(KEY_FILE, format!("is not a private key: {e}")))?;
        let public =
            super::principal::public_key(ca.der()).map_err(|e| broken(CERTIFICATE_FILE, e.to_string()))?;
        if public != key.der_bytes() {
            return Err(broken(KEY_FILE, format!("does not belong to {CERTIFICATE_FILE}")));
        }
        let issuer = Issuer::from_ca_cert_der(ca.der(), key)
            .map_err(|e| broken(CERTIFICATE_FILE, format!("is not a CA certificate: {e}")))?;
        Ok(Self { issuer, ca })
    }

    /// What members trust.
    pub fn ca(&self) -> &Ca {
        &self.ca
    }

    /// Makes a key and a certificate for `principal`: Volt itself, or an administrator. Nodes make their
    /// own keys and send requests.
    ///
    /// # Errors
    /// [`IdentityError::Crypto`].
    pub fn issue(&self, principal: &Principal, now: SystemTime) -> Result<Identity, IdentityError> {
        let key = Key::generate()?;
        let certificate = self.sign(principal, key.pair(), now)?;
        Identity::new(&certificate, key, self.ca.clone()).map_err(IdentityError::Mismatch)
    }

    /// Certifies for `principal` the public key in `csr` (PKCS #10 in PEM), of which nothing else is
    /// used, and returns the certificate in PEM. The caller has established that the requester is that
    /// principal; the signature in `csr` proves only that it has the private key.
    ///
    /// # Errors
    /// [`IdentityError::Request`] if `csr` is none of ours; [`IdentityError::Crypto`].
    pub fn sign_csr(
        &self,
        csr: &str,
        principal: &Principal,
        now: SystemTime,
    ) -> Result<String, IdentityError> {
        self.sign(principal, &requested_key(csr)?, now)
    }

    fn sign(
        &self,
        principal: &Principal,
        key: &impl PublicKeyData,
        now: SystemTime,
    ) -> Result<String, IdentityError> {
        let failed = |e: rcgen::Error| IdentityError::crypto("sign a certificate", &e);
        let certificate =
            member_params(principal, now).map_err(failed)?.signed_by(key, &self.issuer).map_err(failed)?;
        Ok(certificate.pem())
    }
}

/// The public key of a certificate request, whose signature proves that the sender has the private one.
///
/// # Errors
/// [`IdentityError::Request`].
pub fn requested_key(csr: &str) -> Result<rcgen::PublicKey, IdentityError> {
    if csr.len() > REQUEST_BYTES_MAX {
        return Err(IdentityError::Request(format!("{} bytes, more than {REQUEST_BYTES_MAX}", csr.len())));
    }
    let key = CertificateSigningRequestParams::from_pem(csr)
        .map_err(|e| IdentityError::Request(e.to_string()))?
        .public_key;
    // The algorithm is that of the signature, which does not determine the curve: hence the length.
    if key.algorithm() != &rcgen::PKCS_ECDSA_P256_SHA256 || key.der_bytes().len() != PUBLIC_KEY_BYTES {
        return Err(IdentityError::Request("its key is not of the kind ECDSA P-256".to_owned()));
    }
    Ok(key)
}

fn authority_params(now: SystemTime) -> CertificateParams {
    let mut params = valid(now, AUTHORITY_LIFETIME);
    // A few digits let a person tell the CAs of two clusters apart.
    params.distinguished_name = common_name(&format!("VirtMan cluster {:08x}", rand::random::<u32>()));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn member_params(principal: &Principal, now: SystemTime) -> Result<CertificateParams, rcgen::Error> {
    let mut params = valid(now, CERTIFICATE_LIFETIME);
    let name = match principal {
        Principal::Volt => "volt",
        Principal::Node(name) => name.as_str(),
        Principal::Admin(name) => name.as_str(),
    };
    params.distinguished_name = common_name(name);
    params.subject_alt_names.push(SanType::URI(principal.uri().try_into()?));
    params.is_ca = IsCa::ExplicitNoCa;
    // TLS 1.3 only signs; QEMU refuses certificates that do not permit key encipherment all the same.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    params.use_authority_key_identifier_extension = true;
    match principal {
        Principal::Admin(_) => {}
        // Foreign clients (NBD's, for instance) check servers by DNS name; ours never look at it.
        Principal::Volt | Principal::Node(_) => {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
            params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
        }
    }
    Ok(params)
}

fn valid(now: SystemTime, lifetime: Duration) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut params = CertificateParams::default();
    params.not_before = epoch + now.saturating_sub(BACKDATED);
    params.not_after = epoch + now + lifetime;
    // 127 random bits: positive in DER, and never twice.
    let serial: u128 = rand::random::<u128>() >> 1;
    params.serial_number = Some(SerialNumber::from_slice(&serial.to_be_bytes()));
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn node(name: &str) -> Principal {
        Principal::Node(name.parse().unwrap())
    }

    #[test]
    fn the_key_of_the_authority_is_readable_by_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("volt/ca");
        Authority::create(&ca, SystemTime::now()).unwrap();
        assert_eq!(mode(&ca), 0o700);
        assert_eq!(mode(&ca.join(KEY_FILE)), 0o600);
        assert_eq!(fs::read_dir(dir.path().join("volt")).unwrap().count(), 1, "nothing half-made is left");
    }

    #[test]
    fn an_authority_is_never_overwritten_and_opens_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca");
        let made = Authority::create(&path, SystemTime::now()).unwrap();
        let again = Authority::create(&path, SystemTime::now());
        assert!(matches!(again, Err(IdentityError::Exists { .. })));
        assert_eq!(Authority::open(&path).unwrap().ca(), made.ca());

        let other = dir.path().join("other");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("mine"), "").unwrap();
        assert!(matches!(Authority::create(&other, SystemTime::now()), Err(IdentityError::Exists { .. })));
        assert!(matches!(Authority::open(&other), Err(IdentityError::Missing { .. })));
    }

    #[test]
    fn a_key_of_another_authority_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        Authority::create(&a, SystemTime::now()).unwrap();
        Authority::create(&b, SystemTime::now()).unwrap();
        fs::copy(a.join(KEY_FILE), b.join(KEY_FILE)).unwrap();
        assert!(matches!(Authority::open(&b), Err(IdentityError::Broken { .. })));
    }

    #[test]
    fn of_a_request_only_the_public_key_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), SystemTime::now()).unwrap();
        let pair = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["volt".to_owned()]).unwrap();
        params.distinguished_name = common_name("volt");
        params.subject_alt_names.push(SanType::URI("virtman://volt".try_into().unwrap()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let csr = params.serialize_request(&pair).unwrap().pem().unwrap();

        let pem = authority.sign_csr(&csr, &node("a"), SystemTime::now()).unwrap();
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        assert_eq!(Principal::of_certificate(&der), Ok(node("a")));
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(!parsed.is_ca());
        assert_eq!(parsed.subject().to_string(), "CN=a");
        assert_eq!(parsed.public_key().subject_public_key.data, pair.der_bytes());
    }

    #[test]
    fn a_request_that_is_forged_or_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(&dir.path().join("ca"), SystemTime::now()).unwrap();
        let refused = |csr: &str| authority.sign_csr(csr, &node("a"), SystemTime::now()).is_err();
        let csr = Key::generate().unwrap().csr().unwrap();
        assert!(!refused(&csr));

        let der = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).unwrap();
        let key = requested_key(&csr).unwrap();
        for at in 0..der.len() {
            let mut bytes = der.to_vec();
            bytes[at] ^= 1;
            // A few bytes around the signature say nothing: with them changed it is the same request.
            let other = requested_key(&pem(&bytes)).ok().filter(|k| k.der_bytes() != key.der_bytes());
            assert!(other.is_none(), "byte {at} flipped");
            assert!(requested_key(&pem(&der[..at])).is_err(), "{at} bytes");
        }
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let foreign = CertificateParams::default().serialize_request(&p384).unwrap().pem().unwrap();
        assert!(refused(&foreign));
        assert!(refused(""));
        assert!(refused(&"A".repeat(REQUEST_BYTES_MAX + 1)));
    }

    fn pem(der: &[u8]) -> String {
        use base64::Engine;
        let body = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n")
    }
}
