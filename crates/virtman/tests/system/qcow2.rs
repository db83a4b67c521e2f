//! Disks as qcow2 files for other programs, and disks from files that other programs made. Judged by qemu-img.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{Background, STEP_LIMIT, assert_same, make_raw, qemu_io, tool, tool_output, wait_for};

const MIB: usize = 24;

/// The origin `o` of `disk:1`, and `n`, which fetches from it and has the VM `v`.
fn cluster() -> Cluster {
    let cluster = Cluster::with_nodes(&["o", "n"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 13);
    cluster.share(&["o", "n"], "disk:1", &source);
    cluster.ok(&["--node", "n", "create", "v", "--image", "disk:1"]);
    fs::copy(&source, cluster.path("expected")).unwrap();
    fs::create_dir(cluster.path("out")).unwrap();
    cluster
}

/// Writes the same to the disk of `v` and to what is expected of it.
fn write(cluster: &Cluster, commands: &[&str]) {
    qemu_io(&cluster.disk("n", "v"), commands);
    let zeroed: Vec<String> = commands.iter().map(|command| command.replace("discard", "write -z")).collect();
    let zeroed: Vec<&str> = zeroed.iter().map(String::as_str).collect();
    qemu_io(cluster.path("expected").to_str().unwrap(), &zeroed);
}

/// A path for a file that is to be made.
fn out(cluster: &Cluster, name: &str) -> String {
    cluster.path("out").join(name).to_str().unwrap().to_owned()
}

/// Demands that QEMU finds no fault in the file, and in its disk what is expected.
fn judge(file: &str, expected: &Path) {
    tool("qemu-utils", "qemu-img", &["check", "-q", "-f", "qcow2", file]);
    let expected = expected.to_str().unwrap();
    tool("qemu-utils", "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", file, expected]);
}

/// Exports a snapshot both ways, and has QEMU judge both.
fn export_both(cluster: &Cluster, node: &str, vm: &str, snapshot: &str, expected: &Path) {
    let paths = ["over", "flat"].map(|kind| out(cluster, &format!("{vm}-{snapshot}-{kind}.qcow2")));
    let export = |rest: &[&str]| {
        cluster.json(&[&["--node", node, "snapshot", "export", vm, snapshot, "--to"], rest].concat())
    };
    let over = export(&[&paths[0]]);
    let flat = export(&[&paths[1], "--flatten"]);
    paths.iter().for_each(|path| judge(path, expected));
    assert!(over["backing"]["name"].is_string() && flat["backing"].is_null(), "{over}\n{flat}");
    let data = |view: &Value| view["data_bytes"].as_u64().unwrap();
    assert!((1..data(&flat)).contains(&data(&over)), "{over}\n{flat}");
}

fn snapshots(cluster: &Cluster, node: &str, vm: &str) -> Vec<String> {
    let listed = cluster.json(&["--node", node, "snapshot", "list", vm]);
    listed.as_array().unwrap().iter().map(|line| line["name"].as_str().unwrap().to_owned()).collect()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Whether the node has a file open where exports go, which has no name before it is complete.
fn is_writing(cluster: &Cluster) -> bool {
    let files = fs::read_dir(format!("/proc/{}/fd", cluster.node_pid("n"))).unwrap();
    let mut files = files.filter_map(|file| fs::read_link(file.unwrap().path()).ok());
    files.any(|file| file.starts_with(cluster.path("out")))
}

fn layer_dirs(cluster: &Cluster) -> usize {
    entries(&cluster.node_dir("n").join("layers"))
}

fn says(refusal: &str, words: &[&str]) {
    for word in words {
        assert!(refusal.contains(word), "'{word}' is missing in: {refusal}");
    }
}

/// What a VM did with its disk.
fn io(cluster: &Cluster, vm: &str, what: &str) -> u64 {
    cluster.json(&["--node", "n", "show", vm])["io"][what].as_u64().unwrap()
}

/// Makes a qcow2 file on `base` with these options of `qemu-img create`, and lets `qemu-io` write to it.
fn overlay(base: &Path, file: &Path, options: &[&str], commands: &[&str]) {
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.to_str().unwrap()];
    let (file, mut io) = (file.to_str().unwrap(), vec!["-f", "qcow2"]);
    tool("qemu-utils", "qemu-img", &[&create, options, &[file]].concat());
    io.extend(commands.iter().flat_map(|command| ["-c", command]));
    io.push(file);
    tool("qemu-utils", "qemu-io", &io);
}

