//! What stands in the way of a port's frames and can be changed while they flow.
//!
//! [`PortHooks`] is the control thread's side. Each pair makes its own readers of it on its thread.

use std::cell::{Cell, Ref};
use std::sync::Arc;

use executor::sync::Notify;

use crate::capture::Capture;
use crate::counters::{PairCounters, PortCounters};
use crate::guard::Guard;
use crate::limit::Limits;
use crate::live::{Live, LiveReader};

/// Limits of one direction that come and go.
pub type LiveLimits = Arc<Live<Option<Arc<Limits>>>>;

/// The hooks of a port. Clones are the same hooks.
#[derive(Clone)]
pub struct PortHooks {
    /// What is counted.
    pub counters: Arc<PortCounters>,
    /// The limits of what the guest receives; `None`: none.
    pub rx_limits: LiveLimits,
    /// The limits of what the guest sends; `None`: none.
    pub tx_limits: LiveLimits,
    /// What the guest may claim to be; `None`: anything.
    pub guard: Arc<Live<Option<Arc<Guard>>>>,
    /// Where frames are recorded.
    pub capture: Capture,
    /// The port notifies it when what [`super::Port::state`] tells has changed.
    pub changed: Arc<Notify>,
}

impl PortHooks {
    /// Hooks of a port with `pairs` queue pairs, that let everything pass.
    pub fn new(pairs: u16) -> PortHooks {
        PortHooks {
            counters: Arc::new(PortCounters::new(pairs)),
            rx_limits: Arc::default(),
            tx_limits: Arc::default(),
            guard: Arc::default(),
            capture: Capture::default(),
            changed: Arc::default(),
        }
    }
}

/// One pair's view of them, on its thread.
pub(super) struct PairHooks {
    index: usize,
    counters: Arc<PortCounters>,
    rx_limits: LiveReader<Option<Arc<Limits>>>,
    tx_limits: LiveReader<Option<Arc<Limits>>>,
    guard: LiveReader<Option<Arc<Guard>>>,
    capture: Capture,
    capturing: Cell<bool>,
}

impl PairHooks {
    /// Of pair `index`.
    pub(super) fn new(hooks: &PortHooks, index: u16) -> PairHooks {
        PairHooks {
            index: usize::from(index),
            counters: hooks.counters.clone(),
            rx_limits: LiveReader::new(hooks.rx_limits.clone()),
            tx_limits: LiveReader::new(hooks.tx_limits.clone()),
            guard: LiveReader::new(hooks.guard.clone()),
            capture: hooks.capture.clone(),
            capturing: Cell::new(false),
        }
    }

    /// Where the pair counts.
    #[inline]
    pub(super) fn counters(&self) -> &PairCounters {
        &self.counters.pairs[self.index]
    }

    /// What limits the frames to the guest.
    #[inline]
    pub(super) fn rx_limits(&self) -> Ref<'_, Option<Arc<Limits>>> {
        self.rx_limits.get()
    }

    /// What limits the frames from the guest.
    #[inline]
    pub(super) fn tx_limits(&self) -> Ref<'_, Option<Arc<Limits>>> {
        self.tx_limits.get()
    }

    /// Where frames are recorded, while they are and once more afterwards, so that it notices.
    #[inline]
    pub(super) fn capture(&self) -> Option<&Capture> {
        let active = self.capture.is_active();
        (self.capturing.replace(active) || active).then_some(&self.capture)
    }

    /// What checks the frames from the guest.
    #[inline]
    pub(super) fn guard(&self) -> Ref<'_, Option<Arc<Guard>>> {
        self.guard.get()
    }
}
