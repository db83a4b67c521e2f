//! The directory of an image, and what stands in it.
//!
//! `<images>/<image id>/` holds `root` (the root page), `pages` ([`Pages`](crate::pages::Pages)), `index`
//! ([`Index`](crate::index::Index)), `source.json` ([`SourceRecord`]), and `data` if the image was copied. That of
//! a derived image holds `derived.json` in place of `source.json`, and its `pages` and `index` are only about what
//! is not its base's.
//!
//! Crash: a directory is built under a temporary name, synced and renamed, so whatever has an id for its name is
//! complete. Adding an image again replaces the files one by one; those with the same name hold the same, except
//! for the source, which comes last. What was derived is exchanged as a whole: its pages depend on its base.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use block::ImageId;
use rustix::fs::{CWD, RenameFlags};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{FilePart, Format};

pub(crate) const ROOT: &str = "root";
pub(crate) const PAGES: &str = "pages";
pub(crate) const INDEX: &str = "index";
pub(crate) const SOURCE: &str = "source.json";
pub(crate) const DATA: &str = "data";
pub(crate) const DERIVED: &str = "derived.json";

/// Begins the name of a directory that is not finished, or no longer wanted. No image id begins so.
const UNFINISHED: &str = ".unfinished-";

/// Where an origin takes the bytes of an image from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// From the image file or remote disk, where it lies. It must stay there unchanged.
    InPlace,
    /// From a sparse raw copy in the image's directory. What it was added from is not needed any more.
    Copy,
}

/// The content of `source.json`: where the image came from, and where its bytes are read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SourceRecord {
    /// Version of this file.
    pub(crate) version: u32,
    /// The program that wrote it.
    pub(crate) tool: String,
    pub(crate) format: Format,
    pub(crate) keep: Keep,
    /// The image file first, then what it builds upon. None if the image came from a remote disk.
    pub(crate) files: Vec<FilePart>,
    /// Where that remote disk is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<String>,
    pub(crate) allowed_dirs: Vec<PathBuf>,
}

impl SourceRecord {
    pub(crate) const VERSION: u32 = 1;

    pub(crate) fn read(path: &Path) -> io::Result<SourceRecord> {
        let record: SourceRecord = serde_json::from_slice(&fs::read(path)?)?;
        let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason);
        if record.version != SourceRecord::VERSION {
            return Err(invalid("its version is not known here: use a newer virtman"));
        }
        if record.files.is_empty() == record.remote.is_none() {
            return Err(invalid("it does not name either files or a remote disk"));
        }
        Ok(record)
    }
}

/// A directory in the making, removed when dropped.
pub(crate) fn begin(images_dir: &Path) -> io::Result<TempDir> {
    fs::create_dir_all(images_dir)?;
    tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(images_dir)
}

/// The program, as it signs what it writes.
pub(crate) fn tool() -> String {
    format!("virtman {}", env!("CARGO_PKG_VERSION"))
}

/// Writes a small file, and syncs it.
pub(crate) fn write_synced(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    fs::write(dir.join(name), bytes)?;
    File::open(dir.join(name))?.sync_all()
}

/// Whether the directory holds a derived image, and not an imported one.
pub(crate) fn is_derived(dir: &Path) -> bool {
    dir.join(DERIVED).exists()
}

/// Whether an image was added for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Novelty {
    /// The image is new here.
    New,
    /// The image was here before; its source has been updated.
    Known,
}

/// Gives a finished directory, whose files are synced, its name for good. An image that was imported needs no
/// base: it is not replaced by one that was derived.
pub(crate) fn publish(unfinished: TempDir, images_dir: &Path, id: ImageId) -> io::Result<Novelty> {
    sync_dir(unfinished.path())?;
    let dir = images_dir.join(id.to_string());
    let novelty = match fs::rename(unfinished.path(), &dir) {
        Ok(()) => {
            let _ = unfinished.keep();
            Novelty::New
        }
        Err(error)
            if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) =>
        {
            match (is_derived(unfinished.path()), is_derived(&dir)) {
                (true, false) => {}
                (false, false) => replace_files(unfinished.path(), &dir)?,
                (_, true) => exchange(unfinished.path(), &dir)?,
            }
            Novelty::Known
        }
        Err(error) => return Err(error),
    };
    sync_dir(images_dir)?;
    Ok(novelty)
}

/// Lets two directories change places, at once as far as others can see. Who has opened files of the old one
/// keeps them.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

fn replace_files(from: &Path, to: &Path) -> io::Result<()> {
    let copied = from.join(DATA).exists();
    if copied {
        fs::rename(from.join(DATA), to.join(DATA))?;
    }
    for name in [PAGES, INDEX, ROOT, SOURCE] {
        fs::rename(from.join(name), to.join(name))?;
    }
    sync_dir(to)?;
    if !copied && to.join(DATA).exists() {
        fs::remove_file(to.join(DATA))?;
    }
    Ok(())
}

pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Removes what imports and derivations that were killed have left. Call it before the first, not during one.
pub fn sweep(images_dir: &Path) -> io::Result<()> {
    for entry in entries(images_dir)? {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(UNFINISHED)) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The images that stand in a directory, in no order. A directory that does not exist holds none.
pub fn list(images_dir: &Path) -> io::Result<Vec<ImageId>> {
    let entries = entries(images_dir)?;
    Ok(entries.iter().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// Removes an image's directory, at once as far as others can see. The image file or disk is not touched, nor are
/// images that were derived from this one; they can be served as long as somebody has the chunks of their base. `NotFound` if
/// there is no such image.
pub fn remove(images_dir: &Path, id: ImageId) -> io::Result<()> {
    let grave = begin(images_dir)?;
    fs::rename(images_dir.join(id.to_string()), grave.path().join("image"))?;
    sync_dir(images_dir)?;
    grave.close()
}

fn entries(images_dir: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(images_dir) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
