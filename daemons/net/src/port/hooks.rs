//! What stands in the way of a port's frames and can be changed while they flow.
//!
//! [`PortHooks`] is the control thread's side. Each pair makes its own readers of it on its thread.

use std::sync::Arc;

use executor::sync::Notify;

use crate::capture::Capture;
use crate::counters::PortCounters;
use crate::guard::Guard;
use crate::limit::Limits;
use crate::live::Live;

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
