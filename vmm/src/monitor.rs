//! The main thread: QMP clients, the console's input, signals, and what other threads report.
//!
//! One client is served at a time; the next waits in the listen queue. Events go to the client that is there. The session state
//! machine (greeting, negotiation, parsing, limits) is the `qmp` crate's, commands are in [`crate::commands`]; here are sockets.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use qmp::json::Layout;
use qmp::{CommandTable, Session, SessionOptions, SyncHandler};

use crate::commands::{self, Control};
use crate::events::{Event, EventReceiver};
use crate::machine::Machine;
use crate::serial::listen;

/// How long a client may take to read the last words.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves everything until the machine ends.
pub(crate) struct Monitor {
    control: Control,
    events: EventReceiver,
    signals: SignalFd,
    server: Option<Server>,
}

struct Server {
    path: PathBuf,
    listener: UnixListener,
    client: Option<Client>,
    table: CommandTable<SyncHandler<Control>>,
}

struct Client {
    stream: UnixStream,
    session: Session,
    unsent: Vec<u8>,
}

/// Blocks the signals that end the process, in this thread and those it will make; returns where they arrive.
///
/// # Errors
/// No file descriptor is left.
pub(crate) fn take_signals() -> Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGHUP);
    signals.thread_block().context("signals")?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    SignalFd::with_flags(&signals, flags).context("signals")
}

impl Monitor {
    /// Makes the monitor; `qmp` is where to listen.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn new(
        machine: Machine,
        events: EventReceiver,
        signals: SignalFd,
        qmp: Option<&Path>,
    ) -> Result<Self> {
        let server = qmp.map(Server::listen).transpose()?;
        Ok(Self {
            control: Control::new(machine),
            events,
            signals,
            server,
        })
    }

    /// Powers the machine on and serves it until it ends.
    ///
    /// # Errors
    /// The machine cannot start or go on.
    pub(crate) fn run(mut self) -> Result<()> {
        self.control.machine.power_on()?;
        let result = self.serve();
        self.send_events();
        if let Some(server) = self.server.take() {
            server.close();
        }
        result
    }

    fn serve(&mut self) -> Result<()> {
        while !self.control.is_over() {
            let ready = self.wait()?;
            if ready.signal {
                while self
                    .signals
                    .read_signal()
                    .is_ok_and(|signal| signal.is_some())
                {}
                self.control.host_signal();
            }
            if ready.console {
                self.control.machine.serve_console();
            }
            while let Some(event) = self.events.next() {
                self.handle(event)?;
            }
            if ready.server
                && let Some(server) = &mut self.server
            {
                server.serve(&mut self.control);
            }
            self.send_events();
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::GuestPowerOff => self.control.guest_power_off(),
            Event::GuestReset => self.control.guest_reset()?,
            Event::Failed(reason) => bail!(reason),
        }
        Ok(())
    }

    fn wait(&self) -> Result<Ready> {
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = vec![
            readable(self.events.as_fd()),
            readable(self.signals.as_fd()),
        ];
        let console = self.control.machine.console().input();
        fds.extend(console.map(readable));
        fds.extend(self.server.as_ref().map(Server::poll_fd));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
        let ready = |index: usize| fds.get(index).is_some_and(|fd| fd.any().unwrap_or(false));
        let after_console = 2 + usize::from(console.is_some());
        Ok(Ready {
            signal: ready(1),
            console: console.is_some() && ready(2),
            server: ready(after_console),
        })
    }

    fn send_events(&mut self) {
        let events = self.control.take_events();
        let Some(client) = self
            .server
            .as_mut()
            .and_then(|server| server.client.as_mut())
        else {
            return;
        };
        for event in &events {
            client.session.event(event);
        }
        client.flush();
    }
}

struct Ready {
    signal: bool,
    console: bool,
    server: bool,
}

impl Server {
    fn listen(path: &Path) -> Result<Self> {
        let listener = listen(path).with_context(|| format!("--qmp {}", path.display()))?;
        let table = CommandTable::new([commands::COMMANDS]);
        Ok(Self {
            path: path.to_owned(),
            listener,
            client: None,
            table,
        })
    }

    fn poll_fd(&self) -> PollFd<'_> {
        let Some(client) = &self.client else {
            return PollFd::new(self.listener.as_fd(), PollFlags::POLLIN);
        };
        // A client that does not read its answers is not asked for more commands.
        let events = if client.unsent.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::POLLOUT
        };
        PollFd::new(client.as_fd(), events)
    }

    fn serve(&mut self, control: &mut Control) {
        let Some(client) = &mut self.client else {
            self.client = self.accept();
            return;
        };
        if client.unsent.is_empty() {
            let open = client.receive();
            client.execute(&self.table, control);
            if !open {
                self.client = None;
                return;
            }
        }
        client.flush();
        if client.session.is_overrun() {
            self.client = None;
        }
    }

    fn accept(&self) -> Option<Client> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        let options = SessionOptions {
            version: commands::version(),
            layout: Layout::OneLine,
        };
        let mut client = Client {
            stream,
            session: Session::new(&options),
            unsent: Vec::new(),
        };
        client.flush();
        Some(client)
    }

    fn close(self) {
        if let Some(mut client) = self.client {
            client.unsent.extend(client.session.take_output());
            let patient = client.stream.set_nonblocking(false).is_ok()
                && client.stream.set_write_timeout(Some(FAREWELL)).is_ok();
            if patient {
                // Who does not read in that time does not want to know.
                let _ = client.stream.write_all(&client.unsent);
            }
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Reads what is there; returns whether the client may send more.
    fn receive(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => false,
            Ok(count) => {
                self.session.feed(&bytes[..count]);
                true
            }
            Err(error) => {
                matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                )
            }
        }
    }

    fn execute(&mut self, table: &CommandTable<SyncHandler<Control>>, control: &mut Control) {
        while !control.is_over()
            && let Some(request) = self.session.next_request()
        {
            let result = if request.command == "query-commands" {
                request.arguments().finish().map(|()| table.describe())
            } else {
                table.dispatch(control, &request)
            };
            for event in control.take_events() {
                self.session.event(&event);
            }
            self.session.reply(request.id, result);
        }
    }

    fn flush(&mut self) {
        self.unsent.extend(self.session.take_output());
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A full socket is tried again when it has room; a closed one shows at the next read.
                Err(_) => return,
            }
        }
    }
}
