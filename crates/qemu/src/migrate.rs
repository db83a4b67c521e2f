//! Moves a running guest from one QEMU to another: the steps, for a caller that takes care of the disk.
//!
//! The memory goes through a UNIX socket on either side, as one stream in both directions, which the caller
//! carries from one to the other. The disk is not part of it: each side has an export of its own, and what is
//! behind that of the destination has to become what is behind that of the source while the guest stands still.
//!
//! | step | at the source | at the destination |
//! |---|---|---|
//! | 1 | | [`Qemu::start_incoming`], [`Qemu::incoming_listen`] |
//! | 2 | [`Qemu::begin_migration`]; the guest runs on | its memory arrives |
//! | 3 | [`Migration::until_paused`] | |
//! | 4 | the caller moves the rest of the disk | |
//! | 5 | [`Paused::complete`] | [`Incoming::arrived`] |
//! | 6 | | [`Qemu::resume`]: from here on, and no sooner, the guest is there |
//! | 7 | the caller kills the process | |
//!
//! - *Consistency:* when step 3 ends, every write of the guest was answered and a flush after them too (QEMU drains
//!   and flushes all disks when it stops a guest), and the source writes nothing any more. The destination reads
//!   the first sector of its disk when it starts (for the geometry of old times), and nothing more until it is
//!   resumed; QEMU caches nothing above NBD. Its device has the requests that were in flight.
//! - *Failure:* until step 6 the guest belongs to the source. Whatever fails before leaves it there as it was,
//!   running if it ran. If the destination is lost between 5 and 6, [`Qemu::resume`] brings it back at the source.
//!   The source says that it is complete only after the destination said that it has everything. While the last
//!   of the memory leaves, the source's QEMU hears nobody; if the stream is stuck then, only its end helps, so
//!   whoever carries it ends it when the other side is gone.
//! - *Cancellation:* a [`Migration`] or [`Paused`] that is dropped is cancelled by a task of its own. A dropped
//!   [`Incoming`] changes nothing: the caller ends the process.
//! - *Retries:* what QEMU refuses for a moment only, because an earlier migration has not settled, is given again.
//!   The migration itself is not: the caller may begin anew with another destination. A guest that does not go on
//!   is left as a [recovery](super::standstill) to [`Qemu::supervise`].
//! - *Crash:* QEMU goes on without the daemon. A later one calls [`Qemu::recover`] at the source.
//! - *Bounds:* a migration that does not advance for [`STALL_TIMEOUT`] fails. A guest that writes faster than its
//!   memory leaves is slowed down, and allowed an ever longer pause ([`downtime_limit`]).

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::machine::{self, Platform};
use super::qemu::last_words;
use super::qmp::Qmp;
use super::spec::{Begin, qemu_socket_path};
use super::standstill::Recovery;
use super::state::{RunState, resume_in_turn};
use super::{Qemu, VmError, VmSpec};

/// What QEMU says whenever a migration comes to its next step.
const EVENT: &str = "MIGRATION";

/// How often progress is asked for and reported between events.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// A migration of which nothing arrived for this long is given up: TCP has by then given up too, or the other
/// side has. Nothing is lost by it but the way that was made.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long QEMU may be silent. While the last of the memory leaves it answers nobody, which takes as long as the
/// pause that is allowed, or twice if the way became slower since.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2 * DOWNTIME_MAX.as_secs());

/// How long QEMU may take to end what was cancelled.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(30);

/// How often that is looked at. An event says so too, but not to every caller.
const CANCEL_INTERVAL: Duration = Duration::from_millis(20);

/// For how long the guest may stand still while the last of its memory leaves, at first.
const DOWNTIME_FIRST: Duration = Duration::from_millis(300);

/// Times that the changed memory is sent before a longer pause is allowed.
const PASSES_BRISK: u64 = 4;

/// The longest pause that is allowed. Beyond it the guest's users would sooner wait for the next attempt.
const DOWNTIME_MAX: Duration = Duration::from_secs(30);

/// Times that the changed memory is sent before it is given up: at this point the guest has long been slowed to
/// a hundredth and allowed the longest pause.
const PASSES_MAX: u64 = 100;

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of memory that have left.
    pub transferred_bytes: u64,
    /// Bytes of memory that have not, or have changed since.
    pub remaining_bytes: u64,
    /// Times that changed memory was looked for.
    pub passes: u64,
    /// Time since the beginning.
    pub elapsed: Duration,
    /// How long the guest stood still, as far as QEMU knows: until its memory had left. Zero before that.
    pub downtime: Duration,
}

