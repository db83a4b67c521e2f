//! Which hardware a guest sees, so that another QEMU, on another node, can be the very same machine.
//!
//! - *Machine type:* `q35` means another machine in each release of QEMU. It is resolved to the versioned name
//!   at a VM's start and remembered; later releases know older names for years, earlier ones refuse newer.
//! - *Processor:* TCG's `max` depends on QEMU's release alone. KVM's `host` is the host's processor, and a guest
//!   that was told of an instruction dies without it: so with KVM the processor is remembered too, and a VM
//!   moves only to an equal one.

use std::fmt;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::OnceCell;

use super::accel::Accel;
use super::{QEMU, VmError};

/// The family of machines that guests are.
const FAMILY: &str = "q35";

/// How the versioned names of this family begin; a version follows.
const VERSIONED: &str = "pc-q35-";

/// Longest name of a machine type in bytes; QEMU's own are below 20.
const NAME_BYTES_MAX: usize = 32;

/// How long QEMU may take to list its machine types; it does in 0.1 s.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);

/// What has to be equal for a running guest to move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// The versioned machine type.
    machine: MachineType,
    /// The processor, where the guest sees the host's.
    host_cpu: Option<HostCpu>,
}

/// A versioned machine type of QEMU, such as `pc-q35-10.0`. Safe within an option list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct MachineType(String);

/// A host's processor as its guests see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HostCpu {
    /// What it calls itself.
    model: String,
    /// Hash of what it can do.
    features: String,
}

impl Platform {
    /// The platform of a VM that starts here: of the machine type that it had before, if it had one.
    pub(crate) async fn here(before: Option<&Platform>, accel: Accel) -> Result<Platform, VmError> {
        let machine = match before {
            Some(platform) => platform.machine.clone(),
            None => MachineType::installed().await?,
        };
        let host_cpu = match accel {
            Accel::Tcg => None,
            Accel::Kvm => Some(HostCpu::here()?),
        };
        Ok(Platform { machine, host_cpu })
    }

    /// Says why a guest that runs on the platform `there` could not go on here.
    pub(crate) async fn must_take(there: Option<&Platform>, accel: Accel) -> Result<(), VmError> {
        let there = there.ok_or_else(unknown)?;
        let here = Platform::here(Some(there), accel).await?;
        match (&here.host_cpu, &there.host_cpu) {
            (here, there) if here == there => Ok(()),
            (here, there) => Err(VmError::Unfit(format!(
                "under KVM a running guest moves only between equal processors: it runs on {}, and here is {}",
                HostCpu::shown(there.as_ref()),
                HostCpu::shown(here.as_ref()),
            ))),
        }
    }

    /// The machine type.
    pub(crate) fn machine(&self) -> &MachineType {
        &self.machine
    }
}

/// Says that nobody knows what a running guest runs on.
pub(crate) fn unknown() -> VmError {
    VmError::Unfit(
        "the VM was started by another version of VirtMan, which noted no machine type: stop it and start it again \
         before it is migrated"
            .to_owned(),
    )
}

impl MachineType {
    /// What the installed QEMU means by the family's name. Asked once in the life of this process.
    async fn installed() -> Result<MachineType, VmError> {
        static INSTALLED: OnceCell<MachineType> = OnceCell::const_new();
        INSTALLED.get_or_try_init(ask_qemu).await.cloned()
    }

    /// The name.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for MachineType {
    type Error = String;
    fn try_from(name: String) -> Result<MachineType, String> {
        let version = name.strip_prefix(VERSIONED).unwrap_or_default();
        let versioned = version.starts_with(|c: char| c.is_ascii_digit())
            && version.chars().all(|c| c.is_ascii_digit() || c == '.');
        match versioned && name.len() <= NAME_BYTES_MAX {
            true => Ok(MachineType(name)),
            false => Err(format!("{name:?} is not a machine type of the kind '{VERSIONED}10.0'")),
        }
    }
}

impl From<MachineType> for String {
    fn from(machine: MachineType) -> String {
        machine.0
    }
}

impl HostCpu {
    fn here() -> Result<HostCpu, VmError> {
        let path = "/proc/cpuinfo";
        let text = std::fs::read_to_string(path).map_err(VmError::file(path))?;
        HostCpu::of(&text).ok_or_else(|| VmError::Unfit(format!("{path} names no processor")))
    }

