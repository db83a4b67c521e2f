//! A node: `virtman compute`.
//!
//! From below: [`state`] says where it keeps what; [`images`] are attached, fetched and served; [`layers`] are what
//! [`disks`] are made of; [`vms`] have disks, snapshots and guests; [`exports`] let others open them; [`service`] and
//! [`migration`] are what a node does when it is asked, by way of [`routes`]. [`volt`] keeps in touch with Volt, and
//! [`cache`] keeps what was fetched. Each knows those below it and none above.
//!
//! All state is on disk: killed at any moment and started again, a node has the same images, disks and exports under
//! the same names, and its guests never noticed more than latency. [`start`] says in which order it comes back.

mod cache;
pub mod config;
mod disks;
mod exports;
#[cfg(feature = "faults")]
pub mod fault;
mod images;
mod layers;
mod migration;
mod nbd_socket;
mod node;
mod restore;
mod routes;
mod service;
mod start;
mod state;
mod tasks;
mod vms;
mod volt;

pub use self::images::origins::location_of as remote_location;
pub use self::images::retention::{Destroy, IdleTimeout};

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use block::{BoxFuture, NodeName};
use link::{Dial, ParentAddr, ScopedStats, Stats, Stream, Uplinks};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::cache::CacheMedia;
use self::config::ComputeArgs;
use self::exports::{Disks, Exports, IscsiExports, NbdExports, Portals, TcpExports};
use self::images::origins::RemoteDisks;
use self::images::{Images, LocalImages, Surroundings};
use self::migration::source::OutgoingVms;
use self::migration::target::IncomingVms;
use self::migration::{Peers, source, target};
use self::node::Node;
use self::service::clones::Clones;
use self::service::details::{Details, Sources};
use self::service::idle::IdleImages;
use self::service::images::ImageService;
use self::service::origins::OriginService;
use self::service::qcow2::Qcow2Files;
use self::service::vms::VmService;
use self::start::Started;
use self::state::Layout;
use self::vms::Vms;
use self::vms::guests::Guests;
use self::vms::snapshots::Snapshots;
use self::volt::{Introduction, VoltLink};
use control::daemon::{listen, local_socket};
use control::http::{OnConnection, TlsServer};
use control::{VOLT_ADDRESS_FILE, enroll};
use identity::tls::{self, Accept, Acceptor, Admission, Alpn, Expected};
use identity::{Credentials, Identity, IdentityError, Principal, Removed, Token};
use store::durable::{Secrecy, replace};

/// Records of boots that wait for Volt: as many as it keeps of an image. Further ones are dropped.
const RECORDS_WAITING_MAX: usize = 8;

