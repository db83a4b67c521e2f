//! What is refused, to whom and in which words; and what may be repeated.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::cluster::Cluster;
use crate::tools::{STEP_LIMIT, both, make_raw, tool, wait_for};

#[test]
fn refusals_without_a_certificate_of_the_cluster_there_is_no_answer() {
    let cluster = Cluster::with_nodes(&["n"]);
    let strangers = Cluster::start();
    for address in [cluster.volt_address(), cluster.node_address("n")] {
        let member = s_client(address, Some(&cluster.path("admin")));
        assert!(member.contains("HTTP/1.1 200"), "an administrator is answered: {member}");
        for credentials in [None, Some(strangers.path("admin"))] {
            let said = s_client(address, credentials.as_deref());
            assert!(!said.contains("HTTP/"), "{address} answers {credentials:?}: {said}");
            assert!(said.contains("alert"), "{address} ends the handshake of {credentials:?}: {said}");
        }
        let mut plain = TcpStream::connect(address).unwrap();
        plain.set_read_timeout(Some(STEP_LIMIT)).unwrap();
        plain.write_all(REQUEST.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The end may come as a reset: bytes of ours were not read.
        let _ = plain.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(!answer.contains("HTTP/"), "{address} speaks plain HTTP: {answer}");
    }
}

#[test]
fn refusals_a_token_works_once_and_a_name_is_given_once() {
    let cluster = Cluster::with_nodes(&["n"]);
    let token = || cluster.ok(&["volt", "token"]).trim().to_owned();
    let dir = cluster.path("x");
    let join = |token: &str, name: &str| {
        let dir = dir.to_str().unwrap();
        let said = cluster.refused(&[
            "--dir",
            dir,
            "compute",
            "--listen",
            "127.0.0.1:0",
            "--join",
            token,
            "--name",
            name,
        ]);
        assert!(!Path::new(dir).join("identity/cert.pem").exists(), "a refused node has a certificate");
        said
    };

    let good = token();
    says(&join(&good, "n"), &["'n'", "already", "choose another name"]);
    // The refusal did not use the token up; a daemon that joins and then cannot go on did.
    let used = cluster.refused(&[
        "--dir",
        cluster.path("y").to_str().unwrap(),
        "compute",
        "--listen",
        cluster.volt_address(),
        "--join",
        &good,
        "--name",
        "y",
    ]);
    says(&used, &["cannot listen on", cluster.volt_address(), "--listen"]);
    says(&join(&good, "x"), &["used before", "virtman volt token"]);

    says(&join("nonsense", "x"), &["not a join token", "virtman volt token"]);
    let for_z = cluster.ok(&["volt", "token", "--for", "z"]);
    says(&join(for_z.trim(), "x"), &["'z'", "'x'"]);
    says(&join(&token(), "../x"), &["'../x'", "node name"]);
    let mut strangers = Cluster::start();
    let theirs = strangers.ok(&["volt", "token"]);
    strangers.kill_volt();
    says(&join(theirs.trim(), "x"), &["cannot join as 'x'", "cannot connect to"]);
}

#[test]
fn refusals_bad_images_leave_nothing_behind_and_say_what_to_do() {
    let cluster = Cluster::with_nodes(&["n"]);
    let path = |name: &str| cluster.path(name).to_str().unwrap().to_owned();
    make_raw(&cluster.path("good"), 4, 1);
    make_raw(&cluster.path("other"), 4, 2);
    fs::create_dir(cluster.path("elsewhere")).unwrap();
    fs::create_dir(cluster.path("here")).unwrap();
    let (base, top) = (path("elsewhere/base.qcow2"), path("here/top.qcow2"));
    let image = |args: &[&str]| tool("qemu-utils", "qemu-img", args);
    image(&["convert", "-f", "raw", "-O", "qcow2", &path("good"), &base]);
    image(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, &top]);
    fs::copy(&base, cluster.path("truncated.qcow2")).unwrap();
    let truncated = File::options().write(true).open(cluster.path("truncated.qcow2")).unwrap();
    truncated.set_len(truncated.metadata().unwrap().len() / 2).unwrap();
    fs::write(cluster.path("text"), "no image\n".repeat(1000)).unwrap();
    File::create(cluster.path("empty")).unwrap();

    let add = |rest: &[&str]| cluster.refused(&[&["--node", "n", "image", "add"], rest].concat());
    let good = path("good");
    says(&add(&["disk:1", &path("missing")]), &[&path("missing"), "No such file"]);
    says(&add(&["disk:1", &path("here")]), &[&path("here"), "neither a regular file nor a block device"]);
    says(&add(&["disk:1", &path("truncated.qcow2")]), &["truncated.qcow2", "is truncated", "copy it again"]);
    says(&add(&["disk:1", &path("text"), "--format", "qcow2"]), &[&path("text"), "qcow2", "format"]);
    says(&add(&["disk:1", &path("empty")]), &[&path("empty"), "empty"]);
    says(&add(&["disk:1", &good, "--format", "iso"]), &["iso", "raw, qcow2, vmdk, vhdx"]);
    says(&add(&["disk:1", &top]), &["base.qcow2", "outside the allowed directories", "allow its directory"]);
    for name in ["a b", "../etc", "disk:1:2", "", "disk/1", "-x", "disk:\u{7f}"] {
        let args = ["--node", "n", "image", "add", "--format", "raw", "--", name, &good];
        says(&cluster.refused(&args), &["image name", "use 1 to"]);
    }
    assert_eq!(cluster.json(&["image", "list"]), Value::Array(Vec::new()));
    assert_eq!(entries(&cluster.node_dir("n").join("images")), 0);

    cluster.ok(&["--node", "n", "image", "add", "disk:1", &top, "--allow", &path("elsewhere")]);
    let taken = add(&["disk:1", &path("other")]);
    says(&taken, &["'disk:1'", "belongs to image", "use another tag"]);
    assert_eq!(cluster.json(&["image", "list"]).as_array().unwrap().len(), 1);
    assert_eq!(entries(&cluster.node_dir("n").join("images")), 1);
    cluster.ok(&["--node", "n", "image", "verify", "disk:1"]);
}

