//! The server and the client against the tools of other people. A tool that is not installed fails its
//! test with the name of the Debian package.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;
mod tls;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use block::{Access, Disk, ExtentKind};
use common::{Listening, Serving, server};
use nbd::{Client, NbdUri, Options};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use tempfile::TempDir;
use testkit::foreign::{TOOL_TIME_MAX, both, find, finish};
use testkit::memory_disk::{BLOCK, MemoryDisk, Pace};
use testkit::ports::Port;

/// Runs a tool to its end; what it printed, if it succeeded.
async fn run(name: &str, package: &str, args: &[&str]) -> String {
    let output = finish(tokio::process::Command::new(find(package, name)).args(args)).await;
    assert!(output.status.success(), "{name} {args:?}: {}\n{}", output.status, both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

async fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(uri);
    let printed = run("qemu-io", "qemu-utils", &args).await;
    assert!(!printed.contains("failed"), "{commands:?}: {printed}");
    printed
}

/// A server of somebody else, killed at the end of the test.
struct Foreign {
    process: Child,
    socket: PathBuf,
}

impl Foreign {
    fn qemu_nbd(dir: &TempDir, image: &Path) -> Foreign {
        let socket = dir.path().join("qemu.sock");
        let path = image.to_str().unwrap();
        let args = ["-f", "raw", "-t", "-e", "8", "-x", "disk", "--discard=unmap", "-k"];
        let mut command = Command::new(find("qemu-utils", "qemu-nbd"));
        command.args(args).arg(&socket).arg(path);
        Foreign::start(command, socket)
    }

    fn nbdkit(dir: &TempDir, args: &[&str]) -> Foreign {
        let socket = dir.path().join("nbdkit.sock");
        let mut command = Command::new(find("nbdkit", "nbdkit"));
        command.args(["-f", "-U"]).arg(&socket).args(args);
        Foreign::start(command, socket)
    }

    fn start(mut command: Command, socket: PathBuf) -> Foreign {
        let _ = std::fs::remove_file(&socket);
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        Foreign { process, socket }
    }

    fn uri(&self, export: &str) -> NbdUri {
        format!("nbd+unix:///{export}?socket={}", self.socket.display()).parse().unwrap()
    }

    /// Connects as soon as the server listens.
    async fn connect(&mut self, export: &str, options: &Options) -> Client {
        let connected = async {
            loop {
                match Client::connect_uri(&self.uri(export), options.clone()).await {
                    Ok(client) => return client,
                    Err(nbd::ConnectError::Io(_)) => {
                        let ended = self.process.try_wait().unwrap();
                        assert!(ended.is_none(), "the server ended: {ended:?}");
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        };
        tokio::time::timeout(TOOL_TIME_MAX, connected).await.expect("the server listens in time")
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Random data with a hole in the middle.
fn sample(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut random = StdRng::seed_from_u64(7);
    random.fill_bytes(&mut bytes[..len / 3]);
    random.fill_bytes(&mut bytes[len / 3 * 2..]);
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_io_reads_what_it_wrote_and_the_disk_holds_it() {
    for pace in [Pace::Now, Pace::Later] {
        let dir = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(64 << 20, pace);
        let listening = Listening::start(server(Arc::clone(&disk) as Arc<dyn Disk>), dir.path());
        let commands = [
            "write -P 1 0 64k",
            "write -P 2 1000 3000",
            "write -P 3 4M 32M",
            "write -f -P 4 512 512",
            "write -z 8M 1M",
            "write -z -u 10M 1M",
            "discard 16M 4M",
            "aio_write -P 5 40M 1M",
            "aio_write -P 6 41M 1M",
            "aio_flush",
            "flush",
            "read -P 1 4000 60k",
            "read -P 4 512 488",
            "read -P 2 1024 2976",
            "read -P 3 4M 4M",
            "read -P 0 8M 1M",
            "read -P 0 10M 1M",
            "read -P 0 16M 4M",
            "read -P 3 20M 16M",
            "read -P 5 40M 1M",
            "read -P 6 41M 1M",
        ];
        qemu_io(&listening.uri(), &commands).await;
        assert!(disk.flushes() >= 2, "FUA and the flush reached the disk");
        let bytes = disk.bytes.lock().unwrap();
        let holds = |from: usize, to: usize, byte: u8| bytes[from..to].iter().all(|&b| b == byte);
        assert!(holds(1024, 4000, 2) && holds(4 << 20, 8 << 20, 3) && holds(41 << 20, 42 << 20, 6));
        assert!(holds(8 << 20, 9 << 20, 0) && holds(42 << 20, 64 << 20, 0), "{pace:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_img_copies_in_and_out_maps_and_compares() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample(24 << 20);
    let (source, copy) = (dir.path().join("source.raw"), dir.path().join("copy.raw"));
    std::fs::write(&source, &bytes).unwrap();
    let (source, copy) = (source.to_str().unwrap(), copy.to_str().unwrap());
    let disk = MemoryDisk::new(bytes.len(), Pace::Later);
    let listening = Listening::start(server(Arc::clone(&disk) as Arc<dyn Disk>), dir.path());
    let uri = listening.uri();
    run("qemu-img", "qemu-utils", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri]).await;
    assert!(*disk.bytes.lock().unwrap() == bytes, "the disk differs from the source");
    run("qemu-img", "qemu-utils", &["compare", "-f", "raw", "-F", "raw", source, &uri]).await;
    run("qemu-img", "qemu-utils", &["convert", "-f", "raw", "-O", "raw", &uri, copy]).await;
    assert!(std::fs::read(copy).unwrap() == bytes, "the copy differs from the source");
    let map = run("qemu-img", "qemu-utils", &["map", "--output=json", "-f", "raw", &uri]).await;
    let zeroes: Vec<_> = map.lines().filter(|line| line.contains("\"zero\": true")).collect();
    assert_eq!((map.lines().count(), zeroes.len()), (3, 1), "data, hole, data: {map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_understands_what_is_offered() {
    let dir = tempfile::tempdir().unwrap();
    let disk = MemoryDisk::with(sample(3 << 20), Pace::Now, Access::ReadOnly);
    let listening = Listening::start(server(disk), dir.path());
    let uri = listening.uri();
    let told = run("nbdinfo", "libnbd-bin", &["--json", &uri]).await;
    for expected in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 3145728",
        "\"description\": \"a disk for tests\"",
        "\"base:allocation\"",
        "\"is_read_only\": true",
        "\"can_multi_conn\": true",
        "\"can_df\": true",
        "\"block_size_preferred\": 65536",
    ] {
        assert!(told.contains(expected), "{expected} is missing: {told}");
    }
    let list = run("nbdinfo", "libnbd-bin", &["--list", &uri]).await;
    assert!(list.contains("export=\"disk\""), "{list}");
    let map = run("nbdinfo", "libnbd-bin", &["--map", &uri]).await;
    let kinds: Vec<_> = map.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    assert_eq!(kinds, ["0", "3", "0"], "{map}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdcopy_copies_in_and_out_over_several_connections() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = sample(24 << 20);
    let (source, copy) = (dir.path().join("source.raw"), dir.path().join("copy.raw"));
    std::fs::write(&source, &bytes).unwrap();
    for pace in [Pace::Now, Pace::Later] {
        let socket_dir = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::new(bytes.len(), pace);
        let listening = Listening::start(server(Arc::clone(&disk) as Arc<dyn Disk>), socket_dir.path());
        let uri = listening.uri();
        run("nbdcopy", "libnbd-bin", &["--connections=4", "--flush", source.to_str().unwrap(), &uri]).await;
        assert!(*disk.bytes.lock().unwrap() == bytes, "the disk differs from the source, {pace:?}");
        run("nbdcopy", "libnbd-bin", &["--connections=4", &uri, copy.to_str().unwrap()]).await;
        assert!(std::fs::read(&copy).unwrap() == bytes, "the copy differs from the source, {pace:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fio_verifies_its_random_writes() {
    for pace in [Pace::Now, Pace::Later] {
        let dir = tempfile::tempdir().unwrap();
        let listening = Listening::start(server(MemoryDisk::new(32 << 20, pace)), dir.path());
        let uri = format!("--uri={}", listening.uri());
        let aux = format!("--aux-path={}", dir.path().display());
        let args = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            &aux,
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--bs_unaligned",
            "--blockalign=512",
            "--iodepth=32",
            "--size=32m",
            "--io_size=64m",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=64",
            "--randseed=7",
        ];
        let printed = run("fio", "fio", &args).await;
        assert!(printed.contains("err= 0"), "{pace:?}: {printed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nbdinfo_and_qemu_io_come_in_by_tls_and_our_client_too() {
    let dir = tempfile::tempdir().unwrap();
    let certificates = tls::Certificates::new(dir.path());
    let disk = MemoryDisk::with(sample(4 << 20), Pace::Now, Access::ReadWrite);
    let secure = server(disk).with_tls(certificates.server_upgrade());
    let port = Port::reserve();
    let listener = tokio::net::TcpListener::bind(port.address()).await.unwrap();
    let port = port.number();
    let _serving = Serving::tcp(secure, listener);
    let dir = dir.path().display();

    let uri = format!("nbds://localhost:{port}/disk?tls-certificates={dir}");
    let told = run("nbdinfo", "libnbd-bin", &[&uri]).await;
    assert!(told.contains("with TLS") && told.contains("export-size: 4194304"), "{told}");
    let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={dir}");
    let address = "driver=nbd,export=disk,tls-creds=tls,server.type=inet,server.host=localhost";
    let address = format!("{address},server.port={port}");
    let commands = ["-c", "write -P 7 1M 2M", "-c", "read -P 7 1M 2M"];
    let args = [&["--object", &object, "--image-opts", &address][..], &commands].concat();
    let printed = run("qemu-io", "qemu-utils", &args).await;
    assert!(printed.contains("read 2097152/2097152") && !printed.contains("failed"), "{printed}");

    let uri: NbdUri = format!("nbds://localhost:{port}/disk").parse().unwrap();
    let upgrade = Some(certificates.client_upgrade("localhost"));
    let client = Client::connect_uri(&uri, Options { upgrade, ..Options::default() }).await.unwrap();
    let mut got = vec![0; 2 << 20];
    client.read(1 << 20, &mut got).await.unwrap();
    assert!(got.iter().all(|&b| b == 7), "what QEMU wrote");
    client.write(0, &got).await.unwrap();
    client.close().await;

    let plain = Client::connect_uri(&uri, Options::default()).await.err();
    assert!(plain.is_some_and(|e| e.to_string().contains("demands TLS")));
    let upgrade = Some(certificates.client_upgrade("example.com"));
    let wrong = Client::connect_uri(&uri, Options { upgrade, ..Options::default() }).await.err();
    assert!(matches!(wrong, Some(nbd::ConnectError::Tls(_))), "another name than the certificate's");
}

/// Writes, zeroes and reads back, and compares what the server keeps.
async fn exercise(client: &Client, len: usize) -> Vec<u8> {
    let mut model = sample(len);
    client.write(0, &model).await.unwrap();
    client.write_zeroes(1 << 20, 1 << 20).await.unwrap();
    model[1 << 20..2 << 20].fill(0);
    client.discard(5 << 20, 64 << 10).await.unwrap();
    model[5 << 20..(5 << 20) + (64 << 10)].fill(0);
    client.write_durably(8192, &[9; BLOCK]).await.unwrap();
    model[8192..8192 + BLOCK].fill(9);
    client.flush().await.unwrap();
    let mut got = vec![0xaa; len - 100];
    client.read(100, &mut got).await.unwrap();
    assert!(got == model[100..], "what is read differs from what was written");
    let mut at = 0;
    while at < len {
        for extent in client.extents(at as u64, (len - at) as u64).await.unwrap() {
            let end = at + extent.len as usize;
            if extent.kind == ExtentKind::Hole {
                assert!(model[at..end].iter().all(|&b| b == 0), "data told as a hole at {at}");
            }
            at = end;
        }
    }
    assert_eq!(at, len);
    model
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_works_with_qemu_nbd() {
    let dir = tempfile::tempdir().unwrap();
    let len = 9 << 20;
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, vec![0; len]).unwrap();
    for connections in [1, 4] {
        let mut qemu = Foreign::qemu_nbd(&dir, &image);
        let options = Options { connections, ..Options::default() };
        let client = qemu.connect("disk", &options).await;
        assert!(client.agreed().context.is_some(), "qemu-nbd tells allocation");
        let model = exercise(&client, len).await;
        client.close().await;
        assert!(std::fs::read(&image).unwrap() == model, "the file differs from what was written");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_works_with_nbdkit_and_with_servers_that_can_do_less() {
    let len = 9 << 20;
    let cases: [&[&str]; 4] = [
        &["memory", "9M"],
        &["--no-sr", "memory", "9M"],
        &["--filter=nozero", "memory", "9M", "zeromode=none"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "9M",
            "blocksize-maximum=1M",
            "blocksize-error-policy=error",
        ],
    ];
    for args in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut nbdkit = Foreign::nbdkit(&dir, args);
        let client = nbdkit.connect("", &Options::default()).await;
        exercise(&client, len).await;
        client.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alignment_that_a_server_demands_is_kept_by_reads_and_asked_of_writes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    let bytes = sample(1 << 20);
    std::fs::write(&image, &bytes).unwrap();
    let file = image.to_str().unwrap();
    // Reads that are widened to whole blocks must still not be longer than the server takes.
    let args = [
        "--filter=blocksize-policy",
        "file",
        file,
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=8192",
        "blocksize-error-policy=error",
    ];
    let mut nbdkit = Foreign::nbdkit(&dir, &args);
    let client = nbdkit.connect("", &Options::default()).await;
    assert_eq!(client.agreed().align_bytes, 4096);
    for (offset, len) in [(0, 1), (4095, 2), (5000, 100_000), ((1 << 20) - 3, 3)] {
        let mut got = vec![0; len];
        client.read(offset as u64, &mut got).await.unwrap();
        assert!(got == bytes[offset..offset + len], "{len} bytes at {offset}");
        let told = client.extents(offset as u64, len as u64).await.unwrap();
        assert!(!told.is_empty() && told.iter().map(|e| e.len).sum::<u64>() <= len as u64);
    }
    client.write(4096, &[1; 4096]).await.unwrap();
    let error = client.write(1, &[1; 4096]).await.unwrap_err();
    assert!(error.to_string().contains("aligned to 4096 bytes"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_that_comes_back_finds_its_client_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    std::fs::write(&image, sample(4 << 20)).unwrap();
    let mut first = Foreign::qemu_nbd(&dir, &image);
    let client = Arc::new(first.connect("disk", &Options::default()).await);
    client.write(0, &[5; BLOCK]).await.unwrap();
    client.flush().await.unwrap();
    drop(first);
    let reader = Arc::clone(&client);
    let reading = tokio::spawn(async move {
        let mut got = vec![0; 2 * BLOCK];
        reader.read(0, &mut got).await.map(|()| got)
    });
    let _second = Foreign::qemu_nbd(&dir, &image);
    let got = tokio::time::timeout(TOOL_TIME_MAX, reading).await.unwrap().unwrap().unwrap();
    assert!(got == [&[5; BLOCK][..], &sample(4 << 20)[BLOCK..2 * BLOCK]].concat());
}