/// Runs a node until it is told to stop.
pub async fn run(dir: &Path, args: &ComputeArgs) -> Result<(), String> {
    let layout = Layout::create(dir)?;
    let _lock = layout.lock()?;
    let identity = identity(&layout, args).await?;
    let Principal::Node(name) = identity.principal().clone() else {
        return Err(format!("{} holds no node's identity", layout.identity().display()));
    };
    let volt_address = read_volt_address(&layout)?;
    let credentials = Credentials::new(identity);
    let shutdown = CancellationToken::new();
    let accel = args.accel.parse()?;

    let cache = Arc::new(CacheMedia::open(&name, &layout, &args.cache)?);
    let links = Arc::new(Stats::default());
    let removed = Arc::new(Removed::default());
    let dialer = TlsDialer { credentials: Arc::clone(&credentials), removed: Arc::clone(&removed) };
    let (uplinks, reports) =
        Uplinks::new(name.clone(), Arc::new(dialer), Arc::clone(&links), args.fetch_settings());
    let (records, recorded) = mpsc::channel(RECORDS_WAITING_MAX);
    let surroundings = Surroundings {
        layout: layout.clone(),
        cache: Arc::clone(cache.group()),
        uplinks,
        records,
        idle_timeout: args.keep_warm,
    };
    let remotes = Arc::new(RemoteDisks::new(layout.remotes()));
    let images = |layers| Images::new(surroundings, LocalImages::new(layout.images(), remotes, layers));
    let restored = |e: io::Error| format!("cannot read the node's state in {}: {e}", layout.dir().display());
    let started = Started::open(&layout, images).map_err(restored)?;
    let layers = Arc::clone(started.layers());

    let vms = Arc::new(Vms::new(name.clone(), layout.clone(), Arc::clone(&layers)));
    let guests = Arc::new(Guests::new(Arc::clone(&vms), accel));
    let snapshots = Arc::new(Snapshots::new(Arc::clone(&vms)));
    let tcp = listen(args.listen).await?;
    let unix = local_socket(&layout.api_socket())?;
    let listening = tcp.local_addr().map_err(|e| e.to_string())?;
    let address = advertised(args, listening)?;
    let portals = Portals::listen(&args.iscsi_listen).await?;
    let disks = Disks { images: Arc::clone(layers.images()), vms: Arc::clone(&vms) };
    let iscsi = Arc::new(IscsiExports::new(name.clone(), &address, &layout, &portals)?);
    let nbd = Arc::new(NbdExports::new(name.clone(), disks.clone()));
    let exports = Arc::new(Exports::new(disks.clone(), vec![nbd, Arc::clone(&iscsi) as _]));
    let volt = VoltLink::new(name.clone(), volt_address, Arc::clone(&credentials), Arc::clone(&removed));
    let volt = Arc::new(volt);
    let images = ImageService::new(name.clone(), Arc::clone(&vms), Arc::clone(&exports), Arc::clone(&volt));
    let images = Arc::new(images);
    let origins = Arc::new(OriginService::new(Arc::clone(&images), Arc::clone(&layers)));
    let idle = Arc::new(IdleImages::new(Arc::clone(&images)));
    let clones =
        Clones::new(Arc::clone(&images), Arc::clone(&origins), Arc::clone(&vms), Arc::clone(&snapshots));
    let clones = Arc::new(clones);
    let vm_service = VmService::new(
        Arc::clone(&vms),
        Arc::clone(&exports),
        Arc::clone(&images),
        Arc::clone(&idle),
        Arc::clone(&clones),
    );
    let vm_service = Arc::new(vm_service);
    let peers = Peers::new(Arc::clone(&credentials));
    let leaving = source::Services {
        snapshots: Arc::clone(&snapshots),
        clones: Arc::clone(&clones),
        origins: Arc::clone(&origins),
        exports: Arc::clone(&exports),
        peers: peers.clone(),
    };
    let outgoing = Arc::new(OutgoingVms::new(name.clone(), Arc::clone(&vms), leaving));
    let coming = target::Services {
        node: name.clone(),
        vms: Arc::clone(&vms),
        guests: Arc::clone(&guests),
        snapshots: Arc::clone(&snapshots),
        images: Arc::clone(&images),
        clones: Arc::clone(&clones),
        peers,
    };
    let incoming = Arc::new(IncomingVms::new(coming));
    let started = started.restore_images().map_err(restored)?;
    let started = started.restore_vms(&vms, &guests, &outgoing, &incoming).await.map_err(restored)?;
    let started = started.restore_exports(&exports).map_err(restored)?;

    let sources = Sources {
        snapshots: Arc::clone(&snapshots),
        images: Arc::clone(&images),
        exports: Arc::clone(&exports),
        cache: Arc::clone(&cache),
        links: Arc::clone(&links),
    };
    let qcow2 = Qcow2Files::new(
        Arc::clone(&snapshots),
        Arc::clone(&images),
        Arc::clone(&vm_service),
        Arc::clone(&exports),
    );
    let node = Arc::new(Node {
        name: name.clone(),
        cache: Arc::clone(&cache),
        images: Arc::clone(&images),
        origins: Arc::clone(&origins),
        vms: Arc::clone(&vms),
        vm_service,
        guests,
        snapshots: Arc::clone(&snapshots),
        clones,
        qcow2,
        exports,
        incoming: Arc::clone(&incoming),
        outgoing: Arc::clone(&outgoing),
        details: Details::new(name.clone(), address.clone(), vms, sources),
        shutdown: shutdown.clone(),
    });
    let changes = removed.changes();
    let acceptor = Acceptor::new(&credentials, Accept::Members, move |peer| removed.admit(peer))
        .map_err(|e| e.to_string())?;
    let (routes, openapi) = routes::routes().split_for_parts();
    let api = routes.with_state(node).merge(control::api::openapi_router(openapi));
    let on_link = serve_children(
        name.clone(),
        Arc::clone(layers.images()),
        links,
        #[cfg(feature = "faults")]
        args.fault,
    );
    let server = TlsServer::new(acceptor, api.clone())
        .with_link(on_link)
        .with_moves(target::on_move(Arc::clone(&incoming)))
        .with_removals(changes);
    let nbd = match args.nbd_listen {
        Some(address) => Some(TcpExports::listen(address, &credentials, disks).await?),
        None => None,
    };

    tracing::info!(node = %name, address, "node_ready: node is ready");
    started.announce();
    let introduction = Introduction { address, location: args.location.clone() };
    let identity_dir = layout.identity();
    let background = async {
        tokio::join!(
            volt.run(&introduction, layers.images()),
            volt.report(reports),
            volt.hand_in(recorded),
            volt.renew(&credentials, &identity_dir),
            vms::merge::run(&layers, &snapshots),
            layers::rebase::run(&layers),
            incoming.run(),
            outgoing.run(),
            idle.run(),
            origins.run(),
        );
    };
    tokio::join!(
        server.serve(tcp, shutdown.clone()),
        unix.serve(api, shutdown.clone()),
        shutdown.run_until_cancelled(background),
        async {
            if let Some(nbd) = nbd {
                nbd.serve(shutdown.clone()).await;
            }
        },
        portals.serve(&iscsi, shutdown.clone()),
        control::daemon::stop_on_signal(shutdown.clone()),
    );
    cache.group().settled().await;
    tracing::info!("node_stopped: guests run on and reconnect when it is back");
    Ok(())
}