#[test]
fn refusals_bad_vms_are_refused_with_the_value_and_the_remedy() {
    let cluster = Cluster::with_nodes(&["n"]);
    make_raw(&cluster.path("good"), 4, 1);
    make_raw(&cluster.path("other"), 4, 2);
    for (image, file) in [("disk:1", "good"), ("disk:2", "other")] {
        cluster.ok(&["--node", "n", "image", "add", image, cluster.path(file).to_str().unwrap()]);
    }
    let create = |rest: &[&str]| cluster.refused(&[&["--node", "n", "create"], rest].concat());
    says(&create(&["vm", "--image", "nope:1"]), &["'nope:1'", "virtman image list"]);
    says(&create(&["vm", "--image", "disk:1", "--size", "1M"]), &["1048576", "smaller", "--size"]);
    says(&create(&["vm", "--image", "disk:1", "--size", "much"]), &["'much'", "such as 20G"]);
    let long = "x".repeat(block::limits::NAME_BYTES_MAX + 1);
    for name in ["../vm", "a/b", "a b", "", ".vm", "vm;reboot", "v\u{e4}m", &long] {
        says(&create(&["--image", "disk:1", "--", name]), &["VM name", "use 1 to"]);
    }
    for dir in ["vms", "disks"] {
        assert_eq!(entries(&cluster.node_dir("n").join(dir)), 0, "{dir}");
    }

    cluster.ok(&["--node", "n", "create", "vm", "--image", "disk:1"]);
    says(&create(&["vm", "--image", "disk:2"]), &["'vm'", "disk:1", "destroy it first"]);
    says(&create(&["vm", "--image", "disk:1", "--size", "8M"]), &["'vm'", "4194304", "8388608"]);
    says(&cluster.refused(&["destroy", "ghost"]), &["'ghost'", "virtman list"]);
    says(&cluster.refused(&["stop", "ghost"]), &["'ghost'", "virtman list"]);
    says(&cluster.refused(&["console", "vm"]), &["'vm'", "no running guest", "virtman boot"]);
    let in_use = ["--node", "n", "image", "remove", "disk:1"];
    says(&cluster.refused(&in_use), &["disk:1", "destroy those VMs first"]);
    let boot = ["boot", "--image", "disk:1", "--count", "1", "--nodes", "ghost"];
    says(&cluster.refused(&boot), &["'ghost'", "it has: n"]);
    says(&cluster.refused(&["--node", "ghost", "list"]), &["'ghost'", "it has: n"]);
    assert_eq!(cluster.json(&["list"]).as_array().unwrap().len(), 1);
}

