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

/// Silence after which a child that waits for an answer pings. Shorter than [`LATE_MIN`], so that the pong tells
/// a parent that itself waits from a frozen one before anybody decides.
pub const PING_AFTER_BUSY: Duration = Duration::from_millis(20);

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
pub const BYE_MAX: Duration = Duration::from_secs(1);

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

/// Fetches of guests that a node has in flight: as many as two links carry.
pub const FETCHES_GUEST_MAX: usize = 2 * OUTSTANDING_MAX;

/// Fetches of boot profiles that a node has in flight. 4 MiB keep a 10 Gbit/s uplink busy over 3 ms, a hop of a
/// pipelined tree, and are at most 0.3 s of queue in front of a guest's chunk on a link of 100 Mbit/s.
pub const FETCHES_PROFILE_MAX: usize = 64;

/// Background fetches that a node has in flight: nobody waits for them.
pub const FETCHES_BACKGROUND_MAX: usize = 32;

/// An answer to a guest is not late before, however fast the parent was: a busy host pauses that long.
pub const LATE_MIN: Duration = Duration::from_millis(30);

/// When an answer to a guest is late while nothing was measured yet. A parent that never answers at all must
/// cost less than the 300 ms that a guest may notice.
pub const LATE_UNMEASURED: Duration = Duration::from_millis(200);

/// When an answer to a guest is late at last, however slow the parent was.
pub const LATE_MAX: Duration = Duration::from_secs(2);

/// A guest's request does not go to the last resort before, unless the others are down: pauses of busy hosts
/// must not become load on the origin.
pub const LATE_FOR_LAST_RESORT: Duration = Duration::from_millis(150);

/// Not one byte for so long from a parent that was asked: what it was asked is asked of others, whatever its
/// urgency. Longer than TCP takes to repeat a lost packet (200 ms), or full networks would look like dead parents.
pub const SILENT_AFTER: Duration = Duration::from_millis(250);

/// Parents that have the same request at once: the planned one, its stand-in, and one more if both are slow.
pub const ATTEMPTS_MAX: usize = 3;

/// Hedges, in percent of guests' requests.
pub const HEDGES_PERCENT: f64 = 3.0;

/// Hedges that may be made at once: the reads of a few guests that wait for the same frozen parent.
pub const HEDGES_BURST: f64 = 16.0;

/// Hedges per second that are earned without requests, so that the last few guests of an idle node get them too.
pub const HEDGES_PER_SECOND: f64 = 2.0;

/// Requests in a row that a parent was late with, delivered nothing meanwhile, and lost to another, until it is
/// not asked any more.
pub const BREAKER_STRIKES_MAX: u32 = 3;

/// First pause before such a parent is probed; doubles from probe to probe.
pub const BREAKER_PAUSE_MIN: Duration = Duration::from_millis(500);

/// Longest pause before it is probed.
pub const BREAKER_PAUSE_MAX: Duration = Duration::from_secs(16);

/// Openings in a row, the last ones after failed probes, until the coordinator is told that the parent is lost:
/// after 1.5 s or more.
pub const BREAKER_OPENINGS_MAX: u32 = 3;

/// Chunks that a node may fetch from the last resort at once when its planned parents fail: half a guest's
/// read-ahead, while the coordinator plans anew. A thousand orphans then ask an origin for 2 GiB, not for all.
pub const LAST_RESORT_BURST: f64 = 32.0;

/// Those of them that only guests may take.
pub const LAST_RESORT_FOR_GUESTS: f64 = 16.0;

/// Chunks per second that a node may fetch from the last resort afterwards: 4 MiB/s, enough for a guest to boot.
pub const LAST_RESORT_PER_SECOND: f64 = 64.0;

/// Chunks that background fetches may take at once when their rate is bounded.
pub const BACKGROUND_BURST_CHUNKS: f64 = 8.0;
