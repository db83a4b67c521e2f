//! NBD: a socket for each disk and image of a node, and all of them on one TCP port.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use block::{BoxFuture, NodeName};
use nbd::{BoxStream, Export, Listing, Server};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Disks, Exported, Protocol};
use crate::nbd_socket::accept_all;
use control::api::export::{ExportAccess, ExportName, ExportProtocol, ExportView};
use control::refusal::Refusal;
use identity::tls::{Accept, Acceptor, Admission};
use identity::{Credentials, Principal};

/// Connections to the port, which carries all exports.
const CONNECTIONS_MAX: usize = 4096;

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
        disks: Disks,
    ) -> Result<TcpExports, String> {
        let listener = TcpListener::bind(address).await.map_err(|e| {
            format!("cannot listen on {address} for NBD: {e}; choose another with --nbd-listen")
        })?;
        let acceptor = Acceptor::new(credentials, Accept::Members, |_| Admission::Admit);
        let acceptor = Arc::new(acceptor.map_err(|e| e.to_string())?);
        let server = Server::new(Arc::new(NodeExports(disks))).with_tls(Arc::new(move |stream| {
            let acceptor = Arc::clone(&acceptor);
            Box::pin(async move {
                let (peer, stream) = acceptor.accept_starttls(stream).await.map_err(io::Error::other)?;
                match peer {
                    Principal::Admin(_) => Ok(Box::new(stream) as BoxStream),
                    other => Err(io::Error::other(format!("{other} is not an administrator"))),
                }
            })
        }));
        Ok(TcpExports { listener, server: Arc::new(server) })
    }

    /// Serves until `shutdown`.
    pub(crate) async fn serve(self, shutdown: CancellationToken) {
        let TcpExports { listener, server } = self;
        accept_all(&listener, server, CONNECTIONS_MAX, shutdown).await;
    }
}

/// Every disk of a node under its name.
struct NodeExports(Disks);

impl nbd::Exports for NodeExports {
    fn open(&self, name: &str) -> Option<Export> {
        if name.contains(':') {
            return Some(self.0.images.by_name(&name.parse().ok()?)?.export(name));
        }
        // A VM's further disks are called after it.
        let vm = name.split_once('+').map_or(name, |(vm, _)| vm);
        let vm = self.0.vms.get(&vm.parse().ok()?).ok()?;
        let disk = vm.disks().iter().find(|disk| disk.name() == name)?;
        Some(Export { description: name.to_owned(), ..Export::new(Arc::clone(&disk.io) as _) })
    }

    fn list(&self) -> Vec<Listing> {
        let images = self.0.images.all().into_iter().flat_map(|image| image.names());
        let listing = |name: String| Listing { name, description: String::new() };
        let all = self.0.vms.all();
        let disks = all.iter().flat_map(|vm| vm.disks()).map(|disk| disk.name().to_owned());
        disks.chain(images.map(|name| name.to_string())).map(listing).collect()
    }
}

/// NBD as a protocol of exports: every disk and image has a socket, from when it is there until it is gone.
pub(crate) struct NbdExports {
    node: NodeName,
    disks: Disks,
}

impl NbdExports {
    /// Those of these disks.
    pub(crate) fn new(node: NodeName, disks: Disks) -> NbdExports {
        NbdExports { node, disks }
    }

    fn view(&self, name: ExportName, read_only: bool, address: String) -> ExportView {
        ExportView {
            name,
            node: self.node.clone(),
            protocol: ExportProtocol::Nbd,
            read_only,
            addresses: vec![address],
            target: None,
            initiators: Vec::new(),
            authentication: "none".to_owned(),
            sessions: Vec::new(),
        }
    }
}

impl Protocol for NbdExports {
    fn protocol(&self) -> ExportProtocol {
        ExportProtocol::Nbd
    }

    fn check(&self, _: &ExportName, _: &ExportAccess) -> Result<(), Refusal> {
        Ok(())
    }

    fn start<'a>(
        &'a self,
        name: &'a ExportName,
        _: ExportAccess,
        _: Exported,
    ) -> BoxFuture<'a, Result<ExportView, Refusal>> {
        Box::pin(async move {
            let view = self.describe().into_iter().find(|view| view.name == *name);
            view.ok_or_else(|| Refusal::internal(format!("'{name}' was removed meanwhile")))
        })
    }

    fn stop<'a>(&'a self, _: &'a ExportName) -> BoxFuture<'a, Result<bool, Refusal>> {
        Box::pin(async { Ok(false) })
    }

    fn describe(&self) -> Vec<ExportView> {
        let vms = self.disks.vms.all().into_iter().map(|vm| self.disks.vms.describe(&vm));
        let images = self.disks.images.all().into_iter().flat_map(|attached| {
            let names = attached.names().into_iter();
            names.map(|name| (self.disks.images.export_uri(&name), name)).collect::<Vec<_>>()
        });
        let vms = vms.map(|vm| self.view(ExportName::Vm(vm.name), false, vm.disk));
        vms.chain(images.map(|(uri, name)| self.view(ExportName::Image(name), true, uri))).collect()
    }

    fn keeps(&self, _: &ExportName) -> bool {
        false
    }

    fn restore(&self, _: &Disks) -> io::Result<()> {
        Ok(())
    }
}
