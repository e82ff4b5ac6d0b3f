//! Getting and keeping a front-end: listening, connecting, socket activation, reconnect.
//!
//! ```text
//!   Listen:  bind ──> accept ──> session ──ends──> accept ...   (others wait in the backlog)
//!   Connect: connect ──ok──> session ──ends──┐
//!               ▲   └─fails─> back-off ──────┤
//!               └────────────────────────────┘
//! ```
//!
//! Promises: one session at a time, and the next begins only after every queue of the last has
//! drained. The device outlives its front-ends.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use executor::JoinHandle;
use executor::net::{Listener, Stream};
use executor::sync::Notify;
use executor::time::Backoff;

use crate::device::Device;
use crate::session::Session;

/// First and longest wait after a failed connection or accept.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));

/// Where the front-end is met.
#[derive(Debug)]
pub enum Address {
    /// Listen on a unix socket at this path.
    Listen(PathBuf),
    /// Accept on a socket that listens already (systemd socket activation, `addr.type=fd`).
    ListenFd(OwnedFd),
    /// Connect to a listening front-end, again and again until it is there.
    Connect(PathBuf),
}

/// Where connections come from.
enum Source {
    Listener(Listener),
    Connect(PathBuf),
}

impl Source {
    fn listens(&self) -> bool {
        matches!(self, Source::Listener(_))
    }

    async fn next(&self) -> Result<Stream, executor::Errno> {
        match self {
            Source::Listener(listener) => listener.accept().await,
            Source::Connect(path) => Stream::connect_unix(path).await,
        }
    }
}

/// State shared by a server and its loop.
struct Shared {
    stopping: Cell<bool>,
    stop: Notify,
    changed: Arc<Notify>,
    /// The session's socket, to end it with.
    current: RefCell<Option<Rc<Stream>>>,
}

/// A running server; dropping it without [`Server::stop`] leaves it running.
pub struct Server {
    shared: Rc<Shared>,
    task: JoinHandle<()>,
    /// A socket file of ours, to be removed.
    path: Option<PathBuf>,
}

impl Server {
    /// Starts serving `device` on the current (control) executor. A path is bound when this
    /// returns.
    ///
    /// # Errors
    /// When the address cannot be bound or the descriptor is no listening socket.
    pub fn start<D: Device>(device: Rc<D>, address: Address) -> io::Result<Server> {
        let mut bound = None;
        let source = match address {
            Address::Listen(path) => {
                let listener = Listener::bind_unix(&path)?;
                bound = Some(path);
                Source::Listener(listener)
            }
            Address::ListenFd(fd) => Source::Listener(Listener::from_fd(fd)?),
            Address::Connect(path) => Source::Connect(path),
        };
        let shared = Rc::new(Shared {
            stopping: Cell::new(false),
            stop: Notify::new(),
            changed: Arc::new(Notify::new()),
            current: RefCell::new(None),
        });
        let task = executor::spawn(serve(device, source, shared.clone()));
        Ok(Server {
            shared,
            task,
            path: bound,
        })
    }

    /// Notifying this tells the front-end that the configuration space changed; from any thread.
    pub fn config_changed(&self) -> Arc<Notify> {
        self.shared.changed.clone()
    }

    /// Whether a front-end is there.
    pub fn connected(&self) -> bool {
        self.shared.current.borrow().is_some()
    }

    /// Ends the session, drains the queues, closes and removes the socket.
    pub async fn stop(self) {
        self.shared.stopping.set(true);
        self.shared.stop.notify_all();
        if let Some(stream) = &*self.shared.current.borrow() {
            stream.shutdown();
        }
        self.task.await;
        if let Some(path) = self.path {
            remove_socket(&path);
        }
    }
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), "cannot remove the socket: {error}");
    }
}

/// The output of `future`, or `None` when the server is to stop first.
async fn unless_stopped<F: Future>(shared: &Shared, future: F) -> Option<F::Output> {
    let mut stop = pin!(shared.stop.notified());
    let mut future = pin!(future);
    poll_fn(|cx| {
        if shared.stopping.get() || stop.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        future.as_mut().poll(cx).map(Some)
    })
    .await
}

async fn serve<D: Device>(device: Rc<D>, source: Source, shared: Rc<Shared>) {
    let mut backoff = Backoff::new(PAUSE);
    while let Some(next) = unless_stopped(&shared, source.next()).await {
        let served = match next {
            Ok(stream) => run_session(&device, stream, &shared).await,
            Err(errno) => {
                tracing::debug!(device = device.name(), "no front-end: {errno}");
                Served::Nothing
            }
        };
        // Whoever connects to a listener has waited enough; but neither an absent front-end nor
        // one that leaves at once may make connecting to it a busy loop.
        if served == Served::Messages || (served == Served::Silence && source.listens()) {
            backoff = Backoff::new(PAUSE);
            continue;
        }
        if unless_stopped(&shared, backoff.pause()).await.is_none() {
            break;
        }
    }
}

/// What came of waiting for a front-end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Served {
    /// Nobody was there.
    Nothing,
    /// A front-end that left without a word.
    Silence,
    /// A session with messages.
    Messages,
}

/// Serves one front-end until it leaves.
async fn run_session<D: Device>(device: &Rc<D>, stream: Stream, shared: &Rc<Shared>) -> Served {
    let stream = Rc::new(stream);
    shared.current.replace(Some(stream.clone()));
    tracing::info!(device = device.name(), "front-end connected");
    let mut session = Session::new(device.clone(), stream, shared.changed.clone());
    let result = session.run().await;
    session.close().await;
    shared.current.replace(None);
    match result {
        Ok(()) => tracing::info!(device = device.name(), "front-end disconnected"),
        Err(error) => tracing::error!(device = device.name(), "front-end dropped: {error}"),
    }
    match session.messages() {
        0 => Served::Silence,
        _ => Served::Messages,
    }
}
