//! The [guest that counts](testkit::counting_guest), with a disk in this process's memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use block::Access;
use nbd::{Export, Exports, Listing, Server};
use testkit::counting_guest::boot_disk;
use testkit::memory_disk::{Asked, MemoryDisk, Pace};
use tokio::net::UnixListener;
use tokio::task::{JoinHandle, JoinSet};

use super::super::accel::Accel;
use super::super::process::Process;
use super::super::*;
use super::wait_for;

const DISK_BYTES: usize = 1 << 20;

struct OneExport(Arc<MemoryDisk>);

impl Exports for OneExport {
    fn open(&self, name: &str) -> Option<Export> {
        (name == "vm-1").then(|| Export::new(Arc::clone(&self.0) as _))
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
        let disk = MemoryDisk::with(bytes, Pace::Later, Access::ReadWrite);
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

    /// Makes its disk hold what another's holds now.
    pub(super) fn copy_disk(&self, other: &Site) {
        self.disk.bytes.lock().unwrap().clone_from(&other.disk.bytes.lock().unwrap());
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn vm_dir(&self) -> PathBuf {
        self.path("vm,server=off")
    }

    pub(super) fn vm_disk(&self) -> VmDisk {
        VmDisk { socket: self.path("nbd.sock"), export: "vm-1".to_owned(), serial: None }
    }

    pub(super) fn spec(&self) -> VmSpec {
        VmSpec {
            name: "vm-1".parse().unwrap(),
            disk: self.vm_disk(),
            further_disks: Vec::new(),
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
        if !std::thread::panicking() {
            assert!(!self.disk.asked().contains(&Asked::Clear), "the guest has no command that clears");
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
