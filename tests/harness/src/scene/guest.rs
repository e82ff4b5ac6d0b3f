//! A running guest: its VMM's process, and the conversation over its console.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::Boot;
use crate::nested::{Owned, die_with_parent, lines_of};
use crate::qmp_client::QmpClient;

/// How long a guest may take for one answer. Emulation on a busy machine is slow; a hung guest is caught all the same.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Console lines that an error message quotes.
const QUOTED_LINES: usize = 30;

/// A guest whose console is answered by the program `guest-load`.
#[derive(Debug)]
pub struct Guest {
    vmm: Owned,
    input: ChildStdin,
    console: Receiver<String>,
    seen: Vec<String>,
    qmp_socket: PathBuf,
}

impl Guest {
    /// Starts the VMM; its sockets go into `directory`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(boot: &Boot, directory: &Path) -> Result<Self> {
        let qmp_socket = directory.join("vmm-qmp.sock");
        let mut command = boot.command(&qmp_socket);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        die_with_parent(&mut command);
        let vmm = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let mut vmm = Owned(vmm);
        let input = vmm.0.stdin.take().context("the VMM has a standard input")?;
        let output = vmm
            .0
            .stdout
            .take()
            .context("the VMM has a standard output")?;
        Ok(Self {
            vmm,
            input,
            console: lines_of(output),
            seen: Vec::new(),
            qmp_socket,
        })
    }

    /// Sends a command and waits for the answer with the given name.
    ///
    /// # Errors
    /// As for [`Guest::expect`].
    pub fn ask(&mut self, command: &str, answer: &str) -> Result<Value> {
        self.tell(command)?;
        self.expect(answer)
    }

    /// Sends a command.
    ///
    /// # Errors
    /// The VMM has ended.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}").with_context(|| format!("send '{command}' to the guest"))
    }

    /// Waits for the answer `{"event": name, ...}`.
    ///
    /// # Errors
    /// The guest reports an error, its console ends, or nothing comes in time.
    pub fn expect(&mut self, name: &str) -> Result<Value> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let line = match self.next_line(deadline) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!(self.trouble(name, "took too long")),
                Err(RecvTimeoutError::Disconnected) => bail!(self.trouble(name, "has ended")),
            };
            // The console may hold what the firmware left on the same line.
            let Some(start) = line.find("@{") else {
                continue;
            };
            let answer: Value = serde_json::from_str(&line[start + 1..])
                .with_context(|| format!("garbled answer of the guest: {line}"))?;
            if answer["event"] == name {
                return Ok(answer);
            }
            if answer["event"] == "error" {
                bail!(self.trouble(name, "reports an error"));
            }
        }
    }

    /// Waits for a line of the console that is exactly this.
    ///
    /// # Errors
    /// The console ends first, or nothing comes in time.
    pub fn wait_for_line(mut self, awaited: &str) -> Result<()> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        while let Ok(line) = self.next_line(deadline) {
            if line == awaited {
                return Ok(());
            }
        }
        bail!(self.trouble(awaited, "did not say it"))
    }

    /// Runs a guest with its console on this process's terminal, until it powers off.
    ///
    /// # Errors
    /// The VMM cannot be started, or fails.
    pub fn on_this_terminal(boot: &Boot, directory: &Path) -> Result<()> {
        let mut command = boot.command(&directory.join("vmm-qmp.sock"));
        let status = command
            .status()
            .with_context(|| format!("start {command:?}"))?;
        if !status.success() {
            bail!("the VMM ended with {status}");
        }
        Ok(())
    }

    /// Waits until the VMM has ended because its guest powered off.
    ///
    /// # Errors
    /// It does not end in time, or not with status 0.
    pub fn wait(mut self) -> Result<()> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            match self.next_line(deadline) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!(self.trouble("power-off", "took too long")),
            }
        }
        let status = self.vmm.0.wait().context("wait for the VMM")?;
        if !status.success() {
            bail!(self.trouble("power-off", &format!("made the VMM end with {status}")));
        }
        Ok(())
    }

    /// A QMP connection to the VMM.
    ///
    /// # Errors
    /// The VMM does not answer.
    pub fn monitor(&self) -> Result<QmpClient> {
        QmpClient::connect(&self.qmp_socket)
    }

    fn next_line(&mut self, deadline: Instant) -> Result<String, RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = self.console.recv_timeout(left)?;
        self.seen.push(line.clone());
        Ok(line)
    }

    fn trouble(&self, awaited: &str, what: &str) -> String {
        let last = &self.seen[self.seen.len().saturating_sub(QUOTED_LINES)..];
        format!(
            "the guest {what} while '{awaited}' was awaited; console:\n{}",
            last.join("\n")
        )
    }
}
