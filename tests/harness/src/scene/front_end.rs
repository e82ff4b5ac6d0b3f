//! The VMMs that can stand in front of a daemon, and their command lines.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Result, bail};

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// `outboard-vmm`, which needs KVM.
    Outboard,
    /// QEMU on KVM.
    QemuKvm,
    /// QEMU in software, on any machine.
    QemuTcg,
}

impl FrontEnd {
    /// The name that `vm-scene` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Outboard => "outboard",
            Self::QemuKvm => "qemu-kvm",
            Self::QemuTcg => "qemu-tcg",
        }
    }

    /// Whether the VMM needs a `/dev/kvm` that runs guests.
    pub fn needs_kvm(self) -> bool {
        self != Self::QemuTcg
    }
}

impl FromStr for FrontEnd {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [Self::Outboard, Self::QemuKvm, Self::QemuTcg];
        match all.into_iter().find(|front_end| front_end.name() == name) {
            Some(front_end) => Ok(front_end),
            None => bail!("unknown front-end '{name}': outboard, qemu-kvm or qemu-tcg"),
        }
    }
}

/// Layouts of virtqueues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rings {
    /// Split only.
    Split,
    /// Packed, too, which Linux prefers.
    Packed,
}

impl FromStr for Rings {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "split" => Ok(Self::Split),
            "packed" => Ok(Self::Packed),
            _ => bail!("unknown rings '{name}': split or packed"),
        }
    }
}

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// Its VMM.
    pub front_end: FrontEnd,
    /// The bzImage.
    pub kernel: PathBuf,
    /// Its initramfs, made by [`crate::nested::guest_initramfs`].
    pub initramfs: PathBuf,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The vhost-user socket of its disk, with the number of request queues; none for a guest without a disk.
    pub disk: Option<(PathBuf, u32)>,
    /// The vhost-user socket of its network card, with the number of queue pairs.
    pub card: Option<(PathBuf, u32)>,
    /// How QEMU lets the guest lay its rings out; `outboard-vmm` offers whatever the daemon does.
    pub rings: Rings,
    /// What the guest runs; empty for a shell.
    pub run: String,
}

impl Boot {
    /// The VMM's command; its console is its standard input and output, its QMP socket is `qmp`.
    pub(super) fn command(&self, qmp: &Path) -> Command {
        match self.front_end {
            FrontEnd::Outboard => self.outboard(qmp),
            FrontEnd::QemuKvm => self.qemu(qmp, "kvm"),
            FrontEnd::QemuTcg => self.qemu(qmp, "tcg,thread=multi"),
        }
    }

    fn kernel_arguments(&self) -> String {
        let mut arguments =
            "console=ttyS0 quiet loglevel=1 panic=-1 no_timer_check rdinit=/init".to_owned();
        if !self.run.is_empty() {
            arguments.push_str(" run=");
            arguments.push_str(&self.run);
        }
        arguments
    }

    fn outboard(&self, qmp: &Path) -> Command {
        let mut command = Command::new(super::program("outboard-vmm"));
        command
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initrd")
            .arg(&self.initramfs);
        command.arg("--cmdline").arg(self.kernel_arguments());
        command.args([
            "--cpus",
            &self.cpus.to_string(),
            "--memory",
            "512M",
            "--serial",
            "stdio",
        ]);
        command.arg("--qmp").arg(qmp);
        if let Some((socket, queues)) = &self.disk {
            let disk = format!("socket={},num-queues={queues}", socket.display());
            command.args(["--vhost-user-blk", &disk]);
        }
        if let Some((socket, pairs)) = &self.card {
            let card = format!("socket={},queues={pairs}", socket.display());
            command.args(["--vhost-user-net", &card]);
        }
        command
    }

    fn qemu(&self, qmp: &Path, accelerator: &str) -> Command {
        let mut command = Command::new(super::program("qemu-system-x86_64"));
        command
            .args(["-machine", "q35", "-accel", accelerator, "-cpu", "max"])
            .args(["-smp", &self.cpus.to_string(), "-m", "512"])
            .args([
                "-object",
                "memory-backend-memfd,id=memory,size=512M,share=on",
            ])
            .args(["-numa", "node,memdev=memory"])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args([
                "-chardev",
                "stdio,id=console,signal=off",
                "-serial",
                "chardev:console",
            ])
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", qmp.display()),
            ])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .args(["-append", &self.kernel_arguments()]);
        if let Some((socket, queues)) = &self.disk {
            let chardev = format!("socket,id=disk,reconnect=1,path={}", socket.display());
            command.args(["-chardev", &chardev]);
            let packed = match self.rings {
                Rings::Split => "off",
                Rings::Packed => "on",
            };
            let device =
                format!("vhost-user-blk-pci,chardev=disk,num-queues={queues},packed={packed}");
            command.args(["-device", &device]);
        }
        command
    }
}
