//! A process that we did not keep as a child, identified so that a reused number is never mistaken for it.
//!
//! A QEMU is known by its command line: it holds `-pidfile` with the path of its VM's directory, which no
//! other process does. The pidfd is opened first and the command line read after, so that what was checked
//! is what the pidfd means, for as long as it is open. This also finds a QEMU whose daemon died between
//! starting it and noting anything down.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Longest command line in bytes that is looked at; ours are below 4 KiB.
const COMMAND_LINE_BYTES_MAX: u64 = 64 * 1024;

/// A live process whose identity was checked.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// The live process whose number stands in `pidfile` and whose command line names that file after
    /// `-pidfile`; `None` if there is none.
    pub(crate) fn of_pidfile(pidfile: &Path) -> Option<Process> {
        let text = std::fs::read_to_string(pidfile).ok()?;
        let number: i32 = text.trim().parse().ok().filter(|&number| number > 0)?;
        let pid = Pid::from_raw(number)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let command_line = read_bounded(&format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        names_pidfile(&command_line, pidfile.as_os_str()).then_some(Process { pid, pidfd })
    }

    /// The process number, for people to read.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// The argument that follows `flag` on its command line. `None` too if the process has ended.
    pub(crate) fn argument_after(&self, flag: &str) -> Option<String> {
        let command_line = read_bounded(&format!("/proc/{}/cmdline", self.pid())).ok()?;
        let mut arguments = command_line.split(|&byte| byte == 0);
        arguments.find(|argument| *argument == flag.as_bytes())?;
        String::from_utf8(arguments.next()?.to_vec()).ok()
    }

    /// Ends the process at once. No error if it has ended already.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Waits until the process has ended. May be cancelled and called again.
    pub(crate) async fn exited(&self) -> io::Result<()> {
        wait_readable(self.pidfd.try_clone()?).await
    }
}

/// Waits until a descriptor that epoll can watch has something to read; a pidfd has once its process ended.
pub(crate) async fn wait_readable(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned by the `AsyncFd` from here on, and never replaced or closed before it.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE)? };
    let _ready = fd.readable().await?;
    Ok(())
}

fn read_bounded(path: &str) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(COMMAND_LINE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn names_pidfile(command_line: &[u8], pidfile: &OsStr) -> bool {
    let arguments: Vec<&[u8]> = command_line.split(|&byte| byte == 0).collect();
    arguments.windows(2).any(|pair| pair[0] == b"-pidfile" && pair[1] == pidfile.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Child, Command, Stdio};

    /// A process with the command line of a QEMU: a shell that waits for its standard input to end.
    fn impostor(pidfile: &Path) -> Child {
        let mut child = Command::new("sh")
            .args(["-c", "echo ready; read line", "-pidfile"])
            .arg(pidfile)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Before its first word, the kernel may not yet show the new command line.
        let mut word = [0; 5];
        child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        std::fs::write(pidfile, format!("{}\n", child.id())).unwrap();
        child
    }

    #[tokio::test]
    async fn a_process_is_found_by_its_pidfile_and_its_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().join("qemu.pid");
        let mut child = impostor(&pidfile);
        let process = Process::of_pidfile(&pidfile).expect("the process lives");
        assert_eq!(process.pid().unsigned_abs(), child.id());
        process.kill().unwrap();
        process.exited().await.unwrap();
        child.wait().unwrap();
        assert!(Process::of_pidfile(&pidfile).is_none(), "an ended process is not found");
        process.kill().expect("killing it again does nothing");
    }

    #[test]
    fn a_reused_number_is_not_mistaken_for_the_vm() {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().join("qemu.pid");
        let other = dir.path().join("other.pid");
        let mut child = impostor(&other);
        std::fs::copy(&other, &pidfile).unwrap();
        assert!(Process::of_pidfile(&pidfile).is_none(), "the number belongs to another VM's process");
        assert!(Process::of_pidfile(&other).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_pidfile_with_nonsense_names_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let pidfile = dir.path().join("qemu.pid");
        for text in ["", "abc", "0", "-1", "99999999999999"] {
            std::fs::write(&pidfile, text).unwrap();
            assert!(Process::of_pidfile(&pidfile).is_none(), "{text:?}");
        }
    }
}
