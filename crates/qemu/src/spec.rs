//! What a VM is made of, and the QEMU command line that says so.
//!
//! Options that hold a path or a name from outside are given as JSON, where a comma is a comma; the two kinds
//! that take no JSON in every supported QEMU (7.2 and later) double their commas instead.

use std::path::{Path, PathBuf};

use block::VmName;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::VmError;
use super::accel::Accel;
use super::machine::{MachineType, Platform};

/// Seconds for which a guest's requests wait for an NBD server that went away, before the guest sees an
/// error: a year, which means that guests see latency and not errors.
const NBD_RECONNECT_SECONDS: u32 = 365 * 24 * 3600;

/// Size of QEMU's buffer of translated code in MiB, with TCG only. Without a bound it takes up to 1 GiB for
/// each VM; a Linux boot translates less than 100 MiB.
const TCG_BUFFER_MIB: u32 = 128;

/// Longest path of a UNIX socket in bytes: the system's 108 with a zero at the end.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Longest serial number of a virtio disk (VIRTIO 1.2, section 5.2.6).
const SERIAL_BYTES_MAX: usize = 20;

/// What one VM is to be. With its seed and its disk at other paths it is the same machine on another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// The VM's name; also decides its hardware address.
    pub name: VmName,
    /// The disk that it boots from.
    pub disk: VmDisk,
    /// Its other disks.
    #[serde(default)]
    pub further_disks: Vec<VmDisk>,
    /// A NoCloud seed disk, attached read-only.
    pub seed: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Number of virtual processors.
    pub cpus: u32,
    /// How its instructions are run.
    pub accel: Accel,
    /// Boot this kernel instead of what the disk's boot sector leads to.
    pub boot: Option<DirectBoot>,
    /// TCP ports of the guest that can each be reached through a port of the host's loopback, which is chosen at
    /// start; see [`Qemu::forwarded_port`](super::Qemu::forwarded_port). The guest itself reaches out through
    /// QEMU's user-mode network, that is, through the host's own sockets.
    pub forward_ports: Vec<u16>,
    /// What happens when there is no room for what the guest writes.
    #[serde(default)]
    pub on_full: OnFull,
    /// What it runs on, which is decided at its first start.
    #[serde(default)]
    pub platform: Option<Platform>,
}

/// What happens when there is no room for what a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// The guest is paused, and goes on where it was once there is room.
    #[default]
    Pause,
    /// The guest is told, as by a physical disk that is broken.
    Report,
}

/// An NBD export on a UNIX socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDisk {
    /// The server's socket.
    pub socket: PathBuf,
    /// The name of the export.
    pub export: String,
    /// The serial number that the guest sees; of longer ones the first 20 bytes. None is shown if absent.
    #[serde(default)]
    pub serial: Option<String>,
}

/// A kernel that QEMU loads itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectBoot {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub append: String,
}

/// How a VM's life begins here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// As that of a machine that is switched on.
    AtOnce,
    /// With the memory of a guest that runs elsewhere; until that has come, and for as long as nobody says
    /// that it may go on, it stands still.
    Incoming,
}

/// Where in a VM's directory things are.
#[derive(Debug, Clone)]
pub(crate) struct VmFiles {
    dir: PathBuf,
}

impl VmFiles {
    /// `dir` must be absolute: QEMU changes its working directory.
    pub(crate) fn new(dir: PathBuf) -> VmFiles {
        VmFiles { dir }
    }

    pub(crate) fn record(&self) -> PathBuf {
        self.dir.join("qemu.json")
    }

