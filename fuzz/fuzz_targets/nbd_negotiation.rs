//! What an NBD client may send while it negotiates.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd::fuzz::negotiation(input));
