//! Both ends against each other, over real sockets.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::refusal::{Class, Code, Refusal};
use identity::tls::{self, Accept, Acceptor, Admission, Alpn, ConnectError, Expected};
use identity::{Authority, Credentials, Principal};

/// A server on a UNIX socket of its own directory.
struct Server {
    dir: tempfile::TempDir,
    shutdown: CancellationToken,
    served: JoinHandle<()>,
}

impl Server {
    fn start(router: impl FnOnce(&CancellationToken) -> Router) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        let server = bind_unix(&dir.path().join("socket")).unwrap();
        let served = tokio::spawn(server.serve(router(&shutdown), shutdown.clone()));
        Self { dir, shutdown, served }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::new(Target::Unix(self.path()))
    }

    async fn stop(self) {
        let path = self.path();
        self.shutdown.cancel();
        self.served.await.unwrap();
        assert!(!path.exists(), "the socket file goes with its server");
    }
}

fn refusal(error: ClientError) -> Refusal {
    match error {
        ClientError::Refused(error) => error,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

async fn who(peer: Peer) -> Json<String> {
    Json(match peer {
        Peer::Local => "local".to_owned(),
        Peer::Remote(principal) => principal.uri(),
    })
}

#[tokio::test]
async fn the_socket_is_its_owners_alone_and_its_peers_are_local() {
    let server = Server::start(|_| Router::new().route("/who", get(who)));
    let mode = std::fs::metadata(server.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(server.client().get::<String>("/who").await.unwrap(), "local");
    server.stop().await;
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a killed daemon leaves its socket file");
    let live = bind_unix(&path).unwrap();
    assert_eq!(bind_unix(&path).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    drop(live);
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(bind_unix(&path).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[tokio::test]
async fn each_method_carries_its_json_there_and_back() {
    let server = Server::start(|_| {
        Router::new()
            .route(
                "/things/{name}",
                put(async |Path(name): Path<String>, Json(body): Json<Value>| {
                    Json(json!({ "name": name, "body": body }))
                }),
            )
            .route("/things", post(async |Json(body): Json<Vec<u32>>| Json(body.iter().sum::<u32>())))
            .route("/things/{name}", axum::routing::delete(async || StatusCode::NO_CONTENT))
    });
    let client = server.client();
    assert_eq!(client.post::<u32>("/things", &[1, 2, 3]).await.unwrap(), 6);
    let put: Value = client.put("/things/a", &json!({ "x": 1 })).await.unwrap();
    assert_eq!(put, json!({ "name": "a", "body": { "x": 1 } }));
    client.delete::<()>("/things/a").await.unwrap();
    server.stop().await;
}

#[tokio::test]
async fn every_refusal_has_the_same_form() {
    let server = Server::start(|_| {
        Router::new()
            .route("/sum", post(async |Json(body): Json<Vec<u32>>| Json(body.iter().sum::<u32>())))
            .route(
                "/image",
                get(async || {
                    Err::<(), _>(Refusal::new(Code::NoSuchImage, "there is no image 'a'").with_hint("add it"))
                }),
            )
    });
    let client = server.client();
    let error = refusal(client.get::<Value>("/image").await.unwrap_err());
    assert_eq!(error, Refusal::new(Code::NoSuchImage, "there is no image 'a'").with_hint("add it"));
    assert_eq!(error.to_string(), "there is no image 'a': add it");

    let error = refusal(client.get::<Value>("/nowhere").await.unwrap_err());
    assert_eq!((error.code.class(), error.code.word()), (Class::NotFound, "no_such_path"));
    let error = refusal(client.delete::<Value>("/sum").await.unwrap_err());
    assert_eq!((error.code.class(), error.code.word()), (Class::Invalid, "wrong_method"));
    let error = refusal(client.post::<Value>("/sum", &"text").await.unwrap_err());
    assert_eq!((error.code.class(), error.code.word()), (Class::Invalid, "bad_body"));
    let huge = "x".repeat(5 << 20);
    let error = refusal(client.post::<Value>("/sum", &huge).await.unwrap_err());
    assert_eq!((error.code.class(), error.code.word()), (Class::Invalid, "bad_body"));
    server.stop().await;
}

#[tokio::test]
async fn an_invalid_path_is_refused_before_anything_is_sent() {
    let client = Client::new(Target::Unix("/nonexistent/socket".into()));
    let error = client.get::<Value>("/a b\r\nX: y").await.unwrap_err();
    assert!(matches!(error, ClientError::BadRequest(_)), "{error}");
    let error = client.get::<Value>("/").await.unwrap_err();
    assert!(error.to_string().contains("is the daemon running?"), "{error}");
}

/// Answers every connection with `answer`, counts the connections, and closes each after `requests`.
fn canned(path: &FilePath, answer: String, requests: usize) -> (Arc<AtomicUsize>, JoinHandle<()>) {
    let listener = UnixListener::bind(path).unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = connections.clone();
    let served = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::SeqCst);
            for _ in 0..requests {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    head.push(byte);
                }
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    break;
                }
            }
        }
    });
    (connections, served)
}

