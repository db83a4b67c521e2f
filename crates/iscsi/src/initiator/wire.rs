//! A session with its socket: bytes out of the one into the other, and back.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

use super::limits::{INPUT_BYTES, LOGOUT_TIME_MAX};
use super::login::{Agreed, Login, LoginFault, Step};
use super::session::{Command, Job, Reply, Session};
use super::{ConnectError, Options};
use crate::limits::TEXT_BYTES_MAX;
use crate::pdu::{self, Digests, LoginRequest, LoginResponse};

/// Received bytes, of which the first are not dealt with yet.
pub(super) struct Input {
    bytes: Vec<u8>,
    filled: usize,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { bytes: vec![0; INPUT_BYTES], filled: 0 }
    }

    /// Receives more, at least one byte.
    async fn receive(&mut self, reader: &mut OwnedReadHalf) -> io::Result<()> {
        // PDUs are bounded to half of the buffer, so that there is room.
        match reader.read(&mut self.bytes[self.filled..]).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            len => {
                self.filled += len;
                Ok(())
            }
        }
    }

    fn received(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    fn consume(&mut self, len: usize) {
        self.bytes.copy_within(len..self.filled, 0);
        self.filled -= len;
    }
}

/// A socket on which a login is carried out, PDU by PDU.
pub(super) struct Door {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    input: Input,
    digests: Digests,
}

impl Door {
    pub(super) async fn dial(host: &str, port: u16) -> io::Result<Door> {
        let stream = TcpStream::connect((host, port)).await?;
        // Commands are small and someone waits for each.
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        Ok(Door { reader, writer, input: Input::new(), digests: Digests::default() })
    }

    /// Logs in: what `login` came to, whose first request is `first`.
    pub(super) async fn log_in(
        &mut self,
        login: &mut Login<'_>,
        first: (LoginRequest, Vec<u8>),
    ) -> Result<Result<Agreed, LoginFault>, io::Error> {
        let (mut request, mut text) = first;
        loop {
            self.send(request.header().immediate(), &text).await?;
            let (header, data) = self.receive(TEXT_BYTES_MAX).await?;
            if header.opcode() != LoginResponse::OPCODE {
                return Ok(Err(LoginFault::Protocol("it answers a login with something else")));
            }
            match login.feed(&LoginResponse::parse(&header), &data) {
                Ok(Step::Send(next, more)) => (request, text) = (next, more),
                Ok(Step::Done(agreed)) => return Ok(Ok(agreed)),
                Err(fault) => return Ok(Err(fault)),
            }
        }
    }

    /// From now on PDUs have these digests.
    pub(super) fn use_digests(&mut self, digests: Digests) {
        self.digests = digests;
    }

    /// Sends one PDU.
    pub(super) async fn send(&mut self, header: pdu::Header, data: &[u8]) -> io::Result<()> {
        let seal = pdu::seal(header, data, self.digests);
        self.writer.write_all(&[seal.head(), data, seal.tail()].concat()).await
    }

    /// The next PDU.
    pub(super) async fn receive(&mut self, data_bytes_max: usize) -> io::Result<(pdu::Header, Vec<u8>)> {
        loop {
            let found = pdu::frame(self.input.received(), self.digests, data_bytes_max);
            if let Some(frame) = found.map_err(io::Error::other)? {
                let (header, data, bytes) = (frame.header, frame.data.to_vec(), frame.bytes);
                self.input.consume(bytes);
                return Ok((header, data));
            }
            self.input.receive(&mut self.reader).await?;
        }
    }

    /// The full feature phase.
    pub(super) fn open(self, session: Session) -> Wire {
        let Door { reader, writer, input, digests: _ } = self;
        Wire { session, reader, writer, input, output: Vec::new(), sent: 0 }
    }
}

/// A session on its connection.
pub(super) struct Wire {
    pub(super) session: Session,
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    input: Input,
    output: Vec<u8>,
    /// How much of `output` is gone.
    sent: usize,
}

/// What happened on the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Sent,
    Heard,
}

impl Wire {
    /// Carries out one command while nothing else goes on.
    pub(super) async fn exchange(&mut self, command: Command) -> Result<Reply, ConnectError> {
        let (done, mut answer) = oneshot::channel();
        self.session.add(Job { command, done, hold: None }, Instant::now());
        loop {
            match answer.try_recv() {
                Ok(reply) => return reply.map_err(|e| ConnectError::Unready(e.to_string())),
                Err(_) => self.step().await.map(|_| ())?,
            }
        }
    }

