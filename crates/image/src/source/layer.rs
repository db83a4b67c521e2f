//! A qcow2 file by itself: what it holds, and what it leaves to the image that it was made on.
//!
//! A user brings such a file to go on with a disk elsewhere. The name of a backing file in it was written by a
//! stranger, and the image that it was made on is known here by its id; so that name is told, and nothing is opened
//! by it. What is checked of the file's tables, and why, stands in [`qcow2`].

use std::io;
use std::ops::Range;
use std::path::Path;

use imago::file::File;
use imago::{FormatAccess, Mapping};

use super::allowed::AllowedDirs;
use super::{FilePart, checked, contained, mapped, qcow2};
use crate::ImportError;

/// Where looking for the end of an extent stops: a file can be made of millions of clusters of one kind.
const EXTENT_BYTES_MAX: u64 = 1 << 30;

/// A qcow2 file, without what it builds upon. Reads block; several threads can read at a time.
pub struct Qcow2Layer {
    part: FilePart,
    image: FormatAccess<File>,
    backing: Option<String>,
    backing_format: Option<String>,
}

/// A range of bytes of the disk that the file has a say in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerExtent {
    /// Bytes that are in the file.
    Data(Range<u64>),
    /// Zeroes, whatever the backing file has there.
    Zero(Range<u64>),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zero,
    /// Left to the backing file; zero if there is none.
    Unallocated,
}

impl Qcow2Layer {
    /// Opens the file, which must be a regular file or block device. Internal snapshots in it are not looked at.
    pub fn open(path: &Path) -> Result<Qcow2Layer, ImportError> {
        let path = path.canonicalize().map_err(|e| ImportError::unreadable(path, e))?;
        let path = AllowedDirs::new(&[], &path)?.admit(&path)?;
        contained(|| Qcow2Layer::open_admitted(&path))
            .unwrap_or_else(|reason| Err(ImportError::damaged(&path, reason)))
    }

    fn open_admitted(path: &Path) -> Result<Qcow2Layer, ImportError> {
        let (head, _) = super::head_of(path)?;
        if !super::Format::Qcow2.fits(&head) {
            return Err(ImportError::WrongFormat { path: path.to_owned(), told: super::Format::Qcow2 });
        }
        let part = FilePart::of(path)?;
        let image = qcow2::open_alone(path)?;
        let backing = image.implicit_backing_file().cloned();
        let backing_format = image.implicit_backing_format().cloned();
        let image = FormatAccess::new(image);
        match image.size() {
            0 => Err(ImportError::Empty(path.to_owned())),
            _ => Ok(Qcow2Layer { part, image, backing, backing_format }),
        }
    }

    /// Size of the disk in bytes. It need not be that of the image that the file was made on.
    pub fn size_bytes(&self) -> u64 {
        self.image.size()
    }

    /// The name of the backing file as it stands in the file, for comparison and, escaped, for people; `None` if
    /// the file stands alone.
    pub fn backing(&self) -> Option<&str> {
        self.backing.as_deref()
    }

    /// The format of the backing file, if the file tells it.
    pub fn backing_format(&self) -> Option<&str> {
        self.backing_format.as_deref()
    }

    /// The first extent that ends behind `offset`, cut off there if it begins before; `None` if all from there on
    /// is left to the backing file.
    pub fn extent(&self, offset: u64) -> Result<Option<LayerExtent>, ImportError> {
        self.find(offset).map_err(|error| ImportError::reading(self.path(), &error))
    }

    /// All extents in order. Neighbours can be of the same kind. Ends with the first error.
    pub fn extents(&self) -> impl Iterator<Item = Result<LayerExtent, ImportError>> {
        let mut next = Some(0);
        std::iter::from_fn(move || {
            let found = self.extent(next.take()?).transpose()?;
            next = found.as_ref().ok().map(LayerExtent::end);
            Some(found)
        })
    }

    /// Fills `buf` from `offset`. What is left to the backing file reads as zeroes.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ImportError> {
        let reading = |error| ImportError::reading(self.path(), &error);
        let Some(end) = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.size_bytes()) else {
            let reason = format!("{} bytes at {offset} do not lie on its disk", buf.len());
            return Err(ImportError::unreadable(self.path(), reason));
        };
        self.check_within_file(offset, end).map_err(reading)?;
        checked(|| self.image.read(buf, offset)).map_err(reading)
    }

    /// Refuses if the file was written to since it was opened. To be asked when all has been read.
    pub fn check_unchanged(&self) -> Result<(), ImportError> {
        match FilePart::of(self.path())? == self.part {
            true => Ok(()),
            false => Err(ImportError::Changed(self.part.path.clone())),
        }
    }

    fn path(&self) -> &Path {
        &self.part.path
    }

    fn find(&self, offset: u64) -> io::Result<Option<LayerExtent>> {
        let size_bytes = self.size_bytes();
        let mut start = offset;
        while start < size_bytes {
            let (kind, end) = self.run(start, size_bytes)?;
            match kind {
                Kind::Unallocated => start = end,
                Kind::Data => return Ok(Some(LayerExtent::Data(start..self.end_of(kind, start, end)?))),
                Kind::Zero => return Ok(Some(LayerExtent::Zero(start..self.end_of(kind, start, end)?))),
            }
        }
        Ok(None)
    }

    /// Where what is of this kind from `start` to `end` and perhaps behind it ends.
    fn end_of(&self, kind: Kind, start: u64, mut end: u64) -> io::Result<u64> {
        let limit = self.size_bytes().min(start.saturating_add(EXTENT_BYTES_MAX));
        while end < limit {
            let (next_kind, next_end) = self.run(end, limit)?;
            if next_kind != kind {
                break;
            }
            end = next_end;
        }
        Ok(end)
    }

    /// The kind of what begins at `offset`, and where its first piece ends, at most at `end`.
    fn run(&self, offset: u64, end: u64) -> io::Result<(Kind, u64)> {
        let (kind, len) = checked(|| {
            let (mapping, len) = self.image.get_mapping(offset, end - offset)?;
            let kind = match mapping {
                Mapping::Zero { explicit: true, .. } => Kind::Zero,
                Mapping::Zero { .. } => Kind::Unallocated,
                other => {
                    mapped::check_within_file(&other, offset, len)?;
                    Kind::Data
                }
            };
            Ok((kind, len))
        })?;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("nothing is mapped at {offset}")));
        }
        Ok((kind, offset + len))
    }

    /// Refuses what the file's tables promise beyond its end.
    fn check_within_file(&self, offset: u64, end: u64) -> io::Result<()> {
        let mut at = offset;
        while at < end {
            (_, at) = self.run(at, end)?;
        }
        Ok(())
    }
}

impl LayerExtent {
    fn end(&self) -> u64 {
        match self {
            LayerExtent::Data(range) | LayerExtent::Zero(range) => range.end,
        }
    }
}
