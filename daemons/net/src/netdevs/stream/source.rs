//! Where the connections of a stream back-end come from.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use executor::Errno;
use executor::net::{Listener, Stream, poll_fd};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, setsockopt, socket,
    sockopt,
};

use crate::netdevs::Context;
use crate::netdevs::address::{SocketAddress, resolve};

/// How long a client that has one try waits for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two tries to accept when the host is short of something.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Gives one connection after the other.
pub(crate) enum Source {
    /// One connection, which was there before.
    Given(Option<Stream>),
    /// Connects to a peer.
    Client {
        target: Target,
        /// Time between two tries; `None`: one try for each port that attaches.
        every: Option<Duration>,
        /// Made when the back-end was opened.
        first: Option<Stream>,
    },
    /// Waits for peers; one at a time.
    Server(Server),
    /// A process that sends connected sockets.
    Helper {
        /// Sent already.
        first: Option<Stream>,
        /// Where the others come from.
        helper: Stream,
    },
}

/// Whom a client connects to.
#[derive(Debug)]
pub(crate) enum Target {
    Unix(PathBuf),
    Inet(SocketAddr),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Unix(path) => write!(f, "'{}'", path.display()),
            Target::Inet(address) => write!(f, "{address}"),
        }
    }
}

/// A listening socket.
pub(crate) struct Server {
    listener: Listener,
    /// Removed with it.
    path: Option<PathBuf>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "cannot remove a socket");
        }
    }
}

impl Source {
    /// A server or client at `address`.
    pub(crate) fn open(
        address: &SocketAddress,
        server: bool,
        every: Option<Duration>,
        context: &Context<'_>,
    ) -> Result<Source> {
        if server && every.is_some() {
            bail!("'reconnect' is for clients: it does not go with 'server'");
        }
        match address {
            SocketAddress::Fd { str } if every.is_some() => {
                bail!("descriptor '{str}' cannot be connected again ('reconnect')")
            }
            SocketAddress::Fd { str } => {
                let fd = (context.descriptor)(str)?;
                match server {
                    true => Server::on(fd),
                    false => Ok(Source::Given(Some(Stream::from_fd(fd)?))),
                }
            }
            SocketAddress::Unix { path } if server => {
                let failed = || format!("cannot listen at '{}'", path.display());
                let listener = Listener::bind_unix(path).with_context(failed)?;
                // The working directory may change.
                let path = std::path::absolute(path).with_context(failed)?;
                Ok(Source::Server(Server {
                    listener,
                    path: Some(path),
                }))
            }
            SocketAddress::Inet { host, port } if server => {
                let address = resolve(host, port)?;
                let listener = TcpListener::bind(address)
                    .with_context(|| format!("cannot listen at {address}"))?;
                Server::on(listener.into())
            }
            SocketAddress::Unix { path } => {
                let path = std::path::absolute(path)
                    .with_context(|| format!("cannot connect to '{}'", path.display()))?;
                Source::client(Target::Unix(path), every)
            }
            SocketAddress::Inet { host, port } => {
                Source::client(Target::Inet(resolve(host, port)?), every)
            }
        }
    }

    fn client(target: Target, every: Option<Duration>) -> Result<Source> {
        let first = match every {
            Some(_) => None,
            None => {
                let failed = || format!("cannot connect to {target} ('reconnect' would try again)");
                Some(target.connect_once().with_context(failed)?)
            }
        };
        Ok(Source::Client {
            target,
            every,
            first,
        })
    }

