//! Handshakes over real sockets: who gets in, who is turned away, and what each side learns.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use super::super::{Authority, CERTIFICATE_LIFETIME, Credentials, Identity, Principal};
use super::*;

fn cluster(dir: &Path, name: &str) -> Authority {
    Authority::create(&dir.join(name), SystemTime::now()).unwrap()
}

fn node(name: &str) -> Principal {
    Principal::Node(name.parse().unwrap())
}

fn issue(authority: &Authority, principal: &Principal) -> Arc<Credentials> {
    Credentials::new(authority.issue(principal, SystemTime::now()).unwrap())
}

fn acceptor(authority: &Authority, principal: &Principal, accept: Accept) -> Acceptor {
    Acceptor::new(&issue(authority, principal), accept, |_| Admission::Admit).unwrap()
}

/// Runs both halves of one handshake. The server greets whom it accepted, so that a refused client can be
/// seen to get nothing.
async fn meet(
    acceptor: &Acceptor,
    expected: &Expected,
    protocol: Alpn,
) -> (Result<String, AcceptError>, Result<Vec<u8>, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::join!(greet(&listener, acceptor), async {
        let mut stream = connect(&address, expected, protocol).await.map_err(|e| e.to_string())?;
        let mut got = Vec::new();
        match stream.read_to_end(&mut got).await {
            Ok(_) => Ok(got),
            Err(e) => {
                assert!(got.is_empty(), "a refused client got {got:?}");
                Err(refusal(&e).map_or_else(|| e.to_string(), str::to_owned))
            }
        }
    })
}

async fn greet(listener: &TcpListener, acceptor: &Acceptor) -> Result<String, AcceptError> {
    let (tcp, _) = listener.accept().await.unwrap();
    let (who, mut stream) = match acceptor.accept(tcp).await? {
        Accepted::Http { peer, stream } => (format!("http {peer}"), stream),
        Accepted::Link { peer, stream } => (format!("link {peer}"), stream),
        Accepted::Move { peer, stream } => (format!("move {peer}"), stream),
        Accepted::Join { stream } => ("join".to_owned(), stream),
    };
    stream.write_all(b"hello").await?;
    stream.shutdown().await?;
    Ok(who)
}

fn member(credentials: &Arc<Credentials>, principal: &Principal) -> Expected {
    Expected::Member { credentials: credentials.clone(), principal: principal.clone() }
}

#[tokio::test]
async fn each_protocol_arrives_as_what_it_is_and_with_its_peer() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let volt = acceptor(&authority, &Principal::Volt, Accept::MembersAndJoins);
    let ours = issue(&authority, &node("a"));
    for (protocol, arrived) in [(Alpn::Http, "http node a"), (Alpn::Link, "link node a")] {
        let (server, client) = meet(&volt, &member(&ours, &Principal::Volt), protocol).await;
        assert_eq!(server.unwrap(), arrived);
        assert_eq!(client.unwrap(), b"hello");
    }
    let stranger = Expected::VoltOf(authority.ca().fingerprint());
    let (server, client) = meet(&volt, &stranger, Alpn::Join).await;
    assert_eq!(server.unwrap(), "join");
    assert_eq!(client.unwrap(), b"hello");
}

#[tokio::test]
async fn without_a_certificate_there_is_no_byte_of_answer() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let volt = acceptor(&authority, &Principal::Volt, Accept::MembersAndJoins);
    let stranger = Expected::VoltOf(authority.ca().fingerprint());
    for protocol in [Alpn::Http, Alpn::Link] {
        let (server, client) = meet(&volt, &stranger, protocol).await;
        assert!(matches!(server, Err(AcceptError::Handshake(_))), "{server:?}");
        let why = client.unwrap_err();
        assert!(why.contains("we have none"), "{why}");
    }
}

#[tokio::test]
async fn a_join_is_refused_where_only_members_are_served() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let port = acceptor(&authority, &Principal::Volt, Accept::Members);
    let (server, client) = meet(&port, &Expected::VoltOf(authority.ca().fingerprint()), Alpn::Join).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("does not serve this protocol"), "{why}");
}

#[tokio::test]
async fn to_offer_the_join_beside_another_protocol_spares_nobody_the_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    // The foreign client checks the DNS name, which this node has.
    let port = acceptor(&authority, &node("b"), Accept::MembersAndJoins);
    for protocols in [[Alpn::Join, Alpn::Http], [Alpn::Http, Alpn::Join]] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (server, got) = tokio::join!(greet(&listener, &port), async {
            let mut config = foreign_client(&authority).with_no_client_auth();
            config.alpn_protocols = protocols.iter().map(|p| p.name().to_vec()).collect();
            read_all(address, config).await
        });
        let why = server.unwrap_err().to_string();
        assert!(why.contains("peer sent no certificates"), "{why}");
        assert_eq!(got, b"");
    }
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused_by_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (cluster(dir.path(), "ours"), cluster(dir.path(), "theirs"));
    let server_of_ours = acceptor(&ours, &node("b"), Accept::Members);

    let (server, client) =
        meet(&server_of_ours, &member(&issue(&theirs, &node("a")), &node("b")), Alpn::Link).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("of another cluster: check the address"), "{why}");

    // A client that trusts whomever it meets is still turned away by the server.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (server, got) = tokio::join!(greet(&listener, &server_of_ours), async {
        let config = foreign_client(&ours).with_client_cert_resolver(issue(&theirs, &node("a")));
        read_all(address, config).await
    });
    assert!(server.is_err());
    assert_eq!(got, b"");
}

