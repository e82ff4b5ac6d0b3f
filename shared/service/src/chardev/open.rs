//! Opening character devices.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use executor::Errno;
use executor::net::{Listener, Stream};
use nix::fcntl::OFlag;
use nix::pty;
use qmp::{Arguments, Error, Result};
use serde::Deserialize;
use vhost_daemon::notify::NamedFds;

use super::options::{Address, Backend, Socket};
use super::ring::Ring;
use super::{Channel, Device, Endpoint, SocketFile};

fn reason(error: &std::io::Error) -> String {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    executor::reason(Errno::from_raw(errno))
}

/// Opens a device.
pub(super) async fn open(fds: &NamedFds, backend: Backend) -> Result<Device> {
    let kind = backend.kind();
    let mut ring = None;
    let (filename, endpoint) = match backend {
        Backend::Socket(socket) => open_socket(fds, socket).await?,
        Backend::File {
            output,
            input,
            append,
        } => {
            let mut options = OpenOptions::new();
            options.create(true).append(append);
            options.write(true).truncate(!append);
            let output = open_file(&options, &output)?;
            let input = input.map(|path| open_file(OpenOptions::new().read(true), &path));
            let input = input.transpose()?;
            connected(kind, Channel::Files { input, output })
        }
        Backend::Pipe(path) => connected(kind, open_pipe(&path)?),
        Backend::Ring(size) => {
            let what = "size of ringbuf chardev must be power of two";
            let made = Ring::new(size).ok_or_else(|| Error::generic(what))?;
            let made = Rc::new(RefCell::new(made));
            ring = Some(Rc::clone(&made));
            connected(kind, Channel::Ring(made))
        }
        Backend::Stdio => connected(kind, Channel::Stdio),
        Backend::Null => connected(kind, Channel::Null),
        Backend::Pty => {
            let (path, channel) = open_pty()?;
            (format!("pty:{path}"), Endpoint::Connected(channel))
        }
    };
    Ok(Device {
        kind,
        filename,
        endpoint: Some(endpoint),
        ring,
    })
}

fn connected(kind: &str, channel: Channel) -> (String, Endpoint) {
    (kind.to_owned(), Endpoint::Connected(channel))
}

fn open_file(options: &OpenOptions, path: &Path) -> Result<File> {
    options.open(path).map_err(|error| {
        let path = path.display();
        Error::generic(format!("Could not open '{path}': {}", reason(&error)))
    })
}

/// `PATH.in` and `PATH.out`, else `PATH` for both directions.
fn open_pipe(path: &Path) -> Result<Channel> {
    // Both ways, so that opening never waits for the other end.
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let beside = |suffix: &str| PathBuf::from(format!("{}{suffix}", path.display()));
    let pair = (
        options.open(beside(".in")).ok(),
        options.open(beside(".out")).ok(),
    );
    let (input, output) = match pair {
        (Some(input), Some(output)) => (input, output),
        _ => {
            let both = open_file(&options, path)?;
            let input = both.try_clone();
            (input.map_err(|error| Error::generic(reason(&error)))?, both)
        }
    };
    Ok(Channel::Files {
        input: Some(input),
        output,
    })
}

/// The terminal's path, and our end of it.
fn open_pty() -> Result<(String, Channel)> {
    let failed =
        |errno: Errno| Error::generic(format!("Failed to create PTY: {}", executor::reason(errno)));
    let master = pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).map_err(failed)?;
    pty::grantpt(&master).map_err(failed)?;
    pty::unlockpt(&master).map_err(failed)?;
    let path = pty::ptsname_r(&master).map_err(failed)?;
    let output = File::from(OwnedFd::from(master));
    let input = output
        .try_clone()
        .map_err(|error| Error::generic(reason(&error)))?;
    let input = Some(input);
    Ok((path, Channel::Files { input, output }))
}

#[derive(Deserialize)]
struct ListenOptions {
    path: PathBuf,
}

/// Listens where a `--qmp` option says, without waiting for a client.
pub(crate) async fn listen(arguments: Arguments) -> Result<Endpoint> {
    let ListenOptions { path } = arguments.parse()?;
    let shown = path.display().to_string();
    let listener = Listener::bind_unix(&path);
    let listener = listener.map_err(|error| bind_failed(&shown, &error))?;
    Ok(Endpoint::Listening {
        listener,
        first: None,
        socket_file: Some(SocketFile::new(path)),
    })
}

