//! The server against hand-made bytes: every option, malformed and hostile messages, what a misbehaving
//! client costs.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::{Access, Disk};
use common::server;
use nbd::limits::{IN_FLIGHT_BYTES_MAX, OPTION_BYTES_MAX, OPTIONS_MAX, REQUEST_BYTES_MAX};
use nbd::negotiate::NegotiationError;
use nbd::proto::{
    EXTENDED_REPLY_MAGIC, Framing, OPTION_MAGIC, OPTION_REPLY_MAGIC, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, flag, option, rep, transmission,
};
use nbd::request::{Command, Request};
use nbd::{ServeError, Server};
use testkit::memory_disk::{BLOCK, MemoryDisk, Pace};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A client that writes whatever bytes a test wants.
struct Raw {
    stream: DuplexStream,
    served: JoinHandle<Result<(), ServeError>>,
    shutdown: Option<oneshot::Sender<()>>,
}

/// A reply to an option: its type and its data.
type OptionReply = (u32, Vec<u8>);

impl Raw {
    /// Connects and answers the greeting.
    async fn connect(server: Server, flags: u32) -> Raw {
        let (stream, far) = tokio::io::duplex(64 << 10);
        let (shutdown, asked) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            let asked = async {
                // A test that drops its end without a word does not ask for a shutdown.
                if asked.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            server.serve(far, asked).await
        });
        let mut raw = Raw { stream, served, shutdown: Some(shutdown) };
        assert_eq!(&raw.take(16).await, b"NBDMAGICIHAVEOPT");
        assert_eq!(raw.take(2).await, [0, 3]);
        raw.stream.write_all(&flags.to_be_bytes()).await.unwrap();
        raw
    }

    async fn with(disk: &Arc<MemoryDisk>) -> Raw {
        Raw::connect(server(Arc::clone(disk) as Arc<dyn Disk>), 3).await
    }

    async fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes).await.expect("the server still talks");
        bytes
    }

    async fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).await.try_into().unwrap())
    }

    async fn send_option(&mut self, option: u32, data: &[u8]) {
        self.stream.write_all(&OPTION_MAGIC.to_be_bytes()).await.unwrap();
        self.stream.write_all(&option.to_be_bytes()).await.unwrap();
        self.stream.write_all(&(data.len() as u32).to_be_bytes()).await.unwrap();
        self.stream.write_all(data).await.unwrap();
    }

    /// Sends an option and takes its replies up to the one that ends them.
    async fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data).await;
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.take(8).await, OPTION_REPLY_MAGIC.to_be_bytes());
            assert_eq!(self.u32().await, option);
            let (kind, len) = (self.u32().await, self.u32().await);
            replies.push((kind, self.take(len as usize).await));
            if kind == rep::ACK || kind & rep::ERR_BIT != 0 {
                return replies;
            }
        }
    }

    /// The type of the last reply to an option.
    async fn outcome(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option(option, data).await.last().unwrap().0
    }

    /// Goes to the transmission phase in this framing, with `base:allocation` where there can be.
    async fn go(&mut self, framing: Framing) {
        let wants = match framing {
            Framing::Simple => None,
            Framing::Structured => Some(option::STRUCTURED_REPLY),
            Framing::Extended => Some(option::EXTENDED_HEADERS),
        };
        if let Some(option) = wants {
            assert_eq!(self.outcome(option, &[]).await, rep::ACK);
            let data = queries("disk", &["base:allocation"]);
            assert_eq!(self.outcome(option::SET_META_CONTEXT, &data).await, rep::ACK);
        }
        assert_eq!(self.outcome(option::GO, &choice("disk", &[])).await, rep::ACK);
    }

    async fn request(&mut self, framing: Framing, command: Command, flags: u16, offset: u64, len: u64) {
        let mut out = Vec::new();
        Request { flags, command, cookie: offset, offset, len }.encode(framing, &mut out);
        self.stream.write_all(&out).await.unwrap();
    }

    /// A chunk of a structured reply: flags, type, cookie, payload.
    async fn chunk(&mut self) -> (u16, u16, u64, Vec<u8>) {
        assert_eq!(self.u32().await, STRUCTURED_REPLY_MAGIC);
        let head = self.take(12).await;
        let len = self.u32().await;
        let u16_at = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
        let cookie = u64::from_be_bytes(head[4..12].try_into().unwrap());
        (u16_at(0), u16_at(2), cookie, self.take(len as usize).await)
    }

    /// A simple reply: error and cookie.
    async fn simple(&mut self) -> (u32, u64) {
        assert_eq!(self.u32().await, SIMPLE_REPLY_MAGIC);
        (self.u32().await, u64::from_be_bytes(self.take(8).await.try_into().unwrap()))
    }

    /// The error of a structured reply.
    async fn refusal(&mut self) -> u32 {
        let (flags, kind, _, payload) = self.chunk().await;
        assert_eq!((flags, kind), (1, 0x8001), "an error chunk that ends the reply");
        u32::from_be_bytes(payload[..4].try_into().unwrap())
    }

    /// Waits for the server to hang up; how it ended.
    async fn ended(mut self) -> Result<(), ServeError> {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).await.unwrap();
        self.served.await.unwrap()
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn choice(name: &str, wants: &[u16]) -> Vec<u8> {
    let mut data = text(name);
    data.extend_from_slice(&(wants.len() as u16).to_be_bytes());
    wants.iter().for_each(|want| data.extend_from_slice(&want.to_be_bytes()));
    data
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(name);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(text(query)));
    data
}

