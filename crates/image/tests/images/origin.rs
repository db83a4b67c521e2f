//! An imported image at its origin: served as long as it is what was imported, loudly refused otherwise.

use std::fmt::Debug;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use block::{Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, DiskError, FetchError, Priority};
use image::{
    ImageVolume, ImportProgress, ImportRequest, Imported, Keep, Novelty, OpenError, OriginImage, VerifyError,
    VerifyReport,
};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, span};

use crate::support::{Bench, CHUNK, MIB, assert_same, noise, volume};

/// A bench with three mebibytes of data, imported.
fn small() -> (Bench, Imported) {
    let bench = Bench::new();
    bench.write("disk.raw", &noise(1, 3 * MIB as usize));
    let imported = bench.import("disk.raw");
    (bench, imported)
}

fn change(bench: &Bench, at: u64, bytes: &[u8]) {
    File::options().write(true).open(bench.file("disk.raw")).unwrap().write_all_at(bytes, at).unwrap();
}

fn verify(imported: &Imported) -> VerifyReport {
    OriginImage::open(&imported.dir).unwrap().verify(&ImportProgress::default()).unwrap()
}

async fn name_of(imported: &Imported, chunk: u64) -> ChunkHash {
    volume(imported).chunk_hash(ChunkIndex(chunk), Priority::Background).await.unwrap()
}

/// Keeps the text of every ERROR of this process.
struct Errors;

static ERRORS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The fields of one event as text.
#[derive(Default)]
struct Fields(String);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!("{field}={value:?} "));
    }
}

