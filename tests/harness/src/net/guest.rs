//! A Linux guest under QEMU's emulation with one network card, for what only a real driver does.
//!
//! The guest runs a shell script; what that prints comes line by line over a serial port, so that a test can act in the middle of
//! it. QEMU has no interrupt vectors to offer here (`vectors=0`): its own vhost-user front-end crashes with them under emulation.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::namespace::Namespace;
use crate::nested::{Kernel, Tree};
use crate::process::installed;

/// Modules of the guest's kernel.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_net", "8021q"];

/// The console's file.
const CONSOLE: &str = "console.log";

const MACHINE: &str = "-accel tcg,thread=multi -cpu max -smp 1 -m 256 \
    -object memory-backend-memfd,id=m,size=256M,share=on -numa node,memdev=m \
    -nodefaults -no-user-config -no-reboot -display none";

/// What the card is behind of.
#[derive(Clone, Debug)]
pub enum Card {
    /// A vhost-user back-end that listens on this socket; QEMU connects again when it is gone.
    VhostUser {
        /// The socket.
        socket: PathBuf,
        /// Queue pairs.
        queues: u16,
    },
    /// QEMU's own back-end on this tap.
    Tap(String),
}

/// A guest to start.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// The card.
    pub card: Card,
    /// The card's address, a byte that tells guests apart.
    pub station: u8,
    /// IPv4 address with prefix length.
    pub address: String,
    /// The guest's MTU; `None`: as the card says.
    pub mtu: Option<u16>,
    /// What it runs.
    pub script: String,
}

/// A running guest; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    directory: TempDir,
}

/// Writes the initramfs of a guest that runs `script`.
///
/// # Errors
/// When something that it consists of is not installed.
pub fn write_initramfs(script: &str, path: &Path) -> Result<()> {
    let mut tree = Tree::with_busybox()?;
    tree.text("/init", include_str!("../../../guest/net-init"));
    tree.text("/script", script);
    tree.program(installed("iperf3", "iperf3")?)?;
    tree.modules(&Kernel::installed()?.modules(&MODULES)?)?;
    tree.write_initramfs(path)
}

impl Guest {
    /// Boots it inside of `namespace`.
    ///
    /// # Errors
    /// When QEMU or a part of the guest is not installed.
    pub fn start(plan: &GuestPlan, namespace: &Namespace) -> Result<Self> {
        let qemu = installed("qemu-system-x86_64", "qemu-system-x86")?;
        let directory = tempfile::Builder::new()
            .prefix("outboard-guest.")
            .tempdir()?;
        let initramfs = directory.path().join("initramfs.cpio");
        write_initramfs(&plan.script, &initramfs)?;
        let mtu = plan
            .mtu
            .map(|mtu| format!(" mtu={mtu}"))
            .unwrap_or_default();
        let append = format!(
            "console=ttyS0 quiet panic=-1 no_timer_check rdinit=/init address={}{mtu}",
            plan.address
        );
        let console = directory.path().join(CONSOLE);
        let mut command = namespace.command(&qemu.to_string_lossy());
        command
            .args(MACHINE.split_whitespace())
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-chardev", "stdio,id=script,signal=off"])
            .args(["-serial", "chardev:script"])
            .arg("-kernel")
            .arg(Kernel::installed()?.image())
            .arg("-initrd")
            .arg(&initramfs)
            .args(["-append", &append]);
        plan.card.announce(&mut command, plan.station);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting QEMU")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line.trim_end().to_owned()).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            lines,
            seen: Vec::new(),
            directory,
        })
    }

    /// Waits for a line that begins with `start`; the rest of it.
    ///
    /// # Errors
    /// When the guest ends or is silent for `limit` before that.
    pub fn line(&mut self, start: &str, limit: Duration) -> Result<String> {
        let begun = Instant::now();
        loop {
            let left = limit.saturating_sub(begun.elapsed());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if let Some(rest) = line.strip_prefix(start) {
                        return Ok(rest.trim().to_owned());
                    }
                }
                Err(error) => {
                    let why = match error {
                        RecvTimeoutError::Timeout => format!("no line {start:?} within {limit:?}"),
                        RecvTimeoutError::Disconnected => "the guest ended".to_owned(),
                    };
                    bail!(
                        "{why}; it said:\n{}\nits kernel:\n{}",
                        self.seen.join("\n"),
                        self.console()
                    );
                }
            }
        }
    }

    /// The end of what its kernel said.
    fn console(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits until the script has ended; everything that it said.
    ///
    /// # Errors
    /// When it fails or does not end within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Vec<String>> {
        let status = self.line("end ", limit)?;
        ensure!(
            status == "0",
            "the guest's script ended with {status}:\n{}",
            self.seen.join("\n")
        );
        Ok(std::mem::take(&mut self.seen))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- a guest said ---\n{}\n---", self.seen.join("\n"));
        }
    }
}

impl Card {
    fn announce(&self, command: &mut Command, station: u8) {
        let (netdev, device) = match self {
            Self::VhostUser { socket, queues } => {
                let chardev = format!("socket,id=c,path={},reconnect=1", socket.display());
                command.args(["-chardev", &chardev]);
                let many = if *queues > 1 { ",mq=on" } else { "" };
                (
                    format!("vhost-user,id=n,chardev=c,queues={queues}"),
                    format!("vectors=0{many}"),
                )
            }
            Self::Tap(name) => (
                format!("tap,id=n,ifname={name},script=no,downscript=no,vhost=off"),
                "vectors=0".to_owned(),
            ),
        };
        let mac = format!("52:54:00:00:00:{station:02x}");
        let device = format!("virtio-net-pci,netdev=n,mac={mac},mrg_rxbuf=on,{device}");
        command.args(["-netdev", &netdev, "-device", &device]);
    }
}
