//! Exports over iSCSI, judged by foreign initiators: who may open what, and what survives.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{Background, STEP_LIMIT, both, make_raw, tool, tool_output, wait_for};

pub(crate) const USER: &str = "guest";
pub(crate) const SECRET: &str = "correct-horse-battery";

/// How long a load lasts that is ended before: longer than anybody waits to see it.
const LOAD_SECONDS: &str = "600";

/// A node with two portals and an image of some MiB.
fn site() -> (Cluster, PathBuf) {
    let mut cluster = Cluster::start();
    cluster.add_node("n", &["--iscsi-listen", "127.0.0.1:0", "--iscsi-listen", "127.0.0.1:0"]);
    let source = cluster.path("source");
    make_raw(&source, 12, 9);
    cluster.ok(&["--node", "n", "image", "add", "disk:1", source.to_str().unwrap()]);
    (cluster, source)
}

pub(crate) fn secret_file(cluster: &Cluster, name: &str, text: &str) -> String {
    let file = cluster.path(name);
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file.to_str().unwrap().to_owned()
}

/// The addresses at which `name` is exported over iSCSI, one per portal.
pub(crate) fn addresses(cluster: &Cluster, name: &str) -> Vec<String> {
    let exports = cluster.json(&["--node", "n", "export", "list"]);
    let exports = exports.as_array().unwrap().iter();
    let of_name = exports.filter(|export| export["protocol"] == "iscsi" && export["name"] == name);
    of_name.flat_map(|export| export["addresses"].as_array().unwrap()).map(text).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// The address as libiscsi takes it, with a name and a secret in it.
pub(crate) fn with_secret(address: &str, secret: &str) -> String {
    address.replace("iscsi://", &format!("iscsi://{USER}%{secret}@"))
}

#[test]
fn iscsi_a_vm_disk_is_one_disk_behind_all_portals_for_those_who_know_the_secret() {
    let (mut cluster, source) = site();
    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}\n"));
    let create =
        ["--node", "n", "create", "vm", "--image", "disk:1", "--export", "iscsi", "--chap-file", &chap];
    let said = cluster.ok(&create);
    assert_eq!(cluster.ok(&create), said, "creating it again changes nothing");
    let portals = addresses(&cluster, "vm");
    assert!(portals.len() == 2 && portals.iter().all(|portal| said.contains(portal)), "{said}, {portals:?}");

    // The unit's serial number, page 0x80.
    let serial = |portal: &String| {
        tool("libiscsi-bin", "iscsi-inq", &["-e", "1", "-c", "128", &with_secret(portal, SECRET)])
    };
    assert!(serial(&portals[0]).contains("Unit Serial Number"), "{}", serial(&portals[0]));
    assert_eq!(serial(&portals[0]), serial(&portals[1]));

    let write = ["-f", "raw", "-c", "write -P 7 1M 64k", &with_secret(&portals[0], SECRET)];
    tool("qemu-block-extra", "qemu-io", &write);
    let read = ["-f", "raw", "-c", "read -P 7 1M 64k", "-c", "read 2M 4k", &with_secret(&portals[1], SECRET)];
    tool("qemu-block-extra", "qemu-io", &read);
    let wrong = ["-f", "raw", "-c", "read 0 4k", &with_secret(&portals[0], "correct-horse-batterX")];
    let refused = tool_output("qemu-block-extra", "qemu-io", &wrong);
    assert!(
        !refused.status.success() && both(&refused).contains("Authentication failure"),
        "{}",
        both(&refused)
    );

    // Who has it open is listed.
    let mut load = Command::new("iscsi-perf");
    load.args(["-t", LOAD_SECONDS, &with_secret(&portals[1], SECRET)]);
    let mut load = Background::start(load, &cluster.path("load"));
    wait_for("a session is listed", STEP_LIMIT, || {
        load.assert_running();
        let exports = cluster.json(&["--node", "n", "export", "list"]);
        let of_vm = |export: &&Value| export["target"].is_string() && export["name"] == "vm";
        let export = exports.as_array()?.iter().find(of_vm)?.clone();
        let session = export["sessions"].get(0)?;
        let known = session["initiator"].as_str()?.contains("iscsi-perf") && session["portal"] == 1;
        (known && session["read_bytes"].as_u64()? > 0).then_some(())
    });
    drop(load);

    // The image below is not what was written; it is exported read-only, and is on every node the same disk.
    cluster.ok(&["--node", "n", "export", "add", "disk:1", "--anyone"]);
    let volume = addresses(&cluster, "disk:1");
    tool(
        "qemu-block-extra",
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", &volume[0], source.to_str().unwrap()],
    );
    let write = tool_output("qemu-block-extra", "qemu-io", &["-f", "raw", "-c", "write 0 4k", &volume[0]]);
    assert!(!write.status.success(), "an image was written to: {}", both(&write));

    // A node that was killed serves the same exports to the same people, at other ports here.
    cluster.kill_node("n");
    let records = cluster.node_dir("n").join("exports");
    let left_over = fs::read_to_string(records.join("vm.json")).unwrap().replace("\"vm\"", "\"ghost\"");
    fs::write(records.join("ghost.json"), left_over).unwrap();
    cluster.restart_node("n");
    cluster.wait_up("n");
    assert!(!records.join("ghost.json").exists(), "it is of a VM that is gone");
    let after = addresses(&cluster, "vm");
    let read = ["-f", "raw", "-c", "read -P 7 1M 64k", &with_secret(&after[1], SECRET)];
    tool("qemu-block-extra", "qemu-io", &read);
    assert!(
        !tool_output("libiscsi-bin", "iscsi-inq", &[&after[0]]).status.success(),
        "no secret was asked for"
    );

    assert_eq!(fs::metadata(records.join("vm.json")).unwrap().permissions().mode() & 0o077, 0);
    assert!(!cluster.log("n").contains(SECRET), "the log has the secret");
    cluster.ok(&["--node", "n", "destroy", "vm"]);
    assert_eq!(addresses(&cluster, "vm"), [""; 0]);
    assert!(!records.join("vm.json").exists());
}

