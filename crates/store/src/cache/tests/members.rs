//! Media that come, go and fail while chunks are read: no wrong byte, no error, nothing fetched twice without need.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Condvar;

use super::*;
use crate::MemoryMedia;

/// How many chunks the random tests read.
const CHUNKS: u32 = 60;

const CHUNK: u64 = CHUNK_BYTES as u64;

/// A medium that can be closed. Then what it holds is not in memory any more, and whatever has to wait for the device is
/// held up until the medium is opened: reads when they have brought the bytes into memory, writes before.
struct Gated {
    media: MemoryMedia,
    is_in_memory: AtomicBool,
    is_closed: Mutex<bool>,
    opened: Condvar,
    waiting: watch::Sender<u32>,
}

impl Gated {
    fn new(slots: u64) -> Arc<Gated> {
        Arc::new(Gated {
            media: MemoryMedia::new((slots + 1) * CHUNK),
            is_in_memory: AtomicBool::new(true),
            is_closed: Mutex::new(false),
            opened: Condvar::new(),
            waiting: watch::Sender::new(0),
        })
    }

    fn close(self: &Arc<Self>) -> Closed {
        self.is_in_memory.store(false, Ordering::SeqCst);
        *self.is_closed.lock().unwrap() = true;
        Closed(Arc::clone(self))
    }

    fn pass(&self) {
        let waits = Waits::new(&self.waiting);
        drop(self.opened.wait_while(self.is_closed.lock().unwrap(), |is_closed| *is_closed).unwrap());
        drop(waits);
    }

    async fn until_waiting(&self, count: u32) {
        self.waiting.subscribe().wait_for(|waiting| *waiting == count).await.unwrap();
    }
}

/// A medium is closed. Dropping this opens it, also when a test fails: else its runtime would never end.
struct Closed(Arc<Gated>);

impl Drop for Closed {
    fn drop(&mut self) {
        *self.0.is_closed.lock().unwrap() = false;
        self.0.opened.notify_all();
    }
}

impl Media for Gated {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.is_in_memory.store(true, Ordering::SeqCst);
        self.pass();
        self.media.read_at(offset, buf)
    }

    fn try_read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<TryIo> {
        if !self.is_in_memory.load(Ordering::SeqCst) {
            return Ok(TryIo::WouldBlock);
        }
        self.media.try_read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pass();
        self.media.write_at(offset, data)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.media.punch_hole(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.media.sync()
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.media.len_bytes()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.media.set_len(len)
    }
}

fn named(media: &[(&str, &FaultyMedia)]) -> Arc<CacheGroup> {
    let named = |(name, medium): &(&str, &FaultyMedia)| {
        ((*name).to_owned(), Arc::new((*medium).clone()) as Arc<dyn Media>)
    };
    CacheGroup::from_media(media.iter().map(named).collect()).unwrap()
}

async fn add(group: &Arc<CacheGroup>, name: &str, medium: &FaultyMedia) -> Result<(), CacheError> {
    group.add_media(name.to_owned(), Arc::new(medium.clone())).await
}

fn status(group: &CacheGroup, name: &str) -> Option<MediumStatus> {
    group.media().into_iter().find(|medium| medium.name == name)
}

/// Nothing is lost and nothing is double, once nothing is on its way.
fn assert_whole(group: &CacheGroup) {
    let stats = group.stats();
    let media = group.media.load();
    if media.iter().all(|medium| medium.is_usable()) {
        let slots: usize = group.shards.iter().map(|shard| shard.lock().slots_settled()).sum();
        assert_eq!(slots as u64, stats.capacity_chunks, "each slot belongs to one part of the index");
    }
    assert!(stats.resident_chunks <= stats.capacity_chunks, "{stats:?}");
    for number in 0..CHUNKS {
        let holds = |slot: &&Slot| slot.version_of(&hash(number)).is_some();
        let usable = media.iter().filter(|medium| medium.is_usable());
        let copies = usable.flat_map(|medium| medium.slots()).filter(holds).count();
        assert!(copies <= 1, "chunk {number} is in {copies} slots");
    }
}

