//! Damaged state of a node, one file at a time: it is named in the log, costs nothing but what it describes, has nothing
//! deleted, and is forgiven once the file is back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use testkit::tgt::{NAME, Tgt};

use crate::cluster::Cluster;
use crate::iscsi::secret_file;
use crate::tools::{assert_same, make_raw, qemu_io};

const MIB: usize = 12;

/// A node `n` with all kinds of state: VMs `v`, with a snapshot and a clone, and `w`, which is exported; images from a
/// file, from another VM's disk, from an iSCSI unit and from another node. Each VM's disk is as a file of its name.
struct Site {
    cluster: Cluster,
    array: Tgt,
}

impl Site {
    fn new() -> Site {
        let mut cluster = Cluster::start();
        cluster.add_node("o", &[]);
        cluster.add_node("n", &["--iscsi-listen", "127.0.0.1:0"]);
        let (source, other) = (cluster.path("source"), cluster.path("other"));
        make_raw(&source, MIB, 51);
        make_raw(&other, MIB, 55);
        cluster.ok(&["--node", "n", "image", "add", "disk:1", source.to_str().unwrap()]);
        cluster.ok(&["--node", "o", "image", "add", "other:1", other.to_str().unwrap()]);
        cluster.ok(&["--node", "n", "image", "attach", "other:1"]);
        let mut array = Tgt::new((MIB as u64) << 20);
        make_raw(&array.file(), MIB, 57);
        array.start();
        array.add_disk(&[], &[]);
        array.add_account("array", "twelve-or-more-bytes", &[]);
        let chap = secret_file(&cluster, "chap", "array:twelve-or-more-bytes\n");
        let unit = format!("iscsi://array@127.0.0.1:{}/{NAME}/1", array.port);
        cluster.ok(&["--node", "n", "image", "add", "far:1", &unit, "--chap-file", &chap]);
        let site = Site { cluster, array };
        site.make_vms(&source, &other);
        site
    }

    fn make_vms(&self, source: &Path, other: &Path) {
        let cluster = &self.cluster;
        for (vm, image, source) in [("v", "disk:1", source), ("w", "other:1", other)] {
            cluster.ok(&["--node", "n", "create", vm, "--image", image]);
            fs::copy(source, cluster.path(vm)).unwrap();
            self.write(vm, 1);
        }
        cluster.ok(&["snapshot", "v", "s"]);
        fs::copy(cluster.path("v"), cluster.path("v.s")).unwrap();
        self.write("v", 2);
        cluster.ok(&["clone", "v", "--name", "c"]);
        fs::copy(cluster.path("v"), cluster.path("c")).unwrap();
        self.write("v", 3);
        cluster.ok(&["commit", "w", "--as", "derived:1"]);
        fs::copy(cluster.path("w"), cluster.path("derived")).unwrap();
        self.write("w", 4);
        cluster.ok(&["--node", "n", "export", "add", "w", "--anyone"]);
        let medium = format!("{}=64M", cluster.path("second").display());
        cluster.ok(&["--node", "n", "cache", "add", &medium]);
    }

    /// Writes the same to a VM's disk and to the file of its name.
    fn write(&self, vm: &str, number: usize) {
        let write = format!("write -P {number} {} 300k", number * 1_000_001);
        for disk in [&self.cluster.disk("n", vm), self.cluster.path(vm).to_str().unwrap()] {
            qemu_io(disk, &[&write, "flush"]);
        }
    }

    /// A file or directory of the node.
    fn at(&self, path: &str) -> PathBuf {
        self.cluster.node_dir("n").join(path)
    }

    fn record(&self, vm: &str) -> Value {
        serde_json::from_slice(&fs::read(self.at(&format!("vms/{vm}/vm.json"))).unwrap()).unwrap()
    }

    /// The directory of the layer that takes a VM's changes.
    fn top(&self, vm: &str) -> String {
        format!("layers/{}", self.record(vm)["disks"][0]["top"].as_str().unwrap())
    }

    /// The directory of the layer that is a VM's only snapshot.
    fn snapshot(&self, vm: &str) -> String {
        let record = self.record(vm);
        let disk = record["disks"][0]["id"].as_str().unwrap();
        format!("layers/{}", record["snapshots"][0]["layers"][disk].as_str().unwrap())
    }

    fn id(&self, image: &str) -> String {
        self.cluster.json(&["image", "show", image])["id"].as_str().unwrap().to_owned()
    }

