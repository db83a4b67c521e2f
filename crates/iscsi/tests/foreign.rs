//! The target under the initiators of other people. A tool that is not installed fails its test with the name
//! of the Debian package.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::sync::Arc;

use block::Access;
use common::{Serving, target};
use iscsi::{Admission, Credentials};
use testkit::foreign::{both, find, finish};
use testkit::memory_disk::{MemoryDisk, Pace};
use tokio::process::Command;

const NAME: &str = "iqn.2026-01.test:disk";

/// Runs a tool to its end: whether it succeeded, and what it printed.
async fn run(name: &str, package: &str, args: &[&str], mutual: Option<[&str; 2]>) -> (bool, String) {
    let mut command = Command::new(find(package, name));
    command.args(args);
    if let Some([user, secret]) = mutual {
        command.env("LIBISCSI_CHAP_TARGET_USERNAME", user).env("LIBISCSI_CHAP_TARGET_PASSWORD", secret);
    }
    let output = finish(&mut command).await;
    (output.status.success(), both(&output))
}

async fn qemu_io(options: &str, commands: &[&str]) {
    let mut args = vec!["--image-opts"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    args.push(options);
    let (succeeded, printed) = run("qemu-io", "qemu-utils and qemu-block-extra", &args, None).await;
    assert!(succeeded && !printed.contains("failed"), "{commands:?}: {printed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_reads_what_it_wrote_with_and_without_digests() {
    for (pace, digest) in [(Pace::Now, "none"), (Pace::Later, "none"), (Pace::Now, "crc32c")] {
        let disk = MemoryDisk::new(64 << 20, pace);
        let serving = Serving::start(vec![target(NAME, &[Arc::clone(&disk)])]).await;
        let portal = serving.portals[0];
        let options =
            format!("driver=iscsi,transport=tcp,portal={portal},target={NAME},lun=0,header-digest={digest}");
        let commands = [
            "write -P 1 0 64k",
            "write -P 3 4M 16M",
            "write -f -P 4 512 512",
            "write -z 8M 1M",
            "discard 12M 4M",
            "aio_write -P 5 40M 1M",
            "aio_write -P 6 41M 1M",
            "aio_flush",
            "flush",
            "read -P 1 4096 60k",
            "read -P 4 512 512",
            "read -P 3 4M 4M",
            "read -P 0 8M 1M",
            "read -P 0 12M 4M",
            "read -P 5 40M 1M",
        ];
        qemu_io(&options, &commands).await;
        let bytes = disk.bytes.lock().unwrap();
        assert_eq!((bytes[0], bytes[512], bytes[5 << 20], bytes[41 << 20]), (1, 4, 3, 6));
        assert!(disk.flushes() > 0, "a flush reaches the disk");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_lists_the_targets_that_an_initiator_may_see_and_both_portals() {
    let disk = MemoryDisk::new(1 << 20, Pace::Now);
    let mut hidden = target("iqn.2026-01.test:hidden", &[Arc::clone(&disk)]);
    hidden.admission.initiators = Some(["iqn.2026-01.test:friend".parse().unwrap()].into());
    let serving = Serving::start(vec![target(NAME, &[disk]), hidden]).await;
    let url = format!("iscsi://{}", serving.portals[0]);
    let stranger = run("iscsi-ls", "libiscsi-bin", &["-s", &url], None).await.1;
    assert!(!stranger.contains("hidden"), "{stranger}");
    for portal in serving.portals {
        assert!(stranger.contains(&format!("{NAME} Portal:{portal}")), "{stranger}");
    }
    let friend = ["-i", "iqn.2026-01.test:friend", &url];
    let friend = run("iscsi-ls", "libiscsi-bin", &friend, None).await.1;
    assert!(friend.contains("hidden"), "{friend}");
    let url = format!("{url}/iqn.2026-01.test:hidden/0");
    let (let_in, printed) = run("iscsi-inq", "libiscsi-bin", &[&url], None).await;
    assert!(!let_in, "{printed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chap_lets_in_who_knows_the_secret_and_proves_the_target_too() {
    let disk = MemoryDisk::with(vec![7; 1 << 20], Pace::Now, Access::ReadOnly);
    let mut asking = target(NAME, &[disk]);
    asking.admission = Admission {
        initiators: None,
        initiator: Some(Credentials::new("node", b"correct horse").unwrap()),
        target: Some(Credentials::new("disk", b"battery staple").unwrap()),
    };
    let serving = Serving::start(vec![asking]).await;
    let url = |login: &str| format!("iscsi://{login}{}/{NAME}/0", serving.portals[0]);
    let tries = [
        (true, url("node%correct horse@"), None),
        (true, url("node%correct horse@"), Some(["disk", "battery staple"])),
        (false, url("node%correct horse@"), Some(["disk", "battery acid"])),
        (false, url("node%incorrect horse@"), None),
        (false, url("edon%correct horse@"), None),
        (false, url(""), None),
    ];
    for (expected, url, mutual) in tries {
        let (let_in, printed) = run("iscsi-inq", "libiscsi-bin", &[&url], mutual).await;
        assert_eq!(let_in && printed.contains("VIRTMAN"), expected, "{url} {mutual:?}: {printed}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_image_compares_equal_and_takes_no_writes() {
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..8u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let image = dir.path().join("image");
    std::fs::write(&image, &bytes).unwrap();
    let disk = MemoryDisk::with(bytes, Pace::Later, Access::ReadOnly);
    let serving = Serving::start(vec![target(NAME, &[disk])]).await;
    let url = format!("iscsi://{}/{NAME}/0", serving.portals[1]);
    let args = ["compare", "-f", "raw", "-F", "raw", image.to_str().unwrap(), &url];
    let (same, printed) = run("qemu-img", "qemu-utils and qemu-block-extra", &args, None).await;
    assert!(same && printed.contains("identical"), "{printed}");
    let args = ["-f", "raw", "-c", "write 0 4k", &url];
    let (_, printed) = run("qemu-io", "qemu-utils and qemu-block-extra", &args, None).await;
    assert!(printed.contains("read-only") || printed.contains("write protected"), "{printed}");
}
