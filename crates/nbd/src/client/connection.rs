//! One connection of a client, from the first dial through every loss to the last goodbye.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use block::Backoff;
use bytes::{Buf, BufMut, Bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::handshake::{Agreed, Handshake, Progress, WantTls};
use super::pending::{Job, Pending};
use super::{ConnectError, Options, Retry};
use crate::limits::{
    BACKOFF_FIRST, BACKOFF_MAX, IN_FLIGHT_MAX, INLINE_BYTES_MAX, INPUT_BYTES, NEGOTIATION_TIME_MAX,
    OPTION_BYTES_MAX,
};
use crate::request::{Command, Request};
use crate::stream::{BoxStream, Dial};

/// The way to one connection.
pub(super) struct Lane {
    pub(super) jobs: mpsc::Sender<Job>,
    pub(super) is_up: Arc<AtomicBool>,
}

/// Makes connections to one export.
pub(super) struct Connector {
    dial: Dial,
    export: String,
    options: Options,
    expected: Option<Agreed>,
}

impl Connector {
    pub(super) fn new(dial: Dial, export: String, options: Options) -> Connector {
        Connector { dial, export, options, expected: None }
    }

    /// From now on the export must be what it was found to be.
    pub(super) fn expect(&mut self, agreed: Agreed) {
        self.expected = Some(agreed);
    }

    /// Dials and negotiates once, in bounded time.
    pub(super) async fn connect(&self) -> Result<(BoxStream, Agreed), ConnectError> {
        let negotiated = tokio::time::timeout(NEGOTIATION_TIME_MAX, self.negotiate()).await;
        let (stream, agreed) = negotiated.map_err(|_| ConnectError::TooSlow)??;
        match &self.expected {
            Some(before) if !can_stand_in(&agreed, before) => {
                let why = "the NBD server came back with another size or less ability".to_owned();
                Err(ConnectError::Unusable(why))
            }
            _ => Ok((stream, agreed)),
        }
    }

    async fn negotiate(&self) -> Result<(BoxStream, Agreed), ConnectError> {
        let mut stream = (self.dial)().await?;
        let want_tls = if self.options.upgrade.is_some() { WantTls::Yes } else { WantTls::No };
        let mut handshake = Handshake::new(&self.export, want_tls);
        let mut input = Vec::new();
        loop {
            let mut out = Vec::new();
            let (used, progress) = handshake.feed(&input, &mut out)?;
            input.drain(..used);
            match progress {
                Progress::Continue => {}
                Progress::Incomplete => {
                    let room = &mut (&mut input).limit(OPTION_BYTES_MAX);
                    if stream.read_buf(room).await? == 0 {
                        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                    }
                }
                Progress::StartTls => {
                    if !input.is_empty() {
                        let injected = std::io::Error::other("plain text came behind STARTTLS");
                        return Err(ConnectError::Tls(injected));
                    }
                    let upgrade = self.options.upgrade.as_ref().expect("TLS is asked for only with it");
                    stream = upgrade(stream).await.map_err(ConnectError::Tls)?;
                    handshake.tls_is_up(&mut out);
                }
                // Nothing can follow before the first request, so nothing of the input is lost.
                Progress::Done(agreed) => return Ok((stream, agreed)),
            }
            stream.write_all(&out).await?;
            stream.flush().await?;
        }
    }
}

/// Whether requests that were made for `before` may go to `now`.
fn can_stand_in(now: &Agreed, before: &Agreed) -> bool {
    now.size_bytes == before.size_bytes
        && now.flags & before.flags == before.flags
        && now.context.is_some() >= before.context.is_some()
        && now.align_bytes <= before.align_bytes
        && now.payload_bytes_max >= before.payload_bytes_max
}

/// Carries `jobs` to the server until there will be no more.
pub(super) async fn run(
    connector: Arc<Connector>,
    mut connection: Option<(BoxStream, Agreed)>,
    mut jobs: mpsc::Receiver<Job>,
    is_up: Arc<AtomicBool>,
) {
    let mut pending = Pending::new();
    let mut away = Away::default();
    loop {
        let (stream, agreed) = match connection.take() {
            Some(first) => first,
            None => match reconnect(&connector, &mut away, &mut pending, &mut jobs).await {
                Some(again) => again,
                None => return,
            },
        };
        is_up.store(true, Ordering::Relaxed);
        let mut session = Session::new(stream, &agreed, &mut pending);
        let ended = session.transmit(&mut jobs, &connector.options).await;
        is_up.store(false, Ordering::Relaxed);
        if session.has_answered {
            away = Away::default();
        }
        match ended {
            Ok(()) => return,
            Err(error) => {
                let (export, outstanding) = (&connector.export, pending.len());
                tracing::warn!(export, outstanding, %error, "nbd_connection_lost: dialling again");
            }
        }
    }
}

/// How long the server has been away. It is back only when it answers a request: one that takes a
/// connection and drops it at the first request is not dialled in a tight loop.
struct Away {
    since: Instant,
    backoff: Backoff,
}

impl Default for Away {
    fn default() -> Away {
        Away { since: Instant::now(), backoff: Backoff::at_once(BACKOFF_FIRST, BACKOFF_MAX) }
    }
}

/// Dials until there is a connection; `None` once there will be no more jobs.
async fn reconnect(
    connector: &Connector,
    away: &mut Away,
    pending: &mut Pending,
    jobs: &mut mpsc::Receiver<Job>,
) -> Option<(BoxStream, Agreed)> {
    if away.backoff.is_fresh() {
        away.since = Instant::now();
    }
    loop {
        let pause = away.backoff.pause();
        let attempt = async {
            tokio::time::sleep(pause).await;
            connector.connect().await
        };
        tokio::select! {
            connected = attempt => match connected {
                Ok(connected) => {
                    tracing::info!(export = connector.export, "nbd_connected");
                    return Some(connected);
                }
                Err(error) => {
                    tracing::debug!(export = connector.export, %error, "the NBD server is still away");
                }
            },
            () = give_up(connector.options.retry, away.since, pending, jobs) => return None,
        }
    }
}

/// Fails what waits as soon as it has waited for too long, and whatever comes then. Ends when there will
/// be no more jobs.
async fn give_up(retry: Retry, since: Instant, pending: &mut Pending, jobs: &mut mpsc::Receiver<Job>) {
    let Retry::For(limit) = retry else {
        return std::future::pending().await;
    };
    tokio::time::sleep_until(since + limit).await;
    let why = format!("the NBD server was away for more than {limit:?}");
    pending.fail_all(&why);
    while let Some(job) = jobs.recv().await {
        let _ = job.done.send(Err(block::DiskError::Io(why.clone())));
    }
}

/// One connection while it stands.
struct Session<'a> {
    reader: ReadHalf<BoxStream>,
    writer: WriteHalf<BoxStream>,
    pending: &'a mut Pending,
    agreed: Agreed,
    /// Long payloads, and headers with short payloads gathered between them.
    output: VecDeque<Bytes>,
    gathered: Vec<u8>,
    is_flushed: bool,
    has_answered: bool,
}

