//! The requests of one connection that were sent and not answered: a state machine without a socket.
//!
//! Bytes of the server go in, and finished requests are handed back to who waits for them. Everything that
//! is needed to send a request again is kept until then, so a lost connection loses no request.
//!
//! A server can give wrong data, but it cannot make this panic, allocate beyond what was asked for, or
//! finish a read of which it sent a part.

use std::collections::BTreeMap;

use block::{DiskError, Extent, ExtentKind};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::limits::{EXTENTS_MAX, STRING_BYTES_MAX};
use crate::proto::{Errno, Fields, Framing};
use crate::reply::{self, BadReply, Kind, Last, ReplyHead, Status};
use crate::request::{Command, Request};

/// Longest payload in bytes that is gathered before it is looked at: an answer about allocation as long as
/// ours, or an error with its message. Data of reads is not gathered.
const GATHERED_BYTES_MAX: u64 = (EXTENTS_MAX * 16 + STRING_BYTES_MAX) as u64;

/// What a request asks for, and who waits for it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) command: Command,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// What a write carries.
    pub(crate) payload: Bytes,
    pub(crate) done: oneshot::Sender<Result<Answer, DiskError>>,
}

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It was carried out.
    Done,
    /// What was read, as long as was asked for.
    Data(Vec<u8>),
    /// What is known of the range.
    Extents(Vec<Extent>),
}

#[derive(Debug)]
struct Entry {
    job: Job,
    data: Vec<u8>,
    covered_bytes: u64,
    extents: Option<Vec<Extent>>,
    error: Option<DiskError>,
}

/// Data of a read that is arriving.
#[derive(Debug, Clone, Copy)]
struct Arriving {
    cookie: u64,
    at: usize,
    left: usize,
    last: Last,
}

/// The requests under way on one connection.
#[derive(Debug)]
pub(crate) struct Pending {
    framing: Framing,
    context: Option<u32>,
    entries: BTreeMap<u64, Entry>,
    next_cookie: u64,
    arriving: Option<Arriving>,
}

