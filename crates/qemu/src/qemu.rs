//! The life of one QEMU: started, found again by a later daemon, watched, stopped.
//!
//! - *Survival:* QEMU puts itself into the background (`-daemonize`): own session, no parent but `init`, output
//!   to a file. Under systemd the daemon's unit also needs `KillMode=process`, since systemd ends whole control
//!   groups.
//! - *Crash:* `qemu.json` is written before QEMU starts and `qemu.pid` by QEMU itself, so that at no point a
//!   crash of the daemon leaves a guest that [`Qemu::adopt`] cannot find.
//! - *Cancellation:* a cancelled [`Qemu::start`] may leave a running guest; `adopt` tells. All others may be
//!   cancelled and called again.
//! - *Retries:* none; each step has its own time limit. What QEMU refuses for a moment only is given again by those
//!   who know that it may be ([`settle`](super::settle)).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use block::VmName;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::{Mutex, OwnedMutexGuard};

use super::accel::Accel;
use super::machine::Platform;
use super::process::Process;
use super::qmp::Qmp;
use super::spec::{self, Begin, VmFiles, VmSpec};
use super::standstill::{Standing, Standstill};
use super::{QEMU, VmError, printable};

/// How long QEMU may take until it is in the background. It opens the disk before, so this includes the NBD
/// handshake; the rest takes 0.2 s.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How long QEMU may take to end after `quit` (it flushes the disk first) and after SIGKILL.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes from the end of `qemu.log` that an error quotes.
const QUOTED_BYTES: usize = 2000;

/// What is remembered of a start.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct StartRecord {
    name: VmName,
    accel: Accel,
    /// When QEMU was started, in milliseconds since 1970.
    started_unix_ms: u64,
    /// What was started. Absent from records of an earlier version; one of a later version may say more than
    /// this one understands, whose guest is found all the same.
    #[serde(default, deserialize_with = "if_understood")]
    spec: Option<VmSpec>,
}

impl StartRecord {
    /// What a running VM says itself. `None` if its process has ended meanwhile.
    fn of_unknown_start(files: &VmFiles, process: &Process) -> Option<StartRecord> {
        let name = process.argument_after("-name")?.strip_prefix("guest=")?.parse().ok()?;
        let started = fs::metadata(files.pidfile()).and_then(|pidfile| pidfile.modified()).ok()?;
        Some(StartRecord { name, accel: Accel::Tcg, started_unix_ms: unix_ms(started), spec: None })
    }
}

/// A VM's live process.
#[derive(Debug)]
pub struct Qemu {
    /// Where its files are.
    pub(crate) files: VmFiles,
    process: Process,
    record: StartRecord,
    pub(crate) turns: Turns,
    /// What is known of whether the guest stands still, and which recoveries are due.
    pub(crate) standing: Arc<Standing>,
}

/// Whose turn it is. QEMU serves one client of a socket at a time and lets few others wait.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// To give a command.
    command: Mutex<()>,
    /// To talk to the guest's agent.
    agent: Arc<Mutex<()>>,
    /// To decide whether the guest runs, for as long as that takes several commands.
    run: Arc<Mutex<()>>,
}

impl Turns {
    /// The right to talk to the guest's agent.
    pub(crate) async fn agent(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.agent).lock_owned().await
    }

    /// The right to decide whether the guest runs.
    pub(crate) async fn run(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.run).lock_owned().await
    }
}

/// How a VM came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The guest shut itself down.
    ByGuest,
    /// The guest did not in time; QEMU flushed its disk and ended.
    ByQemu,
    /// QEMU did not either, and was killed.
    Killed,
}

impl Qemu {
    /// Starts the VM `spec` with its files in `dir`, which is made if need be. Returns when QEMU has opened
    /// the disk, listens on its sockets and lets the guest run.
    pub async fn start(dir: &Path, spec: &VmSpec) -> Result<Qemu, VmError> {
        Qemu::begin(dir, spec, Begin::AtOnce).await
    }

    /// Starts the VM `spec` in this manner.
    pub(crate) async fn begin(dir: &Path, spec: &VmSpec, begin: Begin) -> Result<Qemu, VmError> {
        fs::create_dir_all(dir).map_err(VmError::file(dir))?;
        let dir = dir.canonicalize().map_err(VmError::file(dir))?;
        let files = VmFiles::new(dir.clone());
        let platform = Platform::here(spec.platform.as_ref(), spec.accel).await?;
        let arguments = spec::arguments(spec, platform.machine(), &files, begin)?;
        if let Some(process) = Process::of_pidfile(&files.pidfile()) {
            return Err(VmError::Running { pid: process.pid() });
        }
        make_room(&files)?;
        let record = StartRecord {
            name: spec.name.clone(),
            accel: spec.accel,
            started_unix_ms: unix_ms(SystemTime::now()),
            spec: Some(VmSpec { platform: Some(platform), ..spec.clone() }),
        };
        let json = serde_json::to_vec(&record).expect("paths that QEMU was told are UTF-8");
        write_atomically(&files.record(), &json)?;
        launch(&files, &arguments).await?;
        match Process::of_pidfile(&files.pidfile()) {
            Some(process) => Ok(Qemu::of(files, process, record)),
            None => Err(VmError::Refused(last_words(&files))),
        }
    }

