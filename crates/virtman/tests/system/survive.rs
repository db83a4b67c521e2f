//! A guest that writes while its daemon is killed time and again, its disk frozen, cloned and merged, and its
//! node's cache lies: it notices nothing, and what it flushed is there.
//!
//! The guest writes records over and over each other's places in one file: each names its place and its number and
//! ends with a checksum. After each flush it notes in its memory, which no daemon touches, what is durable now.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::guests::assert_no_disk_errors;
use crate::tools::{
    Background, STEP_LIMIT, assert_same, both, guest_image, make_raw, tool, tool_output, wait_for,
};

const IMAGE: &str = "debian:12";

/// The guest's VM and its node, which is one below the origin.
const VM: &str = "w-1";
const NODE: &str = "n";

/// How often the daemon is killed.
const KILLS: usize = 50;

/// After so many kills all is let be for a moment: what is asked for then must be done.
const KILLS_BETWEEN_CALMS: usize = 10;

/// Longest time from a daemon's start to its end, in milliseconds.
const LIFE_MS_MAX: u64 = 150;

/// How long a guest may take to boot: on an idle machine half a minute.
const BOOT_LIMIT: Duration = Duration::from_secs(600);

/// The guest's root file system in bytes from the begin of its disk; see `scripts/guest-image`.
const ROOT_OFFSET: u64 = 65 << 20;

/// Size of each of the node's two cache media. Together they hold the whole image.
const CACHE_MIB: u64 = 256;

const RECORD_BYTES: usize = 4096;

/// Prints what the file of records sums up to, as read from the disk, and that it is the only one.
const READ_BACK: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; cd /root; sha256sum records; ls";

const WRITER: &str = r#"
import os, random, struct, zlib
BYTES, PLACES, BATCH = 4096, 1024, 8
file = os.open('/root/records', os.O_RDWR | os.O_CREAT, 0o600)
durable = open('/run/durable', 'a')
number = 0
while not os.path.exists('/run/stop'):
    batch = []
    for _ in range(BATCH):
        number += 1
        place = random.randrange(PLACES)
        body = struct.pack('<QQ', place, number) + random.randbytes(BYTES - 20)
        os.pwrite(file, body + struct.pack('<I', zlib.crc32(body)), place * BYTES)
        batch.append((place, number))
    os.fsync(file)
    durable.write(''.join('%d %d\n' % entry for entry in batch))
    durable.flush()
open('/run/stopped', 'w').close()
"#;

#[test]
fn survive_fifty_kills_snapshots_clones_merges_and_a_lying_cache() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut cluster = Cluster::start();
    cluster.add_node("o", &[]);
    let [spoilt, cut] = ["spoilt", "cut"].map(|name| cluster.path(name));
    let media = [&spoilt, &cut].map(|file| format!("{}={CACHE_MIB}M", file.display()));
    cluster.add_node(NODE, &["--cache", &media[0], "--cache", &media[1]]);
    cluster.share(&["o", NODE], IMAGE, &guest_image());
    begin_boot(&cluster).finish(BOOT_LIMIT);
    begin_writing(&cluster);
    let mut storm = Storm { random: StdRng::seed_from_u64(seed), snapshots: 0, kept: Vec::new() };
    let mut clones = BTreeMap::new();
    for kill in 1..=KILLS {
        storm.strike(&mut cluster);
        if kill % KILLS_BETWEEN_CALMS == 0 {
            let durable = storm.calm(&cluster, kill);
            let clone = format!("c{kill}");
            if clones.len() < 2 {
                cluster.ok(&["clone", VM, "--name", &clone]);
                clones.insert(clone, durable);
            }
        }
    }
    let (durable, sum) = end_writing(&cluster);
    for (clone, durable) in clones {
        check_disk(&cluster, &clone, &durable);
        cluster.ok(&["destroy", &clone]);
    }

    cluster.ok(&["snapshot", VM, "final", "--quiesce"]);
    let mut agent = Agent::of(&cluster, NODE, VM);
    agent.run(
        "head -c 8000000 /dev/urandom >/root/records; rm -r /usr/share/zoneinfo; echo >/root/later; sync",
    );
    cluster.ok(&["stop", "--now", VM]);
    cluster.ok(&["snapshot", "revert", VM, "final"]);
    check_disk(&cluster, VM, &durable);

    let boot = begin_boot(&cluster);
    File::options().write(true).open(&cut).unwrap().set_len(0).unwrap();
    overwrite(&spoilt);
    boot.finish(BOOT_LIMIT);
    // What a boot reads may lie on either of them alone.
    let cache = cluster.node_status(NODE)["cache"].clone();
    assert!(cache["failed_media"] != 0 || cache["dropped_chunks"] != 0, "the cache was not missed: {cache}");
    let mut agent = Agent::of(&cluster, NODE, VM);
    assert_eq!(agent.run(READ_BACK), sum);
    assert_no_disk_errors(&cluster, NODE, VM, &mut agent);
}

