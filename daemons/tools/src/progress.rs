//! How far a long operation is: a line that is written over (`-p`), or one on SIGUSR1.

use crate::output;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::cell::Cell;

/// Least change that is shown, in percent.
const STEP: f64 = 1.0;

/// Who is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// The terminal, all the time: `-p`.
    Always,
    /// stderr, whenever SIGUSR1 comes.
    OnSignal,
}

/// The progress of one operation.
pub struct Progress {
    show: Show,
    percent: Cell<f64>,
    shown: Cell<f64>,
    signal: Option<SignalFd>,
}

impl Progress {
    /// At 0 %. SIGUSR1 is blocked from here on, and looked for at each step.
    pub fn begin(show: Show) -> Self {
        let signal = match show {
            Show::Always => None,
            Show::OnSignal => signal_fd(),
        };
        let progress = Self {
            show,
            percent: Cell::new(0.0),
            shown: Cell::new(0.0),
            signal,
        };
        if show == Show::Always {
            progress.print();
        }
        progress
    }

    /// `done` of `total` units of work are done; the total may have grown.
    pub fn at(&self, done: u64, total: u64) {
        let percent = match total {
            0 => 100.0,
            total => done as f64 * 100.0 / total as f64,
        };
        self.percent.set(percent.min(100.0));
        match self.show {
            Show::Always if (percent - self.shown.get()).abs() >= STEP || percent >= 100.0 => {
                self.print();
            }
            Show::Always => {}
            Show::OnSignal => self.answer_signal(),
        }
    }

    fn print(&self) {
        self.shown.set(self.percent.get());
        output::print(&format!("    ({:.2}/100%)\r", self.percent.get()));
        output::flush();
    }

    fn answer_signal(&self) {
        if let Some(signal) = &self.signal
            && let Ok(Some(_)) = signal.read_signal()
        {
            eprintln!("    ({:.2}/100%)", self.percent.get());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.show == Show::Always {
            output::line("");
        }
    }
}

fn signal_fd() -> Option<SignalFd> {
    let set: SigSet = [Signal::SIGUSR1].into_iter().collect();
    set.thread_block().ok()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).ok()
}
