//! Image files of all formats, and remote disks, seen as what they hold: a disk that can be read in parallel.
//!
//! [`Source`] is an opened image with all files that it consists of; [`Reader`] is one thread's access to it.
//! The formats are read by libraries, and only this module names them. They are fed foreign bytes, so a panic
//! in one is caught here and becomes an error; the reader in which it happened must then be given up.
//! Nothing here writes, and nothing is opened that [`AllowedDirs`] did not admit.

mod allowed;
mod format;
mod layer;
mod mapped;
mod qcow2;
mod raw;
mod remote;
mod stream;
mod vmdk;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use block::limits::DISK_BYTES_MAX;
use block::{Extent, ExtentKind};
use imago::FormatAccess;
use serde::{Deserialize, Serialize};

pub(crate) use allowed::AllowedDirs;
use format::DETECT_BYTES;
pub use format::{Format, ParseFormatError};
pub use layer::{LayerExtent, Qcow2Layer};
use mapped::MappedReader;
pub(crate) use qcow2::parse_any as parse_any_qcow2;
pub(crate) use raw::{RawReader, length};
pub(crate) use remote::RemoteReader;
pub use remote::{OpenRemote, Remotes};
use stream::StreamReader;

use crate::ImportError;

/// One of the files that an image consists of, and what it looked like when it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePart {
    /// Canonical path.
    pub path: PathBuf,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Time of the last modification, in nanoseconds since 1970.
    pub modified_ns: i128,
}

impl FilePart {
    /// The file as it is now.
    pub(crate) fn of(path: &Path) -> Result<FilePart, ImportError> {
        let unreadable = |error: io::Error| ImportError::unreadable(path, error);
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        let modified_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Ok(FilePart { path: path.to_owned(), len_bytes: length(&file).map_err(unreadable)?, modified_ns })
    }
}

/// An opened image: a file, or a remote disk, whose location stands for the path.
pub(crate) struct Source {
    path: PathBuf,
    format: Format,
    size_bytes: u64,
    parts: Vec<FilePart>,
    opened: Opened,
}

enum Opened {
    Raw(Arc<File>),
    Mapped(Arc<FormatAccess<imago::file::File>>),
    /// Holds the reader that opening made, for the first who wants one.
    Stream(Mutex<Option<StreamReader>>),
    Remote(RemoteReader),
}

impl Opened {
    fn stream(path: &Path, format: Format) -> Result<(Opened, u64), ImportError> {
        let (reader, size_bytes) = open_stream(path, format)?;
        Ok((Opened::Stream(Mutex::new(Some(reader))), size_bytes))
    }
}

impl Source {
    /// Opens the image at `path`, which must lie in an allowed directory, as must all that it builds upon.
    pub(crate) fn open(
        path: &Path,
        told: Option<Format>,
        allowed: &AllowedDirs,
    ) -> Result<Source, ImportError> {
        let path = allowed.admit(path)?;
        contained(|| Source::open_admitted(&path, told, allowed))
            .unwrap_or_else(|reason| Err(ImportError::damaged(&path, reason)))
    }

    fn open_admitted(
        path: &Path,
        told: Option<Format>,
        allowed: &AllowedDirs,
    ) -> Result<Source, ImportError> {
        let (head, len) = head_of(path)?;
        let format = Format::settle(told, &head, len, path)?;
        let mut parts = Vec::new();
        let (opened, size_bytes) = match format {
            Format::Raw => {
                parts.push(FilePart::of(path)?);
                let file = File::open(path).map_err(|e| ImportError::unreadable(path, e))?;
                (Opened::Raw(Arc::new(file)), len)
            }
            Format::Qcow2 => {
                let image = qcow2::open(path, allowed, &mut parts)?;
                let size_bytes = image.size();
                (Opened::Mapped(Arc::new(image)), size_bytes)
            }
            Format::Vmdk if head.starts_with(b"#") => match vmdk::check_descriptor(path)? {
                vmdk::Extents::Flat => {
                    let image = vmdk::open_flat(path, allowed, &mut parts)?;
                    let size_bytes = image.size();
                    (Opened::Mapped(Arc::new(image)), size_bytes)
                }
                vmdk::Extents::Sparse => {
                    vmdk::admit_extents(path, allowed, &mut parts)?;
                    Opened::stream(path, format)?
                }
            },
            Format::Vmdk | Format::Vhdx => {
                parts.push(FilePart::of(path)?);
                Opened::stream(path, format)?
            }
        };
        Source { path: path.to_owned(), format, size_bytes, parts, opened }.with_fitting_size()
    }

