//! Boot profiles through the real binary: recorded on one node, streamed to the next, moved as files, refused.

use std::fs;
use std::path::PathBuf;

use block::{ChunkIndex, ImageId};
use image::BootProfile;
use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, make_raw, qemu_io, wait_for};

/// Each third MiB of a test image holds data, 16 chunks of it; the others are zero.
const MIB: usize = 24;
const CHUNKS_PER_MIB: u64 = 16;

/// The MiB that the test's guest reads, in its order; all hold data.
const BOOT: [u64; 5] = [21, 0, 9, 3, 6];

#[test]
fn profiles_of_a_first_boot_are_streamed_to_the_next_node_and_survive_volt() {
    let mut cluster = cluster(&["o", "a", "b"]);
    boot(&cluster, "a", "first", &BOOT);
    let expected = chunks_of(&BOOT);
    let shown = wait_for("the boot is recorded", STEP_LIMIT, || {
        let shown = cluster.json(&["image", "profile", "show", "disk:1"]);
        shown["profile"].is_object().then_some(shown)
    });
    assert_eq!(shown["records"][0]["node"], "a", "{shown}");
    assert_eq!(shown["records"].as_array().unwrap().len(), 1, "{shown}");
    assert_eq!(shown["recording"], "on", "one record is not enough: {shown}");
    assert_eq!(exported(&cluster).chunks(), expected, "neither zeroes nor what the guest wrote itself");

    let streamed = stream(&cluster, "b");
    let count = expected.len() as u64;
    assert_eq!((&streamed["chunks"], &streamed["resident"]), (&count.into(), &count.into()), "{streamed}");
    assert!(streamed["elapsed_ms"].is_u64(), "{streamed}");
    let pages = 1;
    let is_fetched_once = |node: &str| {
        let status = cluster.node_status(node);
        assert_eq!(status["cache"]["resident_chunks"], count + pages, "{node}: {status}");
        assert_eq!(status["cache"]["fetched_chunks"], count + pages, "{node}: {status}");
        assert_eq!(status["links"]["received_chunks"], count + pages, "{node}: {status}");
    };
    is_fetched_once("b");
    boot(&cluster, "b", "second", &BOOT);
    stream(&cluster, "a");
    is_fetched_once("a");
    is_fetched_once("b");

    let before = wait_for("the second boot is recorded", STEP_LIMIT, || {
        let shown = cluster.json(&["image", "profile", "show", "disk:1"]);
        (shown["records"].as_array().unwrap().len() == 2).then_some(shown)
    });
    cluster.kill_volt();
    cluster.start_volt(&[]);
    assert_eq!(cluster.json(&["image", "profile", "show", "disk:1"]), before);

    // A node that starts again is told anew, and finds everything in its cache.
    cluster.kill_node("b");
    cluster.restart_node("b");
    cluster.wait_up("b");
    wait_for("b is done again", STEP_LIMIT, || {
        (attached(&cluster, "b")["profile"]["complete"] == true).then_some(())
    });
    assert_eq!(cluster.node_status("b")["links"]["received_chunks"], 0);
}

#[test]
fn profiles_recorded_anew_replace_the_old_one_and_cleared_ones_stay_away() {
    let cluster = cluster(&["o", "a"]);
    boot(&cluster, "a", "first", &BOOT);
    wait_for("the boot is recorded", STEP_LIMIT, || profile(&cluster));

    cluster.ok(&["image", "profile", "record", "disk:1"]);
    assert_eq!(exported(&cluster).chunks(), chunks_of(&BOOT), "the old one stays until there is another");
    let other = [0, 3, 6, 9, 12];
    boot(&cluster, "a", "second", &other);
    wait_for("the new boot replaces the old", STEP_LIMIT, || {
        (exported(&cluster).chunks() == chunks_of(&other)).then_some(())
    });

    cluster.ok(&["image", "profile", "clear", "disk:1"]);
    assert_eq!(profile(&cluster), None);
    wait_for("a hears of it", STEP_LIMIT, || attached(&cluster, "a")["profile"].is_null().then_some(()));
    boot(&cluster, "a", "third", &BOOT);
    assert_eq!(profile(&cluster), None, "nobody asked for a record");
    let refused = cluster.refused(&["image", "profile", "export", "disk:1", "/nowhere"]);
    assert!(refused.contains("has no boot profile yet") && refused.contains("profile record"), "{refused}");
}

#[test]
fn profiles_move_as_files_between_clusters_and_names_of_one_image() {
    let (here, there) = (cluster(&["o"]), cluster(&["o", "a"]));
    let file = profile_file(&here, image_id(&here), &[5, 4, 0]);
    here.ok(&["image", "profile", "import", "disk:1", &file]);
    let moved = here.path("moved.profile");
    here.ok(&["image", "profile", "export", "disk:1", moved.to_str().unwrap()]);
    assert_eq!(fs::read(&moved).unwrap(), fs::read(&file).unwrap());

    let source = there.path("source");
    there.ok(&["--node", "o", "image", "add", "same:2", source.to_str().unwrap()]);
    there.ok(&["image", "profile", "import", "same:2", moved.to_str().unwrap()]);
    let shown = there.json(&["image", "profile", "show", "disk:1"]);
    assert_eq!(shown["profile"]["chunks"], 3, "names of one image have one profile: {shown}");
    assert_eq!(shown["recording"], "off", "{shown}");
    assert_eq!(stream(&there, "a")["resident"], 3);
    let text = there.ok(&["image", "profile", "show", "disk:1"]);
    assert!(text.contains("3 (192 KiB)") && text.contains("a file"), "{text}");
}

