//! Random operations, crashes among them, against a plain model of what each block may hold.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Neither size is a multiple of anything, and the base ends before the disk does.
pub(crate) const SIZE: u64 = 120 * BLOCK + 1000;
pub(crate) const BASE_SIZE: usize = 70 * BLOCK_BYTES + 700;

/// What each block may hold after a crash: its value at the last flush and all since; the last is current.
#[derive(Clone)]
pub(crate) struct Model(Vec<Vec<Vec<u8>>>);

#[derive(Debug)]
pub(crate) enum Change {
    Write { offset: u64, data: Vec<u8> },
    Zeroes { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
}

impl Change {
    pub(crate) fn random(random: &mut StdRng) -> Change {
        // Few long ones, and every second one aligned.
        let len_max = [600, 9_000, 300_000][random.random_range(0..3)];
        let mut len: u64 = random.random_range(1..=len_max);
        let mut offset = random.random_range(0..SIZE);
        if random.random() {
            offset -= offset % BLOCK;
            len = len.next_multiple_of(BLOCK);
        }
        let len = len.min(SIZE - offset);
        match random.random_range(0..6) {
            0 => Change::Zeroes { offset, len },
            1 => Change::Discard { offset, len },
            _ => {
                let mut data = vec![0; len as usize];
                random.fill(&mut data[..]);
                Change::Write { offset, data }
            }
        }
    }

    pub(crate) fn range(&self) -> (u64, u64) {
        match self {
            Change::Write { offset, data } => (*offset, data.len() as u64),
            Change::Zeroes { offset, len } | Change::Discard { offset, len } => (*offset, *len),
        }
    }

    pub(crate) async fn run(&self, disk: &dyn Disk) -> Result<(), DiskError> {
        match self {
            Change::Write { offset, data } => match disk.try_write(*offset, data)? {
                TryIo::Done => Ok(()),
                TryIo::WouldBlock => disk.write(*offset, data).await,
            },
            Change::Zeroes { offset, len } => disk.write_zeroes(*offset, *len).await,
            Change::Discard { offset, len } => disk.discard(*offset, *len).await,
        }
    }

    /// The value of a block after the change.
    fn apply(&self, block: u64, old: &[u8]) -> Vec<u8> {
        let (offset, len) = self.range();
        let start = block * BLOCK;
        let end = start + old.len() as u64;
        let (from, to) = (offset.max(start), (offset + len).min(end));
        let is_whole = (from, to) == (start, end);
        let mut new = old.to_vec();
        let part = (from - start) as usize..(to - start) as usize;
        match self {
            Change::Write { data, .. } => {
                new[part].copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            }
            Change::Zeroes { .. } => new[part].fill(0),
            Change::Discard { .. } if is_whole => new.fill(0),
            Change::Discard { .. } => {}
        }
        new
    }
}

impl Model {
    pub(crate) fn new(base: &[u8]) -> Model {
        let mut all = vec![0; SIZE as usize];
        all[..base.len()].copy_from_slice(base);
        Model(all.chunks(BLOCK_BYTES).map(|block| vec![block.to_vec()]).collect())
    }

    pub(crate) fn current(&self, offset: u64, len: usize) -> Vec<u8> {
        let blocks = touched(offset, len as u64);
        let bytes: Vec<u8> =
            blocks.clone().flat_map(|block| self.0[block as usize].last().unwrap().clone()).collect();
        let from = (offset - blocks.start * BLOCK) as usize;
        bytes[from..from + len].to_vec()
    }

    pub(crate) fn done(&mut self, change: &Change) {
        let (offset, len) = change.range();
        for block in touched(offset, len) {
            let versions = &mut self.0[block as usize];
            let new = change.apply(block, versions.last().unwrap());
            versions.push(new);
        }
    }

    pub(crate) fn flushed(&mut self) {
        for versions in &mut self.0 {
            versions.drain(..versions.len() - 1);
        }
    }

    /// The change may have reached any of its blocks: finds out which, and that each is old or new.
    pub(crate) async fn done_in_part(&mut self, change: &Change, disk: &dyn Disk, what: &str) {
        let (offset, len) = change.range();
        for block in touched(offset, len) {
            let versions = &mut self.0[block as usize];
            let old = versions.last().unwrap();
            let new = change.apply(block, old);
            let now = read(disk, block * BLOCK, old.len()).await;
            assert!(now == *old || now == new, "{what}: block {block} is neither old nor new");
            versions.push(now);
        }
    }

