//! Namespaces of a storm's own, so that nothing of it outlives the command, whatever happens.
//!
//! The command runs itself again as the first process of a new process namespace, in new mount and network
//! namespaces: hosts, bridges, mounts, files (all on a private tmpfs) and daemons exist in these alone. When
//! the first process ends, the kernel ends all others and drops the rest. It ends with the outer command at
//! the latest, `kill -9` included: `setpriv` asks the kernel to kill `unshare` with its parent, and `unshare`
//! asks the same for what it starts.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use super::super::Outcome;
use super::super::process::output;

/// Set for the command that runs inside.
const INSIDE: &str = "VIRTMAN_STORM_INSIDE";

/// The private tmpfs: `ip netns` keeps its namespaces in `/run/netns` and nowhere else.
const PRIVATE: &str = "/run";

/// Where files of the storm lie in it. Short, because sockets lie in it.
const FILES: &str = "/run/s";

/// How much memory the files may take; a storm of 32 nodes takes about 8 GiB with its caches.
const FILES_SIZE: &str = "80%";

/// Whether this is the command inside.
pub(super) fn is_inside() -> bool {
    env::var_os(INSIDE).is_some() && std::process::id() == 1
}

/// Runs this command again, inside, and gives how it ended.
pub(super) fn run_inside() -> Outcome<ExitStatus> {
    if !rustix::process::geteuid().is_root() {
        return Err("a storm makes network namespaces, which only root may: run it with sudo".to_owned());
    }
    let program = env::current_exe().map_err(|e| format!("cannot find this program: {e}"))?;
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.args([
        "unshare",
        "--mount",
        "--net",
        "--pid",
        "--fork",
        "--kill-child=KILL",
        "--mount-proc",
        "--",
    ]);
    command.arg(program).args(env::args_os().skip(1)).env(INSIDE, "1");
    command.status().map_err(|e| format!("cannot run setpriv and unshare of util-linux: {e}"))
}

/// Inside: puts private file systems over those that show or keep what is not the storm's, and gives the
/// directory for files. What lies below `/run` cannot be opened by name any more.
pub(super) fn settle() -> Outcome<PathBuf> {
    let size = format!("size={FILES_SIZE}");
    output(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs", PRIVATE]))?;
    // The counters of this network namespace, instead of the outer one's.
    output(Command::new("mount").args(["-t", "sysfs", "sysfs", "/sys"]))?;
    fs::create_dir(FILES).map_err(|e| format!("cannot make {FILES}: {e}"))?;
    Ok(Path::new(FILES).to_owned())
}
