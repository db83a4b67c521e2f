//! Programs of other people that tests judge the product by. One that is missing, or takes too long, fails its test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// How long a foreign tool may take: a whole image over three levels on a busy machine.
pub const TOOL_TIME_MAX: Duration = Duration::from_secs(600);

/// What coreutils' `timeout` exits with when it had to end its command.
const TIMED_OUT: i32 = 124;

/// The path of a program; fails the test with the name of its Debian package if it is missing.
pub fn find(package: &str, program: &str) -> PathBuf {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|dir| dir.join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{program} is missing: install the Debian package {package} (scripts/install-tools test)")
    })
}

/// Runs a tool to its end and returns what it printed on its standard output; fails the test if it fails.
pub fn tool(package: &str, program: &str, args: &[&str]) -> String {
    tool_in(Path::new("."), package, program, args)
}

/// The same in a directory.
pub fn tool_in(dir: &Path, package: &str, program: &str, args: &[&str]) -> String {
    let output = output_in(dir, package, program, args);
    assert!(output.status.success(), "{program} {args:?}: {}\n{}", output.status, both(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a tool to its end, whatever its exit status.
pub fn tool_output(package: &str, program: &str, args: &[&str]) -> Output {
    output_in(Path::new("."), package, program, args)
}

fn output_in(dir: &Path, package: &str, program: &str, args: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.arg(TOOL_TIME_MAX.as_secs().to_string()).arg(find(package, program)).args(args);
    let output = command.current_dir(dir).output().expect("coreutils' timeout runs");
    assert_ne!(output.status.code(), Some(TIMED_OUT), "{program} {args:?} did not end:\n{}", both(&output));
    output
}

/// Runs a command to its end beside the test's other tasks, whatever its exit status.
pub async fn finish(command: &mut tokio::process::Command) -> Output {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(TOOL_TIME_MAX, command.output()).await;
    output.unwrap_or_else(|_| panic!("{:?} did not end", command.as_std())).unwrap()
}

/// What a process printed on both streams.
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[cfg(test)]
mod tests {
    #[test]
    #[should_panic(expected = "install the Debian package no-such-package")]
    fn a_missing_program_is_told_with_its_package() {
        super::tool("no-such-package", "no-such-program", &[]);
    }
}
