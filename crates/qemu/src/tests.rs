//! The runner against a real QEMU and a foreign NBD server (`qemu-nbd`).
//!
//! The guest is one boot sector, so that a whole life takes a second: it prints `ready`, and for each byte
//! that its console gets it reads the second sector of its disk and prints the text there, or `error`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::accel::Accel;
use super::migrate::{Incoming, Paused, Progress};
use super::qemu::Stopped;
use super::ready::ReadyError;
use super::*;

mod counting;
mod early;
mod full_disk;
mod migration;
mod real;

/// Bounds a test that would otherwise hang; nothing that passes comes near it.
const PATIENCE: Duration = Duration::from_secs(600);

#[rustfmt::skip]
const ECHOING_GUEST: [u8; 108] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // ax, ds, es, ss = 0
    0xbc, 0x00, 0x7c, 0x88, 0xd3, 0xfb,             // sp = 0x7c00, bl = the boot drive, interrupts on
    0xbe, 0x4e, 0x7c, 0xe8, 0x22, 0x00,             // print "ready"
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, // 0x14: wait for a byte at the serial port
    0xba, 0xf8, 0x03, 0xec,                         // take it
    0xb4, 0x42, 0x88, 0xda, 0xbe, 0x5c, 0x7c, 0xcd, 0x13, // read the second sector to 0x8000
    0xbe, 0x00, 0x80, 0x73, 0x03, 0xbe, 0x55, 0x7c, // si = what was read, or "error"
    0xe8, 0x02, 0x00, 0xeb, 0xde,                   // print it; wait again
    0xac, 0x84, 0xc0, 0x74, 0x12, 0x88, 0xc1,       // 0x36, print: the next character, until a zero
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20, 0x74, 0xfb, // wait until the serial port takes it
    0x88, 0xc8, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xe9, 0xc3, // write it; the next
    b'r', b'e', b'a', b'd', b'y', b'\n', 0,         // 0x4e
    b'e', b'r', b'r', b'o', b'r', b'\n', 0,         // 0x55
    0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, // 0x5c: one sector, to 0000:8000,
    0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // from sector 1
];

/// A directory with a disk, its NBD server and a VM, all of which end with it.
struct Bench {
    dir: tempfile::TempDir,
    format: &'static str,
}

impl Bench {
    /// A disk with the echoing guest; `None`, said aloud, where the programs are missing.
    fn new() -> Option<Bench> {
        let bench = Bench::without_disk("raw")?;
        let mut disk = vec![0; 1 << 20];
        disk[..ECHOING_GUEST.len()].copy_from_slice(&ECHOING_GUEST);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[512..518].copy_from_slice(b"first\n");
        fs::write(bench.path("disk"), disk).unwrap();
        bench.serve_disk();
        Some(bench)
    }

