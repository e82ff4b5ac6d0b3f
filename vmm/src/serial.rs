//! The serial port: a 16550 for the guest ([`SerialPort`]) and what is at the other end of the line ([`Console`]).
//!
//! The console lives as long as the process, the port as long as the machine. Output is written by the CPU that
//! produces it; input is read by the main thread, no more than the port's buffer takes. Output to a socket without a client, or
//! with one that does not read, is lost: a slow reader must not stop the guest.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};

use crate::events::Notifier;
use crate::options::SerialOptions;

struct Interrupt(Arc<Notifier>);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise();
        Ok(())
    }
}

/// Tells the main thread that the guest has read everything.
struct Drained(Arc<Notifier>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.raise();
    }
}

/// The 16550 of one machine.
pub(crate) struct SerialPort {
    uart: Mutex<Serial<Interrupt, Drained, SharedOutput>>,
}

impl SerialPort {
    /// `interrupt` is wired to [`crate::layout::SERIAL_GSI`].
    pub(crate) fn new(console: &Console, interrupt: Arc<Notifier>) -> Self {
        let drained = Drained(console.drained.clone());
        let uart = Serial::with_events(Interrupt(interrupt), drained, console.output.clone());
        Self {
            uart: Mutex::new(uart),
        }
    }

    /// A guest's read of a register.
    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    /// A guest's write of a register.
    pub(crate) fn write(&self, register: u8, value: u8) {
        if let Err(error) = self.lock().write(register, value) {
            tracing::debug!("serial port: {error:?}");
        }
    }

    /// Takes as much input as there is room for; returns how much that is.
    fn receive(&self, input: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(input).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, Drained, SharedOutput>> {
        self.uart
            .lock()
            .expect("no thread panics while it holds the serial port")
    }
}

enum Output {
    Stdout,
    File(File),
    Socket(Option<UnixStream>),
    None,
}

/// Where the guest's output goes, shared by the port and the console.
#[derive(Clone)]
struct SharedOutput(Arc<Mutex<Output>>);

impl SharedOutput {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.0
            .lock()
            .expect("no thread panics while it holds the output")
    }
}

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.lock() {
            Output::Stdout => io::stdout().write(bytes),
            Output::File(file) => file.write(bytes),
            Output::Socket(client) => {
                // A client that is gone or does not read loses output; the main thread notices when it is gone.
                let _ = client.as_ref().map(|mut client| client.write(bytes));
                Ok(bytes.len())
            }
            Output::None => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut *self.lock() {
            Output::Stdout => io::stdout().flush(),
            _ => Ok(()),
        }
    }
}

enum Input {
    Stdin(io::Stdin),
    Listener(UnixListener, PathBuf),
    Client(UnixStream, UnixListener, PathBuf),
    None,
}

/// The far end of the serial line.
pub(crate) struct Console {
    output: SharedOutput,
    input: Input,
    drained: Arc<Notifier>,
    pending: Vec<u8>,
    terminal: Option<Termios>,
}

impl Console {
    /// Opens what `options` names.
    ///
    /// # Errors
    /// The file or socket cannot be made.
    pub(crate) fn open(options: &SerialOptions) -> Result<Self> {
        let (output, input) = match options {
            SerialOptions::Stdio => (Output::Stdout, Input::Stdin(io::stdin())),
            SerialOptions::None => (Output::None, Input::None),
            SerialOptions::File(path) => {
                let file = OpenOptions::new().create(true).append(true).open(path);
                let file = file.with_context(|| format!("--serial file:{}", path.display()))?;
                (Output::File(file), Input::None)
            }
            SerialOptions::Socket(path) => {
                let listener =
                    listen(path).with_context(|| format!("--serial socket:{}", path.display()))?;
                (
                    Output::Socket(None),
                    Input::Listener(listener, path.clone()),
                )
            }
        };
        let terminal = matches!(input, Input::Stdin(_))
            .then(make_terminal_raw)
            .flatten();
        Ok(Self {
            output: SharedOutput(Arc::new(Mutex::new(output))),
            input,
            drained: Arc::new(Notifier::new()?),
            pending: Vec::new(),
            terminal,
        })
    }

