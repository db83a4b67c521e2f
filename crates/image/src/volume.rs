//! An image as a node sees it: a read-only disk over verified chunks.
//!
//! Pages of the manifest are fetched when a read first needs them, top down, and a bounded number of decoded
//! ones stays in memory ([`PageCache`]). All-zero chunks and pages are known from their mark and never fetched.
//!
//! - Consistency: the root page fixes every byte, so a read has one answer, whoever gives it.
//! - Retries: none here. A [`ChunkSource`] that fails is out of options, and the read fails with it.
//! - Cancellation: dropping a read drops its fetches; nothing is half-changed, because nothing changes.
//! - Crash: there is no state to lose.

use std::sync::Arc;

use block::limits::{CHUNK_BYTES, EXTENTS_MAX, HASHES_PER_PAGE};
use block::{
    Access, BoxFuture, Chunk, ChunkHash, ChunkIndex, ChunkSource, Disk, DiskError, Extent, ExtentKind,
    FetchError, Geometry, ImageId, Priority, TryIo, WrongChunk,
};
use futures_util::stream::{FuturesUnordered, StreamExt};

use crate::RootPage;
use crate::manifest::PageId;
use crate::page_cache::{Page, PageCache};

/// Chunks that one read fetches at the same time: 1 MiB, enough to fill a link's round trip, few enough that
/// one guest's long read does not crowd out the first chunk of another's.
const FETCHES_PER_READ: usize = 16;

/// Level-0 pages that one call of `extents` looks at, so that it never fetches a whole manifest: 2 GiB of disk.
const PAGES_PER_EXTENTS: u64 = 16;

/// An image as a read-only [`Disk`].
pub struct ImageVolume {
    root: RootPage,
    id: ImageId,
    source: Arc<dyn ChunkSource>,
    pages: PageCache,
}

/// A part of a read that has to be fetched.
struct Missing<'a> {
    hash: ChunkHash,
    within: usize,
    buf: &'a mut [u8],
}

impl ImageVolume {
    /// The image under `root`, whose pages and chunks come from `source`. Fetches nothing yet.
    pub fn new(root: RootPage, source: Arc<dyn ChunkSource>) -> ImageVolume {
        ImageVolume { id: root.id(), root, source, pages: PageCache::default() }
    }

    /// The image's name.
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// The image's root page.
    pub fn root(&self) -> &RootPage {
        &self.root
    }

    /// How many level-0 pages there are; each names [`HASHES_PER_PAGE`] chunks, the last one perhaps fewer.
    pub fn page_count(&self) -> u64 {
        self.root.shape().pages_at(0)
    }

    /// The name of a data chunk, fetching pages as needed. A chunk beyond the end of the disk is padding, and
    /// so is [`ChunkHash::ZERO`].
    pub async fn chunk_hash(&self, chunk: ChunkIndex, priority: Priority) -> Result<ChunkHash, FetchError> {
        if chunk.0 >= self.root.chunk_count() {
            return Ok(ChunkHash::ZERO);
        }
        let (page, slot) = PageId::of_chunk(chunk);
        Ok(self.page(page, priority).await?.hash(slot))
    }

    /// The names of the data chunks from `page` × [`HASHES_PER_PAGE`] on that the level-0 page `page` holds,
    /// zero marks included; empty from [`ImageVolume::page_count`] on. To walk all chunks, walk the pages.
    pub async fn page_hashes(&self, page: u64, priority: Priority) -> Result<Vec<ChunkHash>, FetchError> {
        let id = PageId { level: 0, index: page };
        let count = self.root.shape().chunks_under(id) as usize;
        if count == 0 {
            return Ok(Vec::new());
        }
        let page = self.page(id, priority).await?;
        Ok((0..count).map(|slot| page.hash(slot)).collect())
    }