    fn of(files: VmFiles, process: Process, record: StartRecord) -> Qemu {
        Qemu { files, process, record, turns: Turns::default(), standing: Arc::default() }
    }

    /// The VM of this directory that an earlier daemon started, if it still runs. One whose record cannot be read
    /// is found all the same: its disk must not be taken for one that nobody uses.
    pub fn adopt(dir: &Path) -> Option<Qemu> {
        let files = VmFiles::new(dir.canonicalize().ok()?);
        let process = Process::of_pidfile(&files.pidfile())?;
        let record = fs::read(files.record()).and_then(|json| Ok(serde_json::from_slice(&json)?));
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                let file = files.record();
                tracing::error!(file = %file.display(), %error, "guest_record_damaged: it runs on");
                StartRecord::of_unknown_start(&files, &process)?
            }
        };
        Some(Qemu::of(files, process, record))
    }

    /// What was started, with all that it takes to start the same machine elsewhere but the disk and the seed,
    /// which have other paths there. `None` if another version of VirtMan started it.
    pub fn spec(&self) -> Option<&VmSpec> {
        self.record.spec.as_ref()
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.record.name
    }

    /// The number of its process.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// When it was started.
    pub fn started(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.record.started_unix_ms)
    }

    /// Where its console can be reached; see [`console`](super::console).
    pub fn console_socket(&self) -> PathBuf {
        self.files.console_socket()
    }

    /// Why the guest stands still, if it does and is meant to run.
    pub fn standstill(&self) -> Option<Standstill> {
        self.standing.standstill()
    }

    /// Waits until the process has ended, for whatever reason.
    pub async fn exited(&self) -> Result<(), VmError> {
        self.process.exited().await.map_err(VmError::file(self.files.pidfile()))
    }

    /// The port of this host's loopback through which the guest's TCP port `guest_port` can be reached, if
    /// [`VmSpec::forward_ports`] names it.
    pub async fn forwarded_port(&self, guest_port: u16) -> Result<Option<u16>, VmError> {
        let table = user_network(self).await?;
        Ok(table
            .iter()
            .find(|flow| flow.state == "HOST_FORWARD" && flow.to_port == guest_port)
            .map(|f| f.from_port))
    }

    /// Asks the guest to shut down and gives it `grace`; then ends QEMU in order, then kills it.
    pub async fn stop(&self, grace: Duration) -> Result<Stopped, VmError> {
        // A QEMU that cannot be asked is ended below, by the same steps.
        let asked = self.control("system_powerdown", json!({})).await.is_ok();
        if asked && tokio::time::timeout(grace, self.exited()).await.is_ok() {
            return Ok(Stopped::ByGuest);
        }
        let quit = async {
            // QEMU may end before it has answered, and that is as good.
            let _ = self.control("quit", json!({})).await;
            self.exited().await
        };
        if tokio::time::timeout(END_TIMEOUT, quit).await.is_ok() {
            return Ok(Stopped::ByQemu);
        }
        self.kill().await?;
        Ok(Stopped::Killed)
    }

    /// Ends the VM at once, as a power cut would.
    pub async fn kill(&self) -> Result<(), VmError> {
        self.process.kill().map_err(VmError::file(self.files.pidfile()))?;
        tokio::time::timeout(END_TIMEOUT, self.exited())
            .await
            .map_err(|_| VmError::Control(format!("process {} does not end after SIGKILL", self.pid())))?
    }

    /// Gives one command. Takes its turn among all that do.
    pub(crate) async fn control(&self, command: &str, arguments: Value) -> Result<Value, VmError> {
        let _turn = self.turns.command.lock().await;
        Qmp::connect(&self.files.qmp_socket()).await?.execute(command, arguments).await
    }
}

/// The connections that QEMU's user-mode network carries.
pub(crate) async fn user_network(vm: &Qemu) -> Result<Vec<Flow>, VmError> {
    let answer = vm.control("human-monitor-command", json!({ "command-line": "info usernet" })).await?;
    Ok(flows(answer.as_str().unwrap_or_default()))
}

/// Milliseconds since the UNIX epoch.
fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn if_understood<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<VmSpec>, D::Error> {
    Ok(serde_json::from_value(Value::deserialize(deserializer)?).ok())
}

