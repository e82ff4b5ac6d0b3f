//! Which export a node is on, how it is reached, and what becomes of a lost connection.

use block::error::Result;
use block::{Error, ErrorKind, OpenRequest};
use executor::net::Stream;
use executor::{Errno, workers};
use nbd::BASE_ALLOCATION;
use nbd::limits::MAX_STRING;
use serde_json::{Map, Value};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use transport::{Credentials, Endpoint, names};

/// The port that IANA gave NBD.
pub(super) const DEFAULT_PORT: u16 = 10809;

/// Longest name of an abstract socket in bytes: `sun_path` without the zero that marks it.
const MAX_ABSTRACT: usize = 107;

/// Where a server listens.
pub(super) enum Address {
    Unix(PathBuf),
    /// A unix socket without a file: all bytes of its name.
    Abstract(Vec<u8>),
    Inet {
        host: String,
        port: String,
    },
    Vsock {
        cid: u32,
        port: u32,
    },
    /// A socket that is connected already; it serves once.
    Descriptor(Mutex<Option<Stream>>),
}

/// How the connection is secured.
pub(super) struct Tls {
    pub(super) credentials: Arc<Credentials>,
    /// Whose certificate is expected, where credentials are certificates.
    pub(super) hostname: Option<String>,
}

/// An export of a server.
pub(super) struct Target {
    pub(super) address: Address,
    pub(super) export: String,
    /// The metadata context that takes the place of `base:allocation`.
    pub(super) dirty_bitmap: Option<String>,
    /// Absent: nothing is secured.
    pub(super) tls: Option<Tls>,
    /// How long requests wait for a lost connection to come back.
    pub(super) reconnect_delay: Duration,
    /// How long opening waits for a server that is not there.
    pub(super) open_timeout: Duration,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl Target {
    /// Takes the options of a request.
    pub(super) fn take(request: &mut OpenRequest<'_>) -> Result<Self> {
        let address = take_address(request)?;
        let tls = Tls::take(request, &address)?;
        let export = request.take_str("export")?.unwrap_or_default();
        if export.len() > MAX_STRING {
            return Err(invalid("export name too long to send to server"));
        }
        let dirty_bitmap = request.take_str("x-dirty-bitmap")?;
        if dirty_bitmap
            .as_ref()
            .is_some_and(|it| it.len() > MAX_STRING)
        {
            return Err(invalid("x-dirty-bitmap query too long to send to server"));
        }
        let mut seconds = |name: &str| -> Result<Duration> {
            let seconds = request.take_size(name)?.unwrap_or(0);
            match u32::try_from(seconds) {
                Ok(seconds) => Ok(Duration::from_secs(seconds.into())),
                Err(_) => Err(invalid(format!("{name} is too large"))),
            }
        };
        Ok(Self {
            address,
            export,
            dirty_bitmap,
            tls,
            reconnect_delay: seconds("reconnect-delay")?,
            open_timeout: seconds("open-timeout")?,
        })
    }

    /// Whether extents are those of `base:allocation`.
    pub(super) fn shows_allocation(&self) -> bool {
        let context = self.dirty_bitmap.as_deref();
        context.is_none_or(|context| context == BASE_ALLOCATION)
    }

    /// The port, when the server is reached by TCP.
    pub(super) fn tcp_port(&self) -> Option<u16> {
        match &self.address {
            Address::Inet { port, .. } => port.parse().ok(),
            _ => None,
        }
    }

    /// A connection to the server.
    ///
    /// # Errors
    /// `Io` naming the address.
    pub(super) async fn connect(&self) -> Result<Stream> {
        match &self.address {
            Address::Unix(path) => {
                let failed = |errno| failed_to_connect(&path.display().to_string(), errno);
                Stream::connect_unix(path).await.map_err(failed)
            }
            Address::Abstract(name) => {
                let shown = String::from_utf8_lossy(name);
                let shown = format!("@{}", shown.trim_end_matches('\0'));
                let name = name.clone();
                connect_elsewhere(shown, move || connect_abstract(&name)).await
            }
            Address::Inet { host, port } => connect_inet(host, port).await,
            Address::Vsock { cid, port } => {
                let (cid, port) = (*cid, *port);
                connect_elsewhere(format!("{cid}:{port}"), move || connect_vsock(cid, port)).await
            }
            Address::Descriptor(fd) => {
                let stream = fd.lock().ok().and_then(|mut fd| fd.take());
                stream.ok_or_else(|| failed_to_connect("the given socket", Errno::ENOTCONN))
            }
        }
    }
}

impl Tls {
    fn take(request: &mut OpenRequest<'_>, address: &Address) -> Result<Option<Self>> {
        let hostname = request.take_str("tls-hostname")?;
        let Some(id) = request.take_str("tls-creds")? else {
            return Ok(None);
        };
        let found = request.object::<Credentials>(&id)?;
        let credentials =
            found.ok_or_else(|| invalid(format!("No TLS credentials with id '{id}'")))?;
        if credentials.endpoint() != Endpoint::Client {
            return Err(invalid("Expected TLS credentials for a client endpoint"));
        }
        let hostname = hostname.or_else(|| match address {
            Address::Inet { host, .. } => Some(host.clone()),
            _ => None,
        });
        Ok(Some(Self {
            credentials,
            hostname,
        }))
    }
}

fn to_errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn failed_to_connect(name: &str, errno: Errno) -> Error {
    Error::io(format!("Failed to connect to '{name}'"), errno)
}

async fn connect_inet(host: &str, port: &str) -> Result<Stream> {
    let name = format!("{host}:{port}");
    let addresses = match port.parse() {
        Ok(port) => names::resolve(host, port).await,
        Err(_) => Err("Servname not supported for ai_socktype".to_owned()),
    };
    let addresses = addresses.map_err(|reason| {
        let message = format!("address resolution failed for {name}: {reason}");
        Error::new(ErrorKind::Io, message)
    })?;
    let mut last = Errno::EADDRNOTAVAIL;
    for address in addresses {
        match Stream::connect_tcp(address).await {
            Ok(stream) => return Ok(stream),
            Err(errno) => last = errno,
        }
    }
    Err(failed_to_connect(&name, last))
}

/// Connects on a worker thread, to what is called `name`.
async fn connect_elsewhere(
    name: String,
    connect: impl FnOnce() -> std::result::Result<OwnedFd, Errno> + Send + 'static,
) -> Result<Stream> {
    let fd = workers::offload(connect).await;
    let stream = fd.and_then(|fd| Stream::from_fd(fd).map_err(|error| to_errno(&error)));
    stream.map_err(|errno| failed_to_connect(&name, errno))
}

fn connect_abstract(name: &[u8]) -> std::result::Result<OwnedFd, Errno> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd;
    let address = UnixAddr::new_abstract(name)?;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(fd)
}