#[tokio::test]
async fn a_node_that_answers_in_the_place_of_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let ours = issue(&authority, &node("a"));
    for (answers, expected) in [
        (node("c"), node("b")),
        (node("volt"), Principal::Volt),
        (Principal::Volt, node("volt")),
        (Principal::Volt, node("b")),
    ] {
        let port = acceptor(&authority, &answers, Accept::Members);
        let (server, client) = meet(&port, &member(&ours, &expected), Alpn::Link).await;
        assert!(server.is_err());
        let why = client.unwrap_err();
        assert!(why.contains(&format!("expected {expected}, but {answers} answers there")), "{why}");
    }
}

#[tokio::test]
async fn an_administrators_certificate_serves_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let admin = Principal::Admin("eve".parse().unwrap());
    let port = acceptor(&authority, &admin, Accept::Members);
    let (_, client) = meet(&port, &member(&issue(&authority, &node("a")), &admin), Alpn::Http).await;
    let why = client.unwrap_err();
    assert!(why.contains("its certificate is bad"), "{why}");
    // As a client it is as good as any.
    let volt = acceptor(&authority, &Principal::Volt, Accept::Members);
    let (server, _) = meet(&volt, &member(&issue(&authority, &admin), &Principal::Volt), Alpn::Http).await;
    assert_eq!(server.unwrap(), "http admin eve");
}

#[tokio::test]
async fn a_removed_member_is_told_so_while_others_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let removed = node("a");
    let port = Acceptor::new(&issue(&authority, &Principal::Volt), Accept::Members, move |peer| {
        if *peer == removed { Admission::Revoked } else { Admission::Admit }
    })
    .unwrap();
    let (server, client) =
        meet(&port, &member(&issue(&authority, &node("a")), &Principal::Volt), Alpn::Http).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("removed from the cluster"), "{why}");
    let (server, _) =
        meet(&port, &member(&issue(&authority, &node("b")), &Principal::Volt), Alpn::Http).await;
    assert_eq!(server.unwrap(), "http node b");
}

#[tokio::test]
async fn a_refused_peer_that_is_still_sending_learns_why() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let port =
        Acceptor::new(&issue(&authority, &node("b")), Accept::Members, |_| Admission::Revoked).unwrap();
    let expected = member(&issue(&authority, &node("a")), &node("b"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (server, why) = tokio::join!(greet(&listener, &port), async {
        let mut stream = connect(&address, &expected, Alpn::Http).await.unwrap();
        // From here on the refusal is there; a server that had closed would answer each write by a reset.
        stream.get_ref().0.readable().await.unwrap();
        for _ in 0..4 {
            stream.write_all(&[0; 1024]).await.unwrap();
            stream.flush().await.unwrap();
        }
        let error = stream.read(&mut [0; 1]).await.unwrap_err();
        refusal(&error).expect("an alert that we know")
    });
    assert!(why.contains("removed from the cluster"), "{why}");
    assert!(matches!(server, Err(AcceptError::Handshake(_))), "{server:?}");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let past = SystemTime::now() - CERTIFICATE_LIFETIME - Duration::from_secs(60);
    let old = |p: &Principal| Credentials::new(authority.issue(p, past).unwrap());

    let port = acceptor(&authority, &node("b"), Accept::Members);
    let (server, client) = meet(&port, &member(&old(&node("a")), &node("b")), Alpn::Link).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("our certificate has expired"), "{why}");

    let port = Acceptor::new(&old(&node("b")), Accept::Members, |_| Admission::Admit).unwrap();
    let ours = issue(&authority, &node("a"));
    let (server, client) = meet(&port, &member(&ours, &node("b")), Alpn::Link).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("its certificate has expired"), "{why}");
}

#[tokio::test]
async fn a_replaced_certificate_is_used_by_listeners_that_were_there_before() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let past = SystemTime::now() - CERTIFICATE_LIFETIME - Duration::from_secs(60);
    let old: Identity = authority.issue(&node("b"), past).unwrap();
    let csr = old.csr().unwrap();
    let credentials = Credentials::new(old);
    let port = Acceptor::new(&credentials, Accept::Members, |_| Admission::Admit).unwrap();
    let ours = member(&issue(&authority, &node("a")), &node("b"));
    assert!(meet(&port, &ours, Alpn::Link).await.1.is_err());

    let fresh = authority.sign_csr(&csr, &node("b"), SystemTime::now()).unwrap();
    let renewed = credentials.current().renewed(&fresh).unwrap();
    credentials.replace(renewed).unwrap();
    assert_eq!(meet(&port, &ours, Alpn::Link).await.1.unwrap(), b"hello");
}

