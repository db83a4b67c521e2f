//! The client against the server: random operations against a model, waiting reads, errors, lost
//! connections.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use block::{Access, Disk, DiskError, ExtentKind};
use common::server;
use nbd::{BoxStream, Client, ConnectError, Dial, Options, Retry, Server};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use testkit::memory_disk::{BLOCK, MemoryDisk, Pace};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// A server behind pipes in memory, whose connections a test can cut.
struct Piped {
    server: Server,
    pipe_bytes: usize,
    dialled: AtomicU64,
    cut: watch::Sender<u64>,
}

impl Piped {
    fn new(disk: Arc<MemoryDisk>, pipe_bytes: usize) -> Arc<Piped> {
        let cut = watch::Sender::new(0);
        Arc::new(Piped { server: server(disk), pipe_bytes, dialled: AtomicU64::new(0), cut })
    }

    fn dial(self: &Arc<Piped>) -> Dial {
        let piped = Arc::clone(self);
        Arc::new(move || {
            let (near, far) = tokio::io::duplex(piped.pipe_bytes);
            let server = piped.server.clone();
            let mut cut = piped.cut.subscribe();
            piped.dialled.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                tokio::select! {
                    _ = server.serve(far, std::future::pending()) => {}
                    _ = cut.changed() => {}
                }
            });
            Box::pin(async { Ok(Box::new(near) as BoxStream) })
        })
    }

    fn cut_all(&self) {
        self.cut.send_modify(|n| *n += 1);
    }
}

fn seed() -> u64 {
    std::env::var("NBD_TEST_SEED").map_or_else(|_| rand::random(), |s| s.parse().expect("a number"))
}

/// Random operations of one caller: whatever is read is what was written.
async fn churn(client: &Client, disk: &MemoryDisk, seed: u64, operations: usize) {
    eprintln!("NBD_TEST_SEED={seed} repeats this run");
    let mut random = StdRng::seed_from_u64(seed);
    let size = client.size_bytes() as usize;
    let mut model = vec![0u8; size];
    for step in 0..operations {
        let long = random.random_ratio(1, 8);
        let len = random.random_range(1..=if long { 300 << 10 } else { 3 * BLOCK });
        let offset = random.random_range(0..=size - len);
        let range = offset..offset + len;
        let at = offset as u64;
        match random.random_range(0..6) {
            0 | 1 => {
                random.fill_bytes(&mut model[range.clone()]);
                client.write(at, &model[range]).await.unwrap();
            }
            2 => {
                model[range].fill(0);
                client.write_zeroes(at, len as u64).await.unwrap();
            }
            3 => {
                random.fill_bytes(&mut model[range.clone()]);
                let before = disk.flushes();
                client.write_durably(at, &model[range]).await.unwrap();
                assert!(disk.flushes() > before, "step {step} did not flush");
            }
            4 => {
                let mut at = offset;
                for extent in client.extents(at as u64, len as u64).await.unwrap() {
                    let end = at + extent.len as usize;
                    assert!(extent.len > 0 && end <= offset + len, "step {step}: an extent leaves the range");
                    if extent.kind == ExtentKind::Hole {
                        assert!(model[at..end].iter().all(|&b| b == 0), "step {step}: data told as a hole");
                    }
                    at = end;
                }
                assert!(at > offset, "step {step}: no extent");
            }
            _ => {
                let mut got = vec![0xaa; len];
                client.read(at, &mut got).await.unwrap();
                assert!(got == model[range], "step {step}: wrong bytes at {offset}+{len}");
            }
        }
    }
    assert!(*disk.bytes.lock().unwrap() == model, "the disk differs from the model");
}

