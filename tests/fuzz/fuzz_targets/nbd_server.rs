//! An NBD client's bytes, from the first to the last.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::nbd::run(input));
