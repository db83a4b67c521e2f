//! The cache group over media in memory: one fetch for all, nothing unverified, bounded, and whole after a crash.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use block::{BoxFuture, FetchError, SlotHint, TryIo};
use futures_util::FutureExt;
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{Semaphore, watch};

use super::slot::Slot;
use super::*;
use crate::faulty::{FaultyMedia, TearUnit};
use block::WrongChunk;
use bytes::Bytes;

mod members;

fn chunk(number: u32) -> Chunk {
    let mut bytes = vec![0x5a; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    Chunk::of(bytes.into())
}

fn hash(number: u32) -> ChunkHash {
    chunk(number).hash()
}

/// An upstream that counts, and answers only as fast as it is allowed to.
struct Origin {
    chunks: HashMap<ChunkHash, Chunk>,
    asked: Mutex<Vec<(ChunkHash, Priority)>>,
    gate: Semaphore,
    errors: Mutex<VecDeque<FetchError>>,
    /// How many requests are waiting for the gate now.
    waiting: watch::Sender<u32>,
    panics: AtomicBool,
}

/// One request that waits. Dropping it withdraws it.
struct Waits<'a>(&'a watch::Sender<u32>);

impl<'a> Waits<'a> {
    fn new(waiting: &'a watch::Sender<u32>) -> Waits<'a> {
        waiting.send_modify(|waiting| *waiting += 1);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

impl Origin {
    fn with_gate(chunks: u32, permits: usize) -> Arc<Origin> {
        Arc::new(Origin {
            chunks: (0..chunks).map(|number| (hash(number), chunk(number))).collect(),
            asked: Mutex::default(),
            gate: Semaphore::new(permits),
            errors: Mutex::default(),
            waiting: watch::Sender::new(0),
            panics: AtomicBool::new(false),
        })
    }

    fn open(chunks: u32) -> Arc<Origin> {
        Origin::with_gate(chunks, Semaphore::MAX_PERMITS)
    }

    fn asked(&self) -> Vec<(ChunkHash, Priority)> {
        self.asked.lock().unwrap().clone()
    }

    async fn until_waiting(&self, count: u32) {
        self.waiting.subscribe().wait_for(|waiting| *waiting == count).await.unwrap();
    }
}

impl ChunkSource for Origin {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        async move {
            assert!(!self.panics.load(Ordering::Relaxed), "a source that panics");
            self.asked.lock().unwrap().push((chunk, priority));
            let waits = Waits::new(&self.waiting);
            self.gate.acquire().await.unwrap().forget();
            drop(waits);
            if let Some(error) = self.errors.lock().unwrap().pop_front() {
                return Err(error);
            }
            self.chunks.get(&chunk).cloned().ok_or(FetchError::NotHere(chunk))
        }
        .boxed()
    }
}

/// A medium with room for `slots` chunks.
fn medium(slots: u64, seed: u64) -> FaultyMedia {
    let medium = FaultyMedia::new(seed, TearUnit::Sector);
    medium.set_len((slots + 1) * CHUNK_BYTES as u64).unwrap();
    medium
}

fn group(media: &[&FaultyMedia]) -> Arc<CacheGroup> {
    let named = |medium: &&FaultyMedia| ("test".to_owned(), Arc::new((*medium).clone()) as _);
    CacheGroup::from_media(media.iter().map(named).collect()).unwrap()
}

async fn fetch_all(source: &Arc<dyn ChunkSource>, numbers: impl IntoIterator<Item = u32>) {
    for number in numbers {
        let got = source.fetch(hash(number), Priority::Guest).await.unwrap();
        assert_eq!(got, chunk(number));
    }
}

#[tokio::test]
async fn a_chunk_is_fetched_once_and_then_read_without_upstream() {
    let origin = Origin::open(10);
    let group = group(&[&medium(10, 1)]);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..10).await;
    group.settled().await;
    fetch_all(&source, 0..10).await;
    assert_eq!(origin.asked().len(), 10);
    let stats = group.stats();
    assert_eq!((stats.misses, stats.hits, stats.fetched_chunks), (10, 10, 10));
    assert_eq!(stats.fetched_bytes, 10 * CHUNK_BYTES as u64);
    assert_eq!((stats.resident_chunks, stats.capacity_chunks), (10, 10));
}

#[tokio::test]
async fn a_part_is_read_at_once_with_and_without_a_hint() {
    let origin = Origin::open(2);
    let group = group(&[&medium(2, 1)]);
    let source = group.over(origin);
    let hint = SlotHint::default();
    let mut buf = [1; 8];
    assert_eq!(source.try_read(&hash(1), &hint, 0, &mut buf), TryIo::WouldBlock, "it is not there yet");
    fetch_all(&source, [1]).await;
    group.settled().await;
    // The medium lets some reads wait, by its seed; not many in a row.
    let mut read = |hash: &ChunkHash, hint: &SlotHint| {
        buf.fill(0xee);
        (0..50).any(|_| source.try_read(hash, hint, 2, &mut buf) == TryIo::Done).then_some(buf)
    };
    let expected: [u8; 8] = chunk(1).bytes()[2..10].try_into().unwrap();
    assert_eq!(read(&hash(1), &hint), Some(expected));
    assert_ne!(hint.get(), 0, "the read left a note");
    assert_eq!(read(&hash(1), &hint), Some(expected));
    for foreign in [u64::MAX, 1, 2, 1 << 28, u64::from(u32::MAX)] {
        hint.set(foreign);
        assert_eq!(read(&hash(1), &hint), Some(expected), "hint {foreign}");
        assert_eq!(read(&hash(0), &hint), None, "hint {foreign}");
    }
    assert_eq!(read(&ChunkHash::ZERO, &hint), Some([0; 8]));
}

#[tokio::test]
async fn a_hundred_concurrent_fetches_are_one() {
    let origin = Origin::with_gate(1, 0);
    let group = group(&[&medium(4, 1)]);
    let sources = [group.over(origin.clone()), group.over(origin.clone())];
    let fetches = (0..100).map(|n| sources[n % 2].fetch(hash(0), Priority::Guest));
    let all = join_all(fetches);
    let (answers, ()) = tokio::join!(all, async {
        origin.until_waiting(1).await;
        origin.gate.add_permits(1);
    });
    assert!(answers.into_iter().all(|answer| answer.unwrap() == chunk(0)));
    assert_eq!(origin.asked().len(), 1);
    let stats = group.stats();
    assert_eq!((stats.misses, stats.coalesced, stats.fetched_chunks), (1, 99, 1));
}

#[tokio::test]
async fn a_relay_gets_the_packed_form_as_it_came() {
    let mut origin = Origin::open(0);
    let unpacked = chunk(0).bytes().clone();
    let packed = Chunk::verify_packed(hash(0), Bytes::from_static(b"packed"), |_| Some(unpacked)).unwrap();
    Arc::get_mut(&mut origin).unwrap().chunks.insert(hash(0), packed);
    let group = group(&[&medium(4, 1)]);
    let source = group.over(origin);
    let got = source.fetch(hash(0), Priority::Background).await.unwrap();
    assert_eq!(got.packed(), Some(&Bytes::from_static(b"packed")));
    assert_eq!(group.stats().fetched_packed_bytes, 6);
}

#[tokio::test]
async fn a_chunk_is_held_from_its_arrival_on_and_not_while_it_comes() {
    let origin = Origin::with_gate(2, 0);
    let medium = medium(4, 1);
    let group = group(&[&medium]);
    let source = group.over(origin.clone());
    let (fetched, ()) = tokio::join!(source.fetch(hash(0), Priority::Profile), async {
        origin.until_waiting(1).await;
        assert!(!group.holds(&hash(0)), "it is still on its way");
        origin.gate.add_permits(1);
    });
    fetched.unwrap();
    assert!(group.holds(&hash(0)) && !group.holds(&hash(1)));
    let hits = group.stats().hits;
    group.settled().await;
    assert!(group.holds(&hash(0)));
    assert_eq!(group.stats().hits, hits, "asking is no use");
}

#[tokio::test]
async fn a_guest_that_joins_a_background_fetch_raises_its_priority() {
    let origin = Origin::with_gate(1, 0);
    let group = group(&[&medium(4, 1)]);
    let source = group.over(origin.clone());
    let background = source.fetch(hash(0), Priority::Background);
    let (background, guest) = tokio::join!(background, async {
        origin.until_waiting(1).await;
        let guest = source.fetch(hash(0), Priority::Guest);
        let release = async {
            while origin.asked().len() < 2 {
                tokio::task::yield_now().await;
            }
            origin.gate.add_permits(1);
        };
        tokio::join!(guest, release).0
    });
    assert_eq!((background.unwrap(), guest.unwrap()), (chunk(0), chunk(0)));
    assert_eq!(origin.asked(), [(hash(0), Priority::Background), (hash(0), Priority::Guest)]);
    assert_eq!(*origin.waiting.borrow(), 0, "the first request was withdrawn");
    assert_eq!(group.stats().fetched_chunks, 1);
}

#[tokio::test]
async fn a_fetch_that_nobody_waits_for_is_withdrawn_and_can_be_begun_again() {
    let origin = Origin::with_gate(1, 0);
    let group = group(&[&medium(4, 1)]);
    let source = group.over(origin.clone());
    for _ in 0..3 {
        let mut fetches: Vec<_> = (0..3).map(|_| source.fetch(hash(0), Priority::Guest)).collect();
        for fetch in &mut fetches {
            assert!(fetch.now_or_never().is_none());
        }
        origin.until_waiting(1).await;
        fetches.truncate(1);
        tokio::task::yield_now().await;
        assert_eq!(*origin.waiting.borrow(), 1, "one still waits");
        drop(fetches);
        origin.until_waiting(0).await;
    }
    origin.gate.add_permits(1);
    fetch_all(&source, [0]).await;
    assert_eq!(group.stats().fetched_chunks, 1);
}

#[tokio::test]
async fn an_error_reaches_all_who_wait_and_is_not_remembered() {
    let origin = Origin::with_gate(1, 0);
    let group = group(&[&medium(4, 1)]);
    let source = group.over(origin.clone());
    origin.errors.lock().unwrap().push_back(FetchError::Unreachable("for a test".to_owned()));
    let all = join_all((0..5).map(|_| source.fetch(hash(0), Priority::Guest)));
    let (answers, ()) = tokio::join!(all, async {
        origin.until_waiting(1).await;
        origin.gate.add_permits(2);
    });
    assert!(answers.iter().all(|answer| matches!(answer, Err(FetchError::Unreachable(_)))), "{answers:?}");
    fetch_all(&source, [0]).await;
}

#[tokio::test]
async fn who_joined_the_fetch_of_another_upstream_asks_his_own_when_it_fails() {
    let without = Origin::with_gate(0, 0);
    let with = Origin::open(1);
    let group = group(&[&medium(4, 1)]);
    let (lost, found) = (group.over(without.clone()), group.over(with.clone()));
    let lost = lost.fetch(hash(0), Priority::Guest);
    let (lost, found) = tokio::join!(lost, async {
        without.until_waiting(1).await;
        let release = async { without.gate.add_permits(1) };
        tokio::join!(found.fetch(hash(0), Priority::Guest), release).0
    });
    assert!(matches!(lost, Err(FetchError::NotHere(_))), "{lost:?}");
    assert_eq!(found.unwrap(), chunk(0));
}

/// A source whose upstream is known later.
#[derive(Default)]
struct Later(std::sync::OnceLock<Arc<dyn ChunkSource>>);

impl ChunkSource for Later {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        self.0.get().expect("it is set before it is asked").fetch(chunk, priority)
    }
}

