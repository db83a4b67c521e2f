//! The network of a storm: a namespace for each host, bridges for switches, and links of a given rate.
//!
//! ```text
//!  core bridge ── Volt (not shaped), the origin, and without racks all nodes
//!      ╽ uplink, shaped, one for each rack
//!  rack bridge ── the rack's nodes
//! ```
//!
//! A host's link is a pair of virtual Ethernet devices. Its end on the bridge has the host's name; that in the
//! host's namespace is `eth0`. Each end is shaped by a token bucket in the direction in which it sends, so
//! that links are full-duplex. Counters are those of the ends on bridges: what such an end *receives*, its
//! host sent. They count whole segments before they are cut to packets, and so few of the headers; the token
//! bucket counts all of them.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::super::Outcome;

/// Bytes that a link may send at once: the longest segment that the kernel hands over in one piece.
const BURST: &str = "64kb";

/// Bytes that wait at a link before packets are lost: 22 ms at 90 Mbit/s, as in a small switch.
const QUEUE: &str = "256kb";

/// Bytes of a packet, as on Ethernet.
const MTU: &str = "1500";

/// Behind it come the hosts' addresses, in a network of 16 bits.
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);

/// The switch that all others hang on.
const CORE: &str = "core";

/// Speed of a link in each direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    pub(super) mbit: f64,
}

impl Rate {
    pub(super) fn bytes_per_second(self) -> f64 {
        self.mbit * 1e6 / 8.0
    }

    fn option(self) -> String {
        format!("{}kbit", (self.mbit * 1e3).round())
    }
}

/// Where a host is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Core,
    Rack(usize),
}

impl Place {
    fn bridge(self) -> String {
        match self {
            Place::Core => CORE.to_owned(),
            Place::Rack(rack) => format!("rack{rack}"),
        }
    }
}

/// A host: a network namespace with one link.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) address: Ipv4Addr,
}

/// Bytes that went through an end on a bridge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    /// From the host, or up from the rack.
    pub(super) sent: u64,
    /// To it.
    pub(super) received: u64,
}

impl std::ops::Sub for Traffic {
    type Output = Traffic;

    fn sub(self, before: Traffic) -> Traffic {
        Traffic { sent: self.sent - before.sent, received: self.received - before.received }
    }
}

/// All hosts and switches. They go with the value.
pub(super) struct Network {
    racks: usize,
    hosts: Mutex<Vec<String>>,
}

impl Network {
    /// Switches: the core, and racks with uplinks of this rate.
    pub(super) fn new(racks: usize, uplink: Rate) -> Outcome<Network> {
        let mut ip = vec![format!("link add {CORE} type bridge"), format!("link set {CORE} up")];
        let mut tc = Vec::new();
        for rack in 0..racks {
            ip.extend([
                format!("link add rack{rack} type bridge"),
                format!("link set rack{rack} up"),
                format!("link add up{rack} type veth peer name down{rack}"),
                format!("link set up{rack} mtu {MTU} master rack{rack} up"),
                format!("link set down{rack} mtu {MTU} master {CORE} up"),
            ]);
            tc.extend([
                shape("add", &format!("up{rack}"), uplink),
                shape("add", &format!("down{rack}"), uplink),
            ]);
        }
        // Where the host's firewall is asked about bridged packets, that would cost more than the bridges. A
        // kernel without this has nothing to switch off.
        let _ = fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
        // From here on the value takes down again what stands.
        let network = Network { racks, hosts: Mutex::default() };
        batch(Command::new("ip"), &ip)?;
        batch(Command::new("tc"), &tc)?;
        Ok(network)
    }

