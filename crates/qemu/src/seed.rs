//! NoCloud seed disks: how a booted guest learns its name, keys and user data.
//!
//! A seed is a FAT file system labelled `CIDATA` with the files `meta-data` and `user-data`, which
//! cloud-init and its kin look for at boot. The same identity always gives the same
//! bytes: neither clock nor chance has a part in it.

use std::io::{self, Cursor, Write};

use block::VmName;
use fatfs::{Date, DateTime, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider};

/// Longest user data in bytes. Clouds allow 16 to 64 KiB; this is room for a script
/// with an archive in it.
pub const USER_DATA_BYTES_MAX: usize = 512 * 1024;

/// Most SSH keys that one seed holds.
pub const SSH_KEYS_MAX: usize = 100;

/// Longest SSH key in bytes: an RSA key of 16,384 bits with a comment.
const SSH_KEY_BYTES_MAX: usize = 4096;

/// Size of a seed disk in bytes: user data of the greatest length, or the keys.
const SEED_BYTES: usize = 2 * 1024 * 1024;

/// The label by which guests find the disk.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// Why a seed cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// What the user gave is not what a guest could use; the text says what to change.
    #[error("{0}")]
    Unfit(String),
    /// The file system could not be written.
    #[error("the seed disk could not be made: {0}")]
    Io(#[from] io::Error),
}

/// Who a guest is.
#[derive(Debug, Clone)]
pub struct Identity {
    name: VmName,
    instance: String,
    user_data: String,
}

impl Identity {
    /// A guest named `name` whose user is let in with `ssh_keys` (lines of an `authorized_keys` file).
    /// `instance` tells one creation of this VM from the next: a guest configures itself anew when it changes.
    pub fn new(name: &VmName, instance: &VmName, ssh_keys: &[String]) -> Result<Identity, SeedError> {
        if ssh_keys.len() > SSH_KEYS_MAX {
            let keys = ssh_keys.len();
            return Err(SeedError::Unfit(format!(
                "{keys} SSH keys are given and {SSH_KEYS_MAX} are allowed"
            )));
        }
        let mut user_data = String::from("#cloud-config\n");
        // Without keys the data is an empty map, since cloud-init warns of no data at all.
        user_data.push_str(if ssh_keys.is_empty() { "{}\n" } else { "ssh_authorized_keys:\n" });
        for key in ssh_keys {
            user_data.push_str(&format!("  - {}\n", quoted(checked_key(key)?)));
        }
        Ok(Identity { name: name.clone(), instance: instance.to_string(), user_data })
    }

    /// With the user's own data instead: cloud-config, a script, or another kind that names itself on its
    /// first line. SSH keys then are the business of this data.
    pub fn with_user_data(self, bytes: &[u8]) -> Result<Identity, SeedError> {
        let text = checked_text(bytes)?;
        let first = text.lines().next().unwrap_or_default().trim_end();
        let known = first == "#cloud-config"
            || first == "## template: jinja"
            || [
                "#!",
                "#include",
                "#cloud-boothook",
                "#cloud-config-archive",
                "Content-Type:",
                "MIME-Version:",
            ]
            .iter()
            .any(|start| first.starts_with(start));
        if !known {
            return Err(SeedError::Unfit(
                "the user data is of no kind that a guest knows: its first line must be '#cloud-config', or begin \
                 with '#!' for a script"
                    .to_owned(),
            ));
        }
        Ok(Identity { user_data: text, ..self })
    }

    /// The bytes of the seed disk.
    pub fn disk(&self) -> Result<Vec<u8>, SeedError> {
        let mut disk = vec![0; SEED_BYTES];
        let options = FormatVolumeOptions::new().volume_label(LABEL).volume_id(0x5eed_5eed);
        fatfs::format_volume(Cursor::new(&mut disk), options)?;
        let options = FsOptions::new().time_provider(&NO_CLOCK).update_accessed_date(false);
        let volume = FileSystem::new(Cursor::new(&mut disk), options)?;
        let meta_data = format!("instance-id: {}\nlocal-hostname: {}\n", quoted(&self.instance), self.name);
        for (name, text) in [("meta-data", &meta_data), ("user-data", &self.user_data)] {
            let mut file = volume.root_dir().create_file(name)?;
            file.write_all(text.as_bytes())?;
            file.flush()?;
        }
        volume.unmount()?;
        Ok(disk)
    }
}

/// The time stamp of everything in a seed: the first that FAT knows.
#[derive(Debug)]
struct NoClock;
static NO_CLOCK: NoClock = NoClock;

