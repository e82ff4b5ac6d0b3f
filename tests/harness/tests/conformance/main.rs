//! The conformance suite, once per driver.

use executor::sim::Image;
use harness::conformance::{Subject, concurrent_requests, failed_operations, power_cuts};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Length of the disks.
const LENGTH: usize = 1 << 20;

const IMAGE: &str = "/simulated/image";

fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    SmallRng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes
}

fn subject(name: &'static str, files: Image, definition: Value) -> Subject {
    let Value::Object(definition) = definition else {
        panic!("{definition} is not an object");
    };
    Subject {
        name,
        tables: vec![protocols::DRIVERS, formats::DRIVERS],
        files,
        definition,
        check: |_| Ok(()),
    }
}

fn file() -> Subject {
    subject(
        "file",
        Image::from([(PathBuf::from(IMAGE), noise(LENGTH))]),
        json!({"driver": "file", "node-name": "subject", "filename": IMAGE, "discard": "unmap"}),
    )
}

fn raw_window() -> Subject {
    subject(
        "raw window",
        Image::from([(PathBuf::from(IMAGE), noise(2 * LENGTH))]),
        json!({"driver": "raw", "node-name": "subject", "offset": 1024, "size": LENGTH,
            "discard": "unmap", "detect-zeroes": "unmap",
            "file": {"driver": "file", "filename": IMAGE}}),
    )
}

macro_rules! conformance {
    ($($module:ident: $subject:expr;)*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn requests_side_by_side_see_their_own_writes() {
                (0..8).for_each(|seed| concurrent_requests(&$subject, seed));
            }

            #[test]
            fn flushed_data_survives_a_power_cut() {
                (0..4).for_each(|seed| power_cuts(&$subject, seed));
            }

            #[test]
            fn failed_operations_lose_nothing_that_was_promised() {
                (0..2).for_each(|seed| failed_operations(&$subject, seed));
            }
        }
    )*};
}

conformance! {
    plain_file: file();
    window: raw_window();
}

#[test]
#[should_panic(expected = "holds")]
fn the_suite_notices_flushes_that_are_not_passed_on() {
    let mut subject = file();
    subject
        .definition
        .insert("cache".to_owned(), json!({"no-flush": true}));
    (0..4).for_each(|seed| power_cuts(&subject, seed));
}
