//! Which chunks of one image differ from another's: two Merkle trees side by side.
//!
//! Where two pages have one name, nothing under them differs, and neither is fetched. So the difference of an
//! image and what was derived from it costs the pages above the changed chunks, twice, whatever the size.
//!
//! - Consistency: both images are fixed by their root pages.
//! - Retries: none here.
//! - Cancellation: a dropped [`Difference::next`] has changed nothing; the next call goes on where it was.
//! - Memory: two pages for each level, however much differs.

use std::ops::Range;
use std::sync::Arc;

use block::limits::HASHES_PER_PAGE;
use block::{ChunkHash, ChunkIndex, FetchError, Priority};

use crate::ImageVolume;
use crate::manifest::{PageId, Shape};
use crate::page_cache::Page;

/// Goes through the chunks of one image that differ from another's, in order.
pub struct Difference<'a> {
    base: &'a ImageVolume,
    other: &'a ImageVolume,
    /// The pages from the top down to the one that is being compared; `None` before the first step.
    open: Option<Vec<Open>>,
    /// A range of which the end is not known yet.
    pending: Option<Range<u64>>,
}

/// A place in both trees, and how far it has been compared.
struct Open {
    page: PageId,
    base: Arc<Page>,
    other: Arc<Page>,
    /// The slot to be looked at next.
    slot: usize,
}

impl Open {
    /// The next slot in which the names differ, and the two names.
    fn differing(&mut self) -> Option<(usize, ChunkHash, ChunkHash)> {
        while self.slot < HASHES_PER_PAGE {
            let (base, other) = (self.base.hash(self.slot), self.other.hash(self.slot));
            if base != other {
                return Some((self.slot, base, other));
            }
            self.slot += 1;
        }
        None
    }
}

/// The chunks of `other` that differ from those of `base`, in order and with a gap between any two ranges. What
/// `other` has beyond the end of `base` differs where it is not zero; what only `base` has does not count.
///
/// Ranges are 16 bytes each, and an image can have one for each two of its chunks: go through a [`Difference`] where
/// that may be too many.
pub async fn difference(
    base: &ImageVolume,
    other: &ImageVolume,
) -> Result<Vec<Range<ChunkIndex>>, FetchError> {
    let mut difference = Difference::new(base, other);
    let mut ranges = Vec::new();
    while let Some(range) = difference.next().await? {
        ranges.push(range);
    }
    Ok(ranges)
}

impl<'a> Difference<'a> {
    /// What [`difference()`] gives, range by range. Fetches nothing yet.
    pub fn new(base: &'a ImageVolume, other: &'a ImageVolume) -> Difference<'a> {
        Difference { base, other, open: None, pending: None }
    }

    /// The next range; `None` when there is none any more.
    pub async fn next(&mut self) -> Result<Option<Range<ChunkIndex>>, FetchError> {
        let chunks = |range: Range<u64>| ChunkIndex(range.start)..ChunkIndex(range.end);
        loop {
            let Some(chunk) = self.next_chunk().await? else {
                return Ok(self.pending.take().map(chunks));
            };
            match &mut self.pending {
                Some(range) if range.end == chunk => range.end += 1,
                pending => {
                    if let Some(range) = pending.replace(chunk..chunk + 1) {
                        return Ok(Some(chunks(range)));
                    }
                }
            }
        }
    }

    async fn next_chunk(&mut self) -> Result<Option<u64>, FetchError> {
        if self.open.is_none() {
            let top = self.top();
            self.open = Some(vec![self.open_page(top, None).await?]);
        }
        let chunk_count = self.other.root().chunk_count();
        loop {
            let Some(open) = self.open.as_mut().and_then(|path| path.last_mut()) else { return Ok(None) };
            let Some((slot, base, other)) = open.differing() else {
                self.close_page();
                continue;
            };
            let below = open.page.index * HASHES_PER_PAGE as u64 + slot as u64;
            let level = open.page.level;
            let span = if level == 0 { 1 } else { Shape::span(level - 1) };
            if below * span >= chunk_count {
                self.close_page();
                continue;
            }
            if level == 0 {
                open.slot += 1;
                return Ok(Some(below));
            }
            let page = PageId { level: level - 1, index: below };
            let opened = self.open_page(page, Some((base, other))).await?;
            let path = self.open.get_or_insert_default();
            if let Some(above) = path.last_mut() {
                above.slot += 1;
            }
            path.push(opened);
        }
    }

    fn close_page(&mut self) {
        self.open.get_or_insert_default().pop();
    }

    /// The page that would hold what the root pages hold, of the higher tree.
    fn top(&self) -> PageId {
        let levels = |volume: &ImageVolume| volume.root().shape().levels();
        PageId { level: levels(self.base).max(levels(self.other)), index: 0 }
    }

    /// Both trees' page, which has these names if it has any.
    async fn open_page(
        &self,
        page: PageId,
        names: Option<(ChunkHash, ChunkHash)>,
    ) -> Result<Open, FetchError> {
        let (base, other) = match names {
            None => (self.base.names(page, PRIORITY).await?, self.other.names(page, PRIORITY).await?),
            Some((base, other)) => futures_util::try_join!(
                self.base.names_under(page, base, PRIORITY),
                self.other.names_under(page, other, PRIORITY),
            )?,
        };
        Ok(Open { page, base, other, slot: 0 })
    }
}

/// Nobody waits for single pages of a comparison.
const PRIORITY: Priority = Priority::Background;
