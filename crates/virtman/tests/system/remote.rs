//! Images on logical units of iSCSI targets and on exports of NBD servers: of other programs, and of another node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use testkit::foreign::find;
use testkit::ports::Port;
use testkit::tgt::{NAME, Tgt};

use crate::cluster::Cluster;
use crate::iscsi::{addresses, secret_file};
use crate::tools::{STEP_LIMIT, assert_same, both, make_raw, tool, wait_for};

const USER: &str = "array";
const SECRET: &str = "twelve-or-more-bytes";
const MIB: usize = 24;

/// A foreign target with a disk that asks for a secret.
fn array(seed: u64) -> Tgt {
    let mut tgt = Tgt::new((MIB as u64) << 20);
    make_raw(&tgt.file(), MIB, seed);
    tgt.start();
    serve(&tgt);
    tgt
}

fn serve(tgt: &Tgt) {
    tgt.add_disk(&[], &[]);
    tgt.add_account(USER, SECRET, &[]);
}

#[test]
fn remote_a_unit_of_a_foreign_target_feeds_a_hierarchy_and_its_restart_loses_nothing() {
    let mut cluster = Cluster::with_nodes(&["o", "a", "b"]);
    let mut tgt = array(41);
    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let unit = |tgt: &Tgt| format!("iscsi://{USER}@127.0.0.1:{}/{NAME}/1", tgt.port);
    let added = cluster.ok(&["--node", "o", "image", "add", "disk:1", &unit(&tgt), "--chap-file", &chap]);
    let file = tgt.file();
    let local = cluster.ok(&["--node", "a", "image", "add", "local:1", file.to_str().unwrap(), "--copy"]);
    let id = |line: &str| line.split_whitespace().last().map(str::to_owned);
    assert_eq!(id(&added), id(&local), "the same bytes are the same image");
    cluster.ok(&["--node", "a", "image", "remove", "local:1", "--force"]);
    cluster.ok(&["--node", "a", "image", "attach", "disk:1"]);
    cluster.ok(&["--node", "b", "image", "attach", "disk:1"]);

    // The target dies once the origin has read from it, and comes back while the image is read through the last node.
    tool("qemu-utils", "qemu-io", &["-r", "-f", "raw", "-c", "read 0 64k", &cluster.volume("b", "disk+1")]);
    tgt.kill();
    std::thread::scope(|scope| {
        let volume = cluster.volume("b", "disk+1");
        let reader = scope.spawn(move || assert_same(&volume, &file));
        wait_for("the origin notices", STEP_LIMIT, || {
            cluster.log("o").contains("iscsi_session_lost").then_some(())
        });
        assert!(!reader.is_finished(), "it waits for the target");
        tgt.start();
        serve(&tgt);
        reader.join().unwrap();
    });

    // A node that starts while a target is away waits for it, and so does who reads there.
    let mut tgt = array(42);
    cluster.ok(&["--node", "o", "image", "add", "disk:2", &unit(&tgt), "--chap-file", &chap]);
    tgt.kill();
    cluster.kill_node("o");
    cluster.restart_node("o");
    cluster.wait_up("o");
    cluster.ok(&["--node", "o", "create", "vm", "--image", "disk:2"]);
    std::thread::scope(|scope| {
        let (disk, file) = (cluster.disk("o", "vm"), tgt.file());
        let reader = scope.spawn(move || assert_same(&disk, &file));
        wait_for("the origin looks for the target", STEP_LIMIT, || {
            cluster.log("o").contains("remote_disk_away").then_some(())
        });
        tgt.start();
        serve(&tgt);
        reader.join().unwrap();
    });

    let keys = cluster.node_dir("o").join("remotes");
    let modes: Vec<u32> = fs::read_dir(&keys)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().permissions().mode() & 0o077)
        .collect();
    assert_eq!(modes, [0, 0], "two secrets, for their owner alone");
    assert!(!cluster.log("o").contains(SECRET), "the log has the secret");
    cluster.ok(&["--node", "o", "destroy", "vm"]);
    for node in ["a", "b"] {
        cluster.ok(&["--node", node, "image", "detach", "disk:1"]);
    }
    for image in ["disk:1", "disk:2"] {
        cluster.ok(&["--node", "o", "image", "remove", image]);
    }
    assert_eq!(fs::read_dir(&keys).unwrap().count(), 0, "the secrets are forgotten with the images");
}

