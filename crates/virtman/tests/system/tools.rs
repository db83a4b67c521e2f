//! Foreign programs that tests judge the product by, and small helpers around processes and time.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// How long a foreign tool may take: a whole image over three levels on a busy machine.
const TOOL_TIMEOUT_SECONDS: &str = "240";

/// Runs a foreign tool to its end and returns what it said; fails the test if the tool is missing, takes
/// too long or fails.
pub(crate) fn tool(package: &str, program: &str, args: &[&str]) -> String {
    let output = tool_output(package, program, args);
    assert!(output.status.success(), "{program} {args:?} failed:\n{}", both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The same, whatever the tool's exit status.
pub(crate) fn tool_output(package: &str, program: &str, args: &[&str]) -> Output {
    let output = Command::new("timeout").arg(TOOL_TIMEOUT_SECONDS).arg(program).args(args).output();
    let output = output.expect("coreutils' timeout runs");
    let missing = output.status.code() == Some(127);
    assert!(
        !missing,
        "{program} is missing: install the Debian package {package} (scripts/install-tools test)"
    );
    output
}

/// What a process printed on both streams.
pub(crate) fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

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

/// The bootable Debian image that `scripts/guest-image` made.
pub(crate) fn guest_image() -> PathBuf {
    let path = std::env::var_os("VIRTMAN_GUEST_IMAGE")
        .expect("VIRTMAN_GUEST_IMAGE names no image: run scripts/test, which builds one");
    let path = PathBuf::from(path);
    assert!(path.is_file(), "VIRTMAN_GUEST_IMAGE={} is no file", path.display());
    path
}

/// Writes a raw disk of `mib` MiB with data, holes and zeroes in it, the same for the same seed.
pub(crate) fn make_raw(path: &Path, mib: usize, seed: u64) {
    use std::io::{Seek, SeekFrom, Write};
    let mut file = std::fs::File::create(path).unwrap();
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
