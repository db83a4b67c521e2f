//! Lets guests go on that stand still: for want of room, or because something before failed.
//!
//! A guest whose disk has no room is paused by QEMU with the write in its hands, and writes it again when it is
//! resumed: it sees latency and no error, if its [`OnFull`](super::OnFull) is to pause. What others could not do
//! to let a guest go on is a [recovery](super::standstill) that is due, and is tried here until it succeeds.
//!
//! - *Retries:* for as long as the VM's process lives, ever more seldom up to [`AGAIN_AFTER_MAX`].
//! - *Cancellation:* a cancelled [`Qemu::supervise`] leaves the guest as it is, and what is due.
//! - *Crash:* QEMU knows its state; a later daemon asks for it first.

use std::time::Duration;

use block::Backoff;
use serde_json::json;
use tokio::time::Instant;

use super::migrate::end_migration;
use super::qmp::Qmp;
use super::standstill::{Cause, Recovery};
use super::state::RunState;
use super::{Qemu, VmError};

/// How often it is asked whether there is room, for a guest that waits for some. Its users wait too.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);

/// Pause before a recovery that failed is tried for the second time. Each such pause is twice as long as the one
/// before.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The longest pause before a guest that stands still is told to go on once more, after that did not help time and
/// again.
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(30);

/// A guest that ran for this long after it was resumed found room.
const RAN_LONG: Duration = Duration::from_secs(60);

/// How often a guest's state is looked at without any event that says so: QEMUs of an earlier version send us
/// none. Asking costs QEMU less than a millisecond.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);

/// How long a guest's agent may take to thaw its file systems, each time that it is asked.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);

impl Qemu {
    /// For as long as the VM's process lives: does each [`Recovery`] that is due, and resumes the guest whenever it
    /// stands still for want of room, once `room` says that there is some. One such call at a time for each VM.
    pub async fn supervise(&self, room: impl Fn() -> bool) {
        let supervisor = Supervisor { vm: self };
        tokio::select! {
            () = supervisor.watch(room) => {}
            ended = self.exited() => if let Err(error) = ended {
                tracing::warn!(vm = %self.name(), %error, "guest_not_watched");
            }
        }
    }

    /// Has [`supervise`](Self::supervise) put right what an earlier daemon may have left half-way when it died: a
    /// migration under way, or a guest with frozen file systems. For a guest that belongs to this node.
    pub fn recover(&self) {
        self.standing.request(Recovery::EndMigration, None);
        if self.files.frozen().exists() {
            let reason = "the daemon that froze them has ended".to_owned();
            self.standing.request(Recovery::Thaw, Some(reason));
        }
    }
}

/// What lets one guest go on.
struct Supervisor<'a> {
    vm: &'a Qemu,
}

