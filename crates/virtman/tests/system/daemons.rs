//! What survives when daemons are killed, come back, or lie.

use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, make_raw, qemu_io, wait_for};

/// The origin and four nodes below it, the last one at level three.
const FIVE: [&str; 5] = ["o", "a", "b", "c", "d"];

/// Size of the images in MiB, a third of it data: much more than any queue between a disk and its reader.
const MIB: usize = 48;

#[test]
fn daemons_a_node_that_was_killed_has_the_same_disks_and_fetches_nothing_again() {
    let (mut cluster, source) = cluster(&["o", "n"]);
    let commands = ["write -P 7 100k 300k", "write -z 3M 5000", "discard 6M 64k", "flush"];
    let expected = cluster.path("expected");
    fs::copy(&source, &expected).unwrap();
    qemu_io(expected.to_str().unwrap(), &commands);
    for vm in ["written", "untouched"] {
        cluster.ok(&["--node", "n", "create", vm, "--image", "disk:1"]);
    }
    qemu_io(&cluster.disk("n", "written"), &commands);
    assert_same(&cluster.volume("n", "disk+1"), &source);
    let mut before = cluster.json(&["--node", "n", "list"]);
    for vm in before.as_array_mut().unwrap() {
        // Only the daemon that made a disk knows how long that took.
        assert!(vm["disk_ms"].take().is_u64(), "{vm}");
    }
    let resident = cluster.node_status("n")["cache"]["resident_chunks"].clone();

    cluster.kill_node("n");
    cluster.restart_node("n");
    cluster.wait_up("n");

    assert_eq!(cluster.json(&["--node", "n", "list"]), before);
    assert_same(&cluster.disk("n", "written"), &expected);
    assert_same(&cluster.disk("n", "untouched"), &source);
    assert_same(&cluster.volume("n", "disk+1"), &source);
    let after = cluster.node_status("n");
    assert_eq!(after["cache"]["resident_chunks"], resident, "{after}");
    for none in ["fetched_chunks", "dropped_chunks", "misses"] {
        assert_eq!(after["cache"][none], 0, "{none}: {after}");
    }
    assert_eq!(after["links"]["received_chunks"], 0, "{after}");
}

#[test]
fn daemons_nodes_serve_and_create_without_volt_which_finds_all_as_it_was() {
    let (mut cluster, source) = cluster(&FIVE);
    cluster.ok(&[
        "--node",
        "o",
        "image",
        "add",
        "other:1",
        source_of(&cluster, "other", 9).to_str().unwrap(),
    ]);
    let parents = cluster.parents("disk:1");
    let images = cluster.json(&["image", "list"]);
    let d = cluster.volume("d", "disk+1");
    Reader::start(&d).read(MIB / 3);

    cluster.kill_volt();

    assert_same(&d, &source);
    let create = |vm: &str, image: &str| cluster.run_at("d", &["create", vm, "--image", image]);
    assert!(create("vm", "disk:1").status.success());
    assert_same(&cluster.disk("d", "vm"), &source);
    let refused = create("vm2", "other:1");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("Volt cannot be asked"), "{said}");
    assert!(said.contains("start Volt, then try again"), "{said}");

    cluster.start_volt(&[]);

    assert_eq!(cluster.json(&["image", "list"]), images);
    for node in FIVE {
        cluster.wait_up(node);
    }
    wait_for("all nodes are in the hierarchy again", STEP_LIMIT, || {
        (cluster.parents("disk:1").len() == FIVE.len()).then_some(())
    });
    assert_eq!(cluster.parents("disk:1"), parents);
    cluster.ok(&["--node", "d", "create", "vm2", "--image", "other:1"]);
}

#[test]
fn daemons_a_reader_goes_on_when_the_parent_of_its_node_is_killed() {
    let (mut cluster, source) = cluster(&FIVE);
    let old = cluster.parents("disk:1")["d"].clone().expect("d has a parent");
    assert_ne!(old, "o", "d is at level 3: {:?}", cluster.parents("disk:1"));

    let mut reader = Reader::start(&cluster.volume("d", "disk+1"));
    let mut found = reader.read(MIB / 3);
    cluster.kill_node(&old);
    found.extend(reader.read_rest());

    assert!(found == fs::read(&source).unwrap(), "the reader got other bytes than the image's");
    let new = wait_for("d has another parent", STEP_LIMIT, || {
        cluster.parents("disk:1")["d"].clone().filter(|new| *new != old)
    });
    assert!(FIVE.contains(&new.as_str()), "{new}");
    cluster.restart_node(&old);
    cluster.wait_up(&old);
    wait_for("the killed parent is in the hierarchy again", STEP_LIMIT, || {
        cluster.parents("disk:1").get(&old).cloned().flatten()
    });
    assert_same(&cluster.volume(&old, "disk+1"), &source);
}

