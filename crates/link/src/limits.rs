//! Every bound of the link, each with its reason.

use std::time::Duration;

use block::limits::CHUNK_BYTES;

/// Requests in one `Want`, `Raise` or `Cancel` frame: a batch that fills two packets gains nothing by growing.
pub const BATCH_MAX: usize = 64;

/// Requests that a child may have on the wire of one link. 16 MiB of chunks keep a 1 Gbit/s link busy over
/// 130 ms of round trip. A parent closes a link that exceeds it: a child that counts never does.
pub const OUTSTANDING_MAX: usize = 256;

/// Part of [`OUTSTANDING_MAX`] that only guests' requests may use, so that they never wait for a slot that
/// background requests hold.
pub const OUTSTANDING_FOR_GUESTS: usize = 64;

/// Requests of one link that a parent works on at a time, from fetching until written. Bounds what a slow
/// child can make its parent hold to 4 MiB.
pub const ACTIVE_MAX: usize = 64;

/// Part of [`ACTIVE_MAX`] that only guests' requests may use, so that background requests that wait for a
/// chunk from far away do not keep guests from chunks that are here.
pub const ACTIVE_FOR_GUESTS: usize = 16;

/// Requests that a child keeps back for one link until slots are free. More are refused, and whoever asks
/// turns to another parent. More than a thousand guests with some reads each wait at once on no node.
pub const QUEUED_MAX: usize = 4096;

/// Bytes of control frames that wait to be sent. An honest peer causes less than 4 KiB; one that causes more
/// sends without reading and is cut off.
pub const CONTROL_BYTES_MAX: usize = 64 * 1024;

/// Room for bytes from the stream: a whole answer, so that little of a chunk is copied, and not more, because
/// a chunk that is kept keeps this room too.
pub const READ_BYTES: usize = CHUNK_BYTES + 4096;

/// New room is made when less is left: a TLS record holds no more.
pub const READ_BYTES_MIN: usize = 16 * 1024;

/// Silence after which a child that waits for an answer pings.
pub const PING_AFTER_BUSY: Duration = Duration::from_millis(500);

/// Silence after which a child that waits for nothing pings; keeps middleboxes from forgetting the link.
pub const PING_AFTER_IDLE: Duration = Duration::from_secs(10);

/// Silence after which a child that waits for an answer gives its parent up. Every byte counts as a sign of
/// life and pings ask for one, so that a parent that itself waits for a chunk is not taken for dead.
pub const SILENCE_MAX_BUSY: Duration = Duration::from_secs(2);

/// Silence after which a child that waits for nothing gives its parent up: one ping and the time to answer it.
pub const SILENCE_MAX_IDLE: Duration = Duration::from_secs(12);

/// Silence after which a parent gives its child up: three idle pings.
pub const SILENCE_MAX_PARENT: Duration = Duration::from_secs(30);

/// How long an end of the link tries to tell its peer why it closes.
pub const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// How long requests wait for a parent that is being dialed the first time; afterwards they go to the next.
pub const DIAL_PATIENCE: Duration = Duration::from_secs(1);

/// How long a dial may take at all: a lost SYN is sent again after 1 s and 3 s.
pub const DIAL_MAX: Duration = Duration::from_secs(5);

/// First wait before a parent is dialed again; doubles from failure to failure.
pub const REDIAL_MIN: Duration = Duration::from_millis(100);

/// Longest wait before a parent is dialed again: how long a repaired parent stays unused at worst.
pub const REDIAL_MAX: Duration = Duration::from_secs(5);

/// How long a parent that sent a wrong chunk is not asked again. Long enough for the coordinator to judge it,
/// short enough that one flipped bit does not cut a node off until its children restart.
pub const BAN: Duration = Duration::from_secs(600);

/// First wait after every parent of a stripe failed a request; doubles from round to round. A change of plan
/// or a parent that comes back ends the wait.
pub const ROUND_WAIT_MIN: Duration = Duration::from_millis(50);

/// Longest wait between two rounds.
pub const ROUND_WAIT_MAX: Duration = Duration::from_secs(2);

/// Rounds in which every parent and the origin said that the chunk is not to be had before a reader is told so.
pub const NOT_HERE_ROUNDS_MAX: u32 = 5;

/// How long a guest's request waits for a living parent before the next is asked. Also what ends a wait of
/// two nodes for each other while the hierarchy changes.
pub const PATIENCE_GUEST: Duration = Duration::from_secs(5);

/// The same for other requests, which may honestly stand in a long queue on a slow link.
pub const PATIENCE_OTHERS: Duration = Duration::from_secs(60);

/// Longest patience, which doubles from round to round so that an overloaded hierarchy is not asked ever more.
pub const PATIENCE_MAX: Duration = Duration::from_secs(120);

/// Reports to the coordinator that wait to be taken. More are dropped and counted: each tells of a parent, and
/// a node has a handful.
pub const REPORTS_MAX: usize = 256;
