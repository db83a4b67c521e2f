//! What an initiator may send as SCSI commands.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iscsi::fuzz::commands(input));
