//! Detaches the images that nobody on this node uses; see [`retention`](crate::images::retention) for when.

use std::sync::Arc;
use std::time::Duration;

use block::ImageId;
use tokio::time::Instant;

use super::images::ImageService;
use crate::images::Attached;
use crate::images::retention::{Destroy, Retention, Step};

/// How often it is looked what is used. A VM's end is looked at at once.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Detaches idle images.
pub(crate) struct IdleImages {
    service: Arc<ImageService>,
}

impl IdleImages {
    /// Those of this service.
    pub(crate) fn new(service: Arc<ImageService>) -> IdleImages {
        IdleImages { service }
    }

    /// Detaches what is unused for too long, until dropped.
    pub(crate) async fn run(&self) {
        let images = &self.service.images;
        loop {
            for attached in images.all() {
                self.look_at(&attached).await;
            }
            images.draining.sweep(Instant::now());
            let _ = tokio::time::timeout(LOOK_EVERY, images.look.notified()).await;
        }
    }

    /// Notes how a VM on an image is destroyed.
    pub(crate) async fn note_destroy(&self, id: &ImageId, destroy: Destroy) {
        if self
            .service
            .images
            .by_id(id)
            .is_some_and(|attached| destroy.after(attached.retention()) != attached.retention())
        {
            self.change(id, |retention| destroy.after(retention)).await;
        }
        self.service.images.look.notify_one();
    }

    async fn change(&self, id: &ImageId, change: impl Fn(Retention) -> Retention) {
        let _one_at_a_time = self.service.images.changing.lock().await;
        let Some(attached) = self.service.images.by_id(id) else { return };
        if let Err(reason) = self.service.images.retain(&attached, change(attached.retention())) {
            tracing::warn!(image = %id.short(), reason, "retention_not_recorded: it is forgotten with the daemon");
        }
    }

    async fn look_at(&self, attached: &Arc<Attached>) {
        if self.step(attached) == Step::Nothing || !self.service.volt.is_connected() {
            return;
        }
        let _one_at_a_time = self.service.images.changing.lock().await;
        if self.service.images.by_id(&attached.id).is_none_or(|found| !Arc::ptr_eq(&found, attached)) {
            return;
        }
        let image = attached.id.short();
        // Meanwhile somebody may have come to use it.
        match self.step(attached) {
            Step::Nothing => {}
            Step::Ask => {
                attached.usage().asked();
                if let Err(error) = self.service.volt.leave(attached.id).await {
                    tracing::debug!(image, %error, "an image that nobody uses waits for Volt");
                    attached.usage().not_asked();
                }
            }
            Step::Stay => self.service.stay_attached(attached).await,
            Step::Detach => {
                for name in attached.names() {
                    if let Err(error) = self.service.release(attached, &name).await {
                        tracing::warn!(image = %name, %error, "image_not_detached: nobody uses it");
                        return;
                    }
                }
                tracing::info!(image, "image_idle_detached");
            }
        }
    }

    fn step(&self, attached: &Attached) -> Step {
        let need = self.service.need(attached);
        let timeout = attached.retention().idle_timeout(self.service.images.idle_timeout);
        attached.usage().look(need, timeout, Instant::now())
    }
}