#[tokio::test]
async fn an_added_medium_brings_room_and_the_chunks_that_are_on_it() {
    let media = [medium(10, 1), medium(10, 2)];
    let other = named(&[("other", &media[1])]);
    fetch_all(&other.over(Origin::open(20)), 8..18).await;
    other.settled().await;
    drop(other);

    let origin = Origin::open(20);
    let group = named(&[("one", &media[0])]);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..10).await;
    group.settled().await;
    add(&group, "two", &media[1]).await.unwrap();
    let stats = group.stats();
    assert_eq!((stats.resident_chunks, stats.capacity_chunks), (18, 20), "two chunks are there twice");
    fetch_all(&source, 0..20).await;
    group.settled().await;
    assert_eq!(origin.asked().len(), 12);
    assert_whole(&group);
}

#[tokio::test]
async fn what_was_on_a_removed_medium_is_fetched_again_and_found_again_when_it_is_added_again() {
    let media = [medium(20, 1), medium(20, 2)];
    let origin = Origin::open(40);
    let group = named(&[("one", &media[0]), ("two", &media[1])]);
    let source = group.over(origin.clone());
    let hints: Vec<SlotHint> = (0..40).map(|_| SlotHint::default()).collect();
    let try_read_all = || {
        for (number, hint) in hints.iter().enumerate() {
            let mut buf = [0; 100];
            if source.try_read(&hash(number as u32), hint, 0, &mut buf) == TryIo::Done {
                assert_eq!(buf, chunk(number as u32).bytes()[..100]);
            }
        }
    };
    fetch_all(&source, 0..40).await;
    group.settled().await;
    try_read_all();
    let on_two = status(&group, "two").unwrap().resident_chunks;
    assert_eq!(on_two, 20);

    group.remove("two").await.unwrap();
    assert_eq!(status(&group, "two"), None);
    assert_eq!((group.stats().resident_chunks, group.stats().capacity_chunks), (20, 20));
    // Hints still name its slots, also when another medium has its number.
    try_read_all();
    let third = medium(20, 3);
    add(&group, "three", &third).await.unwrap();
    fetch_all(&source, 0..40).await;
    group.settled().await;
    try_read_all();
    assert_eq!(origin.asked().len(), 60, "what was on it, and nothing else, was fetched again");

    group.remove("three").await.unwrap();
    add(&group, "two", &media[1]).await.unwrap();
    fetch_all(&source, 0..40).await;
    try_read_all();
    assert_eq!(origin.asked().len(), 60);
    assert_whole(&group);
}

#[tokio::test]
async fn who_reads_from_a_medium_that_is_removed_finishes_and_only_then_is_it_closed() {
    let gated = Gated::new(4);
    let group = CacheGroup::from_media(vec![("slow".to_owned(), gated.clone() as _)]).unwrap();
    let spare = medium(4, 1);
    let origin = Origin::open(2);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..2).await;
    group.settled().await;
    add(&group, "spare", &spare).await.unwrap();

    let closed = gated.close();
    let reader = tokio::spawn(async move {
        fetch_all(&source, [0]).await;
        source
    });
    gated.until_waiting(1).await;
    let remover = {
        let group = Arc::clone(&group);
        tokio::spawn(async move { group.remove("slow").await })
    };
    while status(&group, "slow").unwrap().state != MediumState::Leaving || group.stats().capacity_chunks != 4
    {
        tokio::task::yield_now().await;
    }
    let again = group.add_media("slow".to_owned(), gated.clone()).await;
    assert!(matches!(&again, Err(CacheError::Taken(why)) if why.contains("still leaving")), "{again:?}");
    assert!(!remover.is_finished() && !reader.is_finished());

    drop(closed);
    let source = reader.await.unwrap();
    remover.await.unwrap().unwrap();
    assert_eq!(status(&group, "slow"), None);
    assert_eq!(Arc::strong_count(&gated), 1, "the medium is closed");
    fetch_all(&source, 0..2).await;
    group.settled().await;
    assert_eq!(origin.asked().len(), 4);
    assert_whole(&group);
}

#[tokio::test]
async fn a_chunk_on_its_way_to_a_medium_that_is_removed_is_answered_and_not_stored() {
    let gated = Gated::new(4);
    let group = CacheGroup::from_media(vec![("slow".to_owned(), gated.clone() as _)]).unwrap();
    let origin = Origin::open(3);
    let source = group.over(origin.clone());
    let closed = gated.close();
    fetch_all(&source, 0..2).await;
    gated.until_waiting(1).await;
    add(&group, "spare", &medium(4, 1)).await.unwrap();
    let (still, leaving) = (&source, &group);
    let (removed, ()) = tokio::join!(group.remove("slow"), async move {
        while status(leaving, "slow").unwrap().state != MediumState::Leaving {
            tokio::task::yield_now().await;
        }
        fetch_all(still, 0..2).await;
        drop(closed);
    });
    removed.unwrap();
    group.settled().await;
    let stats = group.stats();
    assert_eq!((stats.unstored_chunks, stats.resident_chunks), (2, 0), "{stats:?}");
    assert_whole(&group);
    fetch_all(&source, 0..3).await;
    group.settled().await;
    fetch_all(&source, 0..3).await;
    assert_eq!(origin.asked().len(), 5);
}

