//! Child processes that print lines and do not outlive their owner.

use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use nix::sys::signal::Signal;

/// A child that is killed with its owner.
#[derive(Debug)]
pub(crate) struct Owned(pub(crate) Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The lines of `stdout` as they come, without their ends; the channel closes where the stream ends.
pub(crate) fn lines_of(stdout: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

/// A killed test must not leave an emulator behind that eats a core.
#[expect(
    unsafe_code,
    reason = "Command runs code between fork and exec in no other way"
)]
pub(crate) fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call, which is async-signal-safe, and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
}
