//! The qcow2 driver on any bytes: open, a script of requests, close, check, open again.
//!
//! An image that was sound stays sound, whatever is done with it, and shows what was written last.
//! Whether it was is only asked when something is wrong in the end: a check costs more than the
//! requests.

use crate::disk::{Disk, Files, check};
use crate::model::Model;
use crate::processor_time;
use crate::script::Script;
use crate::target::Target;
use block::{CheckResult, Repair};
use executor::{Config, Executor};
use std::cell::LazyCell;

/// What a check says of a mapping that does not know that it is the only one.
const ONLY_REFERENCE: &str = "OFLAG_COPIED";

thread_local! {
    static EXECUTOR: LazyCell<Executor> = LazyCell::new(|| {
        Executor::new(&Config::default()).expect("io_uring works on this machine")
    });
}

/// Runs one input of a target.
///
/// # Panics
/// When the driver breaks a promise: that is a finding.
pub fn run(target: Target, input: &[u8]) {
    let Some(script) = Script::parse(target, input) else {
        return;
    };
    in_time(run_script(target, &script));
}

/// Runs what one input asks for.
///
/// # Panics
/// When it takes too long: that is a finding.
pub(crate) fn in_time(work: impl Future<Output = ()>) {
    processor_time::bounded(|| EXECUTOR.with(|executor| executor.block_on(work)));
}

async fn run_script(target: Target, script: &Script<'_>) {
    let files = Files::new(target, script.image);
    if target != Target::Check {
        work(&files, script).await;
        return;
    }
    let before = check(&files, Repair::None, &mut Vec::new()).await;
    for repair in [Repair::Leaks, Repair::All] {
        let repaired = check(&files, repair, &mut Vec::new()).await;
        // What only leaked is right now.
        let had_leaks_only = before.is_some_and(is_sound);
        assert!(
            !had_leaks_only || repaired.is_some_and(is_sound),
            "{repair:?} of {before:?} gives {repaired:?}"
        );
    }
    let after = check(&files, Repair::None, &mut Vec::new()).await;
    if before.is_some_and(is_sound) {
        assert!(after.is_some_and(|after| is_sound(after) && after.leaks == 0));
    }
    work(&files, script).await;
}

fn is_sound(result: CheckResult) -> bool {
    result.corruptions == 0 && result.check_errors == 0
}

/// Opens the image, does the steps, closes it and opens it again.
async fn work(files: &Files, script: &Script<'_>) {
    let before = files.snapshot();
    let Some(mut disk) = Disk::open(files, script).await else {
        return;
    };
    for step in &script.steps {
        match disk.step(*step).await {
            Some(next) => disk = next,
            None => return,
        }
    }
    let mut complaint = disk.compare_with_model().await.err();
    let (closed, model) = disk.close().await;
    if closed.is_ok() && complaint.is_none() {
        complaint = still_sound(files).await.err();
    }
    if closed.is_ok() && complaint.is_none() {
        complaint = show_again(files, script, model).await.err();
    }
    if let Some(complaint) = complaint {
        let was = check(&before, Repair::None, &mut Vec::new()).await;
        let was_sound = was.is_some_and(is_sound);
        assert!(!was_sound, "a sound image: {complaint}");
    }
}

/// Whether a check finds nothing.
async fn still_sound(files: &Files) -> Result<(), String> {
    let mut findings: Vec<String> = Vec::new();
    let result = check(files, Repair::None, &mut findings).await;
    // When the input maps a cluster twice (counted twice, so sound), and one mapping goes, the
    // other one stays without the flag that says that it is the only one.
    findings.retain(|finding| !finding.contains(ONLY_REFERENCE));
    findings.retain(|finding| finding.starts_with("ERROR"));
    match result.is_some() && findings.is_empty() {
        true => Ok(()),
        false => Err(format!("became {result:?}: {findings:#?}")),
    }
}

/// Whether what was written is there when the image is opened again.
async fn show_again(files: &Files, script: &Script<'_>, model: Model) -> Result<(), String> {
    let Some(disk) = Disk::open(files, script).await else {
        return Ok(());
    };
    disk.model.replace(model);
    let compared = disk.compare_with_model().await;
    disk.read_back().await;
    // Whatever the result, closing must end.
    let _ = disk.close().await;
    compared
}