/// QEMU's name for the step at which a migration is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Status {
    /// There was none in the life of this process.
    None,
    /// It is on its way; the guest runs.
    Active,
    /// It waits for [`Paused::complete`].
    PreSwitchover,
    /// The last of it is on its way; the guest stands still.
    Switchover,
    Completed,
    Cancelled,
    Failed(String),
}

/// A guest whose memory leaves while it runs.
#[must_use = "a migration that is dropped is cancelled"]
pub struct Migration<'a> {
    driver: Driver<'a>,
}

/// A guest that stands still for the last of its memory; its disk is still and flushed.
#[must_use = "a migration that is dropped is cancelled"]
pub struct Paused<'a> {
    driver: Driver<'a>,
    progress: Progress,
}

/// A VM that waits for a guest.
pub struct Incoming<'a> {
    vm: &'a Qemu,
    qmp: Qmp,
}

impl Qemu {
    /// Starts the VM `spec` of a guest that runs elsewhere, to take that guest over; see
    /// [`incoming_listen`](Self::incoming_listen). Its kernel, if it has one from outside, has to be here under the
    /// same path.
    pub async fn start_incoming(dir: &Path, spec: &VmSpec) -> Result<Qemu, VmError> {
        Platform::must_take(spec.platform.as_ref(), spec.accel).await?;
        Qemu::begin(dir, spec, Begin::Incoming).await
    }

    /// Where the memory of a guest comes in. At the source this is a good place for the caller to listen, who
    /// takes it away afterwards.
    pub fn memory_socket(&self) -> PathBuf {
        self.files.memory_socket()
    }

    /// Begins to send the guest's memory to whoever listens at `socket`, at most so many bytes in a second if
    /// there is a limit. Nobody else resumes or pauses the guest until the migration is over.
    pub async fn begin_migration(
        &self,
        socket: &Path,
        bytes_per_second_max: Option<u64>,
    ) -> Result<Migration<'_>, VmError> {
        let uri = format!("unix:{}", qemu_socket_path(socket)?);
        // Without one there may be no control socket for this either.
        self.spec().ok_or_else(machine::unknown)?;
        let turn = self.turns.run().await;
        let before = self.state().await?;
        if !matches!(before, RunState::Running | RunState::Paused | RunState::IoError) {
            return Err(VmError::Migration(format!(
                "its guest neither runs nor is paused, but is {before:?}"
            )));
        }
        let mut qmp = Qmp::connect_patiently(&self.files.migrate_socket(), ANSWER_TIMEOUT).await?;
        let on = ["events", "return-path", "pause-before-switchover", "auto-converge"];
        qmp.execute_when_settled("migrate-set-capabilities", capabilities(&on)).await?;
        let limits = json!({
            // QEMU takes 0 for no limit.
            "max-bandwidth": bytes_per_second_max.map_or(0, |limit| limit.max(1)),
            "downtime-limit": millis(DOWNTIME_FIRST),
        });
        qmp.execute_when_settled("migrate-set-parameters", limits).await?;
        // This migration sees to it from here on that the guest goes on, if it comes to nothing.
        let is_due =
            [Recovery::EndMigration, Recovery::Resume].map(|recovery| self.standing.finish(recovery));
        let before = if is_due.contains(&true) { RunState::Running } else { before };
        // From here on the drop cancels.
        let mut driver = Driver { vm: self, before, held: Some((qmp, turn)) };
        driver.qmp().execute_when_settled("migrate", json!({ "uri": uri })).await?;
        Ok(Migration { driver })
    }

    /// For tests: how far the migration of this guest is that is under way or was the last; `None` if there was none.
    #[cfg(test)]
    pub async fn migration_progress(&self) -> Result<Option<Progress>, VmError> {
        let answer = self.control("query-migrate", json!({})).await?;
        Ok((Status::of(&answer) != Status::None).then(|| Progress::of(&answer)))
    }

    /// For tests: cancels the migration that a daemon left under way when it died, and waits until the guest is as
    /// it was before. A migration that is complete, or was never begun, stays so.
    #[cfg(test)]
    pub async fn cancel_migration(&self) -> Result<(), VmError> {
        let _turn = self.turns.run().await;
        end_migration(self).await
    }

    /// Listens at [`memory_socket`](Self::memory_socket) for the memory of a guest. For a VM that was begun by
    /// [`start_incoming`](Self::start_incoming), once.
    pub async fn incoming_listen(&self) -> Result<Incoming<'_>, VmError> {
        let socket = self.memory_socket();
        let uri = format!("unix:{}", qemu_socket_path(&socket)?);
        let mut qmp = Qmp::connect_patiently(&self.files.migrate_socket(), ANSWER_TIMEOUT).await?;
        // The disk is opened for writing when the guest is resumed, and no sooner.
        let on = ["events", "return-path", "late-block-activate"];
        qmp.execute_when_settled("migrate-set-capabilities", capabilities(&on)).await?;
        qmp.execute_when_settled("migrate-incoming", json!({ "uri": uri })).await?;
        Ok(Incoming { vm: self, qmp })
    }
}

