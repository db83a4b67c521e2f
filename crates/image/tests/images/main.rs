//! Images end to end: files made by `qemu-img`, imported, served and read back.

#![allow(
    clippy::unwrap_used,
    reason = "clippy knows only functions with #[test] as tests, not their helpers"
)]

mod formats;
mod origin;
mod refusals;
mod remote;
mod support;
mod volume;
