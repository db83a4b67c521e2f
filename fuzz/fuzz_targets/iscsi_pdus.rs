//! What an initiator may send as PDUs.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iscsi::fuzz::pdus(input));