    /// Every block must hold something that it may hold; from here on it does.
    pub(crate) async fn crashed(&mut self, in_flight: &Change, disk: &dyn Disk, what: &str) {
        let (offset, len) = in_flight.range();
        for (block, versions) in (0..).zip(&mut self.0) {
            if touched(offset, len).contains(&block) {
                let new = in_flight.apply(block, versions.last().unwrap());
                versions.push(new);
            }
            let now = read(disk, block * BLOCK, versions[0].len()).await;
            assert!(
                versions.contains(&now),
                "{what}: block {block} holds none of its {} possible values",
                versions.len()
            );
            *versions = vec![now];
        }
    }
}

/// Polls a future a few times and drops it, done or not.
pub(crate) async fn poll_some(random: &mut StdRng, future: impl Future<Output = Result<(), DiskError>>) {
    let mut future = std::pin::pin!(future);
    for _ in 0..random.random_range(0..4) {
        if future.as_mut().now_or_never().is_some() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

async fn run(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut bytes = vec![0; BASE_SIZE];
    random.fill(&mut bytes[..]);
    let base = Base::new(bytes.clone());
    let mut model = Model::new(&bytes);
    let mut pair = Trio::new(seed);
    let mut disk = pair.create(SIZE, base.clone());
    for step in 0..140 {
        let what = format!("seed {seed}, step {step}");
        let change = Change::random(&mut random);
        match random.random_range(0..23) {
            0..9 => {
                change.run(&disk).await.unwrap();
                model.done(&change);
            }
            9..13 => {
                let (offset, len) = change.range();
                let mut buf = vec![0; len as usize];
                if disk.try_read(offset, &mut buf).unwrap() == TryIo::WouldBlock {
                    disk.read(offset, &mut buf).await.unwrap();
                }
                assert!(buf == model.current(offset, len as usize), "{what}: {len} bytes at {offset}");
            }
            13..15 => {
                disk.flush().await.unwrap();
                model.flushed();
            }
            15 => {
                poll_some(&mut random, disk.flush()).await;
            }
            16 => {
                poll_some(&mut random, change.run(&disk)).await;
                let (offset, len) = change.range();
                // Whatever still runs on the blocking pool has its lock until it is done.
                drop(disk.range_lock.lock(touched(offset, len)).await);
                model.done_in_part(&change, &disk, &what).await;
            }
            17 => {
                pair.data.set_room_bytes(Some(random.random_range(0..50_000)));
                let result = change.run(&disk).await;
                assert!(matches!(result, Ok(()) | Err(DiskError::NoSpace)), "{what}: {result:?}");
                pair.data.set_room_bytes(None);
                model.done_in_part(&change, &disk, &what).await;
            }
            18 => {
                poll_some(&mut random, change.run(&disk)).await;
                pair = pair.kill();
                disk = pair.open(base.clone());
                model.done_in_part(&change, &disk, &what).await;
                assert!(
                    read(&disk, 0, SIZE as usize).await == model.current(0, SIZE as usize),
                    "{what}: killed"
                );
            }
            19 => {
                let (offset, len) = change.range();
                poll_some(&mut random, async { disk.stream_from_base(offset..offset + len).await.map(drop) })
                    .await;
            }
            _ => {
                if random.random() {
                    pair.data.fail_after(random.random_range(0..6));
                    pair.map.fail_after(random.random_range(0..6));
                }
                poll_some(&mut random, change.run(&disk)).await;
                poll_some(&mut random, disk.flush()).await;
                pair = pair.power_cut();
                disk = pair.open(base.clone());
                model.crashed(&change, &disk, &what).await;
            }
        }
    }
    assert!(read(&disk, 0, SIZE as usize).await == model.current(0, SIZE as usize), "seed {seed}: the end");
}

#[tokio::test]
async fn random_operations_kills_and_power_cuts_agree_with_the_model() {
    for seed in 0..60 {
        run(seed).await;
    }
}
