//! Serving: from the image to the last client.

use crate::address::failure;
use crate::image;
use crate::kernel;
use crate::options::ServeOptions;
use block::Node;
use executor::net::{Listener, poll_fd};
use executor::sync::Notify;
use exports::nbd::{NbdExport, NbdExportOptions, NbdServer, NbdServerOptions, find_bitmap};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::future::Future;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tools::failure::{Failure, Outcome, report};
use tools::image::Tool;
use transport::{Credentials, Endpoint};
use vhost_daemon::notify::{Background, activation_fds, claim_inherited};

/// Serves until a signal comes, or the last client has left.
pub(crate) async fn run(
    tool: &Tool,
    options: &ServeOptions,
    background: Option<Background>,
) -> Outcome {
    for object in &options.objects {
        tool.add_object(object)?;
    }
    let how = server_options(tool, options)?;
    let signals = Signals::block()?;
    let device = options.device.as_deref().map(kernel::open).transpose()?;
    let export = export(tool, options).await?;
    let (listeners, socket) = listen(options)?;
    let server = NbdServer::start(listeners, how);
    server.add(Rc::clone(&export));
    if let Some(path) = &options.pid_file {
        write_pid(path)?;
    }
    let ended = match device {
        None => Arc::default(),
        Some(device) => {
            let ended = connect(device, options)?;
            // Whoever waits for this process to go into the background uses the device then.
            ended.connected().await?;
            ended
        }
    };
    if let Some(background) = background {
        let entered = background.enter_with_errors();
        entered.map_err(|error| failure("Failed to daemonize", &error))?;
    }
    let finished = async {
        match (options.persistent, &options.device) {
            (_, Some(_)) => ended.wait().await,
            (true, None) => std::future::pending().await,
            (false, None) => {
                server.last_client_left().await;
                Ok(())
            }
        }
    };
    let outcome = first(signals.wait(), finished).await;
    server.stop().await;
    drop((server, export, socket));
    outcome.map(|()| 0)
}

fn server_options(tool: &Tool, options: &ServeOptions) -> Result<NbdServerOptions, Failure> {
    let mut server = NbdServerOptions {
        max_connections: (options.shared > 0).then_some(options.shared),
        report: Some(Rc::new(|reason| {
            report(&format!("option negotiation failed: {reason}"));
        })),
        ..NbdServerOptions::default()
    };
    if let Some(seconds) = options.handshake_limit {
        server.handshake_timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
    }
    let tls = &options.tls;
    if let Some(id) = &tls.creds {
        server.credentials = Some(credentials(tool, id, Endpoint::Server)?);
    }
    if let Some(id) = &tls.authz {
        let found = engine::objects::authorization(tool.graph(), id);
        server.authorization = Some(found.map_err(|error| Failure::message(error.desc))?);
    }
    Ok(server)
}

/// The credentials `id`.
pub(crate) fn credentials(
    tool: &Tool,
    id: &str,
    endpoint: Endpoint,
) -> Result<Arc<Credentials>, Failure> {
    let found = engine::objects::credentials(tool.graph(), id, endpoint);
    found.map_err(|error| Failure::message(format!("Failed to get TLS creds: {}", error.desc)))
}

async fn export(tool: &Tool, options: &ServeOptions) -> Result<Rc<NbdExport>, Failure> {
    let image::Served {
        node,
        minimum_block,
    } = image::open(tool, &options.image).await?;
    let bitmaps = options.bitmaps.iter().map(|name| bitmap(&node, name));
    let export = NbdExportOptions {
        name: options.export_name.clone(),
        description: options.description.clone(),
        writable: !node.options().read_only,
        writethrough: options.image.cache.write_through,
        bitmaps: bitmaps.collect::<Result<_, _>>()?,
        allocation_depth: options.allocation_depth,
        minimum_block,
        threads: Vec::new(),
    };
    let export = NbdExport::new(&node, export);
    export
        .map(Rc::new)
        .map_err(|error| Failure::block("", &error))
}

fn bitmap(node: &Node, name: &str) -> Result<Arc<block::DirtyBitmap>, Failure> {
    find_bitmap(node, name).ok_or_else(|| Failure::message(format!("Bitmap '{name}' is not found")))
}

