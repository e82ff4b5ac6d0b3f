//! The command line: what runs in order, and what holds for the whole process.
//!
//! Spelled as `qemu-storage-daemon` spells it: `--name value` or `--name=value`. Values of ordered
//! options are parsed when their turn comes, so that errors come in order too.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};
use qmp::{Arguments, Error, keyval};
use vhost_daemon::sandbox::Mode;

use crate::chardev::BACKENDS;
use crate::trace::{self, Trace};

/// An ordered option of a daemon's own.
#[derive(Clone, Copy, Debug)]
pub struct StepOption<K: 'static> {
    /// Its name without dashes.
    pub name: &'static str,
    /// The key of a first part without `=`; empty when there is none.
    pub implied_key: &'static str,
    /// What it is to the daemon.
    pub kind: K,
}

/// What a daemon's command line knows beside what all have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Syntax<K: 'static> {
    /// Ordered options.
    pub(crate) steps: &'static [StepOption<K>],
    /// Options with a value that hold for the whole process.
    pub(crate) settings: &'static [&'static str],
    /// What `--object` prints when its value asks for help.
    pub(crate) object_help: fn(&str) -> Option<String>,
    /// Parts of the program that `--trace` can name.
    pub(crate) trace_targets: &'static [&'static str],
}

/// What the process is asked to be.
#[derive(Debug)]
pub(crate) enum Invocation<K> {
    /// Print the manual.
    Help,
    /// Print this, and end.
    Shown(String),
    /// Print the version.
    Version,
    /// Serve.
    Run(Box<CommandLine<K>>),
}

/// Everything the daemon is told.
#[derive(Debug)]
pub(crate) struct CommandLine<K> {
    /// `--blockdev`, `--object`, ... in order.
    pub(crate) steps: Vec<Step<K>>,
    /// `--daemonize`
    pub(crate) daemonize: bool,
    /// `--pidfile`
    pub(crate) pidfile: Option<PathBuf>,
    /// `--sandbox`
    pub(crate) sandbox: Mode,
    /// `--log-level`
    pub(crate) log_level: Option<String>,
    /// `--trace`
    pub(crate) trace: Trace,
    /// `--allow-dir` and the daemon's own settings.
    pub(crate) options: Options,
}

/// Options that hold for the whole process.
#[derive(Debug, Default)]
pub struct Options {
    /// `--allow-dir`, each.
    pub allowed_dirs: Vec<PathBuf>,
    settings: Vec<(&'static str, String)>,
}

impl Options {
    /// The value given last to one of [`crate::Program::settings`].
    pub fn setting(&self, name: &str) -> Option<&str> {
        let given = self.settings.iter().rev().find(|(known, _)| *known == name);
        given.map(|(_, value)| value.as_str())
    }

    /// The value given last, as a path.
    pub fn path(&self, name: &str) -> Option<&Path> {
        self.setting(name).map(Path::new)
    }
}

/// An option that makes something.
#[derive(Debug)]
pub struct Step<K> {
    /// What it makes.
    pub(crate) kind: StepKind<K>,
    name: &'static str,
    implied_key: &'static str,
    text: String,
}

/// The ordered options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StepKind<K> {
    /// A character device for a monitor.
    Chardev,
    /// A QMP server on a character device.
    Monitor,
    /// Both in one.
    Qmp,
    /// The daemon's own.
    Own(K),
}

impl<K> Step<K> {
    /// Its value taken apart.
    pub(crate) fn arguments(&self) -> qmp::Result<Arguments> {
        let is_json = self.text.starts_with('{');
        if !is_json && (self.text == "help" || self.text.ends_with(",help")) {
            return Err(Error::generic("Help is not available for this option"));
        }
        match self.kind {
            // Its keys do not nest, and flags may stand alone.
            StepKind::Chardev if !is_json => {
                keyval::parse_flags(&self.text, Some(self.implied_key))
            }
            _ => {
                let implied = Some(self.implied_key).filter(|key| !key.is_empty());
                keyval::parse(&self.text, implied)
            }
        }
    }

    /// How error messages name it.
    pub(crate) fn shown(&self) -> String {
        format!("--{} {}", self.name, self.text)
    }
}

/// Ordered options of every daemon: name, implied key, kind.
fn common<K>() -> [(&'static str, &'static str, StepKind<K>); 3] {
    [
        ("chardev", "backend", StepKind::Chardev),
        ("monitor", "chardev", StepKind::Monitor),
        ("qmp", "path", StepKind::Qmp),
    ]
}

/// Parses the arguments after the program's name.
pub(crate) fn parse<K: Copy>(
    syntax: &Syntax<K>,
    arguments: impl Iterator<Item = OsString>,
) -> Result<Invocation<K>> {
    let mut arguments = arguments.map(|argument| {
        let utf8 = argument.into_string();
        utf8.map_err(|raw| anyhow!("{}: not valid UTF-8", raw.display()))
    });
    let mut command_line = CommandLine {
        steps: Vec::new(),
        daemonize: false,
        pidfile: None,
        sandbox: Mode::default(),
        log_level: None,
        trace: Trace::default(),
        options: Options::default(),
    };
    while let Some(argument) = arguments.next().transpose()? {
        let (name, inline) = split_name(&argument)?;
        let name = syntax.full_name(name)?;
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
                if let Some(text) = command_line.take(syntax, name, &mut value)? {
                    return Ok(Invocation::Shown(text));
                }
            }
        }
    }
    Ok(Invocation::Run(Box::new(command_line)))
}

