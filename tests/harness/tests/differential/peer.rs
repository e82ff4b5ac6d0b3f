//! The side that QEMU's tools work on.

use crate::operation::Operation;
use block::ByteRange;
use std::path::Path;
use std::process::Command;

/// Runs one of QEMU's programs in `directory`.
pub(crate) fn run(directory: &Path, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error} (scripts/setup installs it)"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    let failed = !output.status.success();
    assert!(!failed, "{program} {arguments:?}: {out}{error}");
}

/// Does the operations in order, in one run of qemu-io.
pub(crate) fn apply(directory: &Path, image: &str, operations: &[Operation]) {
    let commands: Vec<String> = operations.iter().copied().map(command).collect();
    let mut arguments = vec!["-f", "qcow2", "-d", "unmap"];
    for command in &commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    run(directory, "qemu-io", &arguments);
}

fn command(operation: Operation) -> String {
    match operation {
        Operation::Write { range, fill } => format!("write -q -P {fill} {}", place(range)),
        Operation::Zero { range, unmap } => {
            let unmap = if unmap { "-u " } else { "" };
            format!("write -q -z {unmap}{}", place(range))
        }
        Operation::Discard { range } => format!("discard -q {}", place(range)),
        Operation::Flush => "flush".to_owned(),
        Operation::Resize { length } => format!("truncate {length}"),
    }
}

fn place(range: ByteRange) -> String {
    format!("{} {}", range.offset, range.length)
}
