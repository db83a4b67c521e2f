//! Bounds of the initiator, each with its reason; those that both sides share stand in
//! [`limits`](crate::limits).

use std::time::Duration;

/// Longest transfer of one command in bytes: a longer read or write becomes several, which are under way
/// together. Beyond it nothing is gained, and less has to be sent again after a connection was lost.
pub const PIECE_BYTES_MAX: u32 = 1 << 20;

/// Operations that wait for their turn on the connection; further callers wait.
pub(super) const QUEUE_MAX: usize = 64;

/// Bytes that are gathered to be sent with one system call. What is behind them stays where it is.
pub(super) const OUTPUT_BYTES: usize = 256 << 10;

/// Size of the receive buffer in bytes: two PDUs of full length, with their headers and digests, so that there
/// is always room for the rest of one. Only the part that was ever used costs memory.
pub(super) const INPUT_BYTES: usize = 2 * (crate::limits::SEGMENT_BYTES_MAX as usize + 4096);

/// Redirections that one login follows: a target and its successor, and one to spare.
pub const REDIRECTS_MAX: u32 = 3;

/// Times that one command is repeated at once because the logical unit says that something has happened to
/// it, or that it aborted the command. A unit has a queue of a few such attentions at most.
pub(super) const ATTENTIONS_MAX: u32 = 16;

/// Pings of the target that wait for our answer: real ones have one.
pub(super) const PONGS_MAX: usize = 16;

/// Time from dialling to a logical unit of which everything is known.
pub const CONNECT_TIME_MAX: Duration = Duration::from_secs(15);

/// Time that the target has to answer a logout.
pub(super) const LOGOUT_TIME_MAX: Duration = Duration::from_secs(2);

/// Pause before a lost target is dialled again the second time, and before a command is repeated because the
/// target was busy; it doubles each time.
pub(super) const BACKOFF_FIRST: Duration = Duration::from_millis(100);

/// Longest such pause: a target that came back is found within it.
pub(super) const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Text in bytes that a target may send about the targets that it has: thousands of them.
pub const DISCOVERY_BYTES_MAX: usize = 1 << 20;

/// Longest address of a logical unit in bytes: names of 223 bytes each, a host, and some to spare.
pub const ADDRESS_BYTES_MAX: usize = 1024;

/// Longest sense data in bytes that is kept (SPC-4 §4.5.1).
pub(super) const SENSE_BYTES_MAX: usize = 252;

/// Logical blocks of one command that clears or unmaps (512 MiB to 4 GiB), if the unit names no lower limit:
/// it is answered within a time in which targets are not thought to be dead.
pub(super) const CLEAR_BLOCKS_MAX: u32 = 1 << 20;

/// Room in bytes for the answer to GET LBA STATUS: 4095 ranges.
pub(super) const STATUSES_BYTES: u32 = 64 << 10;
