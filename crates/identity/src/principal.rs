//! Who a certificate speaks for.
//!
//! Role and name stand in one URI among the certificate's alternative names, such as
//! `virtman://node/rack1-a`. DNS names and addresses are not looked at: a node is the same node whatever
//! address it was reached by, and owning an address proves nothing.
//!
//! Invariant: a [`Principal`] that was read from a certificate is only as true as that certificate's
//! chain. [`super::tls`] reads it after the chain was verified; nobody else should.

use std::fmt;
use std::str::FromStr;

use block::NodeName;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// The scheme of the URI that names a principal.
const SCHEME: &str = "virtman://";

/// The name of a person or program that administers the cluster; the same characters as a node's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdminName(NodeName);

impl AdminName {
    /// The name as it was given.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// No principal could be read from a text or a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PrincipalError(String);

impl FromStr for AdminName {
    type Err = PrincipalError;
    fn from_str(text: &str) -> Result<Self, PrincipalError> {
        // One rule for all names of certificates; only the noun of the message differs.
        let wrong = |e: block::NameError| PrincipalError(e.to_string().replace("node name", "admin name"));
        text.parse().map(Self).map_err(wrong)
    }
}

impl fmt::Display for AdminName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who a certificate speaks for: the coordinator, one node, or one administrator.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Principal {
    /// The coordinator.
    Volt,
    /// One host that runs `virtman compute`.
    Node(NodeName),
    /// A person or program that may command the cluster.
    Admin(AdminName),
}

impl Principal {
    /// The URI that stands in the certificate.
    pub fn uri(&self) -> String {
        match self {
            Self::Volt => format!("{SCHEME}volt"),
            Self::Node(name) => format!("{SCHEME}node/{name}"),
            Self::Admin(name) => format!("{SCHEME}admin/{name}"),
        }
    }

    /// The principal of an end-entity certificate.
    ///
    /// # Errors
    /// The certificate does not parse, or has not exactly one `virtman://` name.
    pub fn of_certificate(der: &CertificateDer<'_>) -> Result<Self, PrincipalError> {
        let certificate = parse(der)?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| PrincipalError(format!("unreadable names in the certificate: {e}")))?;
        let mut uris = names.iter().flat_map(|n| &n.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
            _ => None,
        });
        match (uris.next(), uris.next()) {
            (Some(uri), None) => uri.parse(),
            (None, _) => Err(PrincipalError(format!("the certificate has no {SCHEME} name"))),
            (Some(_), Some(_)) => Err(PrincipalError(format!("the certificate has several {SCHEME} names"))),
        }
    }
}

impl FromStr for Principal {
    type Err = PrincipalError;
    fn from_str(uri: &str) -> Result<Self, PrincipalError> {
        let path = uri.strip_prefix(SCHEME).unwrap_or_default();
        match path.split_once('/') {
            None if path == "volt" => Ok(Self::Volt),
            Some(("node", name)) => {
                name.parse().map(Self::Node).map_err(|e: block::NameError| PrincipalError(e.to_string()))
            }
            Some(("admin", name)) => name.parse().map(Self::Admin),
            _ => Err(PrincipalError(format!(
                "'{}' names nobody: expected {SCHEME}volt, {SCHEME}node/NAME or {SCHEME}admin/NAME",
                uri.chars().take(80).flat_map(char::escape_debug).collect::<String>()
            ))),
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volt => f.write_str("Volt"),
            Self::Node(name) => write!(f, "node {name}"),
            Self::Admin(name) => write!(f, "admin {name}"),
        }
    }
}

impl Serialize for Principal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.uri())
    }
}

impl<'de> Deserialize<'de> for Principal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The public key of a certificate, as the bits that its key pair calls its public half.
pub(crate) fn public_key(der: &CertificateDer<'_>) -> Result<Vec<u8>, PrincipalError> {
    let certificate = parse(der)?;
    Ok(certificate.public_key().subject_public_key.data.to_vec())
}

/// When a certificate begins and ends to be valid, in seconds since 1970.
pub(crate) fn validity(der: &CertificateDer<'_>) -> Result<(u64, u64), PrincipalError> {
    let certificate = parse(der)?;
    let validity = certificate.validity();
    let seconds = |t: i64| u64::try_from(t).unwrap_or(0);
    Ok((seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp())))
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, PrincipalError> {
    let parsed = X509Certificate::from_der(der);
    parsed.map(|(_, c)| c).map_err(|e| PrincipalError(format!("unreadable certificate: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_principal_survives_its_uri() {
        for principal in [
            Principal::Volt,
            Principal::Node("rack1-a.b_c".parse().unwrap()),
            Principal::Admin("eve".parse().unwrap()),
        ] {
            assert_eq!(principal.uri().parse(), Ok(principal));
        }
    }

    #[test]
    fn a_uri_that_is_almost_a_principal_names_nobody() {
        for uri in [
            "",
            "volt",
            "virtman://",
            "virtman://volt/",
            "virtman://node",
            "virtman://node/",
            "virtman://node/a/b",
            "virtman://node/../volt",
            "virtman://node/a%20b",
            "virtman://NODE/a",
            "http://node/a",
            "virtman://admin/",
        ] {
            assert!(uri.parse::<Principal>().is_err(), "{uri:?}");
        }
    }
}
