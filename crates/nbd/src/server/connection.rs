//! One connection in the transmission phase.
//!
//! One task owns all state. It takes every request that has arrived, tries each against the disk at once,
//! and sends all answers in one go; what would have to wait becomes a task of its own, so that it holds
//! up nobody. Memory is bounded by taking no further request while too much is under way.

use std::future::Future;
use std::sync::Arc;

use block::{Access, Disk, DiskError, TryIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, WriteHalf};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ServeError;
use super::buffers::{Buffer, Input, Output, Spares};
use super::tasks::{Finished, Task, errno};
use crate::export::Lease;
use crate::limits::{
    DRAIN_TIME_MAX, IN_FLIGHT_BYTES_MAX, IN_FLIGHT_MAX, INLINE_BYTES_MAX, REQUEST_BYTES_MAX,
};
use crate::negotiate::{Contexts, Session};
use crate::proto::{Errno, Framing, flag};
use crate::reply::{self, Last};
use crate::request::{self, Command, Request};
use crate::stream::BoxStream;

/// Serves requests until the client disconnects or `shutdown` is ready. `early` is what the client sent
/// right behind the negotiation.
pub(super) async fn run(
    stream: BoxStream,
    session: Session,
    early: &[u8],
    mut shutdown: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> Result<(), ServeError> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut connection = Connection::new(session, early);
    let mut closes_at: Option<Instant> = None;
    loop {
        connection.collect_finished()?;
        connection.take_requests()?;
        if connection.stage == Stage::Closing {
            if connection.is_drained() {
                // A client that hung up before us has nothing left to be told.
                let shut = tokio::time::timeout(DRAIN_TIME_MAX, writer.shutdown()).await;
                return shut.map(drop).map_err(|_| ServeError::NotDrained);
            }
            closes_at = closes_at.or(Some(Instant::now() + DRAIN_TIME_MAX));
        }
        let open = connection.stage == Stage::Open;
        let takes_more = open && connection.has_room();
        let sends = !connection.is_sent();
        tokio::select! {
            biased;
            () = &mut shutdown, if open => connection.stage = Stage::Closing,
            Some(finished) = connection.tasks.join_next(), if !connection.tasks.is_empty() => {
                connection.finish(finished.map_err(ServeError::Disk)?);
            }
            sent = send(&mut writer, connection.output.front()), if sends => connection.sent(sent?),
            read = reader.read(receive_room(&mut connection.upload, &mut connection.input)), if takes_more => {
                connection.received(read?)?;
            }
            () = sleep_until(closes_at), if closes_at.is_some() => return Err(ServeError::NotDrained),
        }
    }
}

