//! Exports over iSCSI in the hands of guests: Linux with its own initiator and multipath, which mounts a VM's
//! disk over the network, and a guest whose QEMU opens its system disk as an initiator.
//!
//! Nodes know nothing of these guests. The first is the one of `scripts/iscsi-guest`, named by
//! `VIRTMAN_ISCSI_GUEST`; it reaches the host's loopback through QEMU's user-mode network.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use testkit::ports::Port;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::iscsi::{SECRET, USER, addresses, secret_file, with_secret};
use crate::tools::{Background, STEP_LIMIT, assert_same, guest_image, make_raw, tool, wait_for};

/// The initiator that the Linux guest is.
const INITIATOR: &str = "iqn.2026-11.virtman.test:guest";

/// The host's loopback, as guests see it.
const HOST: &str = "10.0.2.2";

/// Size of the disk that the Linux guest mounts, in MiB.
const MIB: usize = 96;

/// Settings of open-iscsi with which either side notices when the network changes what it carries.
const DIGESTS: [(&str, &str); 2] =
    [("conn[0].iscsi.HeaderDigest", "CRC32C"), ("conn[0].iscsi.DataDigest", "CRC32C")];

/// Writes 64 files over and over, each durable before the next, until `/run/stop` is there. What they have to
/// hold stands in `/run/sums`, which is memory, and the number of those that are durable in `/run/beat`.
const WRITER: &str = "
    mkdir /run/sums
    i=0
    while [ ! -e /run/stop ]; do
        file=$((i % 64)); i=$((i + 1))
        dd if=/dev/urandom of=/mnt/$file bs=64k count=4 conv=fsync 2>/run/dd &&
            (cd /mnt && sha256sum $file) >/run/sums/$file || i=failed
        echo $i >/run/beat.new && mv /run/beat.new /run/beat
        [ $i != failed ] || exit 1
    done
    touch /run/stopped";

#[test]
fn iscsi_guest_linux_loses_nothing_when_the_node_that_serves_its_disk_is_killed() {
    let portal = &Port::reserve();
    let (mut cluster, target) = site(&[portal], &["--initiator", INITIATOR]);
    let mut guest = Guest::linux(&cluster);
    let discovery =
        format!("iscsiadm -m discovery -t sendtargets -o nonpersistent -p {}", seen_by_guest(portal));
    let found = guest.run(&discovery);
    assert!(found.contains(&target), "{found}");
    let refused =
        guest.run(&format!("({}) 2>&1 || true", log_in(&target, portal, &chap("wrong-horse-battery"))));
    assert!(refused.contains("authorization failure"), "{refused}");
    let settings = [&chap(SECRET)[..], &DIGESTS].concat();
    guest.run(&log_in(&target, portal, &settings));
    assert_eq!(guest.run("cat /sys/class/iscsi_connection/*/*_digest"), "1\n1\n", "header and data");
    let disk = disk_at(portal, &target);
    guest.mount_new(&disk);

    guest.agent.start(WRITER);
    let before = guest.wait_for_beat(5);
    cluster.kill_node("n");
    wait_for("the guest has lost its session", STEP_LIMIT, || {
        guest.run("dmesg").contains("detected conn error").then_some(())
    });
    cluster.restart_node("n");
    // The first of these may have been durable before.
    guest.wait_for_beat(before + 70);
    guest.assert_files(&disk);

    guest.run("fstrim /mnt && umount /mnt && iscsiadm -m node --logout");
    let sessions = guest.run("iscsiadm -m session 2>&1 || true");
    assert!(sessions.contains("No active sessions"), "{sessions}");
    guest.assert_no_error(&["I/O error", "EXT4-fs error", "EXT4-fs warning"]);
}

