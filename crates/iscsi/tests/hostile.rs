//! Initiators that mean harm, many at a time, beside an honest one that goes on working.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Serving, target};
use iscsi::limits::{CONNECTIONS_MAX, FIRST_BURST_BYTES_MAX, SERVER_BYTES_MAX};
use iscsi::pdu::{
    self, DataIn, DataOut, Digests, HEADER_BYTES, Header, Isid, LoginRequest, LoginResponse, NO_TAG, NopOut,
    R2t, ScsiCommand, ScsiResponse, command, stage,
};
use testkit::memory_disk::{MemoryDisk, Pace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const NAME: &str = "iqn.2026-01.test:disk";
const DISK_BYTES: usize = 8 << 20;

/// READ(10) and WRITE(10) of the first MiB.
const READ_MIB: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 8, 0, 0];
const WRITE_MIB: [u8; 10] = [0x2a, 0, 0, 0, 0, 0, 0, 8, 0, 0];

/// Longest wait for anything; the whole takes a few seconds on a busy machine.
const TIME_MAX: Duration = Duration::from_secs(240);

/// One connection to the target.
struct Link {
    stream: TcpStream,
    input: Vec<u8>,
    cmd_sn: u32,
}

impl Link {
    async fn connect(portal: SocketAddr) -> Link {
        Link { stream: TcpStream::connect(portal).await.unwrap(), input: Vec::new(), cmd_sn: 1 }
    }

    /// A session of initiator `n`, whose first command was told of the reset before it.
    async fn session(portal: SocketAddr, n: u16) -> Link {
        let mut link = Link::connect(portal).await;
        let flags = stage::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE;
        let [high, low] = n.to_be_bytes();
        let isid = Isid([0x40, 0, 0, 0, high, low]);
        let request = LoginRequest { flags, isid, cmd_sn: 1, ..LoginRequest::default() };
        let text = format!("InitiatorName=iqn.2026-01.test:{n}\0TargetName={NAME}\0MaxBurstLength=1048576\0");
        link.send(request.header().immediate(), text.as_bytes()).await;
        assert_eq!(LoginResponse::parse(&link.receive().await.unwrap().0).status, 0);
        link.command(1, &[0; 6], 0, 0, &[]).await;
        assert_eq!(link.receive().await.unwrap().0.opcode(), ScsiResponse::OPCODE);
        link
    }

    async fn send(&mut self, header: Header, data: &[u8]) {
        self.stream.write_all(&sealed(header, data)).await.unwrap();
    }

    /// Sends as much as the target takes without being read from.
    fn push(&mut self, bytes: &[u8]) -> bool {
        match self.stream.try_write(bytes) {
            Ok(len) => len == bytes.len(),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        }
    }

    async fn command(&mut self, task_tag: u32, cdb: &[u8], flags: u8, expected_bytes: u32, data: &[u8]) {
        let header = self.command_header(task_tag, cdb, flags, expected_bytes);
        self.send(header, data).await;
    }

    fn command_header(&mut self, task_tag: u32, cdb: &[u8], flags: u8, expected_bytes: u32) -> Header {
        let mut whole = [0; 16];
        whole[..cdb.len()].copy_from_slice(cdb);
        let (flags, cmd_sn) = (flags | pdu::FINAL, self.cmd_sn);
        self.cmd_sn += 1;
        ScsiCommand { flags, task_tag, expected_bytes, cmd_sn, cdb: whole, ..ScsiCommand::default() }.header()
    }

    /// The next PDU; `None` if the target closed the connection.
    async fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let found = pdu::frame(&self.input, Digests::default(), 1 << 20).unwrap();
            if let Some(frame) = found {
                let (header, data, bytes) = (frame.header, frame.data.to_vec(), frame.bytes);
                self.input.drain(..bytes);
                return Some((header, data));
            }
            let read = tokio::time::timeout(TIME_MAX, self.stream.read_buf(&mut self.input)).await;
            if read.expect("the target answers or closes").unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// Writes 1 MiB of `byte` at its place and reads it back.
    async fn write_and_read(&mut self, byte: u8) {
        const BYTES: u32 = 1 << 20;
        self.command(20, &WRITE_MIB, command::WRITE, BYTES, &[]).await;
        let mut written = 0;
        while written < BYTES {
            let (header, _) = self.receive().await.unwrap();
            assert_eq!(header.opcode(), R2t::OPCODE);
            let r2t = R2t::parse(&header);
            assert_eq!(r2t.offset, written);
            let (mut data_sn, end) = (0, r2t.offset + r2t.wanted_bytes);
            while written < end {
                let len = (end - written).min(64 << 10);
                let flags = if written + len == end { pdu::FINAL } else { 0 };
                let (transfer_tag, offset) = (r2t.transfer_tag, written);
                let out =
                    DataOut { flags, task_tag: 20, transfer_tag, data_sn, offset, ..DataOut::default() };
                self.send(out.header(), &vec![byte; len as usize]).await;
                (written, data_sn) = (written + len, data_sn + 1);
            }
        }
        let (header, _) = self.receive().await.unwrap();
        assert_eq!((header.opcode(), ScsiResponse::parse(&header).status), (ScsiResponse::OPCODE, 0));
        self.command(21, &READ_MIB, command::READ, BYTES, &[]).await;
        let mut read = Vec::new();
        while read.len() < BYTES as usize {
            let (header, data) = self.receive().await.unwrap();
            assert_eq!(header.opcode(), DataIn::OPCODE);
            read.extend_from_slice(&data);
        }
        assert!(read.iter().all(|b| *b == byte), "what was written is read");
    }
}

