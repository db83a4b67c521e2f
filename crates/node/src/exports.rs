//! Exports: every VM disk and every attached image behind an NBD socket of its own.
//!
//! A socket's task ends, and its file goes, when its [`ExportSocket`] is dropped. Connections in service
//! then end too; hypervisors reconnect when the socket is back.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{Access, BoxFuture, Disk, DiskError, Extent, TryIo};
use nbd::{BoxStream, Export, Exports, Listing, Server};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::node::Node;
use control::api::details::DiskIo;
use control::api::now_unix_ms;
use identity::tls::{self, Accept, Acceptor, Admission};
use identity::{Credentials, Principal};

/// Connections to one socket at a time. A hypervisor opens one to a few; backup tools up to 16.
const CONNECTIONS_MAX: usize = 64;

/// Connections to the TCP port, which carries all exports.
const TCP_CONNECTIONS_MAX: usize = 4096;

/// Pause after a connection could not be accepted: descriptors are short, and others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket with one disk behind it.
pub(crate) struct ExportSocket {
    path: PathBuf,
    _stop: DropGuard,
}

impl ExportSocket {
    /// Listens at `path`, in place of whatever socket an earlier run left there.
    pub(crate) fn open(path: PathBuf, name: String, disk: Arc<dyn Disk>) -> io::Result<ExportSocket> {
        remove_if_there(&path)?;
        let listener = UnixListener::bind(&path)?;
        let stop = CancellationToken::new();
        let server = Arc::new(Server::new(Arc::new(OneExport { name, disk })));
        let stopped = stop.clone();
        tokio::spawn(async move {
            accept_all(&listener, server, CONNECTIONS_MAX, stopped).await;
        });
        Ok(ExportSocket { path, _stop: stop.drop_guard() })
    }

    /// The NBD URI of the disk `name` at a socket.
    pub(crate) fn uri(path: &Path, name: &str) -> String {
        // Both parts come from allow-listed names and the node's directory; only the latter may hold
        // characters that a URI reserves.
        format!("nbd+unix:///{name}?socket={}", escape_path(path))
    }
}

