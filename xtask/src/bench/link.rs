//! Chunks over a link on loopback, against the same bytes over a bare connection with the same TLS.
//!
//! Both ends run in this process, one connection each: TCP with `TCP_NODELAY`, TLS 1.3 by rustls with
//! aws-lc-rs, chunks of 64 KiB of random bytes from memory. The bare peer sends them one behind the other
//! without being asked. A link's child asks for each by its hash and verifies it, so the fair peer is the
//! one that hashes what it receives; the other shows what the hashing costs.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use block::limits::CHUNK_BYTES;
use block::{
    BoxFuture, Chunk, ChunkHash, ChunkSource, FetchError, ImageId, NodeName, Priority, SlotHint, TryIo,
};
use bytes::Bytes;
use link::{Dial, FetchSettings, Fetcher, ParentAddr, ScopedStats, Sources, Stats, Stream, Uplinks};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::process::cpu_seconds;
use super::report::{Better, Rounds, Sample, Table};
use super::{Bench, Outcome};

/// Different chunks in memory: 128 MiB, more than a processor's cache holds.
const CHUNKS: usize = 2048;

/// How often all of them are sent in one measurement: 2 GiB.
const PASSES: usize = 16;

/// Chunks that are asked for at a time: what a link keeps on the wire for those who do not wait for one.
const FETCHES: usize = 64;

pub(super) fn run(bench: &Bench) -> Outcome<Table> {
    bench.note("link: 2 GiB of chunks over one TLS connection");
    let runtime = Runtime::new().map_err(|e| format!("cannot start a runtime: {e}"))?;
    let ends = Arc::new(Ends::new()?);
    let link = || measure(&runtime, over_link(Arc::clone(&ends)));
    let bare = |received| measure(&runtime, over_tls(Arc::clone(&ends), received));
    let verified = Rounds::take(bench.rounds, link, || bare(Received::Hashed))?;
    let unverified = Rounds::take(bench.rounds, link, || bare(Received::Dropped))?;
    let hashing = Rounds::take(bench.rounds, || bare(Received::Hashed), || bare(Received::Dropped))?;
    Ok(Table {
        title: "Chunks over a link on loopback",
        notes: vec!["one connection, TLS 1.3; CPU of both ends together, with the kernel's part".to_owned()],
        cost_unit: "ms/GiB",
        rows: vec![
            verified.row("link / bare TLS and BLAKE3 of each chunk", "GiB/s", Better::More),
            unverified.row("link / bare TLS", "GiB/s", Better::More),
            hashing.row("bare TLS and BLAKE3 / bare TLS", "GiB/s", Better::More),
        ],
    })
}

/// What the bare receiver does with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Received {
    Hashed,
    Dropped,
}

fn measure(runtime: &Runtime, transfer: impl Future<Output = io::Result<()>>) -> Outcome<Sample> {
    let cpu_before = cpu_seconds("self")?;
    let begin = Instant::now();
    runtime.block_on(transfer).map_err(|e| format!("a transfer broke: {e}"))?;
    let gib = (CHUNKS * PASSES * CHUNK_BYTES) as f64 / f64::from(1 << 30);
    let cost = (cpu_seconds("self")? - cpu_before) * 1e3 / gib;
    Ok(Sample { value: gib / begin.elapsed().as_secs_f64(), cost: Some(cost) })
}

/// The chunks, and what both ends need for TLS.
struct Ends {
    chunks: Memory,
    order: Vec<ChunkHash>,
    image: ImageId,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl Ends {
    fn new() -> Outcome<Ends> {
        let tls = |e: rustls::Error| format!("TLS cannot be set up: {e}");
        let made = rcgen::generate_simple_self_signed(["parent".to_owned()]);
        let made = made.map_err(|e| format!("cannot make a certificate: {e}"))?;
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(str::to_owned)?;
        let certificate = made.cert.der().clone();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone()).map_err(tls)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = &[&rustls::version::TLS13];
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .and_then(|config| config.with_no_client_auth().with_single_cert(vec![certificate], key));
        let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions);
        let client = client.map_err(tls)?.with_root_certificates(roots).with_no_client_auth();

        let mut random = SmallRng::seed_from_u64(1);
        let chunks: Vec<Chunk> = (0..CHUNKS)
            .map(|_| {
                let mut bytes = vec![0; CHUNK_BYTES];
                random.fill_bytes(&mut bytes);
                Chunk::of(Bytes::from(bytes))
            })
            .collect();
        Ok(Ends {
            order: chunks.iter().map(Chunk::hash).collect(),
            chunks: Memory(Arc::new(chunks.into_iter().map(|chunk| (chunk.hash(), chunk)).collect())),
            image: ImageId::from_bytes([1; 32]),
            acceptor: TlsAcceptor::from(Arc::new(server.map_err(tls)?)),
            connector: TlsConnector::from(Arc::new(client)),
        })
    }

    /// Every chunk that one measurement moves, in order.
    fn hashes(&self) -> impl Iterator<Item = ChunkHash> + '_ {
        std::iter::repeat_n(&self.order, PASSES).flatten().copied()
    }

    async fn listen() -> io::Result<(TcpListener, SocketAddr)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    }

    async fn accept(&self, listener: &TcpListener) -> io::Result<server::TlsStream<TcpStream>> {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        self.acceptor.accept(stream).await
    }

    async fn connect(&self, address: &str) -> io::Result<client::TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let name = ServerName::try_from("parent").map_err(io::Error::other)?;
        self.connector.connect(name, stream).await
    }
}