#[test]
fn refusals_commands_say_which_daemon_is_missing_and_how_to_start_it() {
    let mut cluster = Cluster::with_nodes(&["n"]);
    let nowhere = cluster.path("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    for command in [&["list"][..], &["create", "vm", "--image", "disk:1"]] {
        let said = cluster.refused(&[&["--dir", nowhere], command].concat());
        says(&said, &["no node runs here", nowhere, "virtman compute"]);
    }
    says(
        &cluster.refused(&["--dir", nowhere, "compute"]),
        &["no cluster yet", "virtman volt token", "--join"],
    );
    let no_home = ["--home", nowhere];
    says(&cluster.refused(&[&no_home[..], &["tree"]].concat()), &[nowhere, "credentials", "Volt's host"]);
    says(&cluster.refused(&[&no_home[..], &["volt"]].concat()), &[nowhere, "virtman volt init"]);

    let dir = cluster.node_dir("n");
    let compute = ["--dir", dir.to_str().unwrap(), "compute", "--listen", "127.0.0.1:0"];
    let another = cluster.refused(&compute);
    says(&another, &["another 'virtman compute' runs in", dir.to_str().unwrap(), "--dir"]);
    let another = cluster.refused(&["volt", "--listen", "127.0.0.1:0"]);
    says(&another, &["catalog.redb", "another 'virtman volt'", "--home"]);

    cluster.kill_node("n");
    let foreign = cluster.path("foreign");
    fs::write(&foreign, "somebody's data").unwrap();
    let foreign = format!("{}=1G", foreign.display());
    let small = cluster.path("small");
    let small = small.to_str().unwrap();
    for (cache, words) in [
        ("/x", &["'/x'", "PATH=SIZE"][..]),
        ("/x=5Q", &["'5Q'", "such as 20G"]),
        ("/nowhere/at/all/x=1G", &["/nowhere/at/all/x", "No such file"]),
        (&format!("{small}=1"), &[small, "too small"]),
        (&foreign, &["foreign", "not a VirtMan cache", "erase it first"]),
    ] {
        says(&cluster.refused(&[&compute[..], &["--cache", cache]].concat()), words);
    }
    assert_eq!(fs::read_to_string(cluster.path("foreign")).unwrap(), "somebody's data");
    let gone = cluster.refused(&["--dir", dir.to_str().unwrap(), "list"]);
    says(&gone, &["api.sock", "virtman compute"]);

    cluster.kill_volt();
    says(&cluster.refused(&["status"]), &[cluster.volt_address(), "virtman volt"]);
}

#[test]
fn refusals_every_command_explains_itself_and_completes() {
    let cluster = Cluster::start();
    let mut asked = vec![Vec::new()];
    let mut explained = 0;
    while let Some(command) = asked.pop() {
        let help = cluster.ok(&[&command[..], &["--help"]].concat());
        assert!(help.contains("Usage: virtman"), "{command:?}: {help}");
        explained += 1;
        let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        for line in commands.take_while(|line| !line.is_empty()) {
            // Continued explanations are indented further than the names of commands.
            let name = line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '));
            let name = name.and_then(|rest| rest.split(' ').next()).filter(|name| *name != "help");
            asked.extend(name.map(|name| {
                let name: &str = String::from(name).leak();
                [&command[..], &[name]].concat()
            }));
        }
    }
    assert!(explained > 20, "only {explained} commands were found");

    let script = cluster.path("completions");
    fs::write(&script, cluster.ok(&["completions", "bash"])).unwrap();
    tool("bash", "bash", &["-n", script.to_str().unwrap()]);
    assert!(fs::metadata(&script).unwrap().len() > 1000);
}

#[test]
fn refusals_every_command_may_be_repeated_and_speaks_json() {
    let cluster = Cluster::with_nodes(&["o", "n"]);
    make_raw(&cluster.path("good"), 4, 1);
    let good = cluster.path("good");
    let repeatable: &[&[&str]] = &[
        &["--node", "o", "image", "add", "disk:1", good.to_str().unwrap()],
        &["--node", "o", "image", "verify", "disk:1"],
        &["--node", "n", "image", "attach", "disk:1"],
        &["image", "list"],
        &["image", "show", "disk:1"],
        &["--node", "n", "create", "vm", "--image", "disk:1"],
        &["list"],
        &["tree"],
        &["stop", "vm"],
        &["stop", "--all"],
        &["volt", "openapi"],
    ];
    for command in repeatable {
        let first = cluster.json(command);
        assert_eq!(cluster.json(command), first, "{command:?} changed something the second time");
    }
    assert!(cluster.json(&["volt", "token"])["token"].is_string());
    assert_eq!(cluster.json(&["status"])["nodes"].as_array().unwrap().len(), 2);

    let ca = || fs::read(cluster.path("admin/ca.pem")).unwrap();
    let before = ca();
    cluster.ok(&["volt", "init", "--address", cluster.volt_address()]);
    assert_eq!(ca(), before);
    cluster.ok(&["status"]);

    let destroyed = cluster.json(&["destroy", "vm"]);
    assert_eq!(destroyed[0]["name"], "vm");
    cluster.ok(&["--node", "n", "image", "detach", "disk:1"]);
    cluster.ok(&["--node", "o", "image", "remove", "disk:1"]);
    assert_eq!(cluster.json(&["image", "list"]), Value::Array(Vec::new()));
}