    /// Plugs in a new host, with a shaped link unless it has no rate.
    pub(super) fn add(&self, name: &str, place: Place, rate: Option<Rate>) -> Outcome<Host> {
        let number = {
            let mut hosts = self.hosts.lock().expect("no holder of this lock panics");
            hosts.push(name.to_owned());
            u32::try_from(hosts.len()).map_err(|_| "too many hosts".to_owned())?
        };
        let address = Ipv4Addr::from_bits(FIRST_ADDRESS.to_bits() + number);
        batch(
            Command::new("ip"),
            &[
                format!("netns add {name}"),
                format!("link add {name} type veth peer name eth0 netns {name}"),
                format!("link set {name} mtu {MTU} master {} up", place.bridge()),
            ],
        )?;
        let inside = [
            "link set lo up".to_owned(),
            format!("address add {address}/16 dev eth0"),
            format!("link set eth0 mtu {MTU} up"),
        ];
        batch(in_namespace("ip", name), &inside)?;
        let host = Host { name: name.to_owned(), place, address };
        if let Some(rate) = rate {
            self.reshape("add", &host, rate)?;
        }
        Ok(host)
    }

    /// Gives a host's link another rate.
    pub(super) fn throttle(&self, host: &Host, rate: Rate) -> Outcome {
        self.reshape("change", host, rate)
    }

    fn reshape(&self, how: &str, host: &Host, rate: Rate) -> Outcome {
        batch(Command::new("tc"), &[shape(how, &host.name, rate)])?;
        batch(in_namespace("tc", &host.name), &[shape(how, "eth0", rate)])
    }

    /// Pulls a host's plug.
    pub(super) fn unplug(&self, host: &Host) -> Outcome {
        batch(Command::new("ip"), &[format!("link set {} down", host.name)])
    }

    /// Puts it back.
    pub(super) fn plug(&self, host: &Host) -> Outcome {
        batch(Command::new("ip"), &[format!("link set {} up", host.name)])
    }

    /// What went through a host's link so far.
    pub(super) fn traffic(&self, host: &Host) -> Traffic {
        traffic(&host.name)
    }

    /// What went through each rack's uplink so far.
    pub(super) fn uplinks(&self) -> Vec<Traffic> {
        // The end at the core: what it receives, the rack sent.
        (0..self.racks).map(|rack| traffic(&format!("down{rack}"))).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // Whatever cannot be taken down goes with the outer namespace.
        for host in self.hosts.lock().expect("no holder of this lock panics").iter() {
            let _ = batch(Command::new("ip"), &[format!("netns delete {host}")]);
            let _ = batch(Command::new("ip"), &[format!("link delete {host}")]);
        }
        for rack in 0..self.racks {
            let _ = batch(
                Command::new("ip"),
                &[format!("link delete up{rack}"), format!("link delete rack{rack}")],
            );
        }
        let _ = batch(Command::new("ip"), &[format!("link delete {CORE}")]);
    }
}

impl Host {
    /// A command that runs on this host.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.namespace())).arg("--").arg(program);
        command
    }

    /// The file that holds the host's network namespace.
    pub(super) fn namespace(&self) -> String {
        format!("/run/netns/{}", self.name)
    }
}

fn in_namespace(tool: &str, name: &str) -> Command {
    let mut command = Command::new(tool);
    command.args(["-n", name]);
    command
}

fn shape(how: &str, device: &str, rate: Rate) -> String {
    format!("qdisc {how} dev {device} root tbf rate {} burst {BURST} limit {QUEUE}", rate.option())
}

/// Runs many commands of `ip` or `tc` in one process.
fn batch(mut tool: Command, lines: &[String]) -> Outcome {
    if lines.is_empty() {
        return Ok(());
    }
    let name = tool.get_program().to_string_lossy().into_owned();
    let failed = |e: std::io::Error| format!("cannot run {name} of iproute2: {e}");
    tool.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = tool.spawn().map_err(failed)?;
    let mut input = child.stdin.take().expect("it was asked for");
    // One that failed already takes no more input, and says why below.
    let _ = input.write_all((lines.join("\n") + "\n").as_bytes());
    drop(input);
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name} failed: {} (in: {})", said.trim(), lines.join("; ")))
}

fn traffic(device: &str) -> Traffic {
    let counter = |name: &str| {
        let text = fs::read_to_string(format!("/sys/class/net/{device}/statistics/{name}"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    Traffic { sent: counter("rx_bytes"), received: counter("tx_bytes") }
}
