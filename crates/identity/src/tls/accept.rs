//! The listening half.
//!
//! A peer without a valid member certificate is told so by a TLS alert and gets not one byte else.
//! Cancellation: dropping a handshake in flight closes the connection.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ServerConfig};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use super::super::{Credentials, IdentityError, Principal};
use super::{Alpn, HANDSHAKE_TIME_MAX, chain_verifier, provider};

/// How long a refused peer may take to read why.
const SEE_OFF_TIME_MAX: Duration = Duration::from_secs(1);

/// How much a refused peer may have sent ahead, in bytes: a request, not an upload.
const UNREAD_BYTES_MAX: u64 = 64 * 1024;

/// What the owner of a listener says to a member with a valid certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Come in.
    Admit,
    /// Its certificate counts no more: the member was removed.
    Revoked,
}

/// Which protocols a port serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// The API and the link, to members only.
    Members,
    /// Besides, the join, to holders of a token. Volt's port alone.
    MembersAndJoins,
}

type Admit = dyn Fn(&Principal) -> Admission + Send + Sync;

/// Makes TLS connections of accepted ones.
#[derive(Clone)]
pub struct Acceptor {
    members: Arc<ServerConfig>,
    joins: Option<Arc<ServerConfig>>,
    plain: Arc<ServerConfig>,
    admit: Arc<Admit>,
}

/// A connection whose peer is known, or is about to join.
#[derive(Debug)]
pub enum Accepted<S> {
    /// A member speaks HTTP.
    Http {
        /// Who.
        peer: Principal,
        /// The connection.
        stream: TlsStream<S>,
    },
    /// A member speaks the link protocol.
    Link {
        /// Who.
        peer: Principal,
        /// The connection.
        stream: TlsStream<S>,
    },
    /// A member hands a VM over.
    Move {
        /// Who.
        peer: Principal,
        /// The connection.
        stream: TlsStream<S>,
    },
    /// Somebody without a certificate wants to join, over HTTP.
    Join {
        /// The connection.
        stream: TlsStream<S>,
    },
}

/// No connection was made. All of it is the peer's doing and worth a line at DEBUG.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The peer was too slow.
    #[error("the TLS handshake took longer than {HANDSHAKE_TIME_MAX:?}")]
    Timeout,
    /// The peer is not admitted, speaks something else, or went away.
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[from] io::Error),
}

impl Acceptor {
    /// Listens as the member that `credentials` are of. `admit` is asked at every handshake and must
    /// not block.
    ///
    /// # Errors
    /// [`IdentityError::Mismatch`] if the CA certificate cannot serve as root.
    pub fn new(
        credentials: &Arc<Credentials>,
        accept: Accept,
        admit: impl Fn(&Principal) -> Admission + Send + Sync + 'static,
    ) -> Result<Self, IdentityError> {
        let chain = chain_verifier(credentials.current().ca()).map_err(IdentityError::Mismatch)?;
        let admit: Arc<Admit> = Arc::new(admit);
        let verifier = Arc::new(MemberVerifier { chain, admit: admit.clone() });
        let config = |client_certificate: ClientCertificate, protocols: &[Alpn]| {
            let versions = ServerConfig::builder_with_provider(provider())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .expect("the library offers suites of TLS 1.3");
            let auth = match client_certificate {
                ClientCertificate::Required => versions.with_client_cert_verifier(verifier.clone()),
                ClientCertificate::Unasked => versions.with_no_client_auth(),
            };
            let mut config = auth.with_cert_resolver(credentials.clone());
            config.alpn_protocols = protocols.iter().map(|p| p.name().to_vec()).collect();
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            Arc::new(config)
        };
        Ok(Self {
            members: config(ClientCertificate::Required, &[Alpn::Http, Alpn::Link, Alpn::Move]),
            joins: match accept {
                Accept::Members => None,
                Accept::MembersAndJoins => Some(config(ClientCertificate::Unasked, &[Alpn::Join])),
            },
            plain: config(ClientCertificate::Required, &[]),
            admit,
        })
    }

