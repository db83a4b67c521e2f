//! Whether a guest runs, and guests that stand still because there is no room for what they write.
//!
//! A guest whose disk has no room is paused by QEMU with the write in its hands, and writes it again when it is
//! resumed: it sees latency and no error, if its [`OnFull`](super::OnFull) is to pause.
//!
//! - *Cancellation:* all may be cancelled and called again. A cancelled [`Qemu::resume_when`] leaves the guest as
//!   it is.
//! - *Crash:* QEMU knows its state; a later daemon asks for it first.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::qmp::Qmp;
use super::{Qemu, VmError};

/// How often it is asked whether there is room, for a guest that waits for some. Its users wait too.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);

/// The same for a guest that was resumed and found no room all the same, time and again.
const ROOM_INTERVAL_MAX: Duration = Duration::from_secs(30);

/// A guest that ran for this long after it was resumed found room.
const RAN_LONG: Duration = Duration::from_secs(60);

/// How often a guest's state is looked at without any event that says so: QEMUs of an earlier version send us
/// none. Asking costs QEMU less than a millisecond.
const LOOK_INTERVAL: Duration = Duration::from_secs(15);

/// What a VM is doing, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RunState {
    /// The guest runs.
    Running,
    /// Somebody paused it, or it arrived and nobody let it go on yet.
    Paused,
    /// There is no room for what it writes.
    IoError,
    /// It is switched on and does not run yet.
    Prelaunch,
    /// It waits for the memory of a guest that runs elsewhere.
    InMigrate,
    /// It stands still while the last of its memory leaves.
    FinishMigrate,
    /// Its memory has left.
    PostMigrate,
    /// It is switched off, and its process is about to end.
    Shutdown,
    /// Anything else, such as a guest that sleeps.
    Other(String),
}

impl RunState {
    fn of(status: &str) -> RunState {
        match status {
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "io-error" => RunState::IoError,
            "prelaunch" => RunState::Prelaunch,
            "inmigrate" => RunState::InMigrate,
            "finish-migrate" => RunState::FinishMigrate,
            "postmigrate" => RunState::PostMigrate,
            "shutdown" => RunState::Shutdown,
            other => RunState::Other(other.to_owned()),
        }
    }
}

impl Qemu {
    /// What the VM is doing.
    pub(crate) async fn state(&self) -> Result<RunState, VmError> {
        let answer = self.control("query-status", json!({})).await?;
        match answer["status"].as_str() {
            Some(status) => Ok(RunState::of(status)),
            None => Err(VmError::Control("query-status names no status".to_owned())),
        }
    }

    /// Lets the guest go on: one that was paused, that waits for room, that arrived here, or whose memory has
    /// left for a destination where it was never resumed. Waits while [`begin_migration`](Self::begin_migration)
    /// has it.
    pub(crate) async fn resume(&self) -> Result<(), VmError> {
        let _turn = self.run_turn().await;
        self.control("cont", json!({})).await?;
        Ok(())
    }

    /// Pauses the guest once what it asked its disk for is done. One that waits for room goes on doing that.
    #[cfg(test)]
    pub(crate) async fn pause(&self) -> Result<(), VmError> {
        let _turn = self.run_turn().await;
        self.control("stop", json!({})).await?;
        Ok(())
    }

    /// For as long as the VM's process lives: resumes the guest whenever it stands still for want of room, once
    /// `room` says that there is some. One such call at a time for each VM.
    pub(crate) async fn resume_when(&self, room: impl Fn() -> bool) {
        tokio::select! {
            () = self.watch_room(room) => {}
            ended = self.exited() => if let Err(error) = ended {
                tracing::warn!(vm = %self.name(), %error, "cannot watch a guest's process");
            }
        }
    }

    async fn watch_room(&self, room: impl Fn() -> bool) {
        let mut patience = Patience::default();
        let mut events = None;
        loop {
            // Before the look, so that nothing happens unseen in between. Whatever the reason is for which there
            // are no events, it is tried again after the next look.
            if events.is_none() {
                events = Qmp::connect(&self.files().events_socket()).await.ok();
            }
            if let Err(error) = self.resume_if_full(&room, &mut patience).await {
                tracing::debug!(vm = %self.name(), %error, "cannot ask for a guest's state");
            }
            let stopped = async {
                match &mut events {
                    Some(events) => events.happened("STOP").await,
                    None => std::future::pending().await,
                }
            };
            if let Ok(Err(_)) = tokio::time::timeout(LOOK_INTERVAL, stopped).await {
                events = None;
                tokio::time::sleep(ROOM_INTERVAL).await;
            }
        }
    }

    async fn resume_if_full(&self, room: &impl Fn() -> bool, patience: &mut Patience) -> Result<(), VmError> {
        if self.state().await? != RunState::IoError {
            return Ok(());
        }
        tracing::info!(vm = %self.name(), "guest paused: there is no room for what it writes to its disk");
        tokio::time::sleep(patience.after_pause(Instant::now())).await;
        while !room() {
            tokio::time::sleep(ROOM_INTERVAL).await;
        }
        // From the look to the command nobody else may decide otherwise, above all no migration.
        let _turn = self.run_turn().await;
        if self.state().await? == RunState::IoError {
            self.control("cont", json!({})).await?;
            patience.resumed(Instant::now());
            tracing::info!(vm = %self.name(), "guest resumed: there is room for its disk again");
        }
        Ok(())
    }
}

/// How long a guest that is paused waits before it is resumed: ever longer if that did not help the last time.
#[derive(Default)]
struct Patience {
    interval: Duration,
    resumed: Option<Instant>,
}

impl Patience {
    fn after_pause(&mut self, now: Instant) -> Duration {
        let in_vain = self.resumed.is_some_and(|resumed| now.duration_since(resumed) < RAN_LONG);
        self.interval = match in_vain {
            true => (self.interval * 2).min(ROOM_INTERVAL_MAX),
            false => ROOM_INTERVAL,
        };
        self.interval
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

    #[test]
    fn states_are_those_of_qemu() {
        assert_eq!(RunState::of("io-error"), RunState::IoError);
        assert_eq!(RunState::of("suspended"), RunState::Other("suspended".to_owned()));
    }
}
