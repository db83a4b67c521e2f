//! Bounds that several crates must agree on, each with its reason.

/// Size of a chunk in bytes. A Debian boot that fetches whole 64 KiB chunks moves 1.28 times the bytes
/// that the guest reads (16 KiB: 1.07, 256 KiB: 1.75), while the hashing and framing cost per byte is
/// still that of bulk transfer.
pub const CHUNK_BYTES: usize = 64 * 1024;

/// Size of an overlay's block in bytes: the page and sector size of every guest that matters.
pub const BLOCK_BYTES: usize = 4096;

/// Chunk hashes in one page of a manifest: a page is itself a chunk.
pub const HASHES_PER_PAGE: usize = CHUNK_BYTES / 32;

/// Largest virtual disk in bytes (64 TiB): what ext4 and qcow2 users meet, and small enough that every
/// offset computation fits `u64` with room to spare.
pub const DISK_BYTES_MAX: u64 = 64 << 40;

/// Longest single read or write in bytes that an export passes to a [`Disk`](crate::Disk): the 32 MiB
/// that NBD clients may assume without negotiation.
pub const REQUEST_BYTES_MAX: usize = 32 << 20;

/// Most extents in one answer of a [`Disk`](crate::Disk): 128 KiB of them, and what one NBD reply about
/// allocation holds.
pub const EXTENTS_MAX: usize = 8192;

/// Longest name of a node, VM or image in bytes: fits a DNS label, an X.509 common name and, with a
/// directory before it, a UNIX socket path (108 bytes).
pub const NAME_BYTES_MAX: usize = 63;
