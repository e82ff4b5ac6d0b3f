//! What a daemon gets from whoever starts it, and what it tells back.
//!
//! Owns readiness and stop messages to the service manager ([`Notifier`]), descriptors handed over
//! by number or by name ([`NamedFds`], [`claim_inherited`], [`activation_fds`]), and the way into the background
//! ([`daemonize`]). Everything here runs on the control thread.
//!
//! Must not know: what is served on a descriptor.

#![expect(
    unsafe_code,
    reason = "taking over inherited descriptors and forking have no safe form"
)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::env;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::unistd::ForkResult;
use sd_notify::NotifyState;

/// The first descriptor of socket activation.
const FIRST_ACTIVATION_FD: RawFd = 3;
/// Descriptors that socket activation may hand over; more is a broken environment.
const MAX_ACTIVATION_FDS: RawFd = 1024;

/// The service manager's ear. Silent when there is none.
///
/// The socket is connected at the start, so that a sandbox needs to allow nothing for it.
#[derive(Debug, Default)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    /// With --daemonize the process that was started is not the one that serves.
    pid: u32,
}

impl Notifier {
    /// Connects to `$NOTIFY_SOCKET`, when set.
    pub fn from_env() -> io::Result<Self> {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else {
            return Ok(Self::default());
        };
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
            _ => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        Ok(Self {
            socket: Some(socket),
            pid: std::process::id(),
        })
    }

    /// The daemon serves.
    pub fn ready(&self) -> io::Result<()> {
        self.send(&[NotifyState::MainPid(self.pid), NotifyState::Ready])
    }

    /// The daemon has begun to stop.
    pub fn stopping(&self) -> io::Result<()> {
        self.send(&[NotifyState::Stopping])
    }

    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
        socket.send(lines.as_bytes()).map(drop)
    }
}

/// The descriptors of socket activation as `(name, number)`, in order. Claim them to use them.
pub fn activation_fds() -> io::Result<Vec<(String, RawFd)>> {
    let invalid = |name: &str| io::Error::other(format!("invalid ${name}"));
    let own_pid = std::process::id().to_string();
    if env::var("LISTEN_PID").ok().is_none_or(|pid| pid != own_pid) {
        return Ok(Vec::new());
    }
    let count = env::var("LISTEN_FDS").map_err(|_| invalid("LISTEN_FDS"))?;
    let count: RawFd = count.parse().map_err(|_| invalid("LISTEN_FDS"))?;
    if !(0..=MAX_ACTIVATION_FDS).contains(&count) {
        return Err(invalid("LISTEN_FDS"));
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let numbers = FIRST_ACTIVATION_FD..FIRST_ACTIVATION_FD + count;
    Ok(numbers
        .map(|number| (names.next().unwrap_or("unknown").to_owned(), number))
        .collect())
}

/// Takes over descriptor `number`, which the parent process left open for this one.
///
/// # Errors
/// `EBADF` when it is not open, or was not inherited, or was claimed before.
pub fn claim_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no argument and changes nothing, whatever `number` is.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if number <= libc::STDERR_FILENO || flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the descriptor is open; F_SETFD sets a flag of it and touches no memory.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and nobody in this process owns it: whatever the process
    // opens is close-on-exec from the start, and a claimed descriptor has become so above.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Why a descriptor that an option names cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FdError {
    /// Nobody passed one.
    #[error("No file descriptor named '{0}' was passed")]
    Unknown(String),
    /// A number would be taken for an inherited descriptor.
    #[error("'{0}' cannot name a file descriptor: a name must not begin with a digit")]
    BadName(String),
    /// Passed and never claimed.
    #[error("{MAX_PASSED} file descriptors wait to be used: close some")]
    TooMany,
    /// It is not open, or not for us.
    #[error("Cannot use file descriptor '{name}': {source}")]
    Unusable {
        /// How it was asked for.
        name: String,
        /// The host's.
        source: io::Error,
    },
}

/// Descriptors by the name that they came with.
#[derive(Debug, Default)]
pub struct NamedFds {
    inherited: BTreeMap<String, RawFd>,
    /// Passed while the daemon runs.
    passed: RefCell<BTreeMap<String, OwnedFd>>,
}

/// Descriptors that may wait under their names to be claimed.
const MAX_PASSED: usize = 128;

impl NamedFds {
    /// Those of socket activation; of equal names the last one counts.
    pub fn new(activation_fds: Vec<(String, RawFd)>) -> Self {
        Self {
            inherited: activation_fds.into_iter().collect(),
            passed: RefCell::default(),
        }
    }

