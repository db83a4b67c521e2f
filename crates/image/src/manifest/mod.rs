//! The manifest: a Merkle tree whose pages are chunks, under one small root page.
//!
//! [`Shape`] is the arithmetic of the tree, [`RootPage`] its top. The byte layout is in `docs/formats/manifest.md`.

mod root;
mod shape;

pub(crate) use root::hashes_in;
pub use root::{ManifestError, ROOT_PAGE_BYTES_MAX, RootPage};
pub(crate) use shape::PageId;

#[cfg(test)]
mod tests;