#[tokio::test]
async fn what_comes_from_the_device_is_read_by_nobody_before_it_is_verified() {
    let gated = Gated::new(4);
    let group = CacheGroup::from_media(vec![("rotten".to_owned(), gated.clone() as _)]).unwrap();
    let origin = Origin::open(1);
    let source = group.over(origin.clone());
    fetch_all(&source, [0]).await;
    group.settled().await;
    let (hint, mut buf) = (SlotHint::default(), [0; 100]);
    assert_eq!(source.try_read(&hash(0), &hint, 0, &mut buf), TryIo::Done);
    assert_eq!(buf, chunk(0).bytes()[..100]);

    let closed = gated.close();
    for slot in 1..5 {
        gated.media.write_at(slot * CHUNK, &[0xbb; 100]).unwrap();
    }
    let whole = {
        let source = Arc::clone(&source);
        tokio::spawn(async move { fetch_all(&source, [0]).await })
    };
    gated.until_waiting(1).await;
    assert_eq!(source.try_read(&hash(0), &hint, 0, &mut buf), TryIo::WouldBlock, "{buf:x?}");
    drop(closed);
    whole.await.unwrap();
    assert_eq!((origin.asked().len(), group.media()[0].failures), (2, 1));
}

#[tokio::test]
async fn bytes_that_changed_in_memory_reach_nobody_who_reads_a_part_either() {
    for seed in 0..40 {
        let mut random = StdRng::seed_from_u64(seed);
        let media = Arc::new(MemoryMedia::new(3 * CHUNK));
        let group = CacheGroup::from_media(vec![("changed".to_owned(), media.clone() as _)]).unwrap();
        let origin = Origin::open(2);
        let source = group.over(origin.clone());
        fetch_all(&source, 0..2).await;
        group.settled().await;
        for changes in 1..10 {
            let damaged = random.random_range(CHUNK..3 * CHUNK);
            let mut byte = [0];
            media.read_at(damaged, &mut byte).unwrap();
            media.write_at(damaged, &[byte[0] ^ 1 << random.random_range(0..8)]).unwrap();
            for _ in 0..20 {
                let number = random.random_range(0..2);
                let from = random.random_range(0..CHUNK_BYTES);
                let len = random.random_range(1..=CHUNK_BYTES - from).min(random.random_range(1..20_000));
                let mut buf = vec![0xee; len];
                match source.try_read(&hash(number), &SlotHint::default(), from, &mut buf) {
                    TryIo::Done => assert_eq!(buf, chunk(number).bytes()[from..from + len], "seed {seed}"),
                    TryIo::WouldBlock => {}
                }
            }
            fetch_all(&source, 0..2).await;
            group.settled().await;
            assert_eq!(group.media()[0].failures, changes, "seed {seed}");
            assert_eq!(origin.asked().len() as u32, 2 + changes, "seed {seed}: one chunk was fetched again");
        }
    }
}

#[tokio::test]
async fn the_last_medium_that_works_stays_and_one_that_failed_can_go() {
    let media = [medium(40, 1), medium(40, 2)];
    let origin = Origin::open(40);
    let group = named(&[("one", &media[0])]);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..20).await;
    group.settled().await;
    assert!(matches!(group.remove("one").await, Err(CacheError::Last(_))));
    assert!(matches!(group.remove("two").await, Err(CacheError::Unknown(_))));
    assert_eq!(group.stats().resident_chunks, 20, "a refusal changes nothing");

    media[0].fail_after(0);
    fetch_all(&source, 0..20).await;
    group.settled().await;
    let failed = status(&group, "one").unwrap();
    assert_eq!((failed.state, failed.failures >= 16), (MediumState::Failed, true), "{failed:?}");
    assert!(failed.reason.unwrap().contains("broken"));
    assert!(
        matches!(add(&group, "one", &media[1]).await, Err(CacheError::Taken(why)) if why.contains("failed"))
    );
    group.remove("one").await.unwrap();
    assert_eq!(group.media(), []);
    // Without any medium reads are fetched, and nothing is kept.
    let before = origin.asked().len();
    fetch_all(&source, 0..20).await;
    fetch_all(&source, 0..20).await;
    assert_eq!(origin.asked().len() - before, 40);

    add(&group, "one", &media[1]).await.unwrap();
    fetch_all(&source, 0..20).await;
    group.settled().await;
    assert_eq!((group.stats().resident_chunks, group.stats().failed_media), (20, 0));
    assert_whole(&group);
}

