//! The dmg driver on any image: open and read.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::image::run("dmg", input));
