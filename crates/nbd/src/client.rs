//! The client: an export of some NBD server as a [`Disk`].
//!
//! Consistency: the server's. Retries: a lost connection is dialled again, and all requests that were not
//! answered are sent again, in their order; how long that may take is [`Retry`]'s to say. A server that
//! comes back with another size or less ability is not used. Durability: what a flush has answered is
//! durable; a server that *crashes* loses writes that it answered and that were not flushed, and the client
//! cannot know of it. Cancellation: a dropped operation may still be carried out; its answer is ignored.
//! Crash: the client keeps no state.
//!
//! `discard` is sent as `WRITE_ZEROES` that may make holes, because NBD's `TRIM` does not promise zeroes
//! and [`Disk::discard`] does.

mod connection;
pub mod handshake;
pub(crate) mod pending;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::limits::{
    CONNECTIONS_MAX, DRAIN_TIME_MAX, NEGOTIATION_TIME_MAX, QUEUE_MAX, RANGE_BYTES_MAX, STRING_BYTES_MAX,
};
use crate::proto::{flag, transmission};
use crate::request::Command;
use crate::stream::{Dial, Upgrade};
use crate::uri::{NbdUri, UriTls};
use connection::{Connector, Lane};
use handshake::{Agreed, HandshakeError};
use pending::{Answer, Job};

/// How long requests wait for a server that cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Until it comes back: whoever waits sees latency, not errors.
    Forever,
    /// That long after the connection was lost; then they fail, and so do further ones until it is back.
    For(Duration),
}

/// How a client behaves.
#[derive(Clone)]
pub struct Options {
    /// Connections to use at most, if the server says that they see each other's writes; else one.
    pub connections: usize,
    /// How long requests wait for a lost server.
    pub retry: Retry,
    /// A connection on which requests wait and nothing arrives for so long counts as lost. It must be
    /// longer than the server's slowest flush.
    pub silence_max: Duration,
    /// Demands TLS, and puts it on.
    pub upgrade: Option<Upgrade>,
}

impl Default for Options {
    fn default() -> Options {
        // A minute is beyond the slowest flush of a loaded disk, and below what an operator waits.
        let silence_max = Duration::from_secs(60);
        Options { connections: 1, retry: Retry::Forever, silence_max, upgrade: None }
    }
}

/// Why a server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It could not be reached, or the connection broke at once.
    #[error("the NBD server cannot be reached: {0}")]
    Io(#[from] io::Error),
    /// It answered, but cannot be used.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// TLS failed.
    #[error("no TLS with this NBD server: {0}")]
    Tls(io::Error),
    /// It took longer than [`NEGOTIATION_TIME_MAX`].
    #[error("the NBD server did not negotiate within {NEGOTIATION_TIME_MAX:?}")]
    TooSlow,
    /// What was asked for cannot be had.
    #[error("{0}")]
    Unusable(String),
}

/// An export of an NBD server.
pub struct Client {
    lanes: Vec<Arc<Lane>>,
    turn: AtomicUsize,
    agreed: Agreed,
    tasks: JoinSet<()>,
}

impl Client {
    /// Connects to an export; the empty name is the server's default. Tried once: retries begin after the
    /// first success.
    pub async fn connect(dial: Dial, export: &str, options: Options) -> Result<Client, ConnectError> {
        if export.len() > STRING_BYTES_MAX {
            let why = format!("the name of the export is longer than {STRING_BYTES_MAX} bytes");
            return Err(ConnectError::Unusable(why));
        }
        let count = options.connections.clamp(1, CONNECTIONS_MAX);
        let mut connector = Connector::new(dial, export.to_owned(), options);
        let (stream, agreed) = connector.connect().await?;
        connector.expect(agreed);
        let shared = agreed.flags & transmission::CAN_MULTI_CONN != 0;
        let connector = Arc::new(connector);
        let mut client =
            Client { lanes: Vec::new(), turn: AtomicUsize::new(0), agreed, tasks: JoinSet::new() };
        let mut first = Some((stream, agreed));
        for _ in 0..if shared { count } else { 1 } {
            let (sender, jobs) = mpsc::channel(QUEUE_MAX);
            let lane = Arc::new(Lane { jobs: sender, is_up: Arc::new(AtomicBool::new(first.is_some())) });
            let is_up = Arc::clone(&lane.is_up);
            client.tasks.spawn(connection::run(Arc::clone(&connector), first.take(), jobs, is_up));
            client.lanes.push(lane);
        }
        Ok(client)
    }

    /// Connects to the export at an address. `nbds` needs [`Options::upgrade`].
    pub async fn connect_uri(uri: &NbdUri, options: Options) -> Result<Client, ConnectError> {
        if uri.tls != UriTls::Off && options.upgrade.is_none() {
            return Err(ConnectError::Unusable(format!("{uri} demands TLS, and none is set up")));
        }
        Client::connect(uri.dial(), &uri.export, options).await
    }

    /// Takes leave of the server. Dropping the client instead just cuts the connections.
    pub async fn close(mut self) {
        self.lanes.clear();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        // A server that cannot be reached need not be taken leave of.
        let _ = tokio::time::timeout(DRAIN_TIME_MAX, all).await;
    }

