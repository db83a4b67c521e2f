//! What an initiator may send to log in.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iscsi::fuzz::login(input));
