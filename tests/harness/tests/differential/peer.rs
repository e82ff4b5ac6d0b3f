//! The side that QEMU's tools work on.

use crate::operation::{Change, Content, NOISE, Operation, snapshot_name};
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

/// Changes the image's snapshots.
pub(crate) fn change(directory: &Path, image: &str, change: Change) {
    let (option, number) = match change {
        Change::Create(number) => ("-c", number),
        Change::Apply(number) => ("-a", number),
        Change::Delete(number) => ("-d", number),
    };
    let name = snapshot_name(number);
    run(directory, "qemu-img", &["snapshot", option, &name, image]);
}

/// What the disk showed when a snapshot was taken.
pub(crate) fn snapshot(directory: &Path, image: &str, number: u32) -> Vec<u8> {
    let name = format!("snapshot.name={}", snapshot_name(number));
    let convert = ["convert", "-f", "qcow2", "-O", "raw", "-l", &name, image];
    run(
        directory,
        "qemu-img",
        &[&convert[..], &["snapshot.raw"]].concat(),
    );
    std::fs::read(directory.join("snapshot.raw")).unwrap()
}

fn command(operation: Operation) -> String {
    match operation {
        Operation::Write { range, content } => {
            format!("write -q {} {}", source(content), place(range))
        }
        Operation::WriteCompressed { range, content } => {
            format!("write -q -c {} {}", source(content), place(range))
        }
        Operation::Zero { range, unmap } => {
            let unmap = if unmap { "-u " } else { "" };
            format!("write -q -z {unmap}{}", place(range))
        }
        Operation::Discard { range } => format!("discard -q {}", place(range)),
        Operation::Flush => "flush".to_owned(),
        Operation::Resize { length } => format!("truncate {length}"),
    }
}

fn source(content: Content) -> String {
    match content {
        Content::Fill(byte) => format!("-P {byte}"),
        Content::Noise => format!("-s {}", NOISE.0),
    }
}

fn place(range: ByteRange) -> String {
    format!("{} {}", range.offset, range.length)
}