impl<'a> Session<'a> {
    /// Begins with all requests that the last connection left unanswered.
    fn new(stream: BoxStream, agreed: &Agreed, pending: &'a mut Pending) -> Session<'a> {
        let (reader, writer) = tokio::io::split(stream);
        let again = pending.restart(agreed.framing, agreed.context);
        let (output, gathered) = (VecDeque::new(), Vec::new());
        let agreed = *agreed;
        let (is_flushed, has_answered) = (true, false);
        let mut session =
            Session { reader, writer, pending, agreed, output, gathered, is_flushed, has_answered };
        for (request, payload) in again {
            session.queue(&request, payload);
        }
        session
    }

    fn queue(&mut self, request: &Request, payload: Bytes) {
        request.encode(self.agreed.framing, &mut self.gathered);
        if payload.len() <= INLINE_BYTES_MAX {
            self.gathered.extend_from_slice(&payload);
        } else {
            self.output.push_back(std::mem::take(&mut self.gathered).into());
            self.output.push_back(payload);
        }
    }

    fn add(&mut self, job: Job) {
        // Whoever gave up before his request was sent is spared it.
        if !job.done.is_closed() {
            let (request, payload) = self.pending.add(job);
            self.queue(&request, payload);
        }
    }

    /// Sends jobs and hands out answers. `Ok` once there are no more jobs; an error if the connection is of
    /// no more use.
    async fn transmit(&mut self, jobs: &mut mpsc::Receiver<Job>, options: &Options) -> std::io::Result<()> {
        let mut input = vec![0; INPUT_BYTES];
        let mut filled = 0;
        let mut heard_at = Instant::now();
        loop {
            while self.pending.len() < IN_FLIGHT_MAX
                && let Ok(job) = jobs.try_recv()
            {
                if self.pending.len() == 0 {
                    heard_at = Instant::now();
                }
                self.add(job);
            }
            if self.output.is_empty() && !self.gathered.is_empty() {
                self.output.push_back(std::mem::take(&mut self.gathered).into());
            }
            let sends = !self.output.is_empty() || !self.is_flushed;
            let (takes_more, waits) = (self.pending.len() < IN_FLIGHT_MAX, self.pending.len() > 0);
            tokio::select! {
                biased;
                sent = send(&mut self.writer, self.output.front().map_or(&[], |b| b)), if sends => {
                    self.sent(sent?);
                }
                read = self.reader.read(&mut input[filled..]) => {
                    let len = read?;
                    if len == 0 {
                        return Err(std::io::ErrorKind::UnexpectedEof.into());
                    }
                    heard_at = Instant::now();
                    filled += len;
                    let before = self.pending.len();
                    let used = self.pending.feed(&input[..filled]).map_err(std::io::Error::other)?;
                    input.copy_within(used..filled, 0);
                    filled -= used;
                    self.has_answered |= self.pending.len() < before;
                }
                job = jobs.recv(), if takes_more => match job {
                    Some(job) => {
                        if !waits {
                            heard_at = Instant::now();
                        }
                        self.add(job);
                    }
                    None => return self.disconnect().await,
                },
                () = tokio::time::sleep(options.silence_max.saturating_sub(heard_at.elapsed())), if waits => {
                    return Err(std::io::ErrorKind::TimedOut.into());
                }
            }
        }
    }

    fn sent(&mut self, len: usize) {
        self.is_flushed = len == 0;
        if let Some(front) = self.output.front_mut() {
            front.advance(len);
            if front.is_empty() {
                self.output.pop_front();
            }
        }
    }

    async fn disconnect(&mut self) -> std::io::Result<()> {
        let goodbye = Request { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, len: 0 };
        self.queue(&goodbye, Bytes::new());
        let rest = std::mem::take(&mut self.output);
        for bytes in rest.into_iter().chain([std::mem::take(&mut self.gathered).into()]) {
            self.writer.write_all(&bytes).await?;
        }
        self.writer.shutdown().await
    }
}

/// Sends some of `bytes`, or, if there are none, what the stream itself still holds back. Answers how many
/// bytes were taken.
async fn send(writer: &mut WriteHalf<BoxStream>, bytes: &[u8]) -> std::io::Result<usize> {
    if bytes.is_empty() {
        writer.flush().await?;
        return Ok(0);
    }
    match writer.write(bytes).await? {
        0 => Err(std::io::ErrorKind::WriteZero.into()),
        len => Ok(len),
    }
}
