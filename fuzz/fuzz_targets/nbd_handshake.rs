//! What an NBD server may answer while our client negotiates.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbd::fuzz::handshake(input));
