//! What a character device is to be, from its two spellings.
//!
//! ```text
//!   --chardev socket,id=m,path=/s,server=on      flat, QemuOpts          ──┐
//!   chardev-add {id, backend: {type: "socket",                            ├──► Backend
//!                data: {addr: {type: "unix", data: {path}}, server}}}   ──┘
//! ```

use std::path::PathBuf;

use qmp::{Arguments, Error, Result, Value};
use serde::Deserialize;

use super::ring;

/// The kinds there are, in the order of `--chardev help`.
pub(crate) const BACKENDS: [&str; 7] =
    ["pty", "file", "socket", "stdio", "ringbuf", "null", "pipe"];

/// A device to be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Backend {
    Socket(Socket),
    File {
        output: PathBuf,
        input: Option<PathBuf>,
        append: bool,
    },
    Pipe(PathBuf),
    Ring(u64),
    Stdio,
    Pty,
    Null,
}

/// A socket to be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Socket {
    pub(super) address: Address,
    /// Listens, else connects.
    pub(super) server: bool,
    /// The first client is waited for.
    pub(super) wait: bool,
}

/// Where a socket is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    Unix(PathBuf),
    Inet { host: String, port: String },
    Fd(String),
}

impl Backend {
    /// The name of its kind.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Socket(_) => "socket",
            Self::File { .. } => "file",
            Self::Pipe(_) => "pipe",
            Self::Ring(_) => "ringbuf",
            Self::Stdio => "stdio",
            Self::Pty => "pty",
            Self::Null => "null",
        }
    }

    /// Takes apart what `--chardev` says, and the id.
    pub(super) fn from_option(mut arguments: Arguments) -> Result<(String, Self)> {
        let Identity { id } = arguments.take()?;
        let id = id.ok_or_else(|| Error::generic("chardev: no id specified"))?;
        match arguments.get("backend").and_then(Value::as_str) {
            Some(name) if BACKENDS.contains(&name) => {}
            Some(other) => {
                let what = format!("'{other}' is not a valid char driver name");
                return Err(Error::generic(what));
            }
            None => return Err(Error::generic(format!("chardev: \"{id}\" missing backend"))),
        }
        let backend: Flat = arguments.parse()?;
        Ok((id, backend.try_into()?))
    }

    /// Takes apart what `chardev-add` says, and the id.
    pub(super) fn from_command(arguments: Arguments) -> Result<(String, Self)> {
        let Add { id, backend } = arguments.parse()?;
        Ok((id, backend.try_into()?))
    }
}

#[derive(Deserialize)]
struct Identity {
    id: Option<String>,
}

/// All that one option says. `mux` and `signal` change nothing for a QMP monitor.
#[derive(Deserialize)]
#[serde(rename = "backend", rename_all = "kebab-case")]
enum Flat {
    Socket {
        path: Option<PathBuf>,
        host: Option<String>,
        port: Option<String>,
        fd: Option<String>,
        #[serde(default)]
        server: bool,
        wait: Option<bool>,
        #[serde(rename = "nodelay")]
        _nodelay: Option<bool>,
        #[serde(rename = "delay")]
        _delay: Option<bool>,
    },
    #[serde(rename_all = "kebab-case")]
    File {
        path: Option<PathBuf>,
        input_path: Option<PathBuf>,
        #[serde(default)]
        append: bool,
    },
    Pipe {
        path: Option<PathBuf>,
    },
    Ringbuf {
        size: Option<u64>,
    },
    Stdio {
        #[serde(rename = "signal")]
        _signal: Option<bool>,
    },
    Pty {},
    Null {},
}

impl TryFrom<Flat> for Backend {
    type Error = Error;

    fn try_from(flat: Flat) -> Result<Self> {
        let no_path = |kind| Error::generic(format!("chardev: {kind}: no filename given"));
        Ok(match flat {
            Flat::Socket {
                path,
                host,
                port,
                fd,
                server,
                wait,
                ..
            } => {
                let address = match (path, host, fd) {
                    (Some(path), None, None) => Address::Unix(path),
                    (None, Some(host), None) => {
                        let missing = || Error::generic("chardev: socket: no port given");
                        let port = port.ok_or_else(missing)?;
                        Address::Inet { host, port }
                    }
                    (None, None, Some(name)) => Address::Fd(name),
                    _ => {
                        let what =
                            "chardev: socket: exactly one of 'path', 'host' and 'fd' is needed";
                        return Err(Error::generic(what));
                    }
                };
                Self::Socket(Socket::new(address, server, wait)?)
            }
            Flat::File {
                path,
                input_path,
                append,
            } => Self::File {
                output: path.ok_or_else(|| no_path("file"))?,
                input: input_path,
                append,
            },
            Flat::Pipe { path } => Self::Pipe(path.ok_or_else(|| no_path("pipe"))?),
            Flat::Ringbuf { size } => Self::Ring(size.unwrap_or(ring::DEFAULT_BYTES)),
            Flat::Stdio { .. } => Self::Stdio,
            Flat::Pty {} => Self::Pty,
            Flat::Null {} => Self::Null,
        })
    }
}

