//! What the tests of several crates share, so that no crate includes or copies another's tests.
//!
//! Whatever fails here fails the test that asked, with a panic: nothing returns an error. It knows `block` and none of
//! the crates that use it: what needs an export, an image or a cache stays in their own tests.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

pub mod counting_guest;
pub mod foreign;
pub mod memory_disk;
pub mod ports;
pub mod tgt;
