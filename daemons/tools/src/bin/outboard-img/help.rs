//! `--help` and `--version`.

use crate::{COMMANDS, Command};
use std::io::Write;
use tools::failure::program;

const PARAMETERS: &str = "\
Common parameters:
  filename      an image: a file name, json:{...}, or options with --image-opts
  -f fmt        the format of the image; found out from its content when absent
  --object def  an object, such as a secret: secret,id=NAME,file=PATH
  -t, -T cache  none, writeback, writethrough, directsync or unsafe
  -o options    name=value,...; -o help lists them
  -U            open the image though another process uses it
  -q            print nothing but errors
  -p            show how far a long operation is; SIGUSR1 does so once
  size          bytes, or with a suffix k, M, G, T, P or E (powers of 1024)
  --allow-dir D files below directory D may be opened when an image names them
";

/// Prints the manual's short form.
pub(crate) fn show() -> u8 {
    let mut text = format!(
        "usage: {} [standard options] command [command options]\n",
        program()
    );
    text.push_str("Makes, describes and changes disk images.\n\n");
    text.push_str("  -h, --help       display this help and exit\n");
    text.push_str("  -V, --version    output version information and exit\n");
    text.push_str("  -T, --trace      accepted for compatibility\n\nCommand syntax:\n");
    for command in COMMANDS {
        text.push_str(&format!("  {} {}\n", command.name, command.usage));
    }
    text.push('\n');
    text.push_str(PARAMETERS);
    let names: Vec<&str> = engine::catalogue::drivers()
        .into_iter()
        .flatten()
        .map(|entry| entry.name)
        .collect();
    text.push_str(&format!(
        "\nSupported formats: {}\n",
        sorted(names).join(" ")
    ));
    print(&text)
}

/// Prints what a command takes.
pub(crate) fn of(command: &Command) -> u8 {
    let line = format!(
        "usage: {} {} {}\n\n",
        program(),
        command.name,
        command.usage
    );
    print(&(line + PARAMETERS))
}

/// Prints the version.
pub(crate) fn version() -> u8 {
    print(&format!(
        "{} version {}\n",
        program(),
        env!("CARGO_PKG_VERSION")
    ))
}

fn sorted(mut names: Vec<&'static str>) -> Vec<&'static str> {
    names.sort_unstable();
    names
}

fn print(text: &str) -> u8 {
    // A reader that closes its end early has seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    0
}