#[tokio::test]
async fn rotten_bits_reach_nobody_and_a_medium_that_brings_too_many_has_failed() {
    let media = [medium(30, 1), medium(30, 2)];
    let origin = Origin::open(60);
    let group = named(&[("one", &media[0]), ("two", &media[1])]);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..60).await;
    group.settled().await;
    for slot in 0..30 {
        media[0].rot_bit((1 + slot) * CHUNK + 100 * slot, 5);
    }
    let hints: Vec<SlotHint> = (0..60).map(|_| SlotHint::default()).collect();
    for number in 0..60 {
        // A piece that is in memory is read at once; one that is not is read with its whole chunk.
        for piece in (0..CHUNK_BYTES).step_by(4096) {
            let mut buf = [0; 4096];
            let whole = chunk(number);
            let expected = &whole.bytes()[piece..piece + 4096];
            match source.try_read(&hash(number), &hints[number as usize], piece, &mut buf) {
                TryIo::Done => assert_eq!(buf, *expected, "chunk {number} at {piece}"),
                TryIo::WouldBlock => fetch_all(&source, [number]).await,
            }
        }
    }
    group.settled().await;
    let failed = status(&group, "one").unwrap();
    assert_eq!(failed.state, MediumState::Failed, "{failed:?}");
    assert!(failed.reason.unwrap().contains("other bytes"));
    assert_eq!(group.stats().failed_media, 1);
    group.remove("one").await.unwrap();
    add(&group, "one", &media[0]).await.unwrap();
    assert_eq!(status(&group, "one").unwrap().state, MediumState::Healthy);
    fetch_all(&source, 0..60).await;
    assert_whole(&group);
}

#[tokio::test]
async fn no_hole_of_a_medium_that_was_cut_short_is_taken_for_a_chunk() {
    for first in [0, 30] {
        let cut = medium(40, 1);
        let group = named(&[("cut", &cut)]);
        let source = group.over(Origin::open(CHUNKS));
        let hints: Vec<SlotHint> = (0..CHUNKS).map(|_| SlotHint::default()).collect();
        fetch_all(&source, 0..30).await;
        group.settled().await;
        cut.set_len(10 * CHUNK).unwrap();
        // Chunks that are there are read, or new ones stored, which would make the medium longer again.
        fetch_all(&source, first..30 + first).await;
        group.settled().await;
        for number in 0..CHUNKS {
            let mut buf = [0; 100];
            if source.try_read(&hash(number), &hints[number as usize], 8, &mut buf) == TryIo::Done {
                assert_eq!(buf, chunk(number).bytes()[8..108], "chunk {number}");
            }
        }
        let status = status(&group, "cut").unwrap();
        assert_eq!(status.state, MediumState::Failed, "{status:?}");
        assert!(status.reason.unwrap().contains("cut short"));
        assert_eq!(cut.len_bytes().unwrap(), 10 * CHUNK, "it was not made longer");
        fetch_all(&source, 0..CHUNKS).await;
    }
}

#[tokio::test]
async fn adding_is_repeatable_and_contradictions_are_refused() {
    let group = named(&[("one", &medium(4, 1))]);
    add(&group, "one", &medium(4, 2)).await.unwrap();
    assert_eq!(group.stats().capacity_chunks, 4, "nothing was added");
    let other = add(&group, "one", &medium(5, 2)).await;
    assert!(matches!(&other, Err(CacheError::Taken(why)) if why.contains("remove it first")), "{other:?}");
    let small = group.add_media("small".to_owned(), Arc::new(MemoryMedia::new(1))).await;
    assert!(matches!(&small, Err(CacheError::Unusable(why)) if why.contains("too small")), "{small:?}");
    for number in 1..MEDIA_MAX {
        add(&group, &number.to_string(), &medium(1, 3)).await.unwrap();
    }
    let more = add(&group, "more", &medium(1, 3)).await;
    assert!(matches!(&more, Err(CacheError::Unusable(why)) if why.contains("at most 16")), "{more:?}");
    assert_eq!(group.media().len(), MEDIA_MAX);
    for number in 1..MEDIA_MAX {
        group.remove(&number.to_string()).await.unwrap();
    }
    assert_eq!(group.stats().capacity_chunks, 4);
    assert_whole(&group);
}