#[test]
fn survive_a_medium_that_lies_or_is_cut_short_gives_no_wrong_byte() {
    let mut cluster = Cluster::start();
    cluster.add_node("o", &[]);
    let source = cluster.path("source");
    make_raw(&source, 48, 5);
    cluster.share(&["o"], "disk:1", &source);
    for (node, spoil) in [("n", overwrite as fn(&Path)), ("m", punch)] {
        let medium = cluster.path(&format!("medium-{node}"));
        cluster.add_node(node, &["--cache", &format!("{}={CACHE_MIB}M", medium.display())]);
        cluster.ok(&["--node", node, "image", "attach", "disk:1"]);
        let volume = cluster.volume(node, "disk+1");
        for _ in 0..2 {
            assert_same(&volume, &source);
        }
        spoil(&medium);
        assert_same(&volume, &source);
        let cache = cluster.node_status(node)["cache"].clone();
        assert!(cache["dropped_chunks"].as_u64().unwrap() > 0, "{cache}");
        // Most chunks have been fetched anew if the medium was not given up.
        File::options().write(true).open(&medium).unwrap().set_len(0).unwrap();
        assert_same(&volume, &source);
    }
}

/// What happens to the guest's disk and daemon.
struct Storm {
    random: StdRng,
    snapshots: usize,
    /// Snapshots that were taken for certain.
    kept: Vec<String>,
}

impl Storm {
    /// Kills the daemon at a moment at which it may be about anything.
    fn strike(&mut self, cluster: &mut Cluster) {
        let under_way = self.begin_something(cluster);
        sleep(Duration::from_millis(self.random.random_range(0..LIFE_MS_MAX)));
        cluster.kill_node(NODE);
        drop(under_way);
        cluster.restart_node(NODE);
    }

    /// Asks for something that may or may not come about.
    fn begin_something(&mut self, cluster: &Cluster) -> Option<Background> {
        self.snapshots += 1;
        let snapshot = format!("s{}", self.snapshots);
        let clone = format!("k{}", self.snapshots);
        match self.random.random_range(0..6) {
            0 | 1 => Some(cluster.begin("storm", &["snapshot", VM, &snapshot])),
            2 => Some(cluster.begin("storm", &["snapshot", VM, &snapshot, "--quiesce"])),
            3 => Some(cluster.begin("storm", &["clone", VM, "--name", &clone])),
            4 => {
                let known = cluster.json(&["snapshot", "list", VM]);
                let mut names =
                    known.as_array().unwrap().iter().map(|snapshot| snapshot["name"].as_str().unwrap());
                // What was given up is merged away, most likely while the daemon is killed.
                let given_up = names.find(|name| !self.kept.iter().any(|kept| kept == name))?;
                Some(cluster.begin("storm", &["snapshot", "delete", VM, given_up]))
            }
            _ => None,
        }
    }

    /// Takes snapshots that must succeed, and gives up all others. Gives what was durable before.
    fn calm(&mut self, cluster: &Cluster, kill: usize) -> Durable {
        let durable = durable(cluster);
        let [plain, quiesced] = ["plain", "quiesced"].map(|kind| format!("{kind}-{kill}"));
        cluster.ok(&["snapshot", VM, &plain]);
        cluster.ok(&["snapshot", VM, &quiesced, "--quiesce"]);
        self.kept.extend([plain, quiesced]);
        let known = cluster.json(&["snapshot", "list", VM]);
        let known: Vec<&str> =
            known.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
        assert!(self.kept.iter().all(|kept| known.contains(&&**kept)), "{:?} of {known:?}", self.kept);
        let mut delete = vec!["snapshot", "delete", VM];
        delete.extend(known.iter().filter(|name| !self.kept.iter().any(|kept| kept == *name)));
        if delete.len() > 3 {
            cluster.ok(&delete);
        }
        let vms = cluster.json(&["list"]);
        let clones = vms.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap());
        for clone in clones.filter(|name| name.starts_with('k')) {
            cluster.ok(&["destroy", clone]);
        }
        durable
    }
}

/// The number of the record that is durable at each place, or of a later one.
type Durable = BTreeMap<u64, u64>;

fn begin_boot(cluster: &Cluster) -> Background {
    let args = ["boot", "--image", IMAGE, "--name", "w", "--nodes", NODE, "--ready", "console:login:"];
    cluster.begin("boot", &args)
}

