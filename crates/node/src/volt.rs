//! A node's side of its connection to Volt.
//!
//! Consistency: what Volt says last is what counts. Placements arrive as pushes on one long answer, which
//! begins with all of them. Retries: for ever, with a growing pause; a node whose Volt is away serves and
//! boots what it has attached. After each reconnect the node registers, says what it has attached and
//! whom it fetches it from, so that a Volt that forgot everything learns the hierarchy as it is.
//! Cancellation: dropping a request leaves it to Volt whether it acted; all of them may be repeated.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use block::{Backoff, ImageId, ImageName, NodeName};
use futures_util::StreamExt;
use image::BootProfile;
use link::Report;
use planner::{Location, Placement, Role};
use serde::Serialize;
use tokio::sync::mpsc;

use crate::images::{Attached, Images};
use control::api::profile::{NewProfile, ProfileFile};
use control::api::volt::{
    AttachImage, Attachment, DetachImage, ImageRecord, NodeReport, Push, RegisterImage, RegisterNode,
    Registered, TreeNode, TreeView,
};
use control::enroll;
use control::http::{Client, ClientError, Target};
use control::refusal::{Code, Refusal};
use identity::{Credentials, Principal, Removed};

/// First pause before Volt is tried again; doubles up to the longest. A restart takes Volt a second.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(3);

/// Heartbeats per lease: two may be lost.
const BEATS_PER_LEASE: u32 = 3;

/// How often it is looked whether the certificate must be renewed.
const RENEWAL_CHECK: Duration = Duration::from_secs(3600);

/// What a node says of itself.
pub(crate) struct Introduction {
    pub(crate) address: String,
    pub(crate) location: Location,
}

/// The way to Volt.
pub(crate) struct VoltLink {
    node: NodeName,
    client: Client,
    connected: AtomicBool,
    removed: Arc<Removed>,
}

impl VoltLink {
    /// Who was removed, as Volt says, is put into `removed`.
    pub(crate) fn new(
        node: NodeName,
        address: String,
        credentials: Arc<Credentials>,
        removed: Arc<Removed>,
    ) -> VoltLink {
        let target = Target::Tls { address, principal: Principal::Volt, credentials };
        VoltLink { node, client: Client::new(target), connected: AtomicBool::new(false), removed }
    }

    /// Whether Volt's pushes arrive at present.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Registers an image of which this node is the origin.
    pub(crate) async fn register_image(
        &self,
        name: &str,
        request: &RegisterImage,
    ) -> Result<ImageRecord, ClientError> {
        self.client.put(&format!("/v1/images/{name}"), request).await
    }

    /// Takes an image's name out of the catalog.
    pub(crate) async fn remove_image(&self, name: &str) -> Result<ImageRecord, ClientError> {
        self.client.delete(&format!("/v1/images/{name}")).await
    }

    /// The nodes that have an image attached, this one aside.
    pub(crate) async fn attached_elsewhere(&self, name: &str) -> Result<Vec<TreeNode>, ClientError> {
        let tree: TreeView = self.client.get(&format!("/v1/images/{name}/tree")).await?;
        let nodes = tree.stripes.into_iter().take(1).flatten();
        Ok(nodes.filter(|at| at.node != self.node).collect())
    }

    /// What the catalog has under a name or an id.
    pub(crate) async fn image(&self, name: &str) -> Result<ImageRecord, ClientError> {
        self.client.get(&format!("/v1/images/{name}")).await
    }

    /// Whether the catalog has an image of this name.
    pub(crate) async fn is_image(&self, name: &ImageName) -> Result<bool, Refusal> {
        match self.image(name.as_str()).await {
            Ok(_) => Ok(true),
            Err(ClientError::Refused(refusal)) if refusal.code == Code::NoSuchImage => Ok(false),
            Err(error) => Err(from_volt(error)),
        }
    }

    /// Attaches an image, by its name or id.
    pub(crate) async fn attach(
        &self,
        image: String,
        role: Role,
        current: Option<Placement>,
    ) -> Result<Attachment, ClientError> {
        self.ask("attach", &AttachImage { image, role, current }).await
    }

    /// Says that this node has an image attached, and where it fetches it from.
    pub(crate) async fn attach_again(&self, attached: &Attached) -> Result<Attachment, ClientError> {
        let placement = match attached.role() {
            Role::Origin => None,
            Role::Relay => Some(attached.placement()),
        };
        let answer = self.attach(attached.id.to_string(), attached.role(), placement).await?;
        attached.usage().stays();
        Ok(answer)
    }

    /// Asks for leave to give an image up that nobody uses here. A push says when.
    pub(crate) async fn leave(&self, image: ImageId) -> Result<(), ClientError> {
        self.ask("leave", &DetachImage { image }).await
    }

    /// Gives an image up.
    pub(crate) async fn detach(&self, image: ImageId) -> Result<(), ClientError> {
        self.ask("detach", &DetachImage { image }).await
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        what: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.client.post(&format!("/v1/nodes/{}/{what}", self.node), body).await
    }

