//! Processes that end with their guards, what they cost, and the program that is measured.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Outcome;

/// Ticks per second in `/proc/PID/stat`: fixed by the kernel's interface (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

/// How long a daemon may take until it is ready.
const START_TIME_MAX: Duration = Duration::from_secs(60);

/// Runs a command to its end and gives its standard output. The error shows what it said.
pub(super) fn output(command: &mut Command) -> Outcome<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|e| format!("cannot run {name}: {e}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name} failed ({}): {}", output.status, said.trim()));
    }
    String::from_utf8(output.stdout).map_err(|_| format!("{name} printed something that is not text"))
}

/// A background process, killed when dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    child: Child,
}

impl Daemon {
    /// Starts `command`; what it prints goes nowhere.
    pub(super) fn spawn(command: &mut Command) -> Outcome<Daemon> {
        Daemon::start(command.stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// Starts `command`; what it prints goes where `command` says.
    pub(super) fn start(command: &mut Command) -> Outcome<Daemon> {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null());
        let child = command.spawn().map_err(|e| format!("cannot run {name}: {e}"))?;
        Ok(Daemon { name, child })
    }

    /// Its process, for signals.
    pub(super) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Processor time of all its threads so far, in seconds, to 10 ms.
    pub(super) fn cpu_seconds(&self) -> Outcome<f64> {
        cpu_seconds(&self.child.id().to_string())
    }

    /// Its resident memory: all, and the part that is not of a file.
    pub(super) fn memory(&self) -> Outcome<Memory> {
        let path = format!("/proc/{}/status", self.child.id());
        let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {path}: {e}"))?;
        let kib = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            line.split_whitespace().nth(1)?.parse::<f64>().ok()
        };
        let (Some(resident), Some(anonymous)) = (kib("VmRSS:"), kib("RssAnon:")) else {
            return Err(format!("{path} does not tell the memory of {}", self.name));
        };
        Ok(Memory { resident_mib: resident / 1024.0, anonymous_mib: anonymous / 1024.0 })
    }

    /// Why it is not running any more, if so.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(format!("{} ended early ({status})", self.name))
    }

    /// Asks it to stop as a service manager does, and waits until it has.
    pub(super) fn stop(mut self) -> Outcome {
        output(Command::new("kill").args(["-TERM", &self.child.id().to_string()]))?;
        self.child.wait().map_err(|e| format!("cannot wait for {}: {e}", self.name))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, and then both say so.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Resident memory of a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    pub(super) resident_mib: f64,
    pub(super) anonymous_mib: f64,
}

/// Processor time of a process so far, in seconds; `self` is this one.
pub(super) fn cpu_seconds(pid: &str) -> Outcome<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).map_err(|e| format!("cannot read {path}: {e}"))?;
    ticks(&text)
        .map(|ticks| ticks as f64 / TICKS_PER_SECOND)
        .ok_or_else(|| format!("{path} has another form"))
}

/// User and system time of a line of `/proc/PID/stat`. The name in it may hold blanks and brackets.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system) = (fields.next()?, fields.next()?);
    Some(user.parse::<u64>().ok()? + system.parse::<u64>().ok()?)
}

/// Reads a file once, so that the page cache holds it.
pub(super) fn warm(path: &Path) -> Outcome {
    let failed = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let mut file = fs::File::open(path).map_err(failed)?;
    let mut buf = vec![0; 1 << 20];
    while file.read(&mut buf).map_err(failed)? > 0 {}
    Ok(())
}

/// Writes out what the kernel holds back, so that nobody pays for another's writes.
pub(super) fn settle_disks() -> Outcome {
    output(&mut Command::new("sync")).map(drop)
}

