//! The qcow2 driver: open, requests, close, on any image.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::qcow2::run(input));