    /// The next connection; `again` when there was one before, for the same port. Waits for ever when there will be none.
    ///
    /// # Errors
    /// There will be none any more, for this reason.
    pub(crate) async fn next(&mut self, again: bool) -> io::Result<Stream> {
        match self {
            Source::Given(stream) => match stream.take() {
                Some(stream) => Ok(stream),
                None => Err(io::Error::other("the descriptor's connection has ended")),
            },
            Source::Client {
                target,
                every,
                first,
            } => match (first.take(), every) {
                (Some(stream), _) => Ok(stream),
                (None, Some(every)) => Ok(target.connect_until(*every, again).await),
                (None, None) if again => {
                    let what = format!(
                        "the connection to {target} has ended, and is not to be made again ('reconnect')"
                    );
                    Err(io::Error::other(what))
                }
                (None, None) => Ok(target.connect().await?),
            },
            Source::Server(server) => {
                let stream = server.accept().await?;
                no_delay(&stream);
                Ok(stream)
            }
            Source::Helper { first, helper } => match first.take() {
                Some(stream) => Ok(stream),
                None => from_helper(helper).await,
            },
        }
    }
}

/// The connected socket that the helper sends next.
async fn from_helper(helper: &Stream) -> io::Result<Stream> {
    let (message, mut fds) = helper.recv_with_fds(1, 1).await?;
    match (message.is_empty(), fds.pop()) {
        (false, Some(fd)) => Stream::from_fd(fd),
        _ => Err(io::Error::other("the helper process has ended")),
    }
}

impl Server {
    /// A server on a listening socket of others' making.
    fn on(fd: OwnedFd) -> Result<Source> {
        let listener = Listener::from_fd(fd)?;
        Ok(Source::Server(Server {
            listener,
            path: None,
        }))
    }

    async fn accept(&self) -> Result<Stream, Errno> {
        loop {
            match self.listener.accept().await {
                Err(Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO) => {}
                // Others may give some back.
                Err(error @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)) => {
                    tracing::warn!("cannot accept a connection: {}", error.desc());
                    executor::time::sleep(ACCEPT_PAUSE).await;
                }
                accepted => return accepted,
            }
        }
    }
}

impl Target {
    /// Connects; the calling thread waits.
    fn connect_once(&self) -> io::Result<Stream> {
        let fd: OwnedFd = match self {
            Target::Unix(path) => UnixStream::connect(path)?.into(),
            Target::Inet(address) => TcpStream::connect_timeout(address, CONNECT_TIMEOUT)?.into(),
        };
        let stream = Stream::from_fd(fd)?;
        no_delay(&stream);
        Ok(stream)
    }

    async fn connect(&self) -> Result<Stream, Errno> {
        match self {
            Target::Unix(path) => connect_unix(path).await,
            Target::Inet(address) => connect_inet(*address).await,
        }
    }

    /// Tries until it is connected. When there was a connection before, the first try waits, too: a peer that accepts and
    /// closes at once is not asked without end.
    async fn connect_until(&self, every: Duration, mut again: bool) -> Stream {
        let mut complained = false;
        loop {
            if std::mem::replace(&mut again, true) {
                executor::time::sleep(every).await;
            }
            match self.connect().await {
                Ok(stream) => return stream,
                Err(error) if !complained => {
                    complained = true;
                    tracing::warn!("cannot connect to {self}: {}; trying again", error.desc());
                }
                Err(error) => tracing::debug!("cannot connect to {self}: {}", error.desc()),
            }
        }
    }
}

async fn connect_unix(path: &Path) -> Result<Stream, Errno> {
    Stream::connect_unix(path).await
}

async fn connect_inet(address: SocketAddr) -> Result<Stream, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Stream, flags, None)?;
    match connect(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &SockaddrStorage::from(address),
    ) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            poll_fd(fd.as_fd(), libc::POLLOUT).await?;
            let errno = getsockopt(&fd, sockopt::SocketError)?;
            if errno != 0 {
                return Err(Errno::from_raw(errno));
            }
        }
        Err(error) => return Err(error),
    }
    let stream = Stream::from_fd(fd).map_err(|_| Errno::EIO)?;
    no_delay(&stream);
    Ok(stream)
}

/// Frames go at once; a unix socket has no such option and does that anyway.
fn no_delay(stream: &Stream) {
    let _ = setsockopt(&stream.as_fd(), sockopt::TcpNoDelay, &true);
}
