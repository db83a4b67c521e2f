//! Entry points for fuzzing: each takes any bytes and panics only if an invariant is broken.

use crate::RootPage;

/// Decodes a root page; what is accepted must be in canonical form.
pub fn root_page(bytes: &[u8]) {
    if let Ok(root) = RootPage::decode(bytes) {
        assert_eq!(root.encode(), bytes, "a root page has one form only");
    }
}
