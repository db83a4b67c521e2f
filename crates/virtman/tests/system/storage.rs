//! What disks hold: images of every format through three levels, and VM disks, judged by foreign tools.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use testkit::ports::Port;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, assert_same, both, make_raw, qemu_io, tool, tool_output, wait_for};

/// The origin and four nodes below it, the last one at level three.
const FIVE: [&str; 5] = ["o", "a", "b", "c", "d"];

/// Size of the images, in MiB: several manifest pages' worth would only cost time.
const MIB: usize = 24;

#[test]
fn storage_every_format_reads_at_level_three_as_its_source() {
    let cluster = Cluster::with_nodes(&FIVE);
    for (number, format) in FORMATS.iter().enumerate() {
        // Contents differ, so that no chunk is in a cache before its format was served.
        let source = cluster.path(&format!("{format}.source"));
        make_raw(&source, MIB, 100 + number as u64);
        let file = convert(&cluster, format, &source);
        let image = format!("disk:{format}");
        cluster.share(&FIVE, &image, &file);
        assert_eq!(cluster.depth(&image, "d"), 3, "d is at level 3: {:?}", cluster.parents(&image));
        assert_same(&cluster.volume("d", &format!("disk+{format}")), &source);
    }
}

#[test]
fn storage_the_same_content_has_the_same_id_in_every_format() {
    let cluster = Cluster::with_nodes(&["o"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 7);
    edit(&source);
    let ids: Vec<(String, Value)> = FORMATS
        .iter()
        .map(|format| {
            let file = convert(&cluster, format, &source);
            let image = format!("disk:{format}");
            let file = file.to_str().unwrap();
            let id = cluster.json(&["--node", "o", "image", "add", &image, file])["id"].clone();
            (image, id)
        })
        .collect();
    assert!(ids.iter().all(|(_, id)| id.is_string() && *id == ids[0].1), "{ids:?}");
}

#[test]
fn storage_each_node_fetches_each_chunk_once_however_many_read_it() {
    let cluster = Cluster::with_nodes(&FIVE);
    let source = cluster.path("source");
    make_raw(&source, 2 * MIB, 3);
    cluster.share(&FIVE, "disk:1", &source);
    for vm in ["d1", "d2"] {
        cluster.ok(&["--node", "d", "create", vm, "--image", "disk:1"]);
    }

    let mut readers: Vec<String> =
        (0..10).map(|number| cluster.disk("d", ["d1", "d2"][number / 5])).collect();
    readers.extend(FIVE[1..4].iter().map(|node| cluster.volume(node, "disk+1")));
    std::thread::scope(|scope| {
        for (number, disk) in readers.iter().enumerate() {
            let (copy, source) = (cluster.path(&format!("copy{number}")), &source);
            scope.spawn(move || match number % 2 {
                0 => assert_same(disk, source),
                _ => {
                    tool("libnbd-bin", "nbdcopy", &[disk, copy.to_str().unwrap()]);
                    assert!(fs::read(&copy).unwrap() == fs::read(source).unwrap(), "{disk} was copied wrong");
                }
            });
        }
    });

    let image = cluster.json(&["image", "show", "disk:1"]);
    let data_chunks = image["chunks"].as_u64().unwrap() - image["zero_chunks"].as_u64().unwrap();
    for node in &FIVE[1..] {
        let status = cluster.node_status(node);
        let cache = |counter: &str| status["cache"][counter].as_u64().unwrap();
        let fetched = cache("fetched_chunks");
        // Beside its data an image has pages of hashes; this small one has but one or two.
        assert!((data_chunks..=data_chunks + 2).contains(&fetched), "{node} fetched {fetched}: {status}");
        assert_eq!(fetched, cache("resident_chunks"), "{node} fetched a chunk twice: {status}");
        for lost in ["evicted_chunks", "dropped_chunks", "unstored_chunks"] {
            assert_eq!(cache(lost), 0, "{node}: {status}");
        }
        assert_eq!(status["links"]["lies"], 0, "{node}: {status}");
        assert_eq!(status["links"]["received_chunks"], fetched, "{node}: {status}");
    }
    // What parents sent was wanted, or had been withdrawn while it was on its way, where it may still be.
    let links = |node: &str, counter: &str| cluster.node_status(node)["links"][counter].as_u64().unwrap();
    let total = |counter: &str| FIVE.iter().map(|node| links(node, counter)).sum::<u64>();
    wait_for("all that was sent has come", STEP_LIMIT, || {
        (total("sent_chunks") == total("received_chunks") + total("vain_chunks")).then_some(())
    });
    let origin = cluster.node_status("o");
    let parents = cluster.parents("disk:1");
    let children = parents.values().filter(|parent| parent.as_deref() == Some("o")).count();
    assert_eq!(children, 1, "{parents:?}");
    let fetched = cluster.node_status("a")["cache"]["fetched_chunks"].as_u64().unwrap();
    let sent = origin["links"]["sent_chunks"].as_u64().unwrap();
    let most = fetched + links("a", "vain_chunks") + total("last_resort_fetches");
    assert!((fetched..=most).contains(&sent), "{sent} of {most}: {origin}");
}

#[test]
fn storage_a_node_that_was_filled_needs_no_parent_any_more() {
    let mut cluster = Cluster::with_nodes(&["o", "a"]);
    let source = cluster.path("source");
    make_raw(&source, MIB, 21);
    cluster.ok(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    cluster.add_node("small", &["--cache", &format!("{}=2M", cluster.path("small.chunks").display())]);
    let said = cluster.refused(&["--node", "small", "image", "attach", "disk:1", "--fill"]);
    assert!(said.contains("room for 1.9 MiB") && said.contains("--cache"), "{said}");

    cluster.ok(&["--node", "a", "image", "attach", "disk:1", "--fill"]);
    // A node that starts again goes on with it.
    cluster.kill_node("a");
    cluster.restart_node("a");
    cluster.wait_up("a");
    wait_for("all of the image is on a", STEP_LIMIT, || {
        let fill = cluster.json(&["--node", "a", "image", "list"])[0]["fill"].clone();
        (fill["resident"].as_u64()? == fill["chunks"].as_u64()?).then_some(())
    });
    cluster.kill_node("o");
    assert_same(&cluster.volume("a", "disk+1"), &source);
}

#[test]
fn storage_foreign_tools_write_and_read_vm_disks_over_a_unix_socket() {
    let (cluster, source) = one_node("n", &[]);
    cluster.ok(&["--node", "n", "create", "vm", "--image", "disk:1", "--size", "32M"]);
    let disk = cluster.disk("n", "vm");
    assert_eq!(cluster.ok(&["--node", "n", "create", "vm", "--image", "disk:1"]).trim(), disk);

    let said = tool("libnbd-bin", "nbdinfo", &["--json", &disk]);
    let said: Value = serde_json::from_str(&said).unwrap();
    let export = &said["exports"][0];
    assert_eq!((&said["structured"], &export["export-size"]), (&true.into(), &(32 << 20).into()), "{said}");
    for can in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[can], true, "{can}: {said}");
    }
    assert_eq!(export["is_read_only"], false, "{said}");
    judge(&cluster, &disk, &source);

    let fio = ["--name=verify", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-128k", "--size=8M"];
    let checks = [
        "--iodepth=16",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--verify_state_save=0",
        "--fsync=64",
    ];
    let uri = format!("--uri={disk}");
    tool("fio", "fio", &[&fio[..], &checks[..], &["--allow_file_create=0", &uri]].concat());

    let volume = cluster.volume("n", "disk+1");
    assert_eq!(tool_output("libnbd-bin", "nbdinfo", &["--is", "read-only", &volume]).status.code(), Some(0));
    let write = tool_output("qemu-utils", "qemu-io", &["-f", "raw", "-c", "write 0 4k", &volume]);
    assert!(!write.status.success(), "an image was written to: {}", both(&write));
    assert_same(&volume, &source);
}

#[test]
fn storage_foreign_tools_use_vm_disks_over_tls_with_a_certificate_and_not_without() {
    let nbd = Port::reserve();
    let port = nbd.number();
    // Foreign clients compare the name that they dial with the certificate's, which is the node's.
    let (cluster, source) = one_node("localhost", &["--nbd-listen", nbd.address()]);
    cluster.ok(&["--node", "localhost", "create", "vm", "--image", "disk:1", "--size", "32M"]);
    let certificates = cluster.path("certificates");
    fs::create_dir(&certificates).unwrap();
    for (ours, theirs) in
        [("ca.pem", "ca-cert.pem"), ("cert.pem", "client-cert.pem"), ("key.pem", "client-key.pem")]
    {
        fs::copy(cluster.path("admin").join(ours), certificates.join(theirs)).unwrap();
    }
    let certificates = certificates.to_str().unwrap();
    let uri = |name: &str| format!("nbds://localhost:{port}/{name}?tls-certificates={certificates}");
    let of_qemu = |program: &str, args: &[&str]| {
        let tls = format!("tls-creds-x509,id=tls,endpoint=client,dir={certificates}");
        let disk = format!(
            "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export=vm,tls-creds=tls"
        );
        tool("qemu-utils", program, &[args, &["--object", &tls, "--image-opts", &disk]].concat())
    };

    let info = tool("libnbd-bin", "nbdinfo", &["--list", "--json", &uri("")]);
    assert!(info.contains("\"TLS\": true"), "{info}");
    assert!(info.contains("\"vm\"") && info.contains("\"disk:1\""), "{info}");
    let copy = cluster.path("copy");
    tool("libnbd-bin", "nbdcopy", &[&uri("disk:1"), copy.to_str().unwrap()]);
    assert_same(copy.to_str().unwrap(), &source);
    of_qemu("qemu-io", &["-c", "write -P 0x5a 4097 70000", "-c", "flush", "-c", "read -P 0x5a 4097 70000"]);
    assert!(of_qemu("qemu-img", &["info"]).contains("32 MiB"));
    qemu_io(&cluster.disk("localhost", "vm"), &["read -P 0x5a 4097 70000"]);

    let stranger = cluster.path("stranger");
    fs::create_dir(&stranger).unwrap();
    fs::copy(cluster.path("admin/ca.pem"), stranger.join("ca-cert.pem")).unwrap();
    for refused in [
        format!("nbd://localhost:{port}/vm"),
        format!("nbds://localhost:{port}/vm"),
        format!("nbds://localhost:{port}/vm?tls-certificates={}", stranger.display()),
    ] {
        let output = tool_output("libnbd-bin", "nbdinfo", &[&refused]);
        assert!(!output.status.success(), "{refused} was let in: {}", both(&output));
        assert!(!both(&output).contains("size"), "{refused} learned of the disk: {}", both(&output));
    }
}

#[test]
fn storage_vms_of_one_image_do_not_see_each_others_writes_and_the_image_stays_what_it_was() {
    let (cluster, source) = one_node("n", &[]);
    let vms = ["one", "two", "three"];
    for vm in vms {
        cluster.ok(&["--node", "n", "create", vm, "--image", "disk:1"]);
    }
    let mut expected = Vec::new();
    for (number, vm) in vms.iter().enumerate() {
        let commands = [
            format!("write -P {} 1000k 200k", number + 1),
            format!("write -P {} {}M 4k", number + 101, number + 3),
            format!("write -z {}M 300k", number + 12),
            "flush".to_owned(),
        ];
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let copy = cluster.path(&format!("{vm}.expected"));
        fs::copy(&source, &copy).unwrap();
        qemu_io(copy.to_str().unwrap(), &commands);
        qemu_io(&cluster.disk("n", vm), &commands);
        expected.push(copy);
    }
    for (vm, expected) in vms.iter().zip(&expected) {
        assert_same(&cluster.disk("n", vm), expected);
    }
    cluster.ok(&["--node", "n", "create", "later", "--image", "disk:1"]);
    assert_same(&cluster.disk("n", "later"), &source);
    assert_same(&cluster.volume("n", "disk+1"), &source);
    assert_eq!(cluster.json(&["--node", "n", "image", "verify", "disk:1"])["wrong_chunks"], 0);
}

#[test]
fn storage_a_node_has_five_hundred_disks_in_little_memory_and_leaves_nothing_of_them() {
    const DISKS: usize = 500;
    let (cluster, _) = one_node("n", &[]);
    let names: Vec<String> = (0..DISKS).map(|number| format!("vm{number}")).collect();
    std::thread::scope(|scope| {
        for some in names.chunks(DISKS / 4) {
            let cluster = &cluster;
            scope.spawn(move || {
                for vm in some {
                    let output = cluster.run_at("n", &["create", vm, "--image", "disk:1"]);
                    assert!(output.status.success(), "create {vm}: {}", both(&output));
                }
            });
        }
    });
    assert_eq!(cluster.json(&["--node", "n", "list"]).as_array().unwrap().len(), DISKS);
    qemu_io(&cluster.disk("n", "vm499"), &["write -P 9 1M 64k", "flush", "read -P 9 1M 64k"]);
    cluster.ok(&["--node", "n", "create", "one-more", "--image", "disk:1"]);

    let memory_bytes = cluster.node_status("n")["memory_bytes"].as_u64().unwrap();
    let allowed_bytes = (64 + DISKS as u64) << 20;
    assert!(memory_bytes <= allowed_bytes, "{memory_bytes} bytes of memory, more than {allowed_bytes}");

    let mut destroy = vec!["--node", "n", "destroy", "one-more"];
    destroy.extend(names.iter().map(String::as_str));
    cluster.ok(&destroy);
    for dir in ["vms", "disks"] {
        let left: Vec<_> = fs::read_dir(cluster.node_dir("n").join(dir)).unwrap().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
    assert_eq!(cluster.json(&["--node", "n", "list"]), Value::Array(Vec::new()));
}

/// The formats that are imported; `chain` is a qcow2 on a qcow2 on a qcow2.
const FORMATS: [&str; 7] = ["raw", "qcow2", "compressed", "chain", "vmdk", "streamed", "vhdx"];

/// What the layers of a chain hold above their base.
const EDITS: [&[&str]; 2] =
    [&["write -P 0xa1 1000k 70k", "write -z 3M 100k"], &["write -P 0xb2 1050k 4k", "write -P 0xc3 5M 1M"]];

/// Writes what the upper layers of a chain hold onto a raw file.
fn edit(raw: &Path) {
    for commands in EDITS {
        qemu_io(raw.to_str().unwrap(), commands);
    }
}

/// The content of `source` in a format. For a chain, `source` is made to have what its layers have.
fn convert(cluster: &Cluster, format: &str, source: &Path) -> PathBuf {
    let file = cluster.path(&format!("disk.{format}"));
    let to = file.to_str().unwrap();
    let from = source.to_str().unwrap();
    let image = |args: &[&str]| tool("qemu-utils", "qemu-img", args);
    let plain = ["convert", "-f", "raw", from, to, "-O"];
    match format {
        "raw" => return source.to_owned(),
        "compressed" => image(&[&plain[..], &["qcow2", "-c"]].concat()),
        "streamed" => image(&[&plain[..], &["vmdk", "-o", "subformat=streamOptimized"]].concat()),
        "chain" => {
            let layer = |number: usize| format!("{to}.{number}");
            image(&["convert", "-f", "raw", "-O", "qcow2", from, &layer(0)]);
            for (number, commands) in EDITS.iter().enumerate() {
                let (below, above) = (layer(number), layer(number + 1));
                image(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below, &above]);
                let mut args = vec!["-f", "qcow2"];
                args.extend(commands.iter().flat_map(|command| ["-c", command]));
                args.push(&above);
                tool("qemu-utils", "qemu-io", &args);
            }
            edit(source);
            return PathBuf::from(layer(EDITS.len()));
        }
        plainly => image(&[&plain[..], &[plainly]].concat()),
    };
    file
}

/// A node with an image, and the image's source.
fn one_node(name: &str, options: &[&str]) -> (Cluster, PathBuf) {
    let mut cluster = Cluster::start();
    cluster.add_node(name, options);
    let source = cluster.path("source");
    make_raw(&source, MIB, 5);
    cluster.ok(&["--node", name, "image", "add", "disk:1", source.to_str().unwrap()]);
    (cluster, source)
}

/// Writes, zeroes and discards on a disk of 32 MiB over an image of `source`, and does the same to a file
/// by its side: afterwards both must be equal, and the disk must know what it does not hold.
fn judge(cluster: &Cluster, disk: &str, source: &Path) {
    let expected = cluster.path("expected");
    let file = expected.to_str().unwrap();
    fs::copy(source, &expected).unwrap();
    fs::File::options().write(true).open(&expected).unwrap().set_len(32 << 20).unwrap();
    assert_same(disk, &expected);

    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 4095 3",
        "write -f -P 0x33 7M 65537",
        "write -P 0x44 30M 2M",
        "write -z -u 9M 1M",
        "write -z 3000001 5000",
        "discard 31M 512k",
        "flush",
    ];
    qemu_io(disk, &commands);
    qemu_io(file, &commands);
    // What was discarded may read as anything by the letter of the protocol; ours reads as zeroes.
    qemu_io(disk, &["read -P 0x22 4095 3", "read -P 0 9M 1M", "read -P 0 31M 512k"]);
    assert_same(disk, &expected);

    let map = tool("qemu-utils", "qemu-img", &["map", "-f", "raw", "--output=json", disk]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let at = |byte: u64| {
        let covers = |extent: &&Value| {
            let start = extent["start"].as_u64().unwrap();
            (start..start + extent["length"].as_u64().unwrap()).contains(&byte)
        };
        let extent = map.iter().find(covers).expect("the map covers the disk");
        (extent["data"].as_bool().unwrap(), extent["zero"].as_bool().unwrap())
    };
    let (data, hole) = ((true, false), (false, true));
    for (byte, is) in [(0, data), (9 << 20, hole), (30 << 20, data), (31 << 20, hole), (28 << 20, hole)] {
        assert_eq!(at(byte), is, "byte {byte}: {map:?}");
    }

    // A whole disk in and out again.
    let (new, copy) = (cluster.path("new"), cluster.path("copy"));
    make_raw(&new, 32, 77);
    tool("libnbd-bin", "nbdcopy", &["--flush", new.to_str().unwrap(), disk]);
    tool("libnbd-bin", "nbdcopy", &[disk, copy.to_str().unwrap()]);
    assert!(fs::read(&new).unwrap() == fs::read(&copy).unwrap(), "nbdcopy in and out gave another disk");
}

/// Two nodes gave equal images names of their own.
#[test]
fn storage_an_origin_that_attaches_its_image_under_anothers_name_stays_an_origin() {
    let cluster = Cluster::with_nodes(&["o", "p"]);
    let file = cluster.path("source");
    make_raw(&file, 3, 5);
    for (node, name) in [("o", "one:1"), ("p", "two:1")] {
        cluster.ok(&["--node", node, "image", "add", name, file.to_str().unwrap()]);
    }
    cluster.ok(&["--node", "o", "image", "attach", "two:1"]);
    let trees = cluster.json(&["tree", "one:1"]);
    let stripe = trees[0]["stripes"][0].as_array().unwrap();
    let roles: Vec<_> = stripe.iter().map(|at| (at["node"].as_str(), at["role"].as_str())).collect();
    assert_eq!(roles.len(), 2, "{trees}");
    assert!(roles.iter().all(|(_, role)| *role == Some("origin")), "{trees}");
}
