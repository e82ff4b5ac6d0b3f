//! LUKS headers: described, opened, a slot erased.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::luks::run(input));
