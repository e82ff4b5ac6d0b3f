//! `-T`, `--trace`: which parts of the program log everything, and where the log goes.
//!
//! ```text
//!   [enable=]PATTERN[,events=FILE][,file=FILE]
//! ```
//!
//! Patterns (`*`, `?`) select the program's own targets, which `--trace help` lists; a file of events holds one pattern a line.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use qmp::keyval;
use serde::Deserialize;

/// What all `--trace` options together ask for.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    targets: Vec<&'static str>,
    /// Where the log goes instead of standard error.
    pub(crate) file: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Given {
    enable: Option<String>,
    events: Option<PathBuf>,
    file: Option<PathBuf>,
}

/// What `--trace help` prints.
pub(crate) fn help(targets: &[&str]) -> String {
    targets.iter().map(|target| format!("{target}\n")).collect()
}

impl Trace {
    /// Takes one option. A pattern without a target is worth a warning, no more.
    pub(crate) fn add(&mut self, text: &str, known: &[&'static str]) -> Result<()> {
        let failed = |error: qmp::Error| anyhow!("--trace {text}: {error}");
        let given: Given = keyval::parse_flags(text, Some("enable"))
            .and_then(qmp::Arguments::parse)
            .map_err(failed)?;
        let mut patterns: Vec<String> = given.enable.into_iter().collect();
        if let Some(path) = given.events {
            let lines = std::fs::read_to_string(&path);
            let lines = lines.with_context(|| format!("--trace {text}: {}", path.display()))?;
            let lines = lines.lines().map(str::trim);
            let wanted = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
            patterns.extend(wanted.map(str::to_owned));
        }
        for pattern in &patterns {
            let chosen = known.iter().filter(|target| matches(pattern, target));
            let before = self.targets.len();
            self.targets.extend(chosen);
            if self.targets.len() == before {
                eprintln!("warning: trace event '{pattern}' does not exist");
            }
        }
        self.file = given.file.or(self.file.take());
        Ok(())
    }

    /// The parts that log everything.
    pub(crate) fn targets(&self) -> impl Iterator<Item = &'static str> {
        self.targets.iter().copied()
    }
}

/// Whether `text` fits a pattern with `*` and `?`.
fn matches(pattern: &str, text: &str) -> bool {
    match (pattern.as_bytes(), text.as_bytes()) {
        ([], text) => text.is_empty(),
        ([b'*', ..], _) => {
            let rest = &pattern[1..];
            (0..=text.len()).any(|from| matches(rest, &text[from..]))
        }
        ([b'?', ..], [_, ..]) => matches(&pattern[1..], &text[1..]),
        ([wanted, ..], [found, ..]) => wanted == found && matches(&pattern[1..], &text[1..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_select_targets() {
        let known = ["block", "formats", "qmp"];
        let mut trace = Trace::default();
        trace.add("*o*,file=/log", &known).unwrap();
        trace.add("q?p", &known).unwrap();
        trace.add("nothing", &known).unwrap();
        assert_eq!(trace.targets().collect::<Vec<_>>(), known);
        assert_eq!(trace.file, Some("/log".into()));
        assert!(trace.add("zz=1", &known).is_err());
    }
}