impl Supervisor<'_> {
    async fn watch(&self, room: impl Fn() -> bool) {
        let mut patience = Patience::default();
        let mut backoff = Backoff::new(RETRY_INTERVAL, AGAIN_AFTER_MAX);
        let mut events = None;
        loop {
            // Before the look, so that nothing happens unseen in between. Whatever the reason is for which there
            // are no events, it is tried again after the next look.
            if events.is_none() {
                events = Qmp::connect(&self.vm.files.events_socket()).await.ok();
            }
            self.recover_due().await;
            if let Err(error) = self.resume_if_full(&room, &mut patience).await {
                tracing::debug!(vm = %self.vm.name(), %error, "cannot ask for a guest's state");
            }
            let is_due = self.vm.standing.is_any_due();
            let look_again = if is_due {
                backoff.pause()
            } else {
                backoff.reset();
                LOOK_INTERVAL
            };
            let stopped = async {
                match &mut events {
                    Some(events) => events.happened("STOP").await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                stopped = tokio::time::timeout(look_again, stopped) => if let Ok(Err(_)) = stopped {
                    events = None;
                    tokio::time::sleep(ROOM_INTERVAL).await;
                },
                () = self.vm.standing.requested() => {}
            }
        }
    }

    /// Tries each recovery that is due, once.
    async fn recover_due(&self) {
        for recovery in Recovery::ALL {
            if !self.vm.standing.is_due(recovery) {
                continue;
            }
            let done = match recovery {
                Recovery::EndMigration => self.end_migration_left_over().await,
                Recovery::Resume => self.resume_once_more().await,
                Recovery::Thaw => {
                    self.vm.agent().thaw_if_frozen(THAW_TIMEOUT).await.map(drop).map_err(|e| e.to_string())
                }
            };
            let vm = self.vm.name();
            match done {
                Ok(()) => tracing::debug!(%vm, ?recovery, "guest_recovered"),
                Err(reason) if self.vm.standing.failed(recovery, reason.clone()) => {
                    tracing::error!(%vm, ?recovery, reason, "guest_stands_still: it is tried again and again");
                }
                Err(reason) => tracing::debug!(%vm, ?recovery, reason, "the guest still stands still"),
            }
        }
    }

    async fn resume_once_more(&self) -> Result<(), String> {
        let _turn = self.vm.turns.run().await;
        // A migration may have taken it over meanwhile.
        if !self.vm.standing.is_due(Recovery::Resume) {
            return Ok(());
        }
        let resumed = async {
            if self.vm.state().await? != RunState::Running {
                self.vm.control("cont", json!({})).await?;
            }
            Ok::<_, VmError>(())
        };
        resumed.await.map_err(|error| error.to_string())?;
        self.vm.standing.finish(Recovery::Resume);
        tracing::info!(vm = %self.vm.name(), "guest_resumed: QEMU let it go on at last");
        Ok(())
    }

    /// Ends what is left of a migration that nobody drives, and lets the guest go on if its memory had left: it
    /// belongs to this node.
    async fn end_migration_left_over(&self) -> Result<(), String> {
        let _turn = self.vm.turns.run().await;
        // Another migration may have taken it over meanwhile.
        if !self.vm.standing.is_due(Recovery::EndMigration) {
            return Ok(());
        }
        let ended = async {
            end_migration(self.vm).await?;
            if self.vm.state().await? == RunState::PostMigrate {
                self.vm.control("cont", json!({})).await?;
            }
            Ok::<_, VmError>(())
        };
        ended.await.map_err(|error| error.to_string())?;
        self.vm.standing.finish(Recovery::EndMigration);
        Ok(())
    }

    async fn resume_if_full(&self, room: &impl Fn() -> bool, patience: &mut Patience) -> Result<(), VmError> {
        if self.look().await? != RunState::IoError {
            return Ok(());
        }
        tracing::info!(vm = %self.vm.name(), "guest_paused: there is no room for what it writes to its disk");
        tokio::time::sleep(patience.after_pause(Instant::now())).await;
        while !room() {
            tokio::time::sleep(ROOM_INTERVAL).await;
        }
        // From the look to the command nobody else may decide otherwise, above all no migration.
        let _turn = self.vm.turns.run().await;
        if self.vm.state().await? == RunState::IoError {
            self.vm.control("cont", json!({})).await?;
            patience.resumed(Instant::now());
            self.vm.standing.see(None);
            tracing::info!(vm = %self.vm.name(), "guest_resumed: there is room for its disk again");
        }
        Ok(())
    }

    /// Asks for the state, and notes whether it is one in which the guest stands still though nobody wants it to.
    async fn look(&self) -> Result<RunState, VmError> {
        // Who resumes the guest notes that too, with the turn.
        let _turn = self.vm.turns.run().await;
        let state = self.vm.state().await?;
        match &state {
            RunState::Running => self.vm.standing.see(None),
            RunState::IoError => self.vm.standing.see(Some(Cause::NoRoom)),
            RunState::Paused => self.vm.standing.see(Some(Cause::Halted("paused".to_owned()))),
            RunState::Other(word) => self.vm.standing.see(Some(Cause::Halted(word.clone()))),
            // Steps of a start, a migration or an end; for what fails in these a recovery is due.
            RunState::Prelaunch
            | RunState::InMigrate
            | RunState::FinishMigrate
            | RunState::PostMigrate
            | RunState::Shutdown => {}
        }
        Ok(state)
    }
}

/// How long a guest that is paused waits before it is resumed: ever longer if that did not help the last time.
struct Patience {
    backoff: Backoff,
    resumed: Option<Instant>,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience { backoff: Backoff::new(ROOM_INTERVAL, AGAIN_AFTER_MAX), resumed: None }
    }
}

impl Patience {
    fn after_pause(&mut self, now: Instant) -> Duration {
        let in_vain = self.resumed.is_some_and(|resumed| now.duration_since(resumed) < RAN_LONG);
        if !in_vain {
            self.backoff.reset();
        }
        self.backoff.pause()
    }

    fn resumed(&mut self, now: Instant) {
        self.resumed = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_finds_no_room_after_all_waits_ever_longer_and_one_that_ran_does_not() {
        let mut patience = Patience::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..8 {
            waits.push(patience.after_pause(now).as_secs());
            patience.resumed(now);
            now += Duration::from_millis(1);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(patience.after_pause(now + RAN_LONG), ROOM_INTERVAL);
    }
}
