//! Every bound of this crate, each with its reason.

use std::time::Duration;

pub use block::limits::{EXTENTS_MAX, REQUEST_BYTES_MAX};

/// Longest string of the protocol in bytes, as the specification sets it for names and messages.
pub const STRING_BYTES_MAX: usize = 4096;

/// Longest data of one option in bytes: an export name and a dozen metadata queries of full length.
pub const OPTION_BYTES_MAX: usize = 64 << 10;

/// Options in one negotiation. Real clients send fewer than ten; `nbdinfo` about as many again.
pub const OPTIONS_MAX: u32 = 128;

/// Time that a client has from connecting to the transmission phase, TLS included. A client that is
/// slower than this holds a connection that another could use.
pub const NEGOTIATION_TIME_MAX: Duration = Duration::from_secs(30);

/// Time in which outstanding requests may finish once a connection is to be closed.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// Size of a connection's receive buffer in bytes: 32 writes of 4 KiB arrive in one system call. Only the
/// part that was ever used costs memory.
pub const INPUT_BYTES: usize = 256 << 10;

/// Size of one piece of queued replies in bytes: 32 reads of 4 KiB leave in one system call.
pub const BATCH_BYTES: usize = 256 << 10;

/// Longest payload in bytes that shares the connection's buffers. A longer one gets a buffer of its own
/// that the socket fills or empties directly, because copying it would cost more than a system call.
pub const INLINE_BYTES_MAX: usize = 64 << 10;

/// Bytes of unfinished requests and unsent replies above which a connection reads no further request: full
/// means wait. One request may exceed it, so a connection never holds more than this and
/// [`REQUEST_BYTES_MAX`] together.
pub const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;

/// Requests of one connection that wait for the disk at a time: twice the queue depth of the deepest
/// clients (QEMU has 16, `nbdcopy` 64, the kernel 128).
pub const IN_FLIGHT_MAX: usize = 256;

/// Bytes of empty buffers that a connection keeps for its next requests: one read of 1 MiB and a batch.
pub const SPARE_BYTES_MAX: usize = (1 << 20) + (512 << 10);

/// Shortest hole in bytes that is told as a hole in a reply to a read: it must save more than the two
/// further chunk heads that it costs, so that a reply never outgrows its buffer.
pub const HOLE_BYTES_MIN: u64 = 4096;

/// Shortest read in bytes for which holes are looked up at all.
pub const SPARSE_READ_BYTES_MIN: u64 = 64 << 10;

/// Bytes that are written or read at a time where a command has no payload but needs one (allocating
/// zeroes, filling caches).
pub const STEP_BYTES: usize = 256 << 10;

/// Requests of a client that wait for their turn on one connection; further callers wait.
pub const QUEUE_MAX: usize = 64;

/// Connections of one client at most: beyond a few, a disk gains nothing.
pub const CONNECTIONS_MAX: usize = 16;

/// Replies that a server may send to the options of one client.
pub const OPTION_REPLIES_MAX: u32 = 1024;

/// Pause before a lost connection is dialled again the second time; it doubles each time.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// Longest pause between two attempts to connect: a server that came back is found within it.
pub const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// Longest range in bytes of a client's command without payload: fits 32 bits, and a multiple of every
/// block size.
pub const RANGE_BYTES_MAX: u64 = 1 << 30;
