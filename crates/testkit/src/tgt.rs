//! `tgtd`, the target of the package tgt, run in the foreground on a port of the loopback interface.
//!
//! Daemons and `tgtadm` otherwise meet in `/var/run/tgtd` by a number that all daemons of the machine share; here they
//! meet in a directory of the test.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::foreign::find;
use crate::ports::Port;

/// The target's name.
pub const NAME: &str = "iqn.2026-01.test:tgt";

/// How long it may take to start, which takes milliseconds on a machine that is not busy.
const START_TIME_MAX: Duration = Duration::from_secs(120);

/// Names the path of the socket of `tgtadm`, to which both programs add a dot and their control number.
const CONTROL: &str = "TGT_IPC_SOCKET";

/// One daemon with one target whose unit 1 is a file. It is ended with its files when it is dropped.
pub struct Tgt {
    dir: TempDir,
    /// Where it listens.
    pub port: u16,
    reserved: Port,
    daemon: Option<Child>,
}

impl Tgt {
    /// A daemon that does not run yet, and a file of zeroes.
    pub fn new(size_bytes: u64) -> Tgt {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(size_bytes).unwrap();
        let reserved = Port::reserve();
        Tgt { dir, port: reserved.number(), reserved, daemon: None }
    }

    /// The file that is the disk.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn spawn(&mut self) {
        let portal = format!("portal={}", self.reserved.address());
        let mut daemon = self.command("tgtd");
        daemon.args(["-f", "--iscsi", &portal]);
        let daemon = daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.daemon = Some(daemon.unwrap());
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(find("tgt", program));
        command.env(CONTROL, self.dir.path().join("control"));
        command
    }

    fn wait_until_it_answers(&mut self) {
        let began = Instant::now();
        loop {
            let ended = self.daemon.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "tgtd does not start at {}: {ended:?}", self.reserved.address());
            let mut ask = self.command("tgtadm");
            let asked = ask.args(["--lld", "iscsi", "--mode", "target", "--op", "show"]).output().unwrap();
            let listens = std::net::TcpStream::connect(self.reserved.address()).is_ok();
            if asked.status.success() && listens {
                return;
            }
            assert!(began.elapsed() < START_TIME_MAX, "tgtd does not answer at {}", self.reserved.address());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Starts the daemon with its target, which has no disk yet; if it was killed, where it was before.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_until_it_answers();
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
        let run = self.command("tgtadm").args(["--lld", "iscsi"]).args(args).output().unwrap();
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
    }
}
