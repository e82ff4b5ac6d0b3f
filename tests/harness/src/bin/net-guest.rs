//! Writes the initramfs of a guest with one network card that runs a script: `net-guest SCRIPT INITRAMFS`.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use harness::net::guest::write_initramfs;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [script, initramfs] = arguments.as_slice() else {
        eprintln!("usage: net-guest SCRIPT INITRAMFS");
        return ExitCode::from(2);
    };
    match write(script, Path::new(initramfs)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(script: &str, initramfs: &Path) -> Result<()> {
    let text = std::fs::read_to_string(script).with_context(|| format!("read {script}"))?;
    write_initramfs(&text, initramfs)
}