#[test]
fn refusals_a_removed_node_gets_no_answer_from_volt_or_from_other_nodes() {
    let cluster = Cluster::with_nodes(&["o", "n"]);
    let source = cluster.path("source.raw");
    make_raw(&source, 3, 9);
    cluster.ok(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    let identity = cluster.node_dir("n").join("identity");
    let addresses = [cluster.volt_address().to_owned(), cluster.node_address("o").to_owned()];
    for address in &addresses {
        // A node may not command, but it gets an answer.
        says(&s_client(address, Some(&identity)), &["HTTP/1.1 "]);
    }

    cluster.ok(&["volt", "remove", "n"]);

    assert_eq!(cluster.node_state("n"), None);
    for address in &addresses {
        // The other node hears of it by a push, a moment later than Volt.
        wait_for(&format!("{address} refuses the removed node"), STEP_LIMIT, || {
            (!s_client(address, Some(&identity)).contains("HTTP/1.1 ")).then_some(())
        });
    }
    let refused = both(&cluster.run_at("n", &["create", "vm", "--image", "disk:1"]));
    says(&refused, &["removed from the cluster"]);
}

#[test]
fn refusals_a_node_brings_no_vm_that_no_administrator_named() {
    let cluster = Cluster::with_nodes(&["o", "n", "m"]);
    let source = cluster.path("source");
    make_raw(&source, 1, 9);
    let image = cluster.json(&["--node", "o", "image", "add", "disk:1", source.to_str().unwrap()]);
    let request = |method: &str, path: &str, body: &str| {
        let length = body.len();
        format!(
            "{method} {path} HTTP/1.1\r\nHost: virtman\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    };
    let id = image["id"].as_str().unwrap();
    let offer = serde_json::json!({
        "disks": [{
            "id": "00112233445566778899aabbccddeeff", "image": "disk:1", "image_id": id, "size_bytes": 1 << 20,
            "state": { "carried": null },
        }],
        "created_unix_ms": 0,
    });
    let offer = offer.to_string();
    let node = cluster.node_dir("n").join("identity");
    let target = cluster.node_address("o");
    let asks = |method: &str, path: &str, body: &str| {
        s_client_asks(target, Some(&node), &request(method, path, body))
    };
    let expect = format!("{{\"from\":\"n\",\"address\":\"{}\"}}", cluster.node_address("n"));
    says(&asks("PUT", "/v1/incoming/x", &expect), &["HTTP/1.1 403", "not an administrator"]);
    says(
        &asks("POST", "/v1/incoming/x/receive", &offer),
        &["HTTP/1.1 403", "no administrator said that 'x' may come from n"],
    );
    says(&asks("POST", "/v1/incoming/x/take", "null"), &["HTTP/1.1 404"]);

    // What was said of another node is of no use to this one.
    let other = format!("{{\"from\":\"m\",\"address\":\"{}\"}}", cluster.node_address("m"));
    let admin = cluster.path("admin");
    says(&s_client_asks(target, Some(&admin), &request("PUT", "/v1/incoming/x", &other)), &["HTTP/1.1 204"]);
    says(&asks("POST", "/v1/incoming/x/receive", &offer), &["HTTP/1.1 403"]);
    assert_eq!(entries(&cluster.node_dir("o").join("vms")), 0);

    says(&s_client_asks(target, Some(&admin), &request("PUT", "/v1/incoming/x", &expect)), &["HTTP/1.1 204"]);
    says(&asks("POST", "/v1/incoming/x/receive", &offer), &["HTTP/1.1 204"]);
    says(&asks("POST", "/v1/incoming/x/take", "null"), &["HTTP/1.1 409", "not all of 'x' is here"]);
    // Its node knows of no move, so it is forgotten.
    wait_for("nothing is left of what does not come", STEP_LIMIT, || {
        (entries(&cluster.node_dir("o").join("vms")) == 0).then_some(())
    });
}

/// What a raw client asks for.
const REQUEST: &str = "GET /v1/status HTTP/1.1\r\nHost: virtman\r\nConnection: close\r\n\r\n";

/// What `openssl s_client` has to tell after it sent a request, with these credentials or with none.
fn s_client(address: &str, credentials: Option<&Path>) -> String {
    s_client_asks(address, credentials, REQUEST)
}

/// The same with another request.
fn s_client_asks(address: &str, credentials: Option<&Path>, request: &str) -> String {
    let mut command = Command::new("timeout");
    command.args(["120", "openssl", "s_client", "-connect", address, "-alpn", "http/1.1", "-ign_eof"]);
    if let Some(dir) = credentials {
        command.arg("-cert").arg(dir.join("cert.pem")).arg("-key").arg(dir.join("key.pem"));
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = command.spawn().unwrap();
    let mut stdin = client.stdin.take().unwrap();
    // A client that was refused may be gone already.
    let _ = stdin.write_all(request.as_bytes());
    drop(stdin);
    both(&client.wait_with_output().unwrap())
}

/// Demands that a refusal has all of these words.
fn says(refusal: &str, words: &[&str]) {
    for word in words {
        assert!(refusal.contains(word), "'{word}' is missing in: {refusal}");
    }
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}
