//! QMP commands of a machine, and the events that go with them; names and shapes are QEMU's.

use qmp::{Arguments, Command, Error, Event, SyncHandler, Value, Version, json};

use crate::machine::{Machine, RunState};
use crate::pci::root::DeviceInfo;

/// What commands act upon: the machine, and what there is to tell.
pub(crate) struct Control {
    /// The machine.
    pub(crate) machine: Machine,
    events: Vec<Event>,
    over: bool,
}

impl Control {
    /// Control over `machine`.
    pub(crate) fn new(machine: Machine) -> Self {
        Self {
            machine,
            events: Vec::new(),
            over: false,
        }
    }

    /// Whether the process is to end.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Events that clients have not been told of.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// The guest powered itself off.
    pub(crate) fn guest_power_off(&mut self) {
        self.shut_down(true, "guest-shutdown");
    }

    /// The process was asked to end by a signal.
    pub(crate) fn host_signal(&mut self) {
        self.shut_down(false, "host-signal");
    }

    /// The guest asked for a reset.
    ///
    /// # Errors
    /// The machine cannot be reset.
    pub(crate) fn guest_reset(&mut self) -> anyhow::Result<()> {
        self.machine.reset()?;
        self.tell_reset(true, "guest-reset");
        Ok(())
    }

    fn shut_down(&mut self, guest: bool, reason: &str) {
        if !self.over {
            self.over = true;
            let data = json!({ "guest": guest, "reason": reason });
            self.events.push(Event::with_data("SHUTDOWN", data));
        }
    }

    fn tell_reset(&mut self, guest: bool, reason: &str) {
        let data = json!({ "guest": guest, "reason": reason });
        self.events.push(Event::with_data("RESET", data));
    }
}

type Answer = qmp::Result<Value>;

/// All commands. `query-commands` is listed to be found; the table itself answers it.
pub(crate) const COMMANDS: &[Command<SyncHandler<Control>>] = &[
    Command {
        name: "cont",
        handler: cont,
    },
    Command {
        name: "query-commands",
        handler: |_, _| Ok(json!([])),
    },
    Command {
        name: "query-cpus-fast",
        handler: query_cpus_fast,
    },
    Command {
        name: "query-pci",
        handler: query_pci,
    },
    Command {
        name: "query-status",
        handler: query_status,
    },
    Command {
        name: "query-version",
        handler: query_version,
    },
    Command {
        name: "quit",
        handler: quit,
    },
    Command {
        name: "stop",
        handler: stop,
    },
    Command {
        name: "system_powerdown",
        handler: system_powerdown,
    },
    Command {
        name: "system_reset",
        handler: system_reset,
    },
];

fn done() -> Answer {
    Ok(json!({}))
}

fn failed(error: anyhow::Error) -> Error {
    Error::generic(format!("{error:#}"))
}

fn query_status(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let running = control.machine.state() == RunState::Running;
    let status = if running { "running" } else { "paused" };
    Ok(json!({ "status": status, "singlestep": false, "running": running }))
}

fn query_version(_: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(json!(version()))
}

/// What the greeting and `query-version` tell.
pub(crate) fn version() -> Version {
    Version::announced(concat!("outboard-vmm ", env!("CARGO_PKG_VERSION")))
}

fn stop(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    if control.machine.state() == RunState::Running {
        let result = control.machine.pause();
        control.events.push(Event::new("STOP"));
        result.map_err(failed)?;
    }
    done()
}

fn cont(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    if control.machine.state() == RunState::Paused {
        control.machine.resume();
        control.events.push(Event::new("RESUME"));
    }
    done()
}

fn system_powerdown(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    control.machine.press_power_button();
    control.events.push(Event::new("POWERDOWN"));
    done()
}

fn system_reset(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    control.machine.reset().map_err(failed)?;
    control.tell_reset(false, "host-qmp-system-reset");
    done()
}

fn quit(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    control.shut_down(false, "host-qmp-quit");
    done()
}

fn query_cpus_fast(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let threads = control.machine.cpu_thread_ids();
    let describe = |(index, thread): (usize, &i32)| {
        json!({
            "cpu-index": index,
            "thread-id": thread,
            "target": "x86_64",
            "props": { "socket-id": 0, "core-id": index, "thread-id": 0 },
        })
    };
    Ok(threads.iter().enumerate().map(describe).collect())
}

fn query_pci(control: &mut Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let devices = control.machine.pci_devices();
    let devices: Vec<_> = devices
        .iter()
        .enumerate()
        .map(|(slot, device)| describe_device(slot, device))
        .collect();
    Ok(json!([{ "bus": 0, "devices": devices }]))
}

fn describe_device(slot: usize, device: &DeviceInfo) -> Value {
    let regions: Vec<_> = device
        .bar
        .iter()
        .map(|(address, size)| {
            json!({
                "bar": 0,
                "type": "memory",
                "address": address,
                "size": size,
                "prefetch": false,
                "mem_type_64": false,
            })
        })
        .collect();
    json!({
        "bus": 0,
        "slot": slot,
        "function": 0,
        "class_info": { "desc": device.class_name, "class": device.class },
        "id": { "vendor": device.vendor, "device": device.device },
        "irq_pin": 0,
        "qdev_id": device.id,
        "regions": regions,
    })
}