    /// Opens the raw image on a remote disk. It has no files.
    pub(crate) fn open_remote(
        location: &str,
        told: Option<Format>,
        disk: RemoteReader,
    ) -> Result<Source, ImportError> {
        let path = PathBuf::from(location);
        disk.check_raw(told, &path)?;
        let size_bytes = disk.size_bytes();
        let opened = Opened::Remote(disk);
        Source { path, format: Format::Raw, size_bytes, parts: Vec::new(), opened }.with_fitting_size()
    }

    fn with_fitting_size(self) -> Result<Source, ImportError> {
        match self.size_bytes {
            0 => Err(ImportError::Empty(self.path)),
            1..=DISK_BYTES_MAX => Ok(self),
            size_bytes => Err(ImportError::TooLarge { path: self.path, size_bytes }),
        }
    }

    /// The canonical path of the image file, or the location of the remote disk.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Size of the disk in bytes.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// All files that the image consists of, the image file first; none if it lies on a remote disk.
    pub(crate) fn parts(&self) -> &[FilePart] {
        &self.parts
    }

    /// Refuses if any of the files is not what it was when it was opened. A remote disk tells no such thing: what
    /// was changed there is noticed when it is read and held against its name.
    pub(crate) fn check_unchanged(&self) -> Result<(), ImportError> {
        for part in &self.parts {
            if FilePart::of(&part.path)? != *part {
                return Err(ImportError::Changed(part.path.clone()));
            }
        }
        Ok(())
    }

    /// One thread's access to the disk.
    pub(crate) fn reader(&self) -> Result<Reader, ImportError> {
        let access = match &self.opened {
            Opened::Raw(file) => Access::Raw(RawReader::new(Arc::clone(file), self.size_bytes)),
            Opened::Mapped(image) => Access::Mapped(MappedReader::new(Arc::clone(image))),
            Opened::Stream(first) => {
                let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                let reopen = || open_stream(&self.path, self.format).map(|(reader, _)| reader);
                Access::Stream(first.map_or_else(reopen, Ok)?)
            }
            Opened::Remote(disk) => Access::Remote(disk.clone()),
        };
        Ok(Reader { access, size_bytes: self.size_bytes })
    }
}

fn open_stream(path: &Path, format: Format) -> Result<(StreamReader, u64), ImportError> {
    match format {
        Format::Vhdx => StreamReader::open_vhdx(path),
        _ => StreamReader::open_vmdk(path),
    }
}

/// The first bytes of a file, and its length.
fn head_of(path: &Path) -> Result<(Vec<u8>, u64), ImportError> {
    let unreadable = |error: io::Error| ImportError::unreadable(path, error);
    let file = File::open(path).map_err(unreadable)?;
    let len = length(&file).map_err(unreadable)?;
    let mut head = vec![0; DETECT_BYTES.min(usize::try_from(len).unwrap_or(DETECT_BYTES))];
    file.read_exact_at(&mut head, 0).map_err(unreadable)?;
    Ok((head, len))
}

/// One thread's access to a disk. After an error it must be given up.
pub(crate) struct Reader {
    access: Access,
    size_bytes: u64,
}

enum Access {
    Raw(RawReader),
    Mapped(MappedReader),
    Stream(StreamReader),
    Remote(RemoteReader),
}

