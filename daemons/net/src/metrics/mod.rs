//! The numbers of the daemon for Prometheus, by HTTP on a unix socket or on loopback.
//!
//! ```text
//!   accept ──> read head (bounded, timed) ──> numbers of this moment ──> text ──> send (timed) ──> close
//! ```
//!
//! Every client is a task of the control thread: nothing blocks, a client costs bounded memory and time, and only a few are
//! served at once; others wait in the socket's backlog. Whoever reaches the socket may read; nothing can be changed.

mod http;
mod text;

use std::cell::Cell;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::time::Duration;

use executor::net::{Listener, Stream};
use executor::sync::Notify;
use executor::{Errno, JoinHandle};
use qmp::{Arguments, Error, Result};
use serde::Deserialize;
use service::{Daemon, SocketFile};

use crate::control::Netd;

pub use text::encode;

/// Clients that are served at once.
const MAX_CLIENTS: usize = 16;
/// Wait after a failed accept: descriptors may be short for a moment.
const ACCEPT_AGAIN: Duration = Duration::from_millis(250);

/// A socket that metrics are read from; closed when dropped.
pub struct Endpoint {
    task: Option<JoinHandle<()>>,
    socket_file: Option<SocketFile>,
}

#[derive(Deserialize)]
struct EndpointOptions {
    address: String,
}

/// What an `address` means.
#[derive(Debug, PartialEq, Eq)]
enum Address {
    Tcp(SocketAddr),
    Path(PathBuf),
    Fd(String),
}

impl Endpoint {
    /// Opens the endpoint that a `--metrics` option describes, on the current (control) executor.
    ///
    /// # Errors
    /// An address that is not of this host alone, or cannot be bound.
    pub fn open(netd: &Rc<Netd>, arguments: Arguments) -> Result<Endpoint> {
        let EndpointOptions { address } = arguments.parse()?;
        let failed = |error: &dyn std::fmt::Display| {
            Error::generic(format!("Failed to listen on {address}: {error}"))
        };
        let mut socket_file = None;
        let listener = match parse(&address)? {
            Address::Tcp(tcp) => {
                let bound = TcpListener::bind(tcp).map_err(|error| failed(&error))?;
                Listener::from_fd(OwnedFd::from(bound))
            }
            Address::Path(path) => {
                let bound = Listener::bind_unix(&path);
                if bound.is_ok() {
                    socket_file = Some(SocketFile::new(path));
                }
                bound
            }
            Address::Fd(name) => {
                let fd = netd.fds().claim(&name);
                Listener::from_fd(fd.map_err(|error| Error::generic(error.to_string()))?)
            }
        };
        let listener = listener.map_err(|error| failed(&error))?;
        let task = Some(executor::spawn(serve(Rc::downgrade(netd), listener)));
        Ok(Endpoint { task, socket_file })
    }

    /// The socket that it made in the file system.
    pub fn socket_path(&self) -> Option<PathBuf> {
        self.socket_file.as_ref().map(|file| file.path().to_owned())
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.cancel();
        }
    }
}

fn parse(text: &str) -> Result<Address> {
    if let Some(name) = text.strip_prefix("fd:") {
        return Ok(Address::Fd(name.to_owned()));
    }
    match text.parse::<SocketAddr>() {
        Ok(tcp) if tcp.ip().is_loopback() => Ok(Address::Tcp(tcp)),
        Ok(tcp) => Err(Error::generic(format!(
            "{tcp} is not a loopback address: metrics are for this host alone"
        ))),
        Err(_) if text.is_empty() || (text.contains(':') && !text.contains('/')) => {
            Err(Error::parameter_expects(
                "address",
                "the path of a socket, 127.0.0.1:PORT, [::1]:PORT or fd:NAME",
            ))
        }
        Err(_) => Ok(Address::Path(text.into())),
    }
}

/// Places for clients.
struct Places {
    taken: Cell<usize>,
    freed: Notify,
}

/// A client's place, given back when dropped.
struct Place(Rc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.set(self.0.taken.get() - 1);
        self.0.freed.notify_all();
    }
}

async fn serve(netd: Weak<Netd>, listener: Listener) {
    let places = Rc::new(Places {
        taken: Cell::new(0),
        freed: Notify::new(),
    });
    loop {
        let freed = places.freed.notified();
        if places.taken.get() >= MAX_CLIENTS {
            freed.await;
            continue;
        }
        match listener.accept().await {
            Ok(stream) => {
                places.taken.set(places.taken.get() + 1);
                let place = Place(Rc::clone(&places));
                let netd = Weak::clone(&netd);
                drop(executor::spawn(async move {
                    let _place = place;
                    answer(&netd, &stream).await;
                }));
            }
            Err(errno) => {
                tracing::warn!(%errno, "the metrics endpoint cannot accept a client");
                if !is_passing(errno) {
                    return;
                }
                executor::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

/// Whether accepting may succeed later.
fn is_passing(errno: Errno) -> bool {
    !matches!(errno, Errno::EBADF | Errno::EINVAL | Errno::ENOTSOCK)
}

async fn answer(netd: &Weak<Netd>, stream: &Stream) {
    let request = http::receive(stream).await;
    let response = request.map(|request| {
        let netd = netd.upgrade();
        http::response(request, || {
            let numbers = netd.map(|netd| netd.numbers()).unwrap_or_default();
            encode(numbers)
        })
    });
    if let Some(response) = response {
        http::send(stream, response).await;
    }
    stream.shutdown();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_host_are_taken() {
        let tcp = |text: &str| Address::Tcp(text.parse().unwrap());
        assert_eq!(parse("127.0.0.1:9100"), Ok(tcp("127.0.0.1:9100")));
        assert_eq!(parse("[::1]:0"), Ok(tcp("[::1]:0")));
        assert_eq!(parse("/run/m"), Ok(Address::Path("/run/m".into())));
        assert_eq!(parse("m.sock"), Ok(Address::Path("m.sock".into())));
        assert_eq!(parse("fd:metrics"), Ok(Address::Fd("metrics".into())));
        for wrong in [
            "0.0.0.0:9100",
            "[::]:9100",
            "192.0.2.1:80",
            "localhost:80",
            "",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
