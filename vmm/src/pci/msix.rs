//! MSI-X (PCI 3.0, 6.8.2): the vector table, the pending bits and the way from an eventfd to the guest's interrupt.
//!
//! Each interrupt source (a queue, the configuration) has one [`Notifier`] for life; a back-end raises it directly. A source
//! whose vector can deliver is attached to that vector's GSI in KVM. A source whose vector is masked is detached, and then
//! its eventfd keeps the interrupt: that is the pending bit, and re-attaching delivers it.
//!
//! ```text
//! back-end --> Notifier --(attached: KVM)--> GSI --> message --> guest
//!                  \----(detached: stays raised = pending)
//! ```

use std::sync::Arc;

use crate::events::Notifier;
use crate::irq::{InterruptController, Message};

/// Vector number that means "no vector" (virtio 1.2, 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;
/// Bytes of one table entry.
pub(crate) const ENTRY_SIZE: usize = 16;
/// Bit in the capability's message control that enables MSI-X.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Bit in the capability's message control that masks every vector.
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;

#[derive(Clone, Copy, Default)]
struct Entry {
    message: Message,
    control: u32,
}

struct Source {
    notifier: Arc<Notifier>,
    vector: u16,
    attached: Option<u32>,
}

/// MSI-X state of one function.
pub(crate) struct Msix {
    controller: Arc<dyn InterruptController>,
    control: u16,
    table: Vec<Entry>,
    first_gsi: u32,
    sources: Vec<Source>,
}

impl Msix {
    /// One vector per source; no source has a vector yet.
    pub(crate) fn new(
        controller: Arc<dyn InterruptController>,
        sources: Vec<Arc<Notifier>>,
    ) -> Self {
        let vectors = sources.len();
        let first_gsi = controller.allocate(vectors as u32);
        let sources = sources
            .into_iter()
            .map(|notifier| Source {
                notifier,
                vector: NO_VECTOR,
                attached: None,
            })
            .collect();
        let masked = Entry {
            control: ENTRY_MASKED,
            ..Default::default()
        };
        Self {
            controller,
            control: 0,
            table: vec![masked; vectors],
            first_gsi,
            sources,
        }
    }

    /// Number of vectors.
    pub(crate) fn vectors(&self) -> usize {
        self.table.len()
    }

    /// The guest wrote the capability's message control.
    pub(crate) fn set_control(&mut self, control: u16) {
        self.control = control;
        self.update();
    }

    /// Assigns a vector to a source; returns what the guest reads back ([`NO_VECTOR`] if there is no such vector).
    pub(crate) fn set_vector(&mut self, source: usize, vector: u16) -> u16 {
        let vector = if usize::from(vector) < self.table.len() {
            vector
        } else {
            NO_VECTOR
        };
        if let Some(source) = self.sources.get_mut(source) {
            source.vector = vector;
        }
        self.update();
        vector
    }

    /// The vector of a source.
    pub(crate) fn vector(&self, source: usize) -> u16 {
        self.sources
            .get(source)
            .map_or(NO_VECTOR, |source| source.vector)
    }