impl Reader {
    /// What begins at `offset`, which lies before `end`, which lies on the disk. Data is looked for only up to
    /// `end`; a hole may reach beyond it. A hole reads as zeroes; data may, too.
    pub(crate) fn extent(&mut self, offset: u64, end: u64) -> io::Result<Extent> {
        let access = &mut self.access;
        let extent = checked(|| match access {
            Access::Raw(raw) => raw.extent(offset),
            Access::Mapped(mapped) => mapped.extent(offset, end),
            Access::Stream(_) => Ok(Extent { len: end - offset, kind: ExtentKind::Data }),
            Access::Remote(remote) => remote.extent(offset),
        })?;
        match extent.kind {
            ExtentKind::Data => Ok(Extent { len: extent.len.clamp(1, end - offset), ..extent }),
            ExtentKind::Hole => Ok(Extent { len: extent.len.clamp(1, self.size_bytes - offset), ..extent }),
        }
    }

    /// Fills `buf` from `offset`; all of it lies on the disk.
    pub(crate) fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        checked(|| match &mut self.access {
            Access::Raw(raw) => raw.read_at(offset, buf),
            Access::Mapped(mapped) => mapped.read_at(offset, buf),
            Access::Stream(stream) => stream.read_at(offset, buf),
            Access::Remote(remote) => remote.read_at(offset, buf),
        })
    }
}

fn checked<T>(run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    contained(run).unwrap_or_else(|reason| Err(io::Error::new(io::ErrorKind::InvalidData, reason)))
}

/// Runs a library on foreign bytes; a panic becomes a text.
fn contained<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run))
        .map_err(|_| "its header or tables are so wrong that the reader of this format gave up".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use testkit::foreign::tool_in;

    use super::*;

    /// Small images of every format with data in them, made by `qemu-img`.
    fn samples(dir: &Path) -> Vec<PathBuf> {
        std::fs::write(dir.join("disk.raw"), vec![7; 300_000 / 512 * 512]).unwrap();
        let kinds = [
            "qcow2",
            "qcow2 -c",
            "vmdk",
            "vmdk -o subformat=streamOptimized",
            "vmdk -o subformat=monolithicFlat",
            "vhdx",
        ];
        let make = |(number, kind): (usize, &str)| {
            let name = format!("sample{number}");
            let words = format!("convert -O {kind} disk.raw {name}");
            tool_in(dir, "qemu-utils", "qemu-img", &words.split(' ').collect::<Vec<_>>());
            dir.join(name)
        };
        kinds.into_iter().enumerate().map(make).collect()
    }

    #[test]
    fn a_header_with_any_change_is_read_or_refused_but_never_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        let samples = samples(dir.path());
        let good: Vec<Vec<u8>> = samples.iter().map(|path| std::fs::read(path).unwrap()).collect();
        // Where the formats keep their headers and tables.
        let places = prop_oneof![0usize..128, 0usize..1024, 65_536usize..65_700, 196_608usize..328_000];
        let changes = prop::collection::vec((places, any::<u8>()), 1..6);
        let allowed = AllowedDirs::new(&[], &samples[0].canonicalize().unwrap()).unwrap();
        proptest!(ProptestConfig::with_cases(300), |(which in 0..samples.len(), changes in changes)| {
            let mut bytes = good[which].clone();
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            std::fs::write(&samples[which], &bytes).unwrap();
            if let Ok(source) = Source::open(&samples[which], None, &allowed)
                && let Ok(mut reader) = source.reader()
            {
                let len = source.size_bytes().min(300_000);
                let _ = reader.extent(0, len);
                let _ = reader.read_at(0, &mut vec![0; len as usize]);
            }
        });
    }

    #[test]
    fn a_file_that_was_written_to_is_noticed_even_if_its_length_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, [1; 512]).unwrap();
        let path = path.canonicalize().unwrap();
        let allowed = AllowedDirs::new(&[], &path).unwrap();
        let source = Source::open(&path, None, &allowed).unwrap();
        assert!(source.check_unchanged().is_ok());
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[2], 0).unwrap();
        file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_000_000_001)).unwrap();
        assert!(matches!(source.check_unchanged(), Err(ImportError::Changed(changed)) if changed == path));
    }

    #[test]
    fn a_panic_in_a_library_is_an_error_here() {
        assert_eq!(contained(|| 1), Ok(1));
        assert!(contained(|| panic!("deliberate")).is_err());
    }
}
