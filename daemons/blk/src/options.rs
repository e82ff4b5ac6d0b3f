//! The command line: what runs in order, and what holds for the whole process.
//!
//! Spelled as `qemu-storage-daemon` spells it: `--name value` or `--name=value`. Values of ordered
//! options are parsed when their turn comes, so that errors come in order too.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use qmp::{Arguments, keyval};
use vhost_daemon::sandbox::Mode;

/// What the process is asked to be.
#[derive(Debug)]
pub(crate) enum Invocation {
    /// Print the manual.
    Help,
    /// Print the object types.
    ObjectHelp,
    /// Print the version.
    Version,
    /// Serve.
    Run(Box<CommandLine>),
}

/// Everything the daemon is told.
#[derive(Debug, Default)]
pub(crate) struct CommandLine {
    /// `--blockdev`, `--object`, ... in order.
    pub(crate) steps: Vec<Step>,
    /// `--daemonize`
    pub(crate) daemonize: bool,
    /// `--pidfile`
    pub(crate) pidfile: Option<PathBuf>,
    /// `--sandbox`
    pub(crate) sandbox: Mode,
    /// `--allow-dir`, each.
    pub(crate) allowed_dirs: Vec<PathBuf>,
    /// `--redo-dir`
    pub(crate) redo_dir: Option<PathBuf>,
    /// `--log-level`
    pub(crate) log_level: Option<String>,
}

/// An option that makes something.
#[derive(Debug)]
pub(crate) struct Step {
    /// What it makes.
    pub(crate) kind: StepKind,
    /// Its value as given.
    pub(crate) text: String,
}

/// The ordered options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind {
    /// A node.
    Blockdev,
    /// A character device for a monitor.
    Chardev,
    /// An export.
    Export,
    /// A QMP server on a character device.
    Monitor,
    /// An iothread.
    Object,
}

impl StepKind {
    const ALL: [Self; 5] = [
        Self::Blockdev,
        Self::Chardev,
        Self::Export,
        Self::Monitor,
        Self::Object,
    ];

    /// The option's name.
    pub(crate) fn option(self) -> &'static str {
        match self {
            Self::Blockdev => "blockdev",
            Self::Chardev => "chardev",
            Self::Export => "export",
            Self::Monitor => "monitor",
            Self::Object => "object",
        }
    }

    /// The key of a first part without `=`.
    fn implied_key(self) -> &'static str {
        match self {
            Self::Blockdev => "driver",
            Self::Chardev => "backend",
            Self::Export => "type",
            Self::Monitor => "chardev",
            Self::Object => "qom-type",
        }
    }
}

impl Step {
    /// Its value taken apart.
    pub(crate) fn arguments(&self) -> qmp::Result<Arguments> {
        keyval::parse(&self.text, Some(self.kind.implied_key()))
    }

    /// How error messages name it.
    pub(crate) fn shown(&self) -> String {
        format!("--{} {}", self.kind.option(), self.text)
    }
}

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation> {
    let mut arguments = arguments.map(|argument| {
        let utf8 = argument.into_string();
        utf8.map_err(|raw| anyhow!("{}: not valid UTF-8", raw.display()))
    });
    let mut command_line = CommandLine::default();
    while let Some(argument) = arguments.next().transpose()? {
        let (name, inline) = match (argument.as_str(), argument.strip_prefix("--")) {
            ("-h", _) => ("help", None),
            ("-V", _) => ("version", None),
            (_, Some(long)) => match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            },
            (short, None) if short.starts_with('-') => bail!("unrecognized option '{short}'"),
            _ => bail!("{argument}: Unexpected argument"),
        };
        match name {
            "help" | "version" | "daemonize" if inline.is_some() => {
                bail!("option '--{name}' doesn't allow an argument");
            }
            "help" => return Ok(Invocation::Help),
            "version" => return Ok(Invocation::Version),
            "daemonize" => command_line.daemonize = true,
            _ => {
                let mut value = || match inline.clone() {
                    Some(value) => Ok(value),
                    None => arguments
                        .next()
                        .unwrap_or_else(|| bail!("option '--{name}' requires an argument")),
                };
                if command_line.take(name, &mut value)? == Taken::ObjectHelp {
                    return Ok(Invocation::ObjectHelp);
                }
            }
        }
    }
    Ok(Invocation::Run(Box::new(command_line)))
}

/// What an option was.
#[derive(PartialEq, Eq)]
enum Taken {
    Setting,
    ObjectHelp,
}

impl CommandLine {
    fn take(&mut self, name: &str, value: &mut dyn FnMut() -> Result<String>) -> Result<Taken> {
        if let Some(kind) = StepKind::ALL.into_iter().find(|kind| kind.option() == name) {
            let text = value()?;
            if kind == StepKind::Object && (text == "help" || text.ends_with(",help")) {
                return Ok(Taken::ObjectHelp);
            }
            self.steps.push(Step { kind, text });
            return Ok(Taken::Setting);
        }
        match name {
            "pidfile" => self.pidfile = Some(value()?.into()),
            "allow-dir" => self.allowed_dirs.push(value()?.into()),
            "redo-dir" => self.redo_dir = Some(value()?.into()),
            "log-level" => self.log_level = Some(value()?),
            "sandbox" => {
                self.sandbox = match value()?.as_str() {
                    "on" => Mode::On,
                    "strict" => Mode::Strict,
                    "off" => Mode::Off,
                    other => bail!("--sandbox {other}: expected 'on', 'strict' or 'off'"),
                }
            }
            _ => bail!("unrecognized option '--{name}'"),
        }
        Ok(Taken::Setting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Result<CommandLine> {
        match parse(arguments.iter().map(OsString::from))? {
            Invocation::Run(command_line) => Ok(*command_line),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn ordered_options_keep_their_order() {
        let parsed = run(&[
            "--object=iothread,id=a",
            "--blockdev",
            "null-co",
            "--daemonize",
        ]);
        let parsed = parsed.unwrap();
        let shown: Vec<_> = parsed.steps.iter().map(Step::shown).collect();
        assert_eq!(shown, ["--object iothread,id=a", "--blockdev null-co"]);
        assert!(parsed.daemonize);
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, expected) in [
            (&["--zz"][..], "unrecognized option '--zz'"),
            (&["-z"], "unrecognized option '-z'"),
            (&["foo"], "foo: Unexpected argument"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["--help=x"], "option '--help' doesn't allow an argument"),
            (
                &["--sandbox", "x"],
                "--sandbox x: expected 'on', 'strict' or 'off'",
            ),
        ] {
            assert_eq!(run(arguments).unwrap_err().to_string(), expected);
        }
    }
}
