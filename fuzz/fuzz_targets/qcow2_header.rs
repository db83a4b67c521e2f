//! The header of a qcow2 file that somebody adds.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| image::fuzz::qcow2_header(input));
