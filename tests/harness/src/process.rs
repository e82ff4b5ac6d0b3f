//! Daemons under test as child processes.
//!
//! A [`Daemon`] is ready when [`Launch::start`] returns (told by sd_notify or by its pid file,
//! never by waiting a while), dies with its owner, and shows what it wrote to stderr when it ended
//! on its own or a test failed. Programs are found, not assumed: a missing one is an error that
//! says how to get it.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest wait for a daemon to become ready or to end.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// Ours.
    OutboardBlkd,
    /// Ours, for networks.
    OutboardNetd,
    /// The peer.
    QemuStorageDaemon,
}

impl Program {
    /// The executable.
    ///
    /// # Errors
    /// When it is not there; says how to get it.
    pub fn path(self) -> Result<PathBuf> {
        match self {
            Self::OutboardBlkd => workspace_binary("outboard-blkd"),
            Self::OutboardNetd => workspace_binary("outboard-netd"),
            Self::QemuStorageDaemon => installed("qemu-storage-daemon", "qemu-utils"),
        }
    }
}

/// A binary of this workspace, built in the same profile as the running test; the environment
/// variable of its name in capitals (`OUTBOARD_BLKD`) overrides the place.
///
/// # Errors
/// When it has not been built.
pub fn workspace_binary(name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(name.to_uppercase().replace('-', "_")) {
        return Ok(path.into());
    }
    let test = std::env::current_exe().context("path of the running test")?;
    let profile = test
        .ancestors()
        .find(|dir| dir.file_name().is_some_and(|n| n == "deps"));
    let path = profile
        .and_then(Path::parent)
        .with_context(|| format!("{} is not in a target directory", test.display()))?
        .join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo build --workspace` first",
        path.display()
    );
    Ok(path)
}

/// A program on the search path.
///
/// # Errors
/// When it is missing; names the Debian `package`.
pub fn installed(program: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .with_context(|| format!("{program} is not installed: run `apt-get install {package}`"))
}

/// How to start a daemon, as often as needed.
#[derive(Debug)]
pub struct Launch {
    program: Program,
    arguments: Vec<String>,
    directory: PathBuf,
    inherited: Option<(String, UnixListener)>,
    prefix: Vec<String>,
}

impl Launch {
    /// `program` with `arguments`, using `directory` for its sockets and pid file.
    pub fn new(program: Program, arguments: Vec<String>, directory: &Path) -> Self {
        Self {
            program,
            arguments,
            directory: directory.into(),
            inherited: None,
            prefix: Vec::new(),
        }
    }

    /// Hands the daemon a listening socket as systemd's socket activation does.
    #[must_use]
    pub fn with_listener(self, listener: UnixListener) -> Self {
        self.with_named_listener("unknown", listener)
    }

    /// As [`Launch::with_listener`], with the name of a socket unit's `FileDescriptorName=`.
    #[must_use]
    pub fn with_named_listener(mut self, name: &str, listener: UnixListener) -> Self {
        self.inherited = Some((name.to_owned(), listener));
        self
    }

    /// Runs it by another program that becomes it, such as `ip netns exec NAME`.
    #[must_use]
    pub fn under(mut self, prefix: Vec<String>) -> Self {
        self.prefix = prefix;
        self
    }

    /// The command line after the program's name.
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    /// Starts the daemon and waits until it says that it is ready.
    ///
    /// # Errors
    /// When it cannot be started, ends, or is not ready in time; with what it wrote to stderr.
    pub fn start(&self) -> Result<Daemon> {
        let readiness = Readiness::watch(self.program, &self.directory)?;
        let mut command = self.command()?;
        readiness.announce(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {:?}", self.program))?;
        let stderr = child.stderr.take().context("stderr is piped")?;
        let log = Log::collect(stderr)?;
        let daemon = Daemon {
            child,
            log,
            program: self.program,
        };
        if let Err(error) = readiness.wait(&daemon.log.closed) {
            bail!(
                "{:?} is not ready: {error:#}\n{}",
                self.program,
                daemon.log.text()
            );
        }
        Ok(daemon)
    }

    fn command(&self) -> Result<Command> {
        let path = self.program.path()?;
        let mut command = match &self.inherited {
            None => {
                let mut words = self.prefix.iter().map(OsString::from);
                let program = words.next();
                let mut command = Command::new(program.as_deref().unwrap_or(path.as_os_str()));
                command.args(words);
                if program.is_some() {
                    command.arg(&path);
                }
                command.stdin(Stdio::null());
                command
            }
            Some((name, listener)) => {
                // LISTEN_PID must be the daemon's own pid and the socket descriptor 3.
                let mut command = Command::new("sh");
                let script = r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&0 0</dev/null"#;
                command.args(["-c", script, "sh"]).arg(path);
                command.env("LISTEN_FDNAMES", name);
                command.stdin(Stdio::from(OwnedFd::from(listener.try_clone()?)));
                command
            }
        };
        command
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        Ok(command)
    }
}

/// A running daemon; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: Log,
    program: Program,
}

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr.
    pub fn stderr(&self) -> String {
        self.log.text()
    }

    /// True when it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Number of open file descriptors.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open_files(&self) -> Result<usize> {
        let path = format!("/proc/{}/fd", self.pid());
        Ok(fs::read_dir(&path).with_context(|| path.clone())?.count())
    }

    /// Time its threads have spent on a CPU.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        let mut total = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let path = task?.path().join("schedstat");
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let on_cpu = text.split(' ').next().unwrap_or_default();
            total += on_cpu.parse::<u64>().with_context(|| text.clone())?;
        }
        Ok(Duration::from_nanos(total))
    }

    /// CPU time of the next `window`, after what is still ending has had `settling`.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_time_within(&self, settling: Duration, window: Duration) -> Result<Duration> {
        // The claim is about time passing, so time has to pass.
        std::thread::sleep(settling);
        let before = self.cpu_time()?;
        std::thread::sleep(window);
        Ok(self.cpu_time()?.saturating_sub(before))
    }

    /// Resident memory in KiB.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn resident_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmRSS")?;
        Ok(number.parse()?)
    }

    /// Sends SIGKILL and reaps.
    ///
    /// # Errors
    /// When it had ended before by itself: that is a crash.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!(
                "{:?} ended by itself ({status}):\n{}",
                self.program,
                self.log.text()
            );
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.pid().try_into()?), Signal::SIGTERM).context("SIGTERM")?;
        self.ended()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        let mut fds = [PollFd::new(self.log.closed.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE)?)?;
        ensure!(
            ready > 0,
            "{:?} still runs after {PATIENCE:?}",
            self.program
        );
        Ok(self.child.wait()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nobody asked a daemon that still runs to end: a test failed, or does not mind the output.
        let unasked = self.is_running();
        let _ = self.child.kill();
        let status = self.child.wait();
        let crashed = status
            .as_ref()
            .is_ok_and(|s| s.signal().is_some_and(|signal| signal != 9));
        if unasked || crashed || std::thread::panicking() {
            self.log.finish();
            eprintln!(
                "--- stderr of {:?} ({status:?}) ---\n{}---",
                self.program,
                self.log.text()
            );
        }
    }
}

/// Collects a child's stderr on a thread.
#[derive(Debug)]
struct Log {
    lines: Arc<Mutex<String>>,
    closed: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Log {
    fn collect(stderr: ChildStderr) -> Result<Self> {
        let lines = Arc::new(Mutex::new(String::new()));
        let closed = Arc::new(EventFd::new().context("eventfd")?);
        let (sink, signal) = (lines.clone(), closed.clone());
        let thread = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut lines = sink.lock().unwrap_or_else(PoisonError::into_inner);
                lines.push_str(&line);
                lines.push('\n');
            }
            signal.write(1).expect("an eventfd takes one more");
        });
        Ok(Self {
            lines,
            closed,
            thread: Some(thread),
        })
    }

    fn text(&self) -> String {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn finish(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How a program says that it is ready.
enum Readiness {
    Notify { socket: UnixDatagram, path: PathBuf },
    PidFile { inotify: Inotify, path: PathBuf },
}

impl Readiness {
    fn watch(program: Program, directory: &Path) -> Result<Self> {
        match program {
            Program::OutboardBlkd | Program::OutboardNetd => {
                let path = directory.join("notify.sock");
                let _ = fs::remove_file(&path);
                let socket = UnixDatagram::bind(&path).context("notify socket")?;
                Ok(Self::Notify { socket, path })
            }
            Program::QemuStorageDaemon => {
                let path = directory.join("daemon.pid");
                let _ = fs::remove_file(&path);
                let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
                // The pid file stays open and locked, so it is never closed after writing.
                inotify.add_watch(directory, AddWatchFlags::IN_MODIFY)?;
                Ok(Self::PidFile { inotify, path })
            }
        }
    }

    fn announce(&self, command: &mut Command) {
        match self {
            Self::Notify { path, .. } => command.env("NOTIFY_SOCKET", path),
            Self::PidFile { path, .. } => command.arg("--pidfile").arg(path),
        };
    }

    fn wait(&self, closed: &EventFd) -> Result<()> {
        let start = Instant::now();
        let source = match self {
            Self::Notify { socket, .. } => socket.as_fd(),
            Self::PidFile { inotify, .. } => inotify.as_fd(),
        };
        loop {
            let mut fds = [source, closed.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let left = PATIENCE.saturating_sub(start.elapsed());
            ensure!(
                poll(&mut fds, PollTimeout::try_from(left)?)? > 0,
                "silent for {PATIENCE:?}"
            );
            if self.is_ready()? {
                return Ok(());
            }
            ensure!(!fds[1].any().unwrap_or(true), "it ended");
        }
    }

    fn is_ready(&self) -> Result<bool> {
        match self {
            Self::Notify { socket, .. } => {
                socket.set_nonblocking(true)?;
                let mut text = [0; 4096];
                let got = socket.recv(&mut text).unwrap_or(0);
                Ok(text[..got]
                    .split(|&byte| byte == b'\n')
                    .any(|line| line == b"READY=1"))
            }
            Self::PidFile { inotify, path } => {
                let _ = inotify.read_events();
                Ok(fs::metadata(path).is_ok_and(|file| file.len() > 0))
            }
        }
    }
}