#[test]
fn iscsi_guest_linux_goes_on_over_whichever_portal_is_left() {
    let portals = [Port::reserve(), Port::reserve()];
    let (cluster, target) = site(&portals.each_ref(), &["--initiator", INITIATOR]);
    let mut ways = portals.each_ref().map(|portal| Way::to(portal.address()));
    let mut guest = Guest::linux(&cluster);
    for way in &ways {
        guest.run(&log_in(&target, &way.port, &chap(SECRET)));
    }
    guest.wait_for_paths("active active");
    let said = guest.run("multipath -ll");
    assert!(said.contains("hwhandler='1 alua'"), "{said}");
    assert_eq!(said.matches("prio=50").count(), 1, "both paths are in one group: {said}");
    let disk = format!("/dev/mapper/{}", guest.run("multipath -l -v1").trim());
    guest.mount_new(&disk);

    guest.agent.start(WRITER);
    guest.wait_for_beat(5);
    for (number, fail, paths) in
        [(0, Way::cut as fn(&mut Way), "failed active"), (1, Way::silence, "active failed")]
    {
        fail(&mut ways[number]);
        guest.wait_for_paths(paths);
        let beat = guest.beat();
        guest.wait_for_beat(beat + 20);
        ways[number].mend();
        guest.wait_for_paths("active active");
    }
    guest.assert_files(&disk);
    // The disks below it may have failed; what is mounted has not.
    guest.assert_no_error(&[
        "I/O error, dev dm-",
        "I/O error on dev dm-",
        "EXT4-fs error",
        "EXT4-fs warning",
    ]);
}

#[test]
fn iscsi_guest_linux_mounts_an_image_and_cannot_change_it() {
    let portal = &Port::reserve();
    let mut cluster = Cluster::with_nodes(&["o"]);
    cluster.add_node("n", &["--iscsi-listen", portal.address()]);
    let (files, image) = (cluster.path("files"), cluster.path("image"));
    fs::create_dir(&files).unwrap();
    make_raw(&files.join("file"), 8, 13);
    tool("e2fsprogs", "mkfs.ext4", &["-q", "-d", files.to_str().unwrap(), image.to_str().unwrap(), "32M"]);
    cluster.share(&["o", "n"], "files:1", &image);
    let chap_file = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}"));
    let mutual_file = secret_file(&cluster, "mutual", "node:battery-staple");
    let secrets = ["--chap-file", &chap_file, "--mutual-chap-file", &mutual_file];
    cluster.ok(&[&["--node", "n", "export", "add", "files:1"], &secrets[..]].concat());
    let target = target_of(&cluster, "files:1");

    let mut guest = Guest::linux(&cluster);
    let settings = |node_secret| {
        let proof = [("session.auth.username_in", "node"), ("session.auth.password_in", node_secret)];
        [&chap(SECRET)[..], &proof, &[("session.auth.chap_algs", "SHA256")]].concat()
    };
    let wrong = log_in(&target, portal, &settings("battery-acid-acid"));
    let refused = guest.run(&format!("({wrong}) 2>&1 || true"));
    assert!(refused.contains("non-retryable iSCSI login failure"), "it trusts any node: {refused}");
    guest.run(&log_in(&target, portal, &settings("battery-staple")));
    let disk = disk_at(portal, &target);
    guest.wait_for_file(&disk);
    guest.run(&format!("mount -t ext4 -o ro,noload {disk} /mnt"));
    let sum = guest.run("cd /mnt && sha256sum file");
    assert_eq!(
        sum.split(' ').next(),
        tool("coreutils", "sha256sum", &[files.join("file").to_str().unwrap()]).split(' ').next()
    );
    let refused = guest.run(&format!("umount /mnt; dd if=/dev/zero of={disk} bs=4k count=1 2>&1 || true"));
    assert!(refused.contains("Read-only file system"), "{refused}");
    assert_same(&cluster.volume("n", "files+1"), &image);
}

