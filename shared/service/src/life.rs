//! The daemon's life: options in order, sandbox, readiness, the end.

use std::future::Future;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use executor::{Config, Executor, Handle};
use qmp::{Arguments, Version};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use vhost_daemon::notify::{self, Background, Daemonized, NamedFds, Notifier};
use vhost_daemon::sandbox::{self, Paths, Sandbox, Syscalls};

use crate::chardev::{self, Chardevs};
use crate::command_line::{self, CommandLine, Invocation, Options, Step, StepKind, Syntax};
use crate::monitor::{Monitor, Monitors, Server};
use crate::pidfile::PidFile;
use crate::race::{First, race};
use crate::signals::Signals;
use crate::{SocketFile, StepOption};

/// Exit status after a panic.
const PANICKED: i32 = 101;

/// What a daemon gets when it is made.
pub struct Start {
    /// The descriptors of socket activation.
    pub fds: NamedFds,
    /// What it announces.
    pub version: Version,
    /// The character devices, for commands on them.
    pub chardevs: Rc<Chardevs>,
}

/// What differs between daemons before they serve.
#[derive(Clone, Copy, Debug)]
pub struct Program<K: 'static> {
    /// The program's name in messages.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The manual.
    pub help: &'static str,
    /// What `--object` prints when its value asks for help, such as `help` or `iothread,help`.
    pub object_help: fn(&str) -> Option<String>,
    /// Parts of the program that `--trace` can name.
    pub trace_targets: &'static [&'static str],
    /// Its ordered options, beside `--chardev`, `--monitor` and `--qmp`.
    pub steps: &'static [StepOption<K>],
    /// Its options that hold for the whole process, each with a value, beside those of every daemon.
    pub settings: &'static [&'static str],
}

/// What the daemon reaches by path once it is in the sandbox, and which syscalls it needs beyond those of every daemon.
#[derive(Debug, Default)]
pub struct Reach {
    /// Directories whose files may be opened, created and removed.
    pub file_dirs: Vec<PathBuf>,
    /// Directories whose files may be opened for reading.
    pub read_dirs: Vec<PathBuf>,
    /// Sockets; in the directories of these, sockets may be made and removed.
    pub sockets: Vec<PathBuf>,
    /// TCP ports of peers that it connects to.
    pub tcp_peers: Vec<u16>,
    /// Syscalls.
    pub syscalls: Syscalls,
}

/// What a daemon does beside living. All of it runs on the control thread.
pub trait Daemon: Server + Sized {
    /// Tells its ordered options apart.
    type Kind: Copy + 'static;

    /// A daemon that has done nothing yet.
    ///
    /// # Errors
    /// Names the option that cannot be followed.
    fn new(options: &Options, start: Start) -> Result<Rc<Self>>;

    /// Runs an ordered option.
    fn apply(
        self: &Rc<Self>,
        kind: Self::Kind,
        arguments: Arguments,
    ) -> impl Future<Output = qmp::Result<()>>;

    /// Descriptors that came with a name or by number.
    fn fds(&self) -> &NamedFds;

    /// What it reaches once it serves.
    fn reach(&self) -> Reach;

    /// The executors of all threads that exist now, beside the control thread.
    fn threads(&self) -> Vec<Handle>;

    /// The sandbox is about to be entered: what is out of reach afterwards is done without from now on.
    fn confining(&self) {}

    /// All options have run and the process is restricted; monitors are served from now on.
    fn serving(self: &Rc<Self>) {}

    /// Asks the process to end.
    fn request_quit(&self);

    /// Resolves once the process is to end.
    fn quit_requested(&self) -> impl Future<Output = ()>;

    /// Ends what it serves: no client is there after this. Monitors still are.
    fn stop(&self) -> impl Future<Output = ()>;

    /// Ends everything, whether or not [`Daemon::stop`] was called.
    ///
    /// # Errors
    /// What could not be ended in order; everything is ended nevertheless.
    fn shut_down(self: &Rc<Self>) -> impl Future<Output = Result<()>>;
}