fn ok_with(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

#[tokio::test]
async fn requests_in_turn_use_one_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let (connections, served) = canned(&path, ok_with("1"), usize::MAX);
    let client = Client::new(Target::Unix(path));
    for _ in 0..20 {
        assert_eq!(client.get::<u32>("/").await.unwrap(), 1);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
    served.abort();
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_replaced_unseen() {
    let first = Server::start(|_| Router::new().route("/who", get(who)));
    let client = first.client();
    client.get::<String>("/who").await.unwrap();
    let path = first.path();
    first.shutdown.cancel();
    first.served.await.unwrap();
    let shutdown = CancellationToken::new();
    let second = bind_unix(&path).unwrap();
    let served = tokio::spawn(second.serve(Router::new().route("/who", get(who)), shutdown.clone()));
    assert_eq!(client.get::<String>("/who").await.unwrap(), "local");
    shutdown.cancel();
    served.await.unwrap();
}

#[tokio::test]
async fn an_answer_that_is_too_long_or_of_another_kind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let long = ok_with(&"x".repeat(33 << 20));
    let cases = [
        ("long", long, "longer than"),
        ("other", ok_with("<html>"), "expected value"),
        ("foreign", "SSH-2.0-OpenSSH_9.2p1\r\n".to_owned(), "lost the connection"),
    ];
    for (name, answer, expected) in cases {
        let path = dir.path().join(name);
        let (_, served) = canned(&path, answer, 1);
        let error = Client::new(Target::Unix(path)).get::<u32>("/").await.unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
        served.abort();
    }
}

#[tokio::test]
async fn a_request_in_flight_is_finished_at_shutdown() {
    let (entered, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let state = (entered.clone(), go_on.clone());
    let server = Server::start(|_| {
        let slow = async |State((entered, go_on)): State<(Arc<Notify>, Arc<Notify>)>| {
            entered.notify_one();
            go_on.notified().await;
            Json("done")
        };
        Router::new().route("/slow", get(slow)).with_state(state)
    });
    let client = server.client();
    let (answer, ()) = tokio::join!(client.get::<String>("/slow"), async {
        entered.notified().await;
        server.shutdown.cancel();
        // On this one-threaded runtime every task that was woken has its turn, so the server knows.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        go_on.notify_one();
    });
    assert_eq!(answer.unwrap(), "done");
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_waited_long_enough_leaves_and_its_handler_ends() {
    let ended = CancellationToken::new();
    let guard = Arc::new(std::sync::Mutex::new(Some(ended.clone().drop_guard())));
    let left = Arc::clone(&guard);
    let server = Server::start(|_| {
        let stuck = async move || {
            let _guard = guard.lock().unwrap().take();
            std::future::pending::<()>().await;
        };
        Router::new().route("/stuck", get(stuck))
    });
    let client = server.client().with_answer_time_max(std::time::Duration::from_millis(50));
    // On a busy machine a client may leave before a handler has begun.
    while left.lock().unwrap().is_some() {
        let error = client.get::<()>("/stuck").await.unwrap_err();
        assert!(error.to_string().contains("no answer within 50ms"), "{error}");
    }
    ended.cancelled().await;
    server.stop().await;
}

#[tokio::test]
async fn lines_arrive_one_by_one_and_end_as_the_sender_ends() {
    let (sender, receiver) = tokio::sync::mpsc::channel::<u32>(1);
    let receiver = Arc::new(std::sync::Mutex::new(Some(receiver)));
    let server = Server::start(|shutdown| {
        let shutdown = shutdown.clone();
        Router::new().route(
            "/changes",
            get(async move || {
                let receiver = receiver.lock().unwrap().take().unwrap();
                lines(stream::unfold(receiver, async |mut r| Some((r.recv().await?, r))), shutdown)
            }),
        )
    });
    let mut changes = server.client().stream_lines::<u32>("/changes").await.unwrap();
    for value in 0..5 {
        // The next is sent only after the last arrived: nothing waits for a buffer to fill.
        sender.send(value).await.unwrap();
        assert_eq!(changes.next().await.unwrap().unwrap(), value);
    }
    drop(sender);
    assert!(changes.next().await.is_none());
    server.stop().await;
}

#[tokio::test]
async fn lines_end_with_an_error_when_the_server_goes() {
    let server = Server::start(|shutdown| {
        let shutdown = shutdown.clone();
        Router::new().route("/changes", get(async move || lines(stream::pending::<u32>(), shutdown)))
    });
    let mut changes = server.client().stream_lines::<u32>("/changes").await.unwrap();
    let (last, ()) = tokio::join!(changes.next(), server.stop());
    assert!(matches!(last, Some(Err(ClientError::Lost { .. }))), "{last:?}");
    assert!(changes.next().await.is_none(), "an error is the last item");
}

#[tokio::test]
async fn lines_that_are_refused_or_wrong_say_so() {
    let server = Server::start(|_| Router::new().route("/text", get(async || "1\ntwo\n3\n")));
    let client = server.client();
    let Err(error) = client.stream_lines::<u32>("/nowhere").await else { panic!("there is no such path") };
    assert_eq!(refusal(error).code.word(), "no_such_path");
    let mut text = client.stream_lines::<u32>("/text").await.unwrap();
    assert_eq!(text.next().await.unwrap().unwrap(), 1);
    assert!(matches!(text.next().await, Some(Err(ClientError::BadAnswer { .. }))));
    assert!(text.next().await.is_none());
    server.stop().await;
}

#[tokio::test]
async fn a_handler_that_asks_for_its_peer_does_not_run_without_one() {
    // As on a join's connection: the router is served without a peer.
    let router = Router::new().route("/who", get(who));
    let (client, server) = UnixStream::pair().unwrap();
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(serve::serve_http(server, router, None, shutdown));
    let (mut client, mut answer) = (client, String::new());
    client.write_all(b"GET /who HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    served.await.unwrap();
}

#[tokio::test]
async fn over_tls_handlers_know_the_member_and_links_go_their_own_way() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(&dir.path().join("ca"), SystemTime::now()).unwrap();
    let issue = |p: &Principal| Credentials::new(authority.issue(p, SystemTime::now()).unwrap());
    let (a, b) = (Principal::Node("a".parse().unwrap()), Principal::Node("b".parse().unwrap()));
    let removed = Principal::Node("removed".parse().unwrap());
    let gone = removed.clone();
    let acceptor = Acceptor::new(&issue(&b), Accept::Members, move |peer| {
        if *peer == gone { Admission::Revoked } else { Admission::Admit }
    })
    .unwrap();
    let server = TlsServer::new(acceptor, Router::new().route("/who", get(who))).with_link(Arc::new(
        |peer: Principal, mut stream| {
            Box::pin(async move {
                stream.write_all(peer.to_string().as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            })
        },
    ));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let shutdown = CancellationToken::new();
    let served = tokio::spawn(server.serve(listener, shutdown.clone()));

    let client = |as_whom: &Principal, expected: &Principal| {
        Client::new(Target::Tls {
            address: address.clone(),
            principal: expected.clone(),
            credentials: issue(as_whom),
        })
    };
    assert_eq!(client(&a, &b).get::<String>("/who").await.unwrap(), "virtman://node/a");
    let wrong = client(&a, &Principal::Volt).get::<String>("/who").await.unwrap_err();
    assert!(matches!(wrong, ClientError::Connect(ConnectError::Untrusted { .. })), "{wrong}");
    let refused = client(&removed, &b).get::<String>("/who").await.unwrap_err();
    assert!(matches!(refused, ClientError::Connect(ConnectError::Refused { .. })), "{refused}");

    let expected = Expected::Member { credentials: issue(&a), principal: b.clone() };
    let mut link = tls::connect(&address, &expected, Alpn::Link).await.unwrap();
    let mut got = String::new();
    link.read_to_string(&mut got).await.unwrap();
    assert_eq!(got, "node a");
    shutdown.cancel();
    served.await.unwrap();
}

#[tokio::test]
async fn a_member_that_is_removed_loses_its_open_connections() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::create(&dir.path().join("ca"), SystemTime::now()).unwrap();
    let issue = |p: &Principal| Credentials::new(authority.issue(p, SystemTime::now()).unwrap());
    let (a, b) = (Principal::Node("a".parse().unwrap()), Principal::Node("b".parse().unwrap()));
    let removed = Arc::new(std::sync::Mutex::new(None));
    let list = removed.clone();
    let acceptor = Acceptor::new(&issue(&Principal::Volt), Accept::Members, move |peer| {
        if list.lock().unwrap().as_ref() == Some(peer) { Admission::Revoked } else { Admission::Admit }
    })
    .unwrap();
    let shutdown = CancellationToken::new();
    let until = shutdown.clone();
    let changes = async move || lines(stream::once(async { 1 }).chain(stream::pending()), until);
    let (removals, changed) = tokio::sync::watch::channel(());
    let server =
        TlsServer::new(acceptor, Router::new().route("/changes", get(changes)).route("/who", get(who)))
            .with_removals(changed);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = tokio::spawn(server.serve(listener, shutdown.clone()));
    let client = |p: &Principal| {
        let credentials = issue(p);
        Client::new(Target::Tls { address: address.clone(), principal: Principal::Volt, credentials })
    };
    let (client_a, client_b) = (client(&a), client(&b));
    let mut of_a = client_a.stream_lines::<u32>("/changes").await.unwrap();
    let mut of_b = client_b.stream_lines::<u32>("/changes").await.unwrap();
    assert_eq!((of_a.next().await.unwrap().unwrap(), of_b.next().await.unwrap().unwrap()), (1, 1));

    *removed.lock().unwrap() = Some(a);
    removals.send(()).unwrap();
    assert!(matches!(of_a.next().await, Some(Err(ClientError::Lost { .. }))));
    assert!(matches!(client_a.get::<String>("/who").await, Err(ClientError::Connect(_))));
    assert_eq!(client_b.get::<String>("/who").await.unwrap(), b.uri());
    assert!(futures_util::FutureExt::now_or_never(of_b.next()).is_none(), "the stream of another goes on");
    shutdown.cancel();
    served.await.unwrap();
}