    pub(crate) fn pidfile(&self) -> PathBuf {
        self.dir.join("qemu.pid")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    pub(crate) fn events_socket(&self) -> PathBuf {
        self.dir.join("events.sock")
    }

    pub(crate) fn migrate_socket(&self) -> PathBuf {
        self.dir.join("migrate.sock")
    }

    pub(crate) fn memory_socket(&self) -> PathBuf {
        self.dir.join("memory.sock")
    }

    pub(crate) fn console_socket(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    pub(crate) fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    pub(crate) fn console_log_before(&self) -> PathBuf {
        self.dir.join("console.log.1")
    }

    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// Is there from before the guest's file systems are frozen until they are thawed, so that a later daemon
    /// knows.
    pub(crate) fn frozen(&self) -> PathBuf {
        self.dir.join("frozen")
    }
}

/// The arguments with which QEMU becomes the VM `spec` on this kind of machine, with its files in `files`. Fails
/// if a path cannot be told to QEMU.
pub(crate) fn arguments(
    spec: &VmSpec,
    machine: &MachineType,
    files: &VmFiles,
    begin: Begin,
) -> Result<Vec<String>, VmError> {
    let mut line = CommandLine::default();
    line.add("-name", format!("guest={}", spec.name));
    line.flag("-no-user-config").flag("-nodefaults").flag("-daemonize");
    line.add("-display", "none");
    line.add("-pidfile", qemu_path(&files.pidfile())?);
    // Without this, what QEMU says later would go nowhere once it is in the background.
    line.add("-D", qemu_path(&files.log())?);
    line.add("-machine", format!("{},usb=off,vmport=off", machine.as_str()));
    match spec.accel {
        Accel::Kvm => line.add("-accel", "kvm").add("-cpu", "host"),
        Accel::Tcg => {
            line.add("-accel", format!("tcg,thread=multi,tb-size={TCG_BUFFER_MIB}")).add("-cpu", "max")
        }
    };
    line.add("-m", format!("{}M", spec.memory_mib)).add("-smp", spec.cpus.to_string());
    add_channels(&mut line, files)?;
    add_disks(&mut line, spec)?;
    add_network(&mut line, spec);
    line.add_json("-object", &json!({ "qom-type": "rng-builtin", "id": "rng" }));
    line.add_json("-device", &json!({ "driver": "virtio-rng-pci", "rng": "rng" }));
    if let Some(boot) = &spec.boot {
        line.add("-kernel", qemu_path(&boot.kernel)?).add("-append", &boot.append);
        if let Some(initrd) = &boot.initrd {
            line.add("-initrd", qemu_path(initrd)?);
        }
    }
    if begin == Begin::Incoming {
        // Where the memory comes from is said later; `-S` leaves the guest still when all of it is here.
        line.add("-incoming", "defer").flag("-S");
        qemu_socket_path(&files.memory_socket())?;
    }
    Ok(line.arguments)
}

/// The control sockets, the console and the guest agent's channel.
fn add_channels(line: &mut CommandLine, files: &VmFiles) -> Result<(), VmError> {
    let socket = |id: &str, path: &Path| -> Result<String, VmError> {
        let path = qemu_socket_path(path)?;
        Ok(format!("socket,id={id},server=on,wait=off,path={}", escaped(path)))
    };
    // One client at a time is served at each: so one for commands, and one for whoever stays and listens.
    for (id, path) in
        [("qmp", files.qmp_socket()), ("events", files.events_socket()), ("migrate", files.migrate_socket())]
    {
        line.add("-chardev", socket(id, &path)?).add("-mon", format!("chardev={id},mode=control"));
    }
    let log = files.console_log();
    let console = socket("console", &files.console_socket())?;
    line.add("-chardev", format!("{console},logfile={}", escaped(qemu_path(&log)?)));
    line.add("-serial", "chardev:console");
    line.add("-chardev", socket("agent", &files.agent_socket())?);
    line.add_json("-device", &json!({ "driver": "virtio-serial-pci" }));
    let port = json!({ "driver": "virtserialport", "chardev": "agent", "name": "org.qemu.guest_agent.0" });
    line.add_json("-device", &port);
    Ok(())
}

fn add_disks(line: &mut CommandLine, spec: &VmSpec) -> Result<(), VmError> {
    add_disk(line, spec, 0, &spec.disk)?;
    if let Some(seed) = &spec.seed {
        let disk = json!({
            "driver": "raw", "node-name": "seed", "read-only": true,
            "file": { "driver": "file", "filename": qemu_path(seed)?, "read-only": true },
        });
        line.add_json("-blockdev", &disk);
        line.add_json("-device", &json!({ "driver": "virtio-blk-pci", "drive": "seed", "id": "seed0" }));
    }
    // After the seed, which has its place on the bus since machines had one disk only.
    for (index, disk) in (1..).zip(&spec.further_disks) {
        add_disk(line, spec, index, disk)?;
    }
    Ok(())
}

fn add_disk(line: &mut CommandLine, spec: &VmSpec, index: usize, disk: &VmDisk) -> Result<(), VmError> {
    let node = if index == 0 { "disk".to_owned() } else { format!("disk-{index}") };
    let backend = json!({
        "driver": "nbd",
        "node-name": node,
        "server": { "type": "unix", "path": qemu_socket_path(&disk.socket)? },
        "export": disk.export,
        "reconnect-delay": NBD_RECONNECT_SECONDS,
        "discard": "unmap",
        "cache": { "direct": false, "no-flush": false },
    });
    line.add_json("-blockdev", &backend);
    let write_error = match spec.on_full {
        // Which is: pause if there is no room, and report every other error.
        OnFull::Pause => "enospc",
        OnFull::Report => "report",
    };
    let mut device = json!({
        "driver": "virtio-blk-pci", "drive": node, "id": format!("disk{index}"),
        "discard": true, "write-zeroes": true, "write-cache": "on",
        "werror": write_error, "rerror": "report",
    });
    if index == 0 {
        // Index 0 is that of a kernel given from outside, and QEMU takes no index twice.
        device["bootindex"] = json!(1);
    }
    if let Some(serial) = &disk.serial {
        device["serial"] = json!(serial.get(..SERIAL_BYTES_MAX).unwrap_or(serial));
    }
    line.add_json("-device", &device);
    Ok(())
}

fn add_network(line: &mut CommandLine, spec: &VmSpec) {
    // Numbers only, so this needs no escaping.
    let forwards: String =
        spec.forward_ports.iter().map(|port| format!(",hostfwd=tcp:127.0.0.1:0-:{port}")).collect();
    line.add("-netdev", format!("user,id=net{forwards}"));
    // An empty romfile skips the network boot firmware, which costs time and is never wanted.
    let mac = hardware_address(&spec.name);
    let device = json!({ "driver": "virtio-net-pci", "netdev": "net", "mac": mac, "romfile": "" });
    line.add_json("-device", &device);
}

/// An address of QEMU's own range that is the same at each start of the same VM.
fn hardware_address(name: &VmName) -> String {
    let hash = blake3::hash(name.as_str().as_bytes());
    let [a, b, c, ..] = hash.as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

/// The path as text that means the same to QEMU, which runs in another directory.
fn qemu_path(path: &Path) -> Result<&str, VmError> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text),
        _ => Err(VmError::Unfit(format!("the path {path:?} is not absolute or not UTF-8"))),
    }
}