#[test]
fn iscsi_guest_qemu_boots_from_an_exported_disk_and_keeps_it_when_the_node_is_killed() {
    let portal = &Port::reserve();
    let mut cluster = Cluster::with_nodes(&["o"]);
    cluster.add_node("n", &["--iscsi-listen", portal.address()]);
    cluster.share(&["o", "n"], "debian:12", &guest_image());
    let target = export(&cluster, "debian:12", &[]);
    let mut guest = Guest::debian(&cluster, portal.address(), &target);

    let root = guest.run("grep ' / ' /proc/mounts");
    assert!(root.starts_with("/dev/vda2 / ext4 rw"), "{root}");
    let sum = guest.run("head -c 1000000 /dev/urandom >/root/before; sync; sha256sum /root/before");
    cluster.kill_node("n");
    cluster.restart_node("n");
    guest.run("head -c 1000000 /dev/urandom >/root/after; sync; echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(guest.run("sha256sum /root/before"), sum);
    guest.assert_no_error(&["I/O error", "EXT4-fs error"]);
    drop(guest);

    let over_iscsi = with_secret(&addresses(&cluster, "vm")[0], SECRET);
    let over_nbd = cluster.disk("n", "vm");
    tool("qemu-block-extra", "qemu-img", &["compare", "-f", "raw", "-F", "raw", &over_iscsi, &over_nbd]);
}

#[test]
fn iscsi_guest_tools_of_libiscsi_list_describe_and_load_an_exported_disk() {
    let port = Port::reserve();
    let (_cluster, target) = site(&[&port], &[]);
    let portal = port.address();
    let disk = with_secret(&format!("iscsi://{portal}/{target}/0"), SECRET);

    let list = tool("libiscsi-bin", "iscsi-ls", &["-s", &with_secret(&format!("iscsi://{portal}"), SECRET)]);
    assert!(list.contains(&format!("Target:{target} Portal:{portal},1")), "{list}");
    assert!(list.contains("Lun:0") && list.contains("Type:DIRECT_ACCESS (Size:95M)"), "{list}");
    let inquire = |page: &str| tool("libiscsi-bin", "iscsi-inq", &["-e", "1", "-c", page, &disk]);
    // The names of the disk, its limits, and that it gives space back.
    for (page, expected) in [("131", "NAA"), ("176", "maximum unmap"), ("178", "lbpu:1")] {
        let said = inquire(page);
        assert!(said.contains(expected), "page {page}: {said}");
    }
    let load = ["-t", "2", "-m", "32", "-b", "8", "-r", &disk];
    let said = tool("libiscsi-bin", "iscsi-perf", &load);
    assert!(said.contains("iops average"), "{said}");
}

/// A cluster whose node `n`, below its origin, exports a VM's disk of [`MIB`] at these portals, and the name of
/// its target. `access` says who may open it, beside that CHAP is asked for.
fn site(portals: &[&Port], access: &[&str]) -> (Cluster, String) {
    let mut cluster = Cluster::with_nodes(&["o"]);
    let listen: Vec<&str> = portals.iter().flat_map(|portal| ["--iscsi-listen", portal.address()]).collect();
    cluster.add_node("n", &listen);
    let source = cluster.path("source");
    make_raw(&source, MIB, 11);
    cluster.share(&["o", "n"], "disk:1", &source);
    let target = export(&cluster, "disk:1", access);
    (cluster, target)
}

/// Creates the VM `vm` on the node `n` and exports its disk. Returns the name of its target.
fn export(cluster: &Cluster, image: &str, access: &[&str]) -> String {
    let chap = secret_file(cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let create = ["--node", "n", "create", "vm", "--image", image, "--export", "iscsi", "--chap-file", &chap];
    cluster.ok(&[&create, access].concat());
    target_of(cluster, "vm")
}

/// The name of the target of an export.
fn target_of(cluster: &Cluster, name: &str) -> String {
    let address = addresses(cluster, name).remove(0);
    let target = address.rsplit('/').nth(1).expect("it is iscsi://PORTAL/TARGET/LUN");
    target.to_owned()
}

/// A guest that no node knows of, and its QEMU. It ends with its value.
struct Guest {
    agent: Agent,
    _qemu: Background,
}

impl Guest {
    /// Boots the guest of `scripts/iscsi-guest`.
    fn linux(cluster: &Cluster) -> Guest {
        let initrd = std::env::var_os("VIRTMAN_ISCSI_GUEST")
            .expect("VIRTMAN_ISCSI_GUEST names no guest: run scripts/test, which builds one");
        let initrd = PathBuf::from(initrd);
        let kernel = initrd.with_extension("vmlinuz");
        assert!(kernel.is_file() && initrd.is_file(), "{} is not a guest", initrd.display());
        let network = "virtio-net-pci,netdev=net,romfile=";
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
        qemu.args([
            "-append",
            "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off random.trust_cpu=on",
        ]);
        qemu.args(["-netdev", "user,id=net", "-device", network]);
        Guest::boot(cluster, qemu)
    }

    /// Boots Debian from an exported disk that QEMU opens as an initiator.
    fn debian(cluster: &Cluster, portal: &str, target: &str) -> Guest {
        let disk = json!({
            "driver": "iscsi", "node-name": "disk", "transport": "tcp", "portal": portal, "target": target,
            "lun": 0, "user": USER, "password-secret": "chap", "discard": "unmap",
        });
        let secret = secret_file(cluster, "secret", SECRET);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-object", &format!("secret,id=chap,file={secret}"), "-blockdev", &disk.to_string()]);
        qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        Guest::boot(cluster, qemu)
    }

    /// Starts QEMU with what it was told so far, and waits until the guest's agent answers.
    fn boot(cluster: &Cluster, mut qemu: Command) -> Guest {
        let [socket, console] = ["guest.agent", "guest.console"].map(|name| cluster.path(name));
        qemu.args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]);
        // Where KVM is there it is not sure to run a stock kernel.
        qemu.args(["-machine", "q35,usb=off,vmport=off", "-accel", "tcg,thread=multi,tb-size=128"]);
        qemu.args(["-cpu", "max", "-m", "512M"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.arg("-chardev").arg(format!("socket,id=agent,server=on,wait=off,path={}", socket.display()));
        qemu.args(["-device", "virtio-serial-pci"]);
        qemu.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        qemu.args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]);
        let mut qemu = Background::start(qemu, &cluster.path("qemu"));
        // The socket is there a moment before QEMU listens on it.
        let channel = wait_for("QEMU runs", STEP_LIMIT, || {
            qemu.assert_running();
            UnixStream::connect(&socket).ok()
        });
        Guest { agent: Agent::over(channel, "a guest over iSCSI"), _qemu: qemu }
    }

    /// Runs a script in it, which must succeed, and returns what it prints.
    fn run(&mut self, script: &str) -> String {
        self.agent.run(script)
    }

    /// Makes a file system on a disk of the guest, and mounts it at `/mnt`.
    fn mount_new(&mut self, disk: &str) {
        self.wait_for_file(disk);
        self.run(&format!("mkfs.ext4 -q -F {disk} && mount -t ext4 {disk} /mnt"));
    }

    /// Waits until a file, or a disk, is there.
    fn wait_for_file(&mut self, path: &str) {
        let look = format!("[ ! -e {path} ] || echo there");
        wait_for(&format!("{path} is there"), STEP_LIMIT, || (!self.run(&look).is_empty()).then_some(()));
    }

    /// The number of files that [`WRITER`] has made durable.
    fn beat(&mut self) -> u64 {
        let beat = self.run("cat /run/beat 2>/dev/null || echo 0");
        beat.trim()
            .parse()
            .unwrap_or_else(|_| panic!("a write in the guest {beat}: {}", self.run("cat /run/dd")))
    }

    fn wait_for_beat(&mut self, n: u64) -> u64 {
        wait_for(&format!("write {n} is durable"), STEP_LIMIT, || {
            let beat = self.beat();
            (beat >= n).then_some(beat)
        })
    }

    /// Waits until the paths of the one multipath disk are in these states, in the order of their disks.
    fn wait_for_paths(&mut self, states: &str) {
        let show = "multipathd show paths raw format '%d %t' | sort | cut -d ' ' -f 2";
        let what = format!("the paths are {states}");
        wait_for(&what, STEP_LIMIT, || {
            let found = self.run(show);
            (found.split_whitespace().collect::<Vec<_>>().join(" ") == states).then_some(())
        });
    }

    /// Ends [`WRITER`], and checks that a file system that was mounted afresh is sound and has all its files.
    fn assert_files(&mut self, disk: &str) {
        self.run("touch /run/stop");
        self.wait_for_file("/run/stopped");
        let files = self.beat().min(64);
        self.run(&format!("umount /mnt && e2fsck -f -n {disk} && echo 3 >/proc/sys/vm/drop_caches"));
        self.run(&format!("mount -t ext4 {disk} /mnt"));
        let sums = self.run("cd /mnt && cat /run/sums/* | sha256sum -c");
        assert_eq!(sums.matches(": OK").count() as u64, files, "{sums}");
    }

    /// The kernel's log is whole, and has nothing of this.
    fn assert_no_error(&mut self, signs: &[&str]) {
        let log = self.run("dmesg");
        assert!(log.contains("Linux version") && log.contains("mounted filesystem"), "{log}");
        let bad = log.lines().find(|line| signs.iter().any(|sign| line.contains(sign)));
        assert_eq!(bad, None, "{log}");
    }
}

