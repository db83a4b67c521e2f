//! The [guest that counts](testkit::counting_guest), with a disk in this process's memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use block::{Access, BoxFuture, Disk, DiskError, Extent, ExtentKind};
use nbd::{Export, Exports, Listing, Server};
use testkit::counting_guest::boot_disk;
use tokio::net::UnixListener;
use tokio::task::{JoinHandle, JoinSet};

use super::super::accel::Accel;
use super::super::process::Process;
use super::super::*;
use super::wait_for;

const DISK_BYTES: usize = 1 << 20;

/// What a disk was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    Read { offset: u64, len: usize },
    Write,
    Flush,
}

/// A disk in memory that remembers what it was asked for, and can be full.
#[derive(Default)]
pub(super) struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    asked: Mutex<Vec<Asked>>,
    full: AtomicBool,
}

impl MemoryDisk {
    fn of(bytes: Vec<u8>) -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk { bytes: Mutex::new(bytes), ..MemoryDisk::default() })
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(super) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::SeqCst);
    }

    pub(super) fn is_full(&self) -> bool {
        self.full.load(Ordering::SeqCst)
    }

    pub(super) fn copy_from(&self, other: &MemoryDisk) {
        self.bytes.lock().unwrap().clone_from(&other.bytes.lock().unwrap());
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }
}

impl Disk for MemoryDisk {
    fn size_bytes(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            self.note(Asked::Read { offset, len: buf.len() });
            let begin = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&self.bytes.lock().unwrap()[begin..begin + buf.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            if self.is_full() {
                return Err(DiskError::NoSpace);
            }
            self.note(Asked::Write);
            let begin = usize::try_from(offset).unwrap();
            self.bytes.lock().unwrap()[begin..begin + data.len()].copy_from_slice(data);
            Ok(())
        })
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        unreachable!("the guest has no such command")
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        unreachable!("the guest has no such command")
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async {
            self.note(Asked::Flush);
            Ok(())
        })
    }

    fn extents(&self, _offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async move { Ok(vec![Extent { len, kind: ExtentKind::Data }]) })
    }
}

struct OneExport(Arc<MemoryDisk>);

impl Exports for OneExport {
    fn open(&self, name: &str) -> Option<Export> {
        (name == "vm-1").then(|| Export { disk: Arc::clone(&self.0) as _, description: String::new() })
    }

    fn list(&self) -> Vec<Listing> {
        Vec::new()
    }
}

/// One side of a migration: a directory for a VM, and its disk behind a socket. Ends with all that is in it.
pub(super) struct Site {
    dir: tempfile::TempDir,
    pub(super) disk: Arc<MemoryDisk>,
    server: JoinHandle<()>,
}

impl Site {
    /// With the guest on its disk; `None`, said aloud, where QEMU is missing.
    pub(super) fn with_guest() -> Option<Site> {
        Site::of(boot_disk(DISK_BYTES))
    }

    /// With nothing but zeroes on its disk.
    pub(super) fn empty() -> Option<Site> {
        Site::of(vec![0; DISK_BYTES])
    }

    fn of(bytes: Vec<u8>) -> Option<Site> {
        if Command::new(QEMU).arg("--version").output().is_err() {
            eprintln!("skipped: {QEMU} is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let disk = MemoryDisk::of(bytes);
        let listener = UnixListener::bind(dir.path().join("nbd.sock")).unwrap();
        let server = Arc::new(Server::new(Arc::new(OneExport(Arc::clone(&disk)))));
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = Arc::clone(&server);
                connections.spawn(async move { server.serve(stream, std::future::pending::<()>()).await });
            }
        });
        Some(Site { dir, disk, server })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn vm_dir(&self) -> PathBuf {
        self.path("vm,server=off")
    }

    pub(super) fn vm_disk(&self) -> VmDisk {
        VmDisk { socket: self.path("nbd.sock"), export: "vm-1".to_owned() }
    }

    pub(super) fn spec(&self) -> VmSpec {
        VmSpec {
            name: "vm-1".parse().unwrap(),
            disk: self.vm_disk(),
            seed: None,
            memory_mib: 16,
            cpus: 1,
            accel: Accel::Tcg,
            boot: None,
            forward_ports: vec![22],
            on_full: OnFull::Pause,
            platform: None,
        }
    }

    /// The guest of this site, once it counts.
    pub(super) async fn start(&self) -> Qemu {
        let vm = Qemu::start(&self.vm_dir(), &self.spec()).await.unwrap();
        wait_for(&vm, "^00000010$").await.unwrap();
        vm
    }

    /// The guest has counted on since now.
    pub(super) async fn counts_on(&self, vm: &Qemu) {
        let (lines, _) = self.printed();
        wait_for(vm, &format!("^{:08x}$", lines.len() + 2)).await.unwrap();
    }

    /// The whole lines that the guest printed in this run here, and the beginning of another.
    pub(super) fn printed(&self) -> (Vec<String>, String) {
        let text = read(&self.vm_dir().join("console.log"));
        let (lines, rest) = text.rsplit_once('\n').unwrap_or(("", &text));
        (lines.lines().map(str::to_owned).collect(), rest.to_owned())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.server.abort();
        if let Some(vm) = Process::of_pidfile(&self.vm_dir().join("qemu.pid")) {
            vm.kill().unwrap();
        }
    }
}

pub(super) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// Checks that these consoles, one after the other, show each number once and in order, and nothing else.
pub(super) fn assert_counted(consoles: &[&Site]) {
    let text: String = consoles.iter().map(|site| read(&site.vm_dir().join("console.log"))).collect();
    let (whole, _) = text.rsplit_once('\n').expect("the guest printed");
    for (index, line) in whole.lines().enumerate() {
        assert_eq!(line, format!("{:08x}", index + 1), "line {index}");
    }
}