/// Starts a daemon and waits until it says that it is ready, in the way in which service managers are told.
/// What it prints goes where `command` says; `dir` is for the socket on which it says so.
pub(super) fn spawn_until_ready(dir: &Path, command: &mut Command) -> Outcome<(Daemon, Duration)> {
    let path: PathBuf = dir.join("ready");
    // The socket of the daemon before.
    let _ = fs::remove_file(&path);
    let failed = |e: std::io::Error| format!("cannot listen at {}: {e}", path.display());
    let socket = UnixDatagram::bind(&path).map_err(failed)?;
    // In short steps, so that a daemon that ends is noticed.
    socket.set_read_timeout(Some(Duration::from_millis(100))).map_err(failed)?;
    let begin = Instant::now();
    let mut daemon = Daemon::start(command.env("NOTIFY_SOCKET", &path))?;
    let mut message = [0; 4096];
    while begin.elapsed() < START_TIME_MAX {
        if let Ok(len) = socket.recv(&mut message)
            && message[..len].starts_with(b"READY=1")
        {
            return Ok((daemon, begin.elapsed()));
        }
        if let Some(why) = daemon.ended() {
            return Err(why);
        }
    }
    Err(format!("a daemon was not ready within {START_TIME_MAX:?}"))
}

/// The released program.
#[derive(Debug)]
pub(super) struct Virtman {
    path: PathBuf,
}

impl Virtman {
    /// The program at `path`, which was built before; without one it is built for the benchmark `who`.
    pub(super) fn given_or_built(path: Option<&Path>, who: &str) -> Outcome<Virtman> {
        let Some(path) = path else {
            eprintln!("{who}: building the program");
            return Virtman::build();
        };
        Ok(Virtman { path: fs::canonicalize(path).map_err(|e| format!("{}: {e}", path.display()))? })
    }

    /// Builds it as it is released.
    fn build() -> Outcome<Virtman> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["build", "--release", "--locked", "--package", "virtman"]);
        command.args(["--message-format", "json-render-diagnostics"]);
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        let messages = output(&mut command)?;
        let path = messages.lines().filter_map(executable).next_back();
        path.map(|path| Virtman { path }).ok_or_else(|| "cargo built no program 'virtman'".to_owned())
    }

    /// A program that was built before.
    pub(super) fn at(path: &Path) -> Virtman {
        Virtman { path: path.to_owned() }
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A command of it.
    pub(super) fn command(&self) -> Command {
        Command::new(&self.path)
    }
}

/// The program that a message of cargo's is about.
fn executable(message: &str) -> Option<PathBuf> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let is_ours = message["target"]["name"] == "virtman";
    message["executable"].as_str().filter(|_| is_ours).map(PathBuf::from)
}

/// Calls `probe` until it gives something, for at most `limit`.
pub(super) fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Outcome<T> {
    /// Short against everything that is waited for.
    const PAUSE: Duration = Duration::from_millis(5);
    let begin = Instant::now();
    loop {
        if let Some(found) = probe() {
            return Ok(found);
        }
        if begin.elapsed() > limit {
            return Err(format!("{what} did not come within {limit:?}"));
        }
        std::thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use super::*;

    #[test]
    fn processor_time_is_found_behind_a_name_with_brackets() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194304 10 20 30 40 150 25 1 2 20 0 1 0 100 1 1";
        assert_eq!(ticks(stat), Some(175));
        assert_eq!(ticks("nothing"), None);
    }

    #[test]
    fn a_guarded_process_ends_with_its_guard() {
        let daemon = Daemon::spawn(Command::new("sleep").arg("1000")).unwrap();
        // An open one stays that process's, though another may get its number.
        let mut stat = fs::File::open(format!("/proc/{}/stat", daemon.child.id())).unwrap();
        assert!(stat.read(&mut [0]).is_ok());
        drop(daemon);
        assert!(stat.rewind().and_then(|()| stat.read(&mut [0])).is_err());
    }

    #[test]
    fn a_failing_command_is_told_with_what_it_said() {
        let error = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).unwrap_err();
        assert!(error.contains("why") && error.contains('3'), "{error}");
    }
}
