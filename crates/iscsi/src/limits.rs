//! Every bound of this crate, each with its reason.

use std::time::Duration;

/// Longest data segment in bytes that we take in one PDU (`MaxRecvDataSegmentLength`): what open-iscsi and
/// libiscsi declare themselves; longer ones save nothing.
pub const SEGMENT_BYTES_MAX: u32 = 256 << 10;

/// Longest burst of data in bytes (`MaxBurstLength`): a write of 1 MiB needs one R2T.
pub const BURST_BYTES_MAX: u32 = 1 << 20;

/// Longest unsolicited data of one command in bytes (`FirstBurstLength`): a write of 64 KiB needs no R2T.
pub const FIRST_BURST_BYTES_MAX: u32 = 64 << 10;

/// R2Ts of one command under way (`MaxOutstandingR2T`): the next burst is asked for before the last has come.
pub const R2T_MAX: u32 = 2;

/// Longest transfer of one SCSI command in bytes: what an export may pass to a disk. The Block Limits page
/// tells it; some initiators do not look, and none goes beyond.
pub const TRANSFER_BYTES_MAX: u32 = block::limits::REQUEST_BYTES_MAX as u32;

/// Longest transfer in bytes that begins whatever other sessions hold. A longer one is told that the task set is
/// full while there is no memory for it; the longest that initiators use by themselves have 1 or 2 MiB.
pub const TRANSFER_BYTES_RESERVED: usize = 2 << 20;

/// Longest parameter list of a command in bytes, but for data that is written: UNMAP descriptors and mode
/// pages are shorter by far.
pub const PARAMETERS_BYTES_MAX: u32 = 64 << 10;

/// Commands of one session under way: the window that MaxCmdSN opens. open-iscsi has 128 by default.
pub const COMMANDS_MAX: u32 = 128;

/// Commands beyond the window that an initiator may send as immediate ones; more are rejected.
pub const IMMEDIATE_COMMANDS_MAX: u32 = 8;

/// Task management functions of one session that wait for what they aborted; more are refused.
pub const TASK_REQUESTS_MAX: usize = 8;

/// Bytes of transfers and of unsent replies above which a session begins no further transfer: full means that
/// it waits in the queue of commands. One transfer alone may exceed it.
pub const IN_FLIGHT_BYTES_MAX: usize = 8 << 20;

/// Unsent bytes above which a session begins no further read: they are sent sooner than a reader takes them, and
/// few buffers that are used over and over stay in the processor's cache.
pub const AHEAD_BYTES_MAX: usize = 1 << 20;

/// Bytes of unsolicited data of commands that have not begun: what an initiator may send with all commands that
/// the window takes. Such data cannot be made to wait; a command beyond is told that the task set is full.
pub const EARLY_BYTES_MAX: usize = COMMANDS_MAX as usize * FIRST_BURST_BYTES_MAX as usize;

/// Bytes of unsolicited data that a session may have whatever the others do: two commands of full length.
pub const EARLY_BYTES_RESERVED: usize = 2 * FIRST_BURST_BYTES_MAX as usize;

/// Bytes of replies that an initiator may leave untaken whatever the others do, before nothing more is read
/// from it.
pub const UNSENT_BYTES_RESERVED: usize = 256 << 10;

/// Bytes that a session may hold whatever the others do: one transfer with what comparing it takes, unsolicited data, and replies with the one that exceeds their bound and what is left of its buffer.
pub const RESERVED_BYTES: usize = TRANSFER_BYTES_RESERVED
    + STEP_BYTES
    + EARLY_BYTES_RESERVED
    + UNSENT_BYTES_RESERVED
    + SEGMENT_BYTES_MAX as usize
    + BATCH_BYTES;

/// Bytes that all sessions of a server together may hold beyond their reserves: ten busy ones have all that
/// [`IN_FLIGHT_BYTES_MAX`] lets them have.
pub const SHARED_BYTES_MAX: usize = 80 << 20;

/// Bytes of a connection for everything else: [`COMMANDS_MAX`] commands under way, its text, its task.
pub const STATE_BYTES: usize = 256 << 10;

