//! `show`: everything about one VM, for people and for programs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use crate::cluster::Cluster;
use crate::tools::{make_raw, qemu_io};

/// In 2020: a number of seconds would be far below it.
const SOME_UNIX_MS: u64 = 1_600_000_000_000;

fn show(cluster: &Cluster, vm: &str) -> Value {
    cluster.json(&["--node", "n", "show", vm])
}

/// The parts of each layer of a VM's disk that a test can know.
fn layers(details: &Value) -> Value {
    let known = |layer: &Value| {
        let kib = layer["bytes"].as_u64().unwrap() >> 10;
        json!([kib, layer["state"], layer["shared"], layer["snapshots"]])
    };
    details["layers"].as_array().unwrap().iter().map(known).collect()
}

#[test]
fn show_tells_the_layers_of_a_disk_who_shares_them_and_what_was_done_with_it() {
    let mut cluster = Cluster::start_with(&["--stripes", "1", "--fan-out", "2"]);
    cluster.add_node("o", &[]);
    cluster.add_node("n", &["--iscsi-listen", "127.0.0.1:0"]);
    let source = cluster.path("source");
    make_raw(&source, 12, 17);
    cluster.share(&["o", "n"], "disk:1", &source);
    cluster.ok(&["--node", "n", "create", "v", "--image", "disk:1", "--export", "iscsi", "--anyone"]);
    let new = show(&cluster, "v");
    assert_eq!(layers(&new), json!([[0, "writable", false, []]]));
    assert_eq!(
        new["io"],
        json!({ "reads": 0, "read_bytes": 0, "writes": 0, "written_bytes": 0, "clears": 0, "flushes": 0 })
    );
    assert_eq!((&new["boot"]["started_unix_ms"], &new["boot"]["ready_ms"]), (&Value::Null, &Value::Null));

    let disk = cluster.disk("n", "v");
    qemu_io(&disk, &["write -P 1 0 64k", "read 0 128k", "write -z -u 1M 8k", "discard 2M 8k", "flush"]);
    let io = &show(&cluster, "v")["io"];
    assert_eq!(
        (&io["writes"], &io["written_bytes"], &io["clears"]),
        (&1.into(), &(64 << 10).into(), &2.into())
    );
    assert!(io["read_bytes"].as_u64().unwrap() >= 128 << 10, "{io}");
    assert!(io["reads"].as_u64().unwrap() >= 1 && io["flushes"].as_u64().unwrap() >= 1, "{io}");

    cluster.ok(&["snapshot", "v", "one"]);
    qemu_io(&disk, &["write -P 2 64k 128k"]);
    cluster.ok(&["--node", "n", "clone", "v", "--name", "w"]);
    qemu_io(&disk, &["write -P 3 0 4k"]);
    let details = show(&cluster, "v");
    let expected =
        json!([[4, "writable", false, []], [128, "frozen", true, []], [80, "frozen", true, ["one"]],]);
    assert_eq!(layers(&details), expected);
    assert_eq!((&details["own_bytes"], &details["shared_bytes"]), (&(4 << 10).into(), &(208 << 10).into()));
    assert_eq!(layers(&show(&cluster, "w"))[1], json!([128, "frozen", true, []]));
    assert_eq!(details["image"]["parents"], json!([["o"]]));
    assert_eq!(details["snapshots"][0]["name"], "one");
    assert!(details["taking_over"].is_null(), "{details}");
    assert!(details["cache"]["misses"].as_u64().unwrap() > 0, "{details}");
    let protocols: Vec<&Value> =
        details["exports"].as_array().unwrap().iter().map(|export| &export["protocol"]).collect();
    assert_eq!(protocols, ["iscsi", "nbd"]);

    let shown = cluster.ok(&["--node", "n", "show", "v"]);
    let ids = details["layers"].as_array().unwrap().iter().map(|layer| layer["id"].as_str().unwrap());
    for word in ids.chain(["disk:1", "nbd+unix:", "iscsi:", ", 0 sessions", "writable", "208 KiB", "one"]) {
        assert!(shown.contains(word), "'{word}' is missing in: {shown}");
    }
    let listed = cluster.ok(&["--node", "n", "list"]);
    assert!(listed.lines().next().unwrap().contains("SNAPSHOTS"), "{listed}");

    cluster.ok(&["--node", "n", "destroy", "w"]);
    cluster.kill_node("n");
    cluster.restart_node("n");
    let again = show(&cluster, "v");
    // With the clone goes the reason for a layer that no snapshot names: it is merged, or about to be.
    let top = layers(&again)[0].clone();
    assert_eq!((&top[1], &top[2]), (&"writable".into(), &false.into()));
    assert_eq!(again["shared_bytes"], 0);
    assert_eq!(again["snapshots"], details["snapshots"]);
    assert_eq!(again["serial"], new["serial"]);
    let said = cluster.refused(&["--node", "n", "show", "ghost"]);
    assert!(said.contains("'ghost'") && said.contains("virtman list"), "{said}");
    assert!(fs::read_dir(cluster.node_dir("n").join("layers")).unwrap().count() >= 2);
}

/// A boot sector that writes `login:` to the serial port and halts: the smallest guest that is ready.
fn boot_sector() -> [u8; 512] {
    // xor ax,ax; mov ds,ax; mov si,text; mov dx,0x3f8; next: lodsb; test al,al; jz end; out dx,al; jmp next;
    // end: hlt; jmp end; text:
    let code =
        b"\x31\xc0\x8e\xd8\xbe\x15\x7c\xba\xf8\x03\xac\x84\xc0\x74\x03\xee\xeb\xf8\xf4\xeb\xfdlogin:\0";
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(b"\x55\xaa");
    sector
}

#[test]
fn show_tells_how_a_guest_came_up_and_after_a_restart_only_what_is_still_known() {
    let mut cluster = Cluster::with_nodes(&["n"]);
    let source = cluster.path("source");
    make_raw(&source, 4, 3);
    File::options().write(true).open(&source).unwrap().write_all_at(&boot_sector(), 0).unwrap();
    cluster.ok(&["--node", "n", "image", "add", "tiny:1", source.to_str().unwrap()]);
    cluster.ok(&["boot", "--image", "tiny:1", "--count", "1", "--nodes", "n", "--memory", "64M"]);
    let details = show(&cluster, "tiny-1");
    let boot = &details["boot"];
    let ms = |key: &str| boot[key].as_u64().unwrap_or_else(|| panic!("no {key}: {details}"));
    assert!(ms("first_read_ms") <= ms("ready_ms") && boot["disk_ms"].is_u64(), "{details}");
    // That it was after the VM was created cannot be told from clocks, which somebody may set meanwhile.
    assert!(ms("started_unix_ms") > SOME_UNIX_MS, "{details}");
    let pid = details["vm"]["pid"].as_u64().unwrap();
    let shown = cluster.ok(&["--node", "n", "show", "tiny-1"]);
    assert!(shown.contains(&format!("running, pid {pid}")) && shown.contains("first read"), "{shown}");

    cluster.kill_node("n");
    cluster.restart_node("n");
    // The guest reconnects and may read: that is not its first read.
    qemu_io(&cluster.disk("n", "tiny-1"), &["read 0 4k"]);
    let again = &show(&cluster, "tiny-1")["boot"];
    assert_eq!(again["started_unix_ms"], boot["started_unix_ms"]);
    for forgotten in ["disk_ms", "first_read_ms", "ready_ms"] {
        assert_eq!(again[forgotten], Value::Null, "{forgotten}");
    }
    cluster.ok(&["stop", "tiny-1", "--now"]);
}
