//! Streams of profiles over a cache in memory and an upstream that a test holds up.

use std::fs;

use block::limits::CHUNK_BYTES;
use block::{BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, FetchError};
use futures_util::FutureExt;
use image::{ImportProgress, ImportRequest, Imported, Keep, OriginImage};
use store::{CacheGroup, MemoryMedia};

use super::windows::WINDOW;
use super::*;
use control::api::profile::ProfileFile;

/// Chunks of the test's image. Each tenth is all zero, each other has content of its own.
const CHUNKS: u64 = 200;
const STRIPES: usize = 2;

/// An image's origin that notes what it is asked, and answers in stripe 1 only as often as it is allowed to.
struct Upstream {
    origin: OriginImage,
    asked: Mutex<Vec<(ChunkHash, Priority)>>,
    gate: Semaphore,
    /// How many requests wait for the gate now.
    waiting: watch::Sender<usize>,
}

struct Waits<'a>(&'a watch::Sender<usize>);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

fn is_slow(chunk: &ChunkHash) -> bool {
    chunk.prefix() % STRIPES as u64 == 1
}

impl ChunkSource for Upstream {
    fn fetch(&self, chunk: ChunkHash, priority: Priority) -> BoxFuture<'_, Result<Chunk, FetchError>> {
        async move {
            self.asked.lock().unwrap().push((chunk, priority));
            if is_slow(&chunk) {
                self.waiting.send_modify(|waiting| *waiting += 1);
                let _waits = Waits(&self.waiting);
                self.gate.acquire().await.unwrap().forget();
            }
            self.origin.fetch(chunk, priority).await
        }
        .boxed()
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    image: Imported,
    upstream: Arc<Upstream>,
    source: Arc<dyn ChunkSource>,
    cache: Arc<CacheGroup>,
}

impl Bench {
    /// The manifest's only page is in the cache already, so that all that is asked is asked for data.
    async fn new(slow_answers: usize) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk.raw");
        let content = |chunk: u64| if chunk % 10 == 9 { 0 } else { chunk + 1 };
        let bytes: Vec<u8> =
            (0..CHUNKS).flat_map(|chunk| content(chunk).to_le_bytes().repeat(CHUNK_BYTES / 8)).collect();
        fs::write(&file, bytes).unwrap();
        let request = ImportRequest { file, format: None, allowed_dirs: Vec::new(), keep: Keep::InPlace };
        let image = image::import(&request, &dir.path().join("images"), &ImportProgress::default()).unwrap();
        let upstream = Arc::new(Upstream {
            origin: OriginImage::open(&image.dir).unwrap(),
            asked: Mutex::default(),
            gate: Semaphore::new(1),
            waiting: watch::Sender::new(0),
        });
        let medium = MemoryMedia::new((CHUNKS + 10) * CHUNK_BYTES as u64);
        let cache = CacheGroup::from_media(vec![("memory".to_owned(), Arc::new(medium))]).unwrap();
        let source = cache.over(Arc::clone(&upstream) as _);
        let bench = Bench { _dir: dir, image, upstream, source, cache };
        bench.path(Role::Relay).volume.chunk_hash(ChunkIndex(0), Priority::Guest).await.unwrap();
        bench.upstream.gate.forget_permits(1);
        bench.upstream.gate.add_permits(slow_answers);
        bench.upstream.asked.lock().unwrap().clear();
        bench
    }

    fn path(&self, role: Role) -> FetchPath {
        FetchPath {
            volume: Arc::new(ImageVolume::new(self.image.root.clone(), Arc::clone(&self.source))),
            source: Arc::clone(&self.source),
            cache: Arc::clone(&self.cache),
            stripes: watch::Sender::new(STRIPES).subscribe(),
            role: Arc::new(move || role),
        }
    }

    /// The names of the data among these chunks.
    async fn names(&self, chunks: &[ChunkIndex]) -> Vec<ChunkHash> {
        let origin = OriginImage::open(&self.image.dir).unwrap();
        let volume = ImageVolume::new(self.image.root.clone(), Arc::new(origin));
        let mut names = Vec::new();
        for &chunk in chunks {
            names.push(volume.chunk_hash(chunk, Priority::Guest).await.unwrap());
        }
        names.retain(|name| !name.is_zero());
        names
    }

    fn offer(&self, chunks: &[ChunkIndex]) -> ProfileOffer {
        let profile = BootProfile::new(self.image.id, chunks.to_vec()).unwrap();
        ProfileOffer { file: Some(ProfileFile(Arc::new(profile))), ..ProfileOffer::default() }
    }

    fn profile(&self, role: Role, offer: ProfileOffer) -> Profile {
        Profile::new(self.path(role), offer, Instant::now(), mpsc::channel(1).0)
    }

    async fn until_waiting(&self, count: usize) {
        self.upstream.waiting.subscribe().wait_for(|waiting| *waiting == count).await.unwrap();
    }
}

fn all() -> Vec<ChunkIndex> {
    (0..CHUNKS).rev().map(ChunkIndex).collect()
}

