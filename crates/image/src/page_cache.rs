//! Decoded manifest pages of one image volume, kept in memory.
//!
//! Invariants: at most [`SHARDS`] × [`PAGES_PER_SHARD`] pages are held. No lock is held across an await or
//! while chunk bytes are copied: a lookup clones an `Arc` under a read lock. An evicted page that is still in
//! use stays valid, it only loses its readers' hints. Eviction is second chance: a page that was used since the
//! hand last passed survives one round, which keeps a scan from throwing out the pages of a booting guest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use block::limits::HASHES_PER_PAGE;
use block::{ChunkHash, SlotHint};

use crate::manifest::{PageId, hashes_in};

/// Shards, each with a lock of its own: neighbouring pages lie in different ones, so that guests that read
/// different parts of a disk seldom meet.
const SHARDS: usize = 16;

/// Pages that one shard keeps. 128 pages in all cover 16 GiB of disk and cost 10 MiB.
const PAGES_PER_SHARD: usize = 8;

/// A decoded page: hashes, and beside each a note of where its chunk was found the last time.
pub(crate) struct Page {
    /// Empty for an all-zero page, of which a sparse image has many.
    entries: Box<[(ChunkHash, SlotHint)]>,
}

impl Page {
    /// A page in which everything is zero.
    pub(crate) fn zero() -> Page {
        Page { entries: Box::default() }
    }

    /// Decodes the bytes of a page.
    pub(crate) fn decode(bytes: &[u8]) -> Page {
        Page { entries: hashes_in(bytes).map(|hash| (hash, SlotHint::default())).collect() }
    }

    /// The entry of a slot; `None` stands for a zero chunk without a note.
    pub(crate) fn entry(&self, slot: usize) -> Option<&(ChunkHash, SlotHint)> {
        debug_assert!(slot < HASHES_PER_PAGE);
        self.entries.get(slot)
    }

    /// The hash in a slot.
    pub(crate) fn hash(&self, slot: usize) -> ChunkHash {
        self.entry(slot).map_or(ChunkHash::ZERO, |(hash, _)| *hash)
    }
}

struct Kept {
    id: PageId,
    page: Arc<Page>,
    used: AtomicBool,
}

/// The cache; see the module's text.
#[derive(Default)]
pub(crate) struct PageCache {
    shards: [RwLock<VecDeque<Kept>>; SHARDS],
}

impl PageCache {
    fn shard(&self, id: PageId) -> &RwLock<VecDeque<Kept>> {
        &self.shards[(id.index as usize).wrapping_add(id.level) % SHARDS]
    }

    /// The page, if it is here.
    pub(crate) fn get(&self, id: PageId) -> Option<Arc<Page>> {
        let shard = self.shard(id).read().unwrap_or_else(PoisonError::into_inner);
        let kept = shard.iter().find(|kept| kept.id == id)?;
        if !kept.used.load(Ordering::Relaxed) {
            kept.used.store(true, Ordering::Relaxed);
        }
        Some(Arc::clone(&kept.page))
    }

    /// Keeps a page, and gives the one to use: if two readers fetched it at once, the first one's.
    pub(crate) fn insert(&self, id: PageId, page: Page) -> Arc<Page> {
        let mut shard = self.shard(id).write().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = shard.iter().find(|kept| kept.id == id) {
            return Arc::clone(&kept.page);
        }
        while shard.len() >= PAGES_PER_SHARD {
            let Some(oldest) = shard.pop_front() else { break };
            if oldest.used.swap(false, Ordering::Relaxed) {
                shard.push_back(oldest);
            }
        }
        let page = Arc::new(page);
        shard.push_back(Kept { id, page: Arc::clone(&page), used: AtomicBool::new(false) });
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u64) -> PageId {
        PageId { level: 0, index }
    }

    #[test]
    fn the_cache_stays_bounded_and_a_used_page_survives_a_scan() {
        let cache = PageCache::default();
        cache.insert(id(0), Page::zero());
        for index in 1..10_000 {
            assert!(cache.get(id(0)).is_some(), "page 0 was used before page {index} came");
            cache.insert(id(index), Page::zero());
        }
        let held = (0..10_000).filter(|&index| cache.get(id(index)).is_some()).count();
        assert_eq!(held, SHARDS * PAGES_PER_SHARD);
    }

    #[test]
    fn two_readers_of_one_page_share_its_hints() {
        let cache = PageCache::default();
        let bytes = [1u8; 64];
        let first = cache.insert(id(3), Page::decode(&bytes));
        first.entry(1).unwrap().1.set(7);
        let second = cache.insert(id(3), Page::decode(&bytes));
        assert_eq!(second.entry(1).unwrap().1.get(), 7);
    }
}
