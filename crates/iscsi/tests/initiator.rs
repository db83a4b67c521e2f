//! The initiator as a disk, over our own target: reading, writing, who is let in, and what happens when the
//! target goes away.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;
mod load;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::{Access, Disk, DiskError, ExtentKind};
use common::{Serving, target};
use iscsi::initiator::{self, Address, ConnectError, Digests, Initiator, Options, Retry, Secrets};
use iscsi::{Admission, Credentials, Portal, Server, ServerOptions, Target};
use load::{load, pattern};
use testkit::memory_disk::{MemoryDisk, Pace};
use testkit::ports::Port;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

const NAME: &str = "iqn.2026-01.test:disk";

/// How long anything may take before a test counts as hanging.
const PATIENCE: Duration = Duration::from_secs(240);

fn address(portal: SocketAddr, name: &str, lun: u16) -> Address {
    format!("iscsi://{portal}/{name}/{lun}").parse().unwrap()
}

async fn connect(portal: SocketAddr) -> Initiator {
    connect_with(portal, Options::default()).await
}

async fn connect_with(portal: SocketAddr, options: Options) -> Initiator {
    Initiator::connect(&address(portal, NAME, 0), Secrets::default(), options).await.unwrap()
}

/// A target that can be stopped and started again on the same address. Whoever dials meanwhile waits.
struct Restartable {
    listener: std::net::TcpListener,
    serving: JoinSet<std::io::Result<()>>,
}

impl Restartable {
    fn start(disk: &Arc<MemoryDisk>) -> Restartable {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut restartable = Restartable { listener, serving: JoinSet::new() };
        restartable.start_again(disk);
        restartable
    }