#[test]
fn qcow2_of_several_layers_has_what_the_snapshot_had_while_the_vm_writes_on() {
    let cluster = cluster();
    let expected = cluster.path("expected");
    write(&cluster, &["write -P 1 3000 200k", "write -z 7M 3M"]);
    cluster.ok(&["snapshot", "v", "one"]);
    write(&cluster, &["write -P 2 12M 1M", "discard 0 1M", "write -P 4 15M 3M"]);
    cluster.ok(&["snapshot", "v", "two"]);
    write(&cluster, &["write -P 3 1M 64k", "write -z 12500k 100k", "discard 16M 1M", "write -P 5 23M 1M"]);
    let first = out(&cluster, "first.qcow2");
    let said = cluster.ok(&["snapshot", "v", "three", "--to", &first]);
    assert_eq!(said.trim(), first);
    judge(&first, &expected);
    let info = tool("qemu-utils", "qemu-img", &["info", "--output=json", &first]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["backing-filename"], cluster.volume("n", "disk+1").replace(":///?", ":///disk:1?"));

    let disk = cluster.disk("n", "v");
    let before = io(&cluster, "v", "writes");
    let writer = "qemu-img bench -f raw -w --pattern=9 -c 100000000 -s 65536 -d 4";
    let mut writer_command = Command::new(writer.split(' ').next().unwrap());
    writer_command.args(writer.split(' ').skip(1)).arg(&disk);
    let mut writer = Background::start(writer_command, &cluster.path("writer"));
    wait_for("the VM writes", STEP_LIMIT, || (io(&cluster, "v", "writes") > before + 10).then_some(()));
    export_both(&cluster, "n", "v", "three", &expected);
    writer.assert_running();
    drop(writer);
    let changed = tool_output("qemu-utils", "qemu-img", &["compare", &disk, expected.to_str().unwrap()]);
    assert_eq!(changed.status.code(), Some(1), "the VM's disk has changed meanwhile");
    assert_eq!(entries(&cluster.path("out")), 3);
}

#[test]
fn qcow2_from_an_origin_needs_no_daemon_to_be_opened_and_any_other_backing_is_taken_at_its_word() {
    let mut cluster = cluster();
    let (source, expected) = (cluster.path("source"), cluster.path("expected"));
    cluster.ok(&["--node", "o", "create", "w", "--image", "disk:1", "--size", "30M"]);
    File::options().write(true).open(&expected).unwrap().set_len(30 << 20).unwrap();
    for disk in [cluster.disk("o", "w"), expected.to_str().unwrap().to_owned()] {
        qemu_io(&disk, &["write -P 1 5000 70k", "write -P 2 28M 1M"]);
    }
    let (plain, named) = (out(&cluster, "plain.qcow2"), out(&cluster, "named.qcow2"));
    let exported = cluster.json(&["--node", "o", "snapshot", "w", "s", "--to", &plain]);
    assert_eq!(exported["backing"]["name"], source.to_str().unwrap());
    assert_eq!(exported["taken"]["name"], "s");
    fs::copy(&source, cluster.path("out/base.raw")).unwrap();
    let export = ["--node", "o", "snapshot", "export", "w", "s", "--to", &named, "--backing"];
    cluster.ok(&[&export[..], &["base.raw"]].concat());
    fs::remove_file(&named).unwrap();
    let exported = cluster.json(&[&export[..], &["base.raw", "--backing-format", "raw"]].concat());
    assert_eq!(
        (&exported["backing"]["name"], &exported["backing"]["format"]),
        (&"base.raw".into(), &"raw".into())
    );
    cluster.kill_node("o");
    judge(&plain, &expected);
    judge(&named, &expected);
}

