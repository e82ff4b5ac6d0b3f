//! The machine: everything that a power button or a reset acts upon.
//!
//! Some parts last as long as the process (memory, devices and their connections, the console, the kernel files); a [`Board`] is
//! everything else: KVM's VM, CPUs, interrupt controllers, bus. A reset throws the board away and makes a new one, so that no state
//! can be forgotten.
//!
//! ```text
//! new -> power_on -> running <-> paused
//!                       \-> reset (new board) -> as before
//! ```

#![expect(unsafe_code, reason = "KVM is told which memory to give to the guest")]

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::acpi;
use crate::boot::Kernel;
use crate::bus::Bus;
use crate::cpu::cpuid::{self, Topology};
use crate::cpu::regs;
use crate::cpu::vcpu::{CpuContext, Cpus, Gate};
use crate::events::{EventSender, Notifier};
use crate::irq::{InterruptController, KvmInterrupts};
use crate::layout;
use crate::memory::{Backing, Memory};
use crate::options::Options;
use crate::pci::root::{DeviceInfo, MAX_DEVICES, PciDevice, PciRoot};
use crate::power::Power;
use crate::seccomp::Sandbox;
use crate::serial::{Console, SerialPort};
use crate::vhost_user::blk::Disk;
use crate::vhost_user::net::Card;
use crate::vhost_user::{Device, Environment};
use crate::virtio_pci::{BAR_SIZE, VirtioPci};

/// Whether the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunState {
    /// CPUs run.
    Running,
    /// CPUs are stopped and devices drained.
    Paused,
}

/// What is made anew at each reset. CPUs are dropped (and so ended) before what they use.
struct Board {
    cpus: Cpus,
    bus: Arc<Bus>,
}

/// A virtual machine.
pub(crate) struct Machine {
    board: Option<Board>,
    state: RunState,
    kvm: Kvm,
    supported_cpuid: CpuId,
    cpu_count: u8,
    kernel: Kernel,
    memory: Memory,
    devices: Vec<Arc<Device>>,
    console: Console,
    gate: Arc<Gate>,
    events: EventSender,
    sandbox: Sandbox,
}

impl Machine {
    /// Opens everything that `options` name and starts the devices' threads; the guest does not run yet.
    ///
    /// # Errors
    /// Something cannot be opened, or KVM lacks what is needed.
    pub(crate) fn new(options: &Options, sandbox: Sandbox, events: EventSender) -> Result<Self> {
        let kvm = open_kvm(options.cpus)?;
        let supported_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .context("/dev/kvm: supported CPUID")?;
        let kernel = Kernel::open(&options.kernel, options.initrd.as_deref(), &options.cmdline)?;
        let backing = if options.hugepages {
            Backing::HugePages
        } else {
            Backing::Pages
        };
        let environment = Environment {
            memory: Memory::new(options.memory, backing)?,
            gate: Arc::default(),
            sandbox,
        };
        Ok(Self {
            board: None,
            state: RunState::Paused,
            kvm,
            supported_cpuid,
            cpu_count: options.cpus,
            kernel,
            devices: start_devices(options, &environment)?,
            memory: environment.memory,
            console: Console::open(&options.serial)?,
            gate: environment.gate,
            events,
            sandbox,
        })
    }

    /// Loads the kernel and lets the CPUs run.
    ///
    /// # Errors
    /// The kernel does not fit, or KVM refuses something.
    pub(crate) fn power_on(&mut self) -> Result<()> {
        self.board = Some(self.make_board()?);
        self.resume();
        Ok(())
    }

    /// Stops the CPUs, then drains the devices.
    ///
    /// # Errors
    /// A back-end does not answer; the CPUs are stopped all the same.
    pub(crate) fn pause(&mut self) -> Result<()> {
        if self.state == RunState::Paused {
            return Ok(());
        }
        self.state = RunState::Paused;
        if let Some(board) = &self.board {
            board.cpus.pause();
        }
        self.devices.iter().try_for_each(|device| device.pause())
    }

    /// Starts devices and CPUs again.
    pub(crate) fn resume(&mut self) {
        if self.state == RunState::Running {
            return;
        }
        self.state = RunState::Running;
        for device in &self.devices {
            device.resume();
        }
        if let Some(board) = &self.board {
            board.cpus.resume();
        }
    }

    /// Starts the guest anew; it runs or is paused as before.
    ///
    /// # Errors
    /// A back-end does not stop, or the board cannot be made.
    pub(crate) fn reset(&mut self) -> Result<()> {
        tracing::info!("the machine is reset");
        let state = self.state;
        self.board = None;
        // A guest may ask twice before it is stopped; that must not reset the new board.
        self.events.renew();
        for device in &self.devices {
            device.reset_and_wait()?;
        }
        self.board = Some(self.make_board()?);
        self.state = RunState::Paused;
        if state == RunState::Running {
            self.resume();
        }
        Ok(())
    }

    /// Presses the guest's power button.
    pub(crate) fn press_power_button(&self) {
        if let Some(board) = &self.board {
            board.bus.power.press_button();
        }
    }

    /// Whether the guest runs.
    pub(crate) fn state(&self) -> RunState {
        self.state
    }

    /// Kernel thread ids of the CPU threads, by CPU.
    pub(crate) fn cpu_thread_ids(&self) -> Vec<i32> {
        self.board
            .as_ref()
            .map_or_else(Vec::new, |board| board.cpus.thread_ids())
    }