/// The same for a socket's path, which the system allows little length.
pub(crate) fn qemu_socket_path(path: &Path) -> Result<&str, VmError> {
    let text = qemu_path(path)?;
    if text.len() > SOCKET_PATH_BYTES_MAX {
        return Err(VmError::Unfit(format!(
            "the socket path {text} has {} bytes and may have {SOCKET_PATH_BYTES_MAX}: use a directory with a \
             shorter path",
            text.len()
        )));
    }
    Ok(text)
}

/// Text for use within an option list, where a doubled comma is a comma.
fn escaped(text: &str) -> String {
    text.replace(',', ",,")
}

#[derive(Default)]
struct CommandLine {
    arguments: Vec<String>,
}

impl CommandLine {
    fn flag(&mut self, flag: &str) -> &mut CommandLine {
        self.arguments.push(flag.to_owned());
        self
    }

    fn add(&mut self, flag: &str, value: impl Into<String>) -> &mut CommandLine {
        self.arguments.extend([flag.to_owned(), value.into()]);
        self
    }

    fn add_json(&mut self, flag: &str, value: &Value) -> &mut CommandLine {
        self.add(flag, value.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            name: "vm-1".parse().unwrap(),
            disk: VmDisk { socket: "/run/nbd.sock".into(), export: "vm-1".to_owned(), serial: None },
            further_disks: Vec::new(),
            seed: None,
            memory_mib: 512,
            cpus: 1,
            accel: Accel::Tcg,
            boot: None,
            forward_ports: Vec::new(),
            on_full: OnFull::default(),
            platform: None,
        }
    }

