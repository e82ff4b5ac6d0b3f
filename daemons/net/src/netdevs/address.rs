//! Socket addresses as options tell them: `addr.type=unix,addr.path=...`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use nix::sys::socket::{SockaddrStorage, UnixAddr, getpeername, getsockname};
use serde::Deserialize;

use crate::netdev::PeerAddress;

/// An address.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
pub enum SocketAddress {
    /// A unix socket.
    Unix {
        /// Where it is.
        path: PathBuf,
    },
    /// An internet socket.
    Inet {
        /// A name or an address.
        host: String,
        /// Its port.
        port: String,
    },
    /// A descriptor that is there.
    Fd {
        /// Its number or name.
        str: String,
    },
}

impl SocketAddress {
    /// The port of an internet socket.
    pub(super) fn port(&self) -> Option<u16> {
        match self {
            SocketAddress::Inet { port, .. } => port.parse().ok(),
            SocketAddress::Unix { .. } | SocketAddress::Fd { .. } => None,
        }
    }
}

/// Where a connected socket leads. A unix socket has the name that its server listens at, seen from either side.
pub(super) fn peer_of(socket: &impl AsFd) -> PeerAddress {
    let fd = socket.as_fd().as_raw_fd();
    let remote: Option<SockaddrStorage> = getpeername(fd).ok();
    let inet = remote.as_ref().and_then(inet_address);
    if let Some(address) = inet {
        return PeerAddress::Inet {
            host: address.ip().to_string(),
            port: address.port().to_string(),
            ipv4: address.is_ipv4().then_some(true),
            ipv6: address.is_ipv6().then_some(true),
        };
    }
    let local: Option<SockaddrStorage> = getsockname(fd).ok();
    let name = |address: &SockaddrStorage| {
        let path = address.as_unix_addr().and_then(UnixAddr::path);
        path.map(|path| path.display().to_string())
    };
    let ends = [remote, local];
    let named = ends.iter().flatten().find_map(name);
    PeerAddress::Unix {
        path: named.unwrap_or_default(),
    }
}

fn inet_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| {
        let v6 = address.as_sockaddr_in6();
        v6.map(|v6| SocketAddr::V6((*v6).into()))
    })
}

/// Looks a host up: once, because a sandboxed daemon cannot.
///
/// # Errors
/// No port, or a host that is not found.
pub(super) fn resolve(host: &str, port: &str) -> Result<SocketAddr> {
    let port: u16 = port
        .parse()
        .with_context(|| format!("'{port}' is no port number"))?;
    let mut found = (host, port)
        .to_socket_addrs()
        .with_context(|| format!("cannot look up host '{host}'"))?;
    let first = found.next();
    first.ok_or_else(|| anyhow!("host '{host}' has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_tells_where_it_leads_as_qemu_does() {
        use std::net::{TcpListener, TcpStream};
        use std::os::unix::net::{UnixListener, UnixStream};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (server, _) = listener.accept().unwrap();
        let expected = serde_json::json!({ "type": "unix", "path": path.to_str().unwrap() });
        let shown = |peer: PeerAddress| serde_json::to_value(peer).unwrap();
        assert_eq!(shown(peer_of(&client)), expected);
        assert_eq!(shown(peer_of(&server)), expected);
        let (one, _other) = UnixStream::pair().unwrap();
        let unnamed = serde_json::json!({ "type": "unix", "path": "" });
        assert_eq!(shown(peer_of(&one)), unnamed);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let expected =
            serde_json::json!({ "type": "inet", "host": "127.0.0.1", "port": port, "ipv4": true });
        assert_eq!(shown(peer_of(&client)), expected);
    }

    #[test]
    fn hosts_and_ports_are_looked_up() {
        assert_eq!(
            resolve("127.0.0.1", "80").unwrap().to_string(),
            "127.0.0.1:80"
        );
        assert_eq!(resolve("::1", "80").unwrap().to_string(), "[::1]:80");
        let wrong = resolve("127.0.0.1", "http").unwrap_err();
        assert_eq!(wrong.to_string(), "'http' is no port number");
    }
}
