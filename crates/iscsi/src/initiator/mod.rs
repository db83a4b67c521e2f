//! The initiator: a logical unit of some iSCSI target as a [`Disk`].
//!
//! Consistency: the target's; writes that cover a logical block only in part exclude all others, because they
//! are a read and a write. Retries: a lost or silent target is logged in to again with the same ISID, which ends
//! the session that was there (RFC 7143 §6.3.5), so that nothing of it is carried out later; then all commands
//! that were not answered are sent again. Reads may be repeated, and so may writes, which are of whole ranges.
//! How long that may take is [`Retry`]'s to say. A unit that comes back with another size or name is not used.
//! Durability: what a flush has answered is durable; a target that *crashes* loses writes that it answered and
//! that were not flushed, and the initiator cannot know of it. Cancellation: a dropped operation may still be
//! carried out; its answer is ignored. Crash: the initiator keeps no state.
//!
//! One session has one connection. `discard` is done as writing zeroes is, because UNMAP does not promise zeroes
//! and [`Disk::discard`] does; where the unit can, both give the space back.

mod address;
mod connection;
mod discovery;
mod disk;
pub(crate) mod fuzz;
pub mod limits;
mod login;
mod scsi;
mod session;
mod unit;
mod wire;

use std::io;
use std::time::Duration;

use block::{Access, BoxFuture, Disk, DiskError, Extent};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use address::{Address, AddressError, PORT_DEFAULT};
pub use discovery::{Discovered, discover};

use crate::chap::{Algorithm, Credentials};
use crate::name::IscsiName;
use crate::pdu::{Isid, login_status};
use connection::Connector;
use disk::UnitClient;
use limits::{CONNECT_TIME_MAX, LOGOUT_TIME_MAX, QUEUE_MAX};
use login::{Goal, LoginFault};

/// How long operations wait for a target that cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Until it comes back: whoever waits sees latency, not errors.
    Forever,
    /// That long after the session was lost; then they fail, and so do further ones until it is back.
    For(Duration),
}

/// Whether PDUs carry checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Digests {
    /// If the target can.
    Preferred,
    /// Only if the target insists.
    Avoided,
}

/// What is proved at the login, and by whom (CHAP).
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    /// What we prove to the target, if it asks.
    pub initiator: Option<Credentials>,
    /// What the target has to prove to us; needs `initiator`, and another secret than that.
    pub target: Option<Credentials>,
}

/// How an initiator behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its own name, by which targets decide who may see what.
    pub name: IscsiName,
    /// Whether PDUs carry checksums.
    pub digests: Digests,
    /// How long operations wait for a lost target.
    pub retry: Retry,
    /// A connection on which nothing arrives for so long counts as lost; halfway the target is pinged.
    pub silence_max: Duration,
    /// A command that is not answered for so long is taken for lost, and its connection with it. It must be
    /// longer than the target's slowest flush.
    pub answer_max: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            name: name_of_host(),
            digests: Digests::Preferred,
            retry: Retry::Forever,
            // A target that is there answers a ping at once, even if it is busy.
            silence_max: Duration::from_secs(10),
            // A minute is beyond the slowest flush of a loaded disk, and below what an operator waits.
            answer_max: Duration::from_secs(60),
        }
    }
}

/// The name of an initiator on this host: `iqn.2026-11.virtman:HOSTNAME`.
pub fn name_of_host() -> IscsiName {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let clean = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let host: String = host.trim().chars().take(64).map(clean).collect();
    let host = if host.is_empty() { "node" } else { &host };
    format!("iqn.2026-11.virtman:{host}").parse().expect("what no name may have was replaced")
}

/// Why a logical unit could not be used. The variants are the caller's next moves.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It could not be reached, or the connection broke at once: look at the address and the network.
    #[error("the iSCSI target cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// It took longer than [`CONNECT_TIME_MAX`].
    #[error("the iSCSI target did not answer within {CONNECT_TIME_MAX:?}")]
    TooSlow,
    /// The secret or the name that goes with it is wrong, or is missing.
    #[error(
        "the iSCSI target does not accept the credentials: check the name of the user and the secret, or give \
         them if none were given"
    )]
    Credentials,
    /// The target knows us, or not, and does not let us in.
    #[error("the iSCSI target does not let this initiator in: allow its name there")]
    Forbidden,
    /// There is no such target at this portal.
    #[error("there is no such iSCSI target at this portal, or this initiator may not see it")]
    NotFound,
    /// The target did not prove who it is: the secret for it is wrong, or it is an impostor.
    #[error("the iSCSI target did not prove that it knows its secret (mutual CHAP): do not trust it")]
    Unproven,
    /// The target has no logical unit of this number.
    #[error("the iSCSI target has no logical unit of this number, or it is gone")]
    NoUnit,
    /// The target or the unit cannot serve just now: try again later.
    #[error("the iSCSI target cannot serve now: {0}")]
    Unready(String),
    /// The target breaks the protocol.
    #[error("the iSCSI target cannot be understood: {0}")]
    Protocol(String),
    /// What was asked for cannot be had.
    #[error("the logical unit cannot be used: {0}")]
    Unusable(String),
}

