//! A node: `virtman compute`.
//!
//! Attaches images ([`images`]), fetches what guests read first ahead of them ([`profile`]) and all the rest if
//! that is wanted ([`fill`]), detaches what nobody uses ([`unused`], [`departing`]), gives VMs disks
//! and runs guests ([`vms`]), keeps their disks' layers ([`layers`], [`snapshots`], [`clones`], [`merge`], [`settle`],
//! [`qcow2`]), moves VMs ([`migrate`]), keeps what was fetched ([`cache`]), exports disks and images ([`exports`],
//! [`iscsi`]), serves children over links, and
//! keeps in touch with Volt ([`volt`]). All of its state is on disk ([`files`]): killed at any moment and started again,
//! it has the same images, disks and exports under the same names, and its guests never noticed more than latency.

mod cache;
mod carried;
mod clones;
pub mod config;
mod departing;
mod details;
mod entry;
mod exports;
#[cfg(feature = "faults")]
pub mod fault;
mod files;
mod fill;
mod images;
mod iscsi;
mod layers;
mod merge;
mod migrate;
mod node;
mod profile;
mod qcow2;
pub mod remote;
mod routes;
mod settle;
mod snapshots;
mod unused;
mod vms;
mod volt;

pub use self::unused::{Destroy, KeepWarm};

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
use self::exports::TcpExports;
use self::files::Layout;
use self::images::Images;
use self::iscsi::{IscsiExports, Portals};
use self::layers::Layers;
use self::migrate::IncomingVms;
use self::node::Node;
use self::remote::RemoteDisks;
use self::vms::Vms;
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

    let cache = CacheMedia::open(&name, &layout, &args.cache)?;
    let links = Arc::new(Stats::default());
    let removed = Arc::new(Removed::default());
    let dialer = TlsDialer { credentials: Arc::clone(&credentials), removed: Arc::clone(&removed) };
    let (uplinks, reports) =
        Uplinks::new(name.clone(), Arc::new(dialer), Arc::clone(&links), args.fetch_settings());
    let (records, recorded) = mpsc::channel(RECORDS_WAITING_MAX);
    let remotes = Arc::new(RemoteDisks::new(layout.remotes()));
    let group = Arc::clone(cache.group());
    let images = Images::new(layout.clone(), group, uplinks, Arc::clone(&remotes), records, args.keep_warm);
    let images = Arc::new(images);
    let restored = |e: io::Error| format!("cannot read the node's state in {}: {e}", layout.dir().display());
    images.restore().map_err(restored)?;
    let synced = layout.sync_records();
    if let Err(error) = &synced {
        tracing::error!(dir = %layout.dir().display(), %error, "records cannot be made durable");
    }
    let layers = Arc::new(Layers::open(layout.layers(), Arc::clone(&images)).map_err(restored)?);
    let vms = Vms::new(name.clone(), layout.clone(), Arc::clone(&layers));
    images.layers.are_in(&layers);
    let derived_from = images.derived_from();
    if let Err(reason) = &derived_from {
        tracing::error!(reason, "what an image was derived from is not known");
    }
    let complete = synced.is_ok() && derived_from.is_ok();
    for layer in derived_from.into_iter().flatten() {
        layers.hold(layer);
    }
    let found = vms.restore().await.map_err(restored)?;
    layers.sweep(complete && found.complete);
    let incoming = IncomingVms::default();
    for coming in found.incoming {
        let name = coming.record.name.clone();
        match vms.open_incoming(coming.record) {
            Ok((entry, guest)) => incoming.restore(coming.from, entry, guest),
            Err(reason) => tracing::error!(vm = %name, reason, "a VM that was coming cannot be opened"),
        }
    }

    let tcp = listen(args.listen).await?;
    let unix = local_socket(&layout.api_socket())?;
    let listening = tcp.local_addr().map_err(|e| e.to_string())?;
    let address = advertised(args, listening)?;
    let portals = Portals::listen(&args.iscsi_listen).await?;
    let iscsi = IscsiExports::new(name.clone(), &address, &layout, &portals)?;
    iscsi.restore(&node::Disks { images: &images, vms: &vms }).map_err(restored)?;
    let volt = VoltLink::new(name.clone(), volt_address, Arc::clone(&credentials), Arc::clone(&removed));
    let accel = args.accel.parse()?;
    let node = Arc::new(Node {
        name: name.clone(),
        address: address.clone(),
        images_dir: layout.images(),
        cache,
        links: Arc::clone(&links),
        images: Arc::clone(&images),
        vms,
        iscsi,
        volt,
        accel,
        credentials: Arc::clone(&credentials),
        incoming,
        landing: tokio::sync::Mutex::new(()),
        shutdown: shutdown.clone(),
    });

    let changes = removed.changes();
    let acceptor = Acceptor::new(&credentials, Accept::Members, move |peer| removed.admit(peer))
        .map_err(|e| e.to_string())?;
    let (routes, openapi) = routes::routes().split_for_parts();
    let api = routes.with_state(Arc::clone(&node)).merge(control::api::openapi_router(openapi));
    let on_link = serve_children(
        name.clone(),
        Arc::clone(&images),
        links,
        #[cfg(feature = "faults")]
        args.fault,
    );
    let server = TlsServer::new(acceptor, api.clone())
        .with_link(on_link)
        .with_moves(migrate::on_move(Arc::clone(&node)))
        .with_removals(changes);
    let nbd = match args.nbd_listen {
        Some(address) => Some(TcpExports::listen(address, &credentials, Arc::clone(&node)).await?),
        None => None,
    };

    tracing::info!(node = %name, address, "node is ready");
    control::daemon::ready();
    let introduction = Introduction { address, location: args.location.clone() };
    let identity_dir = layout.identity();
    let background = async {
        tokio::join!(
            node.volt.run(&introduction, &images),
            node.volt.report(reports),
            node.volt.hand_in(recorded),
            node.volt.renew(&credentials, &identity_dir),
            merge::run(&node.vms),
            settle::run(&node),
            node.ask_for_incoming(),
            migrate::hand_over_moved(&node),
            unused::run(&node),
            async {
                loop {
                    tokio::time::sleep(node::PASSING_CHECK).await;
                    node.remove_passed().await;
                }
            },
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
        portals.serve(&node.iscsi, shutdown.clone()),
        control::daemon::stop_on_signal(shutdown.clone()),
    );
    node.cache.group().settled().await;
    tracing::info!("node has stopped; guests run on and reconnect when it is back");
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
    tracing::info!(node = %name, "joined the cluster");
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
                tracing::warn!(%peer, "refused a link: only nodes fetch chunks");
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