    /// What the owner says of `peer` now. The handshake asked already; who holds connections open asks
    /// again when members are removed.
    pub fn admits(&self, peer: &Principal) -> Admission {
        (self.admit)(peer)
    }

    /// Makes a TLS connection of `io`, within [`HANDSHAKE_TIME_MAX`].
    ///
    /// Only a peer that offers nothing but [`Alpn::Join`] is spared the certificate, and only where joins
    /// are accepted. A peer that offers no protocol is taken to speak HTTP.
    ///
    /// # Errors
    /// [`AcceptError`]; the peer got an alert that says why.
    pub async fn accept<S>(&self, io: S) -> Result<Accepted<S>, AcceptError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        in_time(async {
            let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io).await?;
            let joins = hello.client_hello().alpn().is_some_and(|mut offered| {
                offered.next() == Some(Alpn::Join.name()) && offered.next().is_none()
            });
            if let (true, Some(config)) = (joins, &self.joins) {
                return Ok(Accepted::Join { stream: completed(hello.into_stream(config.clone())).await? });
            }
            let stream = completed(hello.into_stream(self.members.clone())).await?;
            let peer = peer(&stream)?;
            match stream.get_ref().1.alpn_protocol() {
                Some(name) if name == Alpn::Link.name() => Ok(Accepted::Link { peer, stream }),
                Some(name) if name == Alpn::Move.name() => Ok(Accepted::Move { peer, stream }),
                _ => Ok(Accepted::Http { peer, stream }),
            }
        })
        .await
    }

    /// Makes a TLS connection of `io` for a protocol that negotiated TLS by itself and knows no ALPN, as
    /// NBD's STARTTLS does. A member certificate is required as everywhere.
    ///
    /// # Errors
    /// [`AcceptError`].
    pub async fn accept_starttls<S>(&self, io: S) -> Result<(Principal, TlsStream<S>), AcceptError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        in_time(async {
            let stream = completed(TlsAcceptor::from(self.plain.clone()).accept(io)).await?;
            Ok((peer(&stream)?, stream))
        })
        .await
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").field("joins", &self.joins.is_some()).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
enum ClientCertificate {
    Required,
    Unasked,
}

async fn in_time<T>(handshake: impl Future<Output = Result<T, io::Error>>) -> Result<T, AcceptError> {
    match tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(AcceptError::Timeout),
    }
}

/// Ends the handshake. If it fails, reads on until the peer has seen our alert: to close with its bytes
/// unread would reset the connection and could take the alert with it.
async fn completed<S>(handshake: tokio_rustls::Accept<S>) -> io::Result<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (error, mut io) = match handshake.into_fallible().await {
        Ok(stream) => return Ok(stream),
        Err(failed) => failed,
    };
    let see_off = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(UNREAD_BYTES_MAX), &mut tokio::io::sink()).await
    };
    // Whether or not the peer took notice: it is refused.
    let _ = tokio::time::timeout(SEE_OFF_TIME_MAX, see_off).await;
    Err(error)
}

/// The peer of a connection whose handshake required a member certificate.
fn peer<S>(stream: &TlsStream<S>) -> io::Result<Principal> {
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let leaf = chain.first().ok_or_else(|| io::Error::other("the peer showed no certificate"))?;
    Principal::of_certificate(leaf).map_err(io::Error::other)
}

/// Verifies the chain, then that it names a principal, then that this one is still admitted.
struct MemberVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    admit: Arc<Admit>,
}

impl fmt::Debug for MemberVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.chain.fmt(f)
    }
}

impl ClientCertVerifier for MemberVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let peer = Principal::of_certificate(end_entity)
            .map_err(|e| CertificateError::Other(OtherError(Arc::new(e))))?;
        match (self.admit)(&peer) {
            Admission::Admit => Ok(verified),
            Admission::Revoked => Err(CertificateError::Revoked.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
