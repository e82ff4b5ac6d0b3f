//! A running `outboard-netd` with its ports, and what is needed to start it again.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::namespace::Namespace;
use super::{NetDevice, Options};
use crate::driver::Endpoint;
use crate::process::{Daemon, Launch, Program};
use crate::qmp_client::QmpClient;

/// What the daemon is to have.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    groups: Vec<String>,
    netdevs: Vec<String>,
    ports: Vec<String>,
    arguments: Vec<String>,
    prefix: Vec<String>,
}

impl Plan {
    /// One port on a network back-end: the words of `--netdev` but its id, which is `n0`.
    pub fn one(netdev: &str) -> Self {
        Self::default().netdev(netdev).port("netdev=n0")
    }

    /// Adds a back-end: the words of `--netdev` but its id, which is `n` and its number.
    #[must_use]
    pub fn netdev(mut self, words: &str) -> Self {
        self.netdevs.push(words.to_owned());
        self
    }

    /// Adds a group of ports that share a rate: the words of `--group`.
    #[must_use]
    pub fn group(mut self, words: &str) -> Self {
        self.groups.push(words.to_owned());
        self
    }

    /// Adds a port: the words of `--port` but its id, which is `p` and its number, and its socket.
    #[must_use]
    pub fn port(mut self, words: &str) -> Self {
        self.ports.push(words.to_owned());
        self
    }

    /// Adds to the words of the last port.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn with(mut self, words: &str) -> Self {
        let last = self.ports.last_mut().expect("a plan with a port");
        last.push(',');
        last.push_str(words);
        self
    }

    /// Adds command-line arguments.
    #[must_use]
    pub fn arguments(mut self, line: &str) -> Self {
        self.arguments
            .extend(line.split_whitespace().map(str::to_owned));
        self
    }

    /// Runs the daemon in a network of its own.
    #[must_use]
    pub fn inside(mut self, namespace: &Namespace) -> Self {
        self.prefix = namespace.prefix();
        self
    }
}

/// A running daemon with its sockets in a temporary directory.
#[derive(Debug)]
pub struct NetRig {
    directory: TempDir,
    launch: Launch,
    /// The daemon.
    pub daemon: Daemon,
}

impl NetRig {
    /// Starts a daemon.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(plan: &Plan) -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("outboard-net.")
            .tempdir()
            .context("temporary directory")?;
        let path = directory.path();
        let mut arguments = vec![
            "--qmp".to_owned(),
            path.join("qmp.sock").display().to_string(),
            "--allow-dir".to_owned(),
            path.display().to_string(),
            "--state-dir".to_owned(),
            path.join("state").display().to_string(),
        ];
        for words in &plan.groups {
            arguments.extend(["--group".to_owned(), words.clone()]);
        }
        for (number, words) in plan.netdevs.iter().enumerate() {
            arguments.push("--netdev".to_owned());
            arguments.push(format!("{words},id=n{number}"));
        }
        for (number, words) in plan.ports.iter().enumerate() {
            let socket = socket(path, number);
            arguments.push("--port".to_owned());
            arguments.push(format!("id=p{number},socket={},{words}", socket.display()));
        }
        arguments.extend(plan.arguments.iter().cloned());
        let launch = Launch::new(Program::OutboardNetd, arguments, path).under(plan.prefix.clone());
        let daemon = launch.start()?;
        Ok(Self {
            directory,
            launch,
            daemon,
        })
    }

    /// Its temporary directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Socket of port number `port`.
    pub fn socket(&self, port: usize) -> PathBuf {
        socket(self.directory.path(), port)
    }

    /// A driver on port number `port`, started.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn connect(&self, port: usize, options: Options) -> Result<NetDevice> {
        NetDevice::connect(Endpoint::Connect(self.socket(port)), options)
            .with_context(|| format!("port {port}"))
    }

    /// A driver on port number `port`, negotiated and not started.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn negotiate(&self, port: usize, options: Options) -> Result<NetDevice> {
        NetDevice::negotiate(Endpoint::Connect(self.socket(port)), options)
            .with_context(|| format!("port {port}"))
    }

    /// A connection to the monitor.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn monitor(&self) -> Result<QmpClient> {
        QmpClient::connect(&self.directory.path().join("qmp.sock"))
    }

    /// Ends the daemon in order and starts its successor.
    ///
    /// # Errors
    /// When it does not end well, or the successor does not become ready.
    pub fn restart(&mut self) -> Result<()> {
        let status = self.daemon.stop()?;
        ensure!(status.success(), "{status}");
        self.daemon = self.launch.start()?;
        Ok(())
    }

    /// Kills the daemon with SIGKILL and starts its successor.
    ///
    /// # Errors
    /// When it had ended before, or the successor does not become ready.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.daemon = self.launch.start()?;
        Ok(())
    }
}

fn socket(directory: &Path, port: usize) -> PathBuf {
    directory.join(format!("p{port}.sock"))
}