/// An option's name, in its long form and perhaps shortened, and a value that is part of the argument.
fn split_name(argument: &str) -> Result<(&str, Option<String>)> {
    if let Some(long) = argument.strip_prefix("--") {
        return Ok(match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        });
    }
    let mut letters = argument.strip_prefix('-').unwrap_or_default().chars();
    match (letters.next(), letters.as_str()) {
        (Some('h'), _) => Ok(("help", None)),
        (Some('V'), _) => Ok(("version", None)),
        (Some('T'), "") => Ok(("trace", None)),
        (Some('T'), value) => Ok(("trace", Some(value.to_owned()))),
        (Some(other), _) => bail!("invalid option -- '{other}'"),
        (None, _) => bail!("{argument}: Unexpected argument"),
    }
}

/// Options of every daemon, beside [`common`].
const COMMON: [&str; 8] = [
    "help",
    "version",
    "daemonize",
    "trace",
    "pidfile",
    "allow-dir",
    "log-level",
    "sandbox",
];

impl<K: Copy> Syntax<K> {
    /// The option that `name` is, or is the beginning of.
    fn full_name(&self, name: &str) -> Result<&'static str> {
        let steps = self.steps.iter().map(|step| step.name);
        let ordered = common::<K>().into_iter().map(|step| step.0);
        let settings = self.settings.iter().copied();
        let all = COMMON
            .into_iter()
            .chain(ordered)
            .chain(steps)
            .chain(settings);
        let fitting: Vec<_> = all.filter(|known| known.starts_with(name)).collect();
        match fitting.as_slice() {
            [] => bail!("unrecognized option '--{name}'"),
            [only] => Ok(only),
            several => match several.iter().find(|known| **known == name) {
                Some(exact) => Ok(exact),
                None => {
                    let shown = several.iter().map(|known| format!(" '--{known}'"));
                    let shown: String = shown.collect();
                    bail!("option '--{name}' is ambiguous; possibilities:{shown}")
                }
            },
        }
    }
}

impl<K: Copy> CommandLine<K> {
    /// Takes an option with a value; gives the help that the value asks for.
    fn take(
        &mut self,
        syntax: &Syntax<K>,
        name: &str,
        value: &mut dyn FnMut() -> Result<String>,
    ) -> Result<Option<String>> {
        let own = syntax.steps.iter();
        let own = own.map(|step| (step.name, step.implied_key, StepKind::Own(step.kind)));
        let step = common().into_iter().chain(own).find(|step| step.0 == name);
        if let Some((name, implied_key, kind)) = step {
            let text = value()?;
            if name == "object"
                && let Some(help) = (syntax.object_help)(&text)
            {
                return Ok(Some(help));
            }
            if name == "chardev" && text == "help" {
                let names = BACKENDS.iter().map(|name| format!("  {name}\n"));
                let list: String = names.collect();
                return Ok(Some(format!("Available chardev backend types: \n{list}")));
            }
            self.steps.push(Step {
                kind,
                name,
                implied_key,
                text,
            });
            return Ok(None);
        }
        if let Some(name) = syntax.settings.iter().find(|known| **known == name) {
            self.options.settings.push((name, value()?));
            return Ok(None);
        }
        match name {
            "trace" => match value()?.as_str() {
                "help" => return Ok(Some(trace::help(syntax.trace_targets))),
                text => self.trace.add(text, syntax.trace_targets)?,
            },
            "pidfile" => self.pidfile = Some(value()?.into()),
            "allow-dir" => self.options.allowed_dirs.push(value()?.into()),
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
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYNTAX: Syntax<()> = Syntax {
        steps: &[
            StepOption {
                name: "object",
                implied_key: "qom-type",
                kind: (),
            },
            StepOption {
                name: "blockdev",
                implied_key: "driver",
                kind: (),
            },
        ],
        settings: &["redo-dir"],
        object_help: |_| None,
        trace_targets: &["block"],
    };

    fn run(arguments: &[&str]) -> Result<CommandLine<()>> {
        match parse(&SYNTAX, arguments.iter().map(OsString::from))? {
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
            "--qmp=/q",
            "--daemonize",
        ]);
        let parsed = parsed.unwrap();
        let shown: Vec<_> = parsed.steps.iter().map(Step::shown).collect();
        assert_eq!(
            shown,
            ["--object iothread,id=a", "--blockdev null-co", "--qmp /q"]
        );
        assert!(parsed.daemonize);
    }

    #[test]
    fn the_last_of_equal_settings_holds() {
        let parsed = run(&["--redo-dir", "/a", "--allow-dir=/x", "--redo-dir=/b"]).unwrap();
        assert_eq!(parsed.options.path("redo-dir"), Some(Path::new("/b")));
        assert_eq!(parsed.options.setting("other"), None);
        assert_eq!(parsed.options.allowed_dirs, [Path::new("/x")]);
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, expected) in [
            (&["--zz"][..], "unrecognized option '--zz'"),
            (&["-z"], "invalid option -- 'z'"),
            (&["--o=a", "-z"], "invalid option -- 'z'"),
            (&["foo"], "foo: Unexpected argument"),
            (&["--blockdev"], "option '--blockdev' requires an argument"),
            (&["--redo-dir"], "option '--redo-dir' requires an argument"),
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
