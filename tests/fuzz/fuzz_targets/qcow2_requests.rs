//! The qcow2 driver on any image: guest requests, resizing, kills.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::qcow2::run(fuzz::target::Target::Requests, input));