#[test]
fn profiles_that_are_none_or_another_images_are_refused_with_what_is_wrong() {
    let cluster = cluster(&["o"]);
    let good = profile_file(&cluster, image_id(&cluster), &[1, 2, 3]);
    let write = |name: &str, bytes: &[u8]| {
        let path = cluster.path(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let bytes = fs::read(&good).unwrap();
    let source = cluster.path("source").to_str().unwrap().to_owned();
    let other = profile_file(&cluster, ImageId::of_root_page(b"other"), &[1]);
    let beyond = profile_file(&cluster, image_id(&cluster), &[MIB as u64 * CHUNKS_PER_MIB]);
    for (file, reason) in [
        (source, "this is not a boot profile: it has 25165824 bytes"),
        (write("text", b"hello"), "does not begin with a boot profile's magic"),
        (write("cut", &bytes[..bytes.len() - 1]), "cut short or changed"),
        (write("nothing", b""), "this is not a boot profile"),
        (other, "profiles fit the very image that they were recorded on"),
        (beyond, "names chunk 384, but there are 384"),
        ("/nowhere".to_owned(), "No such file"),
    ] {
        let refused = cluster.refused(&["image", "profile", "import", "disk:1", &file]);
        assert!(refused.contains(reason), "{file}: {refused}");
    }
    assert_eq!(profile(&cluster), None);
    for command in ["show", "record", "clear"] {
        let refused = cluster.refused(&["image", "profile", command, "none:1"]);
        assert!(refused.contains("there is no image 'none:1'"), "{command}: {refused}");
    }
}

/// A cluster whose first node is the origin of `disk:1`.
fn cluster(nodes: &[&str]) -> Cluster {
    let cluster = Cluster::with_nodes(nodes);
    let source = cluster.path("source");
    make_raw(&source, MIB, 11);
    cluster.share(&nodes[..1], "disk:1", &source);
    cluster
}

/// A guest that reads these MiB, zeroes, and what it wrote itself; then it is gone.
fn boot(cluster: &Cluster, node: &str, vm: &str, mib: &[u64]) {
    cluster.ok(&["--node", node, "create", vm, "--image", "disk:1"]);
    let reads: Vec<String> = mib.iter().map(|mib| format!("read {mib}M 1M")).collect();
    let mut commands = vec!["write -P 0x77 15M 1M", "read 1M 1M", "read -P 0x77 15M 1M"];
    commands.extend(reads.iter().map(String::as_str));
    qemu_io(&cluster.disk(node, vm), &commands);
    cluster.ok(&["--node", node, "destroy", vm]);
}

fn chunks_of(mib: &[u64]) -> Vec<ChunkIndex> {
    let chunks = mib.iter().flat_map(|mib| mib * CHUNKS_PER_MIB..(mib + 1) * CHUNKS_PER_MIB);
    chunks.map(ChunkIndex).collect()
}

/// The image's profile as Volt shows it.
fn profile(cluster: &Cluster) -> Option<Value> {
    let shown = cluster.json(&["image", "profile", "show", "disk:1"]);
    Some(shown["profile"].clone()).filter(Value::is_object)
}

fn exported(cluster: &Cluster) -> BootProfile {
    let file: PathBuf = cluster.path("exported.profile");
    cluster.ok(&["image", "profile", "export", "disk:1", file.to_str().unwrap()]);
    BootProfile::decode(&fs::read(file).unwrap()).unwrap()
}

fn image_id(cluster: &Cluster) -> ImageId {
    cluster.json(&["image", "show", "disk:1"])["id"].as_str().unwrap().parse().unwrap()
}

/// Writes a profile of these chunks to a file.
fn profile_file(cluster: &Cluster, image: ImageId, chunks: &[u64]) -> String {
    let chunks: Vec<ChunkIndex> = chunks.iter().copied().map(ChunkIndex).collect();
    let file = cluster.path(&format!("{}-{}.profile", image.short(), chunks.len()));
    fs::write(&file, BootProfile::new(image, chunks).unwrap().encode()).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The image as a node has it; attached now if it was not.
fn attached(cluster: &Cluster, node: &str) -> Value {
    cluster.json(&["--node", node, "image", "attach", "disk:1"])
}

/// Attaches the image to a node and waits until its profile is there.
fn stream(cluster: &Cluster, node: &str) -> Value {
    wait_for(&format!("the profile is on {node}"), STEP_LIMIT, || {
        let profile = attached(cluster, node)["profile"].clone();
        (profile["complete"] == true).then_some(profile)
    })
}
