//! What the vhost-user device, its control queue and the port's owner share on the control thread.

use std::cell::{Cell, OnceCell, RefCell};
use std::sync::Arc;

use executor::sync::{Mutex, Notify};
use virtio_bindings::virtio_net as net;

use super::features::{self, Config, guest_offload_bits, has};
use super::filter::{Filter, Vlans};
use super::kept::{Driver, Kept, Said};
use super::options::{PortOptions, PortState, RingReport};
use super::pair::PairRemote;
use super::shared::{Shared, Used};
use crate::frame::MacAddress;
use crate::link::Offloads;

/// Length of a RARP frame without padding: Ethernet header and packet.
const RARP_LEN: usize = 14 + 28;
/// Shortest Ethernet frame without its check sequence.
const MIN_FRAME: usize = 60;

/// A ring that runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunningRing {
    /// In descriptors.
    pub(super) size: u16,
    /// Whether the front-end has it enabled.
    pub(super) enabled: bool,
}

/// A port's state.
pub(super) struct Core {
    pub(super) options: PortOptions,
    pub(super) shared: Arc<Shared>,
    pub(super) pairs: Vec<PairRemote>,
    host_offloads: Offloads,
    guest_offloads: Offloads,
    acked: Cell<u64>,
    mtu: Cell<Option<u16>>,
    /// The guest's address at its start: the port's, or the front-end's.
    mac: Cell<MacAddress>,
    /// The guest is asked to announce itself.
    pub(super) announcing: Cell<bool>,
    /// Whose turn it is to execute a command.
    pub(super) commands: Mutex<()>,
    /// The rings that run, by index.
    rings: RefCell<Vec<Option<RunningRing>>>,
    /// Notified when the configuration space changes.
    changed: OnceCell<Arc<Notify>>,
    /// Notified when [`Core::state`] has changed.
    state_changed: Arc<Notify>,
    /// Where a successor finds what the driver said.
    kept: Option<Kept>,
    /// Whose control queue runs, with what was returned to it by now.
    driver: Cell<Option<Driver>>,
}

impl Core {
    /// Of a port with these pairs, on a back-end with these offloads.
    pub(super) fn new(
        options: PortOptions,
        shared: Arc<Shared>,
        pairs: Vec<PairRemote>,
        (host_offloads, guest_offloads): (Offloads, Offloads),
        state_changed: Arc<Notify>,
    ) -> Core {
        let rings = RefCell::new(vec![None; usize::from(ring_count(&options))]);
        Core {
            shared,
            pairs,
            host_offloads,
            guest_offloads,
            acked: Cell::new(0),
            mtu: Cell::new(options.mtu),
            mac: Cell::new(options.mac),
            announcing: Cell::new(false),
            commands: Mutex::new(()),
            rings,
            changed: OnceCell::new(),
            state_changed,
            options,
            kept: None,
            driver: Cell::new(None),
        }
    }

    /// The same, with what the driver says kept there.
    pub(super) fn keeping(self, kept: Option<Kept>) -> Core {
        Core { kept, ..self }
    }

    /// Tells where to notify of changes of the configuration space.
    pub(super) fn announce_changes_to(&self, changed: Arc<Notify>) {
        // Set once, by whoever starts the port.
        let _ = self.changed.set(changed);
    }

    fn config_changed(&self) {
        if let Some(changed) = self.changed.get() {
            changed.notify_all();
        }
    }

    /// Features offered.
    pub(super) fn offered(&self) -> u64 {
        let mtu = self.mtu.get().is_some();
        features::offered(&self.options, mtu, self.host_offloads, self.guest_offloads)
    }

    /// Features acknowledged.
    pub(super) fn features(&self) -> u64 {
        self.acked.get()
    }

    /// Queue pairs of the port.
    pub(super) fn pair_count(&self) -> u16 {
        self.options.queues
    }

    /// Index of the control queue: after the last pair that there could be (virtio 1.2 section 5.1.2).
    pub(super) fn control_ring(&self) -> u16 {
        let multiqueue = has(self.features(), net::VIRTIO_NET_F_MQ);
        2 * if multiqueue { self.options.queues } else { 1 }
    }

