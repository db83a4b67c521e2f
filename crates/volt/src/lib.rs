//! Volt, the coordinator: `virtman volt`.
//!
//! Knows who is in the cluster ([`catalog`]), who fetches what from whom ([`cluster`]) and what guests read
//! first ([`profiles`]), and tells all of it over its API ([`routes`]). It is not in the way of data: nodes serve
//! and boot while it is away, they only get no new parents.
//!
//! Crash: the catalog is on disk with every answer; the hierarchy is rebuilt from what nodes report.

mod catalog;
mod cluster;
pub mod config;
pub mod init;
mod kept_profile;
mod profiles;
mod routes;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use block::{BoxFuture, NodeName};
use planner::{Event, Millis, Settings};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::catalog::{Catalog, CatalogError, Joined};
use self::cluster::{Cluster, Notice};
use self::config::VoltArgs;
use self::profiles::Profiles;
use control::daemon::{listen, local_socket};
use control::enroll::{self, Tokens};
use control::http::TlsServer;
use control::refusal::Refusal;
use identity::tls::{Accept, Acceptor, Admission};
use identity::{Authority, Credentials, Identity, JoinRefusal, Principal, SecretHash, Token};

/// How many ticks the planner gets per lease: a dead node is noticed at most this part of a lease late.
const TICKS_PER_LEASE: u32 = 4;

/// Volt with everything that its routes need.
pub(crate) struct Volt {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) profiles: Profiles,
    pub(crate) shutdown: CancellationToken,
    /// Said when a node was removed: what it has open here is closed.
    removals: watch::Sender<()>,
    authority: Arc<Authority>,
    /// Where nodes reach Volt, for join tokens.
    address: String,
}

impl Volt {
    /// Lets the cluster see an event, and records what must outlive this process.
    pub(crate) fn apply(&self, event: Event) -> Vec<Notice> {
        let notices = self.cluster.apply(event);
        for notice in &notices {
            if let Notice::Quarantined(node) = notice
                && let Err(error) = self.catalog.update_node(node, |record| record.quarantined = true)
            {
                tracing::error!(%node, %error, "quarantine_not_recorded: it ends when Volt restarts");
            }
        }
        notices
    }

    /// Takes a node out of the cluster: it is refused from now on, and what it has open is closed.
    fn remove_node(&self, node: &NodeName) -> Result<(), CatalogError> {
        self.catalog.remove_node(node, SystemTime::now())?;
        self.cluster.remove(node);
        self.removals.send_replace(());
        Ok(())
    }

    /// Whether a member with a valid certificate still is one.
    fn admit(&self, peer: &Principal) -> Admission {
        match peer {
            Principal::Volt | Principal::Admin(_) => Admission::Admit,
            Principal::Node(node) => match self.catalog.has_node(node) {
                Ok(true) => Admission::Admit,
                Ok(false) => Admission::Revoked,
                Err(error) => {
                    // Whoever has a certificate was a member; a failing disk must not end the cluster.
                    tracing::error!(%node, %error, "node_not_looked_up: it is not known whether it was removed");
                    Admission::Admit
                }
            },
        }
    }

    fn new_join_token(&self) -> Result<Token, Refusal> {
        Token::new(&self.address, self.authority.ca().fingerprint())
            .map_err(|e| Refusal::internal(e.to_string()))
    }
}

impl Tokens for Volt {
    fn redeem<'a>(
        &'a self,
        secret: &'a SecretHash,
        node: &'a NodeName,
        now: SystemTime,
    ) -> BoxFuture<'a, Result<(), JoinRefusal>> {
        Box::pin(async move {
            let joined = self.catalog.join(secret, node, now);
            if joined.map_err(|e| JoinRefusal::Unavailable(e.to_string()))?? == Joined::Again {
                self.cluster.readmit(node);
            }
            Ok(())
        })
    }
}

/// Runs Volt until it is told to stop.
pub async fn run(dir: &Path, args: &VoltArgs) -> Result<(), String> {
    let shaping = args.shaping().map_err(|e| e.to_string())?;
    let authority = Arc::new(Authority::open(&init::authority_dir(dir)).map_err(|e| e.to_string())?);
    let identity = Identity::load(&init::identity_dir(dir)).map_err(|e| e.to_string())?;
    let address = init::read_address(dir)?;
    let file = dir.join("catalog.redb");
    let catalog = Catalog::open(&file).map_err(|e| format!("cannot open {}: {e}", file.display()))?;
    let catalog = Arc::new(catalog);
    let profiles = Profiles::open(Arc::clone(&catalog)).map_err(|e| e.to_string())?;

    let lease = Millis(u64::try_from(args.lease.as_millis()).unwrap_or(u64::MAX));
    let removed = catalog.removed_nodes().map_err(|e| e.to_string())?;
    let cluster = Cluster::new(Settings { lease, shaping }, args.lease, removed);
    for (node, record) in catalog.nodes().map_err(|e| e.to_string())? {
        if record.quarantined {
            cluster.apply(Event::Quarantine { node });
        }
    }
    for image in catalog.images().map_err(|e| e.to_string())? {
        if image.shaping.is_some() {
            cluster.apply(Event::Tune { image: image.id, shaping: image.shaping });
        }
    }
    let shutdown = CancellationToken::new();
    let (removals, removed) = watch::channel(());
    let volt = Arc::new(Volt {
        catalog,
        cluster,
        profiles,
        shutdown: shutdown.clone(),
        removals,
        authority,
        address,
    });

    let tcp = listen(args.listen).await?;
    let unix = local_socket(&dir.join("api.sock"))?;
    let admit = {
        let volt = Arc::clone(&volt);
        move |peer: &Principal| volt.admit(peer)
    };
    let acceptor = Acceptor::new(&Credentials::new(identity), Accept::MembersAndJoins, admit)
        .map_err(|e| e.to_string())?;
    let (routes, openapi) = routes::routes().merge(profiles::routes::routes()).split_for_parts();
    let api = routes
        .with_state(Arc::clone(&volt))
        .merge(enroll::renew_router(Arc::clone(&volt.authority)))
        .merge(control::api::openapi_router(openapi));
    let join = enroll::join_router(Arc::clone(&volt.authority), Arc::clone(&volt) as _);
    let tls = TlsServer::new(acceptor, api.clone()).with_join(join).with_removals(removed);

    tracing::info!(address = %args.listen, "volt_ready: Volt is ready");
    control::daemon::ready();
    tokio::join!(
        tls.serve(tcp, shutdown.clone()),
        unix.serve(api, shutdown.clone()),
        tick(&volt, args.lease / TICKS_PER_LEASE),
        control::daemon::stop_on_signal(shutdown.clone()),
    );
    tracing::info!("volt_stopped");
    Ok(())
}

/// The OpenAPI document of Volt's API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    routes::routes().to_openapi()
}

/// Lets the planner see time pass.
async fn tick(volt: &Volt, every: Duration) {
    let mut interval = tokio::time::interval(every.max(Duration::from_millis(10)));
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let ticks = async {
        loop {
            interval.tick().await;
            volt.apply(Event::Tick);
        }
    };
    volt.shutdown.run_until_cancelled(ticks).await;
}