#[tokio::test]
async fn a_cache_that_became_much_smaller_still_has_a_slot_for_each_part_of_its_index() {
    let large = Arc::new(MemoryMedia::new((SHARDS_MAX * SLOTS_PER_SHARD + 64) * CHUNK));
    let group = CacheGroup::from_media(vec![("large".to_owned(), large as _)]).unwrap();
    assert_eq!(group.shards.len() as u64, SHARDS_MAX);
    let origin = Origin::open(40);
    let source = group.over(origin.clone());
    fetch_all(&source, 0..40).await;
    group.settled().await;
    add(&group, "small", &medium(20, 1)).await.unwrap();
    group.remove("large").await.unwrap();
    assert_eq!(group.stats().resident_chunks, 0);
    fetch_all(&source, 0..20).await;
    group.settled().await;
    let stats = group.stats();
    assert_eq!((stats.resident_chunks + stats.evicted_chunks, stats.unstored_chunks), (20, 0));
    let shards: BTreeSet<usize> = (0..20).map(|number| group.shard_number(&hash(number))).collect();
    assert!(stats.resident_chunks >= shards.len() as u64, "each of {shards:?} got a slot: {stats:?}");
    fetch_all(&source, 0..40).await;
    group.settled().await;
    assert_whole(&group);
}

#[tokio::test]
async fn a_removed_file_is_left_and_free_for_others_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let spec = |name: &str| MediaSpec { path: dir.path().join(name), size_bytes: 10 << 20 };
    let group = CacheGroup::open(&[spec("one"), spec("two")]).unwrap();
    let source = group.over(Origin::open(300));
    fetch_all(&source, 0..300).await;
    group.settled().await;
    for _ in 0..5 {
        group.remove(&spec("two").name()).await.unwrap();
        let other = CacheGroup::open(&[spec("two")]).unwrap();
        assert!(other.stats().resident_chunks > 100, "its chunks are still on it");
        let taken = group.add(spec("two")).await;
        assert!(matches!(taken, Err(CacheError::InUse(_))), "{taken:?}");
        drop(other);
        group.add(spec("two")).await.unwrap();
    }
    let (usable, refused) = CacheGroup::open_usable(&[spec("two"), spec("three")]);
    assert_eq!((usable.media().len(), refused.len()), (1, 1), "{refused:?}");
    assert_eq!(refused[0].0, spec("two"), "the other group has it");
    let aside = MediaSpec { path: dir.path().to_owned(), size_bytes: 10 << 20 };
    assert!(matches!(group.add(aside).await, Err(CacheError::Io { .. })));
    assert_whole(&group);
}