/// Listens on the sockets that were handed over, or on one of our own.
fn listen(options: &ServeOptions) -> Result<(Vec<Listener>, Option<SocketFile>), Failure> {
    let handed = activation_fds().map_err(|error| failure("Socket activation failed", &error))?;
    if !handed.is_empty() {
        if options.address.is_given() || options.device.is_some() {
            let message = "Socket activation does not take an address or a device of its own";
            return Err(Failure::message(message));
        }
        let failed = |error| failure("Failed to use socket activation", &error);
        let claimed = handed.into_iter().map(|(_, number)| {
            claim_inherited(number)
                .and_then(Listener::from_fd)
                .map_err(failed)
        });
        return Ok((claimed.collect::<Result<_, _>>()?, None));
    }
    let label = options.selinux_label.as_deref();
    let listeners = with_label(label, || options.address.listen())?;
    let socket = options.address.socket().map(Path::to_owned).map(SocketFile);
    Ok((listeners, socket))
}

/// Makes sockets that have the SELinux context `label`.
fn with_label<T>(
    label: Option<&str>,
    make: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    const CONTEXT: &str = "/proc/thread-self/attr/sockcreate";
    let Some(label) = label else { return make() };
    let what = format!("Cannot set SELinux socket create context to {label}");
    std::fs::write(CONTEXT, label).map_err(|error| failure(&what, &error))?;
    let made = make();
    let what = "Cannot clear SELinux socket create context";
    std::fs::write(CONTEXT, "").map_err(|error| failure(what, &error))?;
    made
}

/// A socket in the file system; removed at the end.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else may have done so.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Writes the process id to a file, which stays, as the peer's does.
fn write_pid(path: &Path) -> Result<(), Failure> {
    let shown = path.display();
    let created = std::fs::File::create(path);
    let mut file =
        created.map_err(|error| failure(&format!("Could not create '{shown}'"), &error))?;
    writeln!(file, "{}", std::process::id())
        .map_err(|error| failure(&format!("Could not write '{shown}'"), &error))
}

/// How the kernel's client began and ended, for the executor's thread.
#[derive(Default)]
struct Ended {
    connected: AtomicBool,
    result: Mutex<Option<Result<(), Failure>>>,
    changed: Notify,
}

impl Ended {
    /// Resolves when the device shows the export.
    async fn connected(&self) -> Result<(), Failure> {
        loop {
            let changed = self.changed.notified();
            if self.connected.load(Ordering::Relaxed) {
                return Ok(());
            }
            if let Some(early) = self.early_end() {
                return early;
            }
            changed.await;
        }
    }

    /// How it ended, if it has; a good end is kept for who waits for it.
    fn early_end(&self) -> Option<Result<(), Failure>> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = result.take()?;
        if ended.is_ok() {
            *result = Some(Ok(()));
        }
        Some(ended)
    }

    async fn wait(&self) -> Result<(), Failure> {
        loop {
            let changed = self.changed.notified();
            let result = self
                .result
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            if let Some(result) = result {
                return result;
            }
            changed.await;
        }
    }
}

fn connect(device: std::fs::File, options: &ServeOptions) -> Result<Arc<Ended>, Failure> {
    let ended = Arc::<Ended>::default();
    let told = Arc::clone(&ended);
    let attachment = kernel::Attachment {
        device,
        path: options.device.clone().unwrap_or_default(),
        address: options.address.clone(),
        export_name: options.export_name.clone(),
    };
    let thread = kernel::connect(attachment, move |progress| {
        match progress {
            kernel::Progress::Connected => told.connected.store(true, Ordering::Relaxed),
            kernel::Progress::Ended(result) => {
                *told.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            }
        }
        told.changed.notify_all();
    });
    thread.map_err(|error| failure("Cannot start the client", &error))?;
    Ok(ended)
}

/// Signals that ask for the end.
struct Signals {
    set: SigSet,
    fd: SignalFd,
}

impl Signals {
    /// Blocks them. Threads that are made later have them blocked too.
    fn block() -> Result<Self, Failure> {
        let set: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]
            .into_iter()
            .collect();
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let blocked = set.thread_block();
        let fd = blocked.and_then(|()| SignalFd::with_flags(&set, flags));
        let fd =
            fd.map_err(|errno| Failure::message(format!("Cannot wait for signals: {errno}")))?;
        Ok(Self { set, fd })
    }

    /// Waits for the first. A second one then ends the process at once.
    async fn wait(self) -> Result<(), Failure> {
        let failed = |errno| Failure::message(format!("Cannot wait for signals: {errno}"));
        loop {
            poll_fd(self.fd.as_fd(), libc::POLLIN)
                .await
                .map_err(failed)?;
            if self.fd.read_signal().map_err(failed)?.is_some() {
                return self.set.thread_unblock().map_err(failed);
            }
        }
    }
}

/// The output of the future that is ready first.
async fn first<T>(one: impl Future<Output = T>, other: impl Future<Output = T>) -> T {
    let (mut one, mut other) = (pin!(one), pin!(other));
    std::future::poll_fn(|context| match one.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(output),
        Poll::Pending => other.as_mut().poll(context),
    })
    .await
}