/// This node's identity, which a join token brings the first time.
async fn identity(layout: &Layout, args: &ComputeArgs) -> Result<Identity, String> {
    let dir = layout.identity();
    match Identity::load(&dir) {
        Ok(identity) => return Ok(identity),
        Err(IdentityError::Missing { .. }) => {}
        Err(error) => return Err(error.to_string()),
    }
    let token = args.join.as_ref().ok_or(
        "this node belongs to no cluster yet: get a token with 'virtman volt token' on Volt's host, and give it with --join",
    )?;
    let token: Token = token.parse().map_err(|e| format!("--join: {e}"))?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => host_name()?,
    };
    let identity = enroll::join(&token, &name).await.map_err(|e| format!("cannot join as '{name}': {e}"))?;
    // Where Volt is comes first: an identity without it would be of no use, and the token is gone.
    let address = format!("{}\n", token.address());
    replace(&layout.dir().join(VOLT_ADDRESS_FILE), address.as_bytes(), Secrecy::Public)
        .map_err(|e| format!("cannot write Volt's address: {e}"))?;
    identity.save(&dir).map_err(|e| e.to_string())?;
    tracing::info!(node = %name, "cluster_joined");
    Ok(identity)
}

fn host_name() -> Result<NodeName, String> {
    let uname = rustix::system::uname();
    let name = uname.nodename().to_string_lossy();
    name.parse().map_err(|e| format!("this host's name cannot be its node's: {e}; give one with --name"))
}

fn read_volt_address(layout: &Layout) -> Result<String, String> {
    let file = layout.dir().join(VOLT_ADDRESS_FILE);
    let text = fs::read_to_string(&file)
        .map_err(|e| format!("cannot read Volt's address from {}: {e}", file.display()))?;
    Ok(text.trim().to_owned())
}

/// Where others reach this node.
fn advertised(args: &ComputeArgs, listening: SocketAddr) -> Result<String, String> {
    match &args.advertise {
        Some(address) if address.ends_with(":0") => {
            Ok(format!("{}:{}", address.trim_end_matches(":0"), listening.port()))
        }
        Some(address) => Ok(address.clone()),
        None if listening.ip().is_unspecified() => {
            let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
            if host.is_empty() {
                return Err(
                    "this host has no name: say with --advertise where other nodes reach it".to_owned()
                );
            }
            Ok(format!("{host}:{}", listening.port()))
        }
        None => Ok(listening.to_string()),
    }
}

/// Serves the link connections of other nodes. Nobody else gets a chunk.
fn serve_children(
    own: NodeName,
    images: Arc<Images>,
    links: Arc<Stats>,
    #[cfg(feature = "faults")] fault: Option<fault::Fault>,
) -> OnConnection {
    Arc::new(move |peer, stream| {
        let (own, images, links) = (own.clone(), Arc::clone(&images), Arc::clone(&links));
        Box::pin(async move {
            let Principal::Node(child) = peer else {
                tracing::warn!(%peer, "link_refused: only nodes fetch chunks");
                return;
            };
            #[cfg(feature = "faults")]
            let stream = fault::Faulty { stream, fault };
            if let Err(error) =
                link::serve(stream, &own, child.clone(), images, ScopedStats::under(&links)).await
            {
                tracing::debug!(%child, %error, "a link ended");
            }
        })
    })
}

/// Dials parents over the cluster's TLS, unless they were removed.
struct TlsDialer {
    credentials: Arc<Credentials>,
    removed: Arc<Removed>,
}

impl Dial for TlsDialer {
    fn dial<'a>(&'a self, parent: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move {
            let principal = Principal::Node(parent.node.clone());
            if self.removed.admit(&principal) == Admission::Revoked {
                return Err(io::Error::other(format!("{principal} was removed from the cluster")));
            }
            let expected = Expected::Member { credentials: Arc::clone(&self.credentials), principal };
            let stream =
                tls::connect(&parent.address, &expected, Alpn::Link).await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}