/// The whole program: parses the command line, serves, and gives the exit status.
pub fn run<D: Daemon>(program: &Program<D::Kind>) -> ExitCode {
    let syntax = Syntax {
        steps: program.steps,
        settings: program.settings,
        object_help: program.object_help,
        trace_targets: program.trace_targets,
    };
    let called = called(program.name);
    let fail = |error: &anyhow::Error| {
        eprintln!("{called}: {error:#}");
        ExitCode::FAILURE
    };
    let invocation = match command_line::parse(&syntax, std::env::args_os().skip(1)) {
        Ok(invocation) => invocation,
        Err(error) => return fail(&error),
    };
    let command_line = match invocation {
        Invocation::Help => return show(program.help),
        Invocation::Shown(text) => return show(&text),
        Invocation::Version => {
            return show(&format!("{called} version {}", program.version));
        }
        Invocation::Run(command_line) => command_line,
    };
    match start::<D>(program, *command_line) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

/// The name that the program was called by.
fn called(name: &str) -> String {
    let given = std::env::args_os().next();
    let base = given
        .as_deref()
        .and_then(|given| Path::new(given).file_name());
    base.map_or_else(|| name.to_owned(), |base| base.display().to_string())
}

fn start<D: Daemon>(
    program: &Program<D::Kind>,
    command_line: CommandLine<D::Kind>,
) -> Result<ExitCode> {
    let filter = log_filter(&command_line)?;
    // The process id that socket activation names is that of the parent.
    let activation_fds = notify::activation_fds()?;
    let background: Option<Background> = match command_line.daemonize {
        false => None,
        true => match notify::daemonize()? {
            Daemonized::Parent { ready: true } => return Ok(ExitCode::SUCCESS),
            Daemonized::Parent { ready: false } => return Ok(ExitCode::FAILURE),
            Daemonized::Child(background) => Some(background),
        },
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(command_line.trace.file.is_none() && std::io::stderr().is_terminal())
        .with_writer(log_writer(&command_line)?)
        .with_target(false)
        .init();
    end_on_panic();
    let signals = Signals::block()?;
    let executor = Executor::new(&Config::default())?;
    let notifier = Notifier::from_env().context("cannot reach $NOTIFY_SOCKET")?;
    let version = Version::announced(format!("outboard {}", program.version));
    let fds = NamedFds::new(activation_fds);
    let chardevs = Rc::<Chardevs>::default();
    let life = Life {
        daemon: D::new(
            &command_line.options,
            Start {
                fds,
                version: version.clone(),
                chardevs: Rc::clone(&chardevs),
            },
        )?,
        command_line,
        notifier,
        version,
        chardevs,
        monitors: Vec::new(),
    };
    executor.block_on(life.run(signals, background))?;
    Ok(ExitCode::SUCCESS)
}

/// A queue thread that panics would leave its guest waiting for ever; a successor of the whole
/// process finds the requests in flight and serves them.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(PANICKED);
    }));
}

/// `--log-level` and `--trace`, else `$RUST_LOG`, else what somebody should look at.
fn log_filter<K>(command_line: &CommandLine<K>) -> Result<EnvFilter> {
    let level = command_line.log_level.as_deref();
    let targets = command_line.trace.targets();
    let traced: String = targets.map(|target| format!(",{target}=trace")).collect();
    let from_env = std::env::var("RUST_LOG").ok();
    let directives = level.or(from_env.as_deref()).unwrap_or("warn");
    let filter = EnvFilter::try_new(format!("{directives}{traced}"));
    filter.map_err(|error| anyhow!("--log-level {directives}: {error}"))
}

/// Standard error, or the file that `--trace` names.
fn log_writer<K>(command_line: &CommandLine<K>) -> Result<BoxMakeWriter> {
    let Some(path) = &command_line.trace.file else {
        return Ok(BoxMakeWriter::new(std::io::stderr));
    };
    let file = std::fs::File::create(path);
    let file = file.with_context(|| format!("--trace file={}", path.display()))?;
    Ok(BoxMakeWriter::new(std::sync::Mutex::new(file)))
}