fn bind_failed(shown: &str, error: &std::io::Error) -> Error {
    let reason = reason(error);
    Error::generic(format!("Failed to bind socket to {shown}: {reason}"))
}

async fn open_socket(fds: &NamedFds, socket: Socket) -> Result<(String, Endpoint)> {
    if !socket.server {
        return connect(fds, socket.address).await;
    }
    let (shown, listener, socket_file) = match socket.address {
        Address::Unix(path) => {
            let shown = path.display().to_string();
            let listener = Listener::bind_unix(&path);
            let listener = listener.map_err(|error| bind_failed(&shown, &error))?;
            let filename = format!("unix:{shown},server=on");
            (filename, listener, Some(SocketFile::new(path)))
        }
        Address::Inet { host, port } => {
            let shown = format!("{host}:{port}");
            let failed = |error: std::io::Error| bind_failed(&shown, &error);
            let bound = TcpListener::bind(resolve(&host, &port)?.as_slice()).map_err(failed)?;
            let at = bound.local_addr().map_err(failed)?;
            let listener = Listener::from_fd(bound.into()).map_err(failed)?;
            (format!("tcp:{at},server=on"), listener, None)
        }
        Address::Fd(name) => {
            let listener = Listener::from_fd(claim(fds, &name)?);
            let listener = listener.map_err(|error| bind_failed(&name, &error))?;
            (format!("fd:{name},server=on"), listener, None)
        }
    };
    let mut first = None;
    if socket.wait {
        tracing::info!(socket = shown, "waiting for a client");
        let accepted = listener.accept().await;
        let failed = |errno: Errno| {
            let reason = executor::reason(errno);
            Error::generic(format!("Failed to accept on {shown}: {reason}"))
        };
        first = Some(accepted.map_err(failed)?);
    }
    let endpoint = Endpoint::Listening {
        listener,
        first,
        socket_file,
    };
    Ok((shown, endpoint))
}

async fn connect(fds: &NamedFds, address: Address) -> Result<(String, Endpoint)> {
    let failed = |shown: &str, reason: &str| {
        Error::generic(format!("Failed to connect to '{shown}': {reason}"))
    };
    let (filename, stream) = match address {
        Address::Unix(path) => {
            let shown = path.display().to_string();
            let stream = Stream::connect_unix(&path).await;
            let stream = stream.map_err(|errno| failed(&shown, &executor::reason(errno)))?;
            (format!("unix:{shown}"), stream)
        }
        Address::Inet { host, port } => {
            let shown = format!("{host}:{port}");
            let failed = |error: std::io::Error| failed(&shown, &reason(&error));
            let stream = TcpStream::connect(resolve(&host, &port)?.as_slice()).map_err(failed)?;
            let stream = Stream::from_fd(stream.into()).map_err(failed)?;
            (format!("tcp:{shown}"), stream)
        }
        Address::Fd(name) => {
            let stream = Stream::from_fd(claim(fds, &name)?);
            let stream = stream
                .map_err(|error| Error::generic(format!("chardev: bad descriptor: {error}")))?;
            (format!("fd:{name}"), stream)
        }
    };
    Ok((filename, Endpoint::Connected(Channel::Socket(stream))))
}

fn claim(fds: &NamedFds, name: &str) -> Result<OwnedFd> {
    let claimed = fds.claim(name);
    claimed.map_err(|error| Error::generic(error.to_string()))
}

/// The addresses of a host's port; of all of this host's interfaces when there is no host.
fn resolve(host: &str, port: &str) -> Result<Vec<std::net::SocketAddr>> {
    let failed = |what: String| {
        Error::generic(format!(
            "address resolution failed for {host}:{port}: {what}"
        ))
    };
    let number: u16 = port
        .parse()
        .map_err(|_| failed("Servname not supported for ai_socktype".to_owned()))?;
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    let found = (host, number).to_socket_addrs();
    Ok(found.map_err(|error| failed(error.to_string()))?.collect())
}
