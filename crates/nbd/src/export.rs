//! What a server serves.

use std::any::Any;
use std::sync::Arc;

use block::{Access, Disk};

use crate::proto::{Framing, transmission};

/// A disk under a name.
#[derive(Clone)]
pub struct Export {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// A line for people; empty if there is none.
    pub description: String,
    /// Dropped when the connection that opened the export ends.
    pub lease: Option<Lease>,
}

/// What its owner sees dropped when a connection ends, to know who has an export open.
pub type Lease = Arc<dyn Any + Send + Sync>;

/// An entry in the list of exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The name to open it by.
    pub name: String,
    /// A line for people; empty if there is none.
    pub description: String,
}

/// The exports of a server. Both methods answer at once: they run inside the negotiation.
pub trait Exports: Send + Sync {
    /// The export of this name; the empty name means the default export, if there is one. The name is
    /// the client's: any UTF-8 of at most [`STRING_BYTES_MAX`](crate::limits::STRING_BYTES_MAX) bytes.
    fn open(&self, name: &str) -> Option<Export>;

    /// The exports that a client may see.
    fn list(&self) -> Vec<Listing>;
}

/// Preferred I/O size in bytes of a disk that takes writes: the block of an overlay.
const PREFERRED_BYTES_WRITABLE: u32 = block::limits::BLOCK_BYTES as u32;

/// Preferred I/O size in bytes of a read-only disk: the chunk of an image.
const PREFERRED_BYTES_READ_ONLY: u32 = block::limits::CHUNK_BYTES as u32;

impl Export {
    /// A disk without a description, of which nobody needs to know who has it open.
    pub fn new(disk: Arc<dyn Disk>) -> Export {
        Export { disk, description: String::new(), lease: None }
    }

    /// The transmission flags. A flush covers all connections, because it is the disk's.
    pub(crate) fn transmission_flags(&self, framing: Framing) -> u16 {
        use transmission::*;
        let mut flags = HAS_FLAGS | CAN_MULTI_CONN | SEND_FLUSH | SEND_FUA | SEND_CACHE;
        flags |= match self.disk.access() {
            Access::ReadOnly => READ_ONLY,
            Access::ReadWrite => SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO,
        };
        if framing != Framing::Simple {
            flags |= SEND_DF;
        }
        flags
    }

    /// The I/O size in bytes that the client had best use.
    pub(crate) fn preferred_bytes(&self) -> u32 {
        match self.disk.access() {
            Access::ReadOnly => PREFERRED_BYTES_READ_ONLY,
            Access::ReadWrite => PREFERRED_BYTES_WRITABLE,
        }
    }
}
