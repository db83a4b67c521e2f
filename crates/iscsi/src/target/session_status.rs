//! What is known of a session with a target while it is active: who it is, and what it has done so far.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use super::mailbox::Mailbox;
use crate::login::Authentication;
use crate::name::IscsiName;

/// A session with a target, as it was when it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionStatus {
    /// What the initiator calls itself.
    pub initiator: IscsiName,
    /// Where it comes from.
    pub address: SocketAddr,
    /// The portal group that it came through.
    pub group: u16,
    /// What was proved at its login.
    pub authentication: Authentication,
    /// When it logged in.
    pub since: SystemTime,
    /// SCSI commands that came.
    pub commands: u64,
    /// Bytes of data that were read, as far as they were made ready to be sent.
    pub read_bytes: u64,
    /// Bytes of data that came to be written or compared.
    pub written_bytes: u64,
}

/// What a session has done so far. One task counts, anybody may look.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    commands: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Traffic {
    pub(super) fn command(&self) {
        self.commands.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, bytes: usize) {
        self.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn written(&self, bytes: usize) {
        self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// A session that is active.
pub(super) struct ActiveSession {
    pub(super) mailbox: Mailbox,
    pub(super) traffic: Traffic,
    address: SocketAddr,
    authentication: Authentication,
    since: SystemTime,
}

impl ActiveSession {
    pub(super) fn new(address: SocketAddr, authentication: Authentication) -> ActiveSession {
        let (mailbox, traffic) = (Mailbox::new(), Traffic::default());
        ActiveSession { mailbox, traffic, address, authentication, since: SystemTime::now() }
    }

    pub(super) fn status(&self, initiator: &IscsiName, group: u16) -> SessionStatus {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SessionStatus {
            initiator: initiator.clone(),
            address: self.address,
            group,
            authentication: self.authentication,
            since: self.since,
            commands: count(&self.traffic.commands),
            read_bytes: count(&self.traffic.read_bytes),
            written_bytes: count(&self.traffic.written_bytes),
        }
    }
}
