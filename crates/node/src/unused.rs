//! Images that nobody on this node uses, and when they go.
//!
//! An image that was attached because a VM or an export needed it is *unused* once nothing on this node stands on it,
//! and is kept *warm* for a while: a VM that is created meanwhile finds it attached. Then the node asks Volt to let it
//! leave the image's hierarchy. Volt does so once everybody below wants to leave too, or has given the children other
//! parents; until then the node stays attached and serves. What is detached is served on to late children for a while
//! ([`departing`](super::departing)).
//!
//! Consistency: whether an image is unused is looked at again under the lock that all attaching takes, when it goes; a
//! [`Held`] image stays. Time is monotonic. Retries: what fails is done at the next look; while Volt is away
//! nothing goes. Cancellation: may be dropped anywhere. Crash: the time begins anew with the daemon.

use std::ops::Deref;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use block::{ImageId, ImageName};
use planner::Role;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::images::{Attached, Images};
use super::node::Node;
use control::api::export::ExportName;
use control::http::ApiError;
use control::units::parse_duration;

/// How often it is looked what is used. A VM's end is looked at at once.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long an unused image stays attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepWarm {
    /// So long.
    For(Duration),
    /// Until somebody detaches it.
    Forever,
}

impl KeepWarm {
    /// What is left of it for an image that is unused since then.
    fn left(self, since: Instant, now: Instant) -> Option<Duration> {
        match self {
            KeepWarm::For(time) => Some(time.saturating_sub(now.duration_since(since))),
            KeepWarm::Forever => None,
        }
    }
}

impl FromStr for KeepWarm {
    type Err = String;
    fn from_str(text: &str) -> Result<KeepWarm, String> {
        if text == "forever" {
            return Ok(KeepWarm::Forever);
        }
        parse_duration(text).map(KeepWarm::For).map_err(|why| format!("{why}, or 'forever'"))
    }
}

/// What keeps an image attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stay {
    /// It was attached by hand, or by a daemon that did not note why: it stays until it is detached by hand.
    #[default]
    UntilDetached,
    /// It stays as long as something uses it, and is kept warm.
    WhileUsed,
    /// A VM on it was destroyed alone: it stays until another is destroyed in the usual way.
    UntilDestroy,
    /// It brings other VMs' disks here, and is of no use to anybody else: it goes as soon as they have what they need.
    UntilSettled,
}

impl Stay {
    /// How long an image that nobody uses is kept.
    fn keep_warm(self, usual: KeepWarm) -> KeepWarm {
        match self {
            Stay::UntilSettled => KeepWarm::For(Duration::ZERO),
            Stay::UntilDetached | Stay::WhileUsed | Stay::UntilDestroy => usual,
        }
    }
}

/// Whether a VM goes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroy {
    /// Its image is detached after the time for which it is kept warm, if nobody uses it.
    WithImage,
    /// Its image stays attached.
    InstanceOnly,
}

impl Destroy {
    /// What keeps an image attached after a VM on it was destroyed so.
    fn after(self, stay: Stay) -> Stay {
        match (self, stay) {
            (_, Stay::UntilDetached | Stay::UntilSettled) => stay,
            (Destroy::WithImage, Stay::WhileUsed | Stay::UntilDestroy) => Stay::WhileUsed,
            (Destroy::InstanceOnly, Stay::WhileUsed | Stay::UntilDestroy) => Stay::UntilDestroy,
        }
    }
}

/// An image that is not detached as long as this is there: somebody is about to use it.
pub(crate) struct Held(Arc<Attached>);

impl Held {
    /// The caller knows that it is not being detached.
    pub(super) fn new(attached: Arc<Attached>) -> Held {
        attached.holders.fetch_add(1, Ordering::AcqRel);
        attached.usage().used();
        Held(attached)
    }
}

