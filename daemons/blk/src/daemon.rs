//! The engine as a daemon.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use engine::{Engine, EngineOptions, NamePolicy};
use executor::Handle;
use qmp::{Arguments, EventSink, Request, Value};
use service::{Daemon, Options, Reach, Server, Start, private_dir};
use vhost_daemon::notify::NamedFds;
use vhost_daemon::sandbox::Syscalls;

/// `--redo-dir`
pub(crate) const REDO_DIR: &str = "redo-dir";

/// The option that names drivers which images may ask for.
pub(crate) const ALLOW_DRIVERS: &str = "allow-drivers";

/// OpenSSL's random numbers ask whether the process was forked; large buffers that grow are remapped.
const SYSCALLS: Syscalls = Syscalls {
    plain: &[libc::SYS_getpid, libc::SYS_mremap],
    ioctls: &[],
};

/// The same, and what libcurl makes its connections with.
const CLIENT_SYSCALLS: Syscalls = Syscalls {
    plain: &[
        libc::SYS_getpid,
        libc::SYS_mremap,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_wait,
        libc::SYS_getpeername,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_pselect6,
        libc::SYS_recvfrom,
        libc::SYS_setsockopt,
        libc::SYS_socketpair,
    ],
    ioctls: &[],
};

/// What the ordered options make.
#[derive(Clone, Copy, Debug)]
pub(crate) enum StepKind {
    /// A node.
    Blockdev,
    /// An export.
    Export,
    /// The server for exports of type `nbd`.
    NbdServer,
    /// An iothread, a secret or the like.
    Object,
}

/// The storage daemon.
pub(crate) struct Blkd {
    engine: Rc<Engine>,
    allowed_dirs: Vec<PathBuf>,
    redo_dir: PathBuf,
}

impl Server for Blkd {
    async fn run(
        self: &Rc<Self>,
        request: &Request,
        _fds: &mut VecDeque<OwnedFd>,
    ) -> qmp::Result<Value> {
        self.engine.commands().handler_of(request)?;
        self.engine.run(&request.command, request.arguments()).await
    }

    fn subscribe(&self, sink: &Rc<dyn EventSink>) {
        self.engine.subscribe(sink);
    }
}

/// The parts of a list at commas.
fn words(list: Option<&str>) -> Vec<String> {
    let parts = list.unwrap_or_default().split(',');
    let parts = parts.filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

impl Daemon for Blkd {
    type Kind = StepKind;

    fn new(options: &Options, start: Start) -> Result<Rc<Self>> {
        let listed = engine::host::allowed_dirs();
        let given = options.allowed_dirs.iter().cloned().chain(listed);
        let allowed_dirs: std::io::Result<Vec<_>> = given.map(std::path::absolute).collect();
        let allowed_dirs = allowed_dirs.context("--allow-dir")?;
        let redo_dir = private_dir::prepare("--redo-dir", options.path(REDO_DIR))?;
        let engine = Engine::new(EngineOptions {
            name_policy: NamePolicy {
                allowed_dirs: allowed_dirs.clone(),
                allowed_drivers: words(options.setting(ALLOW_DRIVERS)),
            },
            redo_dir: Some(redo_dir.clone()),
            fds: start.fds,
            version: start.version,
            chardevs: start.chardevs,
        });
        Ok(Rc::new(Self {
            engine,
            allowed_dirs,
            redo_dir,
        }))
    }

    async fn apply(self: &Rc<Self>, kind: StepKind, arguments: Arguments) -> qmp::Result<()> {
        let command = match kind {
            StepKind::Blockdev => "blockdev-add",
            StepKind::Export => "block-export-add",
            StepKind::NbdServer => "nbd-server-start",
            StepKind::Object => "object-add",
        };
        self.engine.run(command, arguments).await.map(drop)
    }

    fn fds(&self) -> &NamedFds {
        self.engine.fds()
    }

    fn reach(&self) -> Reach {
        let mut file_dirs = self.allowed_dirs.clone();
        file_dirs.push(self.redo_dir.clone());
        let tcp_peers = self.engine.tcp_peers();
        let syscalls = match tcp_peers.is_empty() {
            true => SYSCALLS,
            false => CLIENT_SYSCALLS,
        };
        Reach {
            file_dirs,
            read_dirs: self.engine.directories(),
            sockets: self.engine.socket_paths(),
            tcp_peers,
            syscalls,
        }
    }

    fn confining(&self) {
        transport::names::freeze();
    }

    fn threads(&self) -> Vec<Handle> {
        self.engine.thread_handles()
    }

    fn request_quit(&self) {
        self.engine.request_quit();
    }

    async fn quit_requested(&self) {
        self.engine.quit_requested().await;
    }

    async fn stop(&self) {
        self.engine.stop_all_exports().await;
    }

    async fn shut_down(self: &Rc<Self>) -> Result<()> {
        let stopped = self.engine.shut_down().await;
        stopped.map_err(|error| anyhow!("not everything was flushed: {error}"))
    }
}
