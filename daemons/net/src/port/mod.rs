//! A vhost-user-net port: a guest's network card.
//!
//! ```text
//!   control thread:   Port ── Server ── device::NetDevice ──┬── control::Control (control queue)
//!                                         core::Core <──────┘      changes: shared::Shared
//!   thread of pair i: pair::Pair ── tx::Tx (ring 2i+1) ──> NetQueue ──> rx::Rx, a Sink (ring 2i, fifo::Fifo)
//! ```
//!
//! Promises: whatever the guest puts into its rings, it harms only itself: a frame that is none is dropped and counted, a ring
//! that breaks the rules of virtio is not read again. Frames of a ring are returned in their order, so that a successor of a
//! killed daemon goes on at the used index. Stopping never waits for the network.

mod control;
mod core;
mod device;
mod features;
mod fifo;
mod filter;
mod hooks;
mod kept;
mod options;
mod pair;
mod rx;
mod shared;
#[cfg(test)]
mod tests;
mod tx;

use std::rc::Rc;
use std::sync::Arc;

use anyhow::Context as _;
use executor::Handle;
use vhost_daemon::{Address, Server};

use crate::netdev::{Attachment, Netdev};
use core::{Core, ring_count};
use device::NetDevice;
use kept::Kept;
use pair::{PairParts, PairRemote};
use shared::Shared;

pub use hooks::{LiveLimits, PortHooks};
pub use options::{MAX_PAIRS, MIN_MTU, Offer, PortOptions, PortState, RingReport};

/// A running port. Lives on the control thread.
pub struct Port {
    core: Rc<Core>,
    server: Server,
    /// Serves every pair; kept for as long as they are attached.
    _netdev: Rc<dyn Netdev>,
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
        let id = options.id.clone();
        if let Some(most) = netdev.max_queues() {
            anyhow::ensure!(
                options.queues <= most,
                "port '{id}': queues={} is more than the back-end's {most}",
                options.queues
            );
        }
        let kept = options.kept.as_deref().map(|path| {
            let what = || format!("port '{id}': cannot keep its state in {}", path.display());
            Kept::open(path).with_context(what)
        });
        let kept = kept.transpose()?;
        let shared = Arc::new(Shared::new(options.mac, ring_count(&options)));
        let pairs = attach(&options, &*netdev, &threads, (&shared, &hooks)).await?;
        let offloads = (netdev.host_offloads(), netdev.guest_offloads());
        let core = Core::new(options, shared, pairs, offloads, hooks.changed);
        let core = Rc::new(core.keeping(kept));
        let device = Rc::new(NetDevice::new(core.clone()));
        let socket = match &address {
            Address::Listen(path) | Address::Connect(path) => path.display().to_string(),
            Address::ListenFd(_) => "that was handed over".to_owned(),
        };
        let server = match Server::start(device, address) {
            Ok(server) => server,
            Err(error) => {
                detach(core).await;
                return Err(error)
                    .with_context(|| format!("port '{id}': cannot use the socket {socket}"));
            }
        };
        core.announce_changes_to(server.config_changed());
        Ok(Port {
            core,
            server,
            _netdev: netdev,
        })
    }

    /// Plugs the cable in or out; the guest is told. While it is out, what the guest sends is dropped and it receives nothing.
    pub async fn set_link(&self, up: bool) {
        self.core.set_link(up);
        self.core.refresh_pairs().await;
    }

    /// Tells the guest another MTU, in bytes. A guest that started without one learns it when it starts again.
    ///
    /// # Errors
    /// When it is out of range.
    pub fn set_mtu(&self, mtu: u16) -> anyhow::Result<()> {
        options::check_mtu(&self.core.options.id, Some(mtu))?;
        self.core.set_mtu(mtu);
        Ok(())
    }

    /// Makes the network learn anew where the guest is.
    pub fn announce(&self) {
        self.core.announce();
    }

    /// The port as it is now.
    pub fn state(&self) -> PortState {
        self.core.state(self.server.connected())
    }

    /// Ends the front-end's session and closes the queues.
    pub async fn stop(self) {
        self.server.stop().await;
        detach(self.core).await;
    }
}

/// Makes the pairs of a port; all or none.
async fn attach(
    options: &PortOptions,
    netdev: &dyn Netdev,
    threads: &[Handle],
    (shared, hooks): (&Arc<Shared>, &PortHooks),
) -> anyhow::Result<Vec<PairRemote>> {
    let attachment = Attachment {
        port: options.id.clone(),
        mac: options.mac,
        queues: options.queues,
        vlan: options.vlan.clone(),
        isolated: options.isolated,
    };
    let port: Arc<str> = options.id.as_str().into();
    let mut pairs = Vec::new();
    for index in 0..options.queues {
        let thread = netdev.thread().unwrap_or_else(|| match threads.len() {
            0 => Handle::current(),
            count => threads[usize::from(index) % count].clone(),
        });
        let started = match netdev.attach(&attachment, index) {
            Ok(open) => {
                let parts = PairParts {
                    port: port.clone(),
                    index,
                    shared: shared.clone(),
                    hooks: hooks.clone(),
                    open,
                };
                PairRemote::start(thread, parts).await
            }
            Err(error) => Err(error),
        };
        match started {
            Ok(pair) => pairs.push(pair),
            Err(error) => {
                for pair in &pairs {
                    PairRemote::stop(pair).await;
                }
                let place = format!("port '{port}': cannot open queue {index} of its back-end");
                return Err(error).context(place);
            }
        }
    }
    Ok(pairs)
}

/// Ends the pairs of a port.
async fn detach(core: Rc<Core>) {
    for pair in &core.pairs {
        pair.stop().await;
    }
}
