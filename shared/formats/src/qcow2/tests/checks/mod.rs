//! Checks and repairs: `qemu-img check` as the oracle on damaged images, repairs under power cuts and
//! failing I/O.

mod crash;
mod hostile;
mod images;
mod peers;

use super::rig;
use crate::qcow2::check::check;
use block::{CheckOptions, CheckResult, Edge, Error, Repair};
use executor::Executor;
use executor::sim::{Config, World};
use std::path::Path;

/// Exit code and counts, as `qemu-img check` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    code: i32,
    result: CheckResult,
}

/// The image at `path` as a child.
fn edge(path: &Path) -> Edge {
    rig::image_edge(path)
}

/// Checks like the tool: after a repair that did something, once more.
async fn check_as_tool(file: &Edge, repair: Repair) -> (Result<Outcome, Error>, Vec<String>) {
    let mut messages = Vec::new();
    let first = check(file, CheckOptions::repairing(repair), &mut messages).await;
    let second = match first {
        Ok(first) if first.leaks_fixed + first.corruptions_fixed > 0 => {
            let again = check(file, CheckOptions::default(), &mut messages).await;
            again.map(|again| CheckResult {
                leaks_fixed: first.leaks_fixed,
                corruptions_fixed: first.corruptions_fixed,
                ..again
            })
        }
        other => other,
    };
    let outcome = second.map(|result| {
        let code = match result {
            CheckResult {
                check_errors: 1.., ..
            } => 1,
            CheckResult {
                corruptions: 1.., ..
            } => 2,
            CheckResult { leaks: 1.., .. } => 3,
            _ => 0,
        };
        Outcome { code, result }
    });
    (outcome, messages)
}

/// What the driver's own check finds in an image's bytes.
pub(super) fn check_bytes(bytes: &[u8]) -> (CheckResult, Vec<String>) {
    let (result, messages, _) = check_with(bytes, CheckOptions::default());
    (result, messages)
}

/// The bytes of an image after a repair, which leaves nothing wrong.
pub(super) fn repaired_bytes(bytes: &[u8]) -> Vec<u8> {
    let (result, messages, repaired) = check_with(bytes, CheckOptions::repairing(Repair::All));
    let wrong = (result.corruptions, result.leaks, result.check_errors);
    assert_eq!(wrong, (0, 0, 0), "{messages:#?}");
    repaired
}

fn check_with(bytes: &[u8], options: CheckOptions) -> (CheckResult, Vec<String>, Vec<u8>) {
    let path = Path::new("checked.qcow2");
    let world = World::with_files(Config::default(), [(path.into(), bytes.to_vec())].into());
    let mut messages = Vec::new();
    let checked = Executor::simulated(&world).block_on(async {
        let file = edge(path);
        check(&file, options, &mut messages).await
    });
    let bytes = world.files().remove(path).unwrap();
    (checked.unwrap(), messages, bytes)
}
