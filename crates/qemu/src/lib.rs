//! Runs guests: one QEMU process for each VM, which outlives the daemon that started it.
//!
//! Everything that is known of a VM's process stands in its directory, so that a restarted daemon finds its
//! guests again with [`Qemu::adopt`]:
//!
//! | file | what it is |
//! |---|---|
//! | `qemu.json` | how and when the last start was made; written before the process exists |
//! | `qemu.pid` | the process number, written by QEMU |
//! | `qemu.log` | what QEMU itself had to say |
//! | `qmp.sock` | QEMU's control socket, for one command at a time |
//! | `events.sock`, `migrate.sock` | the same for who stays: to wait for events, to migrate |
//! | `memory.sock` | where the memory of a guest that is migrated goes out or comes in |
//! | `console.sock`, `console.log` | the serial console, and what it printed since the last start |
//! | `console.log.1` | what it printed in the run before |
//! | `agent.sock` | the channel of the guest agent |
//! | `frozen` | is there while the guest's file systems are frozen |
//!
//! Invariants:
//! - No string from outside reaches an option list of QEMU unescaped: options are JSON where QEMU takes it.
//! - A process is signalled only through a pidfd that was opened before its identity was checked.
//! - Whoever owns a VM calls [`Qemu::start`] and [`Qemu::stop`] of it one after the other.

mod accel;
mod agent;
pub mod console;
mod machine;
mod migrate;
mod process;
mod qemu;
mod qmp;
mod ready;
pub mod seed;
mod settle;
mod spec;
mod standstill;
mod state;
mod supervise;
#[cfg(test)]
mod tests;

pub use accel::{Accel, AccelChoice, AccelMode};
pub use agent::Frozen as FrozenGuest;
pub use machine::Platform;
pub use migrate::Progress as MemoryProgress;
pub use qemu::Qemu;
pub use ready::Ready;
pub use settle::RefusalClass;
pub use spec::{DirectBoot, OnFull, VmDisk, VmSpec};
pub use state::RunState;

use std::io;
use std::path::PathBuf;

/// The program that runs guests.
const QEMU: &str = "qemu-system-x86_64";

/// What can go wrong with a VM's process.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// QEMU is not installed: nothing helps but installing it.
    #[error("{QEMU} is not installed: install the Debian package qemu-system-x86")]
    NoQemu,
    /// There is a live process for this directory: adopt it, or stop it first.
    #[error("the VM is already running as process {pid}")]
    Running {
        /// The process number.
        pid: i32,
    },
    /// The VM's process has gone.
    #[error("the VM is not running")]
    Gone,
    /// This VM cannot be run as it was asked for.
    #[error("{0}")]
    Unfit(String),
    /// QEMU refused to start; the text is its own.
    #[error("QEMU did not start: {0}")]
    Refused(String),
    /// The VM's process lives, but its control socket gives no sensible answer.
    #[error("QEMU's control socket: {0}")]
    Control(String),
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {reason}")]
    CommandRefused {
        /// The command's name.
        command: String,
        /// What kind of refusal it is.
        class: RefusalClass,
        /// QEMU's own words.
        reason: String,
    },
    /// A migration did not come about. At the source the guest is as it was before; at the destination there
    /// is none.
    #[error("the migration failed: {0}")]
    Migration(String),
    /// The VM's directory cannot be used.
    #[error("{}: {source}", path.display())]
    File {
        /// The file in question.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Most characters that are kept of what QEMU or a guest says.
const WORDS_CHARS_MAX: usize = 2000;

/// What QEMU or a guest says, bounded and without what a terminal would act upon. Whatever is kept, logged or shown of
/// it goes through here first.
fn printable(words: &str) -> String {
    words.trim().chars().take(WORDS_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl VmError {
    /// Names the file that an I/O error is about.
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> VmError {
        let path = path.into();
        move |source| VmError::File { path, source }
    }
}
