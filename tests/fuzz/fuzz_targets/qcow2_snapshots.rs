//! The qcow2 driver on any image: snapshots beside requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzz::qcow2::run(
    fuzz::target::Target::Snapshots,
    input
));