    /// The first processor of a `/proc/cpuinfo`; a host's are all alike.
    fn of(cpuinfo: &str) -> Option<HostCpu> {
        let value = |key: &str| {
            let lines = cpuinfo.lines().filter_map(|line| line.split_once(':'));
            lines.map(|(name, value)| (name.trim(), value.trim())).find(|(name, _)| *name == key)
        };
        let (_, model) = value("model name")?;
        let mut flags: Vec<&str> = value("flags")?.1.split_ascii_whitespace().collect();
        flags.sort_unstable();
        let features = blake3::hash(flags.join(" ").as_bytes()).to_hex()[..16].to_owned();
        Some(HostCpu { model: model.to_owned(), features })
    }

    fn shown(cpu: Option<&HostCpu>) -> String {
        cpu.map_or_else(|| "an unknown processor".to_owned(), HostCpu::to_string)
    }
}

impl fmt::Display for HostCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The model is another host's word: quoted, it cannot move a terminal's cursor.
        write!(f, "{:?} (features {:?})", self.model, self.features)
    }
}

async fn ask_qemu() -> Result<MachineType, VmError> {
    let mut command = Command::new(QEMU);
    command.args(["-machine", "help"]).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(LIST_TIMEOUT, command.output()).await {
        Err(_) => {
            let seconds = LIST_TIMEOUT.as_secs();
            return Err(VmError::Refused(format!("it did not list its machine types within {seconds} s")));
        }
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => return Err(VmError::NoQemu),
        Ok(output) => output.map_err(VmError::file(QEMU))?,
    };
    alias(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| VmError::Refused(format!("its list of machine types does not say what {FAMILY} is")))
}

/// What the family's name is an alias of, in QEMU's list of machine types.
fn alias(list: &str) -> Option<MachineType> {
    let line = list.lines().find(|line| line.split_ascii_whitespace().next() == Some(FAMILY))?;
    let (_, name) = line.rsplit_once("(alias of ")?;
    MachineType::try_from(name.trim_end().strip_suffix(')')?.to_owned()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_family_is_resolved_to_its_versioned_name() {
        let list = "Supported machines are:\n\
            pc-q35-9.2           Standard PC (Q35 + ICH9, 2009)\n\
            q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-10.0)\n\
            none                 empty machine\n";
        assert_eq!(alias(list).unwrap().as_str(), "pc-q35-10.0");
        assert_eq!(alias("q35  Standard PC\n"), None);
        assert_eq!(alias(""), None);
    }

    #[test]
    fn a_machine_type_from_outside_brings_no_option_along() {
        let read = |name: &str| serde_json::from_value::<MachineType>(serde_json::json!(name));
        assert_eq!(read("pc-q35-7.2").unwrap().as_str(), "pc-q35-7.2");
        for name in ["", "q35", "pc-q35-", "pc-q35-.", "pc-q35-10.0,accel=kvm", "pc-i440fx-10.0", "pc-q35-1 "]
        {
            assert!(read(name).is_err(), "{name:?}");
        }
        assert!(read(&format!("pc-q35-{}", "1".repeat(NAME_BYTES_MAX))).is_err());
    }

    #[test]
    fn processors_are_equal_if_model_and_features_are_in_whatever_order() {
        let text = |model: &str, flags: &str| {
            format!(
                "processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\nbugs\t\t:\n\nprocessor\t: 1\n"
            )
        };
        let cpu = |model, flags| HostCpu::of(&text(model, flags)).unwrap();
        assert_eq!(cpu("A: 1", "fpu sse"), cpu("A: 1", "sse fpu"));
        assert_ne!(cpu("A: 1", "fpu sse"), cpu("A: 1", "fpu"));
        assert_ne!(cpu("A: 1", "fpu"), cpu("A: 2", "fpu"));
        assert_eq!(HostCpu::of("processor : 0\n"), None);
    }

    #[tokio::test]
    async fn a_guest_moves_only_to_what_it_was_told_it_runs_on() {
        let machine = MachineType::try_from("pc-q35-10.0".to_owned()).unwrap();
        let same = Platform { machine: machine.clone(), host_cpu: None };
        Platform::must_take(Some(&same), Accel::Tcg).await.unwrap();
        let other = HostCpu { model: "Z80".to_owned(), features: "0".to_owned() };
        let other = Platform { machine, host_cpu: Some(other) };
        let refused = Platform::must_take(Some(&other), Accel::Kvm).await.unwrap_err();
        assert!(refused.to_string().contains("Z80"), "{refused}");
        let refused = Platform::must_take(None, Accel::Tcg).await.unwrap_err();
        assert!(refused.to_string().contains("stop it and start it again"), "{refused}");
    }
}