#[test]
fn qcow2_of_a_disk_that_is_still_taken_over_has_all_of_it() {
    let mut cluster = cluster();
    cluster.add_node("slow", &["--background-rate", "64K"]);
    // Noise, of which no two chunks are the same, so that each has to be fetched.
    let noise = cluster.path("noise");
    make_raw(&noise, 1, 5);
    File::options().write(true).open(&noise).unwrap().set_len((1 << 20) - 4096).unwrap();
    write(&cluster, &[&format!("write -s {} 2M 12M", noise.display()), "write -P 2 100k 30k"]);
    cluster.ok(&["--node", "n", "clone", "v", "--to", "slow", "--name", "k"]);
    let disk = cluster.disk("slow", "k");
    let expected = cluster.path("expected");
    for disk in [&*disk, expected.to_str().unwrap()] {
        qemu_io(disk, &["write -P 7 3M 5000"]);
    }
    cluster.ok(&["--node", "slow", "snapshot", "k", "s"]);
    // 12 MiB take three minutes at that rate, unless somebody reads them.
    let details = cluster.json(&["--node", "slow", "show", "k"]);
    assert!(details["taking_over"]["id"].is_string(), "{details}");
    let shown = cluster.ok(&["--node", "slow", "show", "k"]);
    assert!(shown.contains("still takes over another VM's disk"), "{shown}");
    export_both(&cluster, "slow", "k", "s", &expected);
}

#[test]
fn qcow2_comes_back_as_it_went_and_files_of_other_makers_are_read_too() {
    let mut cluster = cluster();
    let (source, expected) = (cluster.path("source"), cluster.path("expected"));
    write(&cluster, &["write -P 1 3000 200k", "write -z 7M 3M", "discard 0 1M", "write -P 2 23M 1M"]);
    let exported = out(&cluster, "v.qcow2");
    cluster.ok(&["snapshot", "v", "s", "--to", &exported]);
    let import = |vm: &str, file: &str| {
        cluster.json(&["--node", "n", "create", vm, "--image", "disk:1", "--from", file])
    };
    let back = import("back", &exported);
    assert_eq!(
        (&back["layers"], &back["image"], &back["state"]),
        (&1.into(), &"disk:1".into(), &"disk".into())
    );
    assert!(back["backing"]["name"].as_str().unwrap().starts_with("nbd+unix:"), "{back}");
    assert_same(&cluster.disk("n", "back"), &expected);

    let writes = ["write -P 5 0 100k", "write -z 3M 500k", "write -P 6 20M 70k", "discard 9M 1M"];
    let same = cluster.path("same");
    let kinds: [(&str, &[&str]); 4] = [
        ("plain", &[]),
        ("old", &["-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=512"]),
        ("large", &["-o", "cluster_size=2M"]),
    ];
    for (kind, options) in kinds {
        let file = cluster.path(&format!("{kind}.qcow2"));
        overlay(&source, &file, options, &writes);
        // What it means is QEMU's to say: a discard in an old one brings the image's bytes back.
        let (from, to) = (file.to_str().unwrap(), same.to_str().unwrap());
        tool("qemu-utils", "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", from, to]);
        import(kind, from);
        assert_same(&cluster.disk("n", kind), &same);
    }
    let packed = out(&cluster, "packed.qcow2");
    let (base, all) = (source.to_str().unwrap(), same.to_str().unwrap());
    let convert = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-B", base, "-F", "raw", all, &packed];
    tool("qemu-utils", "qemu-img", &convert);
    import("packed", &packed);
    assert_same(&cluster.disk("n", "packed"), &same);

    // The backing file is never opened: it may be gone, or anything. A larger disk is as large as it says.
    let larger = cluster.path("larger.qcow2");
    overlay(&source, &larger, &[], &["write -P 5 0 100k"]);
    tool("qemu-utils", "qemu-img", &["resize", "-q", larger.to_str().unwrap(), "32M"]);
    tool("qemu-utils", "qemu-io", &["-c", "write -P 8 30M 10k", larger.to_str().unwrap()]);
    let rebase = ["rebase", "-u", "-F", "raw", "-b", "/nowhere/secret", larger.to_str().unwrap()];
    tool("qemu-utils", "qemu-img", &rebase);
    assert_eq!(import("larger", larger.to_str().unwrap())["size_bytes"], 32 << 20);
    let disk = cluster.disk("n", "larger");
    qemu_io(&disk, &["read -P 5 0 100k", "read -P 8 30M 10k", "read -P 0 25M 5M", "write -P 9 100 100"]);

    cluster.kill_node("n");
    cluster.restart_node("n");
    assert_same(&cluster.disk("n", "packed"), &same);
    assert_same(&cluster.disk("n", "back"), &expected);
    qemu_io(&disk, &["read -P 9 100 100", "read -P 8 30M 10k"]);
}