#[test]
fn remote_units_that_cannot_be_used_are_refused_with_the_reason_and_the_remedy() {
    let cluster = Cluster::with_nodes(&["o"]);
    let tgt = array(42);
    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let wrong = secret_file(&cluster, "wrong", &format!("{USER}:twelve-or-more-bytez\n"));
    let at = format!("127.0.0.1:{}", tgt.port);
    let closed = Port::reserve();
    let closed = closed.address();
    let add = |address: &str, rest: &[&str]| {
        let said = cluster.refused(&[&["--node", "o", "image", "add", "disk:1", address], rest].concat());
        assert!(!said.contains(SECRET), "{said}");
        said
    };
    let known = ["--chap-file", &chap[..]];
    for (address, rest, expected) in [
        (format!("iscsi://{USER}%{SECRET}@{at}/{NAME}/1"), &[][..], "leave only the name of the user"),
        (format!("iscsi://{USER}@{at}/{NAME}/1"), &[], "VIRTMAN_CHAP"),
        (format!("iscsi://{USER}@{at}/{NAME}/1"), &["--chap-file", &wrong], "check the name of the user"),
        (format!("iscsi://{at}/{NAME}/1"), &[], "does not accept the credentials"),
        (format!("iscsi://{at}/{NAME}2/1"), &known, "no such iSCSI target"),
        (format!("iscsi://{at}/{NAME}/7"), &known, "no logical unit of this number"),
        (format!("iscsi://{closed}/{NAME}/1"), &known, "cannot be reached"),
        (format!("iscsi://{at}/{NAME}/1"), &["--chap-file", &chap, "--format", "qcow2"], "qcow2"),
        ("/dev/null".to_owned(), &known, "'/dev/null' is not an iSCSI address"),
        ("iscsi://nowhere".to_owned(), &[], "iscsi://[USER@]HOST[:PORT]/TARGET/LUN"),
    ] {
        let said = add(&address, rest);
        assert!(said.contains(expected), "{address} {rest:?}: {said}");
    }
    let images = cluster.node_dir("o").join("images");
    assert_eq!(fs::read_dir(images).unwrap().count(), 0, "nothing is left behind");
    assert_eq!(fs::read_dir(cluster.node_dir("o").join("remotes")).unwrap().count(), 0);
}

#[test]
fn remote_an_image_that_a_node_exports_is_added_elsewhere_and_copied() {
    let mut cluster = Cluster::start();
    cluster.add_node("n", &["--iscsi-listen", "127.0.0.1:0"]);
    cluster.add_node("m", &[]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 43);
    cluster.ok(&["--node", "n", "image", "add", "disk:1", source.to_str().unwrap()]);
    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let back = secret_file(&cluster, "back", "node:another-long-secret\n");
    let secrets = ["--chap-file", &chap, "--mutual-chap-file", &back];
    cluster.ok(&[&["--node", "n", "export", "add", "disk:1"], &secrets[..]].concat());
    let unit = addresses(&cluster, "disk:1").remove(0);
    cluster.ok(&[&["--node", "m", "image", "add", "copy:1", &unit, "--copy"], &secrets[..]].concat());
    // What was copied needs its source no more.
    cluster.kill_node("n");
    let id = |image: &str| cluster.json(&["image", "show", image])["id"].clone();
    assert_eq!(id("copy:1"), id("disk:1"));
    assert_same(&cluster.volume("m", "copy+1"), &source);
    assert_eq!(fs::read_dir(cluster.node_dir("m").join("remotes")).unwrap().count(), 0);
    let verified = cluster.run(&["--node", "m", "image", "verify", "copy:1"]);
    assert!(verified.status.success(), "{}", both(&verified));
}

