//! The target byte by byte: what a session looks like on the wire, and what a hostile initiator gets.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use common::{Serving, target};
use iscsi::pdu::{
    self, Async, DataIn, DataOut, Digests, Frame, HEADER_BYTES, Header, Isid, LoginRequest, LoginResponse,
    LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, R2t, Reject, ScsiCommand, ScsiResponse,
    TaskRequest, TaskResponse, TextRequest, TextResponse, command, function, login_status, stage,
    task_response,
};
use iscsi::{Authentication, Portal, Server, ServerOptions};
use testkit::memory_disk::{MemoryDisk, Pace};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

const NAME: &str = "iqn.2026-01.test:disk";

/// An initiator that sends what it is told to.
struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    cmd_sn: u32,
    tag: u32,
}

impl Wire {
    async fn connect(serving: &Serving) -> Wire {
        Wire::connect_to(serving.portals[0]).await
    }

    async fn connect_to(portal: SocketAddr) -> Wire {
        let stream = TcpStream::connect(portal).await.unwrap();
        Wire { stream, input: Vec::new(), cmd_sn: 1, tag: 0 }
    }

    /// A session of the initiator `n`, with these keys besides the names, that was told of its unit.
    async fn session(serving: &Serving, n: u8, keys: &str) -> Wire {
        let mut wire = Wire::connect(serving).await;
        let text = format!("InitiatorName=iqn.2026-01.test:{n}\0TargetName={NAME}\0{keys}");
        let response = wire.log_in(n, &text).await;
        assert_eq!(response.status, login_status::SUCCESS);
        let attention = wire.command(&[0; 6], 0, 0).await;
        let response = wire.response(attention).await;
        assert_eq!((response.1[2] & 0xf, response.1[12]), (6, 0x29), "the first command is told of a reset");
        wire
    }

    async fn log_in(&mut self, n: u8, text: &str) -> LoginResponse {
        let flags = stage::TRANSIT | stage::OPERATIONAL << 2 | stage::FULL_FEATURE;
        let request = LoginRequest { flags, isid: Isid([n; 6]), cmd_sn: 1, ..LoginRequest::default() };
        self.send(request.header().immediate(), text.as_bytes()).await;
        LoginResponse::parse(&self.receive().await.unwrap().0)
    }

    async fn send(&mut self, header: Header, data: &[u8]) {
        let seal = pdu::seal(header, data, Digests::default());
        self.stream.write_all(&[seal.head(), data, seal.tail()].concat()).await.unwrap();
    }

    /// The next PDU; `None` if the target closed the connection.
    async fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        loop {
            let found = pdu::frame(&self.input, Digests::default(), 1 << 20).unwrap();
            if let Some(Frame { header, data, bytes, .. }) = found {
                let data = data.to_vec();
                self.input.drain(..bytes);
                return Some((header, data));
            }
            if self.stream.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    fn next_tag(&mut self) -> u32 {
        self.tag += 1;
        self.tag
    }

    /// Sends a command; its tag.
    async fn command(&mut self, cdb: &[u8], flags: u8, expected_bytes: u32) -> u32 {
        self.command_with(cdb, flags, expected_bytes, &[]).await
    }

    async fn command_with(&mut self, cdb: &[u8], flags: u8, expected_bytes: u32, data: &[u8]) -> u32 {
        let mut whole = [0; 16];
        whole[..cdb.len()].copy_from_slice(cdb);
        let (task_tag, cmd_sn) = (self.next_tag(), self.cmd_sn);
        self.cmd_sn += 1;
        let flags = flags | pdu::FINAL;
        let pdu =
            ScsiCommand { flags, task_tag, expected_bytes, cmd_sn, cdb: whole, ..ScsiCommand::default() };
        self.send(pdu.header(), data).await;
        task_tag
    }

    /// The response to a command, and its sense data.
    async fn response(&mut self, task_tag: u32) -> (ScsiResponse, Vec<u8>) {
        let (header, data) = self.receive().await.unwrap();
        assert_eq!((header.opcode(), header.task_tag()), (ScsiResponse::OPCODE, task_tag));
        (ScsiResponse::parse(&header), data.get(2..).unwrap_or_default().to_vec())
    }
}

async fn serve(disk: Arc<MemoryDisk>) -> Serving {
    Serving::start(vec![target(NAME, &[disk])]).await
}

fn read_10(block: u8, blocks: u8) -> [u8; 10] {
    [0x28, 0, 0, 0, 0, block, 0, 0, blocks, 0]
}

fn write_10(block: u8, blocks: u8) -> [u8; 10] {
    [0x2a, 0, 0, 0, 0, block, 0, 0, blocks, 0]
}

#[tokio::test]
async fn a_short_read_is_one_pdu_with_data_and_status() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    disk.bytes.lock().unwrap()[512..1024].fill(9);
    let serving = serve(disk).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    let tag = wire.command(&read_10(1, 1), command::READ, 512).await;
    let (header, data) = wire.receive().await.unwrap();
    assert_eq!(data, [9; 512]);
    let mut golden = [0; HEADER_BYTES];
    golden[..8].copy_from_slice(&[0x25, 0x81, 0, 0, 0, 0, 2, 0]);
    golden[16..20].copy_from_slice(&tag.to_be_bytes());
    golden[20..24].fill(0xff);
    // Login response, unit attention, this.
    golden[24..28].copy_from_slice(&2u32.to_be_bytes());
    golden[28..32].copy_from_slice(&3u32.to_be_bytes());
    golden[32..36].copy_from_slice(&130u32.to_be_bytes());
    assert_eq!(header.0, golden);
}

