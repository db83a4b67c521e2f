//! Foreign programs that tests judge the product by, and small helpers around processes and time.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) use testkit::foreign::{both, tool, tool_output};

/// How long what takes at most a few seconds on an idle machine may take on one that is busy with other things.
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Waits until `look` finds something; fails the test with `what` when `limit` has passed.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < limit, "waited {limit:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A command that runs beside the test, and ends with its value at the latest.
pub(crate) struct Background {
    process: Child,
    printed: PathBuf,
    complained: PathBuf,
}

impl Background {
    /// Starts `command`, and keeps what it prints in files whose names begin with `file`.
    pub(crate) fn start(mut command: Command, file: &Path) -> Background {
        let (printed, complained) = (file.with_extension("out"), file.with_extension("err"));
        command.stdin(Stdio::piped());
        command.stdout(File::create(&printed).unwrap()).stderr(File::create(&complained).unwrap());
        Background { process: command.spawn().unwrap(), printed, complained }
    }

    /// Writes to its standard input.
    pub(crate) fn say(&mut self, text: &str) {
        self.process.stdin.as_mut().expect("it is a pipe").write_all(text.as_bytes()).unwrap();
    }

    /// What it printed on its standard output so far.
    pub(crate) fn printed(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.printed).unwrap()).into_owned()
    }

    /// Fails the test if it has ended.
    pub(crate) fn assert_running(&mut self) {
        let ended = self.process.try_wait().unwrap();
        assert!(ended.is_none(), "it ended: {ended:?}\n{}{}", self.printed(), self.complained());
    }

    /// Waits until it ends, which it must do with success, and returns its standard output.
    pub(crate) fn finish(mut self, limit: Duration) -> String {
        let what = format!("{} has finished", self.printed.display());
        let status = wait_for(&what, limit, || self.process.try_wait().unwrap());
        assert!(status.success(), "{status}\n{}{}", self.printed(), self.complained());
        self.printed()
    }

    /// Waits until it ends, which it must do without success, and returns what it says.
    pub(crate) fn fail(mut self, limit: Duration) -> String {
        let what = format!("{} has failed", self.printed.display());
        let status = wait_for(&what, limit, || self.process.try_wait().unwrap());
        assert!(!status.success(), "it should fail, but printed:\n{}", self.printed());
        self.complained()
    }

    fn complained(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.complained).unwrap()).into_owned()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The bootable Debian image that `scripts/guest-image` made.
pub(crate) fn guest_image() -> PathBuf {
    let path = std::env::var_os("VIRTMAN_GUEST_IMAGE")
        .expect("VIRTMAN_GUEST_IMAGE names no image: run scripts/test, which builds one");
    let path = PathBuf::from(path);
    assert!(path.is_file(), "VIRTMAN_GUEST_IMAGE={} is not a file", path.display());
    path
}

/// Writes a raw disk of `mib` MiB with data, holes and zeroes in it, the same for the same seed.
pub(crate) fn make_raw(path: &Path, mib: usize, seed: u64) {
    use std::io::{Seek, SeekFrom};
    let mut file = File::create(path).unwrap();
    let mut state = seed | 1;
    for at in 0..mib {
        // One MiB in three stays a hole, one is written zeroes, one is data.
        match at % 3 {
            0 => {
                let mut block = vec![0u8; 1 << 20];
                for word in block.chunks_exact_mut(8) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    word.copy_from_slice(&state.to_le_bytes());
                }
                file.seek(SeekFrom::Start((at as u64) << 20)).unwrap();
                file.write_all(&block).unwrap();
            }
            1 => {
                file.seek(SeekFrom::Start((at as u64) << 20)).unwrap();
                file.write_all(&vec![0u8; 1 << 20]).unwrap();
            }
            _ => {}
        }
    }
    file.set_len((mib as u64) << 20).unwrap();
}

/// Compares two disks, files or URIs, over their whole length, byte for byte.
pub(crate) fn assert_same(found: &str, expected: &Path) {
    let expected = expected.to_str().unwrap();
    tool("qemu-utils", "qemu-img", &["compare", "-f", "raw", "-F", "raw", found, expected]);
}

/// Runs commands of `qemu-io` on a raw disk, a file or a URI, one after the other.
pub(crate) fn qemu_io(disk: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", "raw"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(disk);
    let said = tool("qemu-utils", "qemu-io", &args);
    // A read with a pattern that differs is only printed by some versions.
    assert!(!said.contains("Pattern verification failed"), "qemu-io {commands:?}: {said}");
    said
}

/// A `qemu-io` that has a raw disk open and takes its commands one by one. What it prints is kept in files whose names
/// begin with `file`.
pub(crate) fn nbd_writer(disk: &str, file: &Path) -> Background {
    let mut command = Command::new(testkit::foreign::find("qemu-utils", "qemu-io"));
    command.args(["-f", "raw", disk]);
    Background::start(command, file)
}
