//! What an NBD client may send as requests.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd::fuzz::requests(input));
