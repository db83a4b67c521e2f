//! Entries for fuzzers: each throws foreign bytes at one parser. None may panic, whatever comes.