impl Deref for Held {
    type Target = Arc<Attached>;
    fn deref(&self) -> &Arc<Attached> {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.holders.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How many are about to use an image.
pub(super) type Holders = AtomicUsize;

/// Whether something on this node uses an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Used,
    Unused,
}

/// Since when nobody uses an image, and how far its leaving is.
#[derive(Debug, Default)]
pub(super) struct Usage {
    unused_since: Option<Instant>,
    leave: Leave,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Leave {
    #[default]
    No,
    /// Volt was asked for leave.
    Asked,
    /// Volt gave it: the node has no place in the hierarchy.
    Released,
}

/// What is to be done about an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    /// Ask Volt for leave.
    Ask,
    /// Detach it.
    Detach,
    /// Tell Volt that the node stays.
    Stay,
}

impl Usage {
    fn look(&mut self, need: Need, keep_warm: KeepWarm, now: Instant) -> Step {
        let is_due = match need {
            Need::Used => {
                self.unused_since = None;
                false
            }
            Need::Unused => {
                self.unused_since.get_or_insert(now);
                self.goes_in(keep_warm, now) == Some(Duration::ZERO)
            }
        };
        match (self.leave, is_due) {
            (Leave::No, false) | (Leave::Asked, true) => Step::Nothing,
            (Leave::No, true) => Step::Ask,
            (Leave::Released, true) => Step::Detach,
            (Leave::Asked | Leave::Released, false) => Step::Stay,
        }
    }

    /// Somebody is about to use it.
    fn used(&mut self) {
        self.unused_since = None;
    }

    fn asked(&mut self) {
        self.leave = Leave::Asked;
    }

    /// Volt could not be asked. Its answer may have come by the other way nevertheless.
    fn not_asked(&mut self) {
        if self.leave == Leave::Asked {
            self.leave = Leave::No;
        }
    }

    /// Volt gave leave.
    pub(super) fn released(&mut self) {
        self.leave = Leave::Released;
    }

    /// The node attached the image again.
    pub(super) fn stays(&mut self) {
        self.leave = Leave::No;
    }

    /// When it goes, unless it is used before.
    pub(super) fn goes_in(&self, keep_warm: KeepWarm, now: Instant) -> Option<Duration> {
        keep_warm.left(self.unused_since?, now)
    }
}

/// Detaches what is unused for too long, until dropped.
pub(super) async fn run(node: &Node) {
    loop {
        for attached in node.images.all() {
            node.look_at(&attached).await;
        }
        node.images.departing.sweep(Instant::now());
        let _ = tokio::time::timeout(LOOK_EVERY, node.images.look.notified()).await;
    }
}

impl Node {
    /// Notes how a VM on an image is destroyed.
    pub(super) async fn note_destroy(&self, id: &ImageId, destroy: Destroy) {
        if self.images.by_id(id).is_some_and(|attached| destroy.after(attached.stay()) != attached.stay()) {
            self.change_stay(id, |stay| destroy.after(stay)).await;
        }
        self.images.look.notify_one();
    }

    async fn change_stay(&self, id: &ImageId, change: impl Fn(Stay) -> Stay) {
        let _one_at_a_time = self.images.changing.lock().await;
        let Some(attached) = self.images.by_id(id) else { return };
        if let Err(reason) = self.images.let_stay(&attached, change(attached.stay())) {
            tracing::warn!(image = %id.short(), reason, "how long an image stays attached is forgotten with the daemon");
        }
    }

    async fn look_at(&self, attached: &Arc<Attached>) {
        if self.step(attached) == Step::Nothing || !self.volt.is_connected() {
            return;
        }
        let _one_at_a_time = self.images.changing.lock().await;
        if self.images.by_id(&attached.id).is_none_or(|found| !Arc::ptr_eq(&found, attached)) {
            return;
        }
        let image = attached.id.short();
        // Meanwhile somebody may have come to use it.
        match self.step(attached) {
            Step::Nothing => {}
            Step::Ask => {
                attached.usage().asked();
                if let Err(error) = self.volt.leave(attached.id).await {
                    tracing::debug!(image, %error, "an image that nobody uses waits for Volt");
                    attached.usage().not_asked();
                }
            }
            Step::Stay => self.stay_attached(attached).await,
            Step::Detach => {
                for name in attached.names() {
                    if let Err(error) = self.release(attached, &name).await {
                        tracing::warn!(image = %name, %error, "an image that nobody uses stays attached");
                        return;
                    }
                }
                tracing::info!(image, "nobody uses the image any more");
            }
        }
    }

