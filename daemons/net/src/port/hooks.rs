//! What stands in the way of a port's frames and can be changed while they flow.
//!
//! [`PortHooks`] is the control thread's side. Each pair makes its own readers of it on its thread.

use std::sync::Arc;

use crate::counters::PortCounters;

/// The hooks of a port. Clones are the same hooks.
#[derive(Clone, Debug)]
pub struct PortHooks {
    /// What is counted.
    pub counters: Arc<PortCounters>,
}

impl PortHooks {
    /// Hooks of a port with `pairs` queue pairs, that let everything pass.
    pub fn new(pairs: u16) -> PortHooks {
        PortHooks {
            counters: Arc::new(PortCounters::new(pairs)),
        }
    }
}