/// Reads random chunks, whole and in part, and checks every byte.
async fn read_randomly(source: Arc<dyn ChunkSource>, hints: Arc<Vec<SlotHint>>, seed: u64, reads: u32) {
    let mut random = StdRng::seed_from_u64(seed);
    let chunks: Vec<Chunk> = (0..CHUNKS).map(chunk).collect();
    for _ in 0..reads {
        let number = random.random_range(0..CHUNKS as usize);
        let expected = &chunks[number];
        let offset = random.random_range(0..CHUNK_BYTES - 600);
        let mut buf = [0; 600];
        match source.try_read(&expected.hash(), &hints[number], offset, &mut buf) {
            TryIo::Done => {
                assert_eq!(buf, expected.bytes()[offset..offset + 600], "seed {seed}, chunk {number}");
            }
            TryIo::WouldBlock => {
                let priority = [Priority::Guest, Priority::Profile][random.random_range(0..2)];
                let got = source.fetch(expected.hash(), priority).await.unwrap();
                assert_eq!(got.bytes(), expected.bytes(), "seed {seed}, chunk {number}");
            }
        }
        if random.random_range(0..4) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// Readers of two images with the same chunks, over one group.
fn readers(group: &Arc<CacheGroup>, origins: &[Arc<Origin>; 2], seed: u64, reads: u32) -> Vec<Reading> {
    let hints: Arc<Vec<SlotHint>> = Arc::new((0..CHUNKS).map(|_| SlotHint::default()).collect());
    let reading = |number: usize| {
        let source = group.over(origins[number % 2].clone());
        tokio::spawn(read_randomly(source, Arc::clone(&hints), seed * 100 + number as u64, reads))
    };
    (0..6).map(reading).collect()
}

type Reading = tokio::task::JoinHandle<()>;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn images_share_chunks_and_each_is_fetched_once_while_media_are_added() {
    for seed in 0..5 {
        let media = [medium(70, seed), medium(15, seed + 100), medium(30, seed + 200)];
        let group = named(&[("0", &media[0])]);
        let origins = [Origin::open(CHUNKS), Origin::open(CHUNKS)];
        let readings = readers(&group, &origins, seed, 400);
        for (number, medium) in media.iter().enumerate().skip(1) {
            tokio::task::yield_now().await;
            add(&group, &number.to_string(), medium).await.unwrap();
        }
        for reading in readings {
            reading.await.unwrap();
        }
        group.settled().await;
        let mut asked: BTreeMap<ChunkHash, u32> = BTreeMap::new();
        // A guest that joins a prefetch has it asked for anew, with more priority; one answer comes.
        assert!(group.stats().fetched_chunks <= u64::from(CHUNKS), "seed {seed}: {:?}", group.stats());
        for (hash, _) in origins.iter().flat_map(|origin| origin.asked()) {
            *asked.entry(hash).or_default() += 1;
        }
        assert_eq!(group.stats().fetched_chunks, asked.len() as u64, "seed {seed}");
        assert_eq!(group.stats().evicted_chunks, 0, "seed {seed}");
        assert_whole(&group);
    }
}

/// One random change of the media.
async fn change_randomly(group: &Arc<CacheGroup>, media: &[FaultyMedia], random: &mut StdRng) {
    let number = random.random_range(0..media.len());
    let (name, medium) = (number.to_string(), &media[number]);
    match random.random_range(0..8) {
        0..3 => match add(group, &name, medium).await {
            // It failed meanwhile, or its storage does just now.
            Ok(()) | Err(CacheError::Taken(_) | CacheError::Io { .. }) => {}
            Err(error) => panic!("adding {name}: {error}"),
        },
        3..5 => match group.remove(&name).await {
            Ok(()) | Err(CacheError::Unknown(_) | CacheError::Last(_)) => {}
            Err(error) => panic!("removing {name}: {error}"),
        },
        // Only what was taken once, and not its header: else it would be foreign.
        5 if status(group, &name).is_some() => {
            for _ in 0..random.random_range(1..30) {
                medium.rot_bit(random.random_range(4096..16 * CHUNK), 3);
            }
        }
        5 | 6 => medium.set_room_bytes(Some(random.random_range(0..10 * CHUNK))),
        _ => {
            medium.fail_after(random.random_range(0..40));
            for _ in 0..random.random_range(0..100) {
                tokio::task::yield_now().await;
            }
            medium.repair();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_media_come_go_fail_and_rot_readers_get_right_bytes_and_the_cache_stays_whole() {
    for seed in 0..12 {
        let mut random = StdRng::seed_from_u64(seed);
        let media: Vec<FaultyMedia> =
            (0..4).map(|number| medium([15, 20, 25, 90][number], seed * 10 + number as u64)).collect();
        let group = named(&[("0", &media[0]), ("1", &media[1])]);
        let origins = [Origin::open(CHUNKS), Origin::open(CHUNKS)];
        let readings = readers(&group, &origins, seed, 500);
        while !readings.iter().all(Reading::is_finished) {
            change_randomly(&group, &media, &mut random).await;
            let stats = group.stats();
            assert!(stats.capacity_chunks <= 150, "seed {seed}: {stats:?}");
        }
        for reading in readings {
            reading.await.unwrap();
        }
        group.settled().await;
        assert_whole(&group);

        // Once the faults are over and there is room, each chunk is there and none is fetched any more.
        media.iter().for_each(FaultyMedia::repair);
        for number in 0..media.len() {
            match group.remove(&number.to_string()).await {
                Ok(()) | Err(CacheError::Unknown(_) | CacheError::Last(_)) => {}
                Err(error) => panic!("seed {seed}: {error}"),
            }
        }
        add(&group, "large", &medium(90, seed)).await.unwrap();
        let source = group.over(origins[0].clone());
        for _ in 0..3 {
            fetch_all(&source, 0..CHUNKS).await;
            group.settled().await;
        }
        let before = group.stats().fetched_chunks;
        fetch_all(&source, 0..CHUNKS).await;
        assert_eq!(group.stats().fetched_chunks, before, "seed {seed}");
        assert_whole(&group);
    }
}
