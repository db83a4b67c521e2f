//! `tgtd`, the target of the package tgt, run in the foreground on a port of the loopback interface.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(dead_code, unreachable_pub)] // Each test file uses a part of this.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use crate::common::tool;

pub const NAME: &str = "iqn.2026-01.test:tgt";

/// Tries to start it on a free port: another program may take the port first.
const STARTS_MAX: u32 = 10;

/// One daemon with one target whose unit 1 is a file. It is ended with its files when it is dropped.
pub struct Tgt {
    dir: TempDir,
    pub port: u16,
    control: u32,
    daemon: Option<Child>,
}

/// A control port that other daemons hardly have; it has to be below 32768.
fn control_port() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    1000 + std::process::id() % 1900 * 16 + NEXT.fetch_add(1, Ordering::SeqCst) % 16
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

impl Tgt {
    pub fn new(size_bytes: u64) -> Tgt {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(size_bytes).unwrap();
        Tgt { dir, port: free_port(), control: control_port(), daemon: None }
    }

    pub fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn spawn(&mut self) {
        let portal = format!("portal=127.0.0.1:{}", self.port);
        let mut daemon = Command::new(tool("tgtd", "tgt"));
        daemon.args(["-f", "--iscsi", &portal, "-C", &self.control.to_string()]);
        let daemon = daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemon = Some(daemon.unwrap());
    }

    /// Whether the daemon answers; `false` if it has ended.
    fn comes_up(&mut self) -> bool {
        let daemon = self.daemon.as_mut().unwrap();
        loop {
            if daemon.try_wait().unwrap().is_some() {
                return false;
            }
            let asked = Command::new(tool("tgtadm", "tgt"))
                .args(["-C", &self.control.to_string(), "--lld", "iscsi", "--mode", "target", "--op", "show"])
                .output()
                .unwrap();
            let listens = std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok();
            if asked.status.success() && listens {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the daemon with its target, which has no disk yet.
    pub fn start(&mut self) {
        for _ in 0..STARTS_MAX {
            self.spawn();
            if self.comes_up() {
                self.tgtadm(&["--mode", "target", "--op", "new", "--tid", "1", "--targetname", NAME]);
                return;
            }
            (self.port, self.control) = (free_port(), control_port());
        }
        panic!("tgtd does not start");
    }

    /// Starts it again on the same port, where it was before.
    pub fn start_again(&mut self) {
        self.spawn();
        assert!(self.comes_up(), "tgtd does not start again on port {}", self.port);
        self.tgtadm(&["--mode", "target", "--op", "new", "--tid", "1", "--targetname", NAME]);
    }

    /// Gives the target its disk and lets everybody in.
    pub fn add_disk(&self, options: &[&str], parameters: &[&str]) {
        let file = self.file();
        let unit = ["--mode", "logicalunit", "--tid", "1", "--lun", "1"];
        let mut new = unit.to_vec();
        new.extend(["--op", "new", "--backing-store", file.to_str().unwrap()]);
        new.extend(options);
        self.tgtadm(&new);
        for parameter in parameters {
            let mut update = unit.to_vec();
            update.extend(["--op", "update", "--params", parameter]);
            self.tgtadm(&update);
        }
        self.tgtadm(&["--mode", "target", "--op", "bind", "--tid", "1", "--initiator-address", "ALL"]);
    }

    /// Demands that initiators know a secret, and with `outgoing` proves one itself.
    pub fn add_account(&self, user: &str, secret: &str, outgoing: &[&str]) {
        self.tgtadm(&["--mode", "account", "--op", "new", "--user", user, "--password", secret]);
        let mut bind = vec!["--mode", "account", "--op", "bind", "--tid", "1", "--user", user];
        bind.extend(outgoing);
        self.tgtadm(&bind);
    }

    fn tgtadm(&self, args: &[&str]) {
        let control = self.control.to_string();
        let run =
            Command::new(tool("tgtadm", "tgt")).args(["-C", &control, "--lld", "iscsi"]).args(args).output();
        let run = run.unwrap();
        assert!(run.status.success(), "tgtadm {args:?}: {}", String::from_utf8_lossy(&run.stderr));
    }

    /// Ends the daemon as `kill -9` does.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(format!("/var/run/tgtd/socket.{}", self.control));
        let _ = std::fs::remove_file(format!("/var/run/tgtd/socket.{}.lock", self.control));
    }
}