#[tokio::test]
async fn what_is_read_is_what_was_written_whatever_the_pace_and_fragmentation() {
    for pace in [Pace::Now, Pace::Later] {
        // A pipe of 7 bytes cuts every message into pieces.
        for (pipe_bytes, operations) in [(7, 40), (64 << 10, 300)] {
            let disk = MemoryDisk::new(1 << 20, pace);
            let piped = Piped::new(Arc::clone(&disk), pipe_bytes);
            let client = Client::connect(piped.dial(), "disk", Options::default()).await.unwrap();
            churn(&client, &disk, seed(), operations).await;
            client.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_over_several_connections_do_not_mix_up_their_data() {
    let disk = MemoryDisk::new(64 * BLOCK * 16, Pace::Later);
    let piped = Piped::new(Arc::clone(&disk), 32 << 10);
    // However long a server may be silent, no time is out of reach.
    let options = Options { connections: 4, silence_max: Duration::MAX, ..Options::default() };
    let client = Arc::new(Client::connect(piped.dial(), "", options).await.unwrap());
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..64u64 {
        let client = Arc::clone(&client);
        callers.spawn(async move {
            for block in 0..16u64 {
                let at = (caller * 16 + block) * BLOCK as u64;
                let data = vec![(caller * 16 + block) as u8 ^ 0x5a; BLOCK];
                client.write(at, &data).await.unwrap();
                let mut got = vec![0; BLOCK];
                client.read(at, &mut got).await.unwrap();
                assert_eq!(got, data, "block {block} of caller {caller}");
            }
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test]
async fn a_read_that_waits_holds_up_nobody_else_on_its_connection() {
    let disk = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadWrite);
    disk.gated_offset.store(0, Ordering::SeqCst);
    let piped = Piped::new(Arc::clone(&disk), 64 << 10);
    let client = Client::connect(piped.dial(), "disk", Options::default()).await.unwrap();
    let (mut held, mut other) = (vec![0; BLOCK], vec![0; BLOCK]);
    let mut waiting = client.read(0, &mut held);
    for block in 1..100u64 {
        // The first poll sends the gated read ahead of all others.
        assert!(futures_util::poll!(&mut waiting).is_pending());
        client.read(block * BLOCK as u64, &mut other).await.unwrap();
        client.write(block * BLOCK as u64, &other).await.unwrap();
        client.flush().await.unwrap();
    }
    disk.gate.add_permits(1);
    waiting.await.unwrap();
    assert_eq!(held, vec![7; BLOCK]);
}

#[tokio::test]
async fn more_waiting_reads_than_are_taken_at_once_all_end_well() {
    let disk = MemoryDisk::with(vec![9; 1 << 20], Pace::Now, Access::ReadOnly);
    disk.gated_offset.store(0, Ordering::SeqCst);
    let piped = Piped::new(Arc::clone(&disk), 64 << 10);
    let client = Arc::new(Client::connect(piped.dial(), "disk", Options::default()).await.unwrap());
    let count = 2 * nbd::limits::IN_FLIGHT_MAX;
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..count {
        let client = Arc::clone(&client);
        reads.spawn(async move {
            let mut buf = vec![0; 512];
            client.read(0, &mut buf).await.unwrap();
            buf
        });
    }
    disk.gate.add_permits(count);
    while let Some(read) = reads.join_next().await {
        assert_eq!(read.unwrap(), vec![9; 512]);
    }
}

#[tokio::test]
async fn requests_survive_lost_connections() {
    let disk = MemoryDisk::with(vec![3; 1 << 20], Pace::Later, Access::ReadWrite);
    disk.gated_offset.store(0, Ordering::SeqCst);
    let piped = Piped::new(Arc::clone(&disk), 4096);
    let client = Client::connect(piped.dial(), "disk", Options::default()).await.unwrap();
    for round in 1..=3u8 {
        let mut held = vec![0; 200 << 10];
        let data = vec![round; 300 << 10];
        let reading = client.read(0, &mut held);
        let rest = async {
            client.write(512 << 10, &data).await.unwrap();
            piped.cut_all();
            disk.gate.add_permits(1);
            let mut got = vec![0; data.len()];
            client.read(512 << 10, &mut got).await.unwrap();
            assert!(got == data, "round {round}");
            // A permit may have gone down with the connection that was cut.
            disk.gate.add_permits(1);
        };
        let (read, ()) = futures_util::join!(reading, rest);
        read.unwrap();
        assert!(held == vec![3; 200 << 10], "round {round}");
    }
    assert!(piped.dialled.load(Ordering::SeqCst) >= 4, "every cut was followed by a dial");
}

#[tokio::test]
async fn with_a_limit_requests_fail_once_the_server_was_away_for_too_long() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    let piped = Piped::new(disk, 4096);
    let dial = piped.dial();
    let (is_up, up) = watch::channel(true);
    let gated: Dial = Arc::new(move || {
        let connection = dial();
        if *up.borrow() {
            connection
        } else {
            Box::pin(async { Err(std::io::ErrorKind::ConnectionRefused.into()) })
        }
    });
    let options = Options { retry: Retry::For(Duration::from_millis(50)), ..Options::default() };
    let client = Client::connect(gated, "disk", options).await.unwrap();
    is_up.send(false).unwrap();
    piped.cut_all();
    let mut buf = [0; 512];
    // The cut may be noticed only after an answer or two of the old connection.
    let error = loop {
        if let Err(error) = client.read(0, &mut buf).await {
            break error;
        }
    };
    assert!(error.to_string().contains("away"), "{error}");
    is_up.send(true).unwrap();
    // Errors go on until the next dial has succeeded; then all is well again.
    while client.read(0, &mut buf).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_server_that_comes_back_with_another_size_is_not_used() {
    let (small, large) = (MemoryDisk::new(1 << 20, Pace::Now), MemoryDisk::new(2 << 20, Pace::Now));
    let (first, second) = (Piped::new(small, 4096), Piped::new(large, 4096));
    let (dial_first, dial_second) = (first.dial(), second.dial());
    let turn = AtomicU64::new(0);
    let dial: Dial =
        Arc::new(move || if turn.fetch_add(1, Ordering::SeqCst) == 0 { dial_first() } else { dial_second() });
    let options = Options { retry: Retry::For(Duration::ZERO), ..Options::default() };
    let client = Client::connect(dial, "disk", options).await.unwrap();
    first.cut_all();
    // The cut may be noticed only after an answer or two of the old connection.
    let mut buf = [0; 512];
    while client.read(0, &mut buf).await.is_ok() {}
    assert_eq!(client.size_bytes(), 1 << 20);
}

#[tokio::test]
async fn errors_of_the_disk_arrive_as_what_they_are() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    let piped = Piped::new(Arc::clone(&disk), 4096);
    let client = Client::connect(piped.dial(), "disk", Options::default()).await.unwrap();
    let mut buf = vec![0; BLOCK];
    assert!(matches!(client.read(1 << 20, &mut buf).await, Err(DiskError::OutOfRange { .. })));
    assert!(matches!(client.write(u64::MAX, &buf).await, Err(DiskError::OutOfRange { .. })));
    disk.full.store(true, Ordering::SeqCst);
    assert!(matches!(client.write(0, &buf).await, Err(DiskError::NoSpace)));
    assert!(matches!(client.write(0, &vec![1; 100 << 10]).await, Err(DiskError::NoSpace)));
    assert!(matches!(client.write_zeroes(0, 4096).await, Err(DiskError::NoSpace)));
    disk.broken.store(true, Ordering::SeqCst);
    let error = client.read(0, &mut buf).await.unwrap_err();
    assert!(error.to_string().contains("the test broke this disk"), "{error}");
}

#[tokio::test]
async fn a_read_only_disk_refuses_changes() {
    let disk = MemoryDisk::with(vec![1; 1 << 20], Pace::Now, Access::ReadOnly);
    let piped = Piped::new(Arc::clone(&disk), 4096);
    let client = Client::connect(piped.dial(), "disk", Options::default()).await.unwrap();
    assert_eq!(client.access(), Access::ReadOnly);
    assert!(matches!(client.write(0, &[0; 512]).await, Err(DiskError::ReadOnly)));
    assert!(matches!(client.discard(0, 512).await, Err(DiskError::ReadOnly)));
    client.flush().await.unwrap();
    assert!(disk.bytes.lock().unwrap().iter().all(|&b| b == 1));
}

#[tokio::test]
async fn an_unknown_export_is_refused_by_name() {
    let piped = Piped::new(MemoryDisk::new(1 << 20, Pace::Now), 4096);
    match Client::connect(piped.dial(), "nothing", Options::default()).await {
        Err(ConnectError::Handshake(error)) => {
            let text = error.to_string();
            assert!(text.contains("'nothing'") && text.contains("unknown export"), "{text}");
        }
        other => panic!("expected a refusal, got {:?}", other.err()),
    }
}

#[tokio::test]
async fn tls_is_demanded_by_the_server_and_by_the_client() {
    // Stands for TLS: inverts every bit, so that whatever goes around it is noticed.
    let upgrade: nbd::Upgrade =
        Arc::new(|stream| Box::pin(async { Ok(Box::new(Inverted(stream)) as BoxStream) }));
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    let plain = server(Arc::clone(&disk) as Arc<dyn Disk>);
    let secure = plain.clone().with_tls(Arc::clone(&upgrade));
    let with_tls = Options { upgrade: Some(upgrade), ..Options::default() };
    let dial = |server: Server| -> Dial {
        let piped = Arc::new(Piped {
            server,
            pipe_bytes: 4096,
            dialled: AtomicU64::new(0),
            cut: watch::Sender::new(0),
        });
        piped.dial()
    };
    let client = Client::connect(dial(secure.clone()), "disk", with_tls.clone()).await.unwrap();
    churn(&client, &disk, seed(), 50).await;
    let refused = Client::connect(dial(secure), "disk", Options::default()).await.err();
    assert!(refused.is_some_and(|e| e.to_string().contains("TLS is required")));
    let refused = Client::connect(dial(plain), "disk", with_tls).await.err();
    assert!(refused.is_some_and(|e| e.to_string().contains("the server has no TLS")));
}

/// A stream whose bytes are inverted on the wire.
struct Inverted(BoxStream);

impl AsyncRead for Inverted {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = std::pin::Pin::new(&mut self.0).poll_read(cx, buf);
        buf.filled_mut()[before..].iter_mut().for_each(|b| *b = !*b);
        polled
    }
}

impl AsyncWrite for Inverted {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let inverted: Vec<u8> = buf.iter().map(|b| !b).collect();
        std::pin::Pin::new(&mut self.0).poll_write(cx, &inverted)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
