//! The overlay's own promises; those over faulty media are in `model`, those of its files in `files`.

mod files;
mod merge;
pub(crate) mod model;

use std::sync::Mutex;
use std::sync::mpsc;

use futures_util::future::join_all;

use super::*;
use crate::MemoryMedia;
use crate::faulty::{FaultyMedia, TearUnit};

/// A read-only disk that answers every other read only after a turn of the scheduler.
pub(crate) struct Base {
    bytes: Vec<u8>,
    reads: Mutex<u64>,
}

impl Base {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Base> {
        Arc::new(Base { bytes, reads: Mutex::default() })
    }

    fn copy(&self, offset: u64, buf: &mut [u8]) {
        buf.copy_from_slice(&self.bytes[offset as usize..offset as usize + buf.len()]);
    }
}

impl Disk for Base {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        let mut reads = self.reads.lock().unwrap();
        *reads += 1;
        if reads.is_multiple_of(2) {
            return Ok(TryIo::WouldBlock);
        }
        self.copy(offset, buf);
        Ok(TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        async move {
            tokio::task::yield_now().await;
            self.copy(offset, buf);
            Ok(())
        }
        .boxed()
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        async { Err(DiskError::ReadOnly) }.boxed()
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        async { Err(DiskError::ReadOnly) }.boxed()
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        async { Err(DiskError::ReadOnly) }.boxed()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        async { Ok(()) }.boxed()
    }

    fn extents(&self, _: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        async move { Ok(vec![Extent { len, kind: ExtentKind::Data }]) }.boxed()
    }
}

/// An overlay's media, all of which fail as the seed says.
pub(crate) struct Trio {
    pub(super) data: FaultyMedia,
    pub(super) map: FaultyMedia,
    pub(super) live: FaultyMedia,
    boot: u8,
}

impl Trio {
    pub(crate) fn new(seed: u64) -> Trio {
        Trio {
            data: FaultyMedia::new(seed, TearUnit::Page),
            map: FaultyMedia::new(seed + 1, TearUnit::Sector),
            live: FaultyMedia::new(seed + 2, TearUnit::Sector),
            boot: 0,
        }
    }

    fn media(&self) -> OverlayMedia {
        OverlayMedia {
            data: Arc::new(self.data.clone()),
            map: Arc::new(self.map.clone()),
            live: Arc::new(self.live.clone()),
            boot: BootId([self.boot; 16]),
        }
    }

    pub(crate) fn create(&self, size_bytes: u64, base: Arc<dyn Disk>) -> Overlay {
        Overlay::create_on(self.media(), size_bytes, base).unwrap()
    }

    pub(crate) fn open(&self, base: Arc<dyn Disk>) -> Overlay {
        Overlay::open_on(self.media(), base).unwrap()
    }

    fn all(&self) -> [&FaultyMedia; 3] {
        [&self.data, &self.map, &self.live]
    }

    /// There is room for `bytes` more on each medium.
    pub(crate) fn fill_up(&self, bytes: u64) {
        self.all().iter().for_each(|media| media.set_room_bytes(Some(bytes)));
    }

    /// Each medium fails after `count` more operations.
    pub(crate) fn fail_after(&self, count: u64) {
        self.all().iter().for_each(|media| media.fail_after(count));
    }

    /// There is room, and nothing fails any more.
    pub(crate) fn repair(&self) {
        self.all().iter().for_each(|media| media.repair());
    }

    /// How often any of them was synced.
    pub(crate) fn sync_count(&self) -> u64 {
        self.all().iter().map(|media| media.sync_count()).sum()
    }

    /// The machine ends and starts again.
    pub(crate) fn power_cut(&self) -> Trio {
        let boot = self.boot.wrapping_add(1);
        Trio { data: self.data.power_cut(), map: self.map.power_cut(), live: self.live.power_cut(), boot }
    }

    /// The process ends and starts again.
    pub(crate) fn kill(&self) -> Trio {
        Trio { data: self.data.kill(), map: self.map.kill(), live: self.live.kill(), boot: self.boot }
    }
}

pub(crate) async fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    disk.read(offset, &mut buf).await.unwrap();
    buf
}