    /// Stays connected until dropped.
    pub(crate) async fn run(&self, introduction: &Introduction, images: &Images) {
        let mut backoff = Backoff::new(RETRY_MIN, RETRY_MAX);
        loop {
            let error = match self.session(introduction, images, &mut backoff).await {
                Ok(()) => "Volt ended the connection".to_owned(),
                Err(error) => error.to_string(),
            };
            if self.connected.swap(false, Ordering::Relaxed) {
                tracing::warn!(error, "volt_lost: this node goes on with what it has attached");
            } else {
                tracing::info!(error, "volt_unreachable");
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    async fn session(
        &self,
        introduction: &Introduction,
        images: &Images,
        backoff: &mut Backoff,
    ) -> Result<(), ClientError> {
        let me = RegisterNode {
            address: introduction.address.clone(),
            location: introduction.location.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let registered: Registered = self.client.put(&format!("/v1/nodes/{}", self.node), &me).await?;
        let lease = Duration::from_millis(registered.lease_ms);
        // The stream is opened before anything is attached, so that no change in between is missed.
        let mut pushes = self.client.stream_lines::<Push>(&format!("/v1/nodes/{}/pushes", self.node)).await?;
        for attached in images.all() {
            // Not one that is being detached: Volt may hear of that first.
            let _one_at_a_time = images.changing.lock().await;
            if images.by_id(&attached.id).is_none() {
                continue;
            }
            let answer = self.attach_again(&attached).await?;
            images.place(&attached.id, answer.placement);
            images.offer_profile(&attached.id, answer.profile);
        }
        self.connected.store(true, Ordering::Relaxed);
        backoff.reset();
        tracing::info!("volt_connected");

        let mut beat = tokio::time::interval(lease / BEATS_PER_LEASE);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                push = pushes.next() => match push.transpose()? {
                    Some(Push::Place { image, placement }) => images.place(&image, placement),
                    Some(Push::Profile { image, offer }) => images.offer_profile(&image, offer),
                    Some(Push::Released { image }) => images.released(&image),
                    Some(Push::Removed { nodes }) => self.removed.replace(nodes),
                    None => return Ok(()),
                },
                _ = beat.tick() => self.ask::<()>("heartbeat", &()).await?,
            }
        }
    }

    /// Tells Volt what the links notice about parents, until dropped. A report that cannot be delivered
    /// is dropped with a word in the log: links defend themselves, Volt only learns of it later.
    pub(crate) async fn report(&self, mut reports: mpsc::Receiver<Report>) {
        while let Some(report) = reports.recv().await {
            tracing::warn!(?report, "parent_noticed");
            let told = match report {
                Report::Lied { node: parent, image, chunk } => NodeReport::Lied { parent, image, chunk },
                Report::Lost { node: parent } => NodeReport::Lost { parent },
                Report::Back { node: parent } => NodeReport::Back { parent },
            };
            if let Err(error) = self.ask::<()>("report", &told).await {
                tracing::warn!(%error, "volt_not_told");
            }
        }
    }

    /// Hands records of boots to Volt, until dropped. While Volt is away a record waits.
    pub(crate) async fn hand_in(&self, mut records: mpsc::Receiver<BootProfile>) {
        while let Some(record) = records.recv().await {
            let image = record.image();
            let request = NewProfile { file: ProfileFile(Arc::new(record)) };
            loop {
                match self.ask::<()>("records", &request).await {
                    Ok(()) => break,
                    Err(ClientError::Refused(refusal)) => {
                        tracing::info!(%image, %refusal, "boot_record_refused");
                        break;
                    }
                    Err(error) => {
                        tracing::debug!(%image, %error, "the record of a boot waits for Volt");
                        tokio::time::sleep(RETRY_MAX).await;
                    }
                }
            }
        }
    }

    /// Renews this node's certificate in time, until dropped.
    pub(crate) async fn renew(&self, credentials: &Credentials, dir: &std::path::Path) {
        loop {
            tokio::time::sleep(RENEWAL_CHECK).await;
            let identity = credentials.current();
            if !identity.needs_renewal(SystemTime::now()) {
                continue;
            }
            let renewed = async {
                let identity = enroll::renew(&self.client, &identity).await.map_err(|e| e.to_string())?;
                identity.save(dir).map_err(|e| e.to_string())?;
                credentials.replace(identity).map_err(|e| e.to_string())
            };
            match renewed.await {
                Ok(()) => tracing::info!("certificate_renewed"),
                Err(error) => tracing::warn!(error, "certificate_not_renewed"),
            }
        }
    }
}

/// What Volt's refusal or absence means to somebody who asked this node.
pub(crate) fn from_volt(error: ClientError) -> Refusal {
    match error {
        ClientError::Refused(refusal) => refusal,
        other => Refusal::new(Code::NoVolt, format!("Volt cannot be asked: {other}"))
            .with_hint("what is attached goes on; start Volt, then try again"),
    }
}