/// Chunks in memory: a cache in which everything is at hand.
#[derive(Clone)]
struct Memory(Arc<HashMap<ChunkHash, Chunk>>);

impl ChunkSource for Memory {
    fn fetch(&self, chunk: ChunkHash, _: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        let found = self.0.get(&chunk).cloned();
        Box::pin(std::future::ready(found.ok_or(FetchError::NotHere(chunk))))
    }

    fn try_read(&self, chunk: &ChunkHash, _: &SlotHint, offset: usize, buf: &mut [u8]) -> TryIo {
        let Some(chunk) = self.0.get(chunk) else { return TryIo::WouldBlock };
        buf.copy_from_slice(&chunk.bytes()[offset..offset + buf.len()]);
        TryIo::Done
    }
}

impl Sources for Memory {
    fn source<'a>(&'a self, _: &'a ImageId) -> BoxFuture<'a, Option<Arc<dyn ChunkSource>>> {
        Box::pin(std::future::ready(Some(Arc::new(self.clone()) as _)))
    }
}

/// The child's way to its parent.
struct Dialer(Arc<Ends>);

impl Dial for Dialer {
    fn dial<'a>(&'a self, parent: &'a ParentAddr) -> BoxFuture<'a, io::Result<Box<dyn Stream>>> {
        Box::pin(async move { Ok(Box::new(self.0.connect(&parent.address).await?) as Box<dyn Stream>) })
    }
}

fn name(text: &str) -> NodeName {
    text.parse().expect("a plain word is a node's name")
}

/// Moves all chunks from a parent to a child.
async fn over_link(ends: Arc<Ends>) -> io::Result<()> {
    let (listener, address) = Ends::listen().await?;
    let mut tasks = JoinSet::new();
    let parent = Arc::clone(&ends);
    tasks.spawn(async move {
        let stream = parent.accept(&listener).await?;
        let sources = Arc::new(parent.chunks.clone());
        // The child ends the link by going away, which is not a failure of the transfer.
        let _ = link::serve(stream, &name("parent"), name("child"), sources, ScopedStats::default()).await;
        Ok(())
    });
    let dial = Arc::new(Dialer(Arc::clone(&ends)));
    let (uplinks, _reports) =
        Uplinks::new(name("child"), dial, Arc::<Stats>::default(), FetchSettings::default());
    let fetcher = Arc::new(Fetcher::new(ends.image, uplinks));
    fetcher.set_parents(&[vec![ParentAddr { node: name("parent"), address: address.to_string() }]]);

    let mut fetches = JoinSet::new();
    for hash in ends.hashes() {
        if fetches.len() == FETCHES
            && let Some(fetched) = fetches.join_next().await
        {
            arrived(fetched)?;
        }
        let fetcher = Arc::clone(&fetcher);
        fetches.spawn(async move { fetcher.fetch(hash, Priority::Guest).await.map(drop) });
    }
    while let Some(fetched) = fetches.join_next().await {
        arrived(fetched)?;
    }
    drop(fetcher);
    finish(tasks).await
}

fn arrived(fetched: Result<Result<(), FetchError>, tokio::task::JoinError>) -> io::Result<()> {
    fetched.map_err(io::Error::other)?.map_err(io::Error::other)
}

async fn finish(mut tasks: JoinSet<io::Result<()>>) -> io::Result<()> {
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(io::Error::other)??;
    }
    Ok(())
}

/// Moves all chunks over a bare connection.
async fn over_tls(ends: Arc<Ends>, received: Received) -> io::Result<()> {
    let (listener, address) = Ends::listen().await?;
    let mut tasks = JoinSet::new();
    let sender = Arc::clone(&ends);
    tasks.spawn(async move {
        let mut stream = sender.accept(&listener).await?;
        for hash in sender.hashes() {
            stream.write_all(sender.chunks.0[&hash].bytes()).await?;
        }
        stream.shutdown().await
    });
    let receiver = Arc::clone(&ends);
    tasks.spawn(async move {
        let mut stream = receiver.connect(&address.to_string()).await?;
        let mut chunk = vec![0; CHUNK_BYTES];
        for hash in receiver.hashes() {
            stream.read_exact(&mut chunk).await?;
            if received == Received::Hashed && ChunkHash::of(&chunk) != hash {
                return Err(io::Error::other("another chunk came than was sent"));
            }
        }
        Ok(())
    });
    finish(tasks).await
}
