//! Character devices: where a monitor's bytes come from and go to.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use executor::Errno;
use executor::net::{Listener, Stream, poll_fd};
use qmp::{Arguments, Error, Result};
use serde::Deserialize;
use vhost_daemon::notify::NamedFds;

/// Bytes per read.
const READ_BYTES: usize = 16 << 10;
/// Descriptors that may come with one read.
const MAX_FDS: usize = 16;
/// A pipe that is ready for output takes this many bytes without blocking.
const PIPE_BYTES: usize = 4096;

/// A configured character device.
pub(crate) struct Chardev {
    /// Its name.
    pub(crate) id: String,
    /// What it is, until a monitor takes it.
    pub(crate) endpoint: RefCell<Option<Endpoint>>,
}

/// Where clients come from.
pub(crate) enum Endpoint {
    /// One client after the other.
    Listening {
        /// The socket.
        listener: Listener,
        /// A client that was waited for at the start.
        first: Option<Stream>,
        /// What to remove at the end.
        socket_file: Option<SocketFile>,
    },
    /// One client.
    Connected(Channel),
}

/// A socket in the file system that this process made, removed when dropped.
pub struct SocketFile {
    path: PathBuf,
}

impl SocketFile {
    /// The socket at `path`.
    pub fn new(path: PathBuf) -> SocketFile {
        // The working directory changes when the daemon goes into the background.
        let path = std::path::absolute(&path).unwrap_or(path);
        SocketFile { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// A client's byte stream.
pub(crate) enum Channel {
    /// A unix socket.
    Socket(Stream),
    /// Standard input and output.
    Stdio,
}

impl Channel {
    /// The next bytes, empty at the end, and descriptors that came along.
    pub(crate) async fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), Errno> {
        match self {
            Self::Socket(stream) => stream.recv_with_fds(READ_BYTES, MAX_FDS).await,
            Self::Stdio => {
                let stdin = io::stdin();
                poll_fd(stdin.as_fd(), libc::POLLIN).await?;
                let mut bytes = vec![0; READ_BYTES];
                let length = nix::unistd::read(&stdin, &mut bytes)?;
                bytes.truncate(length);
                Ok((bytes, Vec::new()))
            }
        }
    }

    /// Sends all of `bytes`.
    pub(crate) async fn send(&self, bytes: Vec<u8>) -> Result<(), Errno> {
        match self {
            Self::Socket(stream) => stream.send_all(bytes).await,
            Self::Stdio => {
                let stdout = io::stdout();
                let mut rest = bytes.as_slice();
                while !rest.is_empty() {
                    poll_fd(stdout.as_fd(), libc::POLLOUT).await?;
                    let chunk = &rest[..rest.len().min(PIPE_BYTES)];
                    rest = &rest[nix::unistd::write(&stdout, chunk)?..];
                }
                Ok(())
            }
        }
    }

    /// Ends a receive that waits.
    pub(crate) fn shut_down(&self) {
        match self {
            Self::Socket(stream) => stream.shutdown(),
            Self::Stdio => {}
        }
    }
}

#[derive(Deserialize)]
struct Identity {
    id: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename = "backend", rename_all = "kebab-case")]
enum Backend {
    Socket {
        path: Option<String>,
        fd: Option<String>,
        #[serde(default)]
        server: bool,
        wait: Option<bool>,
    },
    Stdio {},
}

/// Opens the device that a `--chardev` option describes.
pub(crate) async fn open(fds: &NamedFds, mut arguments: Arguments) -> Result<Chardev> {
    let Identity { id } = arguments.take()?;
    let id = id.ok_or_else(|| Error::generic("chardev: no id specified"))?;
    match arguments.get("backend").and_then(|name| name.as_str()) {
        Some("socket" | "stdio") => {}
        Some(other) => {
            let what = format!("'{other}' is not a valid char driver name");
            return Err(Error::generic(what));
        }
        None => return Err(Error::generic(format!("chardev: \"{id}\" missing backend"))),
    }
    let endpoint = match arguments.parse()? {
        Backend::Stdio {} => Endpoint::Connected(Channel::Stdio),
        Backend::Socket {
            path,
            fd,
            server,
            wait,
        } => {
            let socket = match (path, fd) {
                (Some(path), None) => Address::Path(path.into()),
                (None, Some(name)) => {
                    let claimed = fds.claim(&name);
                    Address::Fd(claimed.map_err(|error| Error::generic(error.to_string()))?)
                }
                _ => {
                    let what = "chardev: socket: exactly one of 'path' and 'fd' is needed";
                    return Err(Error::generic(what));
                }
            };
            match (server, wait) {
                (true, wait) => socket.listen(wait.unwrap_or(true)).await?,
                (false, None) => socket.connect().await?,
                (false, Some(_)) => {
                    let what = "'wait' option is incompatible with socket in client connect mode";
                    return Err(Error::generic(what));
                }
            }
        }
    };
    let endpoint = RefCell::new(Some(endpoint));
    Ok(Chardev { id, endpoint })
}

#[derive(Deserialize)]
struct ListenOptions {
    path: PathBuf,
}

/// Listens where a `--qmp` option says, without waiting for a client.
pub(crate) async fn listen(arguments: Arguments) -> Result<Endpoint> {
    let ListenOptions { path } = arguments.parse()?;
    Address::Path(path).listen(false).await
}

enum Address {
    Path(PathBuf),
    Fd(OwnedFd),
}

impl Address {
    async fn listen(self, wait: bool) -> Result<Endpoint> {
        let (listener, path) = match self {
            Self::Fd(fd) => (Listener::from_fd(fd), None),
            Self::Path(path) => (Listener::bind_unix(&path), Some(path)),
        };
        let shown = path.as_ref().map(|path| path.display().to_string());
        let shown = shown.unwrap_or_else(|| "the given descriptor".into());
        let listener = listener.map_err(|error| {
            let reason = Errno::from_raw(error.raw_os_error().unwrap_or(0)).desc();
            Error::generic(format!("Failed to bind socket to {shown}: {reason}"))
        })?;
        let socket_file = path.map(SocketFile::new);
        let mut first = None;
        if wait {
            tracing::info!(socket = shown, "waiting for a client");
            let accepted = listener.accept().await;
            let failed = |errno: Errno| {
                let reason = errno.desc();
                Error::generic(format!("Failed to accept on {shown}: {reason}"))
            };
            first = Some(accepted.map_err(failed)?);
        }
        Ok(Endpoint::Listening {
            listener,
            first,
            socket_file,
        })
    }

    async fn connect(self) -> Result<Endpoint> {
        let stream = match self {
            Self::Fd(fd) => Stream::from_fd(fd)
                .map_err(|error| Error::generic(format!("chardev: bad descriptor: {error}")))?,
            Self::Path(path) => Stream::connect_unix(&path).await.map_err(|errno| {
                let (path, reason) = (path.display(), errno.desc());
                Error::generic(format!("Failed to connect to '{path}': {reason}"))
            })?,
        };
        Ok(Endpoint::Connected(Channel::Socket(stream)))
    }
}
