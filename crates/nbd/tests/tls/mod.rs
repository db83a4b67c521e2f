//! A certificate authority with one server and one client, for the tests; what a user of the crate would
//! bring as TLS.

use std::path::Path;
use std::sync::Arc;

use nbd::{BoxStream, Upgrade};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Certificate and key.
struct Identity {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Identity {
    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::try_from(self.key.serialize_der()).unwrap()
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.der().clone()]
    }
}

pub(crate) struct Certificates {
    roots: Arc<RootCertStore>,
    server: Identity,
    client: Identity,
}

impl Certificates {
    /// Makes new ones, and leaves the client's in `dir` under the names that libnbd and QEMU look for.
    pub(crate) fn new(dir: &Path) -> Certificates {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        let authority = params.self_signed(&key).unwrap();
        let issuer = Issuer::new(params, key);
        let issue = |name: &str, purpose: ExtendedKeyUsagePurpose| {
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![purpose];
            let key = KeyPair::generate().unwrap();
            Identity { certificate: params.signed_by(&key, &issuer).unwrap(), key }
        };
        let server = issue("localhost", ExtendedKeyUsagePurpose::ServerAuth);
        let client = issue("client", ExtendedKeyUsagePurpose::ClientAuth);
        std::fs::write(dir.join("ca-cert.pem"), authority.pem()).unwrap();
        std::fs::write(dir.join("client-cert.pem"), client.certificate.pem()).unwrap();
        std::fs::write(dir.join("client-key.pem"), client.key.serialize_pem()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone()).unwrap();
        Certificates { roots: Arc::new(roots), server, client }
    }

    /// TLS of a server that takes only clients with a certificate.
    pub(crate) fn server_upgrade(&self) -> Upgrade {
        let verifier = WebPkiClientVerifier::builder(Arc::clone(&self.roots)).build().unwrap();
        let config = ServerConfig::builder()
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.server.chain(), self.server.private_key())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        Arc::new(move |stream: BoxStream| {
            let accepting = acceptor.accept(stream);
            Box::pin(async move { Ok(Box::new(accepting.await?) as BoxStream) })
        })
    }

    /// TLS of a client with its certificate, for a server of this name.
    pub(crate) fn client_upgrade(&self, name: &str) -> Upgrade {
        let config = ClientConfig::builder()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_auth_cert(self.client.chain(), self.client.private_key())
            .unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        Arc::new(move |stream: BoxStream| {
            let connecting = connector.connect(name.clone(), stream);
            Box::pin(async move { Ok(Box::new(connecting.await?) as BoxStream) })
        })
    }
}
