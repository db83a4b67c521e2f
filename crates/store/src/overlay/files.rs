//! An overlay as a directory: `data`, `map` and `live`.
//!
//! An overlay is there once `map` is, and gone once that is. It is written before anything is synced, so a crash while
//! one is created may leave it torn: nobody may rely on a new overlay before it is durable. The lock is on `data`, which
//! keeps its inode as long as the overlay lives.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::Disk;

use super::{BootId, NewOverlay, Overlay, OverlayError, OverlayMedia, check_size};
use crate::Media;
use crate::durable;
use crate::media::{FileMedia, InUse};

pub(super) const DATA: &str = "data";
pub(super) const MAP: &str = "map";
pub(super) const LIVE: &str = "live";

fn data_path(dir: &Path) -> PathBuf {
    dir.join(DATA)
}

fn map_path(dir: &Path) -> PathBuf {
    dir.join(MAP)
}

/// The media of the overlay in `dir`.
fn media(dir: &Path, data: FileMedia, map: Arc<FileMedia>) -> Result<OverlayMedia, OverlayError> {
    let path = dir.join(LIVE);
    let live = FileMedia::open_or_create(&path).map_err(io_error(&path))?;
    let boot = BootId::current().map_err(io_error(Path::new("/proc/sys/kernel/random/boot_id")))?;
    Ok(OverlayMedia { data: Arc::new(data), map, live: Arc::new(live), boot })
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> OverlayError {
    move |source| OverlayError::Io { path: path.to_owned(), source }
}

fn sync_dir(dir: &Path) -> Result<(), OverlayError> {
    durable::sync_dir(dir).map_err(io_error(dir))
}

fn remove_if_there(path: &Path) -> Result<(), OverlayError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(path)(error)),
        _ => Ok(()),
    }
}

/// How long an overlay that somebody just closed may seem to be in use: a child of this process has what this process
/// had open until it has become another program.
const CLOSING_TIME_MAX: Duration = Duration::from_secs(1);

/// Takes the overlay in `dir` for ourselves: its data file, locked.
fn lock_data(dir: &Path, data: FileMedia) -> Result<FileMedia, OverlayError> {
    let path = data_path(dir);
    let began = Instant::now();
    while let Err(InUse) = data.lock().map_err(io_error(&path))? {
        if began.elapsed() > CLOSING_TIME_MAX {
            return Err(OverlayError::InUse(dir.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Between opening and locking, another may have removed the file and even created the next.
    let ours = data.metadata().map_err(io_error(&path))?;
    match fs::metadata(&path) {
        Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => Ok(data),
        _ => Err(OverlayError::InUse(dir.to_owned())),
    }
}

fn open_data(dir: &Path) -> Result<FileMedia, OverlayError> {
    let path = data_path(dir);
    match FileMedia::open(&path) {
        Ok(data) => lock_data(dir, data),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(OverlayError::Missing(dir.to_owned())),
        Err(error) => Err(io_error(&path)(error)),
    }
}

pub(super) fn create(dir: &Path, size_bytes: u64, base: Arc<dyn Disk>) -> Result<NewOverlay, OverlayError> {
    check_size(size_bytes)?;
    fs::create_dir_all(dir).map_err(io_error(dir))?;
    let path = data_path(dir);
    let data = lock_data(dir, FileMedia::open_or_create(&path).map_err(io_error(&path))?)?;
    let map = map_path(dir);
    if map.try_exists().map_err(io_error(dir))? {
        return Err(OverlayError::Exists(dir.to_owned()));
    }
    data.set_len(0).map_err(io_error(&path))?;
    let map = Arc::new(FileMedia::open_or_create(&map).map_err(io_error(&map))?);
    let new = NewOverlay::write(media(dir, data, Arc::clone(&map))?, size_bytes, base, dir)?;
    map.start_sync();
    Ok(new)
}

pub(super) fn open(dir: &Path, base: Arc<dyn Disk>) -> Result<Overlay, OverlayError> {
    let data = open_data(dir)?;
    let path = map_path(dir);
    let map = match FileMedia::open(&path) {
        Ok(map) => Arc::new(map),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OverlayError::Missing(dir.to_owned()));
        }
        Err(error) => return Err(io_error(&path)(error)),
    };
    Overlay::open_named(media(dir, data, map)?, base, dir)
}

pub(super) fn remove(dir: &Path) -> Result<(), OverlayError> {
    // The lock is held until the end, so that nobody opens what is going away.
    let _data = open_data(dir)?;
    remove_if_there(&map_path(dir))?;
    sync_dir(dir)?;
    remove_if_there(&dir.join(LIVE))?;
    remove_if_there(&data_path(dir))?;
    fs::remove_dir(dir).map_err(io_error(dir))
}
