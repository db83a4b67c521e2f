//! The root page: what a node must have to attach an image.
//!
//! Invariants: a `RootPage` that exists is consistent in itself, and `encode` gives the one form that `decode`
//! accepts; so two root pages with equal meaning have equal bytes and hence equal ids.

use block::limits::{CHUNK_BYTES, DISK_BYTES_MAX, HASHES_PER_PAGE};
use block::{ChunkHash, Geometry, ImageId};
use bytes::{BufMut, Bytes, BytesMut};

use super::shape::{HASH_BYTES, PageId, Shape, TOPS_MAX};

const MAGIC: &[u8; 8] = b"VirtMan\n";
const VERSION: u16 = 1;
const HEAD_BYTES: usize = 40;

/// Longest root page in bytes.
pub const ROOT_PAGE_BYTES_MAX: usize = HEAD_BYTES + TOPS_MAX as usize * HASH_BYTES;

/// The top of a manifest: the disk's size, its count of zero chunks, and the hashes of the topmost pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootPage {
    shape: Shape,
    zero_chunks: u64,
    tops: Box<[ChunkHash]>,
}

/// Bytes that are no root page. All variants mean the same to a program: do not use these bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The bytes are something else.
    #[error("this is not a root page of an image: it does not begin with the root page's magic")]
    Magic,
    /// A later version of the format.
    #[error("the root page has version {0}, but only version {VERSION} is known here: use a newer virtman")]
    Version(u16),
    /// There are more or fewer bytes than the page needs.
    #[error("the root page has {actual} bytes instead of {expected}")]
    Length {
        /// Bytes that the page should have.
        expected: usize,
        /// Bytes that there are.
        actual: usize,
    },
    /// The size of the disk is out of bounds.
    #[error("the root page gives a disk of {0} bytes; it must have 1 to {DISK_BYTES_MAX}")]
    Size(u64),
    /// Two fields contradict each other.
    #[error("the root page contradicts itself: {field} is {actual}, but {rule}")]
    Contradiction {
        /// The field that does not fit.
        field: &'static str,
        /// Its value.
        actual: u64,
        /// What it should be.
        rule: String,
    },
}

fn contradiction(field: &'static str, actual: u64, rule: String) -> ManifestError {
    ManifestError::Contradiction { field, actual, rule }
}

impl RootPage {
    /// Puts a root page together; the importer's way to make one. Checks all that [`RootPage::decode`] checks.
    pub(crate) fn new(
        size_bytes: u64,
        zero_chunks: u64,
        tops: Box<[ChunkHash]>,
    ) -> Result<RootPage, ManifestError> {
        let shape = Shape::of(size_bytes).ok_or(ManifestError::Size(size_bytes))?;
        if tops.len() as u64 != shape.tops() {
            let rule = format!("a disk of {size_bytes} bytes has {}", shape.tops());
            return Err(contradiction("the number of top hashes", tops.len() as u64, rule));
        }
        check_zero_chunks(&shape, zero_chunks, &tops)?;
        Ok(RootPage { shape, zero_chunks, tops })
    }

    /// Reads a root page. Accepts exactly what [`RootPage::encode`] gives, and never panics.
    pub fn decode(bytes: &[u8]) -> Result<RootPage, ManifestError> {
        if !bytes.starts_with(MAGIC) {
            return Err(ManifestError::Magic);
        }
        let Some((head, hashes)) = bytes.split_at_checked(HEAD_BYTES) else {
            return Err(ManifestError::Length { expected: HEAD_BYTES, actual: bytes.len() });
        };
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let size_bytes = u64_at(head, 16);
        let shape = Shape::of(size_bytes).ok_or(ManifestError::Size(size_bytes))?;
        let fields = [
            ("the number of levels", u64::from(head[10]), shape.levels() as u64),
            ("the number of top hashes", u64::from(head[11]), shape.tops()),
            ("the reserved field", u64::from(u32_at(head, 12)), 0),
            ("the number of data chunks", u64_at(head, 24), shape.geometry().chunk_count()),
        ];
        for (field, actual, expected) in fields {
            if actual != expected {
                return Err(contradiction(field, actual, format!("must be {expected}")));
            }
        }
        let expected = HEAD_BYTES + shape.tops() as usize * HASH_BYTES;
        if bytes.len() != expected {
            return Err(ManifestError::Length { expected, actual: bytes.len() });
        }
        RootPage::new(size_bytes, u64_at(head, 32), hashes_in(hashes).collect())
    }