    /// A page, from memory or fetched together with those above it that are not in memory.
    async fn page(&self, wanted: PageId, priority: Priority) -> Result<Arc<Page>, FetchError> {
        if let Some(page) = self.pages.get(wanted) {
            return Ok(page);
        }
        let shape = self.root.shape();
        let mut path = vec![wanted];
        let mut known = None;
        let mut top = wanted;
        while known.is_none() && !shape.is_top(top) {
            top = top.parent().0;
            known = self.pages.get(top);
            path.push(top);
        }
        // The last of the path is either the page in memory or one that the root page names.
        let mut page = known;
        let mut above: Option<Arc<Page>> = None;
        for id in path.into_iter().rev() {
            let current = match page.take() {
                Some(page) => page,
                None => {
                    let hash = match &above {
                        Some(above) => above.hash(id.parent().1),
                        None => self.root.top(id),
                    };
                    self.fetch_page(id, hash, priority).await?
                }
            };
            above = Some(current);
        }
        Ok(above.expect("the path has at least the wanted page"))
    }

    /// What a page names, as if the tree went on below its end and above its top: beyond the end all is zero,
    /// and the levels above are made from the root page. So trees of different sizes can be held together.
    pub(crate) async fn names(&self, page: PageId, priority: Priority) -> Result<Arc<Page>, FetchError> {
        let shape = self.root.shape();
        if page.level < shape.levels() && page.index < shape.pages_at(page.level) {
            return self.page(page, priority).await;
        }
        if page.level >= shape.levels() && page.index == 0 {
            return Ok(Arc::new(Page::decode(&self.root.page_above_top(page.level))));
        }
        Ok(Arc::new(Page::zero()))
    }

    /// The same of a page whose name is known, so that no page above it is looked at.
    pub(crate) async fn names_under(
        &self,
        page: PageId,
        name: ChunkHash,
        priority: Priority,
    ) -> Result<Arc<Page>, FetchError> {
        let shape = self.root.shape();
        if page.level >= shape.levels() || page.index >= shape.pages_at(page.level) {
            return self.names(page, priority).await;
        }
        match self.pages.get(page) {
            Some(page) => Ok(page),
            None => self.fetch_page(page, name, priority).await,
        }
    }

    async fn fetch_page(
        &self,
        id: PageId,
        hash: ChunkHash,
        priority: Priority,
    ) -> Result<Arc<Page>, FetchError> {
        if hash.is_zero() {
            return Ok(self.pages.insert(id, Page::zero()));
        }
        let chunk = self.fetch(hash, priority).await?;
        Ok(self.pages.insert(id, Page::decode(chunk.bytes())))
    }

    /// Fetches a chunk. That a source gives another one than it was asked for is a fault in this program, but
    /// comparing names costs nothing, and a guest would get wrong bytes.
    async fn fetch(&self, hash: ChunkHash, priority: Priority) -> Result<Chunk, FetchError> {
        let chunk = self.source.fetch(hash, priority).await?;
        if chunk.hash() != hash {
            return Err(WrongChunk::Hash { expected: hash, actual: chunk.hash() }.into());
        }
        Ok(chunk)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.root.geometry().contains(offset, len) {
            return Ok(());
        }
        Err(DiskError::OutOfRange { offset, len, size_bytes: self.root.size_bytes() })
    }

    /// Copies a piece of a chunk from where it is at hand.
    fn try_piece(&self, page: &Page, slot: usize, within: usize, buf: &mut [u8]) -> TryIo {
        match page.entry(slot) {
            Some((hash, hint)) if !hash.is_zero() => self.source.try_read(hash, hint, within, buf),
            _ => {
                buf.fill(0);
                TryIo::Done
            }
        }
    }

