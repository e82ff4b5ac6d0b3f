//! The outer machine: QEMU in software, whose guest has KVM.
//!
//! ```text
//! new -> program, file, qemu -> script -> run: boots, streams lines, ends with the script's exit status
//! ```
//!
//! The first serial port is the kernel's console and goes to a file, the second carries the script's output and is QEMU's
//! standard output here. A line that is a JSON object is an event; anything else is kept as output.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Kernel, Tree};

/// Modules of the outer machine's kernel: KVM on AMD's extension, and the disks that a scenario may attach.
const OUTER_MODULES: [&str; 4] = ["kvm_amd", "virtio_ring", "virtio_pci", "virtio_blk"];

/// Where QEMU looks for the firmware that boots a guest by `-kernel`.
const FIRMWARE: [&str; 4] = [
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
];

/// A machine with `/dev/kvm`, described step by step, booted by [`NestedVm::run`].
#[derive(Debug)]
pub struct NestedVm {
    kernel: Kernel,
    tree: Tree,
    interactive: bool,
}

/// What a run left behind.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The JSON objects that the script printed, in order.
    pub events: Vec<Value>,
    /// All other lines that it printed.
    pub output: Vec<String>,
    /// The console: the kernel's messages and what the script wrote to its standard error.
    pub console: String,
    /// The script's exit status; none if the machine ended before the script did, or ran out of time.
    pub exit: Option<i32>,
}

impl NestedVm {
    /// A machine with busybox, KVM, and the installed kernel.
    ///
    /// # Errors
    /// busybox-static or the Debian cloud kernel is not installed.
    pub fn new() -> Result<Self> {
        let kernel = Kernel::installed()?;
        let mut tree = Tree::with_busybox()?;
        tree.text("/init", include_str!("../../../guest/outer-init"));
        tree.modules(&kernel.modules(&OUTER_MODULES)?)?;
        Ok(Self {
            kernel,
            tree,
            interactive: false,
        })
    }

    /// Adds a program under `/bin`, with the shared libraries that it asks for.
    ///
    /// # Errors
    /// The program or one of its libraries is missing.
    pub fn program(mut self, path: impl AsRef<Path>) -> Result<Self> {
        self.tree.program(path)?;
        Ok(self)
    }

    /// Adds a copy of the file `source` as `path`.
    ///
    /// # Errors
    /// `source` is not a file.
    pub fn file(mut self, source: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<Self> {
        self.tree.copy(source, path)?;
        Ok(self)
    }

    /// Adds QEMU's x86 system emulator and its firmware, as a VMM to run inside.
    ///
    /// # Errors
    /// QEMU is not installed.
    pub fn qemu(mut self) -> Result<Self> {
        self.tree.program("/usr/bin/qemu-system-x86_64")?;
        for name in FIRMWARE {
            let places =
                ["/usr/share/seabios", "/usr/share/qemu"].map(|dir| Path::new(dir).join(name));
            let source = places.iter().find(|path| path.is_file());
            let source =
                source.with_context(|| format!("QEMU's firmware {name} is not installed"))?;
            self.tree
                .copy(source, Path::new("/usr/share/qemu").join(name))?;
        }
        Ok(self)
    }

    /// The shell script that is the machine's work.
    #[must_use]
    pub fn script(mut self, text: impl Into<String>) -> Self {
        self.tree.text("/script", text);
        self
    }

    /// Connects the script's standard input and output to this process's terminal, instead of collecting lines.
    #[must_use]
    pub fn interactive(mut self) -> Self {
        self.interactive = true;
        self
    }

    /// Boots the machine and runs the script; hands each line that it prints to `watch` at once.
    ///
    /// Ends when the machine has powered off, or has been stopped after `timeout`.
    ///
    /// # Errors
    /// The machine cannot be built or started.
    pub fn run(self, timeout: Duration, mut watch: impl FnMut(&str)) -> Result<Outcome> {
        let directory = tempfile::Builder::new()
            .prefix("outboard-nested-")
            .tempdir()?;
        let initramfs = directory.path().join("initramfs.cpio");
        let console = directory.path().join("console.log");
        self.tree.write_initramfs(&initramfs)?;
        let deadline = Instant::now() + timeout;
        let mut qemu = Running(
            self.command(&initramfs, &console)
                .spawn()
                .context("start QEMU")?,
        );
        let mut outcome = Outcome::default();
        if let Some(stdout) = qemu.0.stdout.take() {
            let lines = lines_of(stdout);
            while let Ok(line) = next_line(&lines, deadline) {
                watch(&line);
                outcome.take_line(line);
            }
        }
        if self.interactive {
            qemu.0.wait().context("wait for QEMU")?;
        }
        drop(qemu);
        outcome.console = std::fs::read(&console)
            .map(|bytes| String::from_utf8_lossy(&bytes).replace('\r', ""))
            .unwrap_or_default();
        Ok(outcome)
    }

    fn command(&self, initramfs: &Path, console: &Path) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                "3072",
            ])
            .args([
                "-machine",
                "q35",
                "-nodefaults",
                "-no-reboot",
                "-display",
                "none",
            ])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args([
                "-chardev",
                "stdio,id=script,signal=off",
                "-serial",
                "chardev:script",
            ])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(initramfs)
            .args([
                "-append",
                "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init",
            ]);
        if !self.interactive {
            command.stdin(Stdio::null()).stdout(Stdio::piped());
        }
        die_with_parent(&mut command);
        command
    }
}

impl Outcome {
    /// The first event of that name (`{"event": name, ...}`).
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.events.iter().find(|event| event["event"] == name)
    }

    fn take_line(&mut self, line: String) {
        if let Some(status) = line.strip_prefix("@exit ") {
            self.exit = status.trim().parse().ok();
        } else if let Ok(event @ Value::Object(_)) = serde_json::from_str(&line) {
            self.events.push(event);
        } else {
            self.output.push(line);
        }
    }
}

/// A child that does not outlive its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only for a child that is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines_of(stdout: std::process::ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .is_ok_and(|length| length > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receiver
}

fn next_line(lines: &Receiver<String>, deadline: Instant) -> Result<String, RecvTimeoutError> {
    lines.recv_timeout(deadline.saturating_duration_since(Instant::now()))
}

/// A killed test must not leave an emulator behind that eats a core.
#[expect(
    unsafe_code,
    reason = "Command offers no other way to run something between fork and exec"
)]
fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call, which is async-signal-safe, and allocates nothing.
    unsafe {
        command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?));
    }
}