impl<'a> Migration<'a> {
    /// Waits until the guest stands still and its disk is flushed. `report` hears how far it is, now and then.
    pub async fn until_paused(mut self, mut report: impl FnMut(Progress)) -> Result<Paused<'a>, VmError> {
        match self.driver.advance_to(&Status::PreSwitchover, &mut report).await {
            Ok(progress) => Ok(Paused { driver: self.driver, progress }),
            Err(error) => Err(self.driver.give_up(error).await),
        }
    }

    /// Gives it up. Returns when the guest is as it was before.
    #[cfg(test)]
    pub async fn cancel(mut self) -> Result<(), VmError> {
        self.driver.cancel().await
    }
}

impl Paused<'_> {
    /// How far it came while the guest ran.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// Sends the rest. When this returns, the destination has said that it has everything, and the guest stands
    /// still on both sides: the caller lets it go on at one of them. If it fails, the guest goes on at the source,
    /// and must not at the destination, whatever that says.
    pub async fn complete(mut self) -> Result<Progress, VmError> {
        let go_on = json!({ "state": "pre-switchover" });
        let completed = match self.driver.qmp().execute("migrate-continue", go_on).await {
            Ok(_) => self.driver.advance_to(&Status::Completed, &mut |_| {}).await,
            Err(error) => Err(error),
        };
        match completed {
            Ok(progress) => {
                self.driver.held = None;
                Ok(progress)
            }
            Err(error) => Err(self.driver.give_up(error).await),
        }
    }

    /// Gives it up. Returns when the guest is as it was before.
    pub async fn cancel(mut self) -> Result<(), VmError> {
        self.driver.cancel().await
    }
}

impl Incoming<'_> {
    /// Waits until all of the guest is here. It then stands still until [`Qemu::resume`]. There is no time limit:
    /// the source has one, and if that ends the stream, QEMU ends here.
    pub async fn arrived(mut self) -> Result<(), VmError> {
        let vm = self.vm;
        let ended = || VmError::Migration(format!("the destination's QEMU ended: {}", last_words(&vm.files)));
        let completed = async {
            loop {
                match Status::of(&self.qmp.execute("query-migrate", json!({})).await?) {
                    Status::Completed => return Ok(()),
                    Status::Failed(reason) => return Err(VmError::Migration(reason)),
                    _ => self.qmp.happened(EVENT).await?,
                }
            }
        };
        tokio::select! {
            outcome = completed => match outcome {
                // The process is about to end, or has already.
                Err(VmError::Gone) => Err(ended()),
                outcome => outcome,
            },
            gone = vm.exited() => gone.and_then(|()| Err(ended())),
        }
    }
}

/// Drives the source's QEMU through a migration. Cancels when dropped before that is over.
struct Driver<'a> {
    vm: &'a Qemu,
    before: RunState,
    /// What it takes to cancel, until it is over.
    held: Option<(Qmp, OwnedMutexGuard<()>)>,
}

