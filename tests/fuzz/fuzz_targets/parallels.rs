//! The parallels driver on any image: open, read, write.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::image::run("parallels", input));
