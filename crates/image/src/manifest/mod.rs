//! The manifest: a Merkle tree whose pages are chunks, under one small root page.
//!
//! [`Shape`] is the arithmetic of the tree, [`RootPage`] its top. The byte layout is in `docs/formats/manifest.md`.

mod root;
mod shape;

pub use root::{ManifestError, ROOT_PAGE_BYTES_MAX, RootPage};
pub(crate) use root::{hashes_in, page_of};
pub(crate) use shape::{HASH_BYTES, PageId, Shape};

#[cfg(test)]
mod tests;