#[tokio::test]
async fn a_long_write_is_asked_for_burst_by_burst_and_read_back_in_segments() {
    for pace in [Pace::Now, Pace::Later] {
        let disk = MemoryDisk::new(1 << 20, pace);
        let serving = serve(Arc::clone(&disk)).await;
        let keys = "MaxBurstLength=1024\0MaxOutstandingR2T=2\0MaxRecvDataSegmentLength=512\0";
        let mut wire = Wire::session(&serving, 1, keys).await;
        let tag = wire.command(&write_10(0, 5), command::WRITE, 2560).await;
        let bytes: Vec<u8> = (0..2560u32).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        for (at, len) in [(0, 1024), (1024, 1024), (2048, 512)] {
            let r2t = R2t::parse(&wire.receive().await.unwrap().0);
            assert_eq!((r2t.task_tag, r2t.offset, r2t.wanted_bytes), (tag, at, len));
            for (data_sn, at) in (at..at + len).step_by(512).enumerate() {
                let last = at + 512 == r2t.offset + len;
                let flags = if last { pdu::FINAL } else { 0 };
                let (transfer_tag, data_sn) = (r2t.transfer_tag, data_sn as u32);
                let out =
                    DataOut { flags, task_tag: tag, transfer_tag, data_sn, offset: at, ..DataOut::default() };
                // The second burst was asked for before the first came; the third is asked for after it.
                wire.send(out.header(), &bytes[at as usize..][..512]).await;
            }
        }
        assert_eq!(wire.response(tag).await.0.status, 0);
        assert_eq!(disk.bytes.lock().unwrap()[..2560], bytes);
        let tag = wire.command(&read_10(0, 5), command::READ, 2560).await;
        for n in 0..5u32 {
            let (header, data) = wire.receive().await.unwrap();
            let part = DataIn::parse(&header);
            assert_eq!((part.task_tag, part.data_sn, part.offset), (tag, n, n * 512));
            // Each burst of 1024 bytes ends with the final bit; the status comes with the last.
            assert_eq!(part.flags, [0, 0x80, 0, 0x80, 0x81][n as usize]);
            assert_eq!(data, bytes[n as usize * 512..][..512]);
        }
    }
}

#[tokio::test]
async fn commands_outside_of_the_window_are_dropped_without_a_word() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    let next = wire.cmd_sn;
    for wrong in [next - 1, next + 1, next + 1000] {
        wire.cmd_sn = wrong;
        wire.command(&[0; 6], 0, 0).await;
    }
    wire.cmd_sn = next;
    let tag = wire.command(&[0; 6], 0, 0).await;
    assert_eq!(wire.response(tag).await.0.exp_cmd_sn, next + 1);
}