#[test]
fn qcow2_refusals_leave_nothing_behind_and_say_what_to_do() {
    let cluster = cluster();
    let source = cluster.path("source");
    write(&cluster, &["write -P 1 3000 200k"]);
    cluster.ok(&["snapshot", "v", "there"]);
    let (taken, free) = (out(&cluster, "taken"), out(&cluster, "free"));
    fs::write(&taken, "somebody's").unwrap();
    let snapshot = |rest: &[&str]| cluster.refused(&[&["--node", "n", "snapshot"], rest].concat());
    says(&snapshot(&["v", "new", "--to", &taken]), &[&taken, "exists already", "another name"]);
    says(&snapshot(&["export", "v", "there", "--to", &taken]), &[&taken, "exists already"]);
    says(&snapshot(&["v", "there", "--to", &free]), &["'there' already", "snapshot export"]);
    says(&snapshot(&["export", "v", "nope", "--to", &free]), &["no snapshot 'nope'", "snapshot list v"]);
    says(&snapshot(&["v", "new", "--to", "/nowhere/at/all"]), &["/nowhere/at/all", "No such file"]);
    let inside = cluster.node_dir("n").join("layers/x").to_str().unwrap().to_owned();
    says(&snapshot(&["v", "new", "--to", &inside]), &[&inside, "the node's own directory", "another"]);
    let long = "x".repeat(2000);
    says(&snapshot(&["v", "new", "--to", &free, "--backing", &long]), &["2000 bytes", "1 to 1023"]);
    says(&snapshot(&["v", "new", "--flatten"]), &["--to"]);
    says(&snapshot(&["v", "new", "--to", &free, "--backing", "a", "--flatten"]), &["--backing", "--flatten"]);
    assert_eq!(snapshots(&cluster, "n", "v"), ["there"], "what could not be written was not taken");
    assert_eq!(fs::read_to_string(&taken).unwrap(), "somebody's");
    assert_eq!(entries(&cluster.path("out")), 1);

    let path = |name: &str| cluster.path(name).to_str().unwrap().to_owned();
    make_raw(&cluster.path("half"), MIB / 2, 3);
    overlay(&source, &cluster.path("good.qcow2"), &[], &["write -P 5 0 100k"]);
    overlay(&cluster.path("half"), &cluster.path("small.qcow2"), &[], &["write -P 5 0 100k"]);
    tool("qemu-utils", "qemu-img", &["convert", "-O", "qcow2", &path("source"), &path("whole.qcow2")]);
    overlay(&source, &cluster.path("cut.qcow2"), &[], &["write -P 5 0 3M"]);
    let cut = File::options().write(true).open(cluster.path("cut.qcow2")).unwrap();
    cut.set_len(cut.metadata().unwrap().len() / 2).unwrap();
    let before = layer_dirs(&cluster);
    let create = |vm: &str, rest: &[&str]| {
        cluster.refused(&[&["--node", "n", "create", vm, "--image", "disk:1", "--from"], rest].concat())
    };
    says(&create("x", &[&path("whole.qcow2")]), &["whole.qcow2", "whole disk", "virtman image add"]);
    says(&create("x", &[&path("source")]), &["source", "not a qcow2 file", "virtman image add"]);
    says(&create("x", &[&path("small.qcow2")]), &["small.qcow2", "12582912", "25165824", "qemu-img resize"]);
    says(&create("x", &[&path("cut.qcow2")]), &["cut.qcow2", "truncated", "copy it again"]);
    says(&create("x", &[&path("missing")]), &[&path("missing"), "No such file"]);
    says(&create("v", &[&path("good.qcow2")]), &["'v' on node n already", "destroy it first"]);
    says(&create("x", &[&path("good.qcow2"), "--size", "1G"]), &["--size", "--from"]);
    let other = ["--node", "n", "create", "x", "--image", "nope:1", "--from", &path("good.qcow2")];
    says(&cluster.refused(&other), &["'nope:1'", "virtman image list"]);
    assert_eq!(layer_dirs(&cluster), before);
    assert_eq!(entries(&cluster.node_dir("n").join("vms")), 1);
}

