//! What an iSCSI target may send to our initiator: responses to a login, PDUs of a session, and what a logical
//! unit says of itself.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iscsi::fuzz::target(input));