/// Sends some of `bytes`, or, if there are none, what the stream itself still holds back: TLS gathers
/// records until it is told to send them. Answers how many bytes were taken.
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

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Where the next bytes from the client go: into the payload that is under way, else into the input.
fn receive_room<'a>(upload: &'a mut Option<Upload>, input: &'a mut Input) -> &'a mut [u8] {
    match upload {
        Some(upload) => upload.payload.room(upload.missing()),
        None => input.room(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Requests are taken.
    Open,
    /// No more are; those under way are finished and answered.
    Closing,
}

/// A long write whose payload is arriving.
struct Upload {
    request: Request,
    payload: Buffer,
}

impl Upload {
    fn missing(&self) -> usize {
        self.request.len as usize - self.payload.filled().len()
    }
}

struct Connection {
    disk: Arc<dyn Disk>,
    _lease: Option<Lease>,
    size_bytes: u64,
    framing: Framing,
    contexts: Contexts,
    stage: Stage,
    input: Input,
    upload: Option<Upload>,
    /// Bytes of payload still to come that belong to a refused request.
    unwanted_bytes: u64,
    output: Output,
    /// Bytes that the stream took, but was not told to send yet.
    unflushed_bytes: usize,
    spares: Spares,
    tasks: JoinSet<Finished>,
    booked_bytes: usize,
}

impl Connection {
    fn new(session: Session, early: &[u8]) -> Connection {
        Connection {
            size_bytes: session.export.disk.size_bytes(),
            disk: session.export.disk,
            _lease: session.export.lease,
            framing: session.framing,
            contexts: session.contexts,
            stage: Stage::Open,
            input: Input::new(early),
            upload: None,
            unwanted_bytes: 0,
            output: Output::default(),
            unflushed_bytes: 0,
            spares: Spares::default(),
            tasks: JoinSet::new(),
            booked_bytes: 0,
        }
    }

    /// Whether a further request may begin. Full means wait.
    fn has_room(&self) -> bool {
        self.tasks.len() < IN_FLIGHT_MAX && self.booked_bytes + self.output.bytes() < IN_FLIGHT_BYTES_MAX
    }

    fn is_drained(&self) -> bool {
        self.tasks.is_empty() && self.is_sent()
    }

    fn is_sent(&self) -> bool {
        self.output.bytes() == 0 && self.unflushed_bytes == 0
    }

    /// Notes that the stream took `len` bytes; 0 means that it sent all that it had taken before.
    fn sent(&mut self, len: usize) {
        if len == 0 {
            self.unflushed_bytes = 0;
        } else {
            self.unflushed_bytes += len;
            self.output.sent(len, &mut self.spares);
        }
    }

    /// Notes `len` bytes from the socket; 0 is its end.
    fn received(&mut self, len: usize) -> Result<(), ServeError> {
        if len == 0 {
            let between = self.upload.is_none() && self.unwanted_bytes == 0 && self.input.filled().is_empty();
            if !between {
                return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
            }
            // Not as polite as a disconnect, but as clear: what is under way is still answered.
            self.stage = Stage::Closing;
        } else if let Some(upload) = &mut self.upload {
            upload.payload.fill(len);
        } else {
            self.input.fill(len);
        }
        Ok(())
    }

    /// Takes the requests that have arrived, as far as there is room for them.
    fn take_requests(&mut self) -> Result<(), ServeError> {
        while self.stage == Stage::Open && self.has_room() {
            if let Some(upload) = self.upload.take_if(|u| u.missing() == 0) {
                self.write_owned(upload);
            }
            if self.upload.is_some() || !self.skip_unwanted() {
                break;
            }
            let Some(request) = request::parse(self.framing, self.input.filled())? else { break };
            let head = request::head_bytes(self.framing);
            let payload = request.payload_bytes(self.framing);
            if payload > REQUEST_BYTES_MAX as u64 {
                return Err(ServeError::PayloadTooLong(payload));
            }
            if let Err((errno, why)) = self.check(&request) {
                self.input.consume(head);
                self.unwanted_bytes = payload;
                self.refuse(&request, errno, why);
                continue;
            }
            if payload > INLINE_BYTES_MAX as u64 {
                self.input.consume(head);
                self.begin_upload(request);
                continue;
            }
            // A short payload is waited for in the input and never copied if the disk takes it at once.
            if self.input.filled().len() < head + payload as usize {
                break;
            }
            match request.command {
                Command::Read => self.read(request),
                Command::Write => self.write_inline(request, head),
                Command::Disconnect => self.stage = Stage::Closing,
                _ => self.spawn(request),
            }
            self.input.consume(head + payload as usize);
        }
        Ok(())
    }

    /// Drops the payload of a refused request as far as it has arrived; whether that was all of it.
    fn skip_unwanted(&mut self) -> bool {
        let arrived = self.input.filled().len();
        let skip = usize::try_from(self.unwanted_bytes).unwrap_or(usize::MAX).min(arrived);
        self.input.consume(skip);
        self.unwanted_bytes -= skip as u64;
        self.unwanted_bytes == 0
    }

    /// Whether a request makes sense for this export.
    fn check(&self, request: &Request) -> Result<(), (Errno, &'static str)> {
        let (allowed, writes) = match request.command {
            Command::Read if self.framing == Framing::Simple => (0, false),
            Command::Read => (flag::DF, false),
            Command::Write if self.framing == Framing::Extended => (flag::PAYLOAD_LEN, true),
            Command::Write | Command::Trim => (0, true),
            Command::WriteZeroes => (flag::NO_HOLE | flag::FAST_ZERO, true),
            Command::BlockStatus if self.contexts == Contexts::None => {
                return Err((Errno::Inval, "no metadata context was selected"));
            }
            Command::BlockStatus => (flag::REQ_ONE, false),
            Command::Flush | Command::Cache | Command::Disconnect => (0, false),
            Command::Unknown(_) => return Err((Errno::Inval, "this command is not known")),
        };
        if request.flags & !(allowed | flag::FUA) != 0 {
            return Err((Errno::Inval, "a command flag is not known here"));
        }
        if matches!(request.command, Command::Flush | Command::Disconnect) {
            return Ok(());
        }
        if writes && self.disk.access() == Access::ReadOnly {
            return Err((Errno::Perm, "this export is read-only"));
        }
        if request.offset.checked_add(request.len).is_none_or(|end| end > self.size_bytes) {
            let grows = matches!(request.command, Command::Write | Command::WriteZeroes);
            let errno = if grows { Errno::NoSpc } else { Errno::Inval };
            return Err((errno, "the range does not lie on the disk"));
        }
        match request.command {
            Command::Read if request.len > REQUEST_BYTES_MAX as u64 => {
                Err((Errno::Inval, "the read is longer than 32 MiB"))
            }
            Command::BlockStatus if request.len == 0 => Err((Errno::Inval, "the range is empty")),
            Command::WriteZeroes if request.has(flag::FAST_ZERO) && request.has(flag::NO_HOLE) => {
                Err((Errno::NotSup, "allocated zeroes are not faster than a write"))
            }
            _ => Ok(()),
        }
    }

    fn read(&mut self, request: Request) {
        if request.len == 0 {
            let head = reply::nothing(self.framing, &request);
            return self.output.push(&head, &mut self.spares);
        }
        let len = request.len as usize;
        let head = reply::data(self.framing, &request, Last::Yes, request.offset, len);
        let whole = head.len() + len;
        if len <= INLINE_BYTES_MAX {
            let room = self.output.room(whole, &mut self.spares);
            match self.disk.try_read(request.offset, &mut room[head.len()..]) {
                Ok(TryIo::Done) => {
                    room[..head.len()].copy_from_slice(&head);
                    self.output.commit(whole);
                }
                Ok(TryIo::WouldBlock) => {
                    let buffer = self.spares.take(whole);
                    self.spawn_read(request, buffer, whole);
                }
                Err(error) => self.failed(&request, &error),
            }
            return;
        }
        let mut buffer = self.spares.take(whole);
        match self.disk.try_read(request.offset, &mut buffer.room(whole)[head.len()..]) {
            Ok(TryIo::Done) => {
                buffer.push(&head);
                buffer.fill(len);
                self.output.append(buffer);
            }
            Ok(TryIo::WouldBlock) => self.spawn_read(request, buffer, whole),
            Err(error) => {
                self.spares.give(buffer);
                self.failed(&request, &error);
            }
        }
    }

    /// Writes a payload that lies in the input behind its header of `head` bytes.
    fn write_inline(&mut self, request: Request, head: usize) {
        let payload = &self.input.filled()[head..head + request.len as usize];
        if !request.has(flag::FUA) {
            match self.disk.try_write(request.offset, payload) {
                Ok(TryIo::Done) => return self.succeeded(&request),
                Ok(TryIo::WouldBlock) => {}
                Err(error) => return self.failed(&request, &error),
            }
        }
        let mut owned = self.spares.take(payload.len());
        owned.push(payload);
        self.spawn_write(request, owned);
    }

    /// Makes ready for a payload that goes from the socket straight into its own buffer.
    fn begin_upload(&mut self, request: Request) {
        let mut payload = self.spares.take(request.len as usize);
        let arrived = self.input.filled().len().min(request.len as usize);
        payload.push(&self.input.filled()[..arrived]);
        self.input.consume(arrived);
        self.upload = Some(Upload { request, payload });
    }

    fn write_owned(&mut self, Upload { request, payload }: Upload) {
        if !request.has(flag::FUA) {
            match self.disk.try_write(request.offset, payload.filled()) {
                Ok(TryIo::Done) => {
                    self.spares.give(payload);
                    return self.succeeded(&request);
                }
                Ok(TryIo::WouldBlock) => {}
                Err(error) => {
                    self.spares.give(payload);
                    return self.failed(&request, &error);
                }
            }
        }
        self.spawn_write(request, payload);
    }

    fn task(&self, request: Request) -> Task {
        Task { disk: Arc::clone(&self.disk), framing: self.framing, request }
    }

    fn spawn_read(&mut self, request: Request, buffer: Buffer, bytes: usize) {
        self.booked_bytes += bytes;
        self.tasks.spawn(self.task(request).read(buffer, bytes));
    }

    fn spawn_write(&mut self, request: Request, payload: Buffer) {
        let bytes = payload.filled().len();
        self.booked_bytes += bytes;
        self.tasks.spawn(self.task(request).write(payload, bytes));
    }

    fn spawn(&mut self, request: Request) {
        self.tasks.spawn(self.task(request).run());
    }

    /// Queues the replies of all tasks that have ended, so that they leave together.
    fn collect_finished(&mut self) -> Result<(), ServeError> {
        while let Some(finished) = self.tasks.try_join_next() {
            self.finish(finished.map_err(ServeError::Disk)?);
        }
        Ok(())
    }

    fn finish(&mut self, Finished { reply, spare, booked_bytes }: Finished) {
        self.booked_bytes -= booked_bytes;
        if reply.filled().len() <= INLINE_BYTES_MAX {
            self.output.push(reply.filled(), &mut self.spares);
            self.spares.give(reply);
        } else {
            self.output.append(reply);
        }
        if let Some(spare) = spare {
            self.spares.give(spare);
        }
    }

    fn succeeded(&mut self, request: &Request) {
        self.output.push(&reply::success(self.framing, request), &mut self.spares);
    }

    fn failed(&mut self, request: &Request, error: &DiskError) {
        self.refuse(request, errno(error), &error.to_string());
    }

    fn refuse(&mut self, request: &Request, errno: Errno, why: &str) {
        let reply = reply::error(self.framing, request, errno, why);
        self.output.push(&reply, &mut self.spares);
    }
}
