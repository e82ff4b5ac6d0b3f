//! Where a scene is played: on this machine, or in a nested one that has the KVM which this one lacks.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Boot, FrontEnd, Guest, Rings, program};
use crate::nested::{GuestContents, Kernel, NestedVm, Outcome, guest_initramfs};

/// Programs that a scene starts besides the daemons and the VMM.
const PEERS: [&str; 2] = ["qemu-img", "mke2fs"];
/// What a scene with a network starts besides those.
const NETWORK_PEERS: [&str; 2] = ["ip", "iperf3"];
/// Programs of a guest with a network card.
const CARD_PROGRAMS: [&str; 2] = ["iperf3", "ethtool"];
/// Modules of its kernel.
const CARD_MODULES: [&str; 2] = ["virtio_net", "8021q"];
/// Modules that its network needs outside.
const NETWORK_MODULES: [&str; 2] = ["tun", "8021q"];

/// A scene to be played by `vm-scene`.
#[derive(Debug, Clone)]
pub struct Stage {
    scene: String,
    front_end: FrontEnd,
    network: bool,
    options: Vec<String>,
}

impl Stage {
    /// The scene of that name, with that VMM.
    pub fn new(scene: &str, front_end: FrontEnd) -> Self {
        Self {
            scene: scene.into(),
            front_end,
            network: false,
            options: Vec::new(),
        }
    }

    /// The guest has a network card, too.
    #[must_use]
    pub fn with_network(mut self) -> Self {
        self.network = true;
        self
    }

    /// An option of `vm-scene`, as `--name value`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl ToString) -> Self {
        self.options
            .extend([format!("--{name}"), value.to_string()]);
        self
    }

    /// Whether the scene will be played in a nested machine.
    pub fn is_nested(&self) -> bool {
        self.front_end.needs_kvm() && !kvm_runs_guests()
    }

    /// Plays the scene and hands each line that it prints to `watch` at once.
    ///
    /// # Errors
    /// Something that the scene needs is missing. What happens in the scene is in the outcome.
    pub fn play(&self, timeout: Duration, watch: impl FnMut(&str)) -> Result<Outcome> {
        if self.is_nested() {
            self.nested_vm()?.run(timeout, watch)
        } else {
            self.play_here(timeout, watch)
        }
    }

    /// Plays the scene with its standard input and output on this terminal.
    ///
    /// # Errors
    /// As for [`Stage::play`].
    pub fn play_interactively(&self) -> Result<()> {
        if self.is_nested() {
            self.nested_vm()?.run_interactively()
        } else {
            let directory = tempfile::Builder::new()
                .prefix("outboard-scene-")
                .tempdir()?;
            let mut command = self.command_here(directory.path())?;
            command.status().context("run vm-scene").map(|_| ())
        }
    }

    fn play_here(&self, timeout: Duration, watch: impl FnMut(&str)) -> Result<Outcome> {
        let directory = tempfile::Builder::new()
            .prefix("outboard-scene-")
            .tempdir()?;
        let mut command = self.command_here(directory.path())?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let console = directory.path().join("stderr.log");
        command.stderr(fs::File::create(&console).context("create the log")?);
        let mut outcome = Outcome::of(command, timeout, watch)?;
        outcome.console = fs::read_to_string(&console).unwrap_or_default();
        Ok(outcome)
    }

    fn command_here(&self, directory: &Path) -> Result<Command> {
        let kernel = Kernel::installed()?;
        let initramfs = directory.join("guest.cpio");
        guest_initramfs(&kernel, &self.guest_contents(), &initramfs)?;
        let mut command = Command::new(program("vm-scene"));
        command
            .args(self.arguments(kernel.image(), &initramfs))
            .env("OUTBOARD_BLKD", program("outboard-blkd"))
            .env("OUTBOARD_NETD", program("outboard-netd"));
        Ok(command)
    }

    fn guest_contents(&self) -> GuestContents {
        let mut contents = GuestContents {
            programs: vec![program("guest-load")],
            ..GuestContents::default()
        };
        if self.network {
            contents.programs.extend(CARD_PROGRAMS.map(program));
            contents.modules.extend(CARD_MODULES);
        }
        contents
    }

    fn nested_vm(&self) -> Result<NestedVm> {
        let kernel = Kernel::installed()?;
        let initramfs = tempfile::Builder::new()
            .prefix("outboard-guest-")
            .tempfile()?;
        guest_initramfs(&kernel, &self.guest_contents(), initramfs.path())?;
        let inside = [Path::new("/guest/vmlinuz"), Path::new("/guest/initramfs")];
        let mut vm = NestedVm::new()?
            .file(kernel.image(), inside[0])?
            .file(initramfs.path(), inside[1])?
            .keep(initramfs)
            .program(program("vm-scene"))?
            .program(program("outboard-blkd"))?
            .file("/etc/mke2fs.conf", "/etc/mke2fs.conf")?;
        for peer in PEERS {
            vm = vm.program(program(peer))?;
        }
        if self.network {
            vm = vm.modules(&NETWORK_MODULES)?;
            vm = vm.program(program("outboard-netd"))?;
            for peer in NETWORK_PEERS {
                vm = vm.program(program(peer))?;
            }
        }
        vm = match self.front_end {
            FrontEnd::Outboard => vm.program(program("outboard-vmm"))?,
            _ => vm.qemu()?,
        };
        let arguments = self.arguments(inside[0], inside[1]);
        Ok(vm.script(format!(
            "export OUTBOARD_BLKD=/bin/outboard-blkd OUTBOARD_NETD=/bin/outboard-netd\n\
             vm-scene {}\n\
             status=$?\n\
             dmesg | grep -E 'type=1326|segfault|traps:|Out of memory' >&2\n\
             exit $status\n",
            arguments.join(" ")
        )))
    }

    fn arguments(&self, kernel: &Path, initramfs: &Path) -> Vec<String> {
        let mut arguments = vec![self.scene.clone()];
        let own = [
            ("--front-end", self.front_end.name().to_owned()),
            ("--kernel", kernel.display().to_string()),
            ("--initramfs", initramfs.display().to_string()),
        ];
        arguments.extend(
            own.into_iter()
                .flat_map(|(name, value)| [name.to_owned(), value]),
        );
        if self.network {
            arguments.extend(["--network", "true"].map(str::to_owned));
        }
        arguments.extend(self.options.iter().cloned());
        arguments
    }
}

/// Whether KVM works here: the processor has an extension for it, and a guest boots with it to its end. Tried once.
///
/// A `/dev/kvm` alone says little: some hosts have one that cannot run a stock kernel.
pub fn kvm_runs_guests() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = processor
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        let extension = flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm");
        extension && trial_boot(FrontEnd::QemuKvm).is_ok()
    })
}

/// Boots a guest without a disk under that VMM and lets it power off.
///
/// # Errors
/// It does not come that far.
pub fn trial_boot(front_end: FrontEnd) -> Result<()> {
    let directory = tempfile::Builder::new()
        .prefix("outboard-trial-")
        .tempdir()?;
    let kernel = Kernel::installed()?;
    let initramfs = directory.path().join("guest.cpio");
    guest_initramfs(&kernel, &GuestContents::default(), &initramfs)?;
    let boot = Boot {
        front_end,
        kernel: kernel.image().into(),
        initramfs,
        cpus: 1,
        disk: None,
        card: None,
        rings: Rings::Split,
        run: "true".into(),
    };
    Guest::start(&boot, directory.path())?.wait_for_line("@exit 0")
}