#[tokio::test]
async fn two_nodes_each_above_the_other_in_one_image_do_not_wait_for_each_other() {
    let origin = Origin::open(1);
    let [near, far] = [1, 2].map(|seed| group(&[&medium(4, seed)]));
    // The near node is below the far one for an image, which has the chunk of another: for that the near one is above.
    let for_other = near.over_for_children(origin.clone());
    let at_far = far.over_for_children(for_other);
    let upstream = Arc::new(Later::default());
    let own = near.over(Arc::clone(&upstream) as _);
    assert!(upstream.0.set(at_far).is_ok());
    let fetch = tokio::spawn(async move { own.fetch(hash(0), Priority::Background).await });
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    assert!(fetch.is_finished(), "they wait for each other");
    assert_eq!(fetch.await.unwrap().unwrap(), chunk(0));
}

#[tokio::test]
async fn a_chunk_that_is_not_the_wanted_one_is_an_error() {
    let mut origin = Origin::open(0);
    Arc::get_mut(&mut origin).unwrap().chunks.insert(hash(0), chunk(1));
    let source = group(&[&medium(4, 1)]).over(origin);
    let answer = source.fetch(hash(0), Priority::Guest).await;
    assert!(matches!(answer, Err(FetchError::Wrong(WrongChunk::Hash { .. }))), "{answer:?}");
}