    fn portal(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    fn start_again(&mut self, disk: &Arc<MemoryDisk>) {
        self.start_with(target(NAME, &[Arc::clone(disk)]));
    }

    fn start_with(&mut self, target: Target) {
        let portals = vec![Portal { address: self.portal(), group: 1 }];
        let server = Server::new(ServerOptions { portals, discovery: Admission::default() });
        server.add(target).unwrap();
        let listener = TcpListener::from_std(self.listener.try_clone().unwrap()).unwrap();
        self.serving.spawn(async move { server.serve(listener, 1).await });
    }

    async fn stop(&mut self) {
        self.serving.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_read_back_with_and_without_digests() {
    for (pace, digests) in [(Pace::Now, Digests::Avoided), (Pace::Later, Digests::Preferred)] {
        let memory = MemoryDisk::new(16 << 20, pace);
        let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
        let disk = connect_with(serving.portals[0], Options { digests, ..Options::default() }).await;
        assert_eq!((disk.size_bytes(), disk.access()), (16 << 20, Access::ReadWrite));
        let data = pattern(1, 5 << 20);
        disk.write(12_288, &data).await.unwrap();
        disk.flush().await.unwrap();
        assert!(memory.flushes() > 0, "a flush reaches the disk");
        let mut read = vec![0; data.len()];
        disk.read(12_288, &mut read).await.unwrap();
        assert!(read == data, "{pace:?} {digests:?}: what comes back is what was written");
        assert!(memory.bytes.lock().unwrap()[12_288..][..data.len()] == data);
        disk.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chap_lets_in_who_knows_the_secret_and_believes_only_a_target_that_knows_its_own() {
    let ours = || Credentials::new("node", b"correct horse").unwrap();
    let theirs = || Credentials::new("disk", b"battery staple").unwrap();
    let mut asking = target(NAME, &[MemoryDisk::new(1 << 20, Pace::Now)]);
    asking.admission = Admission { initiators: None, initiator: Some(ours()), target: Some(theirs()) };
    let serving = Serving::start(vec![asking]).await;
    let log_in = async |initiator: Option<Credentials>, target: Option<Credentials>| {
        let address = address(serving.portals[0], NAME, 0);
        Initiator::connect(&address, Secrets { initiator, target }, Options::default()).await
    };
    assert!(log_in(Some(ours()), None).await.is_ok());
    assert!(log_in(Some(ours()), Some(theirs())).await.is_ok());
    let wrong = Credentials::new("node", b"incorrect horse").unwrap();
    for initiator in [None, Some(wrong), Some(theirs())] {
        let refused = log_in(initiator, None).await;
        assert!(matches!(refused, Err(ConnectError::Credentials)), "{refused:?}");
    }
    for (user, secret) in [("disk", "battery acid 12"), ("ksid", "battery staple")] {
        let doubted = log_in(Some(ours()), Some(Credentials::new(user, secret.as_bytes()).unwrap())).await;
        assert!(matches!(doubted, Err(ConnectError::Unproven)), "{doubted:?}");
    }
    let same = Credentials::new("disk", b"correct horse").unwrap();
    assert!(matches!(log_in(Some(ours()), Some(same)).await, Err(ConnectError::Unusable(_))));
    assert!(matches!(log_in(None, Some(theirs())).await, Err(ConnectError::Unusable(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_cannot_prove_itself_is_not_believed() {
    let mut silent = target(NAME, &[MemoryDisk::new(1 << 20, Pace::Now)]);
    let ours = || Credentials::new("node", b"correct horse").unwrap();
    silent.admission.initiator = Some(ours());
    let open = target("iqn.2026-01.test:open", &[MemoryDisk::new(1 << 20, Pace::Now)]);
    let serving = Serving::start(vec![silent, open]).await;
    for name in [NAME, "iqn.2026-01.test:open"] {
        let target = Some(Credentials::new("disk", b"battery staple").unwrap());
        let secrets = Secrets { initiator: Some(ours()), target };
        let address = address(serving.portals[0], name, 0);
        let opened = Initiator::connect(&address, secrets, Options::default()).await;
        assert!(matches!(opened, Err(ConnectError::Credentials)), "{name}: {opened:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_is_told_apart() {
    let mut hidden = target("iqn.2026-01.test:hidden", &[MemoryDisk::new(1 << 20, Pace::Now)]);
    hidden.admission.initiators = Some(["iqn.2026-01.test:friend".parse().unwrap()].into());
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    let serving = Serving::start(vec![target(NAME, &[disk]), hidden]).await;
    let portal = serving.portals[0];
    let open = async |name: &str, lun: u16, options: Options| {
        Initiator::connect(&address(portal, name, lun), Secrets::default(), options).await
    };
    let stranger = Options::default;
    let friend = Options { name: "iqn.2026-01.test:friend".parse().unwrap(), ..stranger() };
    assert!(open("iqn.2026-01.test:hidden", 0, friend.clone()).await.is_ok());
    let refused = open("iqn.2026-01.test:hidden", 0, stranger()).await;
    assert!(matches!(refused, Err(ConnectError::Forbidden)), "{refused:?}");
    let refused = open("iqn.2026-01.test:none", 0, stranger()).await;
    assert!(matches!(refused, Err(ConnectError::NotFound)), "{refused:?}");
    for lun in [1, 300] {
        let refused = open(NAME, lun, stranger()).await;
        assert!(matches!(refused, Err(ConnectError::NoUnit)), "{refused:?}");
    }
    let nobody = Port::reserve();
    let nobody = address(nobody.address().parse().unwrap(), NAME, 0);
    let refused = Initiator::connect(&nobody, Secrets::default(), stranger()).await;
    assert!(matches!(refused, Err(ConnectError::Io(_))), "{refused:?}");

    let discover = async |options: Options| {
        let (host, port) = (portal.ip().to_string(), portal.port());
        initiator::discover(&host, port, Secrets::default(), options).await.unwrap()
    };
    let seen = discover(stranger()).await;
    assert_eq!((seen.len(), seen[0].target.as_str()), (1, NAME));
    assert_eq!(seen[0].portals, serving.portals.map(|portal| portal.to_string()));
    assert_eq!(discover(Options { digests: Digests::Preferred, ..friend }).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_of_the_disk_keep_their_meaning() {
    let memory = MemoryDisk::new(1 << 20, Pace::Later);
    let read_only = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadOnly);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory), read_only])]).await;
    let disk = connect(serving.portals[0]).await;
    let mut block = [0; 4096];
    let beyond = disk.read((1 << 20) - 4095, &mut block).await;
    assert!(matches!(beyond, Err(DiskError::OutOfRange { size_bytes: 0x10_0000, .. })), "{beyond:?}");
    assert!(matches!(disk.write(u64::MAX, &block).await, Err(DiskError::OutOfRange { .. })));
    memory.full.store(true, Ordering::SeqCst);
    assert!(matches!(disk.write(0, &block).await, Err(DiskError::NoSpace)));
    assert!(matches!(disk.write(5, &block).await, Err(DiskError::NoSpace)));
    memory.broken.store(true, Ordering::SeqCst);
    let Err(DiskError::Io(why)) = disk.read(8192, &mut block).await else { panic!("the disk is broken") };
    assert!(why.contains("unrecovered read error") && why.contains("3/11/00"), "{why}");
    memory.broken.store(false, Ordering::SeqCst);
    memory.full.store(false, Ordering::SeqCst);
    disk.write(0, &block).await.unwrap();

    let address = address(serving.portals[0], NAME, 1);
    let other = Initiator::connect(&address, Secrets::default(), Options::default()).await.unwrap();
    assert_eq!(other.access(), Access::ReadOnly);
    for refused in
        [other.write(0, &block).await, other.write_zeroes(0, 9).await, other.discard(0, 4096).await]
    {
        assert!(matches!(refused, Err(DiskError::ReadOnly)), "{refused:?}");
    }
    other.flush().await.unwrap();
    other.read(1, &mut block).await.unwrap();
    assert_eq!(block, [7; 4096]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holes_are_told_and_clearing_makes_them() {
    let memory = MemoryDisk::with(vec![9; 1 << 20], Pace::Now, Access::ReadWrite);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
    let disk = connect(serving.portals[0]).await;
    disk.write_zeroes(100_000, 300_001).await.unwrap();
    disk.discard(500_001, 100_000).await.unwrap();
    {
        let bytes = memory.bytes.lock().unwrap();
        assert_eq!((bytes[99_999], bytes[400_001]), (9, 9));
        assert!(bytes[100_000..400_001].iter().all(|b| *b == 0));
        assert!(bytes[500_224..599_552].iter().all(|b| *b == 0), "whole blocks are cleared");
        assert_eq!((bytes[500_223], bytes[600_001]), (9, 9));
    }
    let mut at = 90_000;
    let mut holes = Vec::new();
    while at < 700_000 {
        for extent in disk.extents(at, 700_000 - at).await.unwrap() {
            if extent.kind == ExtentKind::Hole {
                holes.push((at, extent.len));
            }
            at += extent.len;
        }
    }
    assert_eq!(at, 700_000);
    assert_eq!(holes, [(102_400, 294_912), (503_808, 94_208)], "holes end where pages do");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_when_the_target_restarts_in_the_middle_of_a_load() {
    for pace in [Pace::Now, Pace::Later] {
        let memory = MemoryDisk::new(8 << 20, pace);
        let mut serving = Restartable::start(&memory);
        let disk = Arc::new(connect(serving.portal()).await);
        let expected = load(&disk, 10, async |rounds_done| {
            if rounds_done % 16 == 0 {
                serving.stop().await;
                serving.start_again(&memory);
            }
        })
        .await;
        assert!(*memory.bytes.lock().unwrap() == expected, "{pace:?}: the disk has what was written last");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_taken_away_and_put_back_loses_nothing() {
    let memory = MemoryDisk::new(2 << 20, Pace::Later);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
    let disk = Arc::new(connect(serving.portals[0]).await);
    let expected = load(&disk, 6, async |rounds_over| {
        if rounds_over % 12 == 0 {
            // It asks for a logout, and then there is no such target for a while.
            assert!(serving.server.remove(&NAME.parse().unwrap()).await);
            let address = address(serving.portals[0], NAME, 0);
            let other = Initiator::connect(&address, Secrets::default(), Options::default()).await;
            assert!(matches!(other, Err(ConnectError::NotFound)));
            serving.server.add(target(NAME, &[Arc::clone(&memory)])).unwrap();
        }
    })
    .await;
    assert!(*memory.bytes.lock().unwrap() == expected);
}

/// Passes bytes on between the initiator and a target. Its first connection can be frozen: it stays open and says
/// nothing more.
struct Proxy {
    portal: SocketAddr,
    dialled: watch::Receiver<u32>,
    freeze: Option<oneshot::Sender<()>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn start(to: SocketAddr) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let portal = listener.local_addr().unwrap();
        let (count, dialled) = watch::channel(0);
        let (freeze, frozen) = oneshot::channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut frozen = Some(frozen);
            let mut connections = JoinSet::new();
            while let Ok((mut from, _)) = listener.accept().await {
                count.send_modify(|count| *count += 1);
                let frozen = frozen.take();
                connections.spawn(async move {
                    let mut onwards = TcpStream::connect(to).await.unwrap();
                    let freezes = async {
                        match frozen {
                            Some(frozen) => frozen.await.unwrap_or(()),
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut from, &mut onwards) => {}
                        () = freezes => std::future::pending().await,
                    }
                });
            }
        });
        Proxy { portal, dialled, freeze: Some(freeze), _tasks: tasks }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_target_is_left_and_logged_in_to_again() {
    let memory = MemoryDisk::new(1 << 20, Pace::Now);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
    let mut proxy = Proxy::start(serving.portals[0]).await;
    let answer_max = 10 * PATIENCE;
    let options = Options { silence_max: Duration::from_millis(200), answer_max, ..Options::default() };
    let disk = connect_with(proxy.portal, options).await;
    disk.write(0, &[1; 4096]).await.unwrap();
    proxy.freeze.take().unwrap().send(()).unwrap();
    let again = tokio::time::timeout(PATIENCE, disk.write(0, &[2; 4096])).await;
    again.expect("it logs in again").unwrap();
    let mut read = [0; 4096];
    disk.read(0, &mut read).await.unwrap();
    assert_eq!(read, [2; 4096]);
    assert!(*proxy.dialled.borrow() >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_never_comes_is_asked_for_on_another_connection() {
    let memory = MemoryDisk::new(1 << 20, Pace::Now);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
    let mut proxy = Proxy::start(serving.portals[0]).await;
    let answer_max = Duration::from_millis(200);
    let options = Options { silence_max: Duration::from_millis(100), answer_max, ..Options::default() };
    let disk = connect_with(proxy.portal, options).await;
    // The target answers pings, but one read stays at the gate until its connection is given up.
    memory.gated_offset.store(4096, Ordering::SeqCst);
    let mut read = [9; 512];
    let opening = async {
        proxy.dialled.wait_for(|count| *count >= 2).await.unwrap();
        memory.gated_offset.store(u64::MAX, Ordering::SeqCst);
    };
    let both = async { tokio::join!(disk.read(4096, &mut read), opening) };
    let (answer, ()) = tokio::time::timeout(PATIENCE, both).await.expect("it logs in again");
    answer.unwrap();
    assert_eq!(read, [0; 512]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_limit_operations_fail_while_the_target_is_away_and_work_when_it_is_back() {
    let memory = MemoryDisk::new(1 << 20, Pace::Now);
    let mut serving = Restartable::start(&memory);
    let retry = Retry::For(Duration::from_millis(100));
    let disk = connect_with(serving.portal(), Options { retry, ..Options::default() }).await;
    serving.stop().await;
    let Err(DiskError::Io(why)) = disk.write(0, &[1; 512]).await else { panic!("nobody is there") };
    assert!(why.contains("away for more than 100ms"), "{why}");
    serving.start_again(&memory);
    // The first success says that it is back; until then each operation fails at once.
    while disk.write(0, &[2; 512]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(memory.bytes.lock().unwrap()[0], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unit_that_comes_back_with_another_size_is_not_used() {
    let memory = MemoryDisk::new(1 << 20, Pace::Now);
    let mut serving = Restartable::start(&memory);
    let disk = connect(serving.portal()).await;
    disk.write(0, &[1; 512]).await.unwrap();
    serving.stop().await;
    let larger = MemoryDisk::new(2 << 20, Pace::Now);
    serving.start_again(&larger);
    for _ in 0..2 {
        let Err(DiskError::Io(why)) = disk.write(0, &[2; 512]).await else { panic!("it is another disk") };
        assert!(why.contains("1048576") && why.contains("2097152"), "{why}");
    }
    assert_eq!(larger.bytes.lock().unwrap()[0], 0, "nothing was written to it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_unit_of_the_same_size_is_not_written_to_and_the_right_one_is_waited_for() {
    let (memory, other) = (MemoryDisk::new(1 << 20, Pace::Now), MemoryDisk::new(1 << 20, Pace::Now));
    let mut serving = Restartable::start(&memory);
    let retry = Retry::For(Duration::from_millis(300));
    let disk = connect_with(serving.portal(), Options { retry, ..Options::default() }).await;
    serving.stop().await;
    // The serial number of a unit is made of the name of its first target here.
    let units = target("iqn.2026-01.test:other", &[Arc::clone(&other)]).units;
    serving.start_with(Target { units, ..target(NAME, &[]) });
    let refused = disk.write(0, &[1; 512]).await;
    assert!(matches!(refused, Err(DiskError::Io(_))), "{refused:?}");
    assert_eq!(other.bytes.lock().unwrap()[0], 0, "nothing was written to the other");
    serving.stop().await;
    serving.start_again(&memory);
    while disk.write(0, &[2; 512]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(memory.bytes.lock().unwrap()[0], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_has_moved_is_followed_but_not_in_circles() {
    use iscsi::pdu::{self, LoginResponse};
    let memory = MemoryDisk::with(vec![5; 1 << 20], Pace::Now, Access::ReadOnly);
    let serving = Serving::start(vec![target(NAME, &[memory])]).await;
    let signpost = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let portal = signpost.local_addr().unwrap();
    let mut posts = JoinSet::new();
    let there = serving.portals[0];
    posts.spawn(async move {
        for turn in 0..9 {
            let (mut stream, _) = signpost.accept().await.unwrap();
            let to = if turn == 0 { there } else { portal };
            let text = format!("TargetAddress={to},1\0");
            let moved = LoginResponse { status: 0x0101, ..LoginResponse::default() };
            let seal = pdu::seal(moved.header(), text.as_bytes(), pdu::Digests::default());
            stream.write_all(&[seal.head(), text.as_bytes(), seal.tail()].concat()).await.unwrap();
        }
    });
    let disk = connect(portal).await;
    let mut read = [0; 512];
    disk.read(0, &mut read).await.unwrap();
    assert_eq!(read, [5; 512]);
    let circles = Initiator::connect(&address(portal, NAME, 0), Secrets::default(), Options::default()).await;
    assert!(
        matches!(&circles, Err(ConnectError::Protocol(why)) if why.contains("redirected")),
        "{circles:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_in_one_block_do_not_undo_each_other() {
    let memory = MemoryDisk::new(1 << 20, Pace::Later);
    let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
    let disk = Arc::new(connect(serving.portals[0]).await);
    let mut writers = JoinSet::new();
    for writer in 0..64u64 {
        let disk = Arc::clone(&disk);
        writers.spawn(async move {
            for round in 0..8 {
                disk.write(100 + writer * 7, &[writer as u8 + round; 7]).await.unwrap();
            }
        });
    }
    writers.join_all().await;
    let bytes = memory.bytes.lock().unwrap();
    for writer in 0..64 {
        assert_eq!(bytes[100 + writer * 7..][..7], [writer as u8 + 7; 7], "writer {writer}");
    }
}
