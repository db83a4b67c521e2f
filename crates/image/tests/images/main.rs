//! Images end to end: files made by `qemu-img`, imported, served and read back.

#![allow(
    clippy::unwrap_used,
    reason = "clippy knows only functions with #[test] as tests, not their helpers"
)]

mod derived;
mod formats;
mod origin;
mod qcow2;
mod refusals;
mod remote;
mod sparse;
mod support;
mod volume;