    fn arguments(spec: &VmSpec, dir: &str, begin: Begin) -> Result<Vec<String>, VmError> {
        let machine = MachineType::try_from("pc-q35-10.0".to_owned()).unwrap();
        super::arguments(spec, &machine, &VmFiles::new(dir.into()), begin)
    }

    fn values<'a>(arguments: &'a [String], flag: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn a_comma_in_a_path_or_export_stays_part_of_it() {
        let hostile = "x,readonly=on\",\"driver\":\"null-co";
        let mut spec = spec();
        spec.disk.export = hostile.to_owned();
        spec.seed = Some(format!("/seeds/{hostile}").into());
        let arguments = arguments(&spec, "/vms/a,server=off", Begin::AtOnce).unwrap();
        let disks: Vec<Value> =
            values(&arguments, "-blockdev").iter().map(|text| serde_json::from_str(text).unwrap()).collect();
        assert_eq!(disks[0]["driver"], "nbd");
        assert_eq!(disks[0]["export"], hostile);
        assert_eq!(disks[1]["file"]["filename"], format!("/seeds/{hostile}"));
        for chardev in values(&arguments, "-chardev") {
            assert!(chardev.contains("path=/vms/a,,server=off/"), "{chardev}");
        }
        // QEMU itself knows no escape here: the whole argument is the path.
        assert_eq!(values(&arguments, "-pidfile"), ["/vms/a,server=off/qemu.pid"]);
    }

    #[test]
    fn a_path_that_qemu_would_misread_is_refused() {
        let refused =
            |dir: &str, spec: &VmSpec| matches!(arguments(spec, dir, Begin::AtOnce), Err(VmError::Unfit(_)));
        assert!(!refused("/vms/a", &spec()));
        assert!(refused("vms/a", &spec()), "relative");
        assert!(
            refused(&format!("/{}", "a".repeat(SOCKET_PATH_BYTES_MAX)), &spec()),
            "too long for a socket"
        );
        let mut long = spec();
        long.disk.socket = format!("/{}", "a".repeat(SOCKET_PATH_BYTES_MAX)).into();
        assert!(refused("/vms/a", &long));
    }

    #[test]
    fn each_vm_has_its_own_hardware_address_at_every_start() {
        let [a, b] = ["vm-1", "vm-2"].map(|name| hardware_address(&name.parse().unwrap()));
        assert_ne!(a, b);
        assert_eq!(a, hardware_address(&"vm-1".parse().unwrap()));
    }

    #[test]
    fn a_guest_that_comes_from_elsewhere_gets_the_same_machine_and_stands_still() {
        let here = arguments(&spec(), "/vms/a", Begin::AtOnce).unwrap();
        let there = arguments(&spec(), "/vms/a", Begin::Incoming).unwrap();
        assert_eq!(there.strip_prefix(here.as_slice()).unwrap(), ["-incoming", "defer", "-S"]);
        assert_eq!(values(&here, "-machine"), ["pc-q35-10.0,usb=off,vmport=off"]);
    }

    #[test]
    fn a_spec_is_read_back_as_it_was_and_an_older_one_without_what_came_later() {
        let mut spec = spec();
        spec.boot =
            Some(DirectBoot { kernel: "/k".into(), initrd: Some("/i".into()), append: "quiet".to_owned() });
        spec.on_full = OnFull::Report;
        let mut json = serde_json::to_value(&spec).unwrap();
        assert_eq!(serde_json::from_value::<VmSpec>(json.clone()).unwrap(), spec);
        for later in ["on_full", "platform"] {
            json.as_object_mut().unwrap().remove(later);
        }
        spec.on_full = OnFull::Pause;
        assert_eq!(serde_json::from_value::<VmSpec>(json).unwrap(), spec);
    }
}
