//! NBD sockets: one disk each, for whoever on this host opens it.
//!
//! A socket's task ends, and its file goes, when its [`NbdSocket`] is dropped. Connections in service then end too;
//! hypervisors reconnect when the socket is back.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::Disk;
use nbd::{Export, Exports, Lease, Listing, Server};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

use identity::tls;

/// Connections to one socket at a time. A hypervisor opens one to a few; backup tools up to 16.
const CONNECTIONS_MAX: usize = 64;

/// Pause after a connection could not be accepted: descriptors are short, and others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket with one disk behind it.
pub(crate) struct NbdSocket {
    path: PathBuf,
    _stop: DropGuard,
}

impl NbdSocket {
    /// Listens at `path`, in place of whatever socket an earlier run left there.
    pub(crate) fn open(
        path: PathBuf,
        name: String,
        disk: Arc<dyn Disk>,
        clients: Clients,
    ) -> io::Result<NbdSocket> {
        remove_if_there(&path)?;
        let listener = UnixListener::bind(&path)?;
        let stop = CancellationToken::new();
        let server = Arc::new(Server::new(Arc::new(OneExport { name, disk, clients })));
        let stopped = stop.clone();
        tokio::spawn(async move {
            accept_all(&listener, server, CONNECTIONS_MAX, stopped).await;
        });
        Ok(NbdSocket { path, _stop: stop.drop_guard() })
    }

    /// The NBD URI of the disk `name` at a socket.
    pub(crate) fn uri(path: &Path, name: &str) -> String {
        // Both parts come from allow-listed names and the node's directory; only the latter may hold
        // characters that a URI reserves.
        format!("nbd+unix:///{name}?socket={}", escape_path(path))
    }
}

impl Drop for NbdSocket {
    fn drop(&mut self) {
        if let Err(error) = remove_if_there(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket_not_removed");
        }
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn escape_path(path: &Path) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-~+:@".contains(&b);
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.iter().map(|&b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Counts the connections that have something open.
#[derive(Clone, Default)]
pub(crate) struct Clients(Arc<AtomicUsize>);

/// One of them.
struct Client(Arc<AtomicUsize>);

impl Clients {
    /// Counts one more until the answer is dropped.
    pub(crate) fn enter(&self) -> Lease {
        self.0.fetch_add(1, Ordering::AcqRel);
        Arc::new(Client(Arc::clone(&self.0)))
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Acquire)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A socket that gives connections.
pub(crate) trait Listen {
    type Stream: nbd::Stream + 'static;

    fn connection(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listen for UnixListener {
    type Stream = UnixStream;

    async fn connection(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

impl Listen for TcpListener {
    type Stream = TcpStream;

    async fn connection(&self) -> io::Result<TcpStream> {
        let (stream, _) = self.accept().await?;
        tls::prepare(&stream)?;
        Ok(stream)
    }
}

/// Serves each connection to `listener`, `places` at a time, until `stop`.
pub(crate) async fn accept_all(
    listener: &impl Listen,
    server: Arc<Server>,
    places: usize,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(places));
    let serve_all = async {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.connection().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "connection_not_accepted: NBD");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (server, stop) = (Arc::clone(&server), stop.clone());
            tokio::spawn(async move {
                let _place = place;
                if let Err(error) = server.serve(stream, stop.cancelled()).await {
                    tracing::debug!(%error, "an NBD connection ended");
                }
            });
        }
    };
    stop.run_until_cancelled(serve_all).await;
}

/// One disk, under its name and as the default export.
struct OneExport {
    name: String,
    disk: Arc<dyn Disk>,
    clients: Clients,
}

impl Exports for OneExport {
    fn open(&self, name: &str) -> Option<Export> {
        let known = name.is_empty() || name == self.name;
        known.then(|| Export {
            disk: Arc::clone(&self.disk),
            description: self.name.clone(),
            lease: Some(self.clients.enter()),
        })
    }

    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: self.name.clone(), description: String::new() }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_with_reserved_characters_is_escaped_in_the_uri() {
        let uri = NbdSocket::uri(Path::new("/srv/a b?&/vm.sock"), "vm");
        assert_eq!(uri, "nbd+unix:///vm?socket=/srv/a%20b%3F%26/vm.sock");
    }

    #[test]
    fn connections_are_counted_while_they_last() {
        let clients = Clients::default();
        let (one, other) = (clients.enter(), clients.enter());
        assert_eq!(clients.count(), 2);
        drop(one);
        assert_eq!(clients.count(), 1);
        drop(other);
        assert_eq!(clients.count(), 0);
    }
}