/// A foreign NBD server with a disk, on a UNIX socket; ended when it is dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(socket: &Path, file: &Path) -> QemuNbd {
        let _ = fs::remove_file(socket);
        let mut command = Command::new(find("qemu-utils", "qemu-nbd"));
        command.args(["-r", "-f", "raw", "-t", "-e", "8", "-x", "golden", "-k"]).arg(socket).arg(file);
        let server = QemuNbd(command.stdin(Stdio::null()).spawn().unwrap());
        wait_for("the NBD server listens", STEP_LIMIT, || socket.exists().then_some(()));
        server
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn remote_an_export_of_a_foreign_nbd_server_feeds_a_hierarchy_and_its_restart_loses_nothing() {
    let cluster = Cluster::with_nodes(&["o", "a"]);
    let (file, socket) = (cluster.path("golden"), cluster.path("golden.sock"));
    make_raw(&file, MIB, 44);
    let server = QemuNbd::start(&socket, &file);
    let export = format!("nbd+unix:///golden?socket={}", socket.display());
    let added = cluster.ok(&["--node", "o", "image", "add", "disk:1", &export]);
    let local = cluster.ok(&["--node", "a", "image", "add", "local:1", file.to_str().unwrap(), "--copy"]);
    let id = |line: &str| line.split_whitespace().last().map(str::to_owned);
    assert_eq!(id(&added), id(&local), "the same bytes are the same image");
    cluster.ok(&["--node", "a", "image", "remove", "local:1", "--force"]);
    let shown = cluster.json(&["--node", "o", "image", "list"]).to_string();
    assert!(shown.contains(&export), "{shown}");

    // The server dies once the origin has read from it, and comes back while the image is read through the other node.
    cluster.ok(&["--node", "a", "image", "attach", "disk:1"]);
    let volume = cluster.volume("a", "disk+1");
    tool("qemu-utils", "qemu-io", &["-r", "-f", "raw", "-c", "read 0 64k", &volume]);
    drop(server);
    let _server = std::thread::scope(|scope| {
        let reader = scope.spawn(|| assert_same(&volume, &file));
        wait_for("the origin notices", STEP_LIMIT, || {
            cluster.log("o").contains("nbd_connection_lost").then_some(())
        });
        assert!(!reader.is_finished(), "it waits for the server");
        let server = QemuNbd::start(&socket, &file);
        reader.join().unwrap();
        server
    });
    cluster.ok(&["--node", "a", "image", "detach", "disk:1"]);
    cluster.ok(&["--node", "o", "image", "remove", "disk:1"]);
    assert_eq!(fs::read_dir(cluster.node_dir("o").join("remotes")).unwrap().count(), 0);
}

#[test]
fn remote_an_image_of_another_node_is_added_by_its_nbd_socket_and_wrong_exports_are_refused() {
    let cluster = Cluster::with_nodes(&["o", "m"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 45);
    cluster.ok(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    let volume = cluster.volume("o", "disk+1");
    cluster.ok(&["--node", "m", "image", "add", "copy:1", &volume, "--copy"]);
    assert_same(&cluster.volume("m", "copy+1"), &source);

    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let closed = Port::reserve();
    let absent = cluster.path("absent.sock");
    for (location, rest, expected) in [
        (format!("nbd://{}/disk", closed.address()), &[][..], "cannot be reached"),
        (format!("nbd+unix:///disk?socket={}", absent.display()), &[], "cannot be reached"),
        (volume.replace("///?", "///other?"), &[], "other"),
        ("nbd://host/disk?tls-certificates=/etc".to_owned(), &[], "tls-certificates"),
        (format!("nbds://{}/disk", closed.address()), &[], "TLS"),
        (volume.clone(), &["--chap-file", &chap], "is not an iSCSI address"),
        (volume.clone(), &["--format", "qcow2"], "qcow2"),
    ] {
        let add = [&["--node", "m", "image", "add", "wrong:1", &location], rest].concat();
        let said = cluster.refused(&add);
        assert!(said.contains(expected), "{location} {rest:?}: {said}");
    }
    assert_eq!(fs::read_dir(cluster.node_dir("m").join("remotes")).unwrap().count(), 0);
}
