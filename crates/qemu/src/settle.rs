//! Commands that QEMU refuses because something before them has not come to its end yet.
//!
//! QEMU answers `query-migrate` with "completed" a moment before it lets a guest go on, and a migration that was
//! cancelled is in the way of the next for as long. Nothing tells when that moment is over, so the command is given
//! again. What may pass is told by the class of the answer: QEMU calls nearly all that depends on its state a
//! `GenericError`, and what no waiting helps against by other names.

use std::time::Duration;

use block::Backoff;
use tokio::time::Instant;

use super::VmError;

/// How long a command is given again. What it waits for takes milliseconds, a second on a busy machine.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause before a command is given for the second time. A guest may stand still meanwhile.
const AGAIN_AFTER: Duration = Duration::from_millis(10);

/// The longest such pause; each is twice as long as the one before.
const AGAIN_AFTER_MAX: Duration = Duration::from_millis(500);

/// The class of a refusal (QAPI `QapiErrorClass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalClass {
    /// `GenericError`: anything that has no class of its own, above all that the command does not fit QEMU's state.
    Generic,
    /// `DeviceNotActive`: the device has not become active yet.
    DeviceNotActive,
    /// Any other: QEMU does not know the command or the device, or the machine lacks something.
    Other,
}

impl RefusalClass {
    pub(crate) fn of(class: Option<&str>) -> RefusalClass {
        match class {
            Some("GenericError") => RefusalClass::Generic,
            Some("DeviceNotActive") => RefusalClass::DeviceNotActive,
            _ => RefusalClass::Other,
        }
    }
}

impl VmError {
    /// Whether the same command may be taken a moment later.
    fn may_pass(&self) -> bool {
        match self {
            VmError::CommandRefused { class, reason, .. } => {
                // QEMU refuses what it cannot parse as a `GenericError` too.
                *class != RefusalClass::Other
                    && !["Parameter ", "Invalid parameter"].iter().any(|prefix| reason.starts_with(prefix))
            }
            _ => false,
        }
    }
}

/// Decides whether a command that failed is given again.
///
/// ```text
/// let mut settling = Settling::begin();
/// loop {
///     match give_the_command().await {
///         Err(error) => settling.wait_after(error).await?,
///         done => return done,
///     }
/// }
/// ```
pub(crate) struct Settling {
    until: Instant,
    backoff: Backoff,
}

impl Settling {
    pub(crate) fn begin() -> Settling {
        Settling {
            until: Instant::now() + SETTLE_TIMEOUT,
            backoff: Backoff::new(AGAIN_AFTER, AGAIN_AFTER_MAX),
        }
    }

    /// Waits if the command may be given again, else gives the error back.
    pub(crate) async fn wait_after(&mut self, error: VmError) -> Result<(), VmError> {
        if !error.may_pass() || Instant::now() >= self.until {
            return Err(error);
        }
        tokio::time::sleep(self.backoff.pause()).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(class: &str, reason: &str) -> VmError {
        VmError::CommandRefused {
            command: "cont".to_owned(),
            class: RefusalClass::of(Some(class)),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn what_depends_on_qemus_state_may_pass_and_nothing_else() {
        assert!(refusal("GenericError", "Migration is not finalized yet").may_pass());
        assert!(refusal("GenericError", "There's a migration process in progress").may_pass());
        assert!(refusal("DeviceNotActive", "No disk").may_pass());
        assert!(!refusal("CommandNotFound", "The command cont has not been found").may_pass());
        assert!(!refusal("DeviceNotFound", "Device 'x' not found").may_pass());
        assert!(!refusal("GenericError", "Parameter 'capability' does not accept value 'x'").may_pass());
        assert!(!VmError::Gone.may_pass());
    }

    #[tokio::test(start_paused = true)]
    async fn a_command_is_given_again_within_a_bound() {
        let begun = Instant::now();
        let mut settling = Settling::begin();
        let mut times = 0;
        while settling.wait_after(refusal("GenericError", "not yet")).await.is_ok() {
            times += 1;
        }
        let took = begun.elapsed();
        assert!((SETTLE_TIMEOUT..SETTLE_TIMEOUT + AGAIN_AFTER_MAX).contains(&took), "{took:?}");
        assert!((10..100).contains(&times), "{times}");
    }
}
