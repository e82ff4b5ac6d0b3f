//! The outer machine: QEMU in software, whose guest has KVM.
//!
//! ```text
//! new -> program, file, qemu -> script -> run: boots, streams lines, ends with the script's exit status
//! ```
//!
//! The first serial port is the kernel's console and goes to a file, the second carries the script's output and is QEMU's
//! standard output here. A line that is a JSON object is an event; anything else is kept as output.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use super::{Kernel, Outcome, Tree};

/// Modules of the outer machine's kernel: KVM on AMD's extension, and the disks that a scenario may attach.
const OUTER_MODULES: [&str; 4] = ["kvm_amd", "virtio_ring", "virtio_pci", "virtio_blk"];

/// The machine: two processors, because a guest that runs beside its daemon needs them; memory for the guest and its images.
const MACHINE: &str = "-machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 \
    -nodefaults -no-user-config -no-reboot -display none \
    -chardev stdio,id=script,signal=off";

/// The console's file.
const CONSOLE: &str = "console.log";

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
    /// Files that the tree copies from, and that must live until it is written.
    kept: Vec<NamedTempFile>,
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
            kept: Vec::new(),
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
        // QEMU looks for its firmware relative to where it lies itself.
        self.tree
            .program_as("/usr/bin/qemu-system-x86_64", "/usr/bin/qemu-system-x86_64")?;
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

    /// Adds kernel modules of the machine, with those that they need.
    ///
    /// # Errors
    /// The kernel has no such module.
    pub fn modules(mut self, names: &[&str]) -> Result<Self> {
        let names = [&OUTER_MODULES[..], names].concat();
        self.tree.modules(&self.kernel.modules(&names)?)?;
        Ok(self)
    }

    /// The shell script that is the machine's work.
    #[must_use]
    pub fn script(mut self, text: impl Into<String>) -> Self {
        self.tree.text("/script", text);
        self
    }

    /// Keeps a temporary file, given before as a source, until the machine is built.
    #[must_use]
    pub fn keep(mut self, file: NamedTempFile) -> Self {
        self.kept.push(file);
        self
    }

    /// Boots the machine and runs the script; hands each line that it prints to `watch` at once.
    ///
    /// Ends when the machine has powered off, or has been stopped after `timeout`.
    ///
    /// # Errors
    /// The machine cannot be built or started.
    pub fn run(self, timeout: Duration, watch: impl FnMut(&str)) -> Result<Outcome> {
        let directory = tempfile::Builder::new()
            .prefix("outboard-nested-")
            .tempdir()?;
        let command = self.command(directory.path())?;
        let mut outcome = Outcome::of(command, timeout, watch)?;
        outcome.console = std::fs::read(directory.path().join(CONSOLE))
            .map(|bytes| String::from_utf8_lossy(&bytes).replace('\r', ""))
            .unwrap_or_default();
        Ok(outcome)
    }

    /// Boots the machine and runs the script with this process's terminal as its standard input and output.
    ///
    /// # Errors
    /// The machine cannot be built or started.
    pub fn run_interactively(mut self) -> Result<()> {
        self.tree.text("/interactive", "");
        let directory = tempfile::Builder::new()
            .prefix("outboard-nested-")
            .tempdir()?;
        self.command(directory.path())?
            .status()
            .context("run QEMU")
            .map(|_| ())
    }

    fn command(&self, directory: &Path) -> Result<Command> {
        let initramfs = directory.join("initramfs.cpio");
        self.tree.write_initramfs(&initramfs)?;
        let console = format!("file:{}", directory.join(CONSOLE).display());
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(MACHINE.split_whitespace())
            .args(["-serial", &console, "-serial", "chardev:script"])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(&initramfs)
            .args([
                "-append",
                // On a busy host the check of the timer's interrupt takes the emulator for a broken machine.
                "console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check rdinit=/init",
            ]);
        Ok(command)
    }
}