/// Lets other tasks run until the profile is as it should be.
async fn until(profile: &Profile, is_so: impl Fn(Option<NodeProfile>) -> bool) {
    while !is_so(profile.describe()) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn what_is_here_or_zero_is_passed_over_and_the_rest_asked_for_once_in_order() {
    let bench = Bench::new(Semaphore::MAX_PERMITS / 2).await;
    let names = bench.names(&all()).await;
    let (here, missing): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.prefix() % 5 == 0);
    for name in here {
        bench.source.fetch(name, Priority::Guest).await.unwrap();
    }
    bench.upstream.asked.lock().unwrap().clear();
    let mut counted = 0;
    let failed = bench.path(Role::Relay).stream(&all(), Priority::Profile, || counted += 1).await;
    assert_eq!((failed, counted), (0, CHUNKS as usize));
    let asked = bench.upstream.asked.lock().unwrap().clone();
    assert!(asked.iter().all(|(_, priority)| *priority == Priority::Profile));
    for stripe in [true, false] {
        let of_stripe = |chunk: &&ChunkHash| is_slow(chunk) == stripe && missing.contains(*chunk);
        let asked: Vec<_> = asked.iter().map(|(chunk, _)| chunk).filter(of_stripe).collect();
        let expected: Vec<_> = missing.iter().filter(of_stripe).collect();
        assert_eq!(asked, expected);
    }
    assert_eq!(asked.len(), missing.len());
}

#[tokio::test]
async fn a_parent_that_stands_still_holds_up_its_stripe_alone() {
    let bench = Bench::new(0).await;
    let names = bench.names(&all()).await;
    let fast = names.iter().filter(|name| !is_slow(name)).count();
    let zeroes = CHUNKS as usize - names.len();
    let profile = bench.profile(Role::Relay, bench.offer(&all()));
    until(&profile, |shown| shown.is_some_and(|shown| shown.resident as usize == fast + zeroes)).await;
    bench.until_waiting(WINDOW).await;
    assert!(!profile.describe().unwrap().complete);
    assert_eq!(profile.describe().unwrap().elapsed_ms, None);

    bench.upstream.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    until(&profile, |shown| shown.is_some_and(|shown| shown.complete)).await;
    assert!(profile.describe().unwrap().elapsed_ms.is_some());
}

#[tokio::test]
async fn a_cleared_profile_and_a_detached_image_withdraw_what_is_under_way() {
    let bench = Bench::new(0).await;
    let profile = bench.profile(Role::Relay, bench.offer(&all()));
    bench.until_waiting(WINDOW).await;
    profile.offer(ProfileOffer::default());
    bench.until_waiting(0).await;
    until(&profile, |shown| shown.is_none()).await;

    profile.offer(bench.offer(&all()));
    bench.until_waiting(WINDOW).await;
    drop(profile);
    bench.until_waiting(0).await;
}

#[tokio::test]
async fn another_profile_is_streamed_after_the_present_one() {
    let bench = Bench::new(0).await;
    let all_chunks = all();
    let (first, second) = all_chunks.split_at(CHUNKS as usize / 2);
    let profile = bench.profile(Role::Relay, bench.offer(first));
    bench.until_waiting(WINDOW).await;
    profile.offer(bench.offer(second));
    assert_eq!(profile.describe().unwrap().chunks, first.len() as u64);
    bench.upstream.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    let chunks = second.len() as u64;
    until(&profile, |shown| shown.is_some_and(|shown| shown.complete && shown.chunks == chunks)).await;
    let names = bench.names(&all()).await;
    assert!(names.iter().all(|name| bench.cache.holds(name)), "the first one was not given up");
}

#[tokio::test]
async fn an_origin_streams_nothing_and_another_images_profile_is_not_used() {
    let bench = Bench::new(0).await;
    let profile = bench.profile(Role::Origin, bench.offer(&all()));
    until(&profile, |shown| shown.is_some_and(|shown| shown.complete)).await;
    assert_eq!(profile.describe().unwrap().elapsed_ms, None);
    let other = BootProfile::new(block::ImageId::of_root_page(b"other"), all()).unwrap();
    let offer = ProfileOffer { file: Some(ProfileFile(Arc::new(other))), ..ProfileOffer::default() };
    let profile = bench.profile(Role::Relay, offer);
    tokio::task::yield_now().await;
    assert_eq!(profile.describe(), None);
    assert!(bench.upstream.asked.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_vms_reads_are_recorded_while_that_is_wanted_and_handed_in_without_zeroes() {
    let bench = Bench::new(Semaphore::MAX_PERMITS / 2).await;
    let (records, mut handed_in) = mpsc::channel(1);
    let path = bench.path(Role::Relay);
    let volume = Arc::clone(&path.volume);
    let profile = Arc::new(Profile::new(path, ProfileOffer::default(), Instant::now(), records));
    let boot = || BootTap::new(Arc::clone(&volume), Arc::clone(&profile));
    let mut buf = vec![0; 2 * CHUNK_BYTES];
    let unwanted = boot();
    unwanted.read(0, &mut buf).await.unwrap();
    profile
        .offer(ProfileOffer { recording: control::api::profile::Recording::On, ..ProfileOffer::default() });
    unwanted.read(0, &mut buf).await.unwrap();

    let recorded = boot();
    for chunk in (0..CHUNKS).rev() {
        recorded.read(chunk * CHUNK_BYTES as u64, &mut buf[..1]).await.unwrap();
    }
    drop((unwanted, recorded));
    let record = handed_in.recv().await.unwrap();
    let expected: Vec<_> = all().into_iter().filter(|chunk| chunk.0 % 10 != 9).collect();
    assert_eq!(record.chunks(), expected);
    assert!(handed_in.try_recv().is_err(), "the first VM began before it was wanted");
}