    /// Tells Volt that the node has not left after all. If that fails it is done at the next look, or when this node
    /// registers again.
    pub(super) async fn stay_attached(&self, attached: &Attached) {
        match self.volt.attach_again(attached).await {
            Ok(answer) => self.images.place(&attached.id, answer.placement),
            Err(error) => {
                tracing::debug!(image = attached.id.short(), %error, "Volt has yet to hear that an image is used again");
            }
        }
    }

    /// Attaches an image that is to stay attached until it is detached by hand.
    pub(super) async fn attach_to_stay(&self, name: &ImageName) -> Result<Held, ApiError> {
        let held = self.attach(name).await?;
        let _one_at_a_time = self.images.changing.lock().await;
        self.images.let_stay(&held, Stay::UntilDetached).map_err(ApiError::internal)?;
        Ok(held)
    }

    fn step(&self, attached: &Attached) -> Step {
        let need = self.need(attached);
        let keep_warm = attached.stay().keep_warm(self.images.keep_warm);
        attached.usage().look(need, keep_warm, Instant::now())
    }

    fn need(&self, attached: &Attached) -> Need {
        let is_exported =
            || attached.names().into_iter().any(|name| self.iscsi.contains(&ExportName::Image(name)));
        let used = attached.role() == Role::Origin
            || !matches!(attached.stay(), Stay::WhileUsed | Stay::UntilSettled)
            || attached.is_held()
            || attached.is_open()
            || self.vms.layers.need(&attached.id)
            || self.images.is_base(&attached.id)
            || is_exported();
        if used { Need::Used } else { Need::Unused }
    }
}

impl Images {
    /// The attached image of this name, which stays attached as long as the caller holds it.
    pub(super) fn hold(&self, name: &ImageName) -> Option<Held> {
        // Under the lock: whoever detaches sees the holder, or this does not find the image.
        let all = self.attached.read().unwrap_or_else(PoisonError::into_inner);
        let found = all.values().find(|attached| attached.state().names.contains(name))?;
        Some(Held::new(Arc::clone(found)))
    }

    /// Says what keeps an image attached. The caller holds `changing`.
    pub(super) fn let_stay(&self, attached: &Attached, stay: Stay) -> Result<(), String> {
        if attached.stay() == stay {
            return Ok(());
        }
        attached.state().stay = stay;
        self.save(attached)
    }

    /// Volt let this node leave an image's hierarchy.
    pub(crate) fn released(&self, id: &ImageId) {
        if let Some(attached) = self.by_id(id) {
            attached.usage().released();
            self.look.notify_one();
        }
    }
}

impl Attached {
    /// What keeps it attached.
    pub(super) fn stay(&self) -> Stay {
        self.state().stay
    }

    /// Since when nobody uses it.
    pub(super) fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody is about to use it.
    pub(super) fn is_held(&self) -> bool {
        self.holders.load(Ordering::Acquire) > 0
    }

    /// Whether somebody has it open from outside.
    pub(super) fn is_open(&self) -> bool {
        // Its own, and one for each socket that waits for connections.
        Arc::strong_count(&self.exported) > 1 + self.state().exports.len()
    }

