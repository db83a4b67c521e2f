//! Fetches the chunks of a boot profile into the cache, in their order.
//!
//! The pages of the manifest that name the chunks are fetched beside the chunks, as far ahead as the window
//! allows, since a guest needs them as much. What is all zero or in the cache already costs nothing.
//!
//! Consistency: none to keep; a chunk that is here is one fetch less for a guest. Retries: the source's own;
//! a chunk that it gives up is passed over and counted. Cancellation: dropping the future withdraws what is under
//! way, unless a guest waits for it too. Crash: what was fetched is in the cache, and is passed over next time.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;

use block::limits::HASHES_PER_PAGE;
use block::{ChunkIndex, ChunkSource, Priority};
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use image::ImageVolume;
use planner::Role;
use store::CacheGroup;
use tokio::sync::watch;

use super::windows::Windows;

/// Pages of the manifest that are fetched at a time: with all of a 4 GiB disk's under way no chunk waits for
/// more than one round trip of pages.
const PAGES_AT_ONCE: usize = 32;

/// Chunks whose names are looked up at a time. Lookups are local once their page is here.
const NAMES_AT_ONCE: usize = 64;

/// Where the chunks of an image come from and go to.
#[derive(Clone)]
pub(crate) struct FetchPath {
    pub(crate) volume: Arc<ImageVolume>,
    /// The image's chunks, through the cache.
    pub(crate) source: Arc<dyn ChunkSource>,
    pub(crate) cache: Arc<CacheGroup>,
    /// How many stripes the image's hierarchy has at present.
    pub(crate) stripes: watch::Receiver<usize>,
    /// What this node is for the image at present: an origin has every chunk.
    pub(crate) role: Arc<dyn Fn() -> Role + Send + Sync>,
}

impl FetchPath {
    /// Gets these chunks into the cache; `here` is called for each one that is, fetched or found. Returns how
    /// many could not be had.
    pub(crate) async fn stream(
        &self,
        chunks: &[ChunkIndex],
        priority: Priority,
        mut here: impl FnMut(),
    ) -> usize {
        let mut stripes = self.stripes.clone();
        let mut windows = Windows::new(*stripes.borrow_and_update());
        let mut fetches = FuturesUnordered::new();
        let mut seen = HashSet::with_capacity(chunks.len());
        let mut failed = 0;
        let mut pages = pin!(self.pages(chunks, priority));
        let mut pages_are_here = false;
        let names = stream::iter(0..chunks.len()).map(|at| self.volume.chunk_hash(chunks[at], priority));
        let mut names = names.buffered(NAMES_AT_ONCE);
        let mut all_named = false;
        loop {
            while let Some(chunk) = windows.next() {
                if self.cache.holds(&chunk) {
                    windows.done(&chunk);
                    here();
                } else {
                    fetches.push(async move { (chunk, self.source.fetch(chunk, priority).await) });
                }
            }
            if all_named && fetches.is_empty() {
                return failed;
            }
            tokio::select! {
                () = &mut pages, if !pages_are_here => pages_are_here = true,
                name = names.next(), if !all_named => match name {
                    // Equal chunks are one chunk.
                    Some(Ok(name)) if name.is_zero() || !seen.insert(name) => here(),
                    Some(Ok(name)) => windows.push(name),
                    Some(Err(error)) => {
                        tracing::debug!(%error, "a page of the manifest could not be fetched ahead");
                        failed += 1;
                    }
                    None => all_named = true,
                },
                Some((chunk, fetched)) = fetches.next(), if !fetches.is_empty() => {
                    windows.done(&chunk);
                    match fetched {
                        Ok(_) => here(),
                        Err(error) => {
                            tracing::debug!(%chunk, %error, "a chunk could not be fetched ahead");
                            failed += 1;
                        }
                    }
                }
                Ok(()) = stripes.changed() => windows.set_stripes(*stripes.borrow_and_update()),
            }
        }
    }

    /// Gets the pages that name these chunks, in the order in which they are needed. A page that cannot be had
    /// is noticed by whoever looks up a name in it.
    async fn pages(&self, chunks: &[ChunkIndex], priority: Priority) {
        let mut seen = HashSet::new();
        let pages = chunks.iter().map(|chunk| chunk.0 / HASHES_PER_PAGE as u64);
        let first: Vec<u64> = pages.filter(|page| seen.insert(*page)).collect();
        let fetch = async |page| {
            let _ = self.volume.page_hashes(page, priority).await;
        };
        stream::iter(first).for_each_concurrent(PAGES_AT_ONCE, fetch).await;
    }
}
