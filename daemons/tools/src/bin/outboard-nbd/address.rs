//! Where the server is.

use crate::options::DEFAULT_PORT;
use executor::Errno;
use executor::net::{Listener, Stream};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use tools::failure::Failure;

/// Every address of this host.
const ANY: &str = "0.0.0.0";

/// A unix socket, or a host and a port.
#[derive(Clone, Debug, Default)]
pub(crate) struct Address {
    socket: Option<PathBuf>,
    host: Option<String>,
    port: Option<u16>,
}

impl Address {
    /// What `-k`, `-b` and `-p` say.
    pub(crate) fn new(
        socket: Option<PathBuf>,
        host: Option<String>,
        port: Option<&str>,
    ) -> Result<Self, Failure> {
        let port = match port {
            None => None,
            Some(text) => match text.parse() {
                Ok(0) | Err(_) => {
                    return Err(Failure::message(format!("Invalid port number '{text}'")));
                }
                Ok(port) => Some(port),
            },
        };
        Ok(Self { socket, host, port })
    }

    /// The unix socket for a kernel device.
    pub(crate) fn for_device(device: &str) -> Self {
        let name = Path::new(device).file_name().unwrap_or_default();
        let path = format!("/var/lock/outboard-nbd-{}", name.to_string_lossy());
        Self {
            socket: Some(path.into()),
            ..Self::default()
        }
    }

    /// Whether any of the options was given.
    pub(crate) fn is_given(&self) -> bool {
        self.socket.is_some() || self.host.is_some() || self.port.is_some()
    }

    /// The path, when it is a unix socket.
    pub(crate) fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The host whose certificate the server has to have; `None` for a unix socket.
    pub(crate) fn host(&self) -> Option<&str> {
        match self.socket {
            Some(_) => None,
            None => Some(self.host.as_deref().unwrap_or(ANY)),
        }
    }

    fn port(&self) -> u16 {
        self.port.unwrap_or(DEFAULT_PORT)
    }

    /// Listens.
    pub(crate) fn listen(&self) -> Result<Vec<Listener>, Failure> {
        if let Some(path) = &self.socket {
            let shown = path.display();
            let bound = Listener::bind_unix(path)
                .map_err(|error| failure(&format!("Failed to bind socket to {shown}"), &error))?;
            return Ok(vec![bound]);
        }
        let host = self.host.as_deref().unwrap_or(ANY);
        let mut listeners = Vec::new();
        for address in self.resolve(host)? {
            let listener = Listener::bind_tcp(address)
                .map_err(|error| failure("Failed to find an available port", &error))?;
            listeners.push(listener);
        }
        Ok(listeners)
    }

    /// Connects to the first address that answers.
    pub(crate) async fn connect(&self) -> Result<Stream, Failure> {
        if let Some(path) = &self.socket {
            let shown = path.display();
            return Stream::connect_unix(path)
                .await
                .map_err(|errno| not_connected(&shown.to_string(), errno));
        }
        let host = self.host.as_deref().unwrap_or(ANY);
        let mut failed = Errno::EADDRNOTAVAIL;
        for address in self.resolve(host)? {
            match Stream::connect_tcp(address).await {
                Ok(stream) => return Ok(stream),
                Err(errno) => failed = errno,
            }
        }
        Err(not_connected(&format!("{host}:{}", self.port()), failed))
    }

    fn resolve(&self, host: &str) -> Result<Vec<SocketAddr>, Failure> {
        let plain = host.trim_start_matches('[').trim_end_matches(']');
        match (plain, self.port()).to_socket_addrs() {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => {
                let text = error.to_string();
                let reason = text.rsplit(": ").next().unwrap_or_default();
                Err(Failure::message(format!(
                    "address resolution failed for {host}:{}: {reason}",
                    self.port()
                )))
            }
        }
    }
}

/// A failure with the host's words.
pub(crate) fn failure(what: &str, error: &io::Error) -> Failure {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Failure::message(format!("{what}: {}", block::error::reason(errno)))
}

fn not_connected(address: &str, errno: Errno) -> Failure {
    let reason = block::error::reason(errno);
    Failure::message(format!("Failed to connect to '{address}': {reason}"))
}