    /// A private disk on top of a qcow2 image.
    fn on_image(image: &str) -> Option<Bench> {
        let bench = Bench::without_disk("qcow2")?;
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image])
            .arg(bench.path("disk"))
            .status()
            .unwrap();
        assert!(made.success());
        bench.serve_disk();
        Some(bench)
    }

    fn without_disk(format: &'static str) -> Option<Bench> {
        for program in [QEMU, "qemu-nbd"] {
            if Command::new(program).arg("--version").output().is_err() {
                eprintln!("skipped: {program} is not installed");
                return None;
            }
        }
        Some(Bench { dir: tempfile::tempdir().unwrap(), format })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn vm_dir(&self) -> PathBuf {
        // A comma, because it separates QEMU's options.
        self.path("vms,readonly=on")
    }

    fn serve_disk(&self) {
        let served = Command::new("qemu-nbd")
            // Two clients, because a guest that moves has its disk open on both sides for a moment.
            .args(["--fork", "--persistent", "--shared=2", "--export-name=vm-1", "--discard=unmap"])
            .arg(format!("--format={}", self.format))
            .arg(format!("--pid-file={}", self.path("nbd.pid").display()))
            .arg(format!("--socket={}", self.path("nbd.sock").display()))
            .arg(self.path("disk"))
            .status()
            .unwrap();
        assert!(served.success());
    }

    fn kill_disk_server(&self) {
        let Ok(text) = fs::read_to_string(self.path("nbd.pid")) else { return };
        let pid = Pid::from_raw(text.trim().parse().unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
        fs::remove_file(self.path("nbd.pid")).unwrap();
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            name: "vm-1".parse().unwrap(),
            disk: VmDisk { socket: self.path("nbd.sock"), export: "vm-1".to_owned(), serial: None },
            further_disks: Vec::new(),
            seed: None,
            memory_mib: 32,
            cpus: 1,
            accel: Accel::Tcg,
            boot: None,
            forward_ports: Vec::new(),
            on_full: OnFull::default(),
            platform: None,
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(vm) = process::Process::of_pidfile(&self.vm_dir().join("qemu.pid")) {
            vm.kill().unwrap();
        }
        self.kill_disk_server();
    }
}

/// The end of a migration on both sides.
async fn hand_over(paused: Paused<'_>, incoming: Incoming<'_>) -> Progress {
    let (completed, arrived) = tokio::join!(sendable(paused.complete()), sendable(incoming.arrived()));
    arrived.unwrap();
    completed.unwrap()
}

/// The daemon runs each of these futures on a task of its own.
fn sendable<F: Future + Send>(future: F) -> F {
    future
}

async fn wait_for(vm: &Qemu, pattern: &str) -> Result<Duration, ReadyError> {
    format!("console:{pattern}").parse::<Ready>().unwrap().wait(vm, PATIENCE).await
}

async fn type_key(vm: &Qemu) {
    UnixStream::connect(vm.console_socket()).await.unwrap().write_all(b"x").await.unwrap();
}

fn write_second_sector(disk: &Path, text: &[u8]) {
    use std::os::unix::fs::FileExt;
    fs::File::options().write(true).open(disk).unwrap().write_all_at(text, 512).unwrap();
}

#[tokio::test]
async fn a_guest_is_found_again_by_a_later_daemon_and_waits_while_its_disk_server_is_away() {
    let Some(bench) = Bench::new() else { return };
    let vm = Qemu::start(&bench.vm_dir(), &bench.spec()).await.unwrap();
    wait_for(&vm, "^ready$").await.unwrap();
    let pid = vm.pid();
    drop(vm);

    let vm = Qemu::adopt(&bench.vm_dir()).expect("the guest outlives what started it");
    assert_eq!((vm.pid(), vm.name().as_str()), (pid, "vm-1"));
    type_key(&vm).await;
    wait_for(&vm, "^first$").await.unwrap();

    bench.kill_disk_server();
    write_second_sector(&bench.path("disk"), b"after\n");
    type_key(&vm).await;
    bench.serve_disk();
    wait_for(&vm, "^(after|error)$").await.unwrap();
    let printed = fs::read_to_string(bench.vm_dir().join("console.log")).unwrap();
    assert!(printed.ends_with("after\n"), "the guest saw latency and no error: {printed:?}");
}

#[tokio::test]
async fn what_was_started_is_remembered_and_a_vm_of_a_version_that_did_not_is_adopted_all_the_same() {
    let Some(bench) = Bench::new() else { return };
    let vm = Qemu::start(&bench.vm_dir(), &bench.spec()).await.unwrap();
    let spec = vm.spec().expect("it is remembered").clone();
    assert_eq!(VmSpec { platform: None, ..spec.clone() }, bench.spec());
    assert!(spec.platform.is_some(), "the machine type is part of it");
    drop(vm);
    assert_eq!(Qemu::adopt(&bench.vm_dir()).unwrap().spec(), Some(&spec));

    let record = bench.vm_dir().join("qemu.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("spec").unwrap();
    fs::write(&record, json.to_string()).unwrap();
    let vm = Qemu::adopt(&bench.vm_dir()).expect("an older record is enough to find the guest");
    assert_eq!(vm.spec(), None);
    let migrated = vm.begin_migration(&vm.memory_socket(), None).await.map(drop);
    assert!(matches!(migrated, Err(VmError::Unfit(_))), "{migrated:?}");
    let elsewhere = Qemu::start_incoming(&bench.path("elsewhere"), &bench.spec()).await;
    assert!(matches!(elsewhere, Err(VmError::Unfit(_))), "no machine type is known: {elsewhere:?}");

    let (pid, name) = (vm.pid(), vm.name().clone());
    fs::write(&record, "{").unwrap();
    let vm = Qemu::adopt(&bench.vm_dir()).expect("a damaged record hides no guest");
    assert_eq!((vm.pid(), vm.name()), (pid, &name));
    let begun = fs::metadata(bench.vm_dir().join("qemu.pid")).unwrap().modified().unwrap();
    let (begun, started) = (begun.duration_since(UNIX_EPOCH), vm.started().duration_since(UNIX_EPOCH));
    assert_eq!(started.unwrap().as_millis(), begun.unwrap().as_millis(), "its number was written then");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_does_not_shut_down_is_ended_and_its_next_start_begins_a_new_console() {
    let Some(bench) = Bench::new() else { return };
    let vm = Qemu::start(&bench.vm_dir(), &bench.spec()).await.unwrap();
    wait_for(&vm, "^ready$").await.unwrap();
    let again = Qemu::start(&bench.vm_dir(), &bench.spec()).await;
    assert!(matches!(again, Err(VmError::Running { pid }) if pid == vm.pid()), "{again:?}");

    assert_eq!(vm.stop(Duration::ZERO).await.unwrap(), Stopped::ByQemu);
    assert!(Qemu::adopt(&bench.vm_dir()).is_none());
    assert!(matches!(wait_for(&vm, "^never$").await, Err(ReadyError::Ended)));

    let vm = Qemu::start(&bench.vm_dir(), &bench.spec()).await.unwrap();
    wait_for(&vm, "^ready$").await.unwrap();
    let before = fs::read_to_string(bench.vm_dir().join("console.log.1")).unwrap();
    assert_eq!(before, "ready\n", "what the last run printed is kept");
    vm.kill().await.unwrap();
    assert!(Qemu::adopt(&bench.vm_dir()).is_none(), "a killed guest is not found");
}

#[tokio::test]
async fn a_vm_whose_disk_server_is_away_ends_all_the_same() {
    let Some(bench) = Bench::new() else { return };
    let vm = Qemu::start(&bench.vm_dir(), &bench.spec()).await.unwrap();
    wait_for(&vm, "^ready$").await.unwrap();
    bench.kill_disk_server();
    type_key(&vm).await;
    vm.stop(Duration::ZERO).await.unwrap();
    assert!(Qemu::adopt(&bench.vm_dir()).is_none());
}

#[tokio::test]
async fn a_kernel_from_outside_goes_before_what_is_on_the_disk() {
    let Some(bench) = Bench::new() else { return };
    // Zeroes are a kernel to QEMU, of the oldest kind; a guest that jumps into them prints nothing.
    fs::write(bench.path("kernel"), [0; 16 << 10]).unwrap();
    let mut spec = bench.spec();
    spec.boot = Some(DirectBoot { kernel: bench.path("kernel"), initrd: None, append: String::new() });
    let vm = Qemu::start(&bench.vm_dir(), &spec).await.expect("QEMU takes the kernel beside the disk");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn qemus_own_words_say_why_it_did_not_start() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec();
    spec.disk.export = "no,such".to_owned();
    let error = Qemu::start(&bench.vm_dir(), &spec).await.unwrap_err();
    assert!(matches!(&error, VmError::Refused(words) if words.contains("no,such")), "{error}");
    assert!(Qemu::adopt(&bench.vm_dir()).is_none());
}

#[tokio::test]
async fn a_forwarded_port_is_not_ready_because_qemu_listens_on_it() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec();
    spec.forward_ports = vec![22];
    let vm = Qemu::start(&bench.vm_dir(), &spec).await.unwrap();
    let port = vm.forwarded_port(22).await.unwrap().expect("the port is forwarded");
    tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("QEMU itself accepts");
    let moment = Duration::from_millis(500);
    let refused = Ready::Tcp(22).wait(&vm, moment).await;
    assert!(matches!(refused, Err(ReadyError::Late(_))), "this guest has no network: {refused:?}");
    let unknown = Ready::Tcp(80).wait(&vm, PATIENCE).await;
    assert!(matches!(unknown, Err(ReadyError::NotForwarded(80))), "{unknown:?}");
}
