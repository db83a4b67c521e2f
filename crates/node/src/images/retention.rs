//! Images that nobody on this node uses, and when they go.
//!
//! An image that was attached because a VM or an export needed it is *unused* once nothing on this node stands on it,
//! and is kept *warm* for a while: a VM that is created meanwhile finds it attached. Then the node asks Volt to let it
//! leave the image's hierarchy. Volt does so once everybody below wants to leave too, or has given the children other
//! parents; until then the node stays attached and serves. What is detached is served on to late children for a while
//! ([`draining`](super::draining)).
//!
//! Consistency: whether an image is unused is looked at again under the lock that all attaching takes, when it goes; a
//! [`ImageGuard`] image stays. Time is monotonic. Retries: what fails is done at the next look; while Volt is away
//! nothing goes. Cancellation: may be dropped anywhere. Crash: the time begins anew with the daemon.

use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Attached;
use control::units::parse_duration;

/// How long an unused image stays attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleTimeout {
    /// So long.
    For(Duration),
    /// Until somebody detaches it.
    Forever,
}

impl IdleTimeout {
    /// What is left of it for an image that is unused since then.
    fn left(self, since: Instant, now: Instant) -> Option<Duration> {
        match self {
            IdleTimeout::For(time) => Some(time.saturating_sub(now.duration_since(since))),
            IdleTimeout::Forever => None,
        }
    }
}

impl FromStr for IdleTimeout {
    type Err = String;
    fn from_str(text: &str) -> Result<IdleTimeout, String> {
        if text == "forever" {
            return Ok(IdleTimeout::Forever);
        }
        parse_duration(text).map(IdleTimeout::For).map_err(|why| format!("{why}, or 'forever'"))
    }
}

/// What keeps an image attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Retention {
    /// It was attached by hand, or by a daemon that did not note why: it stays until it is detached by hand.
    #[default]
    UntilDetached,
    /// It stays as long as something uses it, and is kept warm.
    WhileUsed,
    /// A VM on it was destroyed alone: it stays until another is destroyed in the usual way.
    UntilDestroy,
    /// It brings other VMs' disks here, and is of no use to anybody else: it goes as soon as they have what they need.
    #[serde(rename = "until_settled")]
    UntilRebased,
}

impl Retention {
    /// How long an image that nobody uses is kept.
    pub(crate) fn idle_timeout(self, usual: IdleTimeout) -> IdleTimeout {
        match self {
            Retention::UntilRebased => IdleTimeout::For(Duration::ZERO),
            Retention::UntilDetached | Retention::WhileUsed | Retention::UntilDestroy => usual,
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
    pub(crate) fn after(self, stay: Retention) -> Retention {
        match (self, stay) {
            (_, Retention::UntilDetached | Retention::UntilRebased) => stay,
            (Destroy::WithImage, Retention::WhileUsed | Retention::UntilDestroy) => Retention::WhileUsed,
            (Destroy::InstanceOnly, Retention::WhileUsed | Retention::UntilDestroy) => {
                Retention::UntilDestroy
            }
        }
    }
}

/// An image that is not detached as long as this is there: somebody is about to use it.
pub(crate) struct ImageGuard(Arc<Attached>);

impl ImageGuard {
    /// The caller knows that it is not being detached.
    pub(crate) fn new(attached: Arc<Attached>) -> ImageGuard {
        attached.holders.fetch_add(1, Ordering::AcqRel);
        attached.usage().used();
        ImageGuard(attached)
    }
}

impl Deref for ImageGuard {
    type Target = Arc<Attached>;
    fn deref(&self) -> &Arc<Attached> {
        &self.0
    }
}

impl Drop for ImageGuard {
    fn drop(&mut self) {
        self.0.holders.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How many are about to use an image.
pub(super) type Holders = AtomicUsize;

/// Whether something on this node uses an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    Used,
    Unused,
}

/// Since when nobody uses an image, and how far its leaving is.
#[derive(Debug, Default)]
pub(crate) struct Usage {
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
pub(crate) enum Step {
    Nothing,
    /// Ask Volt for leave.
    Ask,
    /// Detach it.
    Detach,
    /// Tell Volt that the node stays.
    Stay,
}

impl Usage {
    pub(crate) fn look(&mut self, need: Need, timeout: IdleTimeout, now: Instant) -> Step {
        let is_due = match need {
            Need::Used => {
                self.unused_since = None;
                false
            }
            Need::Unused => {
                self.unused_since.get_or_insert(now);
                self.goes_in(timeout, now) == Some(Duration::ZERO)
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

    pub(crate) fn asked(&mut self) {
        self.leave = Leave::Asked;
    }

    /// Volt could not be asked. Its answer may have come by the other way nevertheless.
    pub(crate) fn not_asked(&mut self) {
        if self.leave == Leave::Asked {
            self.leave = Leave::No;
        }
    }

    /// Volt gave leave.
    pub(super) fn released(&mut self) {
        self.leave = Leave::Released;
    }

    /// The node attached the image again.
    pub(crate) fn stays(&mut self) {
        self.leave = Leave::No;
    }

    /// When it goes, unless it is used before.
    pub(super) fn goes_in(&self, timeout: IdleTimeout, now: Instant) -> Option<Duration> {
        timeout.left(self.unused_since?, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARM: IdleTimeout = IdleTimeout::For(Duration::from_secs(10));

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
            usage.look(Need::Unused, IdleTimeout::For(Duration::ZERO), begun);
            progress(&mut usage);
            assert_eq!(usage.look(Need::Used, WARM, begun), Step::Stay);
            assert_eq!(usage.look(Need::Unused, WARM, begun), Step::Stay, "also if it was used for a moment");
            usage.stays();
            assert_eq!(usage.look(Need::Used, WARM, begun), Step::Nothing);
        }
    }

    #[test]
    fn what_brought_a_disk_goes_at_once_whatever_is_kept_warm() {
        for usual in [WARM, IdleTimeout::Forever] {
            assert_eq!(Retention::UntilRebased.idle_timeout(usual), IdleTimeout::For(Duration::ZERO));
            assert_eq!(Retention::WhileUsed.idle_timeout(usual), usual);
        }
        assert_eq!(Destroy::InstanceOnly.after(Retention::UntilRebased), Retention::UntilRebased);
    }

    #[test]
    fn leave_that_came_although_asking_failed_counts() {
        let (mut usage, now) = (Usage::default(), Instant::now());
        let at_once = IdleTimeout::For(Duration::ZERO);
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
        let error = "ten".parse::<IdleTimeout>().unwrap_err();
        assert!(error.contains("'ten'") && error.contains("'forever'"), "{error}");
    }

    #[test]
    fn the_last_destroy_counts_but_not_against_what_was_attached_by_hand() {
        assert_eq!(Destroy::InstanceOnly.after(Retention::WhileUsed), Retention::UntilDestroy);
        assert_eq!(Destroy::WithImage.after(Retention::UntilDestroy), Retention::WhileUsed);
        for destroy in [Destroy::WithImage, Destroy::InstanceOnly] {
            assert_eq!(destroy.after(Retention::UntilDetached), Retention::UntilDetached);
        }
    }
}