/// A script that logs a guest in to a target at a port of the host, with these settings of open-iscsi.
fn log_in(target: &str, portal: &Port, settings: &[(&str, &str)]) -> String {
    let record = format!("iscsiadm -m node -T {target} -p {}", seen_by_guest(portal));
    let settings: String =
        settings.iter().map(|(name, value)| format!(" -n node.{name} -v {value}")).collect();
    // A new record replaces what there was.
    format!("{record} -o new && {record} -o update{settings} && {record} --login")
}

/// The settings with which the guest proves itself.
fn chap(secret: &str) -> [(&str, &str); 3] {
    [("session.auth.authmethod", "CHAP"), ("session.auth.username", USER), ("session.auth.password", secret)]
}

/// A port of the host's loopback, as guests see it.
fn seen_by_guest(port: &Port) -> String {
    format!("{HOST}:{}", port.number())
}

/// The guest's name for the disk of a target.
fn disk_at(portal: &Port, target: &str) -> String {
    format!("/dev/disk/by-path/ip-{}-iscsi-{target}-lun-0", seen_by_guest(portal))
}

/// A way to a portal that can fail: another port of the loopback, which leads there.
struct Way {
    port: Port,
    portal: String,
    carrier: Option<Carrier>,
    /// What carries no more, and keeps its connections open.
    silent: Vec<Carrier>,
}

