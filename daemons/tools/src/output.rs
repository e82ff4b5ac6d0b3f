//! Standard output, buffered as C programs buffer theirs: line by line on a terminal, else in
//! blocks, so that what goes to stderr comes first unless somebody waits for the output. A tool's
//! end ([`crate::start::main`]) writes out the rest.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// When a block is written, in bytes.
const BLOCK: usize = 4096;

static PENDING: Mutex<Vec<u8>> = Mutex::new(Vec::new());

fn pending() -> MutexGuard<'static, Vec<u8>> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints a line.
pub fn line(text: &str) {
    print(&format!("{text}\n"));
}

/// Prints text.
pub fn print(text: &str) {
    let mut pending = pending();
    pending.extend_from_slice(text.as_bytes());
    if pending.len() >= BLOCK || std::io::stdout().is_terminal() {
        write_out(&mut pending);
    }
}

/// Writes out what was printed.
pub fn flush() {
    write_out(&mut pending());
}

fn write_out(pending: &mut Vec<u8>) {
    let mut stdout = std::io::stdout().lock();
    // A reader that closes its end early has seen enough.
    let _ = stdout.write_all(pending).and_then(|()| stdout.flush());
    pending.clear();
}
