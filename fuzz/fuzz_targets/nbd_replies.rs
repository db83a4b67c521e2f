//! What an NBD server may answer to our client's requests.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd::fuzz::replies(input));