    /// All state, by name.
    fn files(&self) -> BTreeSet<PathBuf> {
        let mut files = BTreeSet::new();
        let mut dirs: Vec<PathBuf> =
            ["vms", "layers", "images", "attached", "exports", "remotes"].map(|dir| self.at(dir)).into();
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path.clone());
                }
                files.insert(path);
            }
        }
        files
    }

    /// Starts the daemon again, and gives what it says.
    fn restart(&mut self) -> String {
        self.cluster.kill_node("n");
        self.start()
    }

    fn start(&mut self) -> String {
        let before = self.cluster.log("n").len();
        self.cluster.restart_node("n");
        self.cluster.wait_up("n");
        self.cluster.log("n")[before..].to_owned()
    }

    /// Checks what is there apart from `lost`.
    fn check(&self, lost: &[&str]) {
        let cluster = &self.cluster;
        let vms = cluster.json(&["--node", "n", "list"]);
        let names: Vec<&str> =
            vms.as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
        for vm in ["v", "w", "c"] {
            assert_eq!(names.contains(&vm), !lost.contains(&vm), "{vm} in {names:?}, without {lost:?}");
        }
        for vm in names {
            assert_same(&cluster.disk("n", vm), &cluster.path(vm));
        }
        for (image, file) in [("disk:1", "source"), ("other:1", "other"), ("derived:1", "derived")] {
            if !lost.contains(&image) {
                assert_same(&cluster.volume("n", &image.replace(':', "+")), &cluster.path(file));
            }
        }
        if !lost.contains(&"far:1") {
            assert_same(&cluster.volume("n", "far+1"), &self.array.file());
        }
        // Life goes on with a VM that comes and goes.
        if !lost.contains(&"disk:1") {
            cluster.ok(&["--node", "n", "create", "x", "--image", "disk:1"]);
            cluster.ok(&["snapshot", "x", "s"]);
            cluster.ok(&["destroy", "x"]);
        }
    }
}

/// How a file is damaged.
#[derive(Debug, Clone, Copy)]
enum Damage {
    /// Its second half is gone.
    Half,
    /// It holds something else.
    Foreign,
    /// It is empty.
    Empty,
}

impl Damage {
    fn inflict(self, file: &Path) {
        match self {
            Damage::Half => {
                let len = fs::metadata(file).unwrap().len();
                fs::File::options().write(true).open(file).unwrap().set_len(len / 2).unwrap();
            }
            Damage::Foreign => fs::write(file, vec![0x55; 20_000]).unwrap(),
            Damage::Empty => fs::write(file, "").unwrap(),
        }
    }
}

#[test]
fn state_files_that_are_damaged_cost_nothing_but_themselves_and_that_only_until_they_are_back() {
    let mut site = Site::new();
    let said = site.restart();
    assert!(!said.contains("ERROR"), "{said}");
    site.check(&[]);
    let (v_top, w_top, v_snapshot) = (site.top("v"), site.top("w"), site.snapshot("v"));
    let below = |layer: &str, file: &str| format!("{layer}/{file}");
    let attached = |image: &str| format!("attached/{}.json", site.id(image));
    let remote = fs::read_dir(site.at("remotes")).unwrap().next().unwrap().unwrap().path();
    let remote = format!("remotes/{}", remote.file_name().unwrap().to_str().unwrap());
    let derived = format!("images/{}/derived.json", site.id("derived:1"));
    // What is damaged, and what cannot be used then.
    let cases: [(String, Damage, &[&str]); 15] = [
        ("vms/v/vm.json".to_owned(), Damage::Half, &["v"]),
        ("vms/w/vm.json".to_owned(), Damage::Empty, &["w"]),
        (below(&v_top, "layer.json"), Damage::Half, &["v"]),
        (below(&v_snapshot, "layer.json"), Damage::Foreign, &["v", "c"]),
        (below(&w_top, "map"), Damage::Foreign, &["w"]),
        (below(&w_top, "map"), Damage::Empty, &["w"]),
        (below(&w_top, "data"), Damage::Empty, &["w"]),
        (below(&v_snapshot, "data"), Damage::Empty, &["v", "c"]),
        (below(&v_top, "live"), Damage::Foreign, &[]),
        (attached("disk:1"), Damage::Half, &["v", "c", "disk:1"]),
        (attached("far:1"), Damage::Empty, &["far:1"]),
        (derived, Damage::Half, &["derived:1"]),
        (remote, Damage::Half, &["far:1"]),
        ("exports/w.json".to_owned(), Damage::Half, &[]),
        ("cache.json".to_owned(), Damage::Half, &[]),
    ];
    for (path, damage, lost) in cases {
        let file = site.at(&path);
        let what = format!("{path}, {damage:?}");
        println!("{what}");
        site.cluster.kill_node("n");
        let (before, good) = (site.files(), fs::read(&file).unwrap());
        damage.inflict(&file);
        let damaged = fs::read(&file).unwrap();
        let said = site.start();
        let names_it = |line: &&str| {
            (line.contains("ERROR") || line.contains("WARN")) && line.contains(file.to_str().unwrap())
        };
        assert!(said.lines().any(|line| names_it(&line)), "{what} is not named:\n{said}");
        site.check(lost);
        let left = site.files();
        let gone: Vec<_> = before.iter().filter(|&path| !left.contains(path) && !is_socket(path)).collect();
        assert!(gone.is_empty(), "{what} had these removed: {gone:?}");

        site.cluster.kill_node("n");
        if !lost.is_empty() {
            assert!(fs::read(&file).unwrap() == damaged, "{what} was overwritten");
        }
        fs::write(&file, good).unwrap();
        let said = site.start();
        assert!(!said.contains("ERROR"), "{what} was put back:\n{said}");
        site.check(&[]);
        assert_eq!(site.cluster.json(&["snapshot", "list", "v"]).as_array().unwrap().len(), 1, "{what}");
    }
    site.cluster.ok(&["snapshot", "revert", "v", "s"]);
    assert_same(&site.cluster.disk("n", "v"), &site.cluster.path("v.s"));
    site.cluster.ok(&["destroy", "v", "c", "w"]);
}

fn is_socket(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "sock")
}
