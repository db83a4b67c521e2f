//! The media of a node's cache group, which come, go, fail and lie while disks on it are read.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, both, make_raw, wait_for};

/// Size of the images in MiB, a third of it data.
const MIB: usize = 24;

/// Bytes before the slots of a medium of 64 MiB: its header and its directory.
const SLOTS_OFFSET: u64 = 64 << 10;

/// The type that `statfs(2)` gives tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;

#[test]
fn cache_media_are_added_and_removed_under_readers_and_each_chunk_is_fetched_once_until_one_goes() {
    let (cluster, source) = cluster(&["o", "n"]);
    cluster.ok(&["--node", "n", "create", "vm", "--image", "disk:1"]);
    let (first, second) = (cluster.path("n.cache"), cluster.path("second"));
    let disks = [cluster.volume("n", "disk+1"), cluster.disk("n", "vm")];
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let over = OnDrop(&is_over);
        for disk in &disks {
            let (source, is_over) = (&source, &is_over);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    assert_same(disk, source);
                }
            });
        }
        assert_eq!(paths(&media(&cluster, "n")), [text(&first)]);
        add(&cluster, "n", &second, "64M");
        add(&cluster, "n", &second, "64M");
        assert_eq!(paths(&media(&cluster, "n")), [text(&first), text(&second)]);
        assert_same(&disks[0], &source);
        let status = cluster.node_status("n");
        let count = |counter: &str| status["cache"][counter].as_u64().unwrap();
        assert_eq!(count("fetched_chunks"), count("resident_chunks"), "a chunk was fetched twice: {status}");

        for _ in 0..3 {
            remove(&cluster, "n", &first);
            assert_eq!(paths(&media(&cluster, "n")), [text(&second)]);
            assert_same(&disks[1], &source);
            add(&cluster, "n", &first, "2G");
            remove(&cluster, "n", &second);
            assert_same(&disks[0], &source);
            add(&cluster, "n", &second, "64M");
        }
        drop(over);
    });
    assert!(first.exists() && second.exists(), "the files are left");
    for medium in media(&cluster, "n") {
        assert_eq!((&medium["state"], &medium["failures"]), (&"healthy".into(), &0.into()), "{medium}");
    }
    let table = cluster.ok(&["--node", "n", "cache", "list"]);
    assert!(
        table.starts_with("NODE") && table.contains(text(&second)) && table.contains("64.0 MiB"),
        "{table}"
    );
    assert_eq!(cluster.json(&["cache", "list"]).as_array().unwrap().len(), 3, "those of both nodes");
}

#[test]
fn cache_the_set_of_media_survives_a_restart_with_its_chunks() {
    let (mut cluster, source) = cluster(&["o", "n"]);
    let (first, second) = (cluster.path("n.cache"), cluster.path("second"));
    fs::create_dir(cluster.path("mount")).unwrap();
    let lost = cluster.path("mount/lost");
    for (path, size) in [(&second, "64M"), (&lost, "32M")] {
        add(&cluster, "n", path, size);
    }
    // It is in --cache, and yet stays away.
    remove(&cluster, "n", &first);
    remove(&cluster, "n", &lost);
    add(&cluster, "n", &lost, "16M");
    assert_same(&cluster.volume("n", "disk+1"), &source);
    let before = media(&cluster, "n");
    assert_eq!(paths(&before), [text(&lost), text(&second)]);
    let of = |media: &[Value], what: &str| -> Vec<Value> { media.iter().map(|m| m[what].clone()).collect() };

    restart(&mut cluster, "n");
    let after = media(&cluster, "n");
    for what in ["path", "size_bytes", "resident_chunks", "state"] {
        assert_eq!(of(&after, what), of(&before, what), "{what}");
    }
    assert_same(&cluster.volume("n", "disk+1"), &source);
    assert_eq!(cluster.node_status("n")["cache"]["fetched_chunks"], 0);

    // A medium that is not there any more holds nobody up.
    cluster.kill_node("n");
    fs::remove_dir_all(cluster.path("mount")).unwrap();
    cluster.restart_node("n");
    cluster.wait_up("n");
    assert_same(&cluster.volume("n", "disk+1"), &source);
    let after = media(&cluster, "n");
    assert_eq!(of(&after, "state"), ["failed", "healthy"]);
    assert!(after[0]["reason"].as_str().unwrap().contains("No such file"), "{after:?}");
    assert_eq!(cluster.node_status("n")["cache"]["failed_media"], 1);
    let said = cluster.refused(&["--node", "n", "cache", "add", &format!("{}=16M", text(&lost))]);
    assert!(said.contains("No such file") && said.contains(text(&lost)), "{said}");
    remove(&cluster, "n", &lost);
    add(&cluster, "n", &first, "2G");
    restart(&mut cluster, "n");
    assert_eq!(paths(&media(&cluster, "n")), [text(&first), text(&second)]);
}