    /// What was agreed with the server.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    fn has(&self, flag: u16) -> bool {
        self.agreed.flags & flag != 0
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size_bytes = self.agreed.size_bytes;
        match offset.checked_add(len) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(DiskError::OutOfRange { offset, len, size_bytes }),
        }
    }

    /// Like [`check`](Self::check), for what changes the disk. A server that asks for alignment gets it from
    /// the caller: a read-modify-write of ours could undo a neighbour's write.
    fn check_change(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.access() == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.check(offset, len)?;
        let align = u64::from(self.agreed.align_bytes);
        if !offset.is_multiple_of(align) || !len.is_multiple_of(align) {
            let why = format!("this NBD server takes only writes that are aligned to {align} bytes");
            return Err(DiskError::Io(why));
        }
        Ok(())
    }

    /// The range from first to last byte of the blocks that the server demands, around a range on the disk.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let align = u64::from(self.agreed.align_bytes);
        let end = (offset + len).next_multiple_of(align).min(self.agreed.size_bytes);
        (offset / align * align, end)
    }

    /// The pieces of a range that each fit one request of at most `longest` bytes.
    fn pieces(offset: u64, len: u64, longest: u64) -> impl Iterator<Item = (u64, u64)> {
        let (mut at, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            let piece = (at, (end - at).min(longest));
            at += piece.1;
            (piece.1 > 0).then_some(piece)
        })
    }

    fn payload_bytes_max(&self) -> u64 {
        self.agreed.payload_bytes_max.into()
    }

    /// The connection for the next request: the next in turn that stands, else the next in turn.
    fn lane(&self) -> &Lane {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = || (0..self.lanes.len()).map(|i| &self.lanes[(turn + i) % self.lanes.len()]);
        let standing = in_turn().find(|lane| lane.is_up.load(Ordering::Relaxed));
        standing.or_else(|| in_turn().next()).expect("a client has a connection until it is closed")
    }

    async fn ask(&self, command: Command, flags: u16, offset: u64, len: u64) -> Result<Answer, DiskError> {
        self.send(command, flags, offset, len, Bytes::new()).await
    }

    async fn send(
        &self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
        payload: Bytes,
    ) -> Result<Answer, DiskError> {
        let gone = || DiskError::Io("the NBD client has ended".to_owned());
        let (done, answer) = oneshot::channel();
        let job = Job { command, flags, offset, len, payload, done };
        self.lane().jobs.send(job).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn write_range(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), DiskError> {
        self.check_change(offset, data.len() as u64)?;
        for (at, len) in Client::pieces(offset, data.len() as u64, self.payload_bytes_max()) {
            let from = (at - offset) as usize;
            let payload = Bytes::copy_from_slice(&data[from..from + len as usize]);
            self.send(Command::Write, flags, at, len, payload).await?;
        }
        Ok(())
    }

    /// Writes `data` at `offset`; it is durable when this is answered. Uses the server's `FUA` where it has
    /// one, else a flush.
    pub async fn write_durably(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        if self.has(transmission::SEND_FUA) {
            return self.write_range(offset, data, flag::FUA).await;
        }
        self.write_range(offset, data, 0).await?;
        self.flush().await
    }

    async fn read_range(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let wanted_end = offset + buf.len() as u64;
        let (start, end) = self.whole_blocks(offset, buf.len() as u64);
        for (at, len) in Client::pieces(start, end - start, self.payload_bytes_max()) {
            let Answer::Data(data) = self.ask(Command::Read, 0, at, len).await? else {
                return Err(DiskError::Io("the answer to a read holds no data".to_owned()));
            };
            // What was read only to fill the first and last block is left out.
            let (from, to) = (at.max(offset), (at + len).min(wanted_end));
            let wanted = &data[(from - at) as usize..(to - at) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(wanted);
        }
        Ok(())
    }

    async fn zero_range(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change(offset, len)?;
        if self.has(transmission::SEND_WRITE_ZEROES) {
            for (at, len) in Client::pieces(offset, len, RANGE_BYTES_MAX) {
                self.ask(Command::WriteZeroes, 0, at, len).await?;
            }
            return Ok(());
        }
        let step = self.payload_bytes_max().min(crate::limits::STEP_BYTES as u64);
        let zeroes = Bytes::from(vec![0; step as usize]);
        for (at, len) in Client::pieces(offset, len, step) {
            self.send(Command::Write, 0, at, len, zeroes.slice(..len as usize)).await?;
        }
        Ok(())
    }

    async fn extents_of(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DiskError> {
        self.check(offset, len)?;
        if self.agreed.context.is_none() || len == 0 {
            return Ok(if len == 0 { Vec::new() } else { vec![Extent { len, kind: ExtentKind::Data }] });
        }
        let align = u64::from(self.agreed.align_bytes);
        let (start, end) = self.whole_blocks(offset, len);
        let asked = (end - start).min(RANGE_BYTES_MAX);
        let Answer::Extents(mut extents) = self.ask(Command::BlockStatus, 0, start, asked).await? else {
            return Err(DiskError::Io("the answer to a block status holds no extents".to_owned()));
        };
        // Whole blocks were asked for: what lies before and behind the range is cut off again.
        let mut before = offset - start;
        let mut left = len;
        for extent in &mut extents {
            let cut = extent.len.min(before);
            before -= cut;
            extent.len = (extent.len - cut).min(left);
            left -= extent.len;
        }
        extents.retain(|extent| extent.len > 0);
        if extents.is_empty() {
            // The server told less than the one block that holds the beginning: nothing is known of it.
            extents.push(Extent { len: len.min(align), kind: ExtentKind::Data });
        }
        Ok(extents)
    }
}

impl Disk for Client {
    fn size_bytes(&self) -> u64 {
        self.agreed.size_bytes
    }

    fn access(&self) -> Access {
        if self.has(transmission::READ_ONLY) { Access::ReadOnly } else { Access::ReadWrite }
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(self.read_range(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(self.write_range(offset, data, 0))
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(self.zero_range(offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(self.zero_range(offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async move {
            // A server without the command has nothing that could be flushed.
            if self.has(transmission::SEND_FLUSH) && self.access() == Access::ReadWrite {
                self.ask(Command::Flush, 0, 0, 0).await?;
            }
            Ok(())
        })
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(self.extents_of(offset, len))
    }
}
