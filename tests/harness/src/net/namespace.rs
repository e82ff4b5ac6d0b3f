//! Network namespaces: a network of its own for each test, gone when the test is.

use std::fmt::Write as _;
use std::fs::File;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A network namespace with its loopback up. Removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one.
    ///
    /// # Errors
    /// When this process may not make one, or iproute2 is missing.
    pub fn new() -> Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("ob-{}-{number}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let namespace = Self { name };
        namespace.ip("link set lo up")?;
        // Neighbour and router discovery of interfaces that come up would be frames that no test sent.
        namespace.run(
            "sysctl -qw net.ipv6.conf.default.disable_ipv6=1 net.ipv6.conf.all.disable_ipv6=1",
        )?;
        Ok(namespace)
    }

    /// A new one, or the reason why this process cannot have one with a tap in it.
    ///
    /// # Errors
    /// When it should work and does not.
    pub fn or_reason() -> Result<Result<Self, String>> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Err("network namespaces need root".to_owned()));
        }
        if let Err(error) = File::open("/dev/net/tun") {
            return Ok(Err(format!("no /dev/net/tun: {error}")));
        }
        Self::new().map(Ok)
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What to put before a command line so that it runs inside.
    pub fn prefix(&self) -> Vec<String> {
        ["ip", "netns", "exec", &self.name]
            .map(str::to_owned)
            .into()
    }

    /// A command that runs inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    /// Runs a command line without quotes inside; its standard output.
    ///
    /// # Errors
    /// When it fails, with what it wrote.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command")?;
        run(self.command(program).args(words))
    }

    /// Runs `work` on a thread that is inside; what it opens stays there.
    ///
    /// # Errors
    /// When it cannot enter, or as `work`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.name);
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let file = File::open(&path).with_context(|| path.clone())?;
                setns(file, CloneFlags::CLONE_NEWNET).with_context(|| path.clone())?;
                work()
            });
            match inside.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// `ip` with these arguments, inside.
    ///
    /// # Errors
    /// When it fails.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        run(Command::new("ip")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace()))
    }

    /// A tap device that is up and has this address (with prefix length). `flags` are for `ip tuntap add`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn tap(&self, name: &str, address: &str, flags: &str) -> Result<()> {
        self.ip(&format!("tuntap add {name} mode tap vnet_hdr {flags}"))?;
        self.ip(&format!("addr add {address} dev {name}"))?;
        self.ip(&format!("link set {name} up"))?;
        Ok(())
    }

    /// Counters of an interface from `/sys`: `rx_packets`, `tx_bytes`, ...
    ///
    /// # Errors
    /// When there is no such interface or counter.
    pub fn counter(&self, interface: &str, name: &str) -> Result<u64> {
        let text = self.run(&format!("cat /sys/class/net/{interface}/statistics/{name}"))?;
        Ok(text.trim().parse()?)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<String> {
    let line = {
        let mut line = command.get_program().to_string_lossy().into_owned();
        for argument in command.get_args() {
            let _ = write!(line, " {}", argument.to_string_lossy());
        }
        line
    };
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().with_context(|| line.clone())?;
    let errors = String::from_utf8_lossy(&stderr);
    ensure!(status.success(), "{line}: {status}: {}", errors.trim());
    match String::from_utf8(stdout) {
        Ok(text) => Ok(text),
        Err(_) => bail!("{line}: output is no text"),
    }
}