#[test]
fn cache_a_medium_that_is_cut_short_under_the_node_is_dropped_and_can_be_added_again() {
    let (cluster, source) = cluster(&["o", "n"]);
    let (first, second) = (cluster.path("n.cache"), cluster.path("second"));
    add(&cluster, "n", &second, "64M");
    remove(&cluster, "n", &first);
    let disk = cluster.volume("n", "disk+1");
    assert_same(&disk, &source);
    File::options().write(true).open(&second).unwrap().set_len(1 << 20).unwrap();

    assert_same(&disk, &source);
    let failed = medium(&cluster, "n", &second);
    assert_eq!(failed["state"], "failed", "{failed}");
    assert!(failed["reason"].as_str().unwrap().contains("cut short"), "{failed}");
    let table = cluster.ok(&["--node", "n", "cache", "list"]);
    assert!(table.contains("failed") && table.contains("cut short"), "{table}");
    // It was the only one: nothing is cached, and nobody notices.
    assert_same(&disk, &source);
    let said = cluster.refused(&["--node", "n", "cache", "add", &format!("{}=64M", text(&second))]);
    assert!(said.contains("failed") && said.contains("virtman cache remove"), "{said}");

    remove(&cluster, "n", &second);
    add(&cluster, "n", &second, "64M");
    assert_same(&disk, &source);
    let again = medium(&cluster, "n", &second);
    assert_eq!((&again["state"], &again["failures"]), (&"healthy".into(), &0.into()), "{again}");
    assert_ne!(again["resident_chunks"], 0);
}

#[test]
fn cache_no_wrong_byte_of_a_rotten_medium_reaches_a_guest_or_a_child() {
    let (mut cluster, source) = cluster(&["o", "n"]);
    cluster.add_node("c", &[]);
    // Temporary directories may be in memory.
    let on_disk = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [second, third] = ["second", "third"].map(|name| on_disk.path().join(name));
    let first = cluster.path("n.cache");
    let disk = cluster.volume("n", "disk+1");
    add(&cluster, "n", &second, "64M");
    remove(&cluster, "n", &first);
    assert_same(&disk, &source);

    // What was found on a medium at the start is checked before its first use, and blamed on nobody.
    cluster.kill_node("n");
    rot(&second);
    cluster.restart_node("n");
    cluster.wait_up("n");
    assert_same(&disk, &source);
    let status = cluster.node_status("n");
    assert!(status["cache"]["dropped_chunks"].as_u64().unwrap() > 16, "{status}");
    assert_eq!(medium(&cluster, "n", &second)["state"], "healthy");

    // What was whole since is checked when it comes from the device again, and blamed on the medium.
    add(&cluster, "n", &third, "64M");
    rot(&second);
    assert_same(&disk, &source);
    let is_rotten = |path: &Path| {
        let failed = medium(&cluster, "n", path);
        assert_eq!(failed["state"], "failed", "{failed}");
        assert!(failed["reason"].as_str().unwrap().contains("other bytes"), "{failed}");
    };
    is_rotten(&second);

    // The same before it goes to a child.
    assert_same(&disk, &source);
    rot(&third);
    cluster.ok(&["--node", "c", "image", "attach", "disk:1"]);
    assert_eq!(cluster.parents("disk:1")["c"].as_deref(), Some("n"));
    assert_same(&cluster.volume("c", "disk+1"), &source);
    assert_eq!(cluster.node_status("c")["links"]["lies"], 0, "a wrong chunk was passed on");
    is_rotten(&third);
    assert_same(&disk, &source);
    assert_eq!(cluster.node_state("n").as_deref(), Some("up"), "nobody has anything to blame it for");
}