    /// When it goes, in milliseconds, unless it is used before.
    pub(super) fn detaches_in_ms(&self, keep_warm: KeepWarm) -> Option<u64> {
        let keep_warm = self.stay().keep_warm(keep_warm);
        let left = self.usage().goes_in(keep_warm, Instant::now())?;
        Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARM: KeepWarm = KeepWarm::For(Duration::from_secs(10));

    fn after(seconds: u64) -> impl Fn(Instant) -> Instant {
        move |begun| begun + Duration::from_secs(seconds)
    }

    #[test]
    fn an_image_leaves_once_it_was_unused_for_long_enough_without_a_break() {
        let (mut usage, begun) = (Usage::default(), Instant::now());
        let at = |seconds| after(seconds)(begun);
        assert_eq!(usage.look(Need::Unused, WARM, begun), Step::Nothing);
        assert_eq!(usage.goes_in(WARM, at(4)), Some(Duration::from_secs(6)));
        assert_eq!(usage.look(Need::Used, WARM, at(9)), Step::Nothing);
        assert_eq!(usage.goes_in(WARM, at(9)), None);
        assert_eq!(usage.look(Need::Unused, WARM, at(10)), Step::Nothing);
        usage.used();
        assert_eq!(usage.look(Need::Unused, WARM, at(12)), Step::Nothing, "it was used between two looks");
        assert_eq!(usage.look(Need::Unused, WARM, at(21)), Step::Nothing);
        assert_eq!(usage.look(Need::Unused, WARM, at(22)), Step::Ask);
        usage.asked();
        assert_eq!(usage.look(Need::Unused, WARM, at(23)), Step::Nothing, "children come first");
        usage.released();
        assert_eq!(usage.look(Need::Unused, WARM, at(24)), Step::Detach);
    }

    #[test]
    fn who_uses_an_image_that_leaves_keeps_it() {
        let begun = Instant::now();
        for progress in [Usage::asked, Usage::released] {
            let mut usage = Usage::default();
            usage.look(Need::Unused, KeepWarm::For(Duration::ZERO), begun);
            progress(&mut usage);
            assert_eq!(usage.look(Need::Used, WARM, begun), Step::Stay);
            assert_eq!(usage.look(Need::Unused, WARM, begun), Step::Stay, "also if it was used for a moment");
            usage.stays();
            assert_eq!(usage.look(Need::Used, WARM, begun), Step::Nothing);
        }
    }

    #[test]
    fn what_brought_a_disk_goes_at_once_whatever_is_kept_warm() {
        for usual in [WARM, KeepWarm::Forever] {
            assert_eq!(Stay::UntilSettled.keep_warm(usual), KeepWarm::For(Duration::ZERO));
            assert_eq!(Stay::WhileUsed.keep_warm(usual), usual);
        }
        assert_eq!(Destroy::InstanceOnly.after(Stay::UntilSettled), Stay::UntilSettled);
    }

    #[test]
    fn leave_that_came_although_asking_failed_counts() {
        let (mut usage, now) = (Usage::default(), Instant::now());
        let at_once = KeepWarm::For(Duration::ZERO);
        assert_eq!(usage.look(Need::Unused, at_once, now), Step::Ask);
        usage.asked();
        usage.not_asked();
        assert_eq!(usage.look(Need::Unused, at_once, now), Step::Ask);
        usage.asked();
        usage.released();
        usage.not_asked();
        assert_eq!(usage.look(Need::Unused, at_once, now), Step::Detach);
    }

    #[test]
    fn forever_never_ends_and_other_times_need_a_unit() {
        let (mut usage, begun) = (Usage::default(), Instant::now());
        let forever = "forever".parse().unwrap();
        usage.look(Need::Unused, forever, begun);
        assert_eq!(usage.look(Need::Unused, forever, after(u64::from(u32::MAX))(begun)), Step::Nothing);
        assert_eq!("10s".parse(), Ok(WARM));
        let error = "ten".parse::<KeepWarm>().unwrap_err();
        assert!(error.contains("'ten'") && error.contains("'forever'"), "{error}");
    }

    #[test]
    fn the_last_destroy_counts_but_not_against_what_was_attached_by_hand() {
        assert_eq!(Destroy::InstanceOnly.after(Stay::WhileUsed), Stay::UntilDestroy);
        assert_eq!(Destroy::WithImage.after(Stay::UntilDestroy), Stay::WhileUsed);
        for destroy in [Destroy::WithImage, Destroy::InstanceOnly] {
            assert_eq!(destroy.after(Stay::UntilDetached), Stay::UntilDetached);
        }
    }
}