fn disk() -> Arc<MemoryDisk> {
    MemoryDisk::new(1 << 20, Pace::Now)
}

#[tokio::test]
async fn every_option_is_answered_and_unknown_ones_are_refused() {
    let mut raw = Raw::with(&disk()).await;
    for unknown in [0, 4, 12, u32::MAX] {
        assert_eq!(raw.outcome(unknown, b"whatever").await, rep::ERR_UNSUP, "option {unknown}");
    }
    let list = raw.option(option::LIST, &[]).await;
    assert_eq!(list[0], (rep::SERVER, [&text("disk")[..], b"a disk for tests"].concat()));
    assert_eq!(list.len(), 2);
    assert_eq!(raw.outcome(option::STARTTLS, &[]).await, rep::ERR_POLICY);
    assert_eq!(raw.outcome(option::INFO, &choice("nothing", &[])).await, rep::ERR_UNKNOWN);
    let info = raw.option(option::INFO, &choice("", &[1, 2, 3, 99])).await;
    let items: Vec<u16> =
        info.iter().filter(|r| r.0 == rep::INFO).map(|r| u16::from_be_bytes([r.1[0], r.1[1]])).collect();
    assert_eq!(items, [0, 1, 2, 3]);
    let sizes = [1u32, 4096, 32 << 20].map(u32::to_be_bytes).concat();
    assert_eq!(info[3].1[2..], sizes);
    let context = queries("disk", &[]);
    assert_eq!(raw.outcome(option::LIST_META_CONTEXT, &context).await, rep::ERR_INVALID);
    assert_eq!(raw.outcome(option::STRUCTURED_REPLY, &[]).await, rep::ACK);
    assert_eq!(raw.option(option::LIST_META_CONTEXT, &context).await.len(), 2);
    assert_eq!(raw.option(option::SET_META_CONTEXT, &context).await.len(), 1, "no query selects nothing");
    let foreign = queries("disk", &["qemu:dirty", "base:allocation"]);
    assert_eq!(raw.option(option::SET_META_CONTEXT, &foreign).await.len(), 2);
    let other = queries("nothing", &["base:allocation"]);
    assert_eq!(raw.outcome(option::SET_META_CONTEXT, &other).await, rep::ERR_UNKNOWN);
    assert_eq!(raw.outcome(option::EXTENDED_HEADERS, &[]).await, rep::ACK);
    assert_eq!(raw.outcome(option::STRUCTURED_REPLY, &[]).await, rep::ERR_EXT_HEADER_REQD);
    assert_eq!(raw.outcome(option::ABORT, &[]).await, rep::ACK);
    raw.ended().await.unwrap();
}