fn connect_vsock(cid: u32, port: u32) -> std::result::Result<OwnedFd, Errno> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(cid, port))?;
    Ok(fd)
}

/// `server`, or the older `path`, `host` and `port`.
fn take_address(request: &mut OpenRequest<'_>) -> Result<Address> {
    let path = request.take_str("path")?;
    let host = request.take_str("host")?;
    let port = request.take_str("port")?;
    let server = match request.take("server") {
        None => None,
        Some(Value::Object(server)) => Some(server),
        Some(_) => {
            return Err(invalid(
                "Invalid parameter type for 'server', expected: object",
            ));
        }
    };
    match (path, host, port, server) {
        (Some(_), Some(_), ..) => Err(invalid("path and host may not be used at the same time")),
        (Some(path), ..) => Ok(Address::Unix(path.into())),
        (None, Some(host), port, _) => Ok(Address::Inet {
            host,
            port: port.unwrap_or_else(|| DEFAULT_PORT.to_string()),
        }),
        (None, None, Some(_), _) => Err(invalid("port may not be used without host")),
        (None, None, None, Some(server)) if !server.is_empty() => address_of(server),
        _ => Err(invalid("NBD server address missing")),
    }
}

fn take_text(server: &mut Map<String, Value>, name: &str) -> Option<String> {
    match server.shift_remove(name) {
        Some(Value::String(text)) => Some(text),
        Some(Value::Number(number)) => Some(number.to_string()),
        _ => None,
    }
}

