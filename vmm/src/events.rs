//! Wake-ups between threads, KVM and back-ends ([`Notifier`]), and the queue on which threads report to the main thread.

#![expect(
    unsafe_code,
    reason = "the eventfd type that KVM's crate takes cannot lend its descriptor safely"
)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Something that the main thread must act upon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The guest powered itself off.
    GuestPowerOff,
    /// The guest asked for a reset, or a CPU triple-faulted.
    GuestReset,
    /// The machine cannot go on.
    Failed(String),
}

/// Sends events; cheap to clone.
#[derive(Clone)]
pub(crate) struct EventSender {
    queue: Sender<(u64, Event)>,
    wake: Arc<Notifier>,
    current: Arc<AtomicU64>,
    generation: u64,
}

impl EventSender {
    /// Queues an event and wakes the main thread.
    pub(crate) fn send(&self, event: Event) {
        // The receiver goes away only when the process ends; then nobody needs the event.
        if self.queue.send((self.generation, event)).is_ok() {
            self.wake.raise();
        }
    }

    /// Makes all that was sent before void: it came from a machine that is no more. Other clones of the sender stay void.
    pub(crate) fn renew(&mut self) {
        self.generation = self.current.fetch_add(1, Ordering::SeqCst) + 1;
    }
}

/// The main thread's end of the queue.
pub(crate) struct EventReceiver {
    queue: Receiver<(u64, Event)>,
    wake: Arc<Notifier>,
    current: Arc<AtomicU64>,
}

impl EventReceiver {
    /// The next event, if there is one.
    pub(crate) fn next(&self) -> Option<Event> {
        self.wake.clear();
        let current = self.current.load(Ordering::SeqCst);
        let mut events = self.queue.try_iter();
        events.find_map(|(generation, event)| (generation == current).then_some(event))
    }
}

impl AsFd for EventReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Makes an event queue.
///
/// # Errors
/// No eventfd can be made.
pub(crate) fn queue() -> Result<(EventSender, EventReceiver)> {
    let wake = Arc::new(Notifier::new()?);
    let (sender, receiver) = channel();
    let current = Arc::new(AtomicU64::new(0));
    Ok((
        EventSender {
            queue: sender,
            wake: wake.clone(),
            current: current.clone(),
            generation: 0,
        },
        EventReceiver {
            queue: receiver,
            wake,
            current,
        },
    ))
}

/// An eventfd that never blocks.
pub(crate) struct Notifier(EventFd);

impl Notifier {
    /// Makes one that is not raised.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(crate) fn new() -> Result<Self> {
        EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map(Self)
            .context("eventfd")
    }

    /// Raises it. A counter that is full is raised already.
    pub(crate) fn raise(&self) {
        let _ = self.0.write(1);
    }

    /// Takes the raise away; returns whether there was one.
    pub(crate) fn clear(&self) -> bool {
        self.0.read().is_ok()
    }

    /// Whether it is raised.
    pub(crate) fn is_raised(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// The type that KVM's crate takes.
    pub(crate) fn event_fd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as `self`, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notifier_keeps_a_raise_until_it_is_cleared() {
        let notifier = Notifier::new().unwrap();
        assert!(!notifier.is_raised());
        notifier.raise();
        notifier.raise();
        assert!(notifier.is_raised());
        assert!(notifier.clear());
        assert!(!notifier.clear());
    }

    #[test]
    fn events_arrive_in_order() {
        let (sender, receiver) = queue().unwrap();
        sender.send(Event::GuestReset);
        sender.send(Event::GuestPowerOff);
        assert_eq!(receiver.next(), Some(Event::GuestReset));
        assert_eq!(receiver.next(), Some(Event::GuestPowerOff));
        assert_eq!(receiver.next(), None);
    }

    #[test]
    fn what_a_machine_sent_before_its_reset_is_void() {
        let (mut sender, receiver) = queue().unwrap();
        let old = sender.clone();
        old.send(Event::GuestReset);
        sender.renew();
        old.send(Event::GuestReset);
        sender.send(Event::GuestPowerOff);
        assert_eq!(receiver.next(), Some(Event::GuestPowerOff));
        assert_eq!(receiver.next(), None);
    }
}
