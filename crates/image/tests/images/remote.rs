//! Images on remote disks: imported, served from there, opened again after a restart, and copied.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block::{
    Access, BoxFuture, Chunk, ChunkHash, ChunkSource, Disk, DiskError, Extent, ExtentKind, FetchError,
    Priority,
};
use image::{
    Format, ImageVolume, ImportError, ImportProgress, Imported, Keep, OpenRemote, OriginImage, RemoteRequest,
    Remotes, import_remote,
};
use tokio::runtime::Handle;

use crate::support::{Bench, CHUNK, MIB, assert_same, noise};

const LOCATION: &str = "far://away/disk/0";

/// A disk in memory that answers only on a runtime, as one behind a network does.
struct Far {
    bytes: Mutex<Vec<u8>>,
    bytes_read: AtomicU64,
    is_broken: AtomicBool,
}

impl Far {
    fn new(bytes: Vec<u8>) -> Arc<Far> {
        let (bytes_read, is_broken) = (AtomicU64::new(0), AtomicBool::new(false));
        Arc::new(Far { bytes: Mutex::new(bytes), bytes_read, is_broken })
    }

    /// Waits for a timer of the runtime that the caller has to be on.
    async fn travel(&self) -> Result<(), DiskError> {
        tokio::time::sleep(std::time::Duration::from_micros(1)).await;
        if self.is_broken.load(Ordering::SeqCst) {
            return Err(DiskError::Io("the disk is away".to_owned()));
        }
        Ok(())
    }
}

impl Disk for Far {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            self.travel().await?;
            self.bytes_read.fetch_add(buf.len() as u64, Ordering::SeqCst);
            buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: u64, _: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn write_zeroes(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Err(DiskError::ReadOnly) })
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(async { Ok(()) })
    }

    /// Tells one mebibyte at a time, as a server that looks things up does.
    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async move {
            self.travel().await?;
            let bytes = self.bytes.lock().unwrap();
            let len = len.min(MIB - offset % MIB);
            let is_zero = bytes[offset as usize..][..len as usize].iter().all(|b| *b == 0);
            let kind = if is_zero { ExtentKind::Hole } else { ExtentKind::Data };
            Ok(vec![Extent { len, kind }])
        })
    }
}

/// Opens the one disk that there is.
struct Opener(Arc<Far>);

impl OpenRemote for Opener {
    fn open(&self, location: &str) -> Result<Arc<dyn Disk>, String> {
        assert_eq!(location, LOCATION);
        if self.0.is_broken.load(Ordering::SeqCst) {
            return Err("nobody is at home".to_owned());
        }
        Ok(Arc::clone(&self.0) as Arc<dyn Disk>)
    }
}

fn remotes(far: &Arc<Far>) -> Remotes {
    Remotes { opener: Arc::new(Opener(Arc::clone(far))), runtime: Handle::current() }
}