#[tokio::test]
async fn concurrent_writes_to_parts_of_one_block_lose_nothing() {
    let pair = Trio::new(1);
    let disk = pair.create(3 * BLOCK, Base::new(vec![9; 2 * BLOCK_BYTES]));
    let pieces: Vec<Vec<u8>> = (0..30).map(|n| vec![n; 300]).collect();
    let writes = pieces.iter().zip(0..).map(|(piece, n)| disk.write(1000 + n * 300, piece));
    join_all(writes).await.into_iter().for_each(Result::unwrap);
    let expected = [vec![9; 1000], pieces.concat(), vec![0; 12_288 - 10_000]].concat();
    assert_eq!(read(&disk, 0, 12_288).await, expected);
}

#[tokio::test]
async fn beyond_the_end_of_a_shorter_base_the_disk_is_zero_and_takes_no_space() {
    let pair = Trio::new(1);
    let disk = pair.create(100 * BLOCK, Base::new(vec![9; 5000]));
    assert_eq!(read(&disk, 4990, 20).await, [[9; 10], [0; 10]].concat());
    disk.write_zeroes(0, 100 * BLOCK).await.unwrap();
    assert_eq!(disk.allocated_bytes(), 2 * BLOCK, "only what hides the base is allocated");
    assert_eq!(read(&disk, 0, 100 * BLOCK_BYTES).await, vec![0; 100 * BLOCK_BYTES]);
    disk.write(50 * BLOCK + 100, &[1]).await.unwrap();
    disk.discard(0, 100 * BLOCK).await.unwrap();
    assert_eq!(read(&disk, 0, 100 * BLOCK_BYTES).await, vec![0; 100 * BLOCK_BYTES]);
}

#[tokio::test]
async fn ranges_off_the_disk_are_refused() {
    let disk = Trio::new(1).create(10_000, Base::new(vec![]));
    let is_refused = |result| matches!(result, Err(DiskError::OutOfRange { size_bytes: 10_000, .. }));
    assert!(is_refused(disk.write(9_999, &[1; 2]).await));
    assert!(is_refused(disk.try_write(9_999, &[1; 2]).map(drop)));
    assert!(is_refused(disk.read(10_000, &mut [1]).await));
    assert!(is_refused(disk.try_read(u64::MAX, &mut [1]).map(drop)));
    assert!(is_refused(disk.discard(u64::MAX, u64::MAX).await));
    assert!(is_refused(disk.write_zeroes(1, 10_000).await));
    assert!(is_refused(disk.extents(0, 10_001).await.map(drop)));
    disk.write(10_000, &[]).await.unwrap();
}

#[tokio::test]
async fn concurrent_flushes_share_their_syncs() {
    let pair = Trio::new(1);
    let disk = pair.create(1 << 20, Base::new(vec![]));
    disk.write(0, &[1; 100]).await.unwrap();
    let before = pair.data.sync_count();
    join_all((0..100).map(|_| disk.flush())).await.into_iter().for_each(Result::unwrap);
    assert_eq!(pair.data.sync_count() - before, 1);
    disk.flush().await.unwrap();
    assert_eq!(pair.data.sync_count() - before, 1, "nothing was written since");
    disk.write(0, &[2; 100]).await.unwrap();
    disk.flush().await.unwrap();
    assert_eq!(pair.data.sync_count() - before, 2);
}

#[tokio::test]
async fn after_a_failed_sync_no_flush_succeeds_until_the_overlay_is_opened_again() {
    let pair = Trio::new(1);
    let base = Base::new(vec![]);
    let disk = pair.create(1 << 20, base.clone());
    disk.write(0, &[1; 100]).await.unwrap();
    pair.data.fail_syncs();
    for _ in 0..3 {
        assert!(matches!(disk.flush().await, Err(DiskError::Io(_))));
    }
    let pair = pair.power_cut();
    let disk = pair.open(base);
    disk.write(0, &[2; 100]).await.unwrap();
    disk.flush().await.unwrap();
    assert_eq!(read(&disk, 0, 100).await, [2; 100]);
}

