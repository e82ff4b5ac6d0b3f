//! Power-off, reset and the power button: three byte-wide ports that the ACPI tables name.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::acpi::POWER_BUTTON_EVENT;
use crate::events::{Event, EventSender, Notifier};
use crate::layout;

/// The power management registers.
pub(crate) struct Power {
    events: EventSender,
    pending: AtomicU8,
    interrupt: Arc<Notifier>,
}

impl Power {
    /// `interrupt` is wired to [`layout::EVENT_GSI`].
    pub(crate) fn new(events: EventSender, interrupt: Arc<Notifier>) -> Self {
        Self {
            events,
            pending: AtomicU8::new(0),
            interrupt,
        }
    }

    /// Presses the power button.
    pub(crate) fn press_button(&self) {
        self.pending.fetch_or(POWER_BUTTON_EVENT, Ordering::SeqCst);
        self.interrupt.raise();
    }

    /// A guest's read.
    pub(crate) fn read(&self, port: u16) -> u8 {
        if port == layout::EVENT_PORT {
            self.pending.swap(0, Ordering::SeqCst)
        } else {
            0
        }
    }

    /// A guest's write. The sleep control register is the one of ACPI 6.5, 4.8.3.7.
    pub(crate) fn write(&self, port: u16, value: u8) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        let sleep_type = value >> 2 & 7;
        match port {
            layout::SLEEP_CONTROL_PORT
                if value & SLEEP_ENABLE != 0 && sleep_type == layout::SLEEP_TYPE_S5 =>
            {
                self.events.send(Event::GuestPowerOff);
            }
            layout::RESET_PORT if value == layout::RESET_VALUE => {
                self.events.send(Event::GuestReset);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events;

    #[test]
    fn the_sleep_and_reset_registers_report_what_the_guest_asks() {
        let (sender, receiver) = events::queue().unwrap();
        let power = Power::new(sender, Arc::new(Notifier::new().unwrap()));
        power.write(layout::SLEEP_CONTROL_PORT, 5 << 2);
        power.write(layout::SLEEP_CONTROL_PORT, 3 << 2 | 1 << 5);
        power.write(layout::RESET_PORT, 0);
        assert_eq!(receiver.next(), None);
        power.write(layout::SLEEP_CONTROL_PORT, 5 << 2 | 1 << 5);
        power.write(layout::RESET_PORT, layout::RESET_VALUE);
        assert_eq!(receiver.next(), Some(Event::GuestPowerOff));
        assert_eq!(receiver.next(), Some(Event::GuestReset));
    }

    #[test]
    fn reading_the_event_port_clears_a_press_of_the_button() {
        let (sender, _receiver) = events::queue().unwrap();
        let interrupt = Arc::new(Notifier::new().unwrap());
        let power = Power::new(sender, interrupt.clone());
        power.press_button();
        assert!(interrupt.is_raised());
        assert_eq!(power.read(layout::EVENT_PORT), POWER_BUTTON_EVENT);
        assert_eq!(power.read(layout::EVENT_PORT), 0);
    }
}
