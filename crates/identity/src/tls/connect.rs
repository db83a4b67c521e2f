//! The dialling half.
//!
//! A connection is handed out only after the peer proved to be the expected principal. The reverse is
//! not known yet: in TLS 1.3 a server checks the client's certificate after the client's handshake is
//! complete, so a refusal arrives with the first read, as an error that [`refusal`] explains.
//!
//! Cancellation: dropping the future closes the connection.

use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    AlertDescription, CertificateError, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::super::{Credentials, Fingerprint, Principal};
use super::{Alpn, CONNECT_TIME_MAX, prepare, provider, roots};

/// Whom a connection must lead to, and as whom it is made.
#[derive(Debug, Clone)]
pub enum Expected {
    /// A member of our cluster, to which we show our certificate.
    Member {
        /// Who we are.
        credentials: Arc<Credentials>,
        /// Who must answer.
        principal: Principal,
    },
    /// The Volt whose CA has this fingerprint; we have no certificate yet.
    VoltOf(Fingerprint),
}

/// No connection was made, and nothing of ours was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers there. It may pass.
    #[error("cannot connect to {address}: {source}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// It took too long. It may pass.
    #[error("cannot connect to {address}: no answer within {CONNECT_TIME_MAX:?}")]
    Timeout {
        /// Where.
        address: String,
    },
    /// Somebody else answers there, or the certificate is no good. It will not pass by itself.
    #[error("{address} is not trusted: {why}")]
    Untrusted {
        /// Where.
        address: String,
        /// What is wrong with the peer, and what to do.
        why: String,
    },
    /// The peer does not want us. It will not pass by itself.
    #[error("{address} refused us: {why}")]
    Refused {
        /// Where.
        address: String,
        /// What is wrong with us, and what to do.
        why: &'static str,
    },
}

/// Connects to `address` (`HOST:PORT`) and speaks `protocol` there with the expected peer, without
/// Nagle's delay.
///
/// # Errors
/// [`ConnectError`].
pub async fn connect(
    address: &str,
    expected: &Expected,
    protocol: Alpn,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let attempt = async {
        let tcp = TcpStream::connect(address).await?;
        prepare(&tcp)?;
        let config = client_config(expected, protocol).map_err(io::Error::other)?;
        // The name is neither sent nor compared; the library wants one.
        let name = ServerName::try_from("virtman").expect("a word is a DNS name");
        TlsConnector::from(Arc::new(config)).connect(name, tcp).await
    };
    match tokio::time::timeout(CONNECT_TIME_MAX, attempt).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(explain(address, source)),
        Err(_) => Err(ConnectError::Timeout { address: address.to_owned() }),
    }
}

fn client_config(expected: &Expected, protocol: Alpn) -> Result<ClientConfig, rustls::Error> {
    let verifier = PeerVerifier {
        trust: match expected {
            Expected::Member { credentials, principal } => {
                Trust::Member { roots: roots(credentials.current().ca())?, principal: principal.clone() }
            }
            Expected::VoltOf(fingerprint) => Trust::VoltOf(*fingerprint),
        },
        algorithms: provider().signature_verification_algorithms,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match expected {
        Expected::Member { credentials, .. } => builder.with_client_cert_resolver(credentials.clone()),
        Expected::VoltOf(_) => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.name().to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// If `error`, which a read or write on a connection gave, is the peer's refusal of our certificate: what
/// is wrong and what to do.
pub fn refusal(error: &io::Error) -> Option<&'static str> {
    let rustls::Error::AlertReceived(alert) = tls_error(error)? else { return None };
    match alert {
        AlertDescription::CertificateRevoked => Some(
            "this member was removed from the cluster: join again with a new token if that was a mistake",
        ),
        AlertDescription::CertificateExpired => {
            Some("our certificate has expired, or one of the clocks is wrong: join again with a new token")
        }
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            Some("our certificate is of another cluster: join that one first")
        }
        AlertDescription::CertificateRequired => {
            Some("it wants a certificate and we have none: join the cluster first")
        }
        AlertDescription::BadCertificate | AlertDescription::UnsupportedCertificate => {
            Some("our certificate is not one of a member: join again with a new token")
        }
        AlertDescription::NoApplicationProtocol => {
            Some("it does not serve this protocol: is the address right?")
        }
        _ => None,
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn explain(address: &str, source: io::Error) -> ConnectError {
    let address = address.to_owned();
    if let Some(why) = refusal(&source) {
        return ConnectError::Refused { address, why };
    }
    let why = match tls_error(&source) {
        None => return ConnectError::Unreachable { address, source },
        Some(rustls::Error::InvalidCertificate(error)) => match error {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "its certificate has expired, or our clock is wrong: let it join again".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "its certificate is not valid yet: our clock is wrong".to_owned()
            }
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "its certificate is of another cluster: check the address".to_owned()
            }
            CertificateError::Other(OtherError(why)) => why.to_string(),
            error => format!("its certificate is bad: {error}"),
        },
        Some(rustls::Error::InvalidMessage(_)) => "it does not speak TLS: check the address".to_owned(),
        Some(error) => error.to_string(),
    };
    ConnectError::Untrusted { address, why }
}

/// The chain is good, and leads to somebody else.
#[derive(Debug, thiserror::Error)]
enum WrongPeer {
    #[error("expected {expected}, but {found} answers there: check the address")]
    Principal { expected: Principal, found: Principal },
    #[error("{0}")]
    Unnamed(#[from] super::super::PrincipalError),
    #[error("its CA is not the one of the token ({0}): check the address, or ask for a new token")]
    Ca(Fingerprint),
}

#[derive(Debug)]
enum Trust {
    Member { roots: RootCertStore, principal: Principal },
    VoltOf(Fingerprint),
}

/// Verifies that a server's chain leads to the trusted CA and its certificate names whom we expect.
#[derive(Debug)]
struct PeerVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PeerVerifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let wrong = |why: WrongPeer| CertificateError::Other(OtherError(Arc::new(why)));
        let shown;
        let (roots, expected) = match &self.trust {
            Trust::Member { roots, principal } => (roots, principal),
            Trust::VoltOf(fingerprint) => {
                let ca = intermediates.iter().find(|der| Fingerprint::of(der) == *fingerprint);
                let mut roots = RootCertStore::empty();
                roots.add(ca.ok_or_else(|| wrong(WrongPeer::Ca(*fingerprint)))?.clone().into_owned())?;
                shown = roots;
                (&shown, &Principal::Volt)
            }
        };
        let parsed = ParsedCertificate::try_from(leaf)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, self.algorithms.all)?;
        let found = Principal::of_certificate(leaf).map_err(|e| wrong(e.into()))?;
        if found != *expected {
            return Err(wrong(WrongPeer::Principal { expected: expected.clone(), found }).into());
        }
        Ok(())
    }
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