    async fn read_all(&self, offset: u64, buf: &mut [u8]) -> Result<(), FetchError> {
        let mut missing = Vec::new();
        let mut rest = buf;
        for (chunk, within, len) in Geometry::split(offset, rest.len()) {
            let (piece, tail) = rest.split_at_mut(len);
            rest = tail;
            let (id, slot) = PageId::of_chunk(chunk);
            let page = self.page(id, Priority::Guest).await?;
            if self.try_piece(&page, slot, within, piece) == TryIo::WouldBlock {
                missing.push(Missing { hash: page.hash(slot), within, buf: piece });
            }
        }
        let mut missing = missing.into_iter();
        let mut fetches = FuturesUnordered::new();
        loop {
            while fetches.len() < FETCHES_PER_READ
                && let Some(piece) = missing.next()
            {
                fetches.push(self.fetch_piece(piece));
            }
            match fetches.next().await {
                Some(fetched) => fetched?,
                None => return Ok(()),
            }
        }
    }

    async fn fetch_piece(&self, piece: Missing<'_>) -> Result<(), FetchError> {
        let chunk = self.fetch(piece.hash, Priority::Guest).await?;
        let end = piece.within + piece.buf.len();
        piece.buf.copy_from_slice(&chunk.bytes()[piece.within..end]);
        Ok(())
    }

    async fn extents_of(&self, offset: u64, len: u64) -> Result<Vec<Extent>, FetchError> {
        let mut extents: Vec<Extent> = Vec::new();
        let page_bytes = (HASHES_PER_PAGE * CHUNK_BYTES) as u64;
        let bound = (offset / page_bytes + PAGES_PER_EXTENTS) * page_bytes;
        let end = (offset + len).min(bound);
        let mut at = offset;
        let mut current: Option<(PageId, Arc<Page>)> = None;
        while at < end {
            let chunk = ChunkIndex(at / CHUNK_BYTES as u64);
            let (id, slot) = PageId::of_chunk(chunk);
            let page = match current.take() {
                Some((kept, page)) if kept == id => page,
                _ => self.page(id, Priority::Guest).await?,
            };
            let kind = if page.hash(slot).is_zero() { ExtentKind::Hole } else { ExtentKind::Data };
            let next = end.min((chunk.0 + 1) * CHUNK_BYTES as u64);
            let is_full = extents.len() == EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.len += next - at,
                _ if is_full => break,
                _ => extents.push(Extent { len: next - at, kind }),
            }
            current = Some((id, page));
            at = next;
        }
        Ok(extents)
    }
}

fn read_only<'a>() -> BoxFuture<'a, Result<(), DiskError>> {
    Box::pin(std::future::ready(Err(DiskError::ReadOnly)))
}

impl Disk for ImageVolume {
    fn size_bytes(&self) -> u64 {
        self.root.size_bytes()
    }

    fn access(&self) -> Access {
        Access::ReadOnly
    }

    fn try_read(&self, offset: u64, buf: &mut [u8]) -> Result<TryIo, DiskError> {
        self.check(offset, buf.len() as u64)?;
        let mut rest = buf;
        for (chunk, within, len) in Geometry::split(offset, rest.len()) {
            let (piece, tail) = rest.split_at_mut(len);
            rest = tail;
            let (id, slot) = PageId::of_chunk(chunk);
            let Some(page) = self.pages.get(id) else { return Ok(TryIo::WouldBlock) };
            if self.try_piece(&page, slot, within, piece) == TryIo::WouldBlock {
                return Ok(TryIo::WouldBlock);
            }
        }
        Ok(TryIo::Done)
    }

    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        Box::pin(async move {
            self.check(offset, buf.len() as u64)?;
            self.read_all(offset, buf).await.map_err(|error| DiskError::Io(error.to_string()))
        })
    }

    fn write<'a>(&'a self, _offset: u64, _data: &'a [u8]) -> BoxFuture<'a, Result<(), DiskError>> {
        read_only()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        read_only()
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<(), DiskError>> {
        read_only()
    }

    fn flush(&self) -> BoxFuture<'_, Result<(), DiskError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn extents(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Vec<Extent>, DiskError>> {
        Box::pin(async move {
            self.check(offset, len)?;
            self.extents_of(offset, len).await.map_err(|error| DiskError::Io(error.to_string()))
        })
    }
}
