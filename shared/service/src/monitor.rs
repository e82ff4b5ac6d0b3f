//! A QMP server on a character device.
//!
//! ```text
//!   receive ──> Session ──request──> Server::run ──reply──> Session ──> writer task ──> send
//!                                            events ──────────┘
//! ```
//!
//! One client at a time; the next waits in the socket's backlog. Input is read only while all
//! output has been sent, and a client that lets events pile up is disconnected, so a client
//! costs bounded memory.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::time::Duration;

use executor::sync::Notify;
use qmp::{
    Arguments, Error, Event, EventSink, Request, Result, Session, SessionOptions, Value, Version,
};
use serde::Deserialize;

use crate::chardev::{Channel, Chardev, Chardevs, Endpoint, SocketFile};

/// How long a client may take to read its last replies when the daemon ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// Whoever runs the commands.
pub trait Server: 'static {
    /// Runs a request of a client. `fds` are those that the client passed last; a command that wants one takes it out.
    fn run(
        self: &Rc<Self>,
        request: &Request,
        fds: &mut VecDeque<OwnedFd>,
    ) -> impl Future<Output = Result<Value>>;

    /// Sends every later event to `sink` while it lives.
    fn subscribe(&self, sink: &Rc<dyn EventSink>);
}

#[derive(Deserialize)]
struct MonitorOptions {
    chardev: String,
    #[serde(rename = "id")]
    _id: Option<String>,
    #[serde(default)]
    mode: Mode,
    #[serde(default)]
    pretty: bool,
}

#[derive(Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    #[default]
    Control,
    Readline,
}

/// A monitor that has its chardev and does not serve yet.
pub(crate) struct Monitor {
    endpoint: Endpoint,
    /// Absent for `--qmp`.
    chardev: Option<Rc<Chardev>>,
    options: SessionOptions,
}

impl Monitor {
    /// The monitor that a `--monitor` option describes.
    pub(crate) fn new(arguments: Arguments, chardevs: &Chardevs, version: Version) -> Result<Self> {
        let options: MonitorOptions = arguments.parse()?;
        let id = &options.chardev;
        let Some(chardev) = chardevs.find(id) else {
            return Err(Error::generic(format!("chardev \"{id}\" not found")));
        };
        if options.mode == Mode::Readline {
            return Err(Error::generic("Only QMP is supported"));
        }
        let endpoint = chardev.take()?;
        let layout = match options.pretty {
            true => qmp::json::Layout::Indented,
            false => qmp::json::Layout::OneLine,
        };
        let options = SessionOptions { version, layout };
        Ok(Self {
            endpoint,
            chardev: Some(chardev),
            options,
        })
    }

    /// A monitor without options.
    pub(crate) fn on(endpoint: Endpoint, version: Version) -> Self {
        let layout = qmp::json::Layout::OneLine;
        let options = SessionOptions { version, layout };
        Self {
            endpoint,
            chardev: None,
            options,
        }
    }

    /// The socket it listens on.
    pub(crate) fn socket_file(&self) -> Option<&SocketFile> {
        match &self.endpoint {
            Endpoint::Listening { socket_file, .. } => socket_file.as_ref(),
            Endpoint::Connected(_) => None,
        }
    }
}

/// The monitors that serve.
#[derive(Default)]
pub(crate) struct Monitors {
    clients: Rc<RefCell<Vec<Weak<Client>>>>,
    tasks: Vec<executor::JoinHandle<()>>,
}

impl Monitors {
    /// Starts serving the clients of `monitor`.
    pub(crate) fn serve<S: Server>(&mut self, server: &Rc<S>, monitor: Monitor) {
        let server = Rc::clone(server);
        let clients = Rc::clone(&self.clients);
        self.tasks.push(executor::spawn(async move {
            let options = monitor.options;
            let chardev = monitor.chardev;
            let note = |connected| {
                if let Some(chardev) = &chardev {
                    chardev.set_connected(connected);
                }
            };
            match monitor.endpoint {
                Endpoint::Connected(channel) => {
                    serve_client(&server, &options, &clients, channel).await;
                    note(false);
                }
                Endpoint::Listening {
                    listener,
                    mut first,
                    // Removed when the task is dropped.
                    socket_file: _socket_file,
                } => loop {
                    let accepted = match first.take() {
                        Some(stream) => Ok(stream),
                        None => listener.accept().await,
                    };
                    match accepted {
                        Ok(stream) => {
                            let channel = Channel::Socket(stream);
                            note(true);
                            serve_client(&server, &options, &clients, channel).await;
                            note(false);
                        }
                        Err(errno) => {
                            tracing::error!(%errno, "a monitor accepts no more clients");
                            return;
                        }
                    }
                },
            }
        }));
    }