impl Drop for ExportSocket {
    fn drop(&mut self) {
        if let Err(error) = remove_if_there(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove an export's socket");
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

/// A socket that gives connections.
trait Listen {
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
async fn accept_all(listener: &impl Listen, server: Arc<Server>, places: usize, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(places));
    let serve_all = async {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.connection().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an NBD connection");
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
}

impl Exports for OneExport {
    fn open(&self, name: &str) -> Option<Export> {
        let known = name.is_empty() || name == self.name;
        known.then(|| Export { disk: Arc::clone(&self.disk), description: self.name.clone() })
    }

    fn list(&self) -> Vec<Listing> {
        vec![Listing { name: self.name.clone(), description: String::new() }]
    }
}

/// All disks and images of a node on one TCP port, with TLS and certificates of the cluster.
pub(crate) struct TcpExports {
    listener: TcpListener,
    server: Arc<Server>,
}

impl TcpExports {
    /// Listens on `address`. VM disks go by `NAME`, images by `NAME:TAG`: no VM's name has a colon.
    pub(crate) async fn listen(
        address: SocketAddr,
        credentials: &Arc<Credentials>,
        node: Arc<Node>,
    ) -> Result<TcpExports, String> {
        let listener = TcpListener::bind(address).await.map_err(|e| {
            format!("cannot listen on {address} for NBD: {e}; choose another with --nbd-listen")
        })?;
        let acceptor = Acceptor::new(credentials, Accept::Members, |_| Admission::Admit);
        let acceptor = Arc::new(acceptor.map_err(|e| e.to_string())?);
        let server = Server::new(Arc::new(NodeExports { node })).with_tls(Arc::new(move |stream| {
            let acceptor = Arc::clone(&acceptor);
            Box::pin(async move {
                let (peer, stream) = acceptor.accept_starttls(stream).await.map_err(io::Error::other)?;
                match peer {
                    Principal::Admin(_) => Ok(Box::new(stream) as BoxStream),
                    other => Err(io::Error::other(format!("{other} is no administrator"))),
                }
            })
        }));
        Ok(TcpExports { listener, server: Arc::new(server) })
    }

    /// Serves until `shutdown`.
    pub(crate) async fn serve(self, shutdown: CancellationToken) {
        let TcpExports { listener, server } = self;
        accept_all(&listener, server, TCP_CONNECTIONS_MAX, shutdown).await;
    }
}

/// Every disk of a node under its name.
struct NodeExports {
    node: Arc<Node>,
}

impl Exports for NodeExports {
    fn open(&self, name: &str) -> Option<Export> {
        let disk: Arc<dyn Disk> = if name.contains(':') {
            Arc::clone(&self.node.images.by_name(&name.parse().ok()?)?.exported) as _
        } else {
            self.node.vms.disk(&name.parse().ok()?)?
        };
        Some(Export { disk, description: name.to_owned() })
    }

    fn list(&self) -> Vec<Listing> {
        let images = self.node.images.all().into_iter().flat_map(|image| image.names());
        let listing = |name: String| Listing { name, description: String::new() };
        let vms = self.node.vms.all().into_iter().map(|vm| vm.name().to_string());
        vms.chain(images.map(|name| name.to_string())).map(listing).collect()
    }
}

/// A disk that counts what is done with it, and notes when it was first read since it was last asked to: the moment
/// at which a booting guest's firmware reached it.
pub(crate) struct WatchedDisk<D> {
    disk: D,
    /// 0 while the first read is awaited, [`NOT_AWAITED`] until then.
    first_read_unix_ms: AtomicU64,
    counts: Counts,
}

/// Instead of the time of the first read: a disk that is opened after a restart has a guest that read it before.
const NOT_AWAITED: u64 = u64::MAX;

/// Each is exact by itself; together they are as good as a glance.
#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    clears: AtomicU64,
    flushes: AtomicU64,
}

fn add(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

impl<D: Disk> WatchedDisk<D> {
    pub(crate) fn new(disk: D) -> Self {
        WatchedDisk { disk, first_read_unix_ms: AtomicU64::new(NOT_AWAITED), counts: Counts::default() }
    }

    /// The disk below.
    pub(crate) fn inner(&self) -> &D {
        &self.disk
    }

    /// What was done with it so far.
    pub(crate) fn io(&self) -> DiskIo {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskIo {
            reads: get(&self.counts.reads),
            read_bytes: get(&self.counts.read_bytes),
            writes: get(&self.counts.writes),
            written_bytes: get(&self.counts.written_bytes),
            clears: get(&self.counts.clears),
            flushes: get(&self.counts.flushes),
        }
    }

    /// Takes the next read for the first.
    pub(crate) fn await_first_read(&self) {
        self.first_read_unix_ms.store(0, Ordering::Relaxed);
    }

    /// When the disk was first read, in milliseconds since the UNIX epoch.
    pub(crate) fn first_read_unix_ms(&self) -> Option<u64> {
        Some(self.first_read_unix_ms.load(Ordering::Relaxed)).filter(|&ms| ms > 0 && ms != NOT_AWAITED)
    }

    fn note_read(&self) {
        if self.first_read_unix_ms.load(Ordering::Relaxed) == 0 {
            self.first_read_unix_ms.store(now_unix_ms(), Ordering::Relaxed);
        }
    }

    fn count_read(&self, len: usize) {
        add(&self.counts.reads, 1);
        add(&self.counts.read_bytes, len);
    }

    fn count_write(&self, len: usize) {
        add(&self.counts.writes, 1);
        add(&self.counts.written_bytes, len);
    }
}

impl<D: Disk> Disk for WatchedDisk<D> {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn access(&self) -> Access {
        self.disk.access()
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.note_read();
        let now = self.disk.try_read(offset, buf)?;
        // One that has to wait is asked for again.
        if now == TryIo::Done {
            self.count_read(buf.len());
        }
        Ok(now)
    }

    fn try_write(&self, offset: u64, data: &[u8]) -> Result<TryIo, DiskError> {
        let now = self.disk.try_write(offset, data)?;
        if now == TryIo::Done {
            self.count_write(data.len());
        }
        Ok(now)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.note_read();
        self.count_read(buf.len());
        self.disk.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.count_write(data.len());
        self.disk.write(offset, data)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.clears, 1);
        self.disk.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.clears, 1);
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        add(&self.counts.flushes, 1);
        self.disk.flush()
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        self.disk.extents(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_with_reserved_characters_is_escaped_in_the_uri() {
        let uri = ExportSocket::uri(Path::new("/srv/a b?&/vm.sock"), "vm");
        assert_eq!(uri, "nbd+unix:///vm?socket=/srv/a%20b%3F%26/vm.sock");
    }
}