impl Socket {
    fn new(address: Address, server: bool, wait: Option<bool>) -> Result<Self> {
        if !server && wait.is_some() {
            let what = "'wait' option is incompatible with socket in client connect mode";
            return Err(Error::generic(what));
        }
        Ok(Self {
            address,
            server,
            wait: wait.unwrap_or(true),
        })
    }
}

#[derive(Deserialize)]
struct Add {
    id: String,
    backend: Nested,
}

/// `ChardevBackend` of QEMU's QMP reference.
#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum Nested {
    Socket {
        data: SocketData,
    },
    File {
        data: FileData,
    },
    Pipe {
        data: PipeData,
    },
    Ringbuf {
        data: RingData,
    },
    Stdio {
        #[serde(rename = "data")]
        _data: StdioData,
    },
    Pty {
        #[serde(rename = "data")]
        _data: NoData,
    },
    Null {
        #[serde(rename = "data")]
        _data: NoData,
    },
}

#[derive(Deserialize)]
struct NoData {}

#[derive(Deserialize)]
struct StdioData {
    #[serde(rename = "signal")]
    _signal: Option<bool>,
}

#[derive(Deserialize)]
struct RingData {
    size: Option<u64>,
}

#[derive(Deserialize)]
struct PipeData {
    device: PathBuf,
}

#[derive(Deserialize)]
struct FileData {
    #[serde(rename = "in")]
    input: Option<PathBuf>,
    out: PathBuf,
    #[serde(default)]
    append: bool,
}

#[derive(Deserialize)]
struct SocketData {
    addr: LegacyAddress,
    server: Option<bool>,
    wait: Option<bool>,
    #[serde(rename = "nodelay")]
    _nodelay: Option<bool>,
}

/// `SocketAddressLegacy` of QEMU's QMP reference.
#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum LegacyAddress {
    Inet { data: InetData },
    Unix { data: UnixData },
    Fd { data: FdData },
}

#[derive(Deserialize)]
struct InetData {
    host: String,
    port: String,
}

#[derive(Deserialize)]
struct UnixData {
    path: PathBuf,
}

#[derive(Deserialize)]
struct FdData {
    str: String,
}

impl TryFrom<Nested> for Backend {
    type Error = Error;

    fn try_from(nested: Nested) -> Result<Self> {
        Ok(match nested {
            Nested::Socket { data } => {
                let address = match data.addr {
                    LegacyAddress::Unix { data } => Address::Unix(data.path),
                    LegacyAddress::Fd { data } => Address::Fd(data.str),
                    LegacyAddress::Inet { data } => Address::Inet {
                        host: data.host,
                        port: data.port,
                    },
                };
                // Here a socket listens unless told otherwise, and never waits for a client.
                let server = data.server.unwrap_or(true);
                let wait = data.wait.or(server.then_some(false));
                if wait == Some(true) {
                    let what = "'wait' cannot be on while monitors are served";
                    return Err(Error::generic(what));
                }
                Self::Socket(Socket::new(address, server, wait)?)
            }
            Nested::File { data } => Self::File {
                output: data.out,
                input: data.input,
                append: data.append,
            },
            Nested::Pipe { data } => Self::Pipe(data.device),
            Nested::Ringbuf { data } => Self::Ring(data.size.unwrap_or(ring::DEFAULT_BYTES)),
            Nested::Stdio { .. } => Self::Stdio,
            Nested::Pty { .. } => Self::Pty,
            Nested::Null { .. } => Self::Null,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qmp::keyval;

    #[test]
    fn both_spellings_mean_the_same() {
        let flat = keyval::parse_flags("socket,id=m,path=/s,server,nowait", Some("backend"));
        let flat = Backend::from_option(flat.unwrap()).unwrap();
        let nested = keyval::parse(
            r#"{"id": "m", "backend": {"type": "socket", "data": {"addr": {"type": "unix",
                "data": {"path": "/s"}}, "wait": false}}}"#,
            None,
        );
        assert_eq!(flat, Backend::from_command(nested.unwrap()).unwrap());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            ("null", "chardev: no id specified"),
            ("zz,id=a", "'zz' is not a valid char driver name"),
            ("id=a", "chardev: \"a\" missing backend"),
            ("file,id=a", "chardev: file: no filename given"),
            ("null,id=a,path=b", "Parameter 'path' is unexpected"),
            (
                "socket,id=a,path=/s,wait=off",
                "'wait' option is incompatible with socket in client connect mode",
            ),
        ] {
            let arguments = keyval::parse_flags(text, Some("backend")).unwrap();
            let error = Backend::from_option(arguments).unwrap_err();
            assert_eq!(error.desc, expected);
        }
    }
}
