//! PDUs of RFC 7143 §11: their headers as types, for either side of a connection.
//!
//! A header is 48 bytes whose fields lie where the types say. [`frame()`] takes a whole
//! PDU off a stream; [`seal`] makes one ready to be sent. Nothing here allocates, and every input gives an answer.

mod digest;
mod frame;
mod header;
mod types;

pub use digest::{Digest, Digests};
pub use frame::{Frame, FrameError, Seal, frame, seal};
pub use header::{Cdb, HEADER_BYTES, Header, Isid};
pub use types::*;
