//! The lines that a scene prints.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A story that is being told.
#[derive(Debug)]
pub(crate) struct Story {
    begin: Instant,
}

impl Story {
    pub(crate) fn begin() -> Self {
        Self {
            begin: Instant::now(),
        }
    }

    /// Prints an event with its fields.
    pub(crate) fn tell(&mut self, event: &str, fields: &[(&str, Value)]) {
        let mut line = json!({"event": event, "ms": milliseconds(self.begin.elapsed())});
        for (name, value) in fields {
            line[*name] = value.clone();
        }
        let mut out = io::stdout().lock();
        // Whoever listened and went away learns the end from the exit status.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Prints what the guest answered.
    pub(crate) fn pass_on(&mut self, answer: &Value) {
        let name = answer["event"].as_str().unwrap_or("answer");
        let fields: Vec<_> = answer
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "event")
            .map(|(name, value)| (name.as_str(), value.clone()))
            .collect();
        self.tell(&format!("guest_{name}"), &fields);
    }
}

/// Milliseconds with one digit after the point.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