fn take_switch(server: &mut Map<String, Value>, name: &str) -> Result<Option<bool>> {
    match server.shift_remove(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(Value::String(text)) if text == "on" => Ok(Some(true)),
        Some(Value::String(text)) if text == "off" => Ok(Some(false)),
        Some(_) => {
            let message = format!("Parameter 'server.{name}' expects 'on' or 'off'");
            Err(invalid(message))
        }
    }
}

/// The bytes of an abstract name: as long as it is, or, as programs without that idea take it, filled up with
/// zeroes.
fn abstract_name(name: String, is_tight: bool) -> Result<Vec<u8>> {
    let mut bytes = name.into_bytes();
    if bytes.len() > MAX_ABSTRACT {
        let name = String::from_utf8_lossy(&bytes);
        return Err(invalid(format!("UNIX socket path '@{name}' is too long")));
    }
    if !is_tight {
        bytes.resize(MAX_ABSTRACT, 0);
    }
    Ok(bytes)
}

/// QMP's `SocketAddress`.
fn address_of(mut server: Map<String, Value>) -> Result<Address> {
    let mut text = |name: &str| take_text(&mut server, name);
    let missing = |name: &str| invalid(format!("Parameter '{name}' is missing"));
    let address = match text("type").as_deref() {
        Some("unix") => {
            let path = text("path").ok_or_else(|| missing("path"))?;
            let is_abstract = take_switch(&mut server, "abstract")?.unwrap_or(false);
            let is_tight = take_switch(&mut server, "tight")?.unwrap_or(true);
            match is_abstract {
                true => Address::Abstract(abstract_name(path, is_tight)?),
                false => Address::Unix(path.into()),
            }
        }
        Some("inet") => Address::Inet {
            host: text("host").ok_or_else(|| missing("host"))?,
            port: text("port").ok_or_else(|| missing("port"))?,
        },
        Some("vsock") => {
            let mut number = |name: &str| -> Result<u32> {
                let text = text(name).ok_or_else(|| missing(name))?;
                text.parse()
                    .map_err(|_| invalid(format!("Parameter '{name}' expects a number")))
            };
            Address::Vsock {
                cid: number("cid")?,
                port: number("port")?,
            }
        }
        Some("fd") => {
            let name = text("str").ok_or_else(|| missing("str"))?;
            Address::Descriptor(Mutex::new(Some(inherited(&name)?)))
        }
        Some(other) => {
            let message = format!("Parameter 'server.type' does not accept value '{other}'");
            return Err(invalid(message));
        }
        None => return Err(missing("type")),
    };
    // What the peer takes too, and what a connection from here does not depend on.
    for name in ["keep-alive", "ipv4", "ipv6", "to", "numeric", "mptcp"] {
        server.shift_remove(name);
    }
    match server.keys().next() {
        None => Ok(address),
        Some(name) => Err(invalid(format!("Parameter 'server.{name}' is unexpected"))),
    }
}

/// A socket that the process was started with, by number.
fn inherited(name: &str) -> Result<Stream> {
    let unknown = || {
        invalid(format!(
            "File descriptor '{name}' is not a socket of this process"
        ))
    };
    let number: i32 = name.parse().map_err(|_| unknown())?;
    Stream::duplicate(number).map_err(|_| unknown())
}
