//! Whether guests run on KVM or on QEMU's own translator (TCG).
//!
//! That `/dev/kvm` opens does not mean that a stock kernel runs on it: there are hosts (paravirtual KVM inside
//! a cloud VM) where simple code runs and every stock kernel dies. So KVM is used only if all of this holds:
//!
//! 1. `/dev/kvm` opens for reading and writing;
//! 2. the processor itself offers virtualization (`vmx` or `svm`): without it, KVM is a paravirtual kind whose
//!    guests need a kernel made for it;
//! 3. a boot sector runs on it under the very processor model that guests get, and says so.
//!
//! Everything else means TCG, which is slow and always works. The user can decide otherwise.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::process::Stdio;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::{QEMU, VmError};

/// How long the probe's boot sector may take. The firmware is done in 0.3 s even without KVM; a KVM that needs
/// this long is of no use.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the boot sector writes to QEMU's debug exit device.
const PROBE_WRITES: u8 = 0x2a;

/// QEMU's exit status for this byte: `(byte << 1) | 1`. No other way to end gives it.
const PROBE_STATUS: i32 = ((PROBE_WRITES as i32) << 1) | 1;

/// Size of the probe's disk: the firmware reads nothing from one that is smaller than a cylinder.
const PROBE_DISK_BYTES: u64 = 1 << 20;

/// How the instructions of guests are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the processor, through the kernel.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelMode {
    /// KVM if it is usable.
    #[default]
    Auto,
    /// This one, whatever the probe would say.
    Only(Accel),
}

/// What is used, and why.
#[derive(Debug, Clone)]
pub struct AccelChoice {
    /// What is used.
    pub accel: Accel,
    /// Why, as the end of a sentence for the user.
    pub reason: String,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Accel::Kvm => "KVM",
            Accel::Tcg => "TCG",
        })
    }
}

impl fmt::Display for AccelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guests run under {}: {}", self.accel, self.reason)
    }
}

impl FromStr for AccelMode {
    type Err = String;
    fn from_str(text: &str) -> Result<AccelMode, String> {
        match text {
            "auto" => Ok(AccelMode::Auto),
            "kvm" => Ok(AccelMode::Only(Accel::Kvm)),
            "tcg" => Ok(AccelMode::Only(Accel::Tcg)),
            _ => Err(format!("'{text}' is not a way to run guests: use auto, kvm or tcg")),
        }
    }
}

impl AccelMode {
    /// Decides how guests are run. The probe is made once in the life of this process.
    pub async fn decide(self) -> Result<AccelChoice, VmError> {
        static PROBED: OnceCell<AccelChoice> = OnceCell::const_new();
        match self {
            AccelMode::Only(accel) => Ok(AccelChoice { accel, reason: "as asked for".to_owned() }),
            AccelMode::Auto => PROBED.get_or_try_init(probe).await.cloned(),
        }
    }
}

async fn probe() -> Result<AccelChoice, VmError> {
    let tcg = |reason: String| Ok(AccelChoice { accel: Accel::Tcg, reason });
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return tcg(format!("/dev/kvm cannot be opened ({error})"));
    }
    // An unreadable list offers nothing.
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !offers_virtualization(&processors) {
        return tcg(
            "the processor offers no virtualization to this machine, so its /dev/kvm runs no stock kernel"
                .to_owned(),
        );
    }
    match boot_sector_runs(&["-accel", "kvm", "-cpu", "host"]).await? {
        true => Ok(AccelChoice { accel: Accel::Kvm, reason: "the processor and /dev/kvm work".to_owned() }),
        false => tcg("/dev/kvm opens, but a boot sector does not run on it".to_owned()),
    }
}

/// Whether a `/proc/cpuinfo` lists Intel's or AMD's virtualization among the processor's flags.
fn offers_virtualization(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter(|line| line.starts_with("flags"));
    flags.flat_map(str::split_ascii_whitespace).any(|flag| flag == "vmx" || flag == "svm")
}

/// The 512 bytes that a BIOS loads and jumps to: they write [`PROBE_WRITES`] to port 0x501 and halt.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let code = [0xba, 0x01, 0x05, 0xb0, PROBE_WRITES, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Whether the boot sector says within [`PROBE_TIMEOUT`] that it ran on a machine with these options. All
/// other ends (refusal, crash, silence) are a no; only a missing QEMU is an error.
async fn boot_sector_runs(accel: &[&str]) -> Result<bool, VmError> {
    let mut disk = tempfile::NamedTempFile::new().map_err(VmError::file(std::env::temp_dir()))?;
    let written = disk.write_all(&boot_sector()).and_then(|()| disk.as_file().set_len(PROBE_DISK_BYTES));
    written.map_err(VmError::file(disk.path()))?;
    let drive = serde_json::json!({
        "driver": "raw", "node-name": "sector", "read-only": true,
        "file": { "driver": "file", "filename": disk.path().to_string_lossy(), "read-only": true },
    });
    let mut command = Command::new(QEMU);
    command
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-machine", "q35", "-m", "32M"])
        .args(accel)
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=0x01"])
        .args(["-blockdev", &drive.to_string(), "-device", "virtio-blk-pci,drive=sector,bootindex=0"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(VmError::NoQemu),
        other => other.map_err(VmError::file(QEMU))?,
    };
    match tokio::time::timeout(PROBE_TIMEOUT, child.wait()).await {
        Ok(status) => Ok(status.is_ok_and(|status| status.code() == Some(PROBE_STATUS))),
        Err(_) => {
            // It ends with the drop at the latest; here we also wait, so that nothing is left behind.
            child.kill().await.map_err(VmError::file(QEMU))?;
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processors_own_virtualization_counts() {
        assert!(offers_virtualization("model name\t: x\nflags\t\t: fpu vme svm sse\n"));
        assert!(offers_virtualization("flags : fpu vmx\nvmx flags\t: vnmi\n"));
        assert!(!offers_virtualization("model name : svm vmx\nflags\t\t: fpu hypervisor svm_lock\n"));
        assert!(!offers_virtualization(""));
    }

    #[test]
    fn a_wish_is_auto_kvm_or_tcg() {
        assert_eq!("auto".parse(), Ok(AccelMode::Auto));
        assert_eq!("kvm".parse(), Ok(AccelMode::Only(Accel::Kvm)));
        assert_eq!("tcg".parse(), Ok(AccelMode::Only(Accel::Tcg)));
        assert!("hvf".parse::<AccelMode>().unwrap_err().contains("hvf"));
    }

    /// Without this, a boot sector that can never report would look like a machine without KVM.
    #[tokio::test]
    async fn the_boot_sector_reports_when_it_runs_and_an_accelerator_that_fails_is_a_no() {
        match boot_sector_runs(&["-accel", "tcg"]).await {
            Err(VmError::NoQemu) => eprintln!("skipped: {}", VmError::NoQemu),
            other => {
                assert!(other.unwrap(), "TCG runs everything");
                assert!(!boot_sector_runs(&["-accel", "no-such-accelerator"]).await.unwrap());
            }
        }
    }
}