#[tokio::test]
async fn a_source_that_panics_leaves_nobody_waiting() {
    let origin = Origin::open(1);
    origin.panics.store(true, Ordering::Relaxed);
    let source = group(&[&medium(4, 1)]).over(origin.clone());
    let answer = source.fetch(hash(0), Priority::Guest).await;
    assert!(matches!(answer, Err(FetchError::Unreachable(_))), "{answer:?}");
    origin.panics.store(false, Ordering::Relaxed);
    fetch_all(&source, [0]).await;
}

/// Fetches a chunk when it is dropped, and says what came of it at once.
struct FetchWhenDropped(Arc<dyn ChunkSource>, std::sync::mpsc::Sender<Option<Result<Chunk, FetchError>>>);

impl Drop for FetchWhenDropped {
    fn drop(&mut self) {
        let _ = self.1.send(self.0.fetch(hash(0), Priority::Guest).now_or_never());
    }
}

#[test]
fn a_fetch_that_begins_while_the_runtime_ends_is_cut_short() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let source = group(&[&medium(4, 1)]).over(Origin::open(1));
    let (sender, answers) = std::sync::mpsc::channel();
    let late = FetchWhenDropped(source, sender);
    runtime.spawn(async move {
        let _late = late;
        std::future::pending::<()>().await;
    });
    drop(runtime);
    let answer = answers.recv().unwrap();
    assert!(matches!(answer, Some(Err(FetchError::Unreachable(_)))), "{answer:?}");
}

