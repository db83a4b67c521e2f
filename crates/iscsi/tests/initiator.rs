//! The initiator as a disk, over our own target: reading, writing, who is let in, and what happens when the
//! target goes away.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod common;

use std::sync::Arc;

use block::{Access, Disk};
use common::{MemoryDisk, Pace, Serving, target};
use iscsi::initiator::{Address, Digests, Initiator, Options, Secrets};

const NAME: &str = "iqn.2026-01.test:disk";

fn address(serving: &Serving, name: &str, lun: u16) -> Address {
    format!("iscsi://{}/{name}/{lun}", serving.portals[0]).parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_read_back_with_and_without_digests() {
    for (pace, digests) in [(Pace::Now, Digests::Avoided), (Pace::Later, Digests::Preferred)] {
        let memory = MemoryDisk::new(16 << 20, pace);
        let serving = Serving::start(vec![target(NAME, &[Arc::clone(&memory)])]).await;
        let options = Options { digests, ..Options::default() };
        let disk =
            Initiator::connect(&address(&serving, NAME, 0), Secrets::default(), options).await.unwrap();
        assert_eq!((disk.size_bytes(), disk.access()), (16 << 20, Access::ReadWrite));
        let data: Vec<u8> = (0..5u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        disk.write(12_288, &data).await.unwrap();
        disk.flush().await.unwrap();
        assert!(memory.flushes.load(std::sync::atomic::Ordering::SeqCst) > 0, "a flush reaches the disk");
        let mut read = vec![0; data.len()];
        disk.read(12_288, &mut read).await.unwrap();
        assert!(read == data, "{pace:?} {digests:?}: what comes back is what was written");
        assert!(memory.bytes.lock().unwrap()[12_288..][..data.len()] == data);
        disk.close().await;
    }
}
