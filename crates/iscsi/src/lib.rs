//! iSCSI: a target that serves any [`Disk`](block::Disk) as a SCSI disk, and an initiator that is a `Disk`.
//!
//! - [`scsi`] is the disk as SCSI sees it (SPC-4, SBC-3): commands in, data and sense out, no transport.
//! - [`pdu`], [`text`], [`params`], [`chap`] are the words of RFC 7143, for either side of a connection.
//! - [`login`] and the sessions of [`target`] are its state machines, without sockets and clocks, fuzzed.
//! - [`Server`] is the thin shell: listeners, deadlines, pings.
//! - [`Initiator`] is the other side, for targets of anybody.
//!
//! `docs/iscsi.md` lists what is supported. What this crate does not know: images, the hierarchy, who may see
//! which disk (its user says so with a [`Target`]), and where secrets are kept.

pub mod chap;
#[doc(hidden)]
pub mod fuzz;
pub mod initiator;
pub mod limits;
pub mod login;
pub mod name;
pub mod params;
pub mod pdu;
pub mod scsi;
pub mod target;
pub mod text;

pub use chap::Credentials;
pub use initiator::Initiator;
pub use login::Authentication;
pub use name::IscsiName;
pub use target::{AddError, Admission, Portal, Server, ServerOptions, SessionStatus, Target};