#[test]
fn daemons_readers_wait_for_an_origin_that_is_away() {
    let (mut cluster, source) = cluster(&["o", "a", "b", "c"]);
    let mut reader = Reader::start(&cluster.volume("c", "disk+1"));
    let mut found = reader.read(MIB / 3);

    cluster.kill_node("o");
    let rest = std::thread::spawn(move || reader.read_rest());
    wait_for("Volt counts the origin as down", STEP_LIMIT, || {
        (cluster.node_state("o").as_deref() == Some("down")).then_some(())
    });
    assert!(!rest.is_finished(), "the rest of the image is nowhere but at the origin");
    cluster.restart_node("o");

    found.extend(rest.join().unwrap());
    assert!(found == fs::read(&source).unwrap(), "the reader got other bytes than the image's");
}

/// A cluster in which the first node is the origin of `disk:1` and the others have it attached, and the
/// image's source.
fn cluster(names: &[&str]) -> (Cluster, PathBuf) {
    let cluster = Cluster::with_nodes(names);
    let source = source_of(&cluster, "source", 1);
    cluster.share(names, "disk:1", &source);
    (cluster, source)
}

fn source_of(cluster: &Cluster, name: &str, seed: u64) -> PathBuf {
    let source = cluster.path(name);
    make_raw(&source, MIB, seed);
    source
}

/// Reads a disk from its begin to its end, and only as fast as it is told to: `nbdcopy` into a pipe.
struct Reader {
    process: Child,
    pipe: ChildStdout,
}

impl Reader {
    fn start(disk: &str) -> Reader {
        let mut process = Command::new("nbdcopy")
            .args([disk, "-"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("nbdcopy runs: it is in the Debian package libnbd-bin");
        let pipe = process.stdout.take().expect("it was asked for");
        Reader { process, pipe }
    }

    fn read(&mut self, mib: usize) -> Vec<u8> {
        let mut bytes = vec![0; mib << 20];
        self.pipe.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads to the end, at which nbdcopy must have met no error.
    fn read_rest(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.pipe.read_to_end(&mut bytes).unwrap();
        assert!(self.process.wait().unwrap().success(), "nbdcopy met an error");
        bytes
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Needs the feature `faults`, which `scripts/test` sets.
#[cfg(feature = "faults")]
#[test]
fn daemons_a_node_that_sends_wrong_bytes_is_found_out_and_no_wrong_byte_arrives_below_it() {
    let mut cluster = Cluster::start_with(&["--fan-out", "1"]);
    let source = cluster.path("source.raw");
    make_raw(&source, MIB, 5);
    cluster.add_node("o", &[]);
    cluster.add_node("liar", &["--fault", "flip-bits"]);
    cluster.add_node("b", &[]);
    cluster.add_node("c", &[]);
    cluster.share(&["o", "liar", "b", "c"], "disk:1", &source);
    let parent = |node: &str| cluster.parents("disk:1")[node].clone();
    assert_eq!(parent("b").as_deref(), Some("liar"), "the test needs readers below the liar");
    assert_eq!(parent("c").as_deref(), Some("b"));

    assert_same(&cluster.volume("c", "disk+1"), &source);
    assert_same(&cluster.volume("liar", "disk+1"), &source);

    let lies = cluster.node_status("b")["links"]["lies"].as_u64();
    assert!(lies.is_some_and(|lies| lies > 0), "the liar was never asked: {lies:?}");
    assert_eq!(cluster.node_status("c")["links"]["lies"], 0, "a lie was passed on");
    wait_for("the liar serves nobody any more", STEP_LIMIT, || {
        let serves = cluster.parents("disk:1").values().flatten().any(|parent| parent == "liar");
        let quarantined = cluster.node_state("liar").as_deref() == Some("quarantined");
        (quarantined && !serves).then_some(())
    });

    cluster.ok(&["volt", "pardon", "liar"]);
    assert_eq!(cluster.node_state("liar").as_deref(), Some("up"));
}
