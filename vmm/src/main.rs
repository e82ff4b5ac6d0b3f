//! `outboard-vmm`: boots a Linux guest on KVM and hands its devices to vhost-user back-ends.
//!
//! ```text
//! options -> machine (memory, devices, console, board) -> monitor (main thread: QMP, console, signals)
//!                        |            |
//!                        |            +-- cpu/, bus, pci/, virtio_pci, power, serial, irq, acpi, boot
//!                        +-- vhost_user/ (one thread per device)
//! ```
//!
//! docs/vmm.md has the devices, the memory map and the threads.

mod acpi;
mod boot;
mod bus;
mod commands;
mod cpu;
mod events;
mod irq;
mod layout;
mod machine;
mod memory;
mod monitor;
mod options;
mod pci;
mod power;
mod seccomp;
mod serial;
mod vhost_user;
mod virtio_pci;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::machine::Machine;
use crate::monitor::Monitor;
use crate::options::{Options, Switch};
use crate::seccomp::{Sandbox, ThreadKind};

fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into());
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter.from_env_lossy())
        .init();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("outboard-vmm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let sandbox = match options.sandbox {
        Switch::On => Sandbox::On,
        Switch::Off => Sandbox::Off,
    };
    sandbox.prepare();
    let signals = monitor::take_signals()?;
    let (sender, receiver) = events::queue()?;
    let machine = Machine::new(options, sandbox, sender)?;
    let monitor = Monitor::new(machine, receiver, signals, options.qmp.as_deref())?;
    sandbox.enter(ThreadKind::Main);
    monitor.run()
}
