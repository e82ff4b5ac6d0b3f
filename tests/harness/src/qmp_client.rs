//! A QMP client, written against the protocol text and not against the daemon's own codec.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// An error answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{class}: {description}")]
pub struct QmpError {
    /// Error class, such as `GenericError`.
    pub class: String,
    /// Text for people.
    pub description: String,
}

/// A connection in command mode.
#[derive(Debug)]
pub struct QmpClient {
    reader: BufReader<UnixStream>,
    greeting: Value,
    events: VecDeque<Value>,
}

impl QmpClient {
    /// Connects, reads the greeting and leaves negotiation mode.
    ///
    /// # Errors
    /// When the monitor does not answer as QMP says, within 10 seconds each.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("connecting {}", path.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let reader = BufReader::new(stream);
        let mut client = Self {
            reader,
            greeting: Value::Null,
            events: VecDeque::new(),
        };
        client.greeting = client.receive()?;
        ensure!(
            client.greeting["QMP"]["version"].is_object(),
            "greeting {}",
            client.greeting
        );
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// The greeting.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command and returns its `return` value.
    ///
    /// # Errors
    /// A [`QmpError`] for an error answer; anything else when the connection fails.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let message = json!({"execute": command, "arguments": arguments});
        let answer = self.exchange(&message.to_string())?;
        if let Some(error) = answer.get("error") {
            let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
            return Err(QmpError {
                class: text("class"),
                description: text("desc"),
            })
            .with_context(|| format!("command {command}"));
        }
        answer
            .get("return")
            .cloned()
            .with_context(|| format!("answer {answer} to {command}"))
    }

    /// Sends `text` as it is and returns the next answer.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn exchange(&mut self, text: &str) -> Result<Value> {
        let mut stream = self.reader.get_ref();
        stream.write_all(text.as_bytes())?;
        stream.write_all(b"\n")?;
        loop {
            let message = self.receive()?;
            if message.get("event").is_none() {
                return Ok(message);
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event of that name; earlier ones of other names are dropped.
    ///
    /// # Errors
    /// When it does not come within 10 seconds.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self
                    .receive()
                    .with_context(|| format!("waiting for {name}"))?,
            };
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// The events that came and nobody waited for.
    pub fn events(&self) -> impl Iterator<Item = &Value> {
        self.events.iter()
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self
            .reader
            .read_line(&mut line)
            .context("reading from the monitor")?
            == 0
        {
            bail!("the monitor closed the connection");
        }
        serde_json::from_str(&line).with_context(|| format!("monitor sent {line:?}"))
    }
}