#[tokio::test]
async fn a_command_that_waits_holds_up_nobody_and_can_be_aborted() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    disk.gated_offset.store(0, std::sync::atomic::Ordering::SeqCst);
    let serving = serve(Arc::clone(&disk)).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    let waiting = wire.command(&read_10(0, 1), command::READ, 512).await;
    let other = wire.command(&read_10(1, 1), command::READ, 512).await;
    assert_eq!(wire.receive().await.unwrap().0.task_tag(), other);
    let request = TaskRequest {
        function: pdu::FINAL | function::ABORT_TASK,
        task_tag: 77,
        referenced_task_tag: waiting,
        ..TaskRequest::default()
    };
    wire.send(request.header().immediate(), &[]).await;
    let response = TaskResponse::parse(&wire.receive().await.unwrap().0);
    assert_eq!((response.task_tag, response.response), (77, task_response::COMPLETE));
    disk.gate.add_permits(1);
    wire.send(request.header().immediate(), &[]).await;
    let response = TaskResponse::parse(&wire.receive().await.unwrap().0);
    assert_eq!(response.response, task_response::NO_TASK, "nothing was answered to what was aborted");
}

#[tokio::test]
async fn an_ordered_command_keeps_its_place() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    disk.gated_offset.store(0, std::sync::atomic::Ordering::SeqCst);
    let serving = serve(Arc::clone(&disk)).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    let first = wire.command(&read_10(0, 1), command::READ, 512).await;
    let ordered = wire.command(&read_10(1, 1), command::READ | command::ORDERED, 512).await;
    let last = wire.command(&read_10(2, 1), command::READ, 512).await;
    disk.gate.add_permits(1);
    for tag in [first, ordered, last] {
        assert_eq!(wire.receive().await.unwrap().0.task_tag(), tag);
    }
}

#[tokio::test]
async fn a_second_login_of_the_same_session_ends_the_first() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let mut first = Wire::session(&serving, 1, "").await;
    let mut other = Wire::session(&serving, 2, "").await;
    let mut second = Wire::session(&serving, 1, "").await;
    assert!(first.receive().await.is_none());
    for wire in [&mut other, &mut second] {
        let tag = wire.command(&[0; 6], 0, 0).await;
        assert_eq!(wire.response(tag).await.0.status, 0);
    }
}

#[tokio::test]
async fn a_removed_target_tells_its_initiators_and_is_gone() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    assert!(serving.server.remove(&NAME.parse().unwrap()).await);
    assert_eq!(wire.receive().await.unwrap().0.opcode(), Async::OPCODE);
    assert!(wire.receive().await.is_none());
    let mut late = Wire::connect(&serving).await;
    let text = format!("InitiatorName=iqn.a\0TargetName={NAME}\0");
    assert_eq!(late.log_in(1, &text).await.status, login_status::NOT_FOUND);
}

#[tokio::test]
async fn sessions_are_listed_with_what_they_did() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let listed = || serving.server.sessions(&NAME.parse().unwrap());
    assert_eq!(listed(), []);
    let mut first = Wire::session(&serving, 1, "").await;
    let tag = first.command(&read_10(0, 3), command::READ, 1536).await;
    assert_eq!(first.receive().await.unwrap().0.task_tag(), tag);
    let tag = first.command_with(&write_10(0, 2), command::WRITE, 1024, &[1; 1024]).await;
    assert_eq!(first.response(tag).await.0.status, 0);
    let second = Wire::session(&serving, 2, "").await;
    let sessions = listed();
    let names: Vec<_> = sessions.iter().map(|session| session.initiator.as_str()).collect();
    assert_eq!(names, ["iqn.2026-01.test:1", "iqn.2026-01.test:2"]);
    assert_eq!(sessions[0].address, first.stream.local_addr().unwrap());
    assert_eq!((sessions[0].group, sessions[0].authentication), (1, Authentication::None));
    // The one that was told of the reset counts too.
    let traffic = (sessions[0].commands, sessions[0].read_bytes, sessions[0].written_bytes);
    assert_eq!(traffic, (3, 1536, 1024));
    drop((first, second));
    assert!(serving.server.remove(&NAME.parse().unwrap()).await);
    assert_eq!(listed(), []);
}