    /// What to wait for: readability of this descriptor means that [`Console::serve`] has work.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        if !self.pending.is_empty() {
            return Some(self.drained.as_fd());
        }
        match &self.input {
            Input::Stdin(stdin) => Some(stdin.as_fd()),
            Input::Listener(listener, _) => Some(listener.as_fd()),
            Input::Client(client, ..) => Some(client.as_fd()),
            Input::None => None,
        }
    }

    /// Accepts a client, or moves input to the port.
    pub(crate) fn serve(&mut self, port: &SerialPort) {
        if self.pending.is_empty() {
            self.read_input();
        }
        self.drained.clear();
        let taken = port.receive(&self.pending);
        self.pending.drain(..taken);
    }

    fn read_input(&mut self) {
        const CHUNK: usize = 4096;
        let mut bytes = [0; CHUNK];
        let result = match &mut self.input {
            Input::Stdin(stdin) => read_unbuffered(stdin, &mut bytes),
            Input::Client(client, ..) => client.read(&mut bytes),
            Input::Listener(..) => return self.accept(),
            Input::None => return,
        };
        match result {
            Ok(0) => self.hang_up(),
            Ok(count) => self.pending.extend_from_slice(&bytes[..count]),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.hang_up(),
        }
    }

    fn accept(&mut self) {
        let Input::Listener(listener, path) = std::mem::replace(&mut self.input, Input::None)
        else {
            return;
        };
        let client = listener.accept().and_then(|(client, _)| {
            client.set_nonblocking(true)?;
            Ok((client.try_clone()?, client))
        });
        self.input = match client {
            Ok((writer, reader)) => {
                *self.output.lock() = Output::Socket(Some(writer));
                Input::Client(reader, listener, path)
            }
            Err(_) => Input::Listener(listener, path),
        };
    }

    /// The input has ended: nothing more comes from it, or the next client may.
    fn hang_up(&mut self) {
        self.input = match std::mem::replace(&mut self.input, Input::None) {
            Input::Client(_, listener, path) => {
                *self.output.lock() = Output::Socket(None);
                Input::Listener(listener, path)
            }
            _ => Input::None,
        };
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(terminal) = &self.terminal {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, terminal);
        }
        if let Input::Listener(_, path) | Input::Client(_, _, path) = &self.input {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes a listening socket; a file that a dead process left there is replaced.
///
/// # Errors
/// Somebody listens there, or the file cannot be made.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    if UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path).context("old socket")?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Lets every key reach the guest. `None` if standard input is no terminal.
fn make_terminal_raw() -> Option<Termios> {
    let old = tcgetattr(io::stdin()).ok()?;
    let mut raw = old.clone();
    cfmakeraw(&mut raw);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
    Some(old)
}

/// Reads past the standard library's buffer: what that holds would not make the descriptor readable.
fn read_unbuffered(stdin: &io::Stdin, bytes: &mut [u8]) -> io::Result<usize> {
    Ok(nix::unistd::read(stdin, bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(console: &Console) -> SerialPort {
        SerialPort::new(console, Arc::new(Notifier::new().unwrap()))
    }

    #[test]
    fn a_file_gets_what_the_guest_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let console = Console::open(&SerialOptions::File(path.clone())).unwrap();
        let port = port(&console);
        for byte in *b"hi\n" {
            port.write(0, byte);
        }
        assert_eq!(std::fs::read(path).unwrap(), b"hi\n");
        assert!(console.input().is_none());
    }

    #[test]
    fn clients_of_a_socket_come_one_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        let mut console = Console::open(&SerialOptions::Socket(path.clone())).unwrap();
        let port = port(&console);
        port.write(0, b'?');
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            console.serve(&port);
            port.write(0, b'!');
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            assert_eq!(byte, *b"!", "output before the client came is lost");
            client.write_all(b"x").unwrap();
            console.serve(&port);
            assert_eq!(port.read(0), b'x');
            drop(client);
            console.serve(&port);
        }
        drop(console);
        assert!(!path.exists());
    }

    #[test]
    fn input_beyond_the_buffer_waits_until_the_guest_has_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        let mut console = Console::open(&SerialOptions::Socket(path.clone())).unwrap();
        let port = port(&console);
        let mut client = UnixStream::connect(&path).unwrap();
        console.serve(&port);
        let sent: Vec<u8> = (0..200).collect();
        client.write_all(&sent).unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            console.serve(&port);
            while port.read(5) & 1 == 1 {
                received.push(port.read(0));
            }
        }
        assert_eq!(received, sent);
    }

    #[test]
    fn a_socket_that_is_in_use_is_not_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tty");
        let first = listen(&path).unwrap();
        assert!(listen(&path).is_err());
        drop(first);
        assert!(listen(&path).is_ok(), "a left-over file is replaced");
    }
}