/// Imports as the program does, on the blocking pool.
async fn try_import(bench: &Bench, request: RemoteRequest) -> Result<Imported, ImportError> {
    let images = bench.images();
    let work = move || import_remote(&request, &images, &ImportProgress::default());
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn request(far: &Arc<Far>, keep: Keep) -> RemoteRequest {
    let disk = Arc::clone(far) as Arc<dyn Disk>;
    RemoteRequest { location: LOCATION.to_owned(), disk, runtime: Handle::current(), format: None, keep }
}

/// Nine mebibytes and a bit, most of it zeroes.
fn sparse() -> Vec<u8> {
    let mut bytes = vec![0; 9 * MIB as usize + 1024];
    bytes[..100_000].copy_from_slice(&noise(1, 100_000));
    bytes[7 * MIB as usize + 5..][..300_000].copy_from_slice(&noise(2, 300_000));
    bytes
}

fn open(imported: &Imported, far: &Arc<Far>) -> ImageVolume {
    let origin = OriginImage::open_with(&imported.dir, remotes(far)).unwrap();
    ImageVolume::new(origin.root().clone(), Arc::new(origin))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_disk_is_the_same_image_as_a_file_of_the_same_bytes_and_its_holes_are_not_read() {
    let bench = Bench::new();
    let far = Far::new(sparse());
    let raw = bench.write("disk.raw", &sparse());
    let imported = try_import(&bench, request(&far, Keep::InPlace)).await.unwrap();
    assert!(imported.bytes_read <= 3 * MIB, "{} bytes were read", imported.bytes_read);
    assert_eq!(far.bytes_read.load(Ordering::SeqCst), imported.bytes_read + 512, "and the first sector");
    assert_same(&open(&imported, &far), &raw, "the remote disk").await;
    let described = OriginImage::open(&imported.dir).unwrap().describe();
    assert_eq!((described.path.to_str(), described.files.len()), (Some(LOCATION), 0));
    assert_eq!((described.format, described.keep), (Format::Raw, Keep::InPlace));

    let from_file =
        bench.try_import(&image::ImportRequest { format: Some(Format::Raw), ..bench.request("disk.raw") });
    assert_eq!(from_file.unwrap().id, imported.id);
    let again = try_import(&bench, request(&far, Keep::InPlace)).await.unwrap();
    assert_eq!((again.id, again.novelty), (imported.id, image::Novelty::Known));
    assert_same(&open(&again, &far), &raw, "the remote disk once more").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_opened_after_a_restart_finds_its_disk_and_what_was_changed_there_is_refused() {
    let bench = Bench::new();
    let far = Far::new(sparse());
    let imported = try_import(&bench, request(&far, Keep::InPlace)).await.unwrap();
    let name = ChunkHash::of(&sparse()[..CHUNK as usize]);

    let without = OriginImage::open(&imported.dir).unwrap().fetch(name, Priority::Guest).await;
    let Err(FetchError::Storage { reason, .. }) = without else { panic!("nothing can be read: {without:?}") };
    assert!(reason.contains(LOCATION) && reason.contains("cannot be opened here"), "{reason}");

    far.is_broken.store(true, Ordering::SeqCst);
    let origin = OriginImage::open_with(&imported.dir, remotes(&far)).unwrap();
    let away = origin.fetch(name, Priority::Guest).await;
    assert!(
        matches!(&away, Err(FetchError::Storage { reason, .. }) if reason.contains("nobody")),
        "{away:?}"
    );
    far.is_broken.store(false, Ordering::SeqCst);
    let fetched: Result<Chunk, _> = origin.fetch(name, Priority::Guest).await;
    assert!(fetched.is_ok(), "it came back: {fetched:?}");

    far.bytes.lock().unwrap()[9] ^= 1;
    let changed = origin.fetch(name, Priority::Guest).await;
    assert!(matches!(changed, Err(FetchError::Wrong(_))), "{changed:?}");
    let report = tokio::task::spawn_blocking(move || origin.verify(&ImportProgress::default()));
    assert_eq!(report.await.unwrap().unwrap().wrong, [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_image_needs_its_disk_no_more() {
    let bench = Bench::new();
    let far = Far::new(sparse());
    let raw = bench.write("disk.raw", &sparse());
    let imported = try_import(&bench, request(&far, Keep::Copy)).await.unwrap();
    far.is_broken.store(true, Ordering::SeqCst);
    assert_same(&crate::support::volume(&imported), &raw, "the copy").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_remote_disk_holds_a_raw_image_or_is_refused() {
    let bench = Bench::new();
    let qcow2 = [&b"QFI\xfb\0\0\0\x03"[..], &noise(1, 65_528)].concat();
    let far = Far::new(qcow2);
    let refused = try_import(&bench, request(&far, Keep::InPlace)).await.unwrap_err().to_string();
    assert!(refused.contains("qcow2 on a remote disk") && refused.contains(LOCATION), "{refused}");
    let told = RemoteRequest { format: Some(Format::Vmdk), ..request(&far, Keep::InPlace) };
    assert!(matches!(try_import(&bench, told).await, Err(ImportError::Unsupported { .. })));
    let told = RemoteRequest { format: Some(Format::Raw), ..request(&far, Keep::InPlace) };
    assert!(try_import(&bench, told).await.is_ok(), "its bytes are meant");
    let empty = try_import(&bench, request(&Far::new(Vec::new()), Keep::InPlace)).await;
    assert!(matches!(empty, Err(ImportError::Empty(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_meanwhile_leaves_nothing_behind() {
    let bench = Bench::new();
    let far = Far::new(noise(1, MIB as usize));
    far.is_broken.store(true, Ordering::SeqCst);
    let told = RemoteRequest { format: Some(Format::Raw), ..request(&far, Keep::InPlace) };
    let failed = try_import(&bench, told).await.unwrap_err().to_string();
    assert!(failed.contains("the disk is away") && failed.contains(LOCATION), "{failed}");
    assert_eq!(bench.images_entries(), 0);
}
