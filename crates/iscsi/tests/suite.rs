//! The conformance suite of libiscsi (`iscsi-test-cu`), family by family, against a target that takes writes
//! and one that does not. What does not pass is listed, with the reason, in `tests/suite/`; a test that newly
//! fails, and one that newly passes, fail here.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::collections::BTreeMap;

use block::Access;
use common::{Serving, target};
use testkit::foreign::{find, finish};
use testkit::memory_disk::{MemoryDisk, Pace};
use tokio::process::Command;

const SIZE_BYTES: usize = 100 << 20;

async fn output(args: &[&str]) -> String {
    let output = finish(Command::new(find("libiscsi-bin", "iscsi-test-cu")).args(args)).await;
    assert!(output.status.code().is_some(), "{args:?} crashed: {}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What became of each test of a family, by its name.
fn results(family: &str, printed: &str) -> Vec<(String, &'static str)> {
    let tests = printed.split("\n  Test: ").skip(1);
    let result = |test: &str| {
        let (name, rest) = test.split_once(" ...").expect("a test has a name");
        let failed = rest.lines().any(|line| line.starts_with("FAILED"));
        let result = match () {
            () if failed => "FAIL",
            () if rest.contains("[SKIPPED]") => "SKIP",
            () => "PASS",
        };
        (format!("{family}.{name}"), result)
    };
    tests.map(result).collect()
}

/// The lines `RESULT TEST REASON` of a list.
fn expected(list: &'static str) -> BTreeMap<String, &'static str> {
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let entry = |line: &'static str| {
        let mut words = line.splitn(3, ' ');
        let (result, test) = (words.next().unwrap(), words.next().expect("a line names a test"));
        assert!(words.next().is_some_and(|reason| !reason.is_empty()), "{test} has no reason");
        (test.to_owned(), result)
    };
    lines.map(entry).collect()
}

async fn run(disk: std::sync::Arc<MemoryDisk>, list: &'static str) {
    let serving = Serving::start(vec![target("iqn.2026-01.test:disk", &[disk])]).await;
    let urls = serving.portals.map(|portal| format!("iscsi://{portal}/iqn.2026-01.test:disk/0"));
    let listed = output(&["--list"]).await;
    let families = listed.lines().filter_map(|line| line.trim().strip_prefix("ALL."));
    let mut others = BTreeMap::new();
    let mut passed = 0;
    for family in families.filter(|name| !name.contains('.')) {
        let name = format!("ALL.{family}");
        let printed = output(&["--dataloss", "-v", "-V", "-t", &name, &urls[0], &urls[1]]).await;
        let results = results(family, &printed);
        assert!(!results.is_empty(), "{family} ran no test: {printed}");
        for (test, result) in results {
            if result == "PASS" {
                passed += 1;
            } else {
                others.insert(test, result);
            }
        }
    }
    assert_eq!(others, expected(list), "{passed} passed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_takes_writes_passes_all_but_the_listed_tests() {
    run(MemoryDisk::new(SIZE_BYTES, Pace::Now), include_str!("suite/read-write.txt")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_takes_none_passes_all_but_the_listed_tests() {
    let disk = MemoryDisk::with(vec![7; SIZE_BYTES], Pace::Now, Access::ReadOnly);
    run(disk, include_str!("suite/read-only.txt")).await;
}