#[tokio::test]
async fn a_restart_finds_the_chunks_again_without_upstream() {
    let media = [medium(6, 1), medium(6, 2)];
    let before = group(&[&media[0], &media[1]]);
    fetch_all(&before.over(Origin::open(12)), 0..12).await;
    before.settled().await;
    let media = media.map(|medium| medium.kill());
    let origin = Origin::open(0);
    let after = group(&[&media[0], &media[1]]);
    let source = after.over(origin.clone());
    assert_eq!(after.stats().resident_chunks, 12);
    let mut byte = [0];
    assert_eq!(
        source.try_read(&hash(3), &SlotHint::default(), 0, &mut byte),
        TryIo::WouldBlock,
        "nothing unverified is used"
    );
    fetch_all(&source, 0..12).await;
    assert_eq!(origin.asked(), []);
}

#[tokio::test]
async fn a_chunk_with_a_flipped_bit_is_dropped_after_a_restart_and_fetched_again() {
    let before_cut = medium(8, 1);
    let before = group(&[&before_cut]);
    fetch_all(&before.over(Origin::open(8)), 0..8).await;
    before.settled().await;
    let after_cut = before_cut.kill();
    for slot in [2, 5] {
        after_cut.flip_bit((1 + slot) * CHUNK_BYTES as u64 + 1000 * slot, 3);
    }
    let origin = Origin::open(8);
    let after = group(&[&after_cut]);
    fetch_all(&after.over(origin.clone()), 0..8).await;
    after.settled().await;
    assert_eq!(origin.asked().len(), 2);
    let stats = after.stats();
    assert_eq!((stats.dropped_chunks, stats.fetched_chunks, stats.hits), (2, 2, 6));
    assert_eq!((stats.resident_chunks, stats.evicted_chunks), (8, 0), "the slots are used again at once");
}

