//! Sessions without sockets: what happens between one PDU and the next.

use std::sync::Arc;

use block::{Access, BoxFuture, Disk, DiskError, Extent};
use tokio::sync::Semaphore;

use super::memory_budget::Budget;
use super::registry::{Registry, SessionKey};
use super::session::{Peer, Session};
use super::{Admission, Target};
use crate::login::{Agreed, Authentication};
use crate::params::Parameters;
use crate::pdu::{
    Digests, Frame, Header, Isid, ScsiCommand, ScsiResponse, TaskRequest, TaskResponse, command, frame,
    function,
};
use crate::scsi::{Identity, InitiatorPort, Nexus, TargetPort, Unit};

const NAME: &str = "iqn.2026-01.test:disk";
const SIZE_BYTES: u64 = 1 << 20;
const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// A disk of zeroes whose reads and writes wait for a permit each.
struct SlowDisk(Semaphore);

impl SlowDisk {
    fn wait(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async {
            self.0.acquire().await.expect("the gate is never closed").forget();
            Ok(())
        })
    }
}

impl Disk for SlowDisk {
    fn size_bytes(&self) -> u64 {
        SIZE_BYTES
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read<'a>(&'a self, _: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        buf.fill(0);
        self.wait()
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        self.wait()
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.wait()
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        self.wait()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    fn extents(&self, _: u64, _: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

/// One target with one slow disk, and what its sessions share.
struct Bench {
    registry: Arc<Registry>,
    budget: Arc<Budget>,
    disk: Arc<SlowDisk>,
}

impl Bench {
    fn new() -> Bench {
        let disk = Arc::new(SlowDisk(Semaphore::new(0)));
        let unit = Unit::new(Arc::clone(&disk) as Arc<dyn Disk>, Identity { serial: "slow".to_owned() });
        let registry = Arc::new(Registry::new(Vec::new()));
        let name = NAME.parse().unwrap();
        let target =
            Target { name, alias: String::new(), units: vec![unit.into()], admission: Admission::default() };
        registry.add(target).unwrap();
        Bench { registry, budget: Arc::default(), disk }
    }

    /// The session of initiator `n`, which was told of the reset before it.
    async fn session(&self, n: u8) -> Client {
        let initiator = format!("iqn.2026-01.test:{n}");
        let (address, isid) = ("127.0.0.1:1".parse().unwrap(), Isid([n; 6]));
        let (name, target) = (initiator.parse().unwrap(), NAME.parse().unwrap());
        let key = SessionKey { initiator: name, isid, target, group: 1 };
        let agreed = Agreed {
            initiator: key.initiator.clone(),
            isid,
            target: Some(key.target.clone()),
            cid: 0,
            authentication: Authentication::None,
            parameters: Parameters::default(),
            cmd_sn: 1,
            stat_sn: 1,
        };
        let membership = self.registry.join(key, address, Authentication::None).await.unwrap();
        let target = TargetPort { name: NAME.to_owned(), group: 1, groups: vec![1] };
        let initiator = InitiatorPort { name: initiator, isid };
        let nexus = Nexus { id: membership.nexus, initiator, target: Arc::new(target) };
        membership.attach(&nexus);
        let (registry, budget) = (Arc::clone(&self.registry), Arc::clone(&self.budget));
        let peer = Peer::Target(membership, nexus);
        let mut client =
            Client { session: Session::new(agreed, peer, registry, budget, address, 1), cmd_sn: 1 };
        let told = client.command(1, &[0; 6], 0);
        assert_eq!(client.answer(), Some((ScsiResponse::OPCODE, told)));
        client
    }
}

/// A session, and the initiator's side of it.
struct Client {
    session: Session,
    cmd_sn: u32,
}

impl Client {
    fn take(&mut self, header: Header, data: &[u8]) {
        self.session.take(&Frame { header, additional: &[], data, bytes: 0 });
    }

    fn command(&mut self, task_tag: u32, cdb: &[u8], expected_bytes: u32) -> u32 {
        let mut whole = [0; 16];
        whole[..cdb.len()].copy_from_slice(cdb);
        let flags = crate::pdu::FINAL | if expected_bytes > 0 { command::READ } else { 0 };
        let cmd_sn = self.cmd_sn;
        self.cmd_sn += 1;
        let pdu =
            ScsiCommand { flags, task_tag, expected_bytes, cmd_sn, cdb: whole, ..ScsiCommand::default() };
        self.take(pdu.header(), &[]);
        task_tag
    }

    /// A read that keeps its place among all others.
    fn ordered_read(&mut self, task_tag: u32) {
        let flags = crate::pdu::FINAL | command::READ | command::ORDERED;
        let mut cdb = [0; 16];
        cdb[..READ.len()].copy_from_slice(&READ);
        let cmd_sn = self.cmd_sn;
        self.cmd_sn += 1;
        let pdu = ScsiCommand { flags, task_tag, expected_bytes: 512, cmd_sn, cdb, ..ScsiCommand::default() };
        self.take(pdu.header(), &[]);
    }

    fn reset_unit(&mut self, task_tag: u32) {
        let function = crate::pdu::FINAL | function::LOGICAL_UNIT_RESET;
        self.take(TaskRequest { function, task_tag, ..TaskRequest::default() }.header().immediate(), &[]);
    }

    fn take_mail(&mut self) {
        let mail = self.session.active.as_ref().unwrap().mailbox.take();
        self.session.take_mail(mail);
    }

    /// Waits until one future has ended.
    async fn step(&mut self) {
        let ended = self.session.jobs.join_next_with_id().await.expect("something is under way");
        self.session.ended(ended).unwrap();
    }

    /// The operation code and the tag of the next answer, if there is one.
    fn answer(&mut self) -> Option<(u8, u32)> {
        let bytes: Vec<u8> = self.session.output.slices().iter().flat_map(|slice| slice.to_vec()).collect();
        let pdu = frame(&bytes, Digests::default(), 1 << 20).unwrap()?;
        let answer = (pdu.header.opcode(), pdu.header.task_tag());
        let len = pdu.bytes;
        self.session.output.sent(len);
        Some(answer)
    }
}

#[tokio::test]
async fn what_begins_after_a_reset_is_not_aborted_by_it() {
    let bench = Bench::new();
    let (mut one, mut other) = (bench.session(1).await, bench.session(2).await);
    other.command(10, &READ, 512);
    one.reset_unit(90);
    // The reset is told before anything else, and then commands are taken again, while its mail lies there yet.
    assert_eq!(other.answer(), None);
    other.command(11, &[0; 6], 0);
    assert_eq!(other.answer(), Some((ScsiResponse::OPCODE, 11)));
    other.command(12, &READ, 512);
    one.command(13, &[0; 6], 0);
    assert_eq!(one.answer(), Some((ScsiResponse::OPCODE, 13)));
    one.command(14, &READ, 512);
    for client in [&mut one, &mut other] {
        client.take_mail();
    }
    assert_eq!(
        other.session.tasks.keys().collect::<Vec<_>>(),
        [&12],
        "only what was there before is aborted"
    );
    assert_eq!(one.session.tasks.keys().collect::<Vec<_>>(), [&14]);
    assert_eq!(one.answer(), None, "a reset is answered when what it aborted has ended");
    other.step().await;
    one.step().await;
    assert_eq!(one.answer(), Some((TaskResponse::OPCODE, 90)));
    bench.disk.0.add_permits(2);
    for (client, tag) in [(&mut one, 14), (&mut other, 12)] {
        client.step().await;
        assert_eq!(client.answer(), Some((crate::pdu::DataIn::OPCODE, tag)));
    }
}

#[tokio::test]
async fn two_sessions_that_reset_at_once_do_not_wait_for_each_other() {
    let bench = Bench::new();
    let (mut one, mut other) = (bench.session(1).await, bench.session(2).await);
    one.reset_unit(90);
    other.reset_unit(91);
    for client in [&mut one, &mut other] {
        client.take_mail();
    }
    for (client, tag) in [(&mut one, 90), (&mut other, 91)] {
        client.step().await;
        assert_eq!(client.answer(), Some((TaskResponse::OPCODE, tag)));
    }
}

#[tokio::test]
async fn the_tag_of_a_command_that_was_aborted_in_line_can_be_used_again() {
    let bench = Bench::new();
    let mut one = bench.session(1).await;
    one.ordered_read(10);
    one.ordered_read(11);
    one.ordered_read(12);
    let function = crate::pdu::FINAL | function::ABORT_TASK;
    let request = TaskRequest { function, task_tag: 90, referenced_task_tag: 12, ..TaskRequest::default() };
    one.take(request.header().immediate(), &[]);
    assert_eq!(one.answer(), Some((TaskResponse::OPCODE, 90)));
    one.ordered_read(12);
    assert_eq!(one.session.queue, [11, 12], "it is in line once");
    bench.disk.0.add_permits(3);
    for tag in [10, 11, 12] {
        one.step().await;
        assert_eq!(one.answer(), Some((crate::pdu::DataIn::OPCODE, tag)));
    }
}

#[tokio::test]
async fn a_reset_does_not_wait_for_a_session_that_ends() {
    let bench = Bench::new();
    let (mut one, mut other) = (bench.session(1).await, bench.session(2).await);
    other.command(10, &READ, 512);
    one.reset_unit(90);
    drop(other);
    one.take_mail();
    one.step().await;
    assert_eq!(one.answer(), Some((TaskResponse::OPCODE, 90)));
}