/// A small file system of its own, unmounted with its value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> SmallDisk {
        fs::create_dir(&at).unwrap();
        tool("mount", "mount", &["-t", "tmpfs", "-o", "size=1M", "none", at.to_str().unwrap()]);
        SmallDisk(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn qcow2_on_a_full_disk_leaves_nothing_behind() {
    let cluster = cluster();
    write(&cluster, &["write -P 1 3000 5M"]);
    let small = SmallDisk::mount(cluster.path("small"));
    let to = small.0.join("v.qcow2");
    let args = ["--node", "n", "snapshot", "v", "s", "--to", to.to_str().unwrap()];
    says(&cluster.refused(&args), &["no space left", small.0.to_str().unwrap(), "free some"]);
    assert_eq!(entries(&small.0), 0);
    assert_eq!(snapshots(&cluster, "n", "v"), Vec::<String>::new());
}

/// Begins an export that waits for chunks which nobody has: the origin is dead. It has taken a snapshot `s`.
fn stuck_export(cluster: &mut Cluster) -> Background {
    cluster.kill_node("o");
    let file = out(cluster, "stuck.qcow2");
    let args = ["--node", "n", "snapshot", "v", "s", "--to", &file, "--flatten"];
    let export = cluster.begin("export", &args);
    wait_for("the export is under way", STEP_LIMIT, || is_writing(cluster).then_some(()));
    export
}

/// Begins an import that waits in the same way, for the rest of a block of which the file has a part.
fn stuck_import(cluster: &mut Cluster) -> Background {
    let (source, file) = (cluster.path("source"), cluster.path("stuck.qcow2"));
    overlay(&source, &file, &["-o", "cluster_size=512"], &["write -P 5 8M 64k", "write -P 5 9729k 512"]);
    cluster.kill_node("o");
    let before = layer_dirs(cluster);
    let args = ["--node", "n", "create", "x", "--image", "disk:1", "--from", file.to_str().unwrap()];
    let import = cluster.begin("import", &args);
    wait_for("the import is under way", STEP_LIMIT, || (layer_dirs(cluster) > before).then_some(()));
    import
}

#[test]
fn qcow2_work_whose_client_hangs_up_leaves_nothing_behind() {
    let mut cluster = cluster();
    write(&cluster, &["write -P 1 64k 64k"]);
    let import = stuck_import(&mut cluster);
    drop(import);
    wait_for("the layer is gone", STEP_LIMIT, || (layer_dirs(&cluster) == 1).then_some(()));
    assert_eq!(entries(&cluster.node_dir("n").join("vms")), 1);

    let export = stuck_export(&mut cluster);
    assert_eq!(snapshots(&cluster, "n", "v"), ["s"]);
    drop(export);
    wait_for("the file is gone", STEP_LIMIT, || (!is_writing(&cluster)).then_some(()));
    assert_eq!(entries(&cluster.path("out")), 0);
    wait_for("the snapshot is given up", STEP_LIMIT, || {
        snapshots(&cluster, "n", "v").is_empty().then_some(())
    });
    // And the layers of before and after the snapshot become one.
    wait_for("the layers are merged", STEP_LIMIT, || (layer_dirs(&cluster) == 1).then_some(()));
}

#[test]
fn qcow2_is_written_to_its_end_though_the_snapshot_and_the_vm_are_gone() {
    let mut cluster = cluster();
    write(&cluster, &["write -P 1 3000 200k", "write -z 7M 3M"]);
    let export = stuck_export(&mut cluster);
    cluster.ok(&["--node", "n", "snapshot", "delete", "v", "s"]);
    cluster.ok(&["--node", "n", "destroy", "v"]);
    says(&cluster.refused(&["--node", "n", "image", "detach", "disk:1"]), &["disk:1"]);
    cluster.restart_node("o");
    export.finish(STEP_LIMIT);
    judge(&out(&cluster, "stuck.qcow2"), &cluster.path("expected"));
    wait_for("the layers are gone", STEP_LIMIT, || (layer_dirs(&cluster) == 0).then_some(()));
    cluster.ok(&["--node", "n", "image", "detach", "disk:1"]);
}

#[test]
fn qcow2_work_of_a_daemon_that_is_killed_is_as_if_it_had_not_begun() {
    let mut cluster = cluster();
    write(&cluster, &["write -P 1 64k 64k"]);
    let import = stuck_import(&mut cluster);
    cluster.kill_node("n");
    drop(import);
    cluster.restart_node("n");
    assert_eq!(layer_dirs(&cluster), 1, "the layer of the import was swept away");
    assert_eq!(entries(&cluster.node_dir("n").join("vms")), 1);

    cluster.wait_up("n");
    let export = stuck_export(&mut cluster);
    cluster.kill_node("n");
    drop(export);
    assert_eq!(entries(&cluster.path("out")), 0, "an unfinished file has no name");
    cluster.restart_node("n");
    cluster.restart_node("o");
    for node in ["n", "o"] {
        cluster.wait_up(node);
    }
    let stuck = out(&cluster, "stuck.qcow2");
    cluster.ok(&["--node", "n", "snapshot", "export", "v", "s", "--to", &stuck, "--flatten"]);
    judge(&stuck, &cluster.path("expected"));
    let file = cluster.path("stuck.qcow2");
    cluster.ok(&["--node", "n", "create", "x", "--image", "disk:1", "--from", file.to_str().unwrap()]);
    qemu_io(&cluster.disk("n", "x"), &["read -P 5 8M 64k", "read -P 5 9729k 512"]);
}

#[test]
fn qcow2_that_changes_while_it_is_imported_is_refused() {
    let mut cluster = cluster();
    let import = stuck_import(&mut cluster);
    let file = File::options().write(true).open(cluster.path("stuck.qcow2")).unwrap();
    file.write_all_at(&[0], file.metadata().unwrap().len()).unwrap();
    cluster.restart_node("o");
    let said = import.fail(STEP_LIMIT);
    says(&said, &["stuck.qcow2", "changed while it was read"]);
    wait_for("the layer is gone", STEP_LIMIT, || (layer_dirs(&cluster) == 1).then_some(()));
}