#[tokio::test]
async fn after_a_power_cut_every_chunk_is_right_and_the_wrong_ones_are_fetched_once() {
    for seed in 0..30 {
        let before_cut = medium(20, seed);
        let before = group(&[&before_cut]);
        fetch_all(&before.over(Origin::open(30)), 0..30).await;
        let medium = before_cut.power_cut();
        let origin = Origin::open(30);
        let after = group(&[&medium]);
        let source = after.over(origin.clone());
        let found = after.stats().resident_chunks;
        fetch_all(&source, 0..30).await;
        let stats = after.stats();
        assert_eq!(stats.fetched_chunks, origin.asked().len() as u64, "seed {seed}");
        assert_eq!(stats.fetched_chunks + stats.hits, 30, "seed {seed}");
        assert!(stats.hits + stats.dropped_chunks <= found, "seed {seed}: {stats:?}");
    }
}

#[tokio::test]
async fn a_medium_that_fails_is_given_up_and_nobody_notices() {
    let media = [medium(20, 1), medium(20, 2)];
    let origin = Origin::open(40);
    let group = group(&[&media[0], &media[1]]);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..40).await;
    group.settled().await;
    media[0].fail_after(0);
    for _ in 0..4 {
        fetch_all(&source, 0..40).await;
        group.settled().await;
    }
    let stats = group.stats();
    assert_eq!((stats.failed_media, stats.capacity_chunks), (1, 20));
    assert!(stats.resident_chunks <= 20, "{stats:?}");
    media[1].fail_after(0);
    for _ in 0..4 {
        fetch_all(&source, 0..40).await;
        group.settled().await;
    }
    let stats = group.stats();
    assert_eq!((stats.failed_media, stats.capacity_chunks, stats.resident_chunks), (2, 0, 0));
}

#[tokio::test]
async fn a_full_file_system_makes_the_cache_smaller_but_is_no_failure() {
    let medium = medium(40, 1);
    let origin = Origin::open(40);
    let group = group(&[&medium]);
    let source = group.over(origin.clone());
    medium.set_room_bytes(Some(10 * (CHUNK_BYTES as u64 + 40)));
    fetch_all(&source, 0..40).await;
    group.settled().await;
    let stats = group.stats();
    assert_eq!((stats.resident_chunks, stats.unstored_chunks, stats.failed_media), (10, 30, 0));
    medium.set_room_bytes(None);
    fetch_all(&source, 0..40).await;
    group.settled().await;
    assert_eq!(group.stats().resident_chunks, 40);
}

#[tokio::test]
async fn a_scan_leaves_what_is_in_use_in_the_cache() {
    let origin = Origin::open(1000);
    let group = group(&[&medium(100, 1)]);
    let source = group.over(origin.clone());
    // Fifty chunks are in use, often enough to be known as such while others come by.
    for round in 0..4 {
        fetch_all(&source, 0..50).await;
        fetch_all(&source, 100 + round * 10..110 + round * 10).await;
        group.settled().await;
    }
    for scanned in 200..1000 {
        // A scan reads each chunk in pieces: many reads, and yet one use.
        for _ in 0..3 {
            fetch_all(&source, [scanned]).await;
            group.settled().await;
        }
    }
    let before = origin.asked().len();
    fetch_all(&source, 0..50).await;
    assert_eq!(origin.asked().len() - before, 0, "the scan pushed out chunks in use");
    assert_eq!(group.stats().resident_chunks, 100);
    assert!(group.stats().evicted_chunks >= 700);
}