#[test]
fn iscsi_exports_are_for_those_who_were_named_and_end_when_they_are_removed() {
    let (cluster, _) = site();
    cluster.ok(&["--node", "n", "export", "add", "disk:1", "--initiator", "iqn.2026-11.example:me"]);
    let volume = addresses(&cluster, "disk:1").remove(0);
    let inquire = |name: &str| tool_output("libiscsi-bin", "iscsi-inq", &["-i", name, &volume]);
    assert!(inquire("iqn.2026-11.example:me").status.success());
    let refused = both(&inquire("iqn.2026-11.example:you"));
    assert!(refused.contains("514") || refused.contains("uthoriz"), "{refused}");

    let said = cluster.refused(&["--node", "n", "image", "remove", "disk:1"]);
    assert!(said.contains("exported over iSCSI") && said.contains("export remove"), "{said}");
    cluster.ok(&["--node", "n", "export", "remove", "disk:1"]);
    assert!(!inquire("iqn.2026-11.example:me").status.success());
    let said = cluster.refused(&["--node", "n", "export", "remove", "disk:1"]);
    assert!(said.contains("'disk:1' is not exported"), "{said}");
    cluster.ok(&["--node", "n", "image", "remove", "disk:1"]);
}

#[test]
fn iscsi_exports_that_make_no_sense_are_refused_and_leave_nothing_behind() {
    let (mut cluster, _) = site();
    let short = secret_file(&cluster, "short", "guest:short");
    let chap = secret_file(&cluster, "chap", &format!("{USER}:{SECRET}"));
    let none = secret_file(&cluster, "none", "no secret here");
    let create = |rest: &[&str]| {
        let said = cluster.refused(&[&["--node", "n", "create", "vm", "--image", "disk:1"], rest].concat());
        assert!(!said.contains(SECRET), "{said}");
        said
    };
    for (rest, expected) in [
        (&["--export", "iscsi"][..], "--chap-file"),
        (&["--chap-file", &chap], "--export iscsi"),
        (&["--export", "iscsi", "--chap-file", &short], "12"),
        (&["--export", "iscsi", "--chap-file", &none], "USER:SECRET"),
        (&["--export", "iscsi", "--chap-file", "/nowhere"], "/nowhere"),
        (&["--export", "iscsi", "--chap-file", &chap, "--mutual-chap-file", &chap], "two secrets"),
        (&["--export", "iscsi", "--initiator", "me"], "'me' is not an iSCSI name"),
    ] {
        let said = create(rest);
        assert!(said.contains(expected), "{rest:?}: {said}");
    }
    assert_eq!(cluster.json(&["--node", "n", "list"]), Value::Array(Vec::new()));
    let said = cluster.refused(&["--node", "n", "export", "add", "disk:1"]);
    assert!(said.contains("'disk:1'") && said.contains("--anyone"), "{said}");
    let said = cluster.refused(&["--node", "n", "export", "add", "nobody", "--anyone"]);
    assert!(said.contains("no VM 'nobody'"), "{said}");

    cluster.add_node("m", &[]);
    let said = cluster.refused(&[
        "--node",
        "m",
        "create",
        "vm",
        "--image",
        "disk:1",
        "--export",
        "iscsi",
        "--initiator",
        "iqn.2026-11.a:b",
    ]);
    assert!(said.contains("--iscsi-listen"), "{said}");
    assert_eq!(cluster.json(&["--node", "m", "list"]), Value::Array(Vec::new()));
}
