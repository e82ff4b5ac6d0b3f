//! Socket addresses as options tell them: `addr.type=unix,addr.path=...`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use anyhow::{Context as _, Result, anyhow};
use serde::Deserialize;

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
