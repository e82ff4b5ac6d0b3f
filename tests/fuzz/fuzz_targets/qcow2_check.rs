//! The qcow2 driver on any image: check and repair, then requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::qcow2::run(fuzz::target::Target::Check, input));
