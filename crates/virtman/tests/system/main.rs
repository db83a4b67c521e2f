//! System tests: the real binary, real guests, foreign clients, and faults.
//!
//! Everything runs on loopback and in temporary directories; every process that a test starts is ended
//! with the test, also when it fails. Guests need what `scripts/guest-image` and `scripts/iscsi-guest` build, named
//! by `VIRTMAN_GUEST_IMAGE` and `VIRTMAN_ISCSI_GUEST`; `scripts/test` sees to both.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

mod agent;
mod api;
mod cache;
mod clocks;
mod clones;
mod cluster;
mod daemons;
mod detach;
mod disks;
mod full_disk;
mod guests;
mod iscsi;
mod iscsi_guest;
mod many;
mod migrate;
mod profiles;
mod qcow2;
mod refusals;
mod remote;
mod shapes;
mod show;
mod snapshots;
mod state_files;
mod storage;
mod survive;
mod tools;