#[tokio::test]
async fn random_fetches_and_restarts_agree_with_the_model() {
    for seed in 0..12 {
        let mut random = StdRng::seed_from_u64(seed);
        let origin = Origin::open(60);
        let mut media = [medium(12, seed), medium(25, seed + 1000)];
        let mut cache = group(&[&media[0], &media[1]]);
        let mut fetched_before = 0;
        for _ in 0..150 {
            let source = cache.over(origin.clone());
            match random.random_range(0..20) {
                0 => {
                    fetched_before += cache.stats().fetched_chunks;
                    media = media.map(|medium| medium.power_cut());
                    media[0].flip_bit(random.random_range(CHUNK_BYTES as u64..12 * CHUNK_BYTES as u64), 1);
                    cache = group(&[&media[0], &media[1]]);
                }
                1 => {
                    // Begun, and given up after a while or none.
                    let mut fetch = source.fetch(hash(random.random_range(0..60)), Priority::Profile);
                    for _ in 0..random.random_range(0..4) {
                        if (&mut fetch).now_or_never().is_some() {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                }
                2..6 => {
                    let numbers: Vec<u32> = (0..10).map(|_| random.random_range(0..60)).collect();
                    let fetches = numbers.iter().map(|&n| source.fetch(hash(n), Priority::Background));
                    for (number, got) in numbers.iter().zip(join_all(fetches).await) {
                        assert_eq!(got.unwrap(), chunk(*number), "seed {seed}");
                    }
                }
                6..13 => {
                    let number = random.random_range(0..60);
                    let mut buf = [0; 100];
                    if source.try_read(&hash(number), &SlotHint::default(), 0, &mut buf) == TryIo::Done {
                        assert_eq!(buf, chunk(number).bytes()[..100], "seed {seed}: chunk {number}");
                    }
                }
                _ => fetch_all(&source, [random.random_range(0..60)]).await,
            }
        }
        cache.settled().await;
        let stats = cache.stats();
        assert!(stats.resident_chunks <= 37, "seed {seed}: {stats:?}");
        // Requests that were given up were asked and did not come.
        let fetched = fetched_before + stats.fetched_chunks;
        assert!(fetched <= origin.asked().len() as u64, "seed {seed}");
        // What was stored since the last restart and not evicted is there: no fetch is forgotten.
        assert!(stats.fetched_chunks <= stats.resident_chunks + stats.evicted_chunks + stats.unstored_chunks);
        // One chunk never sits in two slots.
        let media = cache.media.load();
        for number in 0..60 {
            let holds = |slot: &&Slot| slot.version_of(&hash(number)).is_some();
            let copies = media.iter().flat_map(|medium| medium.slots()).filter(holds).count();
            assert!(copies <= 1, "seed {seed}: chunk {number} in {copies} slots");
        }
    }
}

#[test]
fn two_groups_cannot_have_one_file_and_a_foreign_file_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let spec = |name: &str| [MediaSpec { path: dir.path().join(name), size_bytes: 10 << 20 }];
    let first = CacheGroup::open(&spec("cache")).unwrap();
    assert!(matches!(CacheGroup::open(&spec("cache")), Err(CacheError::InUse(_))));
    assert_eq!(first.stats().capacity_chunks, 159);
    drop(first);
    CacheGroup::open(&spec("cache")).unwrap();
    std::fs::write(dir.path().join("letter"), "Dear reader").unwrap();
    assert!(matches!(CacheGroup::open(&spec("letter")), Err(CacheError::Foreign(_))));
    assert_eq!(std::fs::read(dir.path().join("letter")).unwrap(), b"Dear reader");
}
