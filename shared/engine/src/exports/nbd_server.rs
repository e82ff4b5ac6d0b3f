//! The NBD server of a process: `nbd-server-start`, `nbd-server-stop`, `nbd-server-add`, `nbd-server-remove`, and exports of type
//! `nbd`.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use block::bitmap::{DirtyBitmap, ops};
use block::{Errno, Node};
use executor::IoThread;
use executor::net::Listener;
use exports::nbd::{NbdExport, NbdExportOptions, NbdServer, NbdServerOptions, find_bitmap};
use qmp::{Arguments, Error, Result, Value, json};
use serde::Deserialize;
use transport::Endpoint;

use super::{Common, DeleteMode, Exports, handles};
use crate::engine::Engine;
use crate::error::from_block;
use crate::nodes;
use crate::objects;

/// Clients that a server has at a time unless told otherwise.
const DEFAULT_MAX_CONNECTIONS: u32 = 100;

/// A running server.
pub(super) struct Running {
    server: Rc<NbdServer>,
    /// The socket that it made in the file system; removed with it.
    socket: Option<PathBuf>,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(path) = &self.socket {
            // Somebody else may have done so.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Start {
    tls_creds: Option<String>,
    tls_authz: Option<String>,
    max_connections: Option<u32>,
    /// Seconds; 0: no limit.
    handshake_max_seconds: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename = "type", rename_all = "kebab-case")]
enum ServerAddress {
    Inet {
        host: String,
        port: String,
        /// The last port to try.
        to: Option<u16>,
        ipv4: Option<bool>,
        ipv6: Option<bool>,
        numeric: Option<bool>,
    },
    Unix {
        path: PathBuf,
    },
    Fd {
        str: String,
    },
}

/// Takes `addr`: its members beside `type`, or in `data` as older commands have them.
fn take_address(arguments: &mut Arguments) -> Result<ServerAddress> {
    let syntax = arguments.syntax();
    let mut members = match arguments.take_value("addr") {
        None => return Err(Error::missing_parameter("addr")),
        Some(Value::Object(members)) => members,
        Some(_) => return Err(Error::parameter_type("addr", "object")),
    };
    if let Some(Value::Object(data)) = members.remove("data") {
        members.extend(data);
    }
    if !members.contains_key("type") {
        return Err(Error::missing_parameter("addr.type"));
    }
    Arguments::new(members, syntax).parse()
}

pub(crate) async fn start(engine: &Rc<Engine>, mut arguments: Arguments) -> Result<Value> {
    let address = take_address(&mut arguments)?;
    let Start {
        tls_creds,
        tls_authz,
        max_connections,
        handshake_max_seconds,
    } = arguments.parse()?;
    if engine.exports.nbd.borrow().is_some() {
        return Err(Error::generic("NBD server already running"));
    }
    let limit = max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS);
    let mut options = NbdServerOptions {
        max_connections: (limit > 0).then_some(limit),
        ..NbdServerOptions::default()
    };
    if let Some(id) = &tls_creds {
        options.credentials = Some(objects::credentials(&engine.graph, id, Endpoint::Server)?);
    }
    if let Some(id) = &tls_authz {
        if tls_creds.is_none() {
            return Err(Error::generic("TLS authorization needs TLS credentials"));
        }
        options.authorization = Some(objects::authorization(&engine.graph, id)?);
    }
    if let Some(seconds) = handshake_max_seconds {
        let limit = std::time::Duration::from_secs(u64::from(seconds));
        options.handshake_timeout = (seconds > 0).then_some(limit);
    }
    let socket = match &address {
        ServerAddress::Unix { path } => Some(std::path::absolute(path).unwrap_or(path.clone())),
        ServerAddress::Inet { .. } | ServerAddress::Fd { .. } => None,
    };
    let listeners = listen(engine, address)?;
    let server = Rc::new(NbdServer::start(listeners, options));
    *engine.exports.nbd.borrow_mut() = Some(Running { server, socket });
    Ok(json!({}))
}