/// What carries a way's connections.
struct Carrier {
    runtime: Runtime,
    accepting: JoinHandle<()>,
    silence: CancellationToken,
}

impl Way {
    fn to(portal: &str) -> Way {
        let (port, portal) = (Port::reserve(), portal.to_owned());
        let mut way = Way { port, portal, carrier: None, silent: Vec::new() };
        way.mend();
        way
    }

    /// Accepts connections, again at the same address.
    fn mend(&mut self) {
        let listener = TcpListener::bind(self.port.address()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (runtime, silence) = (Runtime::new().unwrap(), CancellationToken::new());
        let accepting = runtime.spawn(carry(listener, self.portal.clone(), silence.clone()));
        self.carrier = Some(Carrier { runtime, accepting, silence });
    }

    /// Ends all connections and refuses others, as when the portal's process dies.
    fn cut(&mut self) {
        self.carrier = None;
    }

    /// Carries nothing any more over connections that stay open for both sides, as when the network breaks.
    fn silence(&mut self) {
        let mut carrier = self.carrier.take().expect("it is not cut");
        carrier.silence.cancel();
        carrier.accepting.abort();
        carrier.runtime.block_on(&mut carrier.accepting).expect_err("it never ends by itself");
        self.silent.push(carrier);
    }
}

async fn carry(listener: TcpListener, portal: String, silence: CancellationToken) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (mut from, _) = listener.accept().await.unwrap();
        let mut to = TcpStream::connect(&portal).await.unwrap();
        let silence = silence.clone();
        tokio::spawn(async move {
            let carried = silence.run_until_cancelled(copy_bidirectional(&mut from, &mut to)).await;
            if carried.is_none() {
                std::future::pending::<()>().await;
            }
        });
    }
}