fn sealed(header: Header, data: &[u8]) -> Vec<u8> {
    let seal = pdu::seal(header, data, Digests::default());
    [seal.head(), data, seal.tail()].concat()
}

/// Asks for much and reads nothing.
async fn never_reads(portal: SocketAddr, n: u16) -> Link {
    let mut link = Link::session(portal, n).await;
    for tag in 10..110 {
        let header = link.command_header(tag, &READ_MIB, command::READ, 1 << 20);
        link.push(&sealed(header, &[]));
    }
    link
}

/// Sends pings that are to come back, for as long as the target takes them, and reads nothing.
async fn never_reads_pings(portal: SocketAddr, n: u16) -> Link {
    let mut link = Link::session(portal, n).await;
    let ping = NopOut { flags: 0x80, task_tag: 9, transfer_tag: NO_TAG, ..NopOut::default() };
    let ping = sealed(ping.header().immediate(), &[7; 64 << 10]);
    for _ in 0..1000 {
        if !link.push(&ping) {
            break;
        }
    }
    link
}

/// Begins to write, with as much unsolicited data as it may send, and never answers what it is asked for.
async fn never_sends(portal: SocketAddr, n: u16) -> Link {
    let mut link = Link::session(portal, n).await;
    let data = vec![1; FIRST_BURST_BYTES_MAX as usize];
    for tag in 10..110 {
        let header = link.command_header(tag, &WRITE_MIB, command::WRITE, 1 << 20);
        if !link.push(&sealed(header, &data)) {
            break;
        }
    }
    link
}

/// Begins to write, and sends all that it is asked for but for the last block.
async fn never_finishes(portal: SocketAddr, n: u16) -> Link {
    const PIECE_BYTES: u32 = 64 << 10;
    let mut link = Link::session(portal, n).await;
    for tag in 10..40 {
        link.command(tag, &WRITE_MIB, command::WRITE, 1 << 20, &[]).await;
    }
    // The answer to a ping comes behind all that the target asks for.
    let ping = NopOut { flags: 0x80, task_tag: 9, transfer_tag: NO_TAG, ..NopOut::default() };
    link.send(ping.header().immediate(), &[]).await;
    loop {
        let (header, _) = link.receive().await.unwrap();
        if header.opcode() != R2t::OPCODE {
            return link;
        }
        let r2t = R2t::parse(&header);
        let end = r2t.offset + r2t.wanted_bytes - 512;
        let pieces = (r2t.offset..end).step_by(PIECE_BYTES as usize);
        for (data_sn, offset) in (0..).zip(pieces) {
            let (task_tag, transfer_tag) = (r2t.task_tag, r2t.transfer_tag);
            let out = DataOut { task_tag, transfer_tag, data_sn, offset, ..DataOut::default() };
            link.send(out.header(), &vec![1; PIECE_BYTES.min(end - offset) as usize]).await;
        }
    }
}

/// Says half of a login.
async fn never_logs_in(portal: SocketAddr) -> Link {
    let mut link = Link::connect(portal).await;
    let request = LoginRequest { flags: stage::CONTINUE, ..LoginRequest::default() };
    link.push(&sealed(request.header().immediate(), b"InitiatorName=iqn.a\0"));
    link
}

/// Ways in which initiators mean harm here.
const HOSTILE_KINDS: u16 = 5;

/// Memory of this process: the only test of this file has it to itself.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_honest_session_goes_on_whatever_all_others_do() {
    let disk = MemoryDisk::new(DISK_BYTES, Pace::Now);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&disk)])]).await;
    let [portal, other] = serving.portals;
    let mut honest = Link::session(portal, 0).await;
    honest.write_and_read(1).await;

    let mut hostile = Vec::new();
    for n in 1..CONNECTIONS_MAX as u16 {
        hostile.push(match n % HOSTILE_KINDS {
            0 => never_logs_in(portal).await,
            1 => never_reads(portal, n).await,
            2 => never_reads_pings(other, n).await,
            3 => never_sends(other, n).await,
            _ => never_finishes(portal, n).await,
        });
        if n % 64 == 0 {
            honest.write_and_read(2).await;
        }
    }
    // One more is not served, through whatever portal.
    for portal in serving.portals {
        assert!(Link::connect(portal).await.receive().await.is_none());
    }
    honest.write_and_read(3).await;
    let sessions = serving.server.sessions(&NAME.parse().unwrap());
    let without = (CONNECTIONS_MAX - 1) / usize::from(HOSTILE_KINDS);
    assert_eq!(sessions.len(), CONNECTIONS_MAX - without, "all others have logged in");

    let resident = resident_bytes();
    assert!(resident <= SERVER_BYTES_MAX, "{resident} bytes are resident, with the disk and all initiators");

    // What is too long, or comes when it must not, ends its own connection and makes room for others.
    let mut huge = Header([0; HEADER_BYTES]);
    huge.set_data_bytes((1 << 24) - 1);
    for link in &mut hostile {
        link.push(&huge.0);
    }
    for link in hostile {
        drop(link);
    }
    honest.write_and_read(4).await;
    tokio::time::timeout(TIME_MAX, async {
        while serving.server.sessions(&NAME.parse().unwrap()).len() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the others are gone");
    let mut late = Link::session(portal, 999).await;
    late.write_and_read(5).await;
    honest.write_and_read(6).await;
}