#[test]
fn cache_refusals_say_what_to_do_and_change_nothing() {
    let (cluster, _) = cluster(&["o", "n"]);
    let before = media(&cluster, "n");
    let theirs = cluster.path("o.cache");
    let foreign = cluster.path("letter");
    fs::write(&foreign, "Dear reader").unwrap();
    let (first, small) = (cluster.path("n.cache"), cluster.path("small"));
    let dir = cluster.path("dir");
    fs::create_dir(&dir).unwrap();
    for (path, size, words) in [
        (&dir, "1G", &["Is a directory", "name a file"][..]),
        (&small, "100K", &["too small", "102400", "131072 do"]),
        (&foreign, "1G", &["not a VirtMan cache", "erase it first"]),
        (&theirs, "2G", &["in use by another process", "another file"]),
        (&first, "3G", &["there already", "3221225472", "virtman cache remove"]),
        (&cluster.path("no/such/place"), "1G", &["No such file", "directory that is there"]),
    ] {
        let said = cluster.refused(&["--node", "n", "cache", "add", &format!("{}={size}", text(path))]);
        assert!(words.iter().chain(&[text(path)]).all(|word| said.contains(word)), "{words:?}: {said}");
    }
    let refused = |args: &[&str], words: &[&str]| {
        let said = cluster.refused(&[&["--node", "n", "cache"], args].concat());
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
    };
    refused(&["add", "/x"], &["'/x'", "PATH=SIZE"]);
    refused(&["add", "/x=5Q"], &["'5Q'", "such as 20G"]);
    refused(&["remove", text(&first)], &["the last one", "virtman cache add PATH=SIZE"]);
    let here = std::env::current_dir().unwrap().join("some/medium");
    refused(&["remove", "some/medium"], &[text(&here), "on node n", "virtman cache list"]);
    assert_eq!(media(&cluster, "n"), before);
    assert!(
        !small.exists() && !cluster.node_dir("n").join("cache.json").exists(),
        "something was left behind"
    );
    assert_eq!(fs::read(&foreign).unwrap(), b"Dear reader");

    let help = cluster.ok(&["cache", "--help"]);
    assert!(help.contains("Examples:") && help.contains("compute --cache"), "{help}");
    let locally = cluster.run_at("n", &["cache", "list"]);
    assert!(both(&locally).contains(text(&first)), "{}", both(&locally));
}

/// A cluster in which the first node is the origin of `disk:1` and the others have it attached, and the
/// image's source.
fn cluster(names: &[&str]) -> (Cluster, PathBuf) {
    let cluster = Cluster::with_nodes(names);
    let source = cluster.path("source");
    make_raw(&source, MIB, 77);
    cluster.share(names, "disk:1", &source);
    (cluster, source)
}

fn restart(cluster: &mut Cluster, node: &str) {
    cluster.kill_node(node);
    cluster.restart_node(node);
    cluster.wait_up(node);
}

fn add(cluster: &Cluster, node: &str, path: &Path, size: &str) {
    let added = cluster.json(&["--node", node, "cache", "add", &format!("{}={size}", text(path))]);
    assert_eq!((&added["path"], &added["state"]), (&text(path).into(), &"healthy".into()), "{added}");
}

/// Removes a medium and waits until it is closed.
fn remove(cluster: &Cluster, node: &str, path: &Path) {
    cluster.ok(&["--node", node, "cache", "remove", text(path)]);
    wait_for(&format!("{} is closed", path.display()), STEP_LIMIT, || {
        (!paths(&media(cluster, node)).contains(&text(path).to_owned())).then_some(())
    });
}

fn media(cluster: &Cluster, node: &str) -> Vec<Value> {
    cluster.json(&["--node", node, "cache", "list"]).as_array().expect("a list").clone()
}

fn medium(cluster: &Cluster, node: &str, path: &Path) -> Value {
    media(cluster, node).into_iter().find(|medium| medium["path"] == text(path)).expect("it is listed")
}

fn paths(media: &[Value]) -> Vec<String> {
    media.iter().map(|medium| medium["path"].as_str().unwrap().to_owned()).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Has all slots of a medium hold nonsense on the device, and memory nothing of it: as if the device had lost them.
fn rot(path: &Path) {
    use std::os::unix::fs::FileExt;
    let file = File::options().write(true).open(path).unwrap();
    let file_system = rustix::fs::fstatfs(&file).unwrap().f_type as i64;
    assert_ne!(
        file_system,
        TMPFS_MAGIC,
        "{} is nowhere but in memory: set CARGO_TARGET_DIR to a disk",
        path.display()
    );
    let len = file.metadata().unwrap().len();
    for offset in (SLOTS_OFFSET..len).step_by(1 << 20) {
        let bytes = vec![0xa5; (len - offset).min(1 << 20) as usize];
        file.write_all_at(&bytes, offset).unwrap();
    }
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Ends the readers of a test, also when it fails.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