#[tokio::test]
async fn malformed_options_are_refused_and_the_negotiation_goes_on() {
    let mut raw = Raw::with(&disk()).await;
    assert_eq!(raw.outcome(option::STRUCTURED_REPLY, &[]).await, rep::ACK);
    for option in [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(raw.outcome(option, b"x").await, rep::ERR_INVALID, "option {option}");
    }
    let long_name = text(&"n".repeat(4097));
    let not_utf8 = [0, 0, 0, 1, 0xff, 0, 0];
    let trailing = [&choice("disk", &[])[..], b"x"].concat();
    let more_wants_than_data = [&text("disk")[..], &[0xff, 0xff, 0, 3]].concat();
    let bad: [&[u8]; 7] = [&[], &[0], &[0xff; 4], &long_name, &not_utf8, &trailing, &more_wants_than_data];
    for (i, data) in bad.iter().enumerate() {
        for option in [option::INFO, option::GO] {
            assert_eq!(raw.outcome(option, data).await, rep::ERR_INVALID, "option {option}, case {i}");
        }
    }
    let more_queries_than_data = [&text("disk")[..], &[0xff; 4]].concat();
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        assert_eq!(raw.outcome(option, &more_queries_than_data).await, rep::ERR_INVALID);
    }
    assert_eq!(raw.outcome(option::GO, &choice("disk", &[])).await, rep::ACK);
}

#[tokio::test]
async fn a_negotiation_cannot_be_long_in_bytes_or_options() {
    let mut raw = Raw::with(&disk()).await;
    raw.stream.write_all(&OPTION_MAGIC.to_be_bytes()).await.unwrap();
    raw.stream.write_all(&option::GO.to_be_bytes()).await.unwrap();
    raw.stream.write_all(&(OPTION_BYTES_MAX as u32 + 1).to_be_bytes()).await.unwrap();
    let ended = raw.ended().await;
    assert!(matches!(ended, Err(ServeError::Negotiation(NegotiationError::OptionTooLong(_)))), "{ended:?}");

    let mut raw = Raw::with(&disk()).await;
    for _ in 0..OPTIONS_MAX {
        raw.outcome(option::LIST, &[]).await;
    }
    raw.send_option(option::LIST, &[]).await;
    let ended = raw.ended().await;
    assert!(matches!(ended, Err(ServeError::Negotiation(NegotiationError::TooManyOptions))), "{ended:?}");
}

#[tokio::test]
async fn what_is_no_nbd_client_is_hung_up_on() {
    let mut raw = Raw::with(&disk()).await;
    raw.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let ended = raw.ended().await;
    assert!(matches!(ended, Err(ServeError::Negotiation(NegotiationError::Magic(_)))), "{ended:?}");

    let raw = Raw::connect(server(disk()), 0x8000_0003).await;
    let ended = raw.ended().await;
    assert!(matches!(ended, Err(ServeError::Negotiation(NegotiationError::Flags(_)))), "{ended:?}");
}

#[tokio::test]
async fn with_tls_required_nothing_else_is_answered_and_nothing_before_it_counts() {
    // An upgrade that changes nothing shows whether the state was forgotten.
    let secure = server(disk()).with_tls(Arc::new(|stream| Box::pin(async { Ok(stream) })));
    let mut raw = Raw::connect(secure.clone(), 3).await;
    for option in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, 77] {
        assert_eq!(raw.outcome(option, &[]).await, rep::ERR_TLS_REQD, "option {option}");
    }
    assert_eq!(raw.outcome(option::STARTTLS, &[]).await, rep::ACK);
    assert_eq!(raw.outcome(option::STARTTLS, &[]).await, rep::ERR_INVALID);
    let context = queries("disk", &["base:allocation"]);
    assert_eq!(raw.outcome(option::SET_META_CONTEXT, &context).await, rep::ERR_INVALID);
    assert_eq!(raw.outcome(option::GO, &choice("disk", &[])).await, rep::ACK);

    let mut raw = Raw::connect(secure.clone(), 3).await;
    raw.send_option(option::EXPORT_NAME, b"disk").await;
    assert!(matches!(
        raw.ended().await,
        Err(ServeError::Negotiation(NegotiationError::ExportName("TLS is required")))
    ));

    // Options behind STARTTLS in plain text are an attacker's.
    let mut raw = Raw::connect(secure, 3).await;
    let mut both = Vec::new();
    for option in [option::STARTTLS, option::STRUCTURED_REPLY] {
        both.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        both.extend_from_slice(&option.to_be_bytes());
        both.extend_from_slice(&0u32.to_be_bytes());
    }
    raw.stream.write_all(&both).await.unwrap();
    assert!(matches!(raw.ended().await, Err(ServeError::Injected)));
}

