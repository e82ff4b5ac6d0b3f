//! QEMU's tools as the oracle for image files.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::process::installed;

/// The Debian package that holds the tools.
const PACKAGE: &str = "qemu-utils";

/// Creates an image with `qemu-img create`; `options` is what follows `-o`, may be empty.
///
/// # Errors
/// When qemu-img fails or is missing.
pub fn create(format: &str, path: &Path, bytes: u64, options: &str) -> Result<()> {
    let size = bytes.to_string();
    let mut arguments = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    let path = text(path)?;
    arguments.extend([path, &size]);
    run("qemu-img", &arguments).map(drop)
}

/// `qemu-img check` finds nothing, not even a leaked cluster.
///
/// # Errors
/// What it finds.
pub fn check(format: &str, path: &Path) -> Result<()> {
    run("qemu-img", &["check", "-q", "-f", format, text(path)?]).map(drop)
}

/// `qemu-img check` finds no corruption; clusters that an unclean end leaked are allowed.
///
/// # Errors
/// What it finds.
pub fn check_allowing_leaks(format: &str, path: &Path) -> Result<()> {
    let arguments = ["check", "--output=json", "-f", format, text(path)?];
    let program = installed("qemu-img", PACKAGE)?;
    let output = Command::new(program)
        .args(arguments)
        .output()
        .context("qemu-img check")?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{}", String::from_utf8_lossy(&output.stderr)))?;
    let none = |key: &str| report.get(key).and_then(Value::as_u64).unwrap_or(0) == 0;
    ensure!(
        none("corruptions") && none("check-errors"),
        "qemu-img check: {report}"
    );
    Ok(())
}

/// Both images show a guest the same bytes.
///
/// # Errors
/// Where they differ.
pub fn compare(one: (&str, &Path), other: (&str, &Path)) -> Result<()> {
    let (one, one_format, other, other_format) = (text(one.1)?, one.0, text(other.1)?, other.0);
    run(
        "qemu-img",
        &["compare", "-f", one_format, "-F", other_format, one, other],
    )
    .map(drop)
}

/// `qemu-img info --output=json`.
///
/// # Errors
/// When qemu-img fails or is missing.
pub fn info(format: &str, path: &Path) -> Result<Value> {
    let output = run(
        "qemu-img",
        &["info", "--output=json", "-f", format, text(path)?],
    )?;
    serde_json::from_str(&output).context("output of qemu-img info")
}

/// `qemu-img map --output=json`.
///
/// # Errors
/// When qemu-img fails or is missing.
pub fn map(format: &str, path: &Path) -> Result<Value> {
    let output = run(
        "qemu-img",
        &["map", "--output=json", "-f", format, text(path)?],
    )?;
    serde_json::from_str(&output).context("output of qemu-img map")
}

/// Runs `qemu-io` commands one after the other.
///
/// # Errors
/// When one fails, qemu-io's `-c` commands included.
pub fn io(format: &str, path: &Path, commands: &[&str]) -> Result<String> {
    let mut arguments = vec!["-f", format];
    commands
        .iter()
        .for_each(|command| arguments.extend(["-c", command]));
    arguments.push(text(path)?);
    run("qemu-io", &arguments)
}

/// Runs a tool to its end and returns its standard output.
///
/// # Errors
/// When it is missing or fails, with its output.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let path = installed(program, PACKAGE)?;
    let output = Command::new(path)
        .args(arguments)
        .output()
        .with_context(|| program.to_owned())?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(stdout)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("the path is not UTF-8")
}