impl Driver<'_> {
    fn qmp(&mut self) -> &mut Qmp {
        let (qmp, _) = self.held.as_mut().expect("it is held until the migration is over, which is the end");
        qmp
    }

    /// Waits until the migration is at `goal`, and sees to it that it gets there.
    async fn advance_to(
        &mut self,
        goal: &Status,
        report: &mut impl FnMut(Progress),
    ) -> Result<Progress, VmError> {
        let mut pace = Pace::new(Instant::now());
        loop {
            let answer = self.qmp().execute("query-migrate", json!({})).await?;
            let (status, progress) = (Status::of(&answer), Progress::of(&answer));
            match status {
                status if status == *goal => return Ok(progress),
                Status::Failed(reason) => return Err(VmError::Migration(reason)),
                Status::Active | Status::PreSwitchover | Status::Switchover => {}
                Status::None | Status::Cancelled | Status::Completed => {
                    return Err(VmError::Migration(format!("somebody else made it {status:?}")));
                }
            }
            report(progress);
            if let Some(limit) = pace.advance(progress, Instant::now())? {
                let limit = json!({ "downtime-limit": millis(limit) });
                self.qmp().execute("migrate-set-parameters", limit).await?;
            }
            if let Ok(heard) = tokio::time::timeout(PROGRESS_INTERVAL, self.qmp().happened(EVENT)).await {
                heard?;
            }
        }
    }

    /// After a failure: makes sure of it, and that the guest is as it was. Gives the failure back.
    async fn give_up(&mut self, failure: VmError) -> VmError {
        if let Err(error) = self.cancel().await {
            tracing::warn!(vm = %self.vm.name(), %error, "guest_may_stand_still: its migration failed and is not cancelled yet");
        }
        failure
    }

    async fn cancel(&mut self) -> Result<(), VmError> {
        end_migration(self.vm).await?;
        // It may have been complete by then, which leaves the guest standing still.
        if self.runs_on() && self.vm.state().await? == RunState::PostMigrate {
            resume_in_turn(self.vm).await?;
        }
        self.held = None;
        Ok(())
    }

    /// Whether the guest is to run if the migration comes to nothing.
    fn runs_on(&self) -> bool {
        matches!(self.before, RunState::Running | RunState::IoError)
    }
}

impl Drop for Driver<'_> {
    fn drop(&mut self) {
        let Some((mut qmp, turn)) = self.held.take() else { return };
        // Before the turn is given back, after which another migration takes it over.
        if self.runs_on() {
            self.vm.standing.request(Recovery::EndMigration, None);
        }
        // QEMU forgets the commands of a client that has left, so an answer has to be waited for. Where that is
        // impossible the daemon ends, and the next one cancels.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = qmp.execute("migrate_cancel", json!({})).await {
                    tracing::debug!(%error, "cannot cancel a migration that was forgotten");
                }
                drop(turn);
            });
        }
    }
}

/// Cancels what is under way, and waits for its end. Who calls has the turn.
pub(crate) async fn end_migration(vm: &Qemu) -> Result<(), VmError> {
    let ended = async {
        loop {
            match cancel_once(vm).await {
                Ok(true) => return Ok(()),
                // It answers nobody while the last of the memory leaves.
                Ok(false) | Err(VmError::Control(_) | VmError::CommandRefused { .. }) => {
                    tokio::time::sleep(CANCEL_INTERVAL).await;
                }
                Err(error) => return Err(error),
            }
        }
    };
    tokio::time::timeout(CANCEL_TIMEOUT, ended).await.unwrap_or_else(|_| {
        let seconds = CANCEL_TIMEOUT.as_secs();
        Err(VmError::Migration(format!("it did not end within {seconds} s after it was cancelled")))
    })
}

/// Cancels unless all is over, and says whether it is.
async fn cancel_once(vm: &Qemu) -> Result<bool, VmError> {
    let status = Status::of(&vm.control("query-migrate", json!({})).await?);
    if !status.is_over() {
        vm.control("migrate_cancel", json!({})).await?;
        return Ok(false);
    }
    // A failure is known before the guest goes on.
    Ok(vm.state().await? != RunState::FinishMigrate)
}