/// Takes away what the last run left, and keeps what its console printed.
fn make_room(files: &VmFiles) -> Result<(), VmError> {
    for stale in [
        files.pidfile(),
        files.log(),
        files.qmp_socket(),
        files.events_socket(),
        files.migrate_socket(),
        files.memory_socket(),
        files.console_socket(),
        files.agent_socket(),
        files.frozen(),
    ] {
        accept_missing(fs::remove_file(&stale)).map_err(VmError::file(stale))?;
    }
    let log = files.console_log();
    accept_missing(fs::rename(&log, files.console_log_before())).map_err(VmError::file(log))
}

fn accept_missing(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replaces a file as a whole: after a crash there is the old or the new one. It need not survive a power
/// cut, after which no QEMU runs either.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), VmError> {
    let next = path.with_extension("new");
    fs::write(&next, bytes).map_err(VmError::file(&next))?;
    fs::rename(&next, path).map_err(VmError::file(path))
}

/// Runs QEMU until it is in the background, or has refused.
async fn launch(files: &VmFiles, arguments: &[String]) -> Result<(), VmError> {
    let log = fs::File::options().create(true).append(true).open(files.log());
    let log = log.map_err(VmError::file(files.log()))?;
    let spawned = Command::new(QEMU)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn();
    let mut launcher = match spawned {
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(VmError::NoQemu),
        other => other.map_err(VmError::file(QEMU))?,
    };
    match tokio::time::timeout(START_TIMEOUT, launcher.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(_)) => Err(VmError::Refused(last_words(files))),
        Ok(Err(error)) => Err(VmError::file(QEMU)(error)),
        Err(_) => {
            if let Some(process) = Process::of_pidfile(&files.pidfile()) {
                process.kill().map_err(VmError::file(files.pidfile()))?;
            }
            let seconds = START_TIMEOUT.as_secs();
            Err(VmError::Refused(format!(
                "it did not open its disk within {seconds} s. {}",
                last_words(files)
            )))
        }
    }
}

/// The end of what QEMU said, safe to print.
/// What QEMU itself said last.
pub(crate) fn last_words(files: &VmFiles) -> String {
    let bytes = fs::read(files.log()).unwrap_or_default();
    let end = &bytes[bytes.len().saturating_sub(QUOTED_BYTES)..];
    let text = printable(&String::from_utf8_lossy(end));
    if text.is_empty() { "it did not say why".to_owned() } else { text }
}

/// One line of QEMU's table of user-mode connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flow {
    /// `HOST_FORWARD` for a listening port, else the state of a TCP connection.
    pub(crate) state: String,
    /// The port on the host's side.
    pub(crate) from_port: u16,
    /// The port on the guest's side.
    pub(crate) to_port: u16,
}

/// Reads the TCP lines of `info usernet`; all others are not ours.
fn flows(table: &str) -> Vec<Flow> {
    let flow = |line: &str| {
        let state = line.trim_start().strip_prefix("TCP[")?;
        let (state, rest) = state.split_once(']')?;
        // Descriptor, source address and port, destination address and port, two queue lengths.
        let mut words = rest.split_ascii_whitespace().skip(2);
        let from_port = words.next()?.parse().ok()?;
        let to_port = words.nth(1)?.parse().ok()?;
        Some(Flow { state: state.to_owned(), from_port, to_port })
    };
    table.lines().filter_map(flow).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_user_connections_is_read_and_other_lines_are_skipped() {
        let table = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n\
            \x20 TCP[SYN_SENT]      27       127.0.0.1 42387       10.0.2.15    22     0     0\r\n\
            \x20 TCP[HOST_FORWARD]  16       127.0.0.1 42387       10.0.2.15    22     0     0\r\n\
            \x20 UDP[222 sec]      100       10.0.2.15  5355     224.0.0.252  5355     0     0\r\n\
            \x20 TCP[x] 1 2\r\n  TCP[";
        let flow = |state: &str| Flow { state: state.to_owned(), from_port: 42387, to_port: 22 };
        assert_eq!(flows(table), [flow("SYN_SENT"), flow("HOST_FORWARD")]);
    }

    #[test]
    fn what_qemu_said_is_quoted_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let files = VmFiles::new(dir.path().to_owned());
        assert_eq!(last_words(&files), "it did not say why");
        fs::write(files.log(), b"qemu: no\x1b[31m\xff\n").unwrap();
        assert_eq!(last_words(&files), "qemu: no [31m\u{fffd}");
    }

    #[test]
    fn a_directory_without_a_vm_has_none_to_adopt() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Qemu::adopt(dir.path()).is_none());
        assert!(Qemu::adopt(&dir.path().join("missing")).is_none());
    }
}
