//! An overlay in a directory: created, opened, refused.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use block::limits::DISK_BYTES_MAX;

use super::*;

const SIZE: u64 = 8 << 20;

fn base() -> Arc<Base> {
    Base::new(vec![9; 1 << 20])
}

fn create(dir: &Path) -> Overlay {
    Overlay::create(dir, SIZE, base()).unwrap().sync().unwrap()
}

#[tokio::test]
async fn what_was_flushed_is_there_when_the_directory_is_opened_again() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("vm/disk");
    let disk = create(&dir);
    disk.write(5000, &[1; 100_000]).await.unwrap();
    disk.flush().await.unwrap();
    drop(disk);
    let disk = Overlay::open(&dir, base()).unwrap();
    assert_eq!(disk.size_bytes(), SIZE);
    assert_eq!(read(&disk, 4999, 100_002).await, [&[9][..], &[1; 100_000], &[9]].concat());
}

#[test]
fn an_overlay_is_open_once_and_created_once() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    assert!(matches!(Overlay::open(&dir, base()), Err(OverlayError::Missing(_))));
    assert!(matches!(Overlay::remove(&dir), Err(OverlayError::Missing(_))));
    let disk = create(&dir);
    for error in [
        Overlay::open(&dir, base()).err(),
        Overlay::create(&dir, SIZE, base()).err(),
        Overlay::remove(&dir).err(),
    ] {
        assert!(matches!(error, Some(OverlayError::InUse(_))), "{error:?}");
    }
    drop(disk);
    assert!(matches!(Overlay::create(&dir, SIZE, base()), Err(OverlayError::Exists(_))));
    Overlay::remove(&dir).unwrap();
    assert!(!dir.exists());
    create(&dir);
}

#[test]
fn who_opens_an_overlay_that_is_just_being_closed_waits_for_that() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    let disk = create(&dir);
    let (begin, began) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            began.recv().unwrap();
            thread::sleep(Duration::from_millis(100));
            drop(disk);
        });
        begin.send(()).unwrap();
        Overlay::open(&dir, base()).unwrap();
    });
}

#[tokio::test]
async fn what_a_crash_left_of_a_creation_is_no_overlay_and_in_nobodys_way() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("data"), vec![5; 10_000]).unwrap();
    assert!(matches!(Overlay::open(&dir, base()), Err(OverlayError::Missing(_))));
    let disk = create(&dir);
    assert_eq!(read(&disk, 0, 20_000).await, [9; 20_000]);
}

#[tokio::test]
async fn a_new_overlay_whose_length_a_crash_forgot_is_whole_again() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    drop(create(&dir));
    fs::File::options().write(true).open(dir.join("data")).unwrap().set_len(0).unwrap();
    let disk = Overlay::open(&dir, base()).unwrap();
    disk.write(SIZE - 1, &[7]).await.unwrap();
    assert_eq!(read(&disk, SIZE - 2, 2).await, [0, 7]);
    assert_eq!(fs::metadata(dir.join("data")).unwrap().len(), SIZE);
}

#[tokio::test]
async fn damage_is_told_with_the_name_of_the_file() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    let disk = create(&dir);
    disk.write(SIZE - 4096, &[7; 4096]).await.unwrap();
    disk.flush().await.unwrap();
    drop(disk);
    let error = |file: &str| {
        let Err(error) = Overlay::open(&dir, base()) else { panic!("it was opened") };
        assert!(matches!(error, OverlayError::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains(dir.join(file).to_str().unwrap()), "{error}");
    };
    let data = fs::File::options().write(true).open(dir.join("data")).unwrap();
    data.set_len(SIZE / 2).unwrap();
    error("data");
    data.set_len(SIZE).unwrap();
    Overlay::open(&dir, base()).unwrap();
    fs::write(dir.join("map"), vec![0; 10_000]).unwrap();
    error("map");
}

#[test]
fn impossible_sizes_are_refused_before_anything_is_made() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    for size in [0, DISK_BYTES_MAX + 1, u64::MAX] {
        assert!(matches!(Overlay::create(&dir, size, base()), Err(OverlayError::Size(_))), "{size}");
    }
    assert!(!dir.exists());
}

#[tokio::test]
async fn discard_gives_space_back_and_extents_tell_so() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("disk");
    let disk = create(&dir);
    let used_bytes = || fs::metadata(dir.join("data")).unwrap().blocks() * 512;
    disk.write(0, &vec![1; 4 << 20]).await.unwrap();
    disk.flush().await.unwrap();
    assert!(used_bytes() >= 4 << 20);
    disk.discard(1 << 20, 3 << 20).await.unwrap();
    assert!(used_bytes() < 2 << 20, "{} bytes are still used", used_bytes());
    let extents = disk.extents(0, SIZE).await.unwrap();
    let expected =
        [Extent { len: 1 << 20, kind: ExtentKind::Data }, Extent { len: 7 << 20, kind: ExtentKind::Hole }];
    assert_eq!(extents, expected);
}
