//! What an initiator may send once it has logged in, and what happens between its PDUs.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iscsi::fuzz::session(input));