impl Pending {
    pub(crate) fn new() -> Pending {
        let framing = Framing::Simple;
        Pending { framing, context: None, entries: BTreeMap::new(), next_cookie: 1, arriving: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Begins anew on a fresh connection, and names the requests that must be sent on it, oldest first.
    pub(crate) fn restart(&mut self, framing: Framing, context: Option<u32>) -> Vec<(Request, Bytes)> {
        self.framing = framing;
        self.context = context;
        self.arriving = None;
        self.entries.retain(|_, entry| !entry.job.done.is_closed());
        for entry in self.entries.values_mut() {
            entry.reset();
        }
        self.entries.iter().map(|(&cookie, entry)| entry.to_send(cookie)).collect()
    }

    /// Takes a request on; what is to be sent for it.
    pub(crate) fn add(&mut self, job: Job) -> (Request, Bytes) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut entry = Entry { job, data: Vec::new(), covered_bytes: 0, extents: None, error: None };
        entry.reset();
        let to_send = entry.to_send(cookie);
        self.entries.insert(cookie, entry);
        to_send
    }

    /// Gives up all requests.
    pub(crate) fn fail_all(&mut self, why: &str) {
        for entry in std::mem::take(&mut self.entries).into_values() {
            // Whoever no longer waits needs no answer; the same holds below.
            let _ = entry.job.done.send(Err(DiskError::Io(why.to_owned())));
        }
    }

    /// Deals with what the server sent, and says how much of it is dealt with; the rest belongs to a
    /// message that is not complete, and comes again with more behind it.
    pub(crate) fn feed(&mut self, input: &[u8]) -> Result<usize, BadReply> {
        let mut rest = input;
        loop {
            if let Some(arriving) = self.arriving {
                rest = self.take_data(arriving, rest)?;
                if self.arriving.is_some() {
                    break;
                }
            }
            let Some((head, head_bytes)) = reply::parse(self.framing, rest)? else { break };
            let Some(used) = self.take_reply(head, &rest[head_bytes..])? else { break };
            rest = &rest[head_bytes + used..];
        }
        Ok(input.len() - rest.len())
    }

    /// Copies data of a read to its place.
    fn take_data<'a>(&mut self, mut arriving: Arriving, input: &'a [u8]) -> Result<&'a [u8], BadReply> {
        let entry = self.entries.get_mut(&arriving.cookie).ok_or(UNKNOWN)?;
        let len = arriving.left.min(input.len());
        entry.data[arriving.at..arriving.at + len].copy_from_slice(&input[..len]);
        arriving.at += len;
        arriving.left -= len;
        self.arriving = Some(arriving);
        if arriving.left == 0 {
            self.arriving = None;
            self.end_of_chunk(arriving.cookie, arriving.last)?;
        }
        Ok(&input[len..])
    }

    /// Deals with a reply whose header is `head`; `None` if more of its payload is needed, else the bytes
    /// of payload that were used.
    fn take_reply(&mut self, head: ReplyHead, payload: &[u8]) -> Result<Option<usize>, BadReply> {
        let entry = self.entries.get_mut(&head.cookie).ok_or(UNKNOWN)?;
        let reads = entry.job.command == Command::Read;
        match head.kind {
            Kind::Simple(errno) => {
                if let Some(errno) = errno {
                    entry.fail(errno, "")?;
                } else if reads {
                    if self.framing != Framing::Simple {
                        return Err(BadReply("a read is answered without structure"));
                    }
                    let len = entry.job.len;
                    self.arriving = Some(entry.expect_data(head.cookie, entry.job.offset, len, Last::Yes)?);
                    return Ok(Some(0));
                } else {
                    entry.covered_bytes = entry.job.len;
                }
                self.end_of_chunk(head.cookie, Last::Yes)?;
                Ok(Some(0))
            }
            Kind::Data if reads => {
                let Some(offset) = Fields(payload).u64() else { return Ok(None) };
                let len = head.payload_bytes - 8;
                self.arriving = Some(entry.expect_data(head.cookie, offset, len, head.last)?);
                Ok(Some(8))
            }
            Kind::Hole if reads => {
                let mut fields = Fields(payload);
                let Some((offset, len)) = fields.u64().zip(fields.u32()) else { return Ok(None) };
                // The buffer is zero where nothing has arrived.
                entry.expect_data(head.cookie, offset, len.into(), head.last)?;
                self.end_of_chunk(head.cookie, head.last)?;
                Ok(Some(12))
            }
            Kind::Data | Kind::Hole => Err(BadReply("data came for a request that reads nothing")),
            Kind::None | Kind::BlockStatus | Kind::BlockStatusExtended | Kind::Error => {
                if head.payload_bytes > GATHERED_BYTES_MAX {
                    return Err(BadReply("a reply is too long"));
                }
                let Some(payload) = payload.get(..head.payload_bytes as usize) else { return Ok(None) };
                if head.kind == Kind::Error {
                    let (errno, message) = reply::parse_error(payload)?;
                    entry.fail(errno, &message)?;
                } else if head.kind != Kind::None {
                    let (context, states) = reply::parse_block_status(head.kind, payload)?;
                    if entry.job.command != Command::BlockStatus || Some(context) != self.context {
                        return Err(BadReply("a block status came that nobody asked for"));
                    }
                    entry.extents = Some(extents(&states, entry.job.len));
                } else if !reads {
                    entry.covered_bytes = entry.job.len;
                }
                self.end_of_chunk(head.cookie, head.last)?;
                Ok(Some(payload.len()))
            }
        }
    }

    /// A chunk is complete; if it was the last of its reply, whoever waits is answered.
    fn end_of_chunk(&mut self, cookie: u64, last: Last) -> Result<(), BadReply> {
        if last == Last::No {
            return Ok(());
        }
        let entry = self.entries.remove(&cookie).ok_or(UNKNOWN)?;
        let (done, result) = entry.into_result()?;
        let _ = done.send(result);
        Ok(())
    }
}

