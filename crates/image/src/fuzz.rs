//! Entry points for fuzzing: each takes any bytes and panics only if an invariant is broken.

use crate::{BootProfile, RootPage};

/// Decodes a root page; what is accepted must be in canonical form.
pub fn root_page(bytes: &[u8]) {
    if let Ok(root) = RootPage::decode(bytes) {
        assert_eq!(root.encode(), bytes, "a root page has one form only");
    }
}

/// Decodes a boot profile; what is accepted must be in canonical form.
pub fn boot_profile(bytes: &[u8]) {
    if let Ok(profile) = BootProfile::decode(bytes) {
        assert_eq!(profile.encode(), bytes, "a boot profile has one form only");
    }
}

/// Parses the header of a qcow2 image.
pub fn qcow2_header(bytes: &[u8]) {
    crate::source::parse_any_qcow2(bytes);
}
