//! The initiator against a model in memory: random operations of any alignment, over our own target and over
//! tgt with logical blocks of 512 and of 4096 bytes.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::sync::Arc;

use block::{Disk, ExtentKind};
use common::{Serving, target};
use iscsi::initiator::{Address, Initiator, Options, Secrets};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use testkit::memory_disk::{MemoryDisk, Pace};
use testkit::tgt::{self, Tgt};
use tokio::runtime::Runtime;

const NAME: &str = "iqn.2026-01.test:disk";
const SIZE_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone)]
enum Operation {
    Read(u64, u64),
    Write(u64, u64, u8),
    Zero(u64, u64),
    Discard(u64, u64),
    Extents(u64, u64),
}

/// Ranges that often begin or end where a block, a page or a command does, or miss that by a little.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let place = || {
        prop_oneof![
            (0u64..SIZE_BYTES / 4096, -2i64..3)
                .prop_map(|(page, by)| (page * 4096).saturating_add_signed(by)),
            (0u64..SIZE_BYTES / 512).prop_map(|block| block * 512),
            0u64..SIZE_BYTES,
        ]
    };
    (place(), place(), any::<bool>()).prop_map(|(a, b, short)| {
        let (start, end) = (a.min(b), a.max(b));
        (start, if short { (end - start) % 9000 } else { end - start })
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    (0..6, range(), 1u8..).prop_map(|(kind, (offset, len), seed)| match kind {
        0 | 1 => Operation::Write(offset, len, seed),
        2 => Operation::Zero(offset, len),
        3 => Operation::Discard(offset, len),
        4 => Operation::Extents(offset, len),
        _ => Operation::Read(offset, len),
    })
}

/// Carries out operations on the disk and on the model, which must agree all the time.
async fn compare(disk: &Initiator, model: &mut [u8], operations: &[Operation]) {
    let of = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
    for operation in operations {
        match *operation {
            Operation::Read(offset, len) => {
                let mut read = vec![0xdb; len as usize];
                disk.read(offset, &mut read).await.unwrap();
                assert!(read == model[of(offset, len)], "{operation:?}");
            }
            Operation::Write(offset, len, seed) => {
                let data: Vec<u8> = (0..len).map(|i| seed.wrapping_add((i / 7) as u8) | 1).collect();
                disk.write(offset, &data).await.unwrap();
                model[of(offset, len)].copy_from_slice(&data);
            }
            Operation::Zero(offset, len) => {
                disk.write_zeroes(offset, len).await.unwrap();
                model[of(offset, len)].fill(0);
            }
            Operation::Discard(offset, len) => {
                disk.discard(offset, len).await.unwrap();
                let before = model[of(offset, len)].to_vec();
                disk.read(offset, &mut model[of(offset, len)]).await.unwrap();
                for (i, (was, is)) in before.iter().zip(&model[of(offset, len)]).enumerate() {
                    let at = offset + i as u64;
                    let inner = at / 4096 * 4096 >= offset && (at / 4096 + 1) * 4096 <= offset + len;
                    assert!(
                        *is == 0 || (is == was && !inner),
                        "{operation:?}: byte {at} was {was} and is {is}"
                    );
                }
            }
            Operation::Extents(offset, len) => {
                let extents = disk.extents(offset, len).await.unwrap();
                assert_eq!(extents.is_empty(), len == 0, "{operation:?}");
                let mut at = offset;
                for extent in extents {
                    assert!(extent.len > 0 && at + extent.len <= offset + len, "{operation:?}: {extent:?}");
                    let is_zero = model[of(at, extent.len)].iter().all(|b| *b == 0);
                    assert!(extent.kind == ExtentKind::Data || is_zero, "{operation:?}: {extent:?} at {at}");
                    at += extent.len;
                }
            }
        }
    }
    let mut all = vec![0; model.len()];
    disk.read(0, &mut all).await.unwrap();
    assert!(all == model, "the whole disk");
}

fn check(cases: u32, runtime: &Runtime, disk: &Initiator) {
    let mut model = vec![0; SIZE_BYTES as usize];
    runtime.block_on(disk.write_zeroes(0, SIZE_BYTES)).unwrap();
    let model = std::cell::RefCell::new(&mut model);
    let mut runner =
        TestRunner::new(ProptestConfig { cases, failure_persistence: None, ..Default::default() });
    let run = runner.run(&prop::collection::vec(operation(), 1..12), |operations| {
        runtime.block_on(compare(disk, &mut model.borrow_mut(), &operations));
        Ok(())
    });
    run.unwrap_or_else(|failure| panic!("{failure}"));
}

fn connect(runtime: &Runtime, address: &str) -> Initiator {
    let address: Address = address.parse().unwrap();
    runtime.block_on(Initiator::connect(&address, Secrets::default(), Options::default())).unwrap()
}

#[test]
fn our_own_target_agrees_with_the_model() {
    let runtime = Runtime::new().unwrap();
    for pace in [Pace::Now, Pace::Later] {
        let memory = MemoryDisk::new(SIZE_BYTES as usize, pace);
        let serving = runtime.block_on(Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]));
        let disk = connect(&runtime, &format!("iscsi://{}/{NAME}/0", serving.portals[0]));
        check(40, &runtime, &disk);
    }
}

#[test]
fn tgt_agrees_with_the_model_whatever_its_blocks_are() {
    let runtime = Runtime::new().unwrap();
    for (block_bytes, provisioning) in [(512, "0"), (4096, "1"), (4096, "0")] {
        let mut tgt = Tgt::new(SIZE_BYTES);
        tgt.start();
        tgt.add_disk(
            &["--blocksize", &block_bytes.to_string()],
            &[&format!("thin_provisioning={provisioning}")],
        );
        let disk = connect(&runtime, &format!("iscsi://127.0.0.1:{}/{}/1", tgt.port, tgt::NAME));
        assert_eq!(disk.size_bytes(), SIZE_BYTES);
        check(30, &runtime, &disk);
    }
}