#[tokio::test]
async fn the_oldest_way_in_works_with_and_without_its_zeroes() {
    for (flags, padding) in [(3, 0), (1, 124), (0, 124)] {
        let mut raw = Raw::connect(server(disk()), flags).await;
        raw.send_option(option::EXPORT_NAME, b"disk").await;
        assert_eq!(raw.take(8).await, (1u64 << 20).to_be_bytes());
        raw.take(2).await;
        assert_eq!(raw.take(padding).await, vec![0; padding]);
        raw.request(Framing::Simple, Command::Flush, 0, 0, 0).await;
        assert_eq!(raw.simple().await, (0, 0));
    }
}

#[tokio::test]
async fn the_flags_tell_what_the_disk_can_do() {
    use transmission::*;
    let writable = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN | SEND_CACHE;
    let changes = SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO;
    for (access, expected) in
        [(Access::ReadWrite, writable | changes), (Access::ReadOnly, writable | READ_ONLY)]
    {
        let disk = MemoryDisk::with(vec![0; BLOCK], Pace::Now, access);
        let mut raw = Raw::with(&disk).await;
        for df in [0, SEND_DF] {
            let export = raw.option(option::INFO, &choice("disk", &[])).await.remove(0).1;
            assert_eq!(u16::from_be_bytes([export[10], export[11]]), expected | df, "{access:?}");
            raw.outcome(option::STRUCTURED_REPLY, &[]).await;
        }
    }
}

#[tokio::test]
async fn senseless_requests_are_refused_and_the_connection_goes_on() {
    const PERM: u32 = 1;
    const INVAL: u32 = 22;
    const NOSPC: u32 = 28;
    const NOTSUP: u32 = 95;
    let framing = Framing::Structured;
    let mut raw = Raw::with(&disk()).await;
    raw.go(framing).await;
    let size = 1u64 << 20;
    let cases = [
        (Command::Read, 0, size, 1, INVAL),
        (Command::Read, 0, u64::MAX, 2, INVAL),
        (Command::Read, flag::REQ_ONE, 0, 1, INVAL),
        (Command::Trim, 0, 1, size, INVAL),
        (Command::WriteZeroes, 0, 1, size, NOSPC),
        (Command::WriteZeroes, flag::FAST_ZERO | flag::NO_HOLE, 0, 1, NOTSUP),
        (Command::BlockStatus, 0, 0, 0, INVAL),
        (Command::Cache, 0, size, 1, INVAL),
        (Command::Unknown(77), 0, 0, 0, INVAL),
    ];
    for (command, flags, offset, len, errno) in cases {
        raw.request(framing, command, flags, offset, len).await;
        assert_eq!(raw.refusal().await, errno, "{command:?} {flags:#x} {len} at {offset}");
    }
    // The payload of a refused write is skipped, long and short, or it would be taken for requests.
    for len in [10, 300 << 10] {
        raw.request(framing, Command::Write, 0, size - 1, len as u64).await;
        raw.stream.write_all(&vec![0xab; len]).await.unwrap();
        assert_eq!(raw.refusal().await, NOSPC);
    }
    raw.request(framing, Command::Read, 0, 0, 0).await;
    assert_eq!(raw.chunk().await, (1, 0, 0, Vec::new()), "a read of nothing succeeds");

    let mut raw = Raw::with(&MemoryDisk::with(vec![0; 1 << 20], Pace::Now, Access::ReadOnly)).await;
    raw.go(framing).await;
    raw.request(framing, Command::Write, 0, 0, 4).await;
    raw.stream.write_all(b"data").await.unwrap();
    assert_eq!(raw.refusal().await, PERM);
    raw.request(framing, Command::Trim, 0, 0, 4).await;
    assert_eq!(raw.refusal().await, PERM);
}

