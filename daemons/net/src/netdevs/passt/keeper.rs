//! The process that keeps passt running: outside of the sandbox, and deaf to everything but the end of its control socket.
//!
//! ```text
//!   start passt ──> send our end of its socket ──> wait ── passt ended ──> pause (0.1 s, doubled up to 10 s) ──> start ...
//!                                                   └── control socket closed ──> SIGTERM, SIGKILL after 2 s ──> exit
//! ```
//!
//! Its standard input is the control socket; its arguments are passt's program and arguments.

#![expect(unsafe_code, reason = "process descriptors are a raw system call")]

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use executor::time::Backoff;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use nix::unistd::Pid;

/// What the program is called (`argv[0]`) as the keeper.
pub(super) const NAME: &str = "outboard-netd-passt-keeper";

/// First byte of a message with a connected socket.
const CONNECTED: u8 = b'c';
/// First byte of a message that says, in text, why passt cannot be started at all.
const FAILED: u8 = b'f';
/// Longest message in bytes.
const MESSAGE_LEN: usize = 512;

/// The shortest and the longest pause before passt is started again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A passt that ran for this long gets the shortest pause.
const GOOD_RUN: Duration = Duration::from_secs(10);
/// Time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

/// Does the work of the keeper, when this process was started to be it. To be called first of all in `main`; `None`: this
/// process is the daemon.
pub fn run_as_keeper() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    if arguments.next().as_deref() != Some(OsStr::new(NAME)) {
        return None;
    }
    let arguments: Vec<OsString> = arguments.collect();
    Some(run(io::stdin().as_fd(), &arguments))
}

/// What the keeper says first: a connected socket, or why there is none.
///
/// # Errors
/// The host's; a keeper that ended.
pub(super) fn first_answer(control: &UnixStream) -> io::Result<Result<OwnedFd, String>> {
    let mut text = [0; MESSAGE_LEN];
    let mut space = cmsg_space!(RawFd);
    let mut pieces = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(control.as_raw_fd(), &mut pieces, Some(&mut space), flags)?;
    let len = message.bytes;
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel made these for this process, and nobody else owns them.
            fds.extend(
                received
                    .iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
            );
        }
    }
    match (text.first().filter(|_| len > 0), fds.pop()) {
        (Some(&CONNECTED), Some(fd)) => Ok(Ok(fd)),
        (Some(&FAILED), _) => Ok(Err(String::from_utf8_lossy(&text[1..len]).into_owned())),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Keeps `arguments`, a program and its arguments, running until `control` is closed at its other end.
pub(super) fn run(control: BorrowedFd<'_>, arguments: &[OsString]) -> ExitCode {
    let Some((program, arguments)) = arguments.split_first() else {
        return ExitCode::FAILURE;
    };
    let mut backoff = Backoff::new(PAUSES);
    let mut first = true;
    loop {
        let started = Instant::now();
        match start(control, program, arguments) {
            Ok(child) => match watch(control, child) {
                Ok(Some(how)) => eprintln!("passt has ended ({how}); starting it again"),
                Ok(None) => return ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("cannot watch passt: {error}");
                    return ExitCode::FAILURE;
                }
            },
            Err(error) if first => {
                let mut message = vec![FAILED];
                message.extend(error.to_string().bytes().take(MESSAGE_LEN - 1));
                // Nobody listens any more: nothing is left to do either way.
                let _ = send(control, &message, None);
                return ExitCode::FAILURE;
            }
            Err(error) => eprintln!("cannot start passt: {error}"),
        }
        first = false;
        if started.elapsed() >= GOOD_RUN {
            backoff = Backoff::new(PAUSES);
        }
        match wait_for(&[control], Some(backoff.next_pause())) {
            Ok(None) => {}
            Ok(Some(_)) => return ExitCode::SUCCESS,
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// Starts the program with one end of a socket pair, and sends the other one away.
fn start(control: BorrowedFd<'_>, program: &OsStr, arguments: &[OsString]) -> io::Result<Child> {
    let (ours, theirs) = UnixStream::pair()?;
    // This process starts nothing else: only passt inherits it.
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let mut child = Command::new(program)
        .args(["--foreground", "--fd"])
        .arg(theirs.as_raw_fd().to_string())
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    drop(theirs);
    if let Err(error) = send(control, &[CONNECTED], Some(ours.as_fd())) {
        end(&mut child, None)?;
        return Err(error.into());
    }
    Ok(child)
}

fn send(control: BorrowedFd<'_>, message: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let fds = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
    let pieces = [IoSlice::new(message)];
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(control.as_raw_fd(), &pieces, rights.as_slice(), flags, None)?;
    Ok(())
}

/// Waits until passt ends, and says how, or until the control socket is closed, and ends passt then.
fn watch(control: BorrowedFd<'_>, mut child: Child) -> io::Result<Option<String>> {
    let process = process_descriptor(&child)?;
    match wait_for(&[process.as_fd(), control], None)? {
        Some(0) => Ok(Some(child.wait()?.to_string())),
        _ => {
            end(&mut child, Some(process.as_fd()))?;
            Ok(None)
        }
    }
}

/// Ends passt, which may take a moment to end by itself.
fn end(child: &mut Child, process: Option<BorrowedFd<'_>>) -> io::Result<()> {
    // The process is ours and not waited for yet: its number is its own. It may have ended.
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
    let ended = match process {
        Some(process) => wait_for(&[process], Some(GRACE))?,
        None => None,
    };
    if ended.is_none() {
        child.kill()?;
    }
    child.wait()?;
    Ok(())
}

/// Which descriptor has something to tell (or is closed at its other end); `None` when none had in time.
fn wait_for(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> io::Result<Option<usize>> {
    let mut polled: Vec<PollFd<'_>> = Vec::with_capacity(fds.len());
    polled.extend(fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
    let timeout = match limit {
        None => PollTimeout::NONE,
        Some(limit) => PollTimeout::try_from(limit.as_millis()).map_err(io::Error::other)?,
    };
    loop {
        match poll(&mut polled, timeout) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(polled.iter().position(|fd| fd.any().unwrap_or(true)))
}

fn process_descriptor(child: &Child) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a call that succeeded gives a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