fn show(text: &str) -> ExitCode {
    // A reader that closes its end early has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    ExitCode::SUCCESS
}

/// Everything between the command line and the exit code.
struct Life<D: Daemon> {
    daemon: Rc<D>,
    command_line: CommandLine<D::Kind>,
    notifier: Notifier,
    version: Version,
    chardevs: Rc<Chardevs>,
    monitors: Vec<Monitor>,
}

impl<D: Daemon> Life<D> {
    /// Serves until a signal or `quit`.
    async fn run(mut self, signals: Signals, background: Option<Background>) -> Result<()> {
        let daemon = Rc::clone(&self.daemon);
        let watcher = executor::spawn(async move {
            match signals.wait().await {
                Ok(signal) => tracing::info!(%signal, "ending"),
                Err(error) => tracing::error!(%error, "cannot wait for signals"),
            }
            daemon.request_quit();
        });
        let daemon = Rc::clone(&self.daemon);
        let started = match race(self.start_up(), daemon.quit_requested()).await {
            First::Left(started) => started.map(Some),
            First::Right(()) => Ok(None),
        };
        let served = match started {
            Ok(Some(pidfile)) => self.serve(background).await.map(|()| Some(pidfile)),
            other => other,
        };
        let stopped = daemon.shut_down().await;
        watcher.cancel();
        let _pidfile = served?;
        stopped
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

    async fn apply(&mut self, step: &Step<D::Kind>) -> qmp::Result<()> {
        let arguments = step.arguments()?;
        match step.kind {
            StepKind::Own(kind) => self.daemon.apply(kind, arguments).await,
            StepKind::Chardev => self.chardevs.open(self.daemon.fds(), arguments).await,
            StepKind::Monitor => {
                let monitor = Monitor::new(arguments, &self.chardevs, self.version.clone())?;
                self.monitors.push(monitor);
                Ok(())
            }
            StepKind::Qmp => {
                let endpoint = chardev::listen(arguments).await?;
                let monitor = Monitor::on(endpoint, self.version.clone());
                self.monitors.push(monitor);
                Ok(())
            }
        }
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
        self.daemon.serving();
        let mut monitors = Monitors::default();
        for monitor in self.monitors.drain(..) {
            monitors.serve(&self.daemon, monitor);
        }
        tell(self.notifier.ready());
        tracing::info!("ready");
        self.daemon.quit_requested().await;
        tell(self.notifier.stopping());
        self.daemon.stop().await;
        monitors.close().await;
        Ok(())
    }

    /// What stays reachable: what the daemon says, and directories of sockets and the pid file, from
    /// which these are removed at the end.
    fn policy(&self) -> sandbox::Policy {
        let Reach {
            file_dirs,
            read_dirs,
            sockets,
            tcp_peers,
            syscalls,
        } = self.daemon.reach();
        let monitors = self.monitors.iter().filter_map(Monitor::socket_file);
        let mut paths: Vec<PathBuf> = monitors.map(SocketFile::path).map(Path::to_owned).collect();
        paths.extend(sockets);
        paths.extend(self.chardevs.socket_paths());
        paths.extend(self.command_line.pidfile.clone());
        let parents = paths.iter().filter_map(|path| {
            let absolute = std::path::absolute(path).ok()?;
            absolute.parent().map(Path::to_owned)
        });
        let mut socket_dirs: Vec<PathBuf> = parents.collect();
        socket_dirs.sort();
        socket_dirs.dedup();
        sandbox::Policy {
            file_dirs,
            read_dirs,
            socket_dirs,
            tcp_peers,
            syscalls,
        }
    }

    /// Restricts every thread, this one last because it makes the others.
    async fn enter(&self, sandbox: Sandbox) -> Result<()> {
        // Later ones inherit what their makers have by then.
        executor::workers::retire();
        self.daemon.confining();
        for thread in self.daemon.threads() {
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