    /// Sends what is there to be sent, or receives something. May be dropped at any time.
    async fn step(&mut self) -> io::Result<Event> {
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
            self.session.fill(&mut self.output);
        }
        tokio::select! {
            biased;
            sent = self.writer.write(&self.output[self.sent..]), if self.sent < self.output.len() => {
                match sent? {
                    0 => Err(io::ErrorKind::WriteZero.into()),
                    len => {
                        self.sent += len;
                        Ok(Event::Sent)
                    }
                }
            }
            received = self.input.receive(&mut self.reader) => {
                received?;
                let used = self.session.feed(self.input.received())?;
                self.input.consume(used);
                Ok(Event::Heard)
            }
        }
    }

    /// Sends jobs and hands out answers. `Ok` once there are no more jobs; an error if the connection is of no
    /// more use.
    pub(super) async fn transmit(
        &mut self,
        jobs: &mut mpsc::Receiver<Job>,
        options: &Options,
    ) -> io::Result<()> {
        let mut ticks = tokio::time::interval(options.silence_max / 4);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ear = Ear { heard_at: Instant::now(), has_pinged: false };
        loop {
            while self.session.has_room()
                && let Ok(job) = jobs.try_recv()
            {
                self.session.add(job, Instant::now());
            }
            let has_room = self.session.has_room();
            tokio::select! {
                biased;
                event = self.step() => {
                    if event? == Event::Heard {
                        ear = Ear { heard_at: Instant::now(), has_pinged: false };
                    }
                }
                job = jobs.recv(), if has_room => match job {
                    Some(job) => self.session.add(job, Instant::now()),
                    None => return Ok(()),
                },
                now = ticks.tick() => match ear.due(now, self.session.waits_since(), options) {
                    Due::Nothing => {}
                    Due::Ping => self.session.ping(),
                    Due::Leave(why) => return Err(io::Error::new(io::ErrorKind::TimedOut, why)),
                }
            }
        }
    }

    /// Takes leave of the target, within a bounded time. Who cannot be reached need not be taken leave of.
    pub(super) async fn log_out(&mut self) {
        self.session.logout();
        let confirmed = async { while !self.session.is_logged_out() && self.step().await.is_ok() {} };
        let limit: Duration = LOGOUT_TIME_MAX;
        let _ = tokio::time::timeout(limit, confirmed).await;
    }
}

/// What was last heard of the target.
struct Ear {
    heard_at: Instant,
    /// Whether the target was pinged since.
    has_pinged: bool,
}

/// What is to be done about a target.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    Ping,
    /// The connection counts as lost.
    Leave(&'static str),
}

impl Ear {
    /// What is to be done now, where the oldest command waits since `waits_since`.
    fn due(&mut self, now: Instant, waits_since: Option<Instant>, options: &Options) -> Due {
        let silence = now.saturating_duration_since(self.heard_at);
        if silence > options.silence_max {
            return Due::Leave("the target is silent");
        }
        if waits_since.is_some_and(|since| now.saturating_duration_since(since) > options.answer_max) {
            return Due::Leave("the target does not answer a command");
        }
        if silence > options.silence_max / 2 && !self.has_pinged {
            self.has_pinged = true;
            return Due::Ping;
        }
        Due::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_target_is_pinged_once_and_then_left() {
        let start = Instant::now();
        let options = Options { silence_max: Duration::from_secs(10), ..Options::default() };
        let mut ear = Ear { heard_at: start, has_pinged: false };
        let mut due = |seconds| ear.due(start + Duration::from_secs(seconds), None, &options);
        assert_eq!([due(0), due(5), due(6), due(9)], [Due::Nothing, Due::Nothing, Due::Ping, Due::Nothing]);
        assert!(matches!(due(11), Due::Leave(why) if why.contains("silent")));
    }

    #[test]
    fn a_target_that_only_answers_pings_is_left() {
        let start = Instant::now();
        let options = Options { answer_max: Duration::from_secs(60), ..Options::default() };
        let due = |seconds| {
            let now = start + Duration::from_secs(seconds);
            Ear { heard_at: now, has_pinged: false }.due(now, Some(start), &options)
        };
        assert_eq!(due(60), Due::Nothing);
        assert!(matches!(due(61), Due::Leave(why) if why.contains("command")));
    }
}
