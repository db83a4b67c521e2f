//! The foreign programs that are measured or measure, and where Debian has them.

use std::env;
use std::path::Path;

use super::Outcome;

/// A foreign program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tool {
    program: &'static str,
    package: &'static str,
}

pub(super) const FIO: Tool = Tool { program: "fio", package: "fio" };
pub(super) const QEMU_STORAGE_DAEMON: Tool = Tool { program: "qemu-storage-daemon", package: "qemu-utils" };
pub(super) const QEMU_IMG: Tool = Tool { program: "qemu-img", package: "qemu-utils" };
pub(super) const QEMU_NBD: Tool = Tool { program: "qemu-nbd", package: "qemu-utils" };
pub(super) const QEMU_SYSTEM: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };
pub(super) const ISCSI_PERF: Tool = Tool { program: "iscsi-perf", package: "libiscsi-bin" };
pub(super) const TGTD: Tool = Tool { program: "tgtd", package: "tgt" };
pub(super) const NBDKIT: Tool = Tool { program: "nbdkit", package: "nbdkit" };
pub(super) const PYTHON: Tool = Tool { program: "python3", package: "python3" };
pub(super) const CURL: Tool = Tool { program: "curl", package: "curl" };
pub(super) const IP: Tool = Tool { program: "ip", package: "iproute2" };
pub(super) const TC: Tool = Tool { program: "tc", package: "iproute2" };
pub(super) const UNSHARE: Tool = Tool { program: "unshare", package: "util-linux" };
pub(super) const SETPRIV: Tool = Tool { program: "setpriv", package: "util-linux" };
pub(super) const NSENTER: Tool = Tool { program: "nsenter", package: "util-linux" };
pub(super) const B3SUM: Tool = Tool { program: "b3sum", package: "b3sum" };

impl Tool {
    fn is_installed(self) -> bool {
        let dirs = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&dirs).any(|dir| Path::new(&dir).join(self.program).is_file())
    }
}

/// Refuses to begin while a tool of a wanted benchmark is missing, and names the packages that have them.
pub(super) fn check(needs: &[(bool, &[Tool])]) -> Outcome {
    let needed = needs.iter().filter(|(wanted, _)| *wanted).flat_map(|(_, tools)| tools.iter());
    let missing: Vec<Tool> = needed.copied().filter(|tool| !tool.is_installed()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
    let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    Err(format!("{} not found: run 'apt-get install {}'", programs.join(", "), packages.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MISSING: Tool = Tool { program: "no-such-program-anywhere", package: "no-such-package" };

    #[test]
    fn a_missing_tool_is_named_with_its_package_and_only_if_it_is_needed() {
        let error = check(&[(true, &[MISSING])]).unwrap_err();
        assert!(
            error.contains(MISSING.program) && error.contains("apt-get install no-such-package"),
            "{error}"
        );
        assert_eq!(check(&[(false, &[MISSING])]), Ok(()));
    }
}