/// What a server costs at worst in bytes, when every connection is hostile: 256 times (2.9 MiB + 0.5 MiB +
/// 0.25 MiB), and 80 MiB. The kernel's buffers of the sockets and the disks' own memory come on top.
pub const SERVER_BYTES_MAX: usize =
    CONNECTIONS_MAX * (RESERVED_BYTES + INPUT_BYTES + STATE_BYTES) + SHARED_BYTES_MAX;

const _: () = assert!(SERVER_BYTES_MAX <= 1 << 30, "a server costs at most 1 GiB");

/// Size of a connection's receive buffer in bytes: one PDU of full length and what comes with it. Only the
/// part that was ever used costs memory.
pub const INPUT_BYTES: usize = 2 * SEGMENT_BYTES_MAX as usize;

/// Longest piece in bytes that is gathered with others into one buffer to be sent.
pub const INLINE_BYTES_MAX: usize = 64 << 10;

/// Size of one such buffer in bytes: 32 reads of 4 KiB leave in one system call.
pub const BATCH_BYTES: usize = 256 << 10;

/// Longest data in bytes that is copied to other replies rather than sent from where it was read to.
pub const COPY_BYTES_MAX: usize = 16 << 10;

/// Bytes of empty buffers that a session with nothing under way keeps for its next transfers.
pub const SPARE_BYTES_MAX: usize = 2 << 20;

/// Pieces that are sent with one system call: the limit of Linux is 1024.
pub const VECTORS_MAX: usize = 64;

/// Longest data segment of a login request in bytes, as RFC 7143 §13.12 sets it.
pub const LOGIN_SEGMENT_BYTES_MAX: u32 = 8192;

/// Login requests of one connection: real initiators need three, or five with CHAP.
pub const LOGIN_REQUESTS_MAX: u32 = 32;

/// Text of one negotiation step or text request in bytes, over all its PDUs (RFC 7143 §6.1 asks for 8192).
pub const TEXT_BYTES_MAX: usize = 16 << 10;

/// Longest key in bytes (RFC 7143 §6.1).
pub const KEY_BYTES_MAX: usize = 63;

/// Longest iSCSI name in bytes (RFC 7143 §4.2.7.1).
pub const NAME_BYTES_MAX: usize = 223;

/// Longest binary value of a text key in bytes (RFC 7143 §12.1.3).
pub const BINARY_BYTES_MAX: usize = 1024;

/// Shortest CHAP secret in bytes: RFC 7143 §9.2.1 asks for 96 bits.
pub const SECRET_BYTES_MIN: usize = 12;

/// Longest CHAP secret in bytes: initiators take no more than 16 to 255.
pub const SECRET_BYTES_MAX: usize = 255;

/// Logical units of one target.
pub const UNITS_MAX: usize = 256;

/// Initiators that hold registrations of one logical unit: the size of a large cluster.
pub const REGISTRATIONS_MAX: usize = 256;

/// Logical blocks of one WRITE SAME, and of all descriptors of one UNMAP together (512 MiB): more
/// would keep an initiator waiting for one answer for longer than some do.
pub const CLEAR_BLOCKS_MAX: u32 = 1 << 20;

/// Descriptors of one UNMAP command: one page of them.
pub const UNMAP_DESCRIPTORS_MAX: u32 = 256;

/// Logical blocks of one COMPARE AND WRITE: its field has eight bits, and VMware uses one block.
pub const COMPARE_AND_WRITE_BLOCKS_MAX: u8 = 255;

/// Bytes that are read at a time where a command has data of its own to compare with.
pub const STEP_BYTES: usize = 64 << 10;

/// Memory in bytes that one GET LBA STATUS takes: as many extents as a disk gives, in three forms.
pub const LBA_STATUS_BYTES: usize = 64 * block::limits::EXTENTS_MAX;

/// Connections of one server; one more is closed at once. 100 hosts with two paths each fit.
pub const CONNECTIONS_MAX: usize = 256;

/// Time that an initiator has from connecting to the full feature phase.
pub const LOGIN_TIME_MAX: Duration = Duration::from_secs(15);

/// Silence after which an initiator is pinged.
pub const PING_AFTER: Duration = Duration::from_secs(30);

/// Time in which it has to answer, or at least to say something, before its connection is closed.
pub const PING_TIME_MAX: Duration = Duration::from_secs(30);

/// Time in which replies that are due when a connection ends may still leave.
pub const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Pause after `accept` failed, which it does for want of file descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