    /// Whether ring `index` is the control queue of the driver that is there.
    pub(super) fn is_control(&self, index: u16) -> bool {
        has(self.features(), net::VIRTIO_NET_F_CTRL_VQ) && index == self.control_ring()
    }

    /// The front-end decides about the guest's address. What the guest may claim is the guard's business.
    pub(super) fn set_mac(&self, mac: MacAddress) {
        self.mac.set(mac);
        let mut filter = self.shared.filter.get();
        filter.mac = mac;
        self.shared.filter.set(filter);
        self.tell_change();
    }

    /// Back to what there was before any front-end.
    pub(super) fn reset(&self) {
        self.mac.set(self.options.mac);
        self.begin(0);
    }

    /// Starts over with a driver that acknowledged `features`. Until its control queue runs it may be one that a predecessor
    /// knew, which gets no frame that it said it cannot take.
    pub(super) fn begin(&self, features: u64) {
        self.acked.set(features);
        self.driver.set(None);
        self.announcing.set(false);
        self.shared.set_used(Used::Enabled);
        let before = self
            .kept
            .as_ref()
            .and_then(|kept| kept.of_features(features));
        let offloads = before.map_or(u64::MAX, |said| said.guest_offloads);
        self.shared
            .set_guest_offloads(guest_offload_bits(features) & offloads);
        self.shared.filter.set(Filter::open(self.mac.get()));
        self.tell_change();
    }

    /// Tells that the state has changed.
    pub(super) fn tell_change(&self) {
        self.state_changed.notify_all();
    }

    /// Ring `index` runs, or no more.
    pub(super) fn note_ring(&self, index: u16, running: Option<RunningRing>) {
        if let Some(ring) = self.rings.borrow_mut().get_mut(usize::from(index)) {
            *ring = running;
        }
        self.tell_change();
    }

    /// The front-end has enabled or disabled ring `index`, which runs.
    pub(super) fn note_enabled(&self, index: u16, enabled: bool) {
        if let Some(Some(ring)) = self.rings.borrow_mut().get_mut(usize::from(index)) {
            ring.enabled = enabled;
        }
        self.tell_change();
    }

    /// The control queue of `driver` runs. Of one that used it before (`was_used`) is obeyed what it said then. Where that is not
    /// known everything passes, and the pairs are those with something in their rings.
    pub(super) fn begin_control(&self, driver: Driver, was_used: bool) {
        self.driver.set(Some(driver));
        let features = self.features();
        match &self.kept {
            Some(kept) if !was_used => kept.forget(),
            Some(kept) => {
                if let Some(said) = kept.load(&driver).filter(|said| self.makes_sense(said)) {
                    return self.obey(said);
                }
                let port = &self.options.id;
                tracing::warn!(port, "nothing is known of what the driver said before");
            }
            None => {}
        }
        self.shared.set_guest_offloads(guest_offload_bits(features));
        self.begin_unknown(!was_used);
    }

    /// Whether a driver of this port, as it is now, can have said that.
    fn makes_sense(&self, said: &Said) -> bool {
        let pairs = match said.used {
            Used::First(pairs) => pairs <= self.pair_count(),
            Used::Enabled | Used::Filled => true,
        };
        pairs && said.guest_offloads & !guest_offload_bits(self.features()) == 0
    }

    /// Goes by what the driver said to a predecessor.
    fn obey(&self, said: Said) {
        self.shared.set_used(said.used);
        self.shared.set_guest_offloads(said.guest_offloads);
        self.shared.filter.set(said.filter);
        self.tell_change();
    }

    /// One more command is executed and about to be returned: what the driver has said by now is kept.
    pub(super) fn keep(&self) {
        let (Some(kept), Some(mut driver)) = (&self.kept, self.driver.get()) else {
            return;
        };
        driver.returned = driver.returned.map(|returned| returned.wrapping_add(1));
        self.driver.set(Some(driver));
        let said = Said {
            used: self.shared.used(),
            guest_offloads: self.shared.guest_offload_bits(),
            filter: self.shared.filter.get(),
        };
        kept.store(&driver, &said);
    }

