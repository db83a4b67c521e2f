//! What the fuzz targets share.
//!
//! - [`Input`]: the fuzzer's bytes as a series of choices, for targets that go through many steps.
//! - [`frames`]: chunks, and frames of a link that the input chooses.
//! - [`NoBase`]: what lies below an overlay that is on its own.

mod base;
pub mod frames;
mod input;

pub use base::NoBase;
pub use input::Input;