impl ConnectError {
    fn of_login(fault: &LoginFault) -> ConnectError {
        let class_of_target_errors = 0x03;
        match *fault {
            LoginFault::Refused(status) => match status {
                login_status::AUTHENTICATION => ConnectError::Credentials,
                login_status::FORBIDDEN => ConnectError::Forbidden,
                login_status::NOT_FOUND | login_status::REMOVED => ConnectError::NotFound,
                status if status >> 8 == class_of_target_errors => {
                    ConnectError::Unready(format!("its login status is {status:#06x}"))
                }
                status => ConnectError::Protocol(format!("it refused the login with status {status:#06x}")),
            },
            LoginFault::Unproven => ConnectError::Unproven,
            _ => ConnectError::Protocol(shown(&fault.to_string())),
        }
    }
}

/// The beginning of a text that a target had a part in, as it may be shown on a terminal.
fn shown(text: &str) -> String {
    const SHOWN_CHARACTERS_MAX: usize = 200;
    text.chars().take(SHOWN_CHARACTERS_MAX).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A logical unit as a disk.
#[derive(Debug)]
pub struct Initiator {
    client: UnitClient,
    task: JoinHandle<()>,
}

impl Initiator {
    /// Logs in to a target and opens one of its logical units, on the runtime of the caller, which carries the
    /// session. Tried once: retries begin after the first success. [`Address::user`] is not looked at: who has a secret has put the name into `secrets`.
    pub async fn connect(
        address: &Address,
        secrets: Secrets,
        options: Options,
    ) -> Result<Initiator, ConnectError> {
        let connector = connector_of(
            (&address.host, address.port),
            Some(&address.target),
            address.lun_on_wire(),
            secrets,
            options,
        )?;
        let (wire, unit) = connector.connect().await?;
        let (sender, jobs) = mpsc::channel(QUEUE_MAX);
        let client = UnitClient::new(unit.clone(), sender, connector.options.retry);
        let task = tokio::spawn(connection::run(connector, wire, unit, jobs));
        Ok(Initiator { client, task })
    }

    /// Logs out. Dropping the initiator instead just cuts the connection.
    pub async fn close(mut self) {
        self.client.close();
        // Whoever cannot be reached need not be taken leave of.
        let _ = tokio::time::timeout(2 * LOGOUT_TIME_MAX, &mut self.task).await;
    }
}

impl Drop for Initiator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn connector_of(
    portal: (&str, u16),
    target: Option<&IscsiName>,
    lun: u64,
    secrets: Secrets,
    options: Options,
) -> Result<Connector, ConnectError> {
    if let Some(expected) = &secrets.target {
        let Some(own) = &secrets.initiator else {
            let why = "a target proves itself only to an initiator that proves itself too: give both secrets";
            return Err(ConnectError::Unusable(why.to_owned()));
        };
        // RFC 7143 §9.2.1: else our own answer to a challenge would do for the target's.
        let sign = |of: &Credentials| of.respond(Algorithm::Sha256, 0, &[]);
        if sign(own) == sign(expected) {
            let why = "the secrets of the initiator and of the target must not be the same";
            return Err(ConnectError::Unusable(why.to_owned()));
        }
    }
    if options.silence_max < Duration::from_millis(4) {
        return Err(ConnectError::Unusable("its silence_max is below 4 ms".to_owned()));
    }
    let goal = Goal {
        initiator: options.name.clone(),
        target: target.cloned(),
        isid: random_isid(),
        secrets,
        digests: match options.digests {
            Digests::Preferred => "CRC32C,None",
            Digests::Avoided => "None,CRC32C",
        },
    };
    Ok(Connector { host: portal.0.to_owned(), port: portal.1, lun, goal, options })
}

/// An identifier of the random kind (RFC 7143 §11.12.5), different for each initiator.
fn random_isid() -> Isid {
    const RANDOM: u8 = 0x80;
    let mut isid: [u8; 6] = rand::random();
    isid[0] = RANDOM;
    Isid(isid)
}

impl Disk for Initiator {
    fn size_bytes(&self) -> u64 {
        self.client.unit().size_bytes
    }

    fn access(&self) -> Access {
        self.client.unit().access
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(self.client.read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(self.client.write(offset, data))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(self.client.write_zeroes(offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(self.client.discard(offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(self.client.flush())
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(self.client.extents(offset, len))
    }
}