#[tokio::test]
async fn a_token_of_another_cluster_does_not_trust_this_volt() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (cluster(dir.path(), "ours"), cluster(dir.path(), "theirs"));
    let volt = acceptor(&ours, &Principal::Volt, Accept::MembersAndJoins);
    let (server, client) = meet(&volt, &Expected::VoltOf(theirs.ca().fingerprint()), Alpn::Join).await;
    assert!(server.is_err());
    let why = client.unwrap_err();
    assert!(why.contains("its CA is not the one of the token"), "{why}");

    // Nor a node of the right cluster that poses as Volt: its certificate is not Volt's.
    let node = acceptor(&ours, &node("a"), Accept::MembersAndJoins);
    let (_, client) = meet(&node, &Expected::VoltOf(ours.ca().fingerprint()), Alpn::Join).await;
    let why = client.unwrap_err();
    assert!(why.contains("expected Volt, but node a answers there"), "{why}");
}

#[tokio::test]
async fn starttls_knows_its_peer_and_takes_nobody_without_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let port = acceptor(&authority, &node("b"), Accept::Members);
    let serve = async |listener: &TcpListener| {
        let (tcp, _) = listener.accept().await.unwrap();
        let (peer, mut stream) = port.accept_starttls(tcp).await?;
        stream.write_all(b"hello").await?;
        stream.shutdown().await?;
        Ok::<_, AcceptError>(peer)
    };
    // A stock client offers no protocol and checks the server by DNS name.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let ours = issue(&authority, &node("a"));
    let (peer, got) = tokio::join!(serve(&listener), async {
        read_all(address, foreign_client(&authority).with_client_cert_resolver(ours)).await
    });
    assert_eq!(peer.unwrap(), node("a"));
    assert_eq!(got, b"hello");
    let (peer, got) = tokio::join!(serve(&listener), async {
        read_all(address, foreign_client(&authority).with_no_client_auth()).await
    });
    assert!(peer.is_err());
    assert_eq!(got, b"");
}

#[tokio::test]
async fn old_tls_and_no_tls_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let port = acceptor(&authority, &node("b"), Accept::Members);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    // The head of a ClientHello of TLS 1.2 without the extension for newer versions (RFC 5246 §7.4.1.2).
    let mut hello = vec![22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    for bytes in [hello, b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        let (server, got) = tokio::join!(greet(&listener, &port), async {
            let mut tcp = TcpStream::connect(address).await.unwrap();
            tcp.write_all(&bytes).await.unwrap();
            let mut got = Vec::new();
            tcp.read_to_end(&mut got).await.unwrap();
            got
        });
        assert!(matches!(server, Err(AcceptError::Handshake(_))), "{server:?}");
        // A TLS record of type alert and nothing behind it.
        assert!(got.len() <= 7 && got.first().is_none_or(|kind| *kind == 21), "{got:?}");
    }
}

#[tokio::test]
async fn a_closed_port_is_unreachable_and_a_foreign_server_untrusted() {
    let dir = tempfile::tempdir().unwrap();
    let authority = cluster(dir.path(), "ca");
    let expected = member(&issue(&authority, &node("a")), &node("b"));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (error, ()) = tokio::join!(connect(&address, &expected, Alpn::Http), async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await.unwrap();
    });
    assert!(matches!(error, Err(ConnectError::Untrusted { .. })), "{error:?}");
    drop(listener);
    let error = connect(&address, &expected, Alpn::Http).await;
    assert!(matches!(error, Err(ConnectError::Unreachable { .. })), "{error:?}");
}

#[tokio::test]
async fn a_connection_keeps_little_unsent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    prepare(&tcp).unwrap();
    let unsent_max = SockRef::from(&tcp).tcp_notsent_lowat().unwrap();
    assert_eq!((unsent_max, tcp.nodelay().unwrap()), (UNSENT_BYTES_MAX, true));
}

/// A TLS client as others write it: standard verification by the DNS name `b`.
fn foreign_client(
    authority: &Authority,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.ca().der().clone()).unwrap();
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
}

/// What a server sends inside TLS until it ends, whichever way it ends.
async fn read_all(address: std::net::SocketAddr, mut config: ClientConfig) -> Vec<u8> {
    config.resumption = Resumption::disabled();
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("b").unwrap();
    let mut got = Vec::new();
    if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, tcp).await {
        let _ = stream.read_to_end(&mut got).await;
    }
    got
}