    /// Takes all vectors away from the sources, as a device reset does.
    pub(crate) fn clear_vectors(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
        }
        self.update();
        for source in &self.sources {
            source.notifier.clear();
        }
    }

    /// A guest's read of the table.
    pub(crate) fn read_table(&self, at: usize, data: &mut [u8]) {
        let bytes: Vec<u8> = self
            .table
            .iter()
            .skip(at / ENTRY_SIZE)
            .take(2)
            .flat_map(|entry| {
                let low = entry.message.address.to_le_bytes();
                let high = u64::from(entry.message.data) | u64::from(entry.control) << 32;
                low.into_iter().chain(high.to_le_bytes())
            })
            .collect();
        copy_out(&bytes, at % ENTRY_SIZE, data);
    }

    /// A guest's write of the table: 4 or 8 aligned bytes; anything else has no effect.
    pub(crate) fn write_table(&mut self, at: usize, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len()) {
            return;
        }
        let Some(entry) = self.table.get_mut(at / ENTRY_SIZE) else {
            return;
        };
        for (index, word) in data.chunks_exact(4).enumerate() {
            let word = u32::from_le_bytes(word.try_into().expect("chunks are 4 bytes long"));
            let address = entry.message.address;
            match at % ENTRY_SIZE + index * 4 {
                0 => entry.message.address = address & !0xffff_ffff | u64::from(word),
                4 => entry.message.address = address & 0xffff_ffff | u64::from(word) << 32,
                8 => entry.message.data = word,
                _ => entry.control = word & ENTRY_MASKED,
            }
        }
        self.update();
    }

    /// A guest's read of the pending bits.
    pub(crate) fn read_pending(&self, at: usize, data: &mut [u8]) {
        let mut bits = vec![0; self.table.len().div_ceil(64) * 8];
        for source in &self.sources {
            let vector = usize::from(source.vector);
            if vector < self.table.len() && source.attached.is_none() && source.notifier.is_raised()
            {
                bits[vector / 8] |= 1 << (vector % 8);
            }
        }
        copy_out(&bits, at, data);
    }

    /// Brings KVM in line with the table: routes first, then attachments.
    fn update(&mut self) {
        let enabled = self.control & CONTROL_ENABLE != 0 && self.control & CONTROL_MASK_ALL == 0;
        for source in &mut self.sources {
            let entry = self.table.get(usize::from(source.vector));
            let deliverable = entry.filter(|entry| enabled && entry.control & ENTRY_MASKED == 0);
            let gsi = deliverable.map(|_| self.first_gsi + u32::from(source.vector));
            if let (Some(entry), Some(gsi)) = (deliverable, gsi) {
                report(self.controller.route(gsi, entry.message));
            }
            if source.attached != gsi {
                source.attach_to(self.controller.as_ref(), gsi);
            }
        }
    }
}

impl Source {
    fn attach_to(&mut self, controller: &dyn InterruptController, gsi: Option<u32>) {
        if let Some(old) = self.attached.take() {
            report(controller.detach(&self.notifier, old));
        }
        let Some(gsi) = gsi else { return };
        // Raised again after attaching, so that exactly one delivery follows, whether or not KVM looks at the counter.
        let pending = self.notifier.clear();
        report(controller.attach(&self.notifier, gsi));
        self.attached = Some(gsi);
        if pending {
            self.notifier.raise();
        }
    }
}

impl Drop for Msix {
    fn drop(&mut self) {
        for source in &mut self.sources {
            source.attach_to(self.controller.as_ref(), None);
        }
    }
}

fn report(result: anyhow::Result<()>) {
    if let Err(error) = result {
        tracing::error!("interrupt set-up failed, the guest may lose interrupts: {error:#}");
    }
}