    /// The root page's bytes, at most [`ROOT_PAGE_BYTES_MAX`].
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEAD_BYTES + self.tops.len() * HASH_BYTES);
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u8(self.shape.levels() as u8);
        out.put_u8(self.tops.len() as u8);
        out.put_u32_le(0);
        out.put_u64_le(self.size_bytes());
        out.put_u64_le(self.chunk_count());
        out.put_u64_le(self.zero_chunks);
        self.tops.iter().for_each(|top| out.put_slice(top.as_bytes()));
        out.freeze()
    }

    /// The image's name: the hash of the root page's bytes.
    pub fn id(&self) -> ImageId {
        ImageId::of_root_page(&self.encode())
    }

    /// Size of the disk in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.shape.geometry().size_bytes()
    }

    /// The disk's geometry.
    pub fn geometry(&self) -> Geometry {
        self.shape.geometry()
    }

    /// How many chunks cover the disk, all-zero ones included; pages of the manifest are not counted.
    pub fn chunk_count(&self) -> u64 {
        self.shape.geometry().chunk_count()
    }

    /// How many of these chunks are all zero, and so are never stored or fetched.
    pub fn zero_chunks(&self) -> u64 {
        self.zero_chunks
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// The hash of a page that [is at the top](Shape::is_top); `ZERO` beyond the last.
    pub(crate) fn top(&self, page: PageId) -> ChunkHash {
        let place = usize::try_from(page.index).unwrap_or(usize::MAX);
        self.tops.get(place).copied().unwrap_or(ChunkHash::ZERO)
    }
}

impl RootPage {
    /// The first page of a level above the top, as if the tree went on there: so a small image can be held
    /// against one whose tree is higher. All other pages of such a level are zero.
    pub(crate) fn page_above_top(&self, level: usize) -> Vec<u8> {
        debug_assert!(level >= self.shape.levels());
        let of_tops = page_of(&self.tops);
        (self.shape.levels()..level).fold(of_tops, |below, _| page_of(&[ChunkHash::of(&below)]))
    }
}

/// A zero top hash says that all chunks under it are zero, any other that at least one is not.
fn check_zero_chunks(shape: &Shape, zero_chunks: u64, tops: &[ChunkHash]) -> Result<(), ManifestError> {
    let (mut least, mut most) = (0, 0);
    for (index, top) in (0..).zip(tops) {
        let under = shape.chunks_under(PageId { level: shape.levels() - 1, index });
        least += if top.is_zero() { under } else { 0 };
        most += if top.is_zero() { under } else { under - 1 };
    }
    if (least..=most).contains(&zero_chunks) {
        return Ok(());
    }
    Err(contradiction(
        "the number of zero chunks",
        zero_chunks,
        format!("the top hashes allow only {least} to {most}"),
    ))
}

/// The hashes in a page's bytes.
pub(crate) fn hashes_in(bytes: &[u8]) -> impl Iterator<Item = ChunkHash> {
    bytes.as_chunks::<HASH_BYTES>().0.iter().map(|hash| ChunkHash::from_bytes(*hash))
}

/// The bytes of a page that holds these hashes, and zero marks behind them.
pub(crate) fn page_of(hashes: &[ChunkHash]) -> Vec<u8> {
    debug_assert!(hashes.len() <= HASHES_PER_PAGE);
    let mut bytes = vec![0; CHUNK_BYTES];
    for (place, hash) in bytes.chunks_exact_mut(HASH_BYTES).zip(hashes) {
        place.copy_from_slice(hash.as_bytes());
    }
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the slice has four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the slice has eight bytes"))
}