fn failed(what: &str, error: &std::io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    Error::generic(format!("{what}: {}", block::error::reason(errno)))
}

fn listen(engine: &Engine, address: ServerAddress) -> Result<Vec<Listener>> {
    match address {
        ServerAddress::Unix { path } => {
            let what = format!("Failed to bind socket to {}", path.display());
            let bound = Listener::bind_unix(&path).map_err(|error| failed(&what, &error))?;
            Ok(vec![bound])
        }
        ServerAddress::Fd { str } => {
            let claimed = engine.claim_fd(&str)?;
            let what = format!("Cannot listen on file descriptor '{str}'");
            let listener = Listener::from_fd(claimed).map_err(|error| failed(&what, &error))?;
            Ok(vec![listener])
        }
        ServerAddress::Inet {
            host,
            port,
            to,
            ipv4,
            ipv6,
            numeric,
        } => {
            let first: u16 = port
                .parse()
                .map_err(|_| Error::generic(format!("can't convert to a number: {port}")))?;
            let addresses = resolve(&host, first, numeric.unwrap_or(false))?;
            let wanted = |address: &SocketAddr| match address {
                SocketAddr::V4(_) => ipv4.unwrap_or(ipv6 != Some(true)),
                SocketAddr::V6(_) => ipv6.unwrap_or(ipv4 != Some(true)),
            };
            let addresses: Vec<_> = addresses.into_iter().filter(wanted).collect();
            bind_inet(&addresses, first..=to.unwrap_or(first))
        }
    }
}

/// Binds every address on the first port of `ports` that is free on all of them.
fn bind_inet(
    addresses: &[SocketAddr],
    ports: std::ops::RangeInclusive<u16>,
) -> Result<Vec<Listener>> {
    let mut reason = std::io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
    for port in ports {
        let at = |mut address: SocketAddr| {
            address.set_port(port);
            Listener::bind_tcp(address)
        };
        match addresses.iter().copied().map(at).collect() {
            Ok(listeners) if !addresses.is_empty() => return Ok(listeners),
            Ok::<Vec<_>, _>(_) => {}
            Err(error) => reason = error,
        }
    }
    Err(failed("Failed to find an available port", &reason))
}