    /// Sends what clients have not been sent yet, and closes.
    pub(crate) async fn close(self) {
        let clients: Vec<_> = self
            .clients
            .borrow()
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        for client in clients {
            if executor::time::timeout(FAREWELL, client.sent())
                .await
                .is_none()
            {
                tracing::warn!("a monitor's client does not read its replies");
            }
        }
        for task in self.tasks {
            task.cancel();
        }
    }
}

/// A connected client.
struct Client {
    channel: Channel,
    session: RefCell<Session>,
    /// There is output, or the client has gone.
    output: Notify,
    /// All output has been sent.
    idle: Notify,
    sending: Cell<bool>,
    gone: Cell<bool>,
}

impl EventSink for Client {
    fn event(&self, event: &Event) {
        let mut session = self.session.borrow_mut();
        session.event(event);
        if session.is_overrun() && !self.gone.get() {
            tracing::warn!("a monitor's client does not read its events: disconnected");
            self.channel.shut_down();
        }
        self.mark_output();
    }
}

impl Client {
    fn mark_output(&self) {
        self.sending.set(true);
        self.output.notify_all();
    }

    /// Waits until all output has been sent or the client has gone.
    async fn sent(&self) {
        loop {
            let idle = self.idle.notified();
            if !self.sending.get() || self.gone.get() {
                return;
            }
            idle.await;
        }
    }

    /// Sends output as it comes, until the client has gone.
    async fn write(&self) {
        loop {
            let more = self.output.notified();
            let bytes = self.session.borrow_mut().take_output();
            if !bytes.is_empty() {
                if self.channel.send(bytes).await.is_err() {
                    self.gone.set(true);
                    self.channel.shut_down();
                }
            } else {
                self.sending.set(false);
                self.idle.notify_all();
                if self.gone.get() {
                    return;
                }
                more.await;
            }
            if self.gone.get() {
                self.idle.notify_all();
                return;
            }
        }
    }

    /// Runs requests until the client has gone.
    async fn read<S: Server>(&self, server: &Rc<S>) {
        let mut fds = VecDeque::new();
        loop {
            let (bytes, passed) = match self.channel.receive().await {
                Ok((bytes, passed)) if !bytes.is_empty() => (bytes, passed),
                _ => return,
            };
            if !passed.is_empty() {
                fds = passed.into();
            }
            self.session.borrow_mut().feed(&bytes);
            loop {
                let request = self.session.borrow_mut().next_request();
                self.mark_output();
                let Some(request) = request else { break };
                let result = run(server, &request, &mut fds).await;
                self.session.borrow_mut().reply(request.id, result);
                self.mark_output();
                self.sent().await;
                if self.gone.get() {
                    return;
                }
            }
            self.sent().await;
        }
    }
}

async fn serve_client<S: Server>(
    server: &Rc<S>,
    options: &SessionOptions,
    clients: &RefCell<Vec<Weak<Client>>>,
    channel: Channel,
) {
    let client = Rc::new(Client {
        channel,
        session: RefCell::new(Session::new(options)),
        output: Notify::new(),
        idle: Notify::new(),
        sending: Cell::new(true),
        gone: Cell::new(false),
    });
    {
        let mut clients = clients.borrow_mut();
        clients.retain(|client| client.strong_count() > 0);
        clients.push(Rc::downgrade(&client));
    }
    let sink: Rc<dyn EventSink> = client.clone();
    server.subscribe(&sink);
    let writing = Rc::clone(&client);
    let writer = executor::spawn(async move { writing.write().await });
    client.read(server).await;
    client.gone.set(true);
    client.output.notify_all();
    writer.await;
}

async fn run<S: Server>(
    server: &Rc<S>,
    request: &Request,
    fds: &mut VecDeque<OwnedFd>,
) -> Result<Value> {
    let result = server.run(request, fds).await;
    match &result {
        Ok(_) => tracing::debug!(command = request.command, "done"),
        Err(error) => tracing::debug!(command = request.command, %error, "failed"),
    }
    result
}
