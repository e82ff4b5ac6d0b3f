//! Interrupt routing: which global system interrupt (GSI) means which IOAPIC input or MSI message, and which eventfd raises it.
//!
//! KVM replaces the whole table on each change, so one object owns it. Promises: IOAPIC inputs 0 to 23 are always routed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context, Result};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;

use crate::events::Notifier;
use crate::layout;

/// An MSI message as a device writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// Where to.
    pub(crate) address: u64,
    /// What.
    pub(crate) data: u32,
}

/// What a device needs to raise interrupts without this process in between.
pub(crate) trait InterruptController: Send + Sync {
    /// Makes `gsi` send `message`.
    fn route(&self, gsi: u32, message: Message) -> Result<()>;
    /// Makes a signal on `event` raise `gsi`.
    fn attach(&self, event: &Notifier, gsi: u32) -> Result<()>;
    /// Undoes [`InterruptController::attach`].
    fn detach(&self, event: &Notifier, gsi: u32) -> Result<()>;
    /// Takes `count` unused GSIs in a row and returns the first.
    fn allocate(&self, count: u32) -> u32;
}

/// KVM's in-kernel interrupt controllers.
pub(crate) struct KvmInterrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

struct Routes {
    messages: BTreeMap<u32, Message>,
    next_gsi: u32,
}

impl KvmInterrupts {
    /// Takes over the routing table of `vm`, whose interrupt controllers exist.
    ///
    /// # Errors
    /// KVM refuses the table.
    pub(crate) fn new(vm: Arc<VmFd>) -> Result<Self> {
        let routes = Routes {
            messages: BTreeMap::new(),
            next_gsi: layout::IOAPIC_INPUTS,
        };
        let interrupts = Self {
            vm,
            routes: Mutex::new(routes),
        };
        interrupts.commit(&interrupts.lock())?;
        Ok(interrupts)
    }

    fn lock(&self) -> MutexGuard<'_, Routes> {
        self.routes
            .lock()
            .expect("no thread panics while it holds the routes")
    }

    fn commit(&self, routes: &Routes) -> Result<()> {
        let ioapic = (0..layout::IOAPIC_INPUTS).map(ioapic_entry);
        let messages = routes
            .messages
            .iter()
            .map(|(gsi, message)| message_entry(*gsi, *message));
        let entries: Vec<_> = ioapic.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries).context("interrupt routing table")?;
        self.vm.set_gsi_routing(&table).context("interrupt routing")
    }
}

impl InterruptController for KvmInterrupts {
    fn route(&self, gsi: u32, message: Message) -> Result<()> {
        let mut routes = self.lock();
        if routes.messages.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.commit(&routes)
    }

    fn attach(&self, event: &Notifier, gsi: u32) -> Result<()> {
        self.vm
            .register_irqfd(event.event_fd(), gsi)
            .with_context(|| format!("irqfd for interrupt {gsi}"))
    }

    fn detach(&self, event: &Notifier, gsi: u32) -> Result<()> {
        self.vm
            .unregister_irqfd(event.event_fd(), gsi)
            .with_context(|| format!("irqfd for interrupt {gsi}"))
    }

    fn allocate(&self, count: u32) -> u32 {
        let mut routes = self.lock();
        let first = routes.next_gsi;
        routes.next_gsi += count;
        first
    }
}

fn ioapic_entry(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi: pin,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}