impl TimeProvider for NoClock {
    fn get_current_date(&self) -> Date {
        Date { year: 1980, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime { date: self.get_current_date(), time: Time { hour: 0, min: 0, sec: 0, millis: 0 } }
    }
}

fn checked_text(bytes: &[u8]) -> Result<String, SeedError> {
    if bytes.len() > USER_DATA_BYTES_MAX {
        let length = bytes.len();
        return Err(SeedError::Unfit(format!(
            "the user data has {length} bytes and may have {USER_DATA_BYTES_MAX}"
        )));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(SeedError::Unfit("the user data is not UTF-8 text".to_owned())),
    }
}

/// One line with a key type and a key; what is allowed before or after them is the guest's to judge.
fn checked_key(key: &str) -> Result<&str, SeedError> {
    let key = key.trim();
    let words = key.split_ascii_whitespace().count();
    if key.len() > SSH_KEY_BYTES_MAX || words < 2 || key.chars().any(char::is_control) {
        let shown: String = key.chars().take(40).flat_map(char::escape_debug).collect();
        return Err(SeedError::Unfit(format!(
            "'{shown}' is not an SSH public key: give one line such as 'ssh-ed25519 AAAA... me@host'"
        )));
    }
    Ok(key)
}

/// Text as a YAML string: JSON's quoting is YAML's too (YAML 1.2 §1.3).
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::Command;

    fn identity() -> Identity {
        Identity::new(&"vm-1".parse().unwrap(), &"i-1".parse().unwrap(), &[]).unwrap()
    }

    fn file(disk: &[u8], name: &str) -> Option<String> {
        let volume = FileSystem::new(Cursor::new(disk.to_vec()), FsOptions::new()).unwrap();
        let mut text = String::new();
        volume.root_dir().open_file(name).ok()?.read_to_string(&mut text).unwrap();
        Some(text)
    }

    #[test]
    fn a_guest_reads_its_name_from_a_disk_with_the_label_that_it_looks_for() {
        let disk = identity().disk().unwrap();
        let volume = FileSystem::new(Cursor::new(disk.clone()), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        let meta_data = file(&disk, "meta-data").unwrap();
        assert_eq!(meta_data, "instance-id: \"i-1\"\nlocal-hostname: vm-1\n");
        assert_eq!(file(&disk, "user-data").unwrap(), "#cloud-config\n{}\n");
    }

    #[test]
    fn the_same_identity_gives_the_same_bytes() {
        assert!(identity().disk().unwrap() == identity().disk().unwrap());
    }

    #[test]
    fn user_data_arrives_as_it_was_given() {
        let script = format!("#!/bin/sh\n{}", "x".repeat(USER_DATA_BYTES_MAX - 10));
        let disk = identity().with_user_data(script.as_bytes()).unwrap().disk().unwrap();
        assert!(file(&disk, "user-data").unwrap() == script);
    }

    #[test]
    fn user_data_that_no_guest_would_understand_is_refused() {
        let long = format!("#!/bin/sh\n{}", "x".repeat(USER_DATA_BYTES_MAX));
        for bad in
            [&b""[..], b"packages: [x]", b"#cloud-config: x", b"#!/bin/sh\n\0", b"\xff", long.as_bytes()]
        {
            assert!(identity().with_user_data(bad).is_err(), "{:?}", &bad[..bad.len().min(20)]);
        }
    }

    #[test]
    fn a_key_stays_one_yaml_string_and_what_is_no_key_is_refused() {
        let name = "vm-1".parse().unwrap();
        let keys = |key: &str| Identity::new(&name, &name, &[key.to_owned()]);
        let disk = keys("ssh-ed25519 AAAA \"me\": {x}\n").unwrap().disk().unwrap();
        let user_data = file(&disk, "user-data").unwrap();
        let line = user_data.lines().last().unwrap().trim_start().trim_start_matches("- ");
        assert_eq!(serde_json::from_str::<String>(line).unwrap(), "ssh-ed25519 AAAA \"me\": {x}");
        for bad in [
            "",
            "ssh-ed25519",
            "ssh-ed25519 AAAA\nruncmd: [x]",
            "a b\u{1b}[2J",
            &"x ".repeat(SSH_KEY_BYTES_MAX),
        ] {
            assert!(keys(bad).is_err(), "{bad:?}");
        }
    }

    /// A second opinion: the FAT reader of mtools.
    #[test]
    fn mtools_reads_the_seed_too() {
        let seed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(seed.path(), identity().disk().unwrap()).unwrap();
        let listing = Command::new("mdir").arg("-i").arg(seed.path()).args(["-b", "::/"]).output();
        let Ok(listing) = listing else {
            eprintln!("skipped: mtools is not installed");
            return;
        };
        assert!(listing.status.success(), "{listing:?}");
        let files = String::from_utf8(listing.stdout).unwrap();
        assert_eq!(files.split_ascii_whitespace().collect::<Vec<_>>(), ["::/meta-data", "::/user-data"]);
    }
}
