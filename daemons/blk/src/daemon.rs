//! The daemon's life: options in order, sandbox, readiness, the end.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use engine::{Engine, EngineOptions, NamePolicy};
use qmp::Version;
use vhost_daemon::notify::{Background, Notifier};
use vhost_daemon::sandbox::{self, Paths, Sandbox};

use crate::chardev::{self, Chardev};
use crate::monitor::{Monitor, Monitors};
use crate::options::{CommandLine, Step, StepKind};
use crate::pidfile::PidFile;
use crate::race::{First, race};
use crate::redo_dir;
use crate::signals::Signals;

/// Everything between the command line and the exit code.
pub(crate) struct Daemon {
    command_line: CommandLine,
    engine: Rc<Engine>,
    notifier: Notifier,
    version: Version,
    redo_dir: PathBuf,
    chardevs: Vec<Chardev>,
    monitors: Vec<Monitor>,
}

impl Daemon {
    /// A daemon that has done nothing yet.
    pub(crate) fn new(
        command_line: CommandLine,
        activation_fds: Vec<(String, RawFd)>,
    ) -> Result<Self> {
        let notifier = Notifier::from_env().context("cannot reach $NOTIFY_SOCKET")?;
        let version = Version::announced(concat!("outboard ", env!("CARGO_PKG_VERSION")));
        let allowed_dirs: std::io::Result<Vec<_>> = command_line
            .allowed_dirs
            .iter()
            .map(std::path::absolute)
            .collect();
        let allowed_dirs = allowed_dirs.context("--allow-dir")?;
        let redo_dir = redo_dir::prepare(command_line.redo_dir.as_deref())?;
        let engine = Engine::new(EngineOptions {
            name_policy: NamePolicy { allowed_dirs },
            redo_dir: Some(redo_dir.clone()),
            named_fds: activation_fds.into_iter().collect(),
            version: version.clone(),
        });
        Ok(Self {
            command_line,
            engine,
            notifier,
            version,
            redo_dir,
            chardevs: Vec::new(),
            monitors: Vec::new(),
        })
    }

    /// Serves until a signal or `quit`.
    pub(crate) async fn run(
        mut self,
        signals: Signals,
        background: Option<Background>,
    ) -> Result<()> {
        let engine = Rc::clone(&self.engine);
        let watcher = executor::spawn(async move {
            match signals.wait().await {
                Ok(signal) => tracing::info!(%signal, "ending"),
                Err(error) => tracing::error!(%error, "cannot wait for signals"),
            }
            engine.request_quit();
        });
        let engine = Rc::clone(&self.engine);
        let started = match race(self.start_up(), engine.quit_requested()).await {
            First::Left(started) => started.map(Some),
            First::Right(()) => Ok(None),
        };
        let served = match started {
            Ok(Some(pidfile)) => self.serve(background).await.map(|()| Some(pidfile)),
            other => other,
        };
        let stopped = engine.shut_down().await;
        watcher.cancel();
        let _pidfile = served?;
        stopped.map_err(|error| anyhow!("not everything was flushed: {error}"))
    }

    async fn start_up(&mut self) -> Result<Option<PidFile>> {
        let steps = std::mem::take(&mut self.command_line.steps);
        for step in &steps {
            self.apply(step)
                .await
                .map_err(|error| anyhow!("{}: {error}", step.shown()))?;
        }
        // The pid file says that the daemon got this far.
        let path = self.command_line.pidfile.as_deref();
        path.map(PidFile::create).transpose()
    }

    async fn apply(&mut self, step: &Step) -> qmp::Result<()> {
        let arguments = step.arguments()?;
        let command = match step.kind {
            StepKind::Blockdev => "blockdev-add",
            StepKind::Export => "block-export-add",
            StepKind::Object => "object-add",
            StepKind::Chardev => {
                let chardev = chardev::open(&self.engine, arguments).await?;
                if self.chardevs.iter().any(|known| known.id == chardev.id) {
                    let id = chardev.id;
                    let what = format!("Chardev with id '{id}' already exists");
                    return Err(qmp::Error::generic(what));
                }
                self.chardevs.push(chardev);
                return Ok(());
            }
            StepKind::Monitor => {
                let monitor = Monitor::new(arguments, &self.chardevs, self.version.clone())?;
                self.monitors.push(monitor);
                return Ok(());
            }
        };
        self.engine.run(command, arguments).await.map(drop)
    }

    async fn serve(&mut self, background: Option<Background>) -> Result<()> {
        let sandbox =
            Sandbox::prepare(self.command_line.sandbox, &self.policy()).context("--sandbox")?;
        if let Some(background) = background {
            background.enter().context("--daemonize")?;
        }
        match sandbox {
            Some(sandbox) => self.enter(sandbox).await.context("--sandbox")?,
            None => tracing::warn!("running without a sandbox"),
        }
        let mut monitors = Monitors::default();
        for monitor in self.monitors.drain(..) {
            monitors.serve(&self.engine, monitor);
        }
        tell(self.notifier.ready());
        tracing::info!("ready");
        self.engine.quit_requested().await;
        tell(self.notifier.stopping());
        self.engine.stop_all_exports().await;
        monitors.close().await;
        Ok(())
    }

    /// What stays reachable: `--allow-dir`, redo logs, and directories of sockets and the pid file, from
    /// which these are removed at the end.
    fn policy(&self) -> sandbox::Policy {
        let monitors = self.monitors.iter().filter_map(Monitor::socket_file);
        let mut paths: Vec<PathBuf> = monitors.map(|file| file.path().to_owned()).collect();
        paths.extend(self.engine.socket_paths());
        paths.extend(self.command_line.pidfile.clone());
        let parents = paths.iter().filter_map(|path| {
            let absolute = std::path::absolute(path).ok()?;
            absolute.parent().map(Path::to_owned)
        });
        let mut socket_dirs: Vec<PathBuf> = parents.collect();
        socket_dirs.sort();
        socket_dirs.dedup();
        let mut file_dirs = self.command_line.allowed_dirs.clone();
        file_dirs.push(self.redo_dir.clone());
        sandbox::Policy {
            file_dirs,
            socket_dirs,
        }
    }

    /// Restricts every thread, this one last because it makes the others.
    async fn enter(&self, sandbox: Sandbox) -> Result<()> {
        // Later ones inherit what their makers have by then.
        executor::workers::retire();
        for thread in self.engine.thread_handles() {
            let sandbox = sandbox.clone();
            let entered = thread.call(move || async move { sandbox.enter() }).await;
            entered.ok_or_else(|| anyhow!("an iothread has ended"))??;
        }
        match sandbox.enter()? {
            Paths::Restricted => {}
            Paths::PartlyRestricted => tracing::warn!(
                "this kernel's Landlock is old: paths are restricted as far as it can"
            ),
            Paths::Unrestricted => tracing::warn!(
                "this kernel has no Landlock: paths are not restricted, syscalls are"
            ),
        }
        Ok(())
    }
}

/// The service manager's troubles are not the guest's.
fn tell(result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}
