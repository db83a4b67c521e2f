//! The target: who is served what, and the sessions.
//!
//! [`Server`] is the shell with the sockets; a `Session` is the full feature phase as a state machine: PDUs
//! in, PDUs out, commands begun and finished.
//!
//! Consistency: a command that begins after another was answered sees its effect, through whatever session.
//! Answers come in the order in which commands finish; commands of one session that are ORDERED keep their
//! place. Retries: none here; at error recovery level 0 an initiator logs in again and repeats. Cancellation:
//! dropping what [`Server::serve`] returns closes its connections and withdraws their commands. Crash: no
//! state but what the disks keep.
//!
//! What an initiator can cost is bounded by [`limits`](crate::limits), whether it is slow, silent or hostile.

mod buffers;
mod commands;
pub(crate) mod fuzz;
mod mailbox;
mod memory_budget;
mod registry;
mod server;
mod session;
mod session_status;
mod tasks;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

pub use registry::AddError;
pub use server::{ServeError, Server, ServerOptions};
pub use session_status::SessionStatus;

use crate::chap::Credentials;
use crate::name::IscsiName;
use crate::scsi::Unit;

/// A target: units under one name.
pub struct Target {
    /// Its name.
    pub name: IscsiName,
    /// A name for people; empty if there is none.
    pub alias: String,
    /// Its logical units; the number of each is its place.
    pub units: Vec<Arc<Unit>>,
    /// Who may see it and log in.
    pub admission: Admission,
}

/// Who may log in to a target.
#[derive(Debug, Clone, Default)]
pub struct Admission {
    /// The initiators that may; `None` means all.
    pub initiators: Option<BTreeSet<IscsiName>>,
    /// What they have to prove; `None` means nothing.
    pub initiator: Option<Credentials>,
    /// What the target proves to initiators that ask.
    pub target: Option<Credentials>,
}

/// An address at which a server can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Portal {
    /// The address that initiators are told.
    pub address: SocketAddr,
    /// Its portal group, and the relative port identifier of every target behind it.
    pub group: u16,
}
