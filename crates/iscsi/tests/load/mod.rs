//! A load that notices every lost or misplaced byte.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.
#![allow(unreachable_pub)] // It is a part of each test file.

use std::sync::Arc;
use std::time::Duration;

use block::Disk;
use iscsi::Initiator;
use tokio::task::JoinSet;

/// How long a round may take before the load counts as hanging.
const PATIENCE: Duration = Duration::from_secs(240);

/// Bytes that are different everywhere.
pub fn pattern(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_add(seed << 24).wrapping_mul(2_654_435_761) >> 23) as u8).collect()
}

/// Writers that each change their own part of the disk and look whether it is as they left it, again and again.
/// `between` is called after each round of each, with the number of rounds that are over. What the disk has to
/// hold in the end.
pub async fn load(disk: &Arc<Initiator>, rounds: u32, mut between: impl AsyncFnMut(u32)) -> Vec<u8> {
    const WRITERS: u32 = 8;
    let part = disk.size_bytes() as usize / WRITERS as usize;
    let last = |writer| pattern((rounds - 1) * 16 + writer, part);
    let (done, mut finished) = tokio::sync::mpsc::channel(1);
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (disk, done) = (Arc::clone(disk), done.clone());
        writers.spawn(async move {
            let at = u64::from(writer) * part as u64;
            for round in 0..rounds {
                let data = pattern(round * 16 + writer, part);
                // Two pieces at once, which do not end where blocks do.
                let (first, rest) = data.split_at(part / 3);
                let written = tokio::join!(disk.write(at, first), disk.write(at + first.len() as u64, rest));
                written.0.unwrap();
                written.1.unwrap();
                let mut read = vec![0; part];
                disk.read(at, &mut read).await.unwrap();
                assert!(read == data, "writer {writer}, round {round}: what was written is there");
                done.send(()).await.unwrap();
            }
        });
    }
    drop(done);
    let mut rounds_over = 0;
    let next = async |finished: &mut tokio::sync::mpsc::Receiver<()>| {
        tokio::time::timeout(PATIENCE, finished.recv()).await.expect("the load goes on")
    };
    while next(&mut finished).await.is_some() {
        rounds_over += 1;
        between(rounds_over).await;
    }
    writers.join_all().await;
    (0..WRITERS).flat_map(last).collect()
}