const UNKNOWN: BadReply = BadReply("it answers a request that is not under way");

/// The sender to whom a result goes.
type Waiter = oneshot::Sender<Result<Answer, DiskError>>;

impl Entry {
    fn to_send(&self, cookie: u64) -> (Request, Bytes) {
        let Job { command, flags, offset, len, .. } = self.job;
        (Request { flags, command, cookie, offset, len }, self.job.payload.clone())
    }

    fn reset(&mut self) {
        if self.job.command == Command::Read {
            self.data = vec![0; usize::try_from(self.job.len).expect("reads are split to 32 MiB")];
        }
        self.covered_bytes = 0;
        self.extents = None;
        self.error = None;
    }

    /// Books `len` bytes from `offset` of a read, which must lie in what is still missing.
    fn expect_data(&mut self, cookie: u64, offset: u64, len: u64, last: Last) -> Result<Arriving, BadReply> {
        let at = offset.checked_sub(self.job.offset).filter(|at| *at <= self.job.len);
        let fits = at.filter(|at| len <= self.job.len - at && len <= self.job.len - self.covered_bytes);
        let at = fits.ok_or(BadReply("data came that was not asked for"))?;
        self.covered_bytes += len;
        Ok(Arriving { cookie, at: at as usize, left: len as usize, last })
    }

    /// Notes an error of the server. One that is going away is an error of the connection, so that the
    /// request is sent again to its successor.
    fn fail(&mut self, errno: Errno, message: &str) -> Result<(), BadReply> {
        let told = if message.is_empty() { String::new() } else { format!(": {message}") };
        self.error = Some(match errno {
            Errno::Shutdown => return Err(BadReply("it is shutting down")),
            Errno::Perm => DiskError::ReadOnly,
            Errno::NoSpc => DiskError::NoSpace,
            Errno::Io | Errno::Inval | Errno::NotSup => {
                DiskError::Io(format!("the NBD server reports {errno:?}{told}"))
            }
        });
        Ok(())
    }

    fn into_result(self) -> Result<(Waiter, Result<Answer, DiskError>), BadReply> {
        let result = match (self.error, self.job.command) {
            (Some(error), _) => Err(error),
            (None, Command::Read) if self.covered_bytes < self.job.len => {
                return Err(BadReply("a read was answered in part"));
            }
            (None, Command::Read) => Ok(Answer::Data(self.data)),
            (None, Command::BlockStatus) => match self.extents {
                Some(extents) => Ok(Answer::Extents(extents)),
                None => return Err(BadReply("a block status has no extents")),
            },
            (None, _) => Ok(Answer::Done),
        };
        Ok((self.job.done, result))
    }
}