    /// What is on the PCI bus, in slot order.
    pub(crate) fn pci_devices(&self) -> Vec<DeviceInfo> {
        self.board
            .as_ref()
            .map_or_else(Vec::new, |board| board.bus.pci.describe())
    }

    /// The far end of the serial line.
    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// Moves input from the console to the guest.
    pub(crate) fn serve_console(&mut self) {
        if let Some(board) = &self.board {
            self.console.serve(&board.bus.serial);
        }
    }

    fn make_board(&self) -> Result<Board> {
        let vm = Arc::new(self.kvm.create_vm().context("KVM: virtual machine")?);
        self.give_memory(&vm)?;
        vm.set_tss_address(layout::KVM_TSS_START as usize)
            .context("KVM: TSS")?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP_START)
            .context("KVM: identity map")?;
        vm.create_irq_chip().context("KVM: interrupt controllers")?;
        let vcpus = self.make_vcpus(&vm)?;
        let rsdp = acpi::write_tables(&self.memory, self.cpu_count)?;
        let entry = self.kernel.load(&self.memory, rsdp)?;
        regs::set_boot_cpu(&vcpus[0], &self.memory, entry)?;
        let bus = Arc::new(self.make_bus(vm)?);
        let context = CpuContext {
            gate: self.gate.clone(),
            bus: bus.clone(),
            events: self.events.clone(),
            sandbox: self.sandbox,
        };
        Ok(Board {
            cpus: Cpus::start(vcpus, &context)?,
            bus,
        })
    }

    fn give_memory(&self, vm: &VmFd) -> Result<()> {
        for (slot, region) in self.memory.regions().iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.guest_start,
                memory_size: region.size,
                userspace_addr: region.host_start,
            };
            // SAFETY: the range is a mapping of guest memory, which lives as long as the machine and so longer than the VM;
            // regions do not overlap. Nothing in this process holds a reference into it.
            unsafe { vm.set_user_memory_region(region) }.context("KVM: guest memory")?;
        }
        Ok(())
    }

    fn make_vcpus(&self, vm: &VmFd) -> Result<Vec<VcpuFd>> {
        (0..self.cpu_count)
            .map(|index| {
                let vcpu = vm
                    .create_vcpu(u64::from(index))
                    .with_context(|| format!("KVM: CPU {index}"))?;
                let topology = Topology {
                    index,
                    count: self.cpu_count,
                };
                let cpuid = cpuid::for_cpu(&self.supported_cpuid, topology)?;
                vcpu.set_cpuid2(&cpuid)
                    .with_context(|| format!("KVM: CPUID of CPU {index}"))?;
                regs::set_msrs(&vcpu)?;
                Ok(vcpu)
            })
            .collect()
    }

    fn make_bus(&self, vm: Arc<VmFd>) -> Result<Bus> {
        let interrupts: Arc<dyn InterruptController> = Arc::new(KvmInterrupts::new(vm.clone())?);
        let line = |gsi| -> Result<Arc<Notifier>> {
            let notifier = Arc::new(Notifier::new()?);
            interrupts.attach(&notifier, gsi)?;
            Ok(notifier)
        };
        let serial = SerialPort::new(&self.console, line(layout::SERIAL_GSI)?);
        let power = Power::new(self.events.clone(), line(layout::EVENT_GSI)?);
        let bars = (layout::PCI_WINDOW_START as u32..).step_by(BAR_SIZE as usize);
        let devices = self
            .devices
            .iter()
            .zip(bars)
            .map(|(device, bar)| -> Box<dyn PciDevice> {
                let doorbells = Box::new(vm.clone());
                Box::new(VirtioPci::new(
                    device.clone(),
                    bar,
                    interrupts.clone(),
                    doorbells,
                ))
            });
        Ok(Bus {
            serial,
            power,
            pci: PciRoot::new(devices.collect()),
        })
    }
}

fn open_kvm(cpus: u8) -> Result<Kvm> {
    let kvm = Kvm::new().context("/dev/kvm: is KVM available, and may you use it?")?;
    for (capability, name) in [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::TscDeadlineTimer, "the TSC deadline timer"),
    ] {
        ensure!(kvm.check_extension(capability), "/dev/kvm lacks {name}");
    }
    let max = kvm.get_max_vcpus();
    ensure!(
        usize::from(cpus) <= max,
        "--cpus {cpus}: KVM offers at most {max}"
    );
    Ok(kvm)
}

/// Starts what the options name, in the order of their slots: disks first.
fn start_devices(options: &Options, environment: &Environment) -> Result<Vec<Arc<Device>>> {
    let disks = options.disks.iter().enumerate();
    let mut descriptions: Vec<_> = disks.map(|(i, disk)| Disk::describe(i, disk)).collect();
    for (index, net) in options.nets.iter().enumerate() {
        descriptions.push(Card::describe(index, net)?);
    }
    let count = descriptions.len();
    ensure!(
        count <= MAX_DEVICES,
        "{count} devices asked for, at most {MAX_DEVICES} are possible"
    );
    let mut devices: Vec<Arc<Device>> = Vec::new();
    for description in descriptions {
        let name = &description.name;
        ensure!(
            devices.iter().all(|other| other.name() != name),
            "there are two devices with id {name}"
        );
        devices.push(Arc::new(Device::start(description, environment)?));
    }
    Ok(devices)
}