#[tokio::test]
async fn portals_at_every_address_are_told_as_they_were_reached() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let everywhere = listener.local_addr().unwrap();
    let other = SocketAddr::new(everywhere.ip(), 1);
    let portal = |address, group| Portal { address, group };
    let portals = vec![portal(everywhere, 1), portal(other, 2), portal("192.0.2.1:3260".parse().unwrap(), 3)];
    let server = Server::new(ServerOptions { portals, ..ServerOptions::default() });
    server.add(target(NAME, &[MemoryDisk::new(1 << 20, Pace::Now)])).unwrap();
    let mut serving = JoinSet::new();
    serving.spawn(async move { server.serve(listener, 1).await });
    let mut wire = Wire::connect_to(SocketAddr::new([127, 0, 0, 1].into(), everywhere.port())).await;
    let response = wire.log_in(1, "InitiatorName=iqn.a\0SessionType=Discovery\0").await;
    assert_eq!(response.status, login_status::SUCCESS);
    let request =
        TextRequest { flags: pdu::FINAL, task_tag: 5, transfer_tag: NO_TAG, ..TextRequest::default() };
    wire.send(request.header().immediate(), b"SendTargets=All\0").await;
    let (header, text) = wire.receive().await.unwrap();
    assert_eq!((header.opcode(), header.task_tag()), (TextResponse::OPCODE, 5));
    let port = everywhere.port();
    let expected = format!(
        "TargetName={NAME}\0TargetAddress=127.0.0.1:{port},1\0TargetAddress=127.0.0.1:1,2\0\
         TargetAddress=192.0.2.1:3260,3\0"
    );
    assert_eq!(String::from_utf8(text).unwrap(), expected);
}

#[tokio::test]
async fn pings_come_back_and_a_logout_ends_the_connection() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    let ping = NopOut { flags: 0x80, task_tag: 9, transfer_tag: NO_TAG, ..NopOut::default() };
    wire.send(ping.header().immediate(), b"hello").await;
    let (header, data) = wire.receive().await.unwrap();
    assert_eq!((NopIn::parse(&header).task_tag, &data[..]), (9, &b"hello"[..]));
    let logout = LogoutRequest { reason: 0x80, task_tag: 10, ..LogoutRequest::default() };
    wire.send(logout.header().immediate(), &[]).await;
    assert_eq!(LogoutResponse::parse(&wire.receive().await.unwrap().0).response, 0);
    assert!(wire.receive().await.is_none());
}

#[tokio::test]
async fn what_is_too_long_or_no_login_ends_only_its_own_connection() {
    let serving = serve(MemoryDisk::new(1 << 20, Pace::Now)).await;
    let mut good = Wire::session(&serving, 1, "").await;
    let mut hostile = Wire::connect(&serving).await;
    hostile.send(NopOut::default().header(), &[]).await;
    assert!(hostile.receive().await.is_none(), "a ping is not a login");
    let mut hostile = Wire::connect(&serving).await;
    let mut huge = LoginRequest::default().header();
    huge.set_data_bytes((1 << 24) - 1);
    hostile.stream.write_all(&huge.0).await.unwrap();
    assert!(hostile.receive().await.is_none(), "a login has at most 8 KiB");
    let mut hostile = Wire::session(&serving, 2, "").await;
    let mut huge = NopOut::default().header().immediate();
    huge.set_data_bytes((1 << 24) - 1);
    hostile.stream.write_all(&huge.0).await.unwrap();
    assert!(hostile.receive().await.is_none(), "a segment has at most what we declared");
    let tag = good.command(&[0; 6], 0, 0).await;
    assert_eq!(good.response(tag).await.0.status, 0);
}

#[tokio::test]
async fn a_repeated_tag_and_an_unknown_pdu_are_rejected() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    disk.gated_offset.store(0, std::sync::atomic::Ordering::SeqCst);
    let serving = serve(disk).await;
    let mut wire = Wire::session(&serving, 1, "").await;
    wire.command(&read_10(0, 1), command::READ, 512).await;
    wire.tag -= 1;
    wire.command(&read_10(1, 1), command::READ, 512).await;
    let (header, refused) = wire.receive().await.unwrap();
    assert_eq!((header.opcode(), refused.len()), (Reject::OPCODE, HEADER_BYTES));
    let mut unknown = [0; HEADER_BYTES];
    unknown[0] = 0x1c;
    wire.send(Header(unknown), &[]).await;
    assert_eq!(wire.receive().await.unwrap().0.opcode(), Reject::OPCODE);
}
