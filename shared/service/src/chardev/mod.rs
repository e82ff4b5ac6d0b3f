//! Character devices: where a monitor's bytes come from and go to.
//!
//! ```text
//!   --chardev, chardev-add ──► options::Backend ──► Chardev { Endpoint } ──taken by── a monitor
//! ```
//!
//! Owns: the devices by id, their sockets and files. Promises: a device has one user; an id is used
//! once. Must not know: what is said on them.

mod channel;
pub mod commands;
mod open;
mod options;
mod ring;

pub(crate) use channel::Channel;
pub(crate) use open::listen;
pub(crate) use options::BACKENDS;

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use executor::net::{Listener, Stream};
use qmp::{Arguments, Error, Result, Value, json};
use vhost_daemon::notify::NamedFds;

use options::Backend;
use ring::Ring;

/// A configured character device.
pub struct Chardev {
    id: String,
    device: RefCell<Device>,
    /// A monitor uses it.
    taken: Cell<bool>,
    /// A client is at the other end.
    connected: Cell<bool>,
}

/// What is behind a character device.
struct Device {
    kind: &'static str,
    /// What `query-chardev` shows.
    filename: String,
    /// Until a monitor takes it.
    endpoint: Option<Endpoint>,
    ring: Option<Rc<RefCell<Ring>>>,
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

impl Chardev {
    /// Takes its endpoint for a monitor.
    pub(crate) fn take(&self) -> Result<Endpoint> {
        let taken = self.device.borrow_mut().endpoint.take();
        let endpoint =
            taken.ok_or_else(|| Error::generic(format!("Device '{}' is in use", self.id)))?;
        self.taken.set(true);
        Ok(endpoint)
    }

    /// Notes whether a client is at the other end.
    pub(crate) fn set_connected(&self, connected: bool) {
        self.connected.set(connected);
    }

    /// `ChardevInfo` of QEMU's QMP reference.
    fn describe(&self) -> Value {
        let device = self.device.borrow();
        let gone = device.kind == "socket" && !self.connected.get();
        let prefix = if gone { "disconnected:" } else { "" };
        json!({
            "frontend-open": self.taken.get(),
            "filename": format!("{prefix}{}", device.filename),
            "label": self.id,
        })
    }
}

/// The character devices of a process. Lives on the control thread.
#[derive(Default)]
pub struct Chardevs {
    list: RefCell<Vec<Rc<Chardev>>>,
}

impl Chardevs {
    /// Opens what a `--chardev` option describes.
    pub(crate) async fn open(&self, fds: &NamedFds, arguments: Arguments) -> Result<()> {
        let (id, backend) = Backend::from_option(arguments)?;
        if self.find(&id).is_some() {
            return Err(crate::objects::taken(&id));
        }
        self.insert(id, open::open(fds, backend).await?);
        Ok(())
    }

    fn insert(&self, id: String, device: Device) {
        if device.kind == "pty" {
            let path = device.filename.trim_start_matches("pty:");
            eprintln!("char device redirected to {path} (label {id})");
        }
        let connected = matches!(device.endpoint, Some(Endpoint::Connected(_)));
        self.list.borrow_mut().push(Rc::new(Chardev {
            id,
            device: RefCell::new(device),
            taken: Cell::new(false),
            connected: Cell::new(connected),
        }));
    }

    /// The device `id`.
    pub fn find(&self, id: &str) -> Option<Rc<Chardev>> {
        let list = self.list.borrow();
        list.iter().find(|chardev| chardev.id == id).cloned()
    }

    /// Ids and kinds, for the object tree.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        let list = self.list.borrow();
        list.iter()
            .map(|chardev| (chardev.id.clone(), chardev.device.borrow().kind))
            .collect()
    }

    /// Sockets in the file system that no monitor has taken.
    pub(crate) fn socket_paths(&self) -> Vec<PathBuf> {
        let list = self.list.borrow();
        let paths = list
            .iter()
            .filter_map(|chardev| match &chardev.device.borrow().endpoint {
                Some(Endpoint::Listening {
                    socket_file: Some(file),
                    ..
                }) => Some(file.path().to_owned()),
                _ => None,
            });
        paths.collect()
    }
}