    /// Keeps a descriptor under `name`, in the place of one that waits there.
    ///
    /// # Errors
    /// When the name is a number, or too many descriptors wait.
    pub fn pass(&self, name: &str, fd: OwnedFd) -> Result<(), FdError> {
        if name.starts_with(|first: char| first.is_ascii_digit()) || name.is_empty() {
            return Err(FdError::BadName(name.to_owned()));
        }
        let mut passed = self.passed.borrow_mut();
        if passed.len() >= MAX_PASSED && !passed.contains_key(name) {
            return Err(FdError::TooMany);
        }
        passed.insert(name.to_owned(), fd);
        Ok(())
    }

    /// Closes a descriptor that was passed and not claimed.
    ///
    /// # Errors
    /// When none waits under this name.
    pub fn close(&self, name: &str) -> Result<(), FdError> {
        let closed = self.passed.borrow_mut().remove(name);
        closed
            .map(drop)
            .ok_or_else(|| FdError::Unknown(name.to_owned()))
    }

    /// Takes over a descriptor by the name that it came with, or an inherited one by number.
    ///
    /// # Errors
    /// [`FdError`]; its text is a whole message.
    pub fn claim(&self, name: &str) -> Result<OwnedFd, FdError> {
        if let Some(fd) = self.passed.borrow_mut().remove(name) {
            return Ok(fd);
        }
        let number = match name.parse::<RawFd>() {
            Ok(number) => number,
            Err(_) => {
                let known = self.inherited.get(name);
                *known.ok_or_else(|| FdError::Unknown(name.to_owned()))?
            }
        };
        claim_inherited(number).map_err(|source| FdError::Unusable {
            name: name.to_owned(),
            source,
        })
    }
}

/// The two sides of [`daemonize`].
#[derive(Debug)]
pub enum Daemonized {
    /// The process that was started: it ends now, with success when the daemon got ready.
    Parent {
        /// Whether the daemon called [`Background::enter`].
        ready: bool,
    },
    /// The daemon, still with the terminal of the parent for its error messages.
    Child(Background),
}

/// What is left to do for a daemon that is ready.
#[derive(Debug)]
pub struct Background {
    parent: io::PipeWriter,
}

/// Forks; the child leads a session of its own. Call it before any thread exists.
///
/// # Errors
/// The host's, of pipe and fork; `EBUSY` when the process has several threads.
pub fn daemonize() -> io::Result<Daemonized> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    let (mut from_child, parent) = io::pipe()?;
    // SAFETY: the process has one thread, so no lock is held by a thread that the child lacks.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { .. } => {
            drop(parent);
            let mut byte = [0];
            let ready = from_child.read(&mut byte)? == byte.len();
            Ok(Daemonized::Parent { ready })
        }
        ForkResult::Child => {
            nix::unistd::setsid()?;
            Ok(Daemonized::Child(Background { parent }))
        }
    }
}

impl Background {
    /// Leaves the parent's directory and terminal, and lets the parent end with success.
    pub fn enter(self) -> io::Result<()> {
        env::set_current_dir("/")?;
        nix::unistd::dup2_stderr(&null_device()?)?;
        self.enter_with_errors()
    }

    /// Leaves the parent's input and output, keeps its directory and where it writes errors, and lets the parent end with success.
    pub fn enter_with_errors(mut self) -> io::Result<()> {
        let null = null_device()?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        self.parent.write_all(&[1])
    }
}

fn null_device() -> io::Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).open("/dev/null")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn a_descriptor_is_claimed_once_and_only_when_inherited() {
        let (reader, _writer) = io::pipe().unwrap();
        let own = claim_inherited(reader.as_raw_fd()).unwrap_err();
        assert_eq!(own.raw_os_error(), Some(libc::EBADF));
        // A plain dup is not close-on-exec, like a descriptor that came through exec.
        let number = nix::unistd::dup(&reader).unwrap().into_raw_fd();
        let claimed = claim_inherited(number).unwrap();
        assert_eq!(claimed.as_raw_fd(), number);
        assert!(claim_inherited(number).is_err());
        drop(claimed);
        assert!(claim_inherited(0).is_err());
    }

    #[test]
    fn passed_descriptors_wait_under_their_names_and_are_claimed_once() {
        let fds = NamedFds::default();
        let pipe = || OwnedFd::from(io::pipe().unwrap().0);
        fds.pass("tap", pipe()).unwrap();
        let second = pipe();
        let number = second.as_raw_fd();
        fds.pass("tap", second).unwrap();
        assert_eq!(fds.claim("tap").unwrap().as_raw_fd(), number);
        let gone = fds.claim("tap").unwrap_err().to_string();
        assert_eq!(gone, "No file descriptor named 'tap' was passed");
        assert!(matches!(fds.pass("7", pipe()), Err(FdError::BadName(_))));
        for index in 0..MAX_PASSED {
            fds.pass(&format!("n{index}"), pipe()).unwrap();
        }
        assert!(matches!(fds.pass("more", pipe()), Err(FdError::TooMany)));
        fds.close("n0").unwrap();
        assert!(fds.close("n0").is_err());
        fds.pass("more", pipe()).unwrap();
    }
}
