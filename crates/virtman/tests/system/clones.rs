//! Clones and committed images: what a VM wrote, elsewhere.

use std::fs;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, make_raw, qemu_io, tool, wait_for};

const MIB: usize = 48;

/// The origin `o` of `disk:1`, and below it `a`, below that `b` and `v`; on `v` the VM `v`, which wrote what `expected`
/// has. Nobody fetches `disk:1` from `v`.
fn cluster() -> Cluster {
    let cluster = Cluster::with_nodes(&["o", "a", "b", "v"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 11);
    cluster.share(&["o", "a", "b"], "disk:1", &source);
    cluster.ok(&["--node", "v", "create", "v", "--image", "disk:1"]);
    fs::copy(&source, cluster.path("expected")).unwrap();
    write(&cluster, &["write -P 1 3000 200k", "write -z 7M 3M", "write -P 2 30M 1M"]);
    cluster
}

/// Writes the same to the VM's disk and to what is expected of it.
fn write(cluster: &Cluster, commands: &[&str]) {
    qemu_io(&cluster.disk("v", "v"), commands);
    qemu_io(cluster.path("expected").to_str().unwrap(), commands);
}

fn vm(cluster: &Cluster, name: &str) -> Value {
    let vms = cluster.json(&["list"]);
    vms.as_array().unwrap().iter().find(|vm| vm["name"] == name).expect("the VM is listed").clone()
}

/// Waits until no node but the origin has anything but `disk:1` attached.
fn wait_settled(cluster: &Cluster, nodes: &[&str]) {
    wait_for("clones have all of their own", STEP_LIMIT, || {
        let only_own = |node: &&str| {
            let images = cluster.json(&["--node", node, "image", "list"]);
            images.as_array().unwrap().len() == 1
        };
        nodes.iter().all(only_own).then_some(())
    });
}

#[test]
fn a_clone_of_a_clone_that_has_yet_to_get_all_of_its_own_has_all_of_it() {
    let mut cluster = cluster();
    let noise = cluster.path("noise");
    fs::write(&noise, noise_of(MIB << 20)).unwrap();
    tool("libnbd-bin", "nbdcopy", &[noise.to_str().unwrap(), &cluster.disk("v", "v")]);
    cluster.ok(&["clone", "v", "--to", "b", "--name", "c"]);
    cluster.kill_node("v");
    cluster.ok(&["clone", "c", "--to", "a", "--name", "d"]);
    cluster.restart_node("v");
    cluster.wait_up("v");
    for (name, node) in [("c", "b"), ("d", "a")] {
        assert_same(&cluster.disk(node, name), &noise);
        assert_eq!(vm(&cluster, name)["image"], "disk:1");
    }
    wait_settled(&cluster, &["a", "b"]);
}

/// Bytes of which no two chunks are the same.
fn noise_of(len: usize) -> Vec<u8> {
    let mut noise = vec![0; len];
    StdRng::seed_from_u64(12).fill(&mut noise[..]);
    noise
}

#[test]
fn a_clone_elsewhere_has_what_was_written_and_comes_to_need_only_its_image() {
    let mut cluster = cluster();
    let before = cluster.node_status("v")["links"]["sent_wire_bytes"].as_u64().unwrap();
    let clones = cluster.json(&["clone", "v", "--to", "a,b", "--count", "4", "--name", "k"]);
    assert_eq!(clones.as_array().unwrap().len(), 4, "{clones}");
    let expected = cluster.path("expected");
    let then = cluster.path("then");
    fs::copy(&expected, &then).unwrap();
    // The VM goes on; so does a clone.
    write(&cluster, &["write -P 9 0 5M"]);
    qemu_io(&cluster.disk("b", "k-4"), &["write -P 8 1M 100k"]);
    for (name, node) in [("k-1", "a"), ("k-2", "b"), ("k-3", "a")] {
        assert_same(&cluster.disk(node, name), &then);
    }
    assert_same(&cluster.disk("v", "v"), &expected);
    qemu_io(&cluster.disk("b", "k-4"), &["read -P 8 1M 100k", "read -P 2 30M 1M"]);

    wait_settled(&cluster, &["a", "b"]);
    let sent = cluster.node_status("v")["links"]["sent_wire_bytes"].as_u64().unwrap() - before;
    // 1.2 MiB were written, in chunks of 64 KiB; to two nodes at most, with the pages that name them.
    assert!((1..=3 << 20).contains(&sent), "{sent}");
    assert_eq!(vm(&cluster, "k-1")["image"], "disk:1");
    cluster.kill_node("v");
    for node in ["a", "b"] {
        cluster.kill_node(node);
        cluster.restart_node(node);
        cluster.wait_up(node);
    }
    assert_same(&cluster.disk("a", "k-1"), &then);
    assert_same(&cluster.disk("b", "k-2"), &then);
    qemu_io(&cluster.disk("b", "k-4"), &["read -P 8 1M 100k", "read -P 2 30M 1M"]);

    cluster.restart_node("v");
    wait_for("the image that carried them is gone", STEP_LIMIT, || {
        (cluster.json(&["image", "list"]).as_array().unwrap().len() == 1).then_some(())
    });
    assert_same(&cluster.disk("v", "v"), &expected);
    for name in ["k-1", "k-2", "k-3", "k-4", "v"] {
        cluster.ok(&["destroy", name]);
    }
    for node in ["a", "b", "v"] {
        let layers = fs::read_dir(cluster.node_dir(node).join("layers")).unwrap().count();
        assert_eq!(layers, 0, "on {node}");
    }
}

#[test]
fn a_clone_beside_its_vm_shares_what_is_frozen() {
    let mut cluster = cluster();
    cluster.ok(&["clone", "v", "--name", "w"]);
    let then = cluster.path("then");
    fs::copy(cluster.path("expected"), &then).unwrap();
    write(&cluster, &["write -P 9 0 5M"]);
    assert_same(&cluster.disk("v", "w"), &then);
    let said = cluster.refused(&["clone", "v", "--name", "w"]);
    assert!(said.contains("there is a VM 'w' on node v already"), "{said}");
    cluster.ok(&["clone", "w", "--count", "3"]);
    cluster.kill_node("v");
    cluster.restart_node("v");
    cluster.ok(&["destroy", "v", "w"]);
    assert_same(&cluster.disk("v", "w-clone-3"), &then);
    cluster.ok(&["destroy", "w-clone-1", "w-clone-2", "w-clone-3"]);
    assert_eq!(fs::read_dir(cluster.node_dir("v").join("layers")).unwrap().count(), 0);
}

#[test]
fn a_committed_disk_is_an_image_like_any_other() {
    let mut cluster = cluster();
    let then = cluster.path("then");
    fs::copy(cluster.path("expected"), &then).unwrap();
    cluster.ok(&["commit", "v", "--as", "disk:2"]);
    let said = cluster.refused(&["commit", "v", "--as", "disk:2"]);
    assert!(said.contains("there is an image 'disk:2' already"), "{said}");
    write(&cluster, &["write -P 5 20M 1M"]);
    cluster.ok(&["--node", "b", "create", "x", "--image", "disk:2"]);
    assert_same(&cluster.disk("b", "x"), &then);
    // The image is what the file of the same content is.
    let added = cluster.json(&["--node", "o", "image", "add", "disk:3", then.to_str().unwrap()]);
    assert_eq!(cluster.json(&["image", "show", "disk:2"])["id"], added["id"]);

    // An image of an image, from the node that derived the first.
    cluster.ok(&["commit", "v", "--as", "disk:4"]);
    cluster.ok(&["destroy", "v"]);
    cluster.kill_node("v");
    cluster.restart_node("v");
    cluster.wait_up("v");
    cluster.ok(&["--node", "a", "create", "y", "--image", "disk:4"]);
    assert_same(&cluster.disk("a", "y"), &cluster.path("expected"));
    let said = cluster.refused(&["--node", "v", "image", "detach", "disk:1"]);
    assert!(said.contains("disk:1") && said.contains("derived"), "{said}");
    cluster.ok(&["--node", "a", "create", "z", "--image", "disk:1"]);
    let said = cluster.refused(&["commit", "z", "--as", "disk:5"]);
    assert!(said.contains("does not differ from its image, disk:1"), "{said}");
}
