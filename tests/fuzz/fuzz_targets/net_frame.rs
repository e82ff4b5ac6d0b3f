//! A guest's frame: header check, guard, checksum, segmentation.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::net_frame::run(input));