impl tracing::Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR
    }
    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        ERRORS.lock().unwrap().push(fields.0);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn errors_of(imported: &Imported) -> Vec<String> {
    let image = imported.id.short();
    ERRORS.lock().unwrap().iter().filter(|text| text.contains(&image)).cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_source_is_refused_and_reported_once_and_serves_again_when_put_back() {
    // Another test may have been first; there is one for the process.
    let _ = tracing::subscriber::set_global_default(Errors);
    let (bench, imported) = small();
    let original = fs::read(bench.file("disk.raw")).unwrap();
    let origin = OriginImage::open(&imported.dir).unwrap();
    let (name, other) = (name_of(&imported, 20).await, name_of(&imported, 7).await);
    let changed = 20 * CHUNK + 5;
    change(&bench, changed, &[original[changed as usize] ^ 1]);

    for _ in 0..3 {
        let fetched = origin.fetch(name, Priority::Guest).await;
        assert!(matches!(fetched, Err(FetchError::Wrong(_))), "{fetched:?}");
        assert!(origin.fetch(other, Priority::Guest).await.is_ok(), "what did not change is served");
    }
    let errors = errors_of(&imported);
    assert_eq!(errors.len(), 1, "one error per image: {errors:?}");
    assert!(errors[0].contains("disk.raw"), "{errors:?}");
    let mut byte = [0];
    let read = volume(&imported).read(changed, &mut byte).await;
    assert!(matches!(read, Err(DiskError::Io(_))), "no wrong byte arrives: {read:?}");

    let report = verify(&imported);
    assert_eq!((report.wrong.as_slice(), report.chunks_wrong, report.chunks_right), (&[20][..], 1, 47));
    assert!(!report.is_right() && report.reason.is_some());

    fs::write(bench.file("disk.raw"), &original).unwrap();
    assert!(origin.fetch(name, Priority::Guest).await.is_ok());
    assert!(verify(&imported).is_right());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_or_shortened_source_is_an_error_of_storage() {
    let (bench, imported) = small();
    let origin = OriginImage::open(&imported.dir).unwrap();
    let name = name_of(&imported, 40).await;
    File::options().write(true).open(bench.file("disk.raw")).unwrap().set_len(MIB).unwrap();
    let fetched = origin.fetch(name, Priority::Guest).await;
    assert!(matches!(&fetched, Err(FetchError::Storage { .. })), "{fetched:?}");
    fs::remove_file(bench.file("disk.raw")).unwrap();
    let fetched = OriginImage::open(&imported.dir).unwrap().fetch(name, Priority::Guest).await;
    assert!(matches!(&fetched, Err(FetchError::Storage { .. })), "{fetched:?}");
    assert_eq!(verify(&imported).chunks_wrong, 48);
}

#[tokio::test]
async fn a_chunk_of_another_image_is_not_here_even_if_its_hash_begins_alike() {
    let (_bench, imported) = small();
    let origin = OriginImage::open(&imported.dir).unwrap();
    let mut alike = *name_of(&imported, 3).await.as_bytes();
    alike[31] ^= 1;
    for stranger in [ChunkHash::of(b"stranger"), ChunkHash::from_bytes(alike)] {
        let fetched = origin.fetch(stranger, Priority::Guest).await;
        assert!(matches!(fetched, Err(FetchError::NotHere(_))), "{fetched:?}");
    }
    assert_eq!(origin.fetch(ChunkHash::ZERO, Priority::Guest).await.unwrap(), Chunk::zero());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_serves_without_the_image_file_and_stays_sparse() {
    let bench = Bench::with_reference();
    bench.qemu_img("convert -O qcow2 disk.raw disk.qcow2");
    let request = ImportRequest { keep: Keep::Copy, ..bench.request("disk.qcow2") };
    let imported = bench.try_import(&request).unwrap();
    fs::remove_file(bench.file("disk.qcow2")).unwrap();
    assert_same(&volume(&imported), &bench.file("disk.raw"), "the copy").await;
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(imported.dir.join("data")).unwrap());
    assert!(blocks * 512 < 6 * MIB, "a sparse copy takes {} bytes", blocks * 512);
    assert!(verify(&imported).is_right());
}

#[tokio::test(flavor = "multi_thread")]
async fn adding_an_image_again_updates_its_source_and_mends_its_directory() {
    let (bench, first) = small();
    fs::copy(bench.file("disk.raw"), bench.file("moved.raw")).unwrap();
    fs::write(first.dir.join("index"), b"").unwrap();
    let copied = bench.try_import(&ImportRequest { keep: Keep::Copy, ..bench.request("disk.raw") }).unwrap();
    assert_eq!((copied.id, copied.novelty, first.novelty), (first.id, Novelty::Known, Novelty::New));
    fs::remove_file(bench.file("disk.raw")).unwrap();
    assert!(verify(&first).is_right(), "the copy serves");
    bench.import("moved.raw");
    assert!(!first.dir.join("data").exists(), "the copy is not needed any more");
    assert!(verify(&first).is_right(), "the moved file serves");
    assert_eq!(image::list(&bench.images()).unwrap(), [first.id]);
    assert_eq!(bench.images_entries(), 1);
}

#[test]
fn damage_in_the_directory_is_noticed() {
    let (_bench, imported) = small();
    let wrong_page = |at: u64| {
        let pages = File::options().write(true).open(imported.dir.join("pages")).unwrap();
        pages.write_all_at(&[0xaa], at).unwrap();
    };
    wrong_page(32 * 5);
    let report = verify(&imported);
    assert_eq!((report.pages_wrong, report.chunks_wrong), (1, 48), "{report:?}");

    for (name, bytes) in
        [("source.json", &b"{}"[..]), ("index", b"odd"), ("pages", b"short"), ("root", b"VirtMan\n")]
    {
        fs::write(imported.dir.join(name), bytes).unwrap();
        let error = OriginImage::open(&imported.dir).err().expect("the directory is damaged");
        assert!(matches!(&error, OpenError::Damaged { path, .. } if path.ends_with(name)), "{error}");
    }
    let missing = OriginImage::open(&imported.dir.join("nowhere")).err();
    assert!(matches!(missing, Some(OpenError::Missing(_))));
}

#[test]
fn a_directory_under_a_foreign_name_is_refused() {
    let (bench, imported) = small();
    let renamed = bench.images().join("0".repeat(64));
    fs::rename(&imported.dir, &renamed).unwrap();
    let error = OriginImage::open(&renamed).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains(&imported.id.to_string()), "{error}");
}

#[test]
fn what_killed_imports_left_is_swept_and_images_stay() {
    let (bench, imported) = small();
    fs::create_dir(bench.images().join(".unfinished-x7")).unwrap();
    fs::write(bench.images().join(".unfinished-x7/pages"), b"half").unwrap();
    image::sweep(&bench.images()).unwrap();
    assert_eq!(bench.images_entries(), 1);
    assert!(verify(&imported).is_right());
    image::remove(&bench.images(), imported.id).unwrap();
    assert_eq!(bench.images_entries(), 0);
    assert!(bench.file("disk.raw").exists(), "the image file is not ours to remove");
    assert!(image::remove(&bench.images(), imported.id).is_err());
    image::sweep(&bench.outside().join("nowhere")).unwrap();
}

#[test]
fn a_cancelled_verification_says_so() {
    let (_bench, imported) = small();
    let progress = ImportProgress::default();
    progress.cancel();
    let verified = OriginImage::open(&imported.dir).unwrap().verify(&progress);
    assert_eq!(verified, Err(VerifyError::Cancelled));
}

#[test]
fn progress_ends_at_the_size_of_the_disk() {
    let bench = Bench::with_reference();
    let progress = ImportProgress::default();
    let imported = image::import(&bench.request("disk.raw"), &bench.images(), &progress).unwrap();
    assert_eq!(progress.bytes_total(), imported.root.size_bytes());
    assert_eq!(progress.bytes_done(), progress.bytes_total());
    OriginImage::open(&imported.dir).unwrap().verify(&progress).unwrap();
    assert_eq!(progress.bytes_done(), progress.bytes_total());
}

#[test]
fn an_image_describes_itself() {
    let (bench, imported) = small();
    let origin = OriginImage::open(&imported.dir).unwrap();
    let described = origin.describe();
    assert_eq!((described.id, described.size_bytes), (imported.id, 3 * MIB));
    assert_eq!((described.chunk_count, described.zero_chunks), (48, 0));
    assert_eq!(described.path, bench.file("disk.raw").canonicalize().unwrap());
    assert_eq!(described.files[0].len_bytes, 3 * MIB);
    let volume = ImageVolume::new(origin.root().clone(), std::sync::Arc::new(origin));
    assert_eq!(volume.id(), imported.id);
}
