//! Commands from standard input: a prompt, a line, what it does, and again.

use crate::command::{self, Verdict};
use crate::session::Session;
use block::Errno;
use executor::net::poll_fd;
use std::os::fd::AsFd;
use tools::output;

/// What asks for a command.
const PROMPT: &str = "qemu-io> ";

/// Longest line in bytes.
const MAX_LINE: usize = 1 << 20;

/// How much is read at a time, in bytes.
const BLOCK: usize = 4096;

/// Lines of standard input, the rest of what was read.
#[derive(Default)]
struct Lines {
    buffered: Vec<u8>,
    ended: bool,
}

/// Runs commands until the input ends or one of them ends the run.
pub(crate) async fn run(session: &Session<'_>) -> Verdict {
    let mut verdict = Verdict::Done;
    let mut lines = Lines::default();
    while !session.quit.get() {
        output::print(PROMPT);
        output::flush();
        let Some(line) = lines.next().await else {
            break;
        };
        verdict = verdict.and(command::run(session, &line).await);
    }
    verdict
}

impl Lines {
    /// The next line without its end; `None` after the last.
    async fn next(&mut self) -> Option<String> {
        loop {
            let end = self.buffered.iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line: Vec<u8> = self.buffered.drain(..=end).collect();
                return Some(text(&line[..end]));
            }
            if self.ended || self.buffered.len() > MAX_LINE {
                let rest = std::mem::take(&mut self.buffered);
                return (!rest.is_empty()).then(|| text(&rest));
            }
            // Whatever cannot be read is the end.
            self.ended = self.fill().await.unwrap_or(0) == 0;
        }
    }

    async fn fill(&mut self) -> Result<usize, Errno> {
        let stdin = std::io::stdin();
        poll_fd(stdin.as_fd(), libc::POLLIN).await?;
        let mut bytes = [0; BLOCK];
        let count = nix::unistd::read(&stdin, &mut bytes)?;
        self.buffered.extend_from_slice(&bytes[..count]);
        Ok(count)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