    /// What is gone by for a driver that said nothing yet (`known`), or nobody knows what.
    fn begin_unknown(&self, known: bool) {
        let multiqueue = has(self.features(), net::VIRTIO_NET_F_MQ);
        let used = match (multiqueue, known) {
            (false, _) => Used::Enabled,
            (true, true) => Used::First(1),
            (true, false) => Used::Filled,
        };
        self.shared.set_used(used);
        if known && has(self.features(), net::VIRTIO_NET_F_CTRL_VLAN) {
            let mut filter = self.shared.filter.get();
            filter.vlans = Some(Vlans::none());
            self.shared.filter.set(filter);
        }
    }

    /// Lets every pair look at what is shared.
    pub(super) async fn refresh_pairs(&self) {
        for pair in &self.pairs {
            pair.refresh().await;
        }
    }

    /// The guest's address, as the port has it or the guest set it.
    fn mac(&self) -> MacAddress {
        self.shared.filter.get().mac
    }

    /// The configuration space.
    pub(super) fn config(&self) -> Vec<u8> {
        let config = Config {
            mac: self.mac.get(),
            link: self.shared.link(),
            announce: self.announcing.get(),
            pairs: self.options.queues,
            mtu: self.mtu.get().unwrap_or(0),
        };
        config.encode()
    }

    pub(super) fn set_link(&self, up: bool) {
        if self.shared.link() != up {
            self.shared.set_link(up);
            self.config_changed();
            self.tell_change();
        }
    }

    pub(super) fn set_mtu(&self, mtu: u16) {
        if self.mtu.replace(Some(mtu)) != Some(mtu) {
            self.config_changed();
            self.tell_change();
        }
    }

    /// Makes the network learn anew where the guest is: the guest announces itself where it can, else the daemon speaks for it.
    pub(super) fn announce(&self) {
        let control = usize::from(self.control_ring());
        let runs = self.rings.borrow().get(control).copied().flatten();
        if runs.is_some() && has(self.features(), net::VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.announcing.set(true);
            self.config_changed();
        } else {
            self.send_rarp(self.mac());
        }
    }

    /// Broadcasts that `mac` is here.
    pub(super) fn send_rarp(&self, mac: MacAddress) {
        if let Some(pair) = self.pairs.first() {
            pair.send(rarp(mac));
        }
    }

    /// As it is now, but for the connection.
    pub(super) fn state(&self, connected: bool) -> PortState {
        let rings = self.rings.borrow();
        let running = rings.iter().zip(0u16..).filter_map(|(ring, index)| {
            ring.map(|ring| RingReport {
                index,
                size: ring.size,
                enabled: ring.enabled,
                broken: self.shared.is_broken(index),
            })
        });
        let rings: Vec<RingReport> = running.collect();
        let enabled = (0..self.options.queues).filter(|pair| {
            let of_pair = |ring: &RingReport| ring.index / 2 == *pair && ring.enabled;
            rings.iter().any(of_pair)
        });
        let enabled = enabled.count() as u16;
        PortState {
            connected,
            features: self.features(),
            pairs: match self.shared.used() {
                Used::First(pairs) => enabled.min(pairs),
                Used::Enabled | Used::Filled => enabled,
            },
            link: self.shared.link(),
            mac: self.mac(),
            mtu: self.mtu.get(),
            rings,
        }
    }
}

/// Rings of a port.
pub(super) fn ring_count(options: &PortOptions) -> u16 {
    2 * options.queues + u16::from(options.offer.ctrl_vq)
}

/// A reverse ARP request of `mac` for itself, which tells every switch where it is (RFC 903).
fn rarp(mac: MacAddress) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_FRAME);
    frame.extend(MacAddress::BROADCAST.0);
    frame.extend(mac.0);
    frame.extend([0x80, 0x35]);
    // Ethernet, IPv4, address lengths, reverse request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in ["sender", "target"] {
        frame.extend(mac.0);
        frame.extend([0; 4]);
    }
    debug_assert_eq!(frame.len(), RARP_LEN);
    frame.resize(MIN_FRAME, 0);
    frame
}
