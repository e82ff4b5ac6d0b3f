//! A vhost-user-net port: a guest's network card.

mod hooks;
mod options;

use std::rc::Rc;

use executor::Handle;
use vhost_daemon::Address;

use crate::netdev::Netdev;

pub use hooks::{LiveLimits, PortHooks};
pub use options::{MAX_PAIRS, MIN_MTU, Offer, PortOptions, PortState, RingReport};

/// A running port. Lives on the control thread.
pub struct Port {
    options: PortOptions,
}

impl Port {
    /// Starts a port on the current (control) executor: opens its queues of `netdev`, pair i on thread i % n of `threads` (the
    /// current executor when there is none), unless the back-end has a thread of its own, and then waits for a front-end at
    /// `address`. A path is bound when this returns.
    ///
    /// # Errors
    /// Options out of range, queues that cannot be opened, an address that cannot be bound.
    pub async fn start(
        options: PortOptions,
        netdev: Rc<dyn Netdev>,
        address: Address,
        threads: Vec<Handle>,
        hooks: PortHooks,
    ) -> anyhow::Result<Port> {
        options.check()?;
        let _ = (netdev, address, threads, hooks);
        anyhow::bail!("port '{}' cannot start", options.id)
    }

    /// Plugs the cable in or out; the guest is told.
    pub fn set_link(&self, _up: bool) {}

    /// Tells the guest another MTU.
    ///
    /// # Errors
    /// When it is out of range, or the port started without one.
    pub fn set_mtu(&self, mtu: u16) -> anyhow::Result<()> {
        options::check_mtu(&self.options.id, Some(mtu))
    }

    /// Makes the network learn anew where the guest is.
    pub fn announce(&self) {}

    /// The port as it is now.
    pub fn state(&self) -> PortState {
        PortState {
            connected: false,
            features: 0,
            pairs: 0,
            link: false,
            mac: self.options.mac,
            mtu: self.options.mtu,
            rings: Vec::new(),
        }
    }

    /// Ends the front-end's session and closes the queues.
    pub async fn stop(self) {}
}