#[tokio::test]
async fn a_read_beyond_the_limit_is_refused_and_such_a_write_ends_the_connection() {
    let disk = MemoryDisk::new(REQUEST_BYTES_MAX + 4096, Pace::Now);
    let mut raw = Raw::with(&disk).await;
    raw.go(Framing::Simple).await;
    raw.request(Framing::Simple, Command::Read, 0, 0, REQUEST_BYTES_MAX as u64 + 1).await;
    assert_eq!(raw.simple().await.0, 22);
    raw.request(Framing::Simple, Command::Write, 0, 0, REQUEST_BYTES_MAX as u64 + 1).await;
    assert!(matches!(raw.ended().await, Err(ServeError::PayloadTooLong(_))));
}

#[tokio::test]
async fn block_status_needs_its_context_for_this_export_and_honours_req_one() {
    let disk = disk();
    disk.bytes.lock().unwrap()[BLOCK..2 * BLOCK].fill(1);
    let framing = Framing::Structured;
    let mut raw = Raw::with(&disk).await;
    raw.outcome(option::STRUCTURED_REPLY, &[]).await;
    // Selected for the default export, but then another name is chosen.
    raw.outcome(option::SET_META_CONTEXT, &queries("", &["base:allocation"])).await;
    raw.outcome(option::GO, &choice("disk", &[])).await;
    raw.request(framing, Command::BlockStatus, 0, 0, 4096).await;
    assert_eq!(raw.refusal().await, 22);

    let mut raw = Raw::with(&disk).await;
    raw.go(framing).await;
    raw.request(framing, Command::BlockStatus, 0, 0, 1 << 20).await;
    let (_, kind, _, payload) = raw.chunk().await;
    let rest = (1 << 20) - 2 * BLOCK as u32;
    let expected = [1, BLOCK as u32, 3, BLOCK as u32, 0, rest, 3].map(u32::to_be_bytes).concat();
    assert_eq!((kind, payload), (5, expected));
    raw.request(framing, Command::BlockStatus, flag::REQ_ONE, BLOCK as u64, 1 << 19).await;
    assert_eq!(raw.chunk().await.3, [1, BLOCK as u32, 0].map(u32::to_be_bytes).concat());
}

#[tokio::test]
async fn holes_of_a_read_that_waits_are_told_unless_forbidden() {
    let disk = MemoryDisk::new(1 << 20, Pace::Later);
    disk.bytes.lock().unwrap()[..BLOCK].fill(1);
    let framing = Framing::Structured;
    let mut raw = Raw::with(&disk).await;
    raw.go(framing).await;
    let len = 128u64 << 10;
    raw.request(framing, Command::Read, 0, 0, len).await;
    let (flags, kind, _, payload) = raw.chunk().await;
    assert_eq!((flags, kind, payload.len()), (0, 1, 8 + BLOCK));
    let (flags, kind, _, payload) = raw.chunk().await;
    let hole = [&(BLOCK as u64).to_be_bytes()[..], &(len as u32 - BLOCK as u32).to_be_bytes()].concat();
    assert_eq!((flags, kind, payload), (1, 2, hole));
    raw.request(framing, Command::Read, flag::DF, 0, len).await;
    let (flags, kind, _, payload) = raw.chunk().await;
    assert_eq!((flags, kind, payload.len()), (1, 1, 8 + len as usize));
}

#[tokio::test]
async fn extended_requests_may_be_longer_than_32_bits_and_are_answered_in_kind() {
    let framing = Framing::Extended;
    let mut raw = Raw::with(&disk()).await;
    raw.go(framing).await;
    raw.request(framing, Command::Trim, 0, 8, 1 << 33).await;
    assert_eq!(raw.u32().await, EXTENDED_REPLY_MAGIC);
    let head = raw.take(28).await;
    assert_eq!(head[..4], [0, 1, 0x80, 1], "an error that ends the reply");
    assert_eq!(head[4..12], head[12..20], "cookie and offset are told again");
    let len = u64::from_be_bytes(head[20..].try_into().unwrap());
    raw.take(len as usize).await;
    // A payload where there should be none is skipped.
    raw.request(framing, Command::Flush, flag::PAYLOAD_LEN, 0, 5).await;
    raw.stream.write_all(b"bytes").await.unwrap();
    raw.take(24).await;
    let len = u64::from_be_bytes(raw.take(8).await.try_into().unwrap());
    raw.take(len as usize).await;
    raw.request(framing, Command::Flush, 0, 0, 0).await;
    let head = raw.take(32).await;
    assert_eq!(head[4..8], [0, 1, 0, 0], "success without payload");
}

