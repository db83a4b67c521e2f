//! The guests: one that counts and nothing else, which shows the product's own part, and Debian.

use std::fs;
use std::path::{Path, PathBuf};

use testkit::counting_guest;

use super::super::Outcome;
use super::Life;
use super::site::Site;

/// Size of the counting guest's disk.
const COUNTING_DISK_BYTES: usize = 4 << 20;

/// How the Debian guest's kernel is started: without what only takes time without KVM, and with patience for what then
/// does. Its console is not waited for as a device, which systemd gives up for good after 90 s: among twenty guests on
/// two cores it takes longer to appear.
const DEBIAN_APPEND: &str = "root=/dev/vda2 ro console=ttyS0 quiet systemd.show_status=0 mitigations=off random.trust_cpu=on \
    systemd.default_timeout_start_sec=1h systemd.mask=serial-getty@ttyS0.service systemd.wants=console-getty.service";

/// A guest to boot.
#[derive(Debug, Clone)]
pub(super) struct Guest {
    /// Its image's name.
    pub(super) image: &'static str,
    pub(super) file: PathBuf,
    /// When it is ready.
    pub(super) ready: &'static str,
    /// What `boot` is told about its machine.
    pub(super) options: Vec<String>,
}

impl Guest {
    /// A boot sector that counts on its console and its disk, and is there in a second.
    pub(super) fn counting(life: &Life) -> Outcome<Guest> {
        let file = life.dir.path().join("counting.img");
        let made = fs::write(&file, counting_guest::boot_disk(COUNTING_DISK_BYTES));
        made.map_err(|e| format!("cannot write {}: {e}", file.display()))?;
        let options = ["--memory", "16M"].map(str::to_owned).to_vec();
        // Its sixteenth line, whatever a clone goes on from.
        Ok(Guest { image: "counter:1", file, ready: "console:^[0-9a-f]{6}10$", options })
    }

    /// The one that `scripts/guest-image` builds, with its kernel and initial ramdisk beside it.
    pub(super) fn debian(image: &Path, memory: &str) -> Outcome<Guest> {
        let failed = |e: std::io::Error| format!("cannot use {}: {e}", image.display());
        let file = fs::canonicalize(image).map_err(failed)?;
        let beside = |extension| file.with_extension(extension).display().to_string();
        let (kernel, initrd) = (beside("vmlinuz"), beside("initrd"));
        let options =
            ["--memory", memory, "--kernel", &kernel, "--initrd", &initrd, "--append", DEBIAN_APPEND];
        let options = options.map(str::to_owned).to_vec();
        Ok(Guest { image: "debian:12", file, ready: "console:login:", options })
    }

    /// Boots `count` of them, named `NAME-1` and so on, on these nodes. Gives what the command says.
    pub(super) fn boot(
        &self,
        site: &Site<'_>,
        name: &str,
        nodes: &str,
        count: usize,
    ) -> Outcome<serde_json::Value> {
        let count = count.to_string();
        let mut args =
            vec!["boot", "--image", self.image, "--name", name, "--nodes", nodes, "--count", &count];
        args.extend(["--ready", self.ready, "--timeout", super::BOOT_TIME_MAX]);
        args.extend(self.options.iter().map(String::as_str));
        site.json(&args)
    }
}
