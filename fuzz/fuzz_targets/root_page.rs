//! The root page of a manifest, as a parent or Volt may hand it out.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| image::fuzz::root_page(input));
