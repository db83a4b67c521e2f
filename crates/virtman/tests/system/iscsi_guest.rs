//! Exports over iSCSI in the hands of guests: Linux with its own initiator and multipath, which mounts a VM's
//! disk over the network, and a guest whose QEMU opens its system disk as an initiator.
//!
//! Nodes know nothing of these guests. The first is the one of `scripts/iscsi-guest`, named by
//! `VIRTMAN_ISCSI_GUEST`; it reaches the host's loopback through QEMU's user-mode network.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::agent::Agent;
use crate::cluster::{Cluster, free_address};
use crate::iscsi::{SECRET, USER, addresses, secret_file, with_secret};
use crate::tools::{Background, guest_image, make_raw, tool, wait_for};

/// The initiator that the Linux guest is.
const INITIATOR: &str = "iqn.2026-11.virtman.test:guest";

/// The host's loopback, as guests see it.
const HOST: &str = "10.0.2.2";

/// Size of the disk that the Linux guest mounts, in MiB.
const MIB: usize = 96;

/// How long what takes seconds on an idle machine may take.
const STEP_LIMIT: Duration = Duration::from_secs(120);

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
    let portal = free_address();
    let (mut cluster, target) = site(&[&portal]);
    let portal = portal.parse().unwrap();
    let mut guest = Guest::linux(&cluster);
    let discovery =
        format!("iscsiadm -m discovery -t sendtargets -o nonpersistent -p {}", seen_by_guest(portal));
    let found = guest.run(&discovery);
    assert!(found.contains(&target), "{found}");
    let refused = guest.run(&format!("({}) 2>&1 || true", log_in(&target, portal, "wrong-horse-battery")));
    assert!(refused.contains("authorization failure"), "{refused}");
    guest.run(&log_in(&target, portal, SECRET));
    guest.run("udevadm settle");
    let disk = format!("/dev/disk/by-path/ip-{}-iscsi-{target}-lun-0", seen_by_guest(portal));
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

    guest.run("umount /mnt && iscsiadm -m node --logout");
    let sessions = guest.run("iscsiadm -m session 2>&1 || true");
    assert!(sessions.contains("No active sessions"), "{sessions}");
    guest.assert_no_error(&["I/O error", "EXT4-fs error", "EXT4-fs warning"]);
}

#[test]
fn iscsi_guest_linux_goes_on_over_whichever_portal_is_left() {
    let portals = [free_address(), free_address()];
    let (cluster, target) = site(&portals.each_ref().map(String::as_str));
    let mut ways = portals.each_ref().map(|portal| Way::to(portal));
    let mut guest = Guest::linux(&cluster);
    for way in &ways {
        guest.run(&log_in(&target, way.address, SECRET));
    }
    guest.wait_for_paths("active active");
    let said = guest.run("multipath -ll");
    assert!(said.contains("hwhandler='1 alua'") && said.contains("prio=50 status=active"), "{said}");
    let disk = format!("/dev/mapper/{}", guest.run("multipath -l -v1").trim());
    guest.mount_new(&disk);

    guest.agent.start(WRITER);
    guest.wait_for_beat(5);
    for (number, paths) in [(0, "failed active"), (1, "active failed")] {
        ways[number].cut();
        guest.wait_for_paths(paths);
        let beat = guest.beat();
        guest.wait_for_beat(beat + 20);
        ways[number].mend();
        guest.wait_for_paths("active active");
    }
    guest.assert_files(&disk);
    // The disks below it may have failed; what is mounted has not.
    guest.assert_no_error(&["I/O error, dev dm-", "I/O error on dev dm-", "EXT4-fs error", "EXT4-fs warning"]);
}

#[test]
fn iscsi_guest_qemu_boots_from_an_exported_disk_and_keeps_it_through_a_restart_of_the_node() {
    let portal = free_address();
    let mut cluster = Cluster::with_nodes(&["o"]);
    cluster.add_node("n", &["--iscsi-listen", &portal]);
    cluster.share(&["o", "n"], "debian:12", &guest_image());
    let target = export(&cluster, "debian:12", "iqn.2026-11.virtman.test:qemu");
    let mut guest = Guest::qemu(&cluster, &portal, &target);

    let mount = guest.run("grep ' / ' /proc/mounts; cat /sys/block/vda/size");
    assert!(mount.contains("/dev/vda2 / ext4"), "{mount}");
    guest.run("head -c 1000000 /dev/urandom >/root/before; sync");
    cluster.kill_node("n");
    cluster.restart_node("n");
    guest.run("head -c 1000000 /dev/urandom >/root/after; sync; echo 3 >/proc/sys/vm/drop_caches");
    guest.run("sha256sum /root/before /root/after");
    guest.assert_no_error(&["I/O error", "EXT4-fs error"]);
    drop(guest);

    let [over_iscsi] = &addresses(&cluster, "vm")[..] else { panic!("it has one portal") };
    let initiator = "initiator-name=iqn.2026-11.virtman.test:qemu";
    let over_iscsi = format!("driver=iscsi,{initiator},filename={}", with_secret(over_iscsi, SECRET));
    let over_nbd = format!("driver=nbd,{}", cluster.disk("n", "vm"));
    tool("qemu-block-extra", "qemu-img", &["compare", "--image-opts", &over_iscsi, &over_nbd]);
}