/// Copies what there is from `at` on; the rest reads as zero.
fn copy_out(bytes: &[u8], at: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(at.saturating_add(index)).copied().unwrap_or(0);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    /// Records routes and attachments.
    #[derive(Default)]
    pub(crate) struct FakeController {
        pub(crate) routes: Mutex<BTreeMap<u32, Message>>,
        pub(crate) attached: Mutex<Vec<u32>>,
    }

    impl InterruptController for FakeController {
        fn route(&self, gsi: u32, message: Message) -> anyhow::Result<()> {
            self.routes.lock().unwrap().insert(gsi, message);
            Ok(())
        }

        fn attach(&self, _: &Notifier, gsi: u32) -> anyhow::Result<()> {
            self.attached.lock().unwrap().push(gsi);
            Ok(())
        }

        fn detach(&self, _: &Notifier, gsi: u32) -> anyhow::Result<()> {
            let mut attached = self.attached.lock().unwrap();
            let at = attached
                .iter()
                .position(|other| *other == gsi)
                .expect("was attached");
            attached.remove(at);
            Ok(())
        }

        fn allocate(&self, _: u32) -> u32 {
            24
        }
    }

    fn msix(sources: usize) -> (Arc<FakeController>, Vec<Arc<Notifier>>, Msix) {
        let controller = Arc::new(FakeController::default());
        let notifiers: Vec<_> = (0..sources)
            .map(|_| Arc::new(Notifier::new().unwrap()))
            .collect();
        let msix = Msix::new(controller.clone(), notifiers.clone());
        (controller, notifiers, msix)
    }

    fn unmask(msix: &mut Msix, vector: usize, address: u32, data: u32) {
        msix.write_table(vector * ENTRY_SIZE, &address.to_le_bytes());
        msix.write_table(vector * ENTRY_SIZE + 8, &data.to_le_bytes());
        msix.write_table(vector * ENTRY_SIZE + 12, &[0; 4]);
    }

    #[test]
    fn a_source_is_attached_only_when_enabled_unmasked_and_assigned() {
        let (controller, _, mut msix) = msix(2);
        let attached = || controller.attached.lock().unwrap().clone();
        assert_eq!(msix.set_vector(1, 1), 1);
        unmask(&mut msix, 1, 0xfee0_1000, 0x41);
        assert!(attached().is_empty(), "MSI-X is off");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        assert!(attached().is_empty(), "the function is masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(attached(), [25]);
        let message = Message {
            address: 0xfee0_1000,
            data: 0x41,
        };
        assert_eq!(controller.routes.lock().unwrap()[&25], message);
        drop(msix);
        assert!(controller.attached.lock().unwrap().is_empty());
    }

    #[test]
    fn an_interrupt_while_masked_is_pending_and_is_delivered_once_unmasked() {
        let (_, notifiers, mut msix) = msix(1);
        msix.set_vector(0, 0);
        msix.set_control(CONTROL_ENABLE);
        let pending = |msix: &Msix| {
            let mut bits = [0; 8];
            msix.read_pending(0, &mut bits);
            bits[0]
        };
        assert_eq!(pending(&msix), 0);
        notifiers[0].raise();
        assert_eq!(pending(&msix), 1);
        unmask(&mut msix, 0, 0xfee0_0000, 1);
        assert!(
            notifiers[0].is_raised(),
            "KVM finds it raised after attaching"
        );
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_message_that_changes_while_masked_is_routed_before_delivery() {
        let (controller, _, mut msix) = msix(1);
        msix.set_vector(0, 0);
        msix.set_control(CONTROL_ENABLE);
        unmask(&mut msix, 0, 0xfee0_0000, 1);
        msix.write_table(12, &[1, 0, 0, 0]);
        assert!(controller.attached.lock().unwrap().is_empty());
        msix.write_table(0, &0x0000_0041_fee0_3000_u64.to_le_bytes());
        unmask(&mut msix, 0, 0xfee0_3000, 2);
        let message = Message {
            address: 0x41_fee0_3000,
            data: 2,
        };
        assert_eq!(controller.routes.lock().unwrap()[&24], message);
        let mut entry = [0; 8];
        msix.read_table(8, &mut entry);
        assert_eq!(u64::from_le_bytes(entry), 2);
    }

    #[test]
    fn vectors_that_do_not_exist_are_refused() {
        let (_, _, mut msix) = msix(2);
        assert_eq!(msix.set_vector(0, 2), NO_VECTOR);
        assert_eq!(msix.set_vector(7, 1), 1);
        assert_eq!(msix.vector(7), NO_VECTOR);
    }

    #[test]
    fn odd_table_accesses_have_no_effect() {
        let (_, _, mut msix) = msix(1);
        msix.write_table(13, &[0; 4]);
        msix.write_table(12, &[0; 2]);
        msix.write_table(usize::MAX - 3, &[0; 4]);
        let mut data = [0xff; 8];
        msix.read_table(12, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.read_table(usize::MAX - 7, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