#[tokio::test]
async fn allocated_zeroes_cached_ranges_and_fua_reach_the_disk() {
    let disk = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadWrite);
    let framing = Framing::Structured;
    let mut raw = Raw::with(&disk).await;
    raw.go(framing).await;
    raw.request(framing, Command::WriteZeroes, flag::NO_HOLE | flag::FUA, 100, 600 << 10).await;
    assert_eq!(raw.simple().await, (0, 100));
    assert_eq!(disk.flushes(), 1);
    {
        let bytes = disk.bytes.lock().unwrap();
        let end = 100 + (600 << 10);
        assert!(bytes[..100].iter().chain(&bytes[end..]).all(|&b| b == 7));
        assert!(bytes[100..end].iter().all(|&b| b == 0));
    }
    raw.request(framing, Command::Cache, 0, 0, 1 << 20).await;
    assert_eq!(raw.simple().await, (0, 0));
    disk.broken.store(true, Ordering::SeqCst);
    raw.request(framing, Command::Cache, 0, 0, 1 << 20).await;
    assert_eq!(raw.refusal().await, 5, "the range was really read");
}

#[tokio::test]
async fn a_goodbye_waits_for_what_is_under_way() {
    let disk = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadWrite);
    disk.gated_offset.store(0, Ordering::SeqCst);
    let mut raw = Raw::with(&disk).await;
    raw.go(Framing::Simple).await;
    raw.request(Framing::Simple, Command::Read, 0, 0, 512).await;
    raw.request(Framing::Simple, Command::Disconnect, 0, 0, 0).await;
    disk.gate.add_permits(1);
    assert_eq!(raw.simple().await, (0, 0));
    assert_eq!(raw.take(512).await, vec![7; 512]);
    raw.ended().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_finishes_what_is_under_way_and_takes_nothing_more() {
    let disk = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadWrite);
    disk.gated_offset.store(0, Ordering::SeqCst);
    let mut raw = Raw::with(&disk).await;
    raw.go(Framing::Simple).await;
    raw.request(Framing::Simple, Command::Read, 0, 0, 512).await;
    raw.request(Framing::Simple, Command::Flush, 0, 9, 0).await;
    assert_eq!(raw.simple().await, (0, 9), "the read has been taken before this");
    raw.shutdown.take().unwrap().send(()).unwrap();
    disk.gate.add_permits(1);
    assert_eq!(raw.simple().await, (0, 0));
    assert_eq!(raw.take(512).await, vec![7; 512]);
    raw.ended().await.unwrap();
}

#[tokio::test]
async fn a_client_that_asks_and_never_listens_is_held_in_bounds() {
    let disk = MemoryDisk::with(vec![7; 4 << 20], Pace::Now, Access::ReadWrite);
    let mut raw = Raw::with(&disk).await;
    raw.go(Framing::Simple).await;
    let mut request = Vec::new();
    let read = Request { flags: 0, command: Command::Read, cookie: 1, offset: 0, len: 1 << 20 };
    read.encode(Framing::Simple, &mut request);
    let all = request.repeat(100_000);
    let mut sent = 0;
    // Everything runs on this thread: once the server takes nothing although it was given every chance, it
    // has stopped for good.
    let mut idle_turns = 0;
    while idle_turns < 1000 {
        let write = raw.stream.write(&all[sent..]);
        match futures_util::FutureExt::now_or_never(write) {
            Some(written) => (sent, idle_turns) = (sent + written.unwrap(), 0),
            None => idle_turns += 1,
        }
        tokio::task::yield_now().await;
    }
    let reads = disk.asked().len();
    assert!(reads > 1, "the server worked until it was full");
    assert!(reads <= (IN_FLIGHT_BYTES_MAX >> 20) + 1, "{reads} MiB of replies are held");
    assert!(sent < all.len(), "the server took all requests");
}
