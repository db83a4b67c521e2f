//! A boot profile, as a user may import it or a node may hand it in.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| image::fuzz::boot_profile(input));