#[tokio::test]
async fn a_flush_after_a_kill_in_the_midst_of_another_makes_durable_what_that_one_wrote() {
    for seed in 0..20 {
        for operations in 0..4 {
            let trio = Trio::new(seed);
            let base = Base::new(vec![]);
            let disk = trio.create(1 << 20, base.clone());
            disk.write(0, &[1; 100]).await.unwrap();
            trio.map.fail_after(operations);
            // It comes as far as that.
            let _ = disk.flush().await;
            let trio = trio.kill();
            let disk = trio.open(base.clone());
            disk.flush().await.unwrap();
            let disk = trio.power_cut().open(base);
            assert_eq!(read(&disk, 0, 100).await, [1; 100], "seed {seed}, {operations} operations");
        }
    }
}

#[tokio::test]
async fn a_full_medium_refuses_writes_and_flushes_until_there_is_room() {
    let pair = Trio::new(1);
    let base = Base::new(vec![7; 1 << 20]);
    let disk = pair.create(1 << 20, base.clone());
    pair.data.set_room_bytes(Some(0));
    assert!(matches!(disk.write(100, &[1; 5000]).await, Err(DiskError::NoSpace)));
    assert_eq!(read(&disk, 0, 20_000).await, vec![7; 20_000], "a refused write changes nothing");
    pair.data.set_room_bytes(None);
    disk.write(100, &[1; 5000]).await.unwrap();
    pair.map.set_room_bytes(Some(10));
    assert!(matches!(disk.flush().await, Err(DiskError::NoSpace)));
    pair.map.set_room_bytes(None);
    disk.flush().await.unwrap();
    let disk = pair.power_cut().open(base);
    assert_eq!(read(&disk, 100, 5000).await, vec![1; 5000]);
}

#[tokio::test]
async fn the_map_is_compacted_and_says_the_same_afterwards() {
    let pair = Trio::new(1);
    let base = Base::new(vec![]);
    let disk = pair.create(4000 * BLOCK, base.clone());
    for block in 0..3500 {
        disk.write(block * BLOCK, &[1; BLOCK_BYTES]).await.unwrap();
        disk.flush().await.unwrap();
    }
    let stats = disk.stats();
    assert_eq!((stats.compactions, stats.flushes, stats.allocated_bytes), (2, 3500, 3500 * BLOCK));
    assert!(stats.map_bytes < 66_000, "{stats:?}");
    let pair = pair.power_cut();
    assert!(pair.map.len_bytes().unwrap() < 150_000, "the file does not grow with each compaction");
    let disk = pair.open(base);
    assert_eq!(disk.allocated_bytes(), 3500 * BLOCK);
    assert_eq!(
        read(&disk, 3499 * BLOCK, 2 * BLOCK_BYTES).await,
        [[1; BLOCK_BYTES], [0; BLOCK_BYTES]].concat()
    );
}

/// A medium whose holes are punched only when it is told so.
struct SlowHoles {
    memory: MemoryMedia,
    begun: mpsc::SyncSender<()>,
    go: Mutex<mpsc::Receiver<()>>,
}

impl Media for SlowHoles {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read_at(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo> {
        self.memory.try_read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write_at(offset, data)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.begun.send(()).unwrap();
        self.go.lock().unwrap().recv().unwrap();
        self.memory.punch_hole(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.memory.len_bytes()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.memory.set_len(len)
    }
}

#[tokio::test]
async fn a_discard_whose_future_was_dropped_cannot_destroy_a_later_write() {
    let (begun, has_begun) = mpsc::sync_channel(1);
    let (go, may_go) = mpsc::sync_channel(1);
    let data = Arc::new(SlowHoles { memory: MemoryMedia::new(0), begun, go: Mutex::new(may_go) });
    let [map, live] = [(); 2].map(|()| Arc::new(MemoryMedia::new(0)));
    let media = OverlayMedia { data, map, live, boot: BootId([0; 16]) };
    let disk = Overlay::create_on(media, 1 << 20, Base::new(vec![])).unwrap();
    let mut discard = disk.discard(0, 1 << 20);
    assert!((&mut discard).now_or_never().is_none());
    has_begun.recv().unwrap();
    drop(discard);
    assert_eq!(disk.try_write(0, &[1; 100]).unwrap(), TryIo::WouldBlock);
    let mut write = disk.write(0, &[1; 100]);
    assert!((&mut write).now_or_never().is_none(), "the hole is still being punched");
    go.send(()).unwrap();
    write.await.unwrap();
    assert_eq!(read(&disk, 0, 200).await, [[1; 100], [0; 100]].concat());
}