fn resolve(host: &str, port: u16, numeric: bool) -> Result<Vec<SocketAddr>> {
    let host = if host.is_empty() { "::" } else { host };
    let plain = host.trim_start_matches('[').trim_end_matches(']');
    let failed = |reason: &str| {
        let message = format!("address resolution failed for {host}:{port}: {reason}");
        Error::generic(message)
    };
    if numeric {
        let address = plain.parse().map_err(|_| failed("not an address"))?;
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let resolved = (plain, port).to_socket_addrs();
    let resolved = resolved.map_err(|error| {
        let text = error.to_string();
        failed(text.rsplit(": ").next().unwrap_or_default())
    })?;
    Ok(resolved.collect())
}

pub(crate) async fn stop(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    arguments.finish()?;
    if engine.exports.nbd.borrow().is_none() {
        return Err(not_running());
    }
    engine.stop_exports(|type_name| type_name == "nbd").await;
    engine.exports.stop_nbd_server().await;
    Ok(json!({}))
}

fn not_running() -> Error {
    Error::generic("NBD server not running")
}

impl Exports {
    pub(super) fn nbd_server(&self) -> Option<Rc<NbdServer>> {
        let running = self.nbd.borrow();
        running.as_ref().map(|running| Rc::clone(&running.server))
    }

    pub(super) fn nbd_socket(&self) -> Option<PathBuf> {
        let running = self.nbd.borrow();
        running.as_ref().and_then(|running| running.socket.clone())
    }

    pub(super) fn nbd_clients_of(&self, export: &NbdExport) -> usize {
        let server = self.nbd_server();
        server.map_or(0, |server| server.clients_of(export))
    }

    pub(super) async fn stop_nbd_server(&self) {
        let running = self.nbd.borrow_mut().take();
        if let Some(running) = running {
            running.server.stop().await;
        }
    }
}

#[derive(Deserialize)]
struct Add {
    device: String,
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    writable: bool,
    bitmap: Option<String>,
}

/// An export whose id is its name.
pub(crate) async fn add(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let request: Add = arguments.parse()?;
    let node = nodes::find(engine, Some(&request.device), Some(&request.device))?;
    let name = request.name.unwrap_or(request.device);
    if name.len() > nbd::limits::MAX_STRING {
        return Err(Error::generic(format!("export name '{name}' too long")));
    }
    let bitmaps: Vec<_> = request.bitmap.into_iter().collect();
    let mut members = qmp::Map::new();
    members.insert("type".into(), json!("nbd"));
    members.insert("id".into(), json!(name));
    members.insert("node-name".into(), json!(node.name()));
    members.insert("name".into(), json!(name));
    members.insert("bitmaps".into(), json!(bitmaps));
    if let Some(text) = request.description {
        members.insert("description".into(), json!(text));
    }
    let writable = request.writable && !node.options().read_only;
    members.insert("writable".into(), json!(writable));
    drop(node);
    super::block_export_add(engine, Arguments::from_json(members)).await
}

#[derive(Deserialize)]
struct Remove {
    name: String,
    #[serde(default)]
    mode: DeleteMode,
}

pub(crate) async fn remove(engine: &Rc<Engine>, arguments: Arguments) -> Result<Value> {
    let Remove { name, mode } = arguments.parse()?;
    if engine.exports.is_of_another_type(&name, "nbd") {
        let message = format!("Block export '{name}' is not an NBD export");
        return Err(Error::generic(message));
    }
    engine.delete_export(name, mode).await?;
    Ok(json!({}))
}

/// Options of an export of type `nbd`.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ExportOptions {
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    bitmaps: Vec<Value>,
    #[serde(default)]
    allocation_depth: bool,
}

/// Makes an export of `node`, and offers it.
pub(super) fn export(
    engine: &Engine,
    node: &Arc<Node>,
    (common, options, iothreads): (&Common, ExportOptions, &[Rc<IoThread>]),
) -> Result<Rc<NbdExport>> {
    let server = engine.exports.nbd_server().ok_or_else(not_running)?;
    let name = options.name.unwrap_or_else(|| common.node_name.clone());
    if server.offers(&name) {
        let message = format!("NBD server already has export named '{name}'");
        return Err(Error::generic(message));
    }
    let bitmaps: Result<Vec<_>> = options
        .bitmaps
        .into_iter()
        .map(|source| bitmap(engine, node, source))
        .collect();
    let options = NbdExportOptions {
        name,
        description: options.description,
        writable: common.writable,
        writethrough: common.writethrough,
        bitmaps: bitmaps?,
        allocation_depth: options.allocation_depth,
        minimum_block: 1,
        threads: handles(iothreads),
    };
    let export = Rc::new(NbdExport::new(node, options).map_err(from_block)?);
    server.add(Rc::clone(&export));
    Ok(export)
}

#[derive(Deserialize)]
struct ForeignBitmap {
    node: String,
    name: String,
}

/// A bitmap of the chain by its name, or one of another node.
fn bitmap(engine: &Engine, node: &Node, source: Value) -> Result<Arc<DirtyBitmap>> {
    match source {
        Value::String(name) => find_bitmap(node, &name)
            .ok_or_else(|| Error::generic(format!("Bitmap '{name}' is not found"))),
        Value::Object(members) => {
            let foreign: ForeignBitmap = Arguments::from_json(members).parse()?;
            let other = engine.graph.node(&foreign.node);
            let other = other
                .ok_or_else(|| Error::generic(format!("Node '{}' not found", foreign.node)))?;
            ops::find(&other, &foreign.name).map_err(from_block)
        }
        _ => Err(Error::parameter_type("bitmaps", "BlockDirtyBitmapOrStr")),
    }
}