fn begin_writing(cluster: &Cluster) {
    let mut agent = Agent::of(cluster, NODE, VM);
    agent.run(&format!("echo {} | base64 -d >/run/writer.py", BASE64.encode(WRITER)));
    agent.start("exec python3 /run/writer.py >/run/writer.log 2>&1");
    wait_for("the guest writes", STEP_LIMIT, || {
        agent.run("cat /run/durable || true").lines().nth(100).map(drop)
    });
}

/// What is durable on the guest's disk. The agent is left alone then: it serves one client at a time.
fn durable(cluster: &Cluster) -> Durable {
    parse(&Agent::of(cluster, NODE, VM).run("cat /run/durable"))
}

fn parse(durable: &str) -> Durable {
    let entry = |line: &str| {
        let (place, number) = line.split_once(' ').unwrap();
        (place.parse().unwrap(), number.parse().unwrap())
    };
    durable.lines().map(entry).collect()
}

/// Ends the writer, which must have met no error. Gives what is durable, and the sum of its file as read from the disk.
fn end_writing(cluster: &Cluster) -> (Durable, String) {
    let mut agent = Agent::of(cluster, NODE, VM);
    agent.run("touch /run/stop");
    wait_for("the writer has ended", STEP_LIMIT, || {
        let said = agent.run("cat /run/writer.log; ls /run/stopped 2>/dev/null || true");
        assert!(!said.contains("Error"), "the writer met an error: {said}");
        said.contains("stopped").then_some(())
    });
    let durable = parse(&agent.run("cat /run/durable"));
    let sum = agent.run(READ_BACK);
    assert!(sum.ends_with("records\n"), "{sum}");
    assert_no_disk_errors(cluster, NODE, VM, &mut agent);
    (durable, sum)
}

/// Checks the file system on a disk that no guest uses, and the records in it.
fn check_disk(cluster: &Cluster, vm: &str, durable: &Durable) {
    let copy = cluster.path("copy");
    let socket = cluster.node_dir(NODE).join("disks").join(format!("{vm}.sock"));
    let server = json!({ "driver": "nbd", "server": { "type": "unix", "path": socket.to_str().unwrap() } });
    let root = json!({ "driver": "raw", "offset": ROOT_OFFSET, "file": server });
    let root = format!("json:{root}");
    tool("qemu-utils", "qemu-img", &["convert", "-O", "raw", &root, copy.to_str().unwrap()]);
    let root = copy.to_str().unwrap();
    // What a power cut leaves: the journal to be replayed, and counts that are only kept with a clean unmount.
    let replayed = tool_output("e2fsprogs", "e2fsck", &["-f", "-p", root]);
    assert!(matches!(replayed.status.code(), Some(0 | 1)), "{vm}: {}", both(&replayed));
    tool("e2fsprogs", "e2fsck", &["-f", "-n", root]);
    let records = cluster.path("records");
    let dump = format!("dump /root/records {}", records.display());
    tool("e2fsprogs", "debugfs", &["-R", &dump, root]);
    check_records(vm, &records, durable);
    fs::remove_file(copy).unwrap();
}

/// Each place has a whole record, or none, and not an older one than was durable.
fn check_records(vm: &str, file: &Path, durable: &Durable) {
    let bytes = fs::read(file).unwrap();
    assert!(!durable.is_empty() && bytes.len() >= RECORD_BYTES);
    let mut found = Durable::new();
    for (place, record) in (0..).zip(bytes.chunks(RECORD_BYTES)) {
        if record.iter().all(|&byte| byte == 0) {
            continue;
        }
        let (body, sum) = record.split_at(RECORD_BYTES - 4);
        let number = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().unwrap());
        assert_eq!(crc32(body).to_le_bytes(), sum, "{vm}: the record at place {place} is torn");
        assert_eq!(number(0), place, "{vm}: a record is at another's place");
        found.insert(place, number(8));
    }
    for (place, number) in durable {
        let now = found.get(place);
        assert!(now >= Some(number), "{vm}: place {place} has {now:?}, and {number} was durable");
    }
}

/// The checksum of zlib and Ethernet, bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Overwrites a cache medium, in the page cache too.
fn overwrite(medium: &Path) {
    let (to, count) = (format!("of={}", medium.display()), format!("count={CACHE_MIB}"));
    tool("coreutils", "dd", &["if=/dev/urandom", &to, &count, "bs=1M", "conv=notrunc", "status=none"]);
}

/// Makes a hole of all that a cache medium holds.
fn punch(medium: &Path) {
    let length = format!("{CACHE_MIB}MiB");
    tool("util-linux", "fallocate", &["--punch-hole", "--length", &length, medium.to_str().unwrap()]);
}
