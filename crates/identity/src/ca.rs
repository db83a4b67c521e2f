//! What every member of a cluster knows of its certificate authority.

use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::Fingerprint;

/// How long an issued certificate is valid. Nodes renew theirs when a third of it is left.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(365 * 86_400);

/// The public half of the authority: what every member trusts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ca {
    pem: String,
    der: CertificateDer<'static>,
}

impl Ca {
    /// Reads one certificate in PEM.
    ///
    /// # Errors
    /// The text holds no certificate, or more than one.
    pub fn from_pem(pem: &str) -> Result<Self, String> {
        let ders: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        match ders.map_err(|e| format!("is not PEM: {e}"))?.as_slice() {
            [der] => Ok(Self { pem: pem.to_owned(), der: der.clone() }),
            ders => Err(format!("holds {} certificates, expected 1", ders.len())),
        }
    }

    /// The certificate in PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The certificate in DER.
    pub fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }

    /// What join tokens carry.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }
}
