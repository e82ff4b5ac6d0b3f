//! What a program printed, sorted while it runs.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::process::{Owned, die_with_parent, lines_of};

/// What a run left behind.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The lines that were JSON objects, in order.
    pub events: Vec<Value>,
    /// All other lines.
    pub output: Vec<String>,
    /// The console: for a nested machine the kernel's messages and the script's standard error.
    pub console: String,
    /// The exit status; none if the run was cut short or ended by a signal.
    pub exit: Option<i32>,
}

impl Outcome {
    /// Runs `command` to its end, or until `timeout`; hands each line to `watch` at once.
    ///
    /// A line `@exit STATUS` stands for the status, where the process itself is only the machine around what matters.
    pub(crate) fn of(
        mut command: Command,
        timeout: Duration,
        mut watch: impl FnMut(&str),
    ) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut child = Owned(child);
        let lines = lines_of(child.0.stdout.take().context("the output is a pipe")?);
        let mut outcome = Self::default();
        let mut announced = None;
        let in_time = loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    watch(&line);
                    if let Some(status) = line.strip_prefix("@exit ") {
                        announced = status.trim().parse().ok();
                    } else {
                        outcome.take_line(line);
                    }
                }
                Err(error) => break error == std::sync::mpsc::RecvTimeoutError::Disconnected,
            }
        };
        if in_time {
            let status = child.0.wait().context("wait for the end")?;
            outcome.exit = announced.or(status.code());
        }
        Ok(outcome)
    }

    /// The first event of that name (`{"event": name, ...}`).
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.events_named(name).next()
    }

    /// All events of that name.
    pub fn events_named(&self, name: &str) -> impl Iterator<Item = &Value> {
        self.events
            .iter()
            .filter(move |event| event["event"] == name)
    }

    fn take_line(&mut self, line: String) {
        match serde_json::from_str(&line) {
            Ok(event @ Value::Object(_)) => self.events.push(event),
            _ => self.output.push(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn json_lines_are_events_and_the_announced_status_counts() {
        let script = r#"echo '{"event":"a"}'; echo text; echo '[1]'; echo '@exit 7'; exit 1"#;
        let outcome = Outcome::of(shell(script), Duration::from_secs(20), |_| ()).unwrap();
        assert!(outcome.event("a").is_some());
        assert_eq!(outcome.output, ["text", "[1]"]);
        assert_eq!(outcome.exit, Some(7));
    }

    #[test]
    fn a_run_that_takes_too_long_has_no_status() {
        let script = shell("echo begin; exec sleep 600");
        let outcome = Outcome::of(script, Duration::from_millis(200), |_| ()).unwrap();
        assert_eq!(outcome.exit, None);
    }
}
