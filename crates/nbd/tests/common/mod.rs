//! Servers for the tests.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(dead_code, unreachable_pub)] // Each test file uses a part of this.

use std::sync::Arc;

use block::Disk;
use nbd::{Export, Exports, Listing, Server};

/// Serves one disk as `disk` and as the default export.
pub struct OneDisk(pub Arc<dyn Disk>);

impl Exports for OneDisk {
    fn open(&self, name: &str) -> Option<Export> {
        ["", "disk"].contains(&name).then(|| Export {
            description: "a disk for tests".to_owned(),
            ..Export::new(Arc::clone(&self.0))
        })
    }

    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: "disk".to_owned(), description: "a disk for tests".to_owned() }]
    }
}

pub fn server(disk: Arc<dyn Disk>) -> Server {
    Server::new(Arc::new(OneDisk(disk)))
}

/// Serves whoever connects, until it is dropped.
pub struct Serving(tokio::task::JoinHandle<()>);

impl Serving {
    pub fn unix(server: Server, listener: tokio::net::UnixListener) -> Serving {
        Serving(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                connections.spawn(async move { server.serve(stream, std::future::pending()).await });
            }
        }))
    }

    pub fn tcp(server: Server, listener: tokio::net::TcpListener) -> Serving {
        Serving(tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let server = server.clone();
                connections.spawn(async move { server.serve(stream, std::future::pending()).await });
            }
        }))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A server on a UNIX socket.
pub struct Listening {
    pub path: std::path::PathBuf,
    _serving: Serving,
}

impl Listening {
    /// Listens in `dir`.
    pub fn start(server: Server, dir: &std::path::Path) -> Listening {
        let path = dir.join("nbd.sock");
        let listener = tokio::net::UnixListener::bind(&path).expect("a fresh directory takes a socket");
        Listening { path, _serving: Serving::unix(server, listener) }
    }

    /// The address in the form that foreign tools take.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display())
    }
}
