//! Whether a guest runs: asking QEMU, and telling it.
//!
//! *Cancellation:* all may be cancelled and called again.

use serde_json::json;

use super::settle::Settling;
use super::standstill::Recovery;
use super::{Qemu, VmError};

/// What a VM is doing, in QEMU's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
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
    pub async fn state(&self) -> Result<RunState, VmError> {
        let answer = self.control("query-status", json!({})).await?;
        match answer["status"].as_str() {
            Some(status) => Ok(RunState::of(status)),
            None => Err(VmError::Control("query-status names no status".to_owned())),
        }
    }

    /// Lets the guest go on: one that was paused, that waits for room, that arrived here, or whose memory has
    /// left for a destination where it was never resumed. Waits while [`begin_migration`](Self::begin_migration)
    /// has it. If QEMU does not let it go on in time, [`supervise`](Self::supervise) goes on trying, and
    /// [`standstill`](Self::standstill) says so.
    pub async fn resume(&self) -> Result<(), VmError> {
        let _turn = self.turns.run().await;
        resume_in_turn(self).await
    }

    /// Pauses the guest once what it asked its disk for is done. One that waits for room goes on doing that.
    #[cfg(test)]
    pub async fn pause(&self) -> Result<(), VmError> {
        let _turn = self.turns.run().await;
        self.control("stop", json!({})).await?;
        Ok(())
    }
}

/// Lets the guest go on, for who has the turn; see [`Qemu::resume`].
pub(crate) async fn resume_in_turn(vm: &Qemu) -> Result<(), VmError> {
    let resumed = continue_when_settled(vm).await;
    match &resumed {
        Ok(()) => {
            vm.standing.finish(Recovery::Resume);
            vm.standing.see(None);
        }
        // Its process has ended: there is nothing that could go on.
        Err(VmError::Gone) => {}
        Err(error) => vm.standing.request(Recovery::Resume, Some(error.to_string())),
    }
    resumed
}

/// `cont`, given again while QEMU refuses it for a moment, as it does right after a migration.
async fn continue_when_settled(vm: &Qemu) -> Result<(), VmError> {
    let mut settling = Settling::begin();
    loop {
        match vm.control("cont", json!({})).await {
            Ok(_) => return Ok(()),
            Err(error) => settling.wait_after(error).await?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_those_of_qemu() {
        assert_eq!(RunState::of("io-error"), RunState::IoError);
        assert_eq!(RunState::of("suspended"), RunState::Other("suspended".to_owned()));
    }
}