/// What the server said of a range of `len` bytes; what it said beyond, or in too many pieces, is cut off.
fn extents(states: &[Status], len: u64) -> Vec<Extent> {
    let mut left = len;
    let mut out: Vec<Extent> = Vec::new();
    for state in states.iter().take(EXTENTS_MAX) {
        let len = state.len.min(left);
        left -= len;
        let kind = if state.is_zero() { ExtentKind::Hole } else { ExtentKind::Data };
        match out.last_mut() {
            Some(last) if last.kind == kind => last.len += len,
            _ if len > 0 => out.push(Extent { len, kind }),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::{block_status, data, hole};

    type Waiting = oneshot::Receiver<Result<Answer, DiskError>>;

    fn begin(framing: Framing, command: Command) -> (Pending, Request, Waiting) {
        let mut pending = Pending::new();
        pending.restart(framing, Some(1));
        let (done, waiting) = oneshot::channel();
        let job = Job { command, flags: 0, offset: 4096, len: 1024, payload: Bytes::new(), done };
        let (request, _) = pending.add(job);
        (pending, request, waiting)
    }

    fn chunk(request: &Request, last: Last, offset: u64, bytes: &[u8]) -> Vec<u8> {
        let head = data(Framing::Structured, request, last, offset, bytes.len());
        [&*head, bytes].concat()
    }

    #[test]
    fn chunks_are_put_together_in_whatever_order_and_pieces_they_come() {
        let (mut pending, request, mut waiting) = begin(Framing::Structured, Command::Read);
        let mut wire = chunk(&request, Last::No, 4096 + 768, &[3; 256]);
        wire.extend_from_slice(&hole(Framing::Structured, &request, Last::No, 4096 + 256, 512));
        wire.extend(chunk(&request, Last::Yes, 4096, &[1; 256]));
        let mut arrived = Vec::new();
        for byte in wire {
            arrived.push(byte);
            let used = pending.feed(&arrived).unwrap();
            arrived.drain(..used);
        }
        let expected = [[1; 256], [0; 256], [0; 256], [3; 256]].concat();
        assert_eq!(waiting.try_recv().unwrap().unwrap(), Answer::Data(expected));
        assert_eq!(pending.len(), 0);
    }

    #[test]
    fn data_outside_of_the_read_or_more_than_it_is_a_breach() {
        let cases = [(4095, 16), (4096 + 1024, 1), (4096 + 1020, 5), (u64::MAX, 9), (0, 1024)];
        for (offset, len) in cases {
            let (mut pending, request, mut waiting) = begin(Framing::Structured, Command::Read);
            let wire = chunk(&request, Last::No, offset, &vec![1; len]);
            assert!(pending.feed(&wire).is_err(), "{len} bytes at {offset}");
            assert!(waiting.try_recv().is_err(), "nobody is answered with them");
        }
        let (mut pending, request, _waiting) = begin(Framing::Structured, Command::Read);
        pending.feed(&chunk(&request, Last::No, 4096, &[1; 1024])).unwrap();
        assert!(pending.feed(&chunk(&request, Last::No, 4096, &[1; 1])).is_err());
    }

    #[test]
    fn a_read_that_is_answered_in_part_is_never_handed_out() {
        let (mut pending, request, mut waiting) = begin(Framing::Structured, Command::Read);
        let wire = chunk(&request, Last::Yes, 4096, &[1; 1023]);
        assert!(pending.feed(&wire).is_err());
        assert!(matches!(waiting.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
    }

    #[test]
    fn a_server_that_shuts_down_loses_no_request() {
        let (mut pending, request, mut waiting) = begin(Framing::Structured, Command::Write);
        let wire = reply::error(Framing::Structured, &request, Errno::Shutdown, "bye");
        assert!(pending.feed(&wire).is_err(), "the connection is of no more use");
        let again = pending.restart(Framing::Extended, Some(1));
        assert_eq!(again, vec![(request, Bytes::new())]);
        pending.feed(&reply::success(Framing::Extended, &request)).unwrap();
        assert_eq!(waiting.try_recv().unwrap().unwrap(), Answer::Done);
    }

    #[test]
    fn whoever_gave_up_is_not_asked_for_again() {
        let (mut pending, _, waiting) = begin(Framing::Structured, Command::Write);
        drop(waiting);
        assert_eq!(pending.restart(Framing::Structured, Some(1)), vec![]);
    }

    #[test]
    fn extents_are_cut_to_the_range_and_neighbours_joined() {
        let (mut pending, request, mut waiting) = begin(Framing::Structured, Command::BlockStatus);
        let states = [Status::of_hole(256), Status::of_hole(256), Status::of_data(4096)];
        pending.feed(&block_status(Framing::Structured, &request, 1, &states)).unwrap();
        let expected =
            vec![Extent { len: 512, kind: ExtentKind::Hole }, Extent { len: 512, kind: ExtentKind::Data }];
        assert_eq!(waiting.try_recv().unwrap().unwrap(), Answer::Extents(expected));
    }
}
