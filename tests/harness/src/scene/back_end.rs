//! The daemons of a scene: started, killed without warning, started again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Network;
use crate::process::{Daemon, Launch, Program};
use crate::qmp_client::QmpClient;

/// The name of the one port of a network's daemon.
pub const PORT: &str = "port";

/// A daemon that serves one device, in a directory of its own.
#[derive(Debug)]
pub struct BackEnd {
    name: &'static str,
    directory: PathBuf,
    launch: Launch,
    daemon: Option<Daemon>,
}

impl BackEnd {
    /// Describes an `outboard-blkd` that serves the node `disk`, which the `--blockdev` option defines, with `queues` request queues,
    /// each with a thread of its own.
    pub fn disk(directory: &Path, blockdev: &str, queues: u32) -> Self {
        let mut arguments = vec!["--blockdev".to_owned(), blockdev.to_owned()];
        let mut export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
             addr.type=unix,addr.path={}",
            directory.join(SOCKET).display()
        );
        for index in 0..queues {
            arguments.extend(["--object".to_owned(), format!("iothread,id=thread{index}")]);
            export.push_str(&format!(",iothread.{index}=thread{index}"));
        }
        let monitor = directory.join(MONITOR);
        let chardev = format!(
            "socket,id=qmp,server=on,wait=off,path={}",
            monitor.display()
        );
        let rest = [
            "--export",
            &export,
            "--chardev",
            &chardev,
            "--monitor",
            "chardev=qmp",
        ];
        arguments.extend(rest.map(str::to_owned));
        Self::new(
            "outboard-blkd",
            Program::OutboardBlkd,
            arguments,
            directory.into(),
        )
    }

    /// Describes an `outboard-netd` that connects one port to the tap device of `network`; its sockets go into a directory below
    /// `directory`.
    ///
    /// # Errors
    /// That directory cannot be made.
    pub fn network(directory: &Path, network: &Network) -> Result<Self> {
        let directory = directory.join("network");
        std::fs::create_dir(&directory).context("create a directory for the daemon")?;
        let netdev = format!("type=tap,id=tap,ifname={}", network.tap());
        let port = format!(
            "id={PORT},netdev=tap,queues={},mtu={},socket={}",
            network.pairs(),
            network.mtu(),
            directory.join(SOCKET).display()
        );
        let monitor = directory.join(MONITOR).display().to_string();
        let arguments = ["--netdev", &netdev, "--port", &port, "--qmp", &monitor];
        Ok(Self::new(
            "outboard-netd",
            Program::OutboardNetd,
            arguments.map(str::to_owned).into(),
            directory,
        ))
    }

    fn new(
        name: &'static str,
        program: Program,
        arguments: Vec<String>,
        directory: PathBuf,
    ) -> Self {
        Self {
            name,
            launch: Launch::new(program, arguments, &directory),
            directory,
            daemon: None,
        }
    }

    /// Where the VMM connects.
    pub fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// Starts the daemon and waits until it has announced that it is ready; the time that took.
    ///
    /// # Errors
    /// It does not start, ends, or says nothing in time.
    pub fn start(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        self.daemon = Some(self.launch.start()?);
        Ok(begin.elapsed())
    }

    /// Kills the daemon with SIGKILL.
    ///
    /// # Errors
    /// It was not running any more.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon
            .take()
            .context("the daemon was not started")?
            .kill()
    }

    /// Asks the daemon to end as a service manager does, and waits for it.
    ///
    /// # Errors
    /// It does not end with status 0.
    pub fn terminate(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the daemon was not started")?;
        let status = daemon.stop()?;
        ensure!(
            status.success(),
            "the daemon ended with {status} after SIGTERM"
        );
        Ok(())
    }

    /// A QMP connection to the daemon.
    ///
    /// # Errors
    /// The daemon does not answer.
    pub fn monitor(&self) -> Result<QmpClient> {
        QmpClient::connect(&self.directory.join(MONITOR))
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        // Left over only where the scene has failed: what the daemon said may tell why.
        if let Some(daemon) = &self.daemon {
            eprintln!("--- {}:\n{}---", self.name, daemon.stderr());
        }
    }
}

const SOCKET: &str = "device.sock";
const MONITOR: &str = "daemon-qmp.sock";
