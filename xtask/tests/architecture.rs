//! The promises of ARCHITECTURE.md that a compiler does not check.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use serde_json::Value;

mod source;

use source::{root, rust_files};

/// What each crate may depend on. Arrows point downward only; foreign crates stand here where their
/// absence or presence is a promise.
const MAY_USE: &[(&str, &[&str])] = &[
    ("block", &[]),
    ("image", &["block"]),
    ("link", &["block"]),
    ("store", &["block"]),
    ("nbd", &["block"]),
    ("iscsi", &["block"]),
    ("planner", &["block"]),
    ("qemu", &["block"]),
    ("sim", &["block", "link", "planner"]),
    ("identity", &["block", "store"]),
    ("control", &["block", "identity", "image", "planner", "qemu"]),
    ("volt", &["block", "control", "identity", "image", "planner", "store"]),
    ("node", &["block", "control", "identity", "image", "iscsi", "link", "nbd", "planner", "qemu", "store"]),
    (
        "virtman",
        &["block", "control", "identity", "image", "iscsi", "link", "node", "planner", "qemu", "volt"],
    ),
    ("testkit", &["block"]),
    ("xtask", &["block", "image", "iscsi", "link", "nbd", "planner", "sim", "testkit"]),
];

/// Foreign crates that a crate must not know, because of what they stand for.
const MUST_NOT_USE: &[(&str, &[&str])] = &[
    ("block", &["tokio", "rustix", "tracing"]),
    ("planner", &["tokio", "hyper", "axum", "redb", "rustix"]),
    ("qemu", &["hyper", "axum", "clap", "utoipa", "rustls"]),
    ("identity", &["hyper", "axum", "utoipa", "clap"]),
    ("control", &["redb"]),
    ("volt", &["rustls", "hyper"]),
    ("node", &["rustls", "hyper", "redb"]),
    ("virtman", &["rustls", "hyper", "axum", "redb"]),
    ("sim", &["tokio", "rustix", "futures-util", "tempfile"]),
    ("link", &["rustls", "tokio-rustls", "hyper", "rustix"]),
    ("store", &["rustls", "hyper", "axum"]),
    ("image", &["rustls", "hyper", "axum", "redb"]),
    ("nbd", &["rustls", "tokio-rustls", "hyper"]),
    ("iscsi", &["rustls", "tokio-rustls", "hyper", "rustix"]),
];

/// Longest file of the project's own code, in lines: what a reader can hold in mind.
const FILE_LINES_MAX: usize = 800;

fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    packages
        .iter()
        .map(|package| {
            let normal = package["dependencies"].as_array().expect("dependencies").iter();
            (name(package), normal.filter(|d| d["kind"].is_null()).map(name).collect())
        })
        .collect()
}

#[test]
fn arrows_between_crates_point_downward_only() {
    let dependencies = dependencies();
    let ours: BTreeSet<&String> = dependencies.keys().collect();
    let allowed: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    for (name, uses) in &dependencies {
        let allowed = allowed.get(name.as_str()).unwrap_or_else(|| panic!("{name} has no line in MAY_USE"));
        for used in uses.iter().filter(|used| ours.contains(used)) {
            assert!(allowed.contains(&used.as_str()), "{name} must not depend on {used}");
        }
    }
}

#[test]
fn crates_do_not_know_what_they_must_not_know() {
    let dependencies = dependencies();
    for (name, forbidden) in MUST_NOT_USE {
        for used in *forbidden {
            assert!(!dependencies[*name].contains(*used), "{name} must not depend on {used}");
        }
    }
}

#[test]
fn the_testkit_is_known_to_tests_alone_and_to_benchmarks() {
    let dependencies = dependencies();
    let users = dependencies.iter().filter(|(_, uses)| uses.contains("testkit")).map(|(name, _)| name);
    let users: Vec<_> = users.collect();
    assert_eq!(users, ["xtask"], "all others may have it among their dev-dependencies only");
}

#[test]
fn files_stay_short_and_say_first_what_they_are_for() {
    let dirs = ["crates", "xtask/src", "xtask/tests", "fuzz/fuzz_targets"];
    let found: Vec<_> = dirs.into_iter().flat_map(rust_files).collect();
    assert!(found.len() > 20, "the sources were not found: {found:?}");
    for path in found {
        let text = fs::read_to_string(&path).expect("a source file");
        let lines = text.lines().count();
        assert!(lines <= FILE_LINES_MAX, "{} has {lines} lines, more than {FILE_LINES_MAX}", path.display());
        let first = text.lines().find(|line| !line.starts_with("#!")).unwrap_or_default();
        assert!(first.starts_with("//!"), "{} does not begin with what it is for", path.display());
    }
}