/// Exactly these capabilities; those that QEMU knows besides stay off.
fn capabilities(on: &[&str]) -> Value {
    let capabilities: Vec<Value> =
        on.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    json!({ "capabilities": capabilities })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Status {
    /// Reads QEMU's answer to `query-migrate`.
    fn of(answer: &Value) -> Status {
        match answer["status"].as_str() {
            None | Some("none") => Status::None,
            Some("pre-switchover") => Status::PreSwitchover,
            Some("device") => Status::Switchover,
            Some("completed") => Status::Completed,
            Some("cancelled") => Status::Cancelled,
            Some("failed") => {
                let reason = answer["error-desc"].as_str().unwrap_or("QEMU does not say why");
                Status::Failed(reason.to_owned())
            }
            // On its way there, or ending.
            Some(_) => Status::Active,
        }
    }

    fn is_over(&self) -> bool {
        !matches!(self, Status::Active | Status::PreSwitchover | Status::Switchover)
    }
}

impl Progress {
    /// Reads QEMU's answer to `query-migrate`.
    fn of(answer: &Value) -> Progress {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let ram = &answer["ram"];
        Progress {
            transferred_bytes: number(&ram["transferred"]),
            remaining_bytes: number(&ram["remaining"]),
            passes: number(&ram["dirty-sync-count"]),
            elapsed: Duration::from_millis(number(&answer["total-time"])),
            downtime: Duration::from_millis(number(&answer["downtime"])),
        }
    }
}

/// The pause that is allowed to a guest whose memory was sent this often.
fn downtime_limit(passes: u64) -> Duration {
    let doublings = u32::try_from(passes.saturating_sub(PASSES_BRISK)).unwrap_or(u32::MAX);
    DOWNTIME_FIRST.saturating_mul(2u32.saturating_pow(doublings)).min(DOWNTIME_MAX)
}

/// Decides what to do about a migration that does not come to its end.
struct Pace {
    transferred_bytes: u64,
    advanced: Instant,
    limit: Duration,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { transferred_bytes: 0, advanced: now, limit: DOWNTIME_FIRST }
    }

    /// The pause that is to be allowed from now on, if it is another than before.
    fn advance(&mut self, progress: Progress, now: Instant) -> Result<Option<Duration>, VmError> {
        if progress.transferred_bytes > self.transferred_bytes {
            (self.transferred_bytes, self.advanced) = (progress.transferred_bytes, now);
        }
        if now.duration_since(self.advanced) >= STALL_TIMEOUT {
            let seconds = STALL_TIMEOUT.as_secs();
            return Err(VmError::Migration(format!("nothing was taken from the source for {seconds} s")));
        }
        if progress.passes > PASSES_MAX {
            return Err(VmError::Migration(format!(
                "the guest changes its memory faster than it can be sent: after {PASSES_MAX} passes {} bytes remain",
                progress.remaining_bytes
            )));
        }
        let limit = downtime_limit(progress.passes);
        let other = limit != self.limit;
        self.limit = limit;
        Ok(other.then_some(limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(transferred_bytes: u64, passes: u64) -> Progress {
        Progress { transferred_bytes, passes, ..Progress::default() }
    }

    #[test]
    fn a_busy_guest_is_allowed_an_ever_longer_pause_up_to_a_bound() {
        let limits: Vec<u128> = (0..=12).map(|passes| downtime_limit(passes).as_millis()).collect();
        let longer = [600, 1200, 2400, 4800, 9600, 19_200, 30_000, 30_000];
        assert_eq!(limits, [&[300; 5][..], &longer].concat());
        assert_eq!(downtime_limit(u64::MAX), DOWNTIME_MAX);

        let mut pace = Pace::new(Instant::now());
        let mut said = (1..=7).map(|n| pace.advance(progress(n, n), Instant::now()).unwrap());
        assert!(
            said.by_ref().take(4).all(|limit| limit.is_none()),
            "the first limit is said at the beginning"
        );
        assert!(said.all(|limit| limit.is_some()));
    }

    #[test]
    fn a_migration_that_does_not_advance_or_never_ends_is_given_up() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        let late = STALL_TIMEOUT - Duration::from_millis(1);
        pace.advance(progress(1, 1), begun + late).unwrap();
        pace.advance(progress(1, 1), begun + late + late).unwrap();
        let stalled = pace.advance(progress(1, 1), begun + late + STALL_TIMEOUT).unwrap_err();
        assert!(stalled.to_string().contains("for 60 s"), "{stalled}");

        let mut pace = Pace::new(begun);
        pace.advance(progress(1, PASSES_MAX), begun).unwrap();
        let endless = pace.advance(progress(2, PASSES_MAX + 1), begun).unwrap_err();
        assert!(endless.to_string().contains("faster than it can be sent"), "{endless}");
    }

    #[test]
    fn qemus_answers_are_read() {
        let answer = json!({
            "status": "failed", "error-desc": "broken pipe", "total-time": 2100, "downtime": 40,
            "ram": { "transferred": 7, "remaining": 5, "dirty-sync-count": 3 },
        });
        assert_eq!(Status::of(&answer), Status::Failed("broken pipe".to_owned()));
        let expected = Progress {
            transferred_bytes: 7,
            remaining_bytes: 5,
            passes: 3,
            elapsed: Duration::from_millis(2100),
            downtime: Duration::from_millis(40),
        };
        assert_eq!(Progress::of(&answer), expected);
        assert_eq!(Status::of(&json!({})), Status::None);
        assert!(!Status::of(&json!({ "status": "cancelling" })).is_over());
    }
}
